"""OpenScene (nuPlan at 2 Hz): metadata pickles, eight cameras, merged LiDAR, sparse occupancy with flow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.lenses import lens_of
from occstream.sharding.poses import compose, inverse, rotate
from occstream.sharding.rawfiles import (
    Wanted,
    choose,
    entries,
    existing_folder,
    listed,
    read_jpeg,
    read_npy,
    read_pcd,
    read_pickle,
    sparse_to_dense,
)
from occstream.sharding.rawtree import Place, ahead, raw_place
from occstream.sharding.rows import Row
from occstream.sharding.schema import (
    IGNORE,
    OPENSCENE,
    Boxes,
    Camera,
    Findings,
    Frame,
    Labels,
    LidarSweep,
    Scene,
    Taxonomy,
)

# Raw class -> ours; 1 to 3 are placeholders that no voxel should have, 11 is what densifying leaves free.
RAW_FREE = 11
_TO_OURS = np.array([0, IGNORE, IGNORE, IGNORE, 1, 2, 3, 4, 5, 6, 7, OPENSCENE.free_id], np.uint8)

EGO_HEIGHT = 0.325  # meters: nuPlan's ego frame has its origin in the rear axle, above the road
_TO_ROAD = np.eye(4)
_TO_ROAD[2, 3] = EGO_HEIGHT


def open_source(
    *,
    root: str,
    metadata: str | None = None,
    labels: bool = True,
    scenes: Wanted = None,
) -> OpenScene:
    """A folder that OpenScene's archives were unpacked in.

    Args:
        root: holds the metadata and what it points to, at any depth (``sensor_blobs/<split>/``, ``occupancy/<split>/``).
        metadata: a pickle or a folder of pickles, one per log, with frame records; None for all ``*.pkl`` below ``root``.
        labels: read the occupancy (metadata of v1.0 names it; v1.1 has none) and leave out the frames without it; False
            leaves labels to ``--labels lidar``.
        scenes: names of the scenes to read, or how many of the first; None for all.

    Raises:
        ValueError: no metadata, a damaged one, one that wants to run code, an unknown scene, or scenes of which some have
            occupancy and some none.
    """
    folder = existing_folder(root, "OpenScene's metadata and sensor folders")
    place = raw_place(metadata) if metadata else folder
    files = [place] if place.is_file() else entries(place, "**/*.pkl")
    if not files:
        raise ValueError(
            f"{place}: no metadata pickles (*.pkl) there; unpack openscene_metadata_*.tgz or set metadata="
        )
    records: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        content = read_pickle(file)
        infos = content.get("infos") if isinstance(content, dict) else content
        if not isinstance(infos, list) or not all(isinstance(info, dict) and "token" in info for info in infos):
            raise ValueError(f"{file}: not OpenScene metadata (a list of frame records, or a dict with 'infos')")
        for info in infos:
            row = Row(f"{file}: frame {str(info['token'])[:40]}", info)
            row.text("token")
            row.whole("timestamp")
            records[row.text("scene_name")].append(info)
    names = choose(scenes, sorted(records), place)
    chosen = {name: sorted(records[name], key=lambda info: info["timestamp"]) for name in names}
    chosen, found = _with_occupancy(folder, place, chosen) if labels else (chosen, Findings(labels="labels=false"))
    tops = [folder / name for name in ("sensor_blobs", "occupancy") if (folder / name).is_dir()]
    bases = (folder, *tops, *(split for top in tops for split in entries(top) if split.is_dir()))
    native = labels and any(_has(info) for infos in chosen.values() for info in infos)
    return OpenScene(folder, bases, chosen, get_grid("openscene") if native else None, found)


def _has(info: dict) -> bool:
    return Row("", info).has("occ_gt_final_path")


def _with_occupancy(
    folder: Place, place: Place, scenes: dict[str, list[dict]]
) -> tuple[dict[str, list[dict]], Findings]:
    """The frames that have occupancy, if any has; public files lack it for some frames of a scene.

    Raises:
        ValueError: some scenes have none at all: their labels would have to come from somewhere else.
    """
    have = {name: [info for info in infos if _has(info)] for name, infos in scenes.items()}
    lacking = [name for name, infos in have.items() if not infos]
    if len(lacking) == len(scenes):
        unused = ""
        if (folder / "occupancy").is_dir():
            unused = (
                f"{folder / 'occupancy'}: there is occupancy, but the metadata in {place} names none of it; take the "
                "metadata that belongs to it (v1.0 names it)"
            )
        return scenes, Findings("the metadata names no occupancy", unused)
    if lacking:
        raise ValueError(
            f"{place}: {listed('scene', lacking)} without any occupancy, but others have it; choose with scenes=, or "
            "labels=false"
        )
    without = [
        f"{name} frames {', '.join(str(i) for i, info in enumerate(infos) if not info.get('occ_gt_final_path'))}"
        for name, infos in scenes.items()
        if len(have[name]) < len(infos)
    ]
    count = sum(len(infos) for infos in scenes.values()) - sum(len(infos) for infos in have.values())
    frames = f"{count} frame{'s' if count > 1 else ''}"
    left = (f"{frames} without occupancy, of {listed('scene', without)}",) if without else ()
    return have, Findings("the metadata names occupancy files", left_out=left)


@dataclass(frozen=True)
class OpenScene:
    """See ``open_source``. A ``Source`` with native labels where the metadata names them."""

    root: Place
    bases: tuple[Place, ...]
    records: dict[str, list[dict]]
    grid: VoxelGrid | None
    findings: Findings

    name = "openscene"
    convention = "openscene"
    taxonomy: Taxonomy = OPENSCENE

    def __repr__(self) -> str:
        return f"OpenScene({self.root.name}, grid={self.grid.name if self.grid else None}, lenses, road)"  # was without, once

    def scene_names(self) -> list[str]:
        return list(self.records)

    def load(self, name: str) -> Scene:
        """One scene. Raises ValueError if a file is missing or damaged."""
        infos = self.records[name]
        attributes: dict[str, Any] = {
            key: str(infos[0].get(key, "")) for key in ("log_name", "map_location", "vehicle_name")
        }
        attributes["ego_height"] = EGO_HEIGHT
        return Scene(name, [self._frame(name, i, info) for i, info in enumerate(infos)], attributes)

    def _frame(self, scene: str, index: int, info: dict) -> Frame:
        row = Row(f"{self.root}: frame {info['token']} of scene {scene}", info)
        ahead(self._files(row))
        ego = compose(row.pose("ego2global_translation", "ego2global_rotation"), inverse(_TO_ROAD))
        lidar = compose(_TO_ROAD, row.pose("lidar2ego_translation", "lidar2ego_rotation"))
        timestamp = row.whole("timestamp")
        cameras = {}
        for name in row.row("cams").values if row.has("cams") else ():
            camera = row.row("cams").row(name)
            jpeg, width, height = read_jpeg(self._find(camera.text("data_path")))
            intrinsics = camera.intrinsics("cam_intrinsic")
            distortion = camera.numbers("distortion", -1) if camera.has("distortion") else None
            try:
                lens = lens_of(width, height, intrinsics, distortion)
            except ValueError as error:
                raise camera.error("distortion", f"is not a lens: {error}") from None
            cameras[name] = Camera(
                jpeg=jpeg,
                width=width,
                height=height,
                intrinsics=intrinsics,
                sensor_to_ego=compose(lidar, camera.pose("sensor2lidar_translation", "sensor2lidar_rotation")),
                ego_to_global=ego,  # OpenScene has no pose for each camera
                timestamp=timestamp,
                lens=lens,
            )
        return Frame(
            scene=scene,
            index=index,
            token=row.text("token"),
            timestamp=timestamp,
            ego_to_global=ego,
            cameras=cameras,
            lidar=self._sweep(row, lidar, ego, timestamp),
            boxes=_boxes(row.row("anns"), lidar) if row.has("anns") else None,
            labels=self._labels(row, lidar) if self.grid else None,
        )

    def _files(self, row: Row) -> Iterator[Place]:
        """Files of a frame."""
        for name in row.row("cams").values if row.has("cams") else ():
            yield self._find(row.row("cams").row(name).text("data_path"))
        wanted = ("lidar_path", *(("occ_gt_final_path", "flow_gt_final_path") if self.grid else ()))
        yield from (self._find(row.text(path)) for path in wanted if row.has(path))

    def _sweep(self, row: Row, lidar: np.ndarray, ego: np.ndarray, timestamp: int) -> LidarSweep | None:
        if not row.has("lidar_path"):
            return None
        path = self._find(row.text("lidar_path"))
        fields = read_pcd(path)
        if not {"x", "y", "z"} <= fields.keys():
            raise ValueError(f"{path}: has no fields x, y and z, only {', '.join(fields)}")
        return LidarSweep(
            xyz=np.stack([fields[a] for a in "xyz"], 1).astype(np.float32),
            sensor_to_ego=lidar,
            ego_to_global=ego,
            timestamp=timestamp,
            intensity=fields["intensity"].astype(np.float32) if "intensity" in fields else None,
            ring=fields["ring"].astype(np.uint8) if "ring" in fields else None,
        )

    def _labels(self, row: Row, lidar: np.ndarray) -> Labels:
        path = self._find(row.text("occ_gt_final_path"))
        rows = read_npy(path)
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iuf" or not np.isfinite(rows).all():
            raise ValueError(f"{path}: is not an array of finite numbers")
        if rows.ndim != 2 or rows.shape[1] != 2:
            raise ValueError(f"{path}: shape {rows.shape}, expected (N, 2) of flat index and class")
        assert self.grid is not None  # or nobody asks for labels
        x, y, _ = self.grid.shape
        flat, raw = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        index = np.stack([flat % x, flat // x % y, flat // (x * y)], 1)  # flat = z * X * Y + y * X + x
        dense = sparse_to_dense(index, raw, self.grid.shape, RAW_FREE, where=path)
        if dense.max() > RAW_FREE:
            raise ValueError(f"{path}: class {dense.max()} is out of range 0..{RAW_FREE}")
        binary = dense != RAW_FREE
        flow = None
        if row.has("flow_gt_final_path"):
            where = self._find(row.text("flow_gt_final_path"))
            velocity = read_npy(where)
            if not isinstance(velocity, np.ndarray) or velocity.dtype.kind not in "iuf":
                raise ValueError(f"{where}: is not an array of numbers")
            if velocity.shape != (len(rows), 2):
                raise ValueError(f"{where}: shape {velocity.shape} does not fit the {len(rows)} voxels of {path.name}")
            grid = np.zeros((*self.grid.shape, 2), np.float32)
            grid[tuple(index.T)] = velocity
            flow = grid[binary]
        return Labels(binary, _TO_OURS[dense], flow=flow)

    def _find(self, path: str) -> Place:
        """A file that the metadata names by a path whose first folders depend on where its author's data lay."""
        names = [
            part for part in Path(path.replace("\\", "/")).parts if part != "/"
        ]  # below our folders, never outside
        if ".." in names or "\0" in path:
            raise ValueError(
                f"{self.root}: the metadata names {path!r:.100}, which points outside the data set's folder"
            )
        for start in range(max(1, len(names) - 1)):  # the longest ending that is there, with its folder at least
            for base in self.bases:
                candidate = base / "/".join(names[start:])
                if candidate.is_file():
                    return candidate
        raise ValueError(
            f"{self.root}: has no file {path}, which the metadata names; complete the download or choose scenes=[…]"
        )


def _boxes(anns: Row, lidar: np.ndarray) -> Boxes | None:
    names, tracks = anns.texts("gt_names"), anns.texts("track_tokens")
    shape = (len(names), 7)  # already x, y, z, length, width, height, yaw; ego
    boxes = anns.numbers("gt_boxes", *shape) if names else np.zeros(shape)
    velocity = anns.numbers("gt_velocity_3d", len(names), 3) if names else np.zeros((0, 3))
    boxes = boxes + [0, 0, EGO_HEIGHT, 0, 0, 0, 0]
    if len(tracks) != len(names):
        raise anns.error("track_tokens", f"are {len(tracks)} for {len(names)} boxes")
    velocity = rotate(lidar, velocity)  # LiDAR axes -> ego axes
    return Boxes(boxes.astype(np.float32), names, tracks, velocity[:, :2].astype(np.float32))
