"""City maps as files of other programs: LAZ and PLY points, and a georeferenced picture from above."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from occstream.evaluation.citymap import CityMap, extra

_PLY = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("class", "u1")]
)
LARGEST_SIDE = 30_000  # pixels of a picture


def write_laz(city: CityMap, path: Path) -> int:
    """A LAZ 1.4 file of the occupied voxels' centers (point format 7, class ids as classification, colors), in global
    coordinates. Returns how many points.

    Raises:
        ValueError: laspy or lazrs is not installed.
    """
    laspy = extra("laspy")
    extra("lazrs")
    header = laspy.LasHeader(point_format=7, version="1.4")
    header.offsets, header.scales = city.origin, city.voxel / 2  # centers are whole numbers of half voxels
    header.generating_software, header.creation_date = "occstream", None
    colors, count = _colors(city), 0
    with laspy.open(path, mode="w", header=header, do_compress=True) as file:
        for index, classes in city.occupied():
            points = laspy.ScaleAwarePointRecord.zeros(len(index), header=header)
            points.X, points.Y, points.Z = (2 * index + 1).T
            points.classification = classes
            points.red, points.green, points.blue = colors[classes].T.astype(np.uint16) * 257
            file.write_points(points)
            count += len(index)
    return count


def write_ply(city: CityMap, path: Path) -> int:
    """A binary PLY file of the occupied voxels' centers in meters from the map's origin, which a comment gives. Returns how
    many points."""
    count = sum(len(index) for index, _ in city.occupied())
    kinds = {"f4": "float", "u1": "uchar"}
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment origin {' '.join(repr(float(v)) for v in city.origin)}",
        f"comment classes {' '.join(city.taxonomy.classes)}",
        f"element vertex {count}",
        *(f"property {kinds[kind[-2:]]} {name}" for name, kind, *_ in _PLY.descr),
        "end_header",
    ]
    colors = _colors(city)
    with path.open("wb") as file:
        file.write(("\n".join(lines) + "\n").encode())
        for index, classes in city.occupied():
            rows = np.empty(len(index), _PLY)
            for axis, name in enumerate("xyz"):
                rows[name] = (index[:, axis] + 0.5) * city.voxel[axis]
            for channel, name in enumerate(("red", "green", "blue")):
                rows[name] = colors[classes, channel]
            rows["class"] = classes
            file.write(rows.tobytes())
    return count


def write_bev(city: CityMap, path: Path) -> tuple[int, int]:
    """A PNG of the highest occupied voxel's class in each column, x to the right and y upward, with a world file (.pgw) that
    places it in the global frame. Where nothing is occupied it is transparent. Returns width and height.

    Raises:
        ValueError: the map is too large for one picture.
    """
    width, height = city.array("class").shape[:2]
    if max(width, height) > LARGEST_SIDE:
        raise ValueError(
            f"{city.folder}: a picture of {width} x {height} pixels is too large; make maps of fewer drives"
        )
    top, kind = np.full((width, height), -1, np.int32), np.zeros((width, height), np.uint8)
    for index, classes in city.occupied():  # sorted by x, y, z in each shard: the last of a column is its highest
        x, y, z = index.T
        last = np.r_[(np.diff(x) != 0) | (np.diff(y) != 0), True]
        x, y, z, classes = x[last], y[last], z[last], classes[last]
        higher = z > top[x, y]
        top[x[higher], y[higher]], kind[x[higher], y[higher]] = z[higher], classes[higher]
    picture = np.zeros((width, height, 4), np.uint8)
    seen = top >= 0
    picture[seen, :3], picture[seen, 3] = _colors(city)[kind[seen]], 255
    Image.fromarray(np.ascontiguousarray(picture.transpose(1, 0, 2)[::-1])).save(path)
    left, above = city.origin[0] + city.voxel[0] / 2, city.origin[1] + (height - 0.5) * city.voxel[1]
    numbers = (city.voxel[0], 0.0, 0.0, -city.voxel[1], left, above)
    path.with_suffix(".pgw").write_text("".join(f"{float(v)!r}\n" for v in numbers))
    return width, height


def _colors(city: CityMap) -> np.ndarray:
    return np.array(city.taxonomy.colors, np.uint8)
