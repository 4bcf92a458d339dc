"""SemanticKITTI: ``sequences/NN/{velodyne,labels,voxels,image_2}``, camera-frame poses.

Poses are of the cameras; the ego frame is placed on the road below the rear axle by the car's drawing: the LiDAR, whose
axes it has, is 1.73 m above it and 0.76 m ahead of the axle. Voxels stay in the LiDAR's frame.

Key-frames are the scans that have voxel labels, or every ``stride``-th scan where there are none; the scans between them
are sweeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.poses import compose, inverse
from occstream.sharding.rawfiles import (
    choose,
    entries,
    existing_folder,
    listed,
    numbered,
    parse_numbers,
    read_file,
    read_jpeg,
    read_points,
    read_rows,
    read_text,
    read_values,
    rigid,
)
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.schema import (
    IGNORE,
    SEMANTICKITTI,
    Camera,
    Findings,
    Frame,
    Labels,
    LidarSweep,
    Scene,
    Taxonomy,
)

# Raw label -> class of the learning map (0: empty or unlabelled, IGNORE: to be ignored).
_LEARNING = {
    0: 0, 1: IGNORE, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10, 48: 11, 49: 12,
    50: 13, 51: 14, 52: IGNORE, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 99: IGNORE, 252: 1, 253: 7, 254: 6,
    255: 8, 256: 5, 257: 5, 258: 4, 259: 5,
}  # fmt: skip
FIRST_MOVING = 252
LIDAR_TO_EGO = np.eye(4)
LIDAR_TO_EGO[:3, 3] = 0.76, 0.0, 1.73
EGO_HEIGHT = 1.73  # meters above the road: where the origin would be without that
STEP_US = 100_000  # 10 turns a second, where there is no times.txt


def open_source(
    *,
    root: str,
    sequences: tuple[str, ...] | None = None,
    labels: bool = True,
    stride: int = 5,
    frames_per_scene: int = 100,
    sweeps: bool = True,
    cameras: bool = True,
) -> SemanticKitti:
    """A folder in the layout of SemanticKITTI.

    Args:
        root: holds ``sequences/``.
        sequences: names of folders below it; None for all.
        labels: read ``voxels/*.label`` where there are any, and leave out the scans without; False leaves labels to
            ``--labels lidar``.
        stride: one scan in this many is a key-frame, where there are no voxel labels.
        frames_per_scene: a sequence is cut into scenes of this many key-frames (a shard must not hold half a city).
        sweeps: read the scans between key-frames.
        cameras: read ``image_2`` where it is there.

    Raises:
        ValueError: a sequence, its calibration or its poses are missing or damaged, or some sequences have voxel labels and
            some none.
    """
    folder = existing_folder(existing_folder(root, "sequences/") / "sequences", "00/, 01/, …")
    if stride < 1 or frames_per_scene < 1:
        raise ValueError(f"stride ({stride}) and frames_per_scene ({frames_per_scene}) must be at least 1")
    names = choose(sequences, [p.name for p in entries(folder) if p.is_dir()], folder)
    scenes: dict[str, Piece] = {}
    with_labels = [name for name in names if labels and entries(folder / name / "voxels", "*.label")]
    lacking = [name for name in names if name not in with_labels]
    if with_labels and lacking:
        raise ValueError(
            f"{folder}: {listed('sequence', lacking)} without voxel labels, but {with_labels[0]} has them; choose "
            "sequences= or labels=false"
        )
    left_out = []
    for name in names:
        scans = numbered(folder / name / "velodyne", ".bin")
        marked = numbered(folder / name / "voxels", ".label")
        if not scans and not marked:
            raise ValueError(f"{folder / name}: has neither velodyne/*.bin nor voxels/*.label")
        keys = marked if with_labels else scans[::stride]
        scenes |= cut(name, keys, scans if sweeps else [], frames_per_scene)
        voxels = numbered(folder / name / "voxels", ".bin")
        if with_labels and (bare := [f"{scan:06d}" for scan in voxels if scan not in set(marked)]):
            left_out.append(f"{listed('scan', bare)} of sequence {name} with voxels but without a .label")
    grid = get_grid("semantickitti") if with_labels else None
    points = [name for name in names if entries(folder / name / "labels", "*.label")]
    mixture = ""
    if 0 < len(points) < len(names):
        mixture = (
            f"{folder}: {listed('sequence', [n for n in names if n not in points])} without labels of points, but {points[0]} "
            "has them; choose sequences=, so that all labels have classes or none"
        )
    why = "labels=false" if not labels else "voxels/*.label" if with_labels else "no sequence has voxels/*.label"
    return SemanticKitti(
        folder, scenes, grid, cameras, Findings(why, "", "labels/*.label" if points else "", mixture, tuple(left_out))
    )


@dataclass(frozen=True)
class Piece:
    """A scene: its folder, the scan numbers of its key-frames, and of the sweeps before each."""

    folder: str
    keys: tuple[int, ...]
    between: tuple[tuple[int, ...], ...]


def cut(folder: str, keys: list[int], scans: list[int], size: int, *, name: str = "") -> dict[str, Piece]:
    """Cuts a sequence into scenes ``<name>-000``, … of ``size`` key-frames."""
    pieces = {}
    for start in range(0, len(keys), size):
        chosen = keys[start : start + size]
        before = [keys[start - 1] if start else -1, *chosen]
        between = tuple(tuple(s for s in scans if a < s < b) for a, b in zip(before, chosen))
        pieces[f"{name or folder}-{start // size:03d}"] = Piece(folder, tuple(chosen), between)
    return pieces


@dataclass(frozen=True)
class SemanticKitti:
    """See ``open_source``."""

    root: Place
    scenes: dict[str, Piece]
    grid: VoxelGrid | None
    cameras: bool
    findings: Findings

    name = "semantickitti"
    convention = "semantickitti"
    taxonomy: Taxonomy = SEMANTICKITTI

    def __repr__(self) -> str:
        return (
            f"SemanticKitti(road, grid={self.grid.name if self.grid else None}, cameras={self.cameras}, {self.scenes})"
        )

    def scene_names(self) -> list[str]:
        return list(self.scenes)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or damaged."""
        piece = self.scenes[name]
        folder = self.root / piece.folder
        calibration = _calibration(folder / "calib.txt")
        velo_to_cam = rigid(calibration["Tr"], f"{folder / 'calib.txt'}: Tr")
        # Poses are of the left camera; the first scan's ego frame becomes the global frame.
        ego_to_cam = compose(velo_to_cam, inverse(LIDAR_TO_EGO))
        rows = read_rows(folder / "poses.txt", 12)
        poses = [
            compose(inverse(ego_to_cam), rigid(row, f"{folder / 'poses.txt'}: pose of scan {i}"), ego_to_cam)
            for i, row in enumerate(rows)
        ]
        times = _times(folder / "times.txt")
        frames = []
        for index, (scan, between) in enumerate(zip(piece.keys, piece.between)):
            pose, time = _at(poses, scan, folder), _time(times, scan)
            ahead(self._files(folder, scan, between))
            camera = self._camera(folder, scan, calibration=calibration, velo_to_cam=velo_to_cam, pose=pose, time=time)
            earlier = [_sweep(folder, s, _at(poses, s, folder), _time(times, s)) for s in between]
            frames.append(
                Frame(
                    scene=name,
                    index=index,
                    token=f"{piece.folder}/{scan:06d}",
                    timestamp=time,
                    ego_to_global=pose,
                    cameras={"image_2": camera} if camera else {},
                    lidar=_sweep(folder, scan, pose, time) or no_points(pose, time),
                    sweeps=[sweep for sweep in earlier if sweep is not None],
                    labels=read_voxels(folder / "voxels", scan, self.grid, _LEARNING) if self.grid else None,
                )
            )
        return Scene(name, frames, {"sequence": piece.folder, "ego_height": EGO_HEIGHT})

    def _files(self, folder: Place, scan: int, between: Iterable[int]) -> Iterator[Place]:
        """Those of a frame that are there."""
        files = [(kind, s, e) for s in (scan, *between) for kind, e in (("velodyne", "bin"), ("labels", "label"))]
        files += [("image_2", scan, "png")] if self.cameras else []
        files += [("voxels", scan, "label"), ("voxels", scan, "invalid")] if self.grid else []
        places = (folder / kind / f"{number:06d}.{ending}" for kind, number, ending in files)
        return (place for place in places if place.is_file())

    def _camera(
        self,
        folder: Place,
        scan: int,
        *,
        calibration: dict[str, np.ndarray],
        velo_to_cam: np.ndarray,
        pose: np.ndarray,
        time: int,
    ) -> Camera | None:
        path = folder / "image_2" / f"{scan:06d}.png"
        if not self.cameras or not path.is_file():
            return None
        jpeg, width, height = read_jpeg(path)
        projection = calibration["P2"].reshape(3, 4)
        offset = np.eye(4)
        whole = np.concatenate([projection, [[0, 0, 0, 1]]])
        offset[:3, 3] = -inverse(whole)[:3, 3]  # left gray camera -> left color camera
        to_ego = compose(LIDAR_TO_EGO, inverse(compose(offset, velo_to_cam)))
        return Camera(jpeg, width, height, projection[:, :3].copy(), to_ego, pose, time)


def no_points(pose: np.ndarray, time: int) -> LidarSweep:
    """The place of the LiDAR, in which the voxels lie, where its points were not downloaded."""
    return LidarSweep(np.zeros((0, 3), np.float32), LIDAR_TO_EGO.copy(), pose, time)


def _sweep(folder: Place, scan: int, pose: np.ndarray, time: int) -> LidarSweep | None:
    path = folder / "velodyne" / f"{scan:06d}.bin"
    if not path.is_file():
        return None
    points = read_points(path, 4)
    classes = moving = instances = None
    labels = folder / "labels" / f"{scan:06d}.label"
    if labels.is_file():
        raw = read_values(labels, "<u4")
        if len(raw) != len(points):
            raise ValueError(f"{labels}: has {len(raw)} labels for the {len(points)} points of {path.name}")
        raw, instances = raw & 0xFFFF, (raw >> 16).astype(np.uint16)
        learnt = learn(raw, _LEARNING, labels)
        classes = np.where((learnt == 0) | (learnt == IGNORE), IGNORE, learnt - 1).astype(np.uint8)
        moving = raw >= FIRST_MOVING
    return LidarSweep(
        xyz=points[:, :3].copy(),
        sensor_to_ego=LIDAR_TO_EGO.copy(),
        ego_to_global=pose,
        timestamp=time,
        intensity=points[:, 3].copy(),
        classes=classes,
        moving=moving,
        instances=instances,
    )


def learn(raw: np.ndarray, mapping: Mapping[int, int], where: Place) -> np.ndarray:
    """(N,) uint8 learning classes of raw labels. Raises ValueError for a label that the map does not have."""
    table = np.full(65536, -1, np.int16)
    table[list(mapping)] = list(mapping.values())
    found = table[raw]
    if (found < 0).any():
        raise ValueError(f"{where}: raw label {int(raw[found < 0][0])} is not in the learning map; another data set?")
    return found.astype(np.uint8)


def read_voxels(folder: Place, scan: int, grid: VoxelGrid, mapping: Mapping[int, int]) -> Labels:
    """Labels of ``NNNNNN.label`` (uint16) and ``.invalid`` (1 bit a voxel, highest bit first).

    ``binary`` is what is not empty, also of ignored classes; ``mask_lidar`` is what is not invalid.
    """
    path = folder / f"{scan:06d}.label"
    data = read_file(path)
    if len(data) != 2 * grid.size:
        raise ValueError(f"{path}: {len(data)} bytes, a {'x'.join(map(str, grid.shape))} grid has {2 * grid.size}")
    raw = np.frombuffer(data, "<u2")
    learnt = learn(raw, mapping, path)
    free = len(set(mapping.values()) - {0, IGNORE})
    semantic = np.where(learnt == 0, free, np.where(learnt == IGNORE, IGNORE, learnt - 1)).astype(np.uint8)
    known = ~read_bits(folder / f"{scan:06d}.invalid", grid)
    return Labels((raw != 0).reshape(grid.shape), semantic.reshape(grid.shape), known)


def read_bits(path: Place, grid: VoxelGrid) -> np.ndarray:
    """(X, Y, Z) bool of a bit-packed file. Raises ValueError if its size does not fit."""
    data = read_file(path)
    if len(data) != grid.size // 8:
        raise ValueError(
            f"{path}: {len(data)} bytes, a bit-packed {'x'.join(map(str, grid.shape))} grid has {grid.size // 8}"
        )
    return np.unpackbits(np.frombuffer(data, np.uint8)).view(bool).reshape(grid.shape)


def _calibration(path: Place) -> dict[str, np.ndarray]:
    found = {}
    for line in read_text(path).splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() in ("P2", "Tr"):
            found[name.strip()] = parse_numbers(numbers, f"{path}: {name.strip()}")
    for name in ("P2", "Tr"):
        if len(found.get(name, ())) != 12:
            raise ValueError(f"{path}: needs a line '{name}:' with 12 numbers; take the calibration of KITTI odometry")
    projection = found["P2"].reshape(3, 4)
    if not (projection[0, 0] > 0 and projection[1, 1] > 0 and np.allclose(projection[2, :3], [0, 0, 1])):
        raise ValueError(f"{path}: P2 is not the projection of a camera: {projection.tolist()}")
    return found


def _times(path: Place) -> np.ndarray | None:
    return read_rows(path, 1)[:, 0] if path.is_file() else None


def _time(times: np.ndarray | None, scan: int) -> int:
    return scan * STEP_US if times is None or scan >= len(times) else round(times[scan] * 1e6)


def _at(poses: list[np.ndarray], scan: int, folder: Place) -> np.ndarray:
    if scan >= len(poses):
        raise ValueError(f"{folder / 'poses.txt'}: has {len(poses)} poses, scan {scan:06d} has none")
    return poses[scan]
