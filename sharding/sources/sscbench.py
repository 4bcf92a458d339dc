"""SSCBench-KITTI-360: ``data_2d_raw/<drive>/{image_00,voxels,cam0_to_world.txt}`` and ``calibration/``.

Voxel files are as SemanticKITTI's, with another learning map. Poses and images are of the rectified left camera, poses with
the frame number in front; the calibration to the LiDAR is of the camera before it was rectified, and ``R_rect_00`` turns the
one into the other. The ego frame is placed as SemanticKITTI's, whose car it is.

Raw turns carry no times of their points, so they stay as measured: at 10 m/s, what was seen at the start or the end of a
turn is half a meter off.
"""

from __future__ import annotations

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
    read_jpeg,
    read_points,
    read_rows,
    read_text,
    rigid,
)
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.schema import IGNORE, KITTI360, Camera, Findings, Frame, LidarSweep, Scene, Taxonomy
from occstream.sharding.sources.semantickitti import (
    EGO_HEIGHT,
    LIDAR_TO_EGO,
    STEP_US,
    Piece,
    cut,
    no_points,
    read_voxels,
)

# Raw label -> class of the benchmark's learning map (0: empty). What the map calls unlabelled although something is there
# (riders, trunks, outliers) is ignored.
_LEARNING = {
    0: 0, 1: IGNORE, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: IGNORE, 32: IGNORE, 40: 7, 44: 8, 48: 9,
    49: 10, 50: 11, 51: 12, 52: 17, 60: 7, 70: 13, 71: IGNORE, 72: 14, 80: 15, 81: 16, 99: 18, 252: 1, 253: IGNORE,
    254: 6, 255: IGNORE, 256: 5, 257: 5, 258: 4, 259: 5,
}  # fmt: skip


def open_source(
    *,
    root: str,
    drives: tuple[str, ...] | None = None,
    frames_per_scene: int = 100,
    cameras: bool = True,
) -> SscBench:
    """A folder in the layout of SSCBench-KITTI-360.

    Args:
        root: holds ``data_2d_raw/`` and ``calibration/`` (and, if the raw data set is there too, ``data_3d_raw/``).
        drives: names of folders below ``data_2d_raw``; None for all that have voxels.
        frames_per_scene: a drive is cut into scenes of this many key-frames.
        cameras: read ``image_00`` where it is there.

    Raises:
        ValueError: a drive, its calibration or its poses are missing or damaged.
    """
    folder = existing_folder(root, "data_2d_raw/ and calibration/")
    drive_folder = existing_folder(folder / "data_2d_raw", "2013_05_28_drive_0000_sync/, …")
    there = [p.name for p in entries(drive_folder) if entries(p / "voxels", "*.label")]
    bare = [p.name for p in entries(drive_folder) if p.is_dir() and p.name not in there]
    if not there:
        raise ValueError(f"{drive_folder}: no drive has voxels/*.label; unpack the voxel archives of SSCBench")
    scenes: dict[str, Piece] = {}
    for drive in choose(drives, there, drive_folder):
        keys = numbered(drive_folder / drive / "voxels", ".label")
        scenes |= cut(drive, keys, [], frames_per_scene, name=drive.removesuffix("_sync"))
    left = (f"{listed('drive', bare)} without voxels/*.label",) if bare and drives is None else ()
    return SscBench(folder, scenes, cameras, Findings("voxels/*.label", left_out=left))


def _cam_to_velo(path: Place) -> np.ndarray:
    return rigid(read_rows(path, 12)[0], path)


@dataclass(frozen=True)
class SscBench:
    """See ``open_source``."""

    root: Place
    scenes: dict[str, Piece]
    cameras: bool
    findings: Findings

    name = "sscbench"
    convention = "semantickitti"
    taxonomy: Taxonomy = KITTI360

    @property
    def grid(self) -> VoxelGrid:
        return get_grid("semantickitti")

    def __repr__(self) -> str:
        return f"SscBench(road, rectified, cameras={self.cameras}, {self.scenes})"

    def scene_names(self) -> list[str]:
        return list(self.scenes)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or damaged."""
        piece = self.scenes[name]
        folder = self.root / "data_2d_raw" / piece.folder
        # Rectified camera -> camera -> LiDAR.
        cam_to_velo = compose(
            _cam_to_velo(self.root / "calibration" / "calib_cam_to_velo.txt"), inverse(self._rectification())
        )
        cam_to_ego = compose(LIDAR_TO_EGO, cam_to_velo)
        rows = read_rows(folder / "cam0_to_world.txt", 17)
        where = folder / "cam0_to_world.txt"
        poses = {int(row[0]): rigid(row[1:], f"{where}: pose of frame {row[0]:.0f}") for row in rows}
        frames = []
        for index, scan in enumerate(piece.keys):
            if scan not in poses:
                raise ValueError(f"{folder / 'cam0_to_world.txt'}: has no pose of frame {scan:010d}")
            pose = compose(poses[scan], inverse(cam_to_ego))
            files = [folder / "voxels" / f"{scan:06d}.{ending}" for ending in ("label", "invalid")]
            image = folder / "image_00" / "data_rect" / f"{scan:06d}.png"
            ahead(file for file in [*files, *([image] if self.cameras else [])] if file.is_file())
            camera = self._camera(folder, scan, cam_to_ego, pose)
            frames.append(
                Frame(
                    scene=name,
                    index=index,
                    token=f"{piece.folder}/{scan:06d}",
                    timestamp=scan * STEP_US,
                    ego_to_global=pose,
                    cameras={"image_00": camera} if camera else {},
                    lidar=self._sweep(piece.folder, scan, pose) or no_points(pose, scan * STEP_US),
                    labels=read_voxels(folder / "voxels", scan, self.grid, _LEARNING),
                )
            )
        return Scene(name, frames, {"drive": piece.folder, "ego_height": EGO_HEIGHT})

    def _camera(self, folder: Place, scan: int, cam_to_ego: np.ndarray, pose: np.ndarray) -> Camera | None:
        path = folder / "image_00" / "data_rect" / f"{scan:06d}.png"
        if not self.cameras or not path.is_file():
            return None
        jpeg, width, height = read_jpeg(path)
        return Camera(jpeg, width, height, self._intrinsics(), cam_to_ego, pose, scan * STEP_US)

    def _intrinsics(self) -> np.ndarray:
        projection, where = self._perspective("P_rect_00")
        if len(projection) != 12 or not projection[0] > 0 or not projection[5] > 0:
            raise ValueError(f"{where} is not the projection of a camera (12 numbers)")
        return projection.reshape(3, 4)[:, :3].copy()

    def _rectification(self) -> np.ndarray:
        """(4, 4) from the axes of the camera to those of its rectified image."""
        numbers, where = self._perspective("R_rect_00")
        if len(numbers) != 9:
            raise ValueError(f"{where} is not a rotation (9 numbers)")
        return rigid(np.hstack([numbers.reshape(3, 3), np.zeros((3, 1))]), where)

    def _perspective(self, wanted: str) -> tuple[np.ndarray, str]:
        """Numbers of a line of ``perspective.txt``, and its place for messages."""
        path = self.root / "calibration" / "perspective.txt"
        for line in read_text(path).splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == wanted:
                return parse_numbers(numbers, f"{path}: {wanted}"), f"{path}: {wanted}"
        raise ValueError(f"{path}: has no line '{wanted}:'")

    def _sweep(self, drive: str, scan: int, pose: np.ndarray) -> LidarSweep | None:
        path = self.root / "data_3d_raw" / drive / "velodyne_points" / "data" / f"{scan:010d}.bin"
        if not path.is_file():
            return None
        points = read_points(path, 4)
        return LidarSweep(
            points[:, :3].copy(), LIDAR_TO_EGO.copy(), pose, scan * STEP_US, intensity=points[:, 3].copy()
        )
