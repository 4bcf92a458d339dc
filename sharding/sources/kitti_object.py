"""KITTI 3D object detection: ``training/{velodyne,calib,label_2,image_2}``, single frames of one LiDAR and one camera.

Frames are independent, so each is a scene of its own, and labels made from LiDAR know one sweep alone. The car is that of
SemanticKITTI: the ego frame has the LiDAR's axes and lies 1.73 m below and 0.76 m behind it.

Only what the left color camera sees has boxes: a point outside its image may lie on a road user without one, so such points are
cut off unless ``crop`` is false. Regions marked ``DontCare`` hold road users without a box, too; they are rectangles in the image
and go into the scene's attributes as they are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from occstream.sharding.exactmath import angle_of, cos_sin
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.rawfiles import (
    Wanted,
    choose,
    existing_folder,
    listed,
    numbered,
    parse_numbers,
    read_file,
    read_jpeg,
    read_points,
    read_text,
    rigid,
)
from occstream.sharding.rawtree import Place, ahead
from occstream.sharding.scanrows import rows_of_scan
from occstream.sharding.schema import (
    OCC3D_TO_OPENSCENE,
    Boxes,
    Camera,
    Findings,
    Frame,
    LidarSweep,
    Scene,
    Taxonomy,
    get_taxonomy,
)
from occstream.sharding.sources.semantickitti import EGO_HEIGHT, LIDAR_TO_EGO

BEAMS = 64
NO_BOX = "DontCare"
_TO_OCC3D = {
    "Car": "car", "Van": "car", "Truck": "truck", "Pedestrian": "pedestrian", "Person_sitting": "pedestrian",
    "Cyclist": "bicycle", "Tram": "others", "Misc": "others",
}  # fmt: skip


def open_source(
    *,
    root: str,
    split: Literal["training", "testing"] = "training",
    image_set: str | None = None,
    scenes: Wanted = None,
    taxonomy: Literal["occ3d", "openscene"] = "occ3d",
    cameras: bool = True,
    boxes: bool = True,
    crop: bool = True,
) -> KittiObject:
    """A folder in the layout of KITTI's 3D object detection.

    Args:
        root: holds ``training/`` and ``testing/``.
        split: folder to read; testing has no boxes.
        image_set: read only the frames that ``ImageSets/<image_set>.txt`` lists, such as train or val.
        scenes: names of frames, six digits; None for all.
        taxonomy: of the names of boxes.
        cameras: read ``image_2`` where it is there.
        boxes: read ``label_2``.
        crop: keep only points that project into the image of the left color camera.

    Raises:
        ValueError: a folder is missing or has no scans, or a frame that is asked for is not there.
    """
    top = existing_folder(root, "training/ and testing/")
    folder = existing_folder(top / split, "velodyne/, calib/, label_2/ and image_2/")
    there = [f"{number:06d}" for number in numbered(folder / "velodyne", ".bin")]
    if not there:
        raise ValueError(f"{folder / 'velodyne'}: has no scans (*.bin); complete the download")
    names = choose(scenes, there, folder / "velodyne")
    left_out = []
    if image_set is not None:
        wanted = set(read_text(top / "ImageSets" / f"{image_set}.txt").split())
        if lacking := sorted(wanted - set(there)):
            left_out.append(f"{listed('frame', lacking)} of {image_set}.txt without a scan")
        names = [name for name in names if name in wanted]
        if not names:
            raise ValueError(f"{top / 'ImageSets' / image_set}.txt: lists none of the frames in {folder / 'velodyne'}")
    with_boxes = boxes and split == "training"
    about = Findings("KITTI object has boxes alone", left_out=tuple(left_out))
    return KittiObject(folder, split, tuple(names), get_taxonomy(taxonomy), cameras, with_boxes, crop, about)


@dataclass(frozen=True)
class KittiObject:
    """See ``open_source``."""

    folder: Place = field(repr=False)
    split: str
    frames: tuple[str, ...]
    taxonomy: Taxonomy
    cameras: bool
    boxes: bool
    crop: bool
    findings: Findings = field(repr=False)

    name = "kitti_object"
    grid = None

    def scene_names(self) -> list[str]:
        return list(self.frames)

    def load(self, name: str) -> Scene:
        """One frame. Raises ValueError if a file is missing or damaged."""
        kinds = {"calib": "txt", "velodyne": "bin", "image_2": "png", "label_2": "txt"}
        files = [self.folder / kind / f"{name}.{ending}" for kind, ending in kinds.items()]
        ahead(file for file in files if file.is_file())
        calibration = _Calibration.read(self.folder / "calib" / f"{name}.txt")
        image = self.folder / "image_2" / f"{name}.png"
        points = read_points(self.folder / "velodyne" / f"{name}.bin", 4)
        rows = rows_of_scan(points, BEAMS).astype(np.uint8)
        if self.crop:
            seen = calibration.in_image(points[:, :3], _image_size(image))
            points, rows = points[seen], rows[seen]
        sweep = LidarSweep(
            xyz=points[:, :3].copy(),
            sensor_to_ego=LIDAR_TO_EGO.copy(),
            ego_to_global=np.eye(4),
            timestamp=0,
            intensity=points[:, 3].copy(),
            ring=rows,
        )
        cameras = {}
        if self.cameras and image.is_file():
            jpeg, width, height = read_jpeg(image)
            to_ego = compose(LIDAR_TO_EGO, inverse(calibration.velo_to_camera))
            cameras["image_2"] = Camera(jpeg, width, height, calibration.intrinsics, to_ego, np.eye(4), 0)
        attributes: dict = {"split": self.split, "ego_height": EGO_HEIGHT}
        found = None
        if self.boxes:
            path = self.folder / "label_2" / f"{name}.txt"
            objects = _objects(path)
            found = _boxes([o for o in objects if o.kind != NO_BOX], calibration, name, self.taxonomy)
            if ignored := [o.rectangle for o in objects if o.kind == NO_BOX]:
                attributes["dont_care"] = ignored
        frame = Frame(name, 0, f"{self.split}/{name}", 0, np.eye(4), cameras=cameras, lidar=sweep, boxes=found)
        return Scene(name, [frame], attributes)


@dataclass(frozen=True)
class _Calibration:
    """Where LiDAR and left color camera are.

    Attributes:
        velo_to_rect: LiDAR -> rectified camera 0, in which boxes are given.
        velo_to_camera: LiDAR -> left color camera, which has the same axes.
        intrinsics: (3, 3) of that camera.
    """

    velo_to_rect: np.ndarray
    velo_to_camera: np.ndarray
    intrinsics: np.ndarray

    @classmethod
    def read(cls, path: Place) -> _Calibration:
        """Raises ValueError if a line is missing or is no calibration."""
        found = {}
        for line in read_text(path).splitlines():
            key, _, numbers = line.partition(":")
            found[key.strip()] = (numbers, f"{path}: {key.strip()}")
        sizes = {"P2": 12, "R0_rect": 9, "Tr_velo_to_cam": 12}
        values = {key: parse_numbers(*found[key]) for key in sizes if key in found}
        for key, size in sizes.items():
            if len(values.get(key, ())) != size:
                raise ValueError(f"{path}: needs a line '{key}:' with {size} numbers; download the calibration again")
        rectify = np.eye(4)
        rectify[:3, :3] = values["R0_rect"].reshape(3, 3)
        to_rect = compose(
            rigid(rectify, f"{path}: R0_rect"), rigid(values["Tr_velo_to_cam"], f"{path}: Tr_velo_to_cam")
        )
        projection = values["P2"].reshape(3, 4)
        if not (projection[0, 0] > 0 and projection[1, 1] > 0 and np.allclose(projection[2, :3], [0, 0, 1])):
            raise ValueError(f"{path}: P2 is not the projection of a camera: {projection.tolist()}")
        offset = np.eye(4)  # of the left color camera from camera 0
        offset[:3, 3] = -inverse(np.concatenate([projection, [[0, 0, 0, 1]]]))[:3, 3]
        return cls(to_rect, compose(offset, to_rect), projection[:, :3].copy())

    def in_image(self, xyz: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(N,) bool, which points in the LiDAR's frame project into an image of ``size`` (width, height)."""
        x, y, z = apply(self.velo_to_camera, xyz.astype(np.float64)).T
        k = self.intrinsics
        ahead = z > 0
        depth = np.where(ahead, z, 1.0)
        u, v = (k[0, 0] * x + k[0, 1] * y) / depth + k[0, 2], k[1, 1] * y / depth + k[1, 2]
        return ahead & (u >= -0.5) & (u < size[0] - 0.5) & (v >= -0.5) & (v < size[1] - 0.5)


@dataclass(frozen=True)
class _Object:
    """A line of a label file: its type, rectangle in the image (left, top, right, bottom), height, width, length, bottom center
    in the rectified camera's frame, and angle about that camera's y axis."""

    kind: str
    rectangle: list[float]
    size: tuple[float, float, float]
    bottom: tuple[float, float, float]
    turn: float


def _objects(path: Place) -> list[_Object]:
    """All lines of a label file. Raises ValueError that names file and line."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        kind, _, rest = line.strip().partition(" ")
        if not kind:
            continue
        where = f"{path}: line {number}"
        values = parse_numbers(rest, where)
        if len(values) not in (14, 15):  # predictions have a score
            raise ValueError(
                f"{where}: has {len(values) + 1} columns, labels of KITTI have 15; download the file again"
            )
        if kind != NO_BOX and kind not in _TO_OCC3D:
            raise ValueError(f"{where}: unknown type {kind[:40]!r}; known: {', '.join(_TO_OCC3D)}, {NO_BOX}")
        if kind != NO_BOX and not (values[7:10] > 0).all():
            raise ValueError(f"{where}: height, width and length are {values[7:10].tolist()}, must be positive")
        found.append(_Object(kind, values[3:7].tolist(), tuple(values[7:10]), tuple(values[10:13]), float(values[13])))
    return found


def _boxes(objects: list[_Object], calibration: _Calibration, name: str, taxonomy: Taxonomy) -> Boxes:
    """Boxes in the ego frame: lifted from the bottom to the center along the camera's y axis, and turned by the heading."""
    to_ego = compose(LIDAR_TO_EGO, inverse(calibration.velo_to_rect))
    rows, names = [], []
    for o in objects:
        height, width, length = o.size
        x, y, z = o.bottom
        center = apply(to_ego, np.array([x, y - height / 2, z]))
        c, s = cos_sin(o.turn)
        ahead = rotate(to_ego, np.array([c, 0.0, -s]))
        rows.append((*center, length, width, height, angle_of(ahead[0], ahead[1])))
        kind = _TO_OCC3D[o.kind]
        names.append(OCC3D_TO_OPENSCENE[kind] if taxonomy.name == "openscene" else kind)
    return Boxes(np.array(rows, np.float32).reshape(-1, 7), names, [f"{name}-{i}" for i in range(len(rows))])


def _image_size(path: Place) -> tuple[int, int]:
    """Width and height without decoding the image. Raises ValueError if it is missing or damaged."""
    data = read_file(path, "its size says which points have boxes; or say crop=false")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); download it again") from None
