"""Files that the nuScenes benchmarks take: detection (one JSON), lidarseg (a ``.bin`` a sweep) and panoptic (an ``.npz`` a
sweep). What is written is checked first, and can be read again by the same rules.

Boxes leave the ego frame of their key-frame for nuScenes' global frame: center in meters, size as width, length, height,
rotation as a unit quaternion w, x, y, z, velocity in m/s along global x and y.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.spatial.transform import Rotation

from occstream.evaluation.detection import (
    ATTRIBUTES,
    NO_ATTRIBUTE,
    NUSCENES,
    BoxSet,
    check_boxes,
    default_attributes,
)
from occstream.evaluation.panoptic import NUSCENES_THINGS, join_labels, split_labels
from occstream.sharding.poses import apply, inverse, rotate
from occstream.sharding.rows import Row
from occstream.sharding.schema import OCC3D
from occstream.sharding.storage import join, publish, read_bytes

Split = Literal["train", "val", "test", "mini_train", "mini_val"]
SPLITS = ("train", "val", "test", "mini_train", "mini_val")
_TOKEN = re.compile(r"[0-9A-Za-z_-]{1,80}")
_LARGEST = 1 << 32  # bytes of a submission that is read
_MOST_POINTS = 1 << 24  # of a sweep
_KINDS = len(OCC3D.classes)  # lidarseg's ids are 1..16, as Occ3D's
_THINGS = frozenset(OCC3D.id(name) for name in NUSCENES_THINGS)


@dataclass(frozen=True)
class Inputs:
    """What a method looked at, as a submission has to say."""

    camera: bool = False
    lidar: bool = False
    radar: bool = False
    map: bool = False
    external: bool = False

    def meta(self) -> dict[str, bool]:
        return {f"use_{name}": value for name, value in asdict(self).items()}


def global_boxes(token: str, found: BoxSet, ego_to_global: np.ndarray) -> list[dict[str, Any]]:
    """A sample's predictions as the benchmark's records, the surest 500 at most are allowed.

    Args:
        token: of the sample.
        found: in the ego frame, with scores; they move in its x and y. Where a box has no attribute it gets the default one
            of its class and speed.
        ego_to_global: (4, 4) at the key-frame.

    Raises:
        ValueError: a value that no box can have, too many boxes, or no token.
    """
    _check_token(token)
    check_boxes(token, found, NUSCENES, predicted=True)
    n = len(found.boxes)
    if not n:
        return []
    boxes, scores = np.asarray(found.boxes, np.float64), found.scored()
    speed = np.zeros((n, 2)) if found.velocity is None else np.asarray(found.velocity, np.float64)
    attributes = default_attributes(found.classes, speed)
    if found.attributes is not None:
        attributes = np.where(found.attributes == NO_ATTRIBUTE, attributes, found.attributes)
    centers = apply(ego_to_global, boxes[:, :3])
    velocity = rotate(ego_to_global, np.pad(speed, ((0, 0), (0, 1))))[:, :2]
    turns = Rotation.from_matrix(ego_to_global[:3, :3]) * Rotation.from_rotvec(boxes[:, 6:] * [0, 0, 1])
    quaternions = turns.as_quat(canonical=True, scalar_first=True)
    return [
        {
            "sample_token": token,
            "translation": centers[i].tolist(),
            "size": boxes[i, [4, 3, 5]].tolist(),
            "rotation": quaternions[i].tolist(),
            "velocity": velocity[i].tolist(),
            "detection_name": NUSCENES.classes[found.classes[i]],
            "detection_score": float(scores[i]),
            "attribute_name": ATTRIBUTES[attributes[i]] if attributes[i] != NO_ATTRIBUTE else "",
        }
        for i in range(n)
    ]


def ego_boxes(records: list[dict[str, Any]], ego_to_global: np.ndarray) -> BoxSet:
    """The way back: records of one sample as boxes of its ego frame, upright there."""
    n, to_ego = len(records), inverse(ego_to_global)
    rows = [Row(f"record {i}", record) for i, record in enumerate(records)]
    boxes, velocity = np.zeros((n, 7)), np.zeros((n, 2))
    for i, row in enumerate(rows):
        turn = rotate(to_ego, row.rotation("rotation").T)[0]  # the box's x axis
        boxes[i, :3] = apply(to_ego, row.numbers("translation", 3))
        boxes[i, [4, 3, 5]], boxes[i, 6] = row.numbers("size", 3), np.arctan2(turn[1], turn[0])
        velocity[i] = np.linalg.solve(ego_to_global[:2, :2], row.numbers("velocity", 2))  # none along ego z
    names = [row.text("attribute_name", empty=True) for row in rows]
    return BoxSet(
        boxes,
        np.array([NUSCENES.classes.index(row.text("detection_name")) for row in rows], np.int64),
        velocity,
        np.array([ATTRIBUTES.index(name) if name else NO_ATTRIBUTE for name in names], np.int64),
        np.array([float(row.numbers("detection_score")) for row in rows]),
    )


def write_detection(
    url: str, results: Mapping[str, list[dict[str, Any]]], inputs: Inputs, samples: Collection[str] | None = None
) -> None:
    """Writes a detection submission, complete or not at all.

    Args:
        url: of the JSON file.
        results: records by sample token, see ``global_boxes``; samples without a box have an empty list.
        inputs: what the method looked at.
        samples: tokens that have to be there, all of the split; None: not compared.

    Raises:
        ValueError: samples are missing or unknown, or a record is not valid; nothing is written.
    """
    content = {"meta": inputs.meta(), "results": {token: results[token] for token in sorted(results)}}
    _check_detection(str(url), content, samples)
    publish(json.dumps(content, allow_nan=False).encode(), str(url))


def read_detection(
    url: str, samples: Collection[str] | None = None
) -> tuple[dict[str, bool], dict[str, list[dict[str, Any]]]]:
    """(meta, records by sample token) of a submission. Raises ValueError that names sample, record and field."""
    data = _read(str(url), _LARGEST)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: not readable as JSON ({str(error)[:120]}); write it again") from None
    _check_detection(str(url), content, samples)
    return content["meta"], content["results"]


def _check_detection(url: str, content: Any, samples: Collection[str] | None) -> None:
    whole = Row(url, content)
    meta, results = whole.row("meta"), whole.row("results").values
    if set(meta.values) != set(Inputs().meta()):
        raise ValueError(f"{url}: meta has {', '.join(sorted(meta.values))}, expected {', '.join(Inputs().meta())}")
    for name in meta.values:
        meta.flag(name)
    if samples is not None:
        _compare(url, "sample", results, samples)
    for token, records in results.items():
        _check_token(token)
        if not isinstance(records, list) or len(records) > NUSCENES.most:
            size = f"{len(records)} boxes" if isinstance(records, list) else "no list"
            raise ValueError(f"{url}: sample {token} has {size}, at most {NUSCENES.most} boxes are allowed")
        for i, record in enumerate(records):
            _check_record(Row(f"{url}: sample {token}, box {i}", record), token)


def _check_record(row: Row, token: str) -> None:
    if row.text("sample_token") != token:
        raise row.error("sample_token", f"is {row.text('sample_token')}, it is listed below {token}")
    for name, count in (("translation", 3), ("velocity", 2)):
        row.numbers(name, count)
    if not (row.numbers("size", 3) > 0).all():
        raise row.error("size", "is not positive")
    row.rotation("rotation")
    score = row.numbers("detection_score")
    if not 0 <= score <= 1:
        raise row.error("detection_score", f"is {float(score):g}, not within 0..1")
    if row.text("detection_name") not in NUSCENES.classes:
        raise row.error("detection_name", f"is {row.text('detection_name')!r}; known: {', '.join(NUSCENES.classes)}")
    name = row.text("attribute_name", empty=True)
    if name and name not in ATTRIBUTES:
        raise row.error("attribute_name", f"is {name!r}; known: {', '.join(ATTRIBUTES)}, or empty")


def write_meta(
    root: str, split: Split, inputs: Inputs, task: Literal["segmentation", "tracking"] | None = None
) -> None:
    """``SPLIT/submission.json`` of a lidarseg or (with ``task``) panoptic submission."""
    _check_split(split)
    meta = {"task": task, **inputs.meta()} if task else inputs.meta()
    publish(json.dumps({"meta": meta}).encode(), join(str(root), split, "submission.json"))


def write_lidarseg(root: str, split: Split, token: str, classes: np.ndarray) -> None:
    """``lidarseg/SPLIT/TOKEN_lidarseg.bin``: one byte a point, 1..16.

    Args:
        root: of the submission.
        token: of the LiDAR's ``sample_data``.
        classes: (N,) integers in the order of the sweep's points.

    Raises:
        ValueError: no points, or a class that the benchmark refuses (0, and so "empty").
    """
    classes = np.asarray(classes)
    _check_classes(f"sweep {token}", classes)
    publish(classes.astype(np.uint8).tobytes(), _file(root, "lidarseg", split, token))


def read_lidarseg(root: str, split: Split, token: str, points: int | None = None) -> np.ndarray:
    """(N,) uint8 of a sweep. Raises ValueError if it is missing, of another size than ``points``, or holds other classes."""
    url = _file(root, "lidarseg", split, token)
    classes = np.frombuffer(_read(url, _MOST_POINTS), np.uint8)
    _check_points(url, classes, points)
    _check_classes(url, classes)
    return classes


def write_panoptic(root: str, split: Split, token: str, classes: np.ndarray, *, instances: np.ndarray) -> None:
    """``panoptic/SPLIT/TOKEN_panoptic.npz``: ``data``, uint16 class * 1000 + instance.

    Args:
        root: of the submission.
        token: of the LiDAR's ``sample_data``.
        classes: (N,) integers 1..16 in the order of the sweep's points.
        instances: (N,) integers 0..999; 0 on stuff, and on things that belong to no instance (they are one segment a class).

    Raises:
        ValueError: no points, a class that is refused, or an instance of stuff.
    """
    labels = join_labels(classes, instances)
    _check_panoptic(f"sweep {token}", labels)
    content = io.BytesIO()
    np.savez_compressed(content, data=labels)
    publish(content.getvalue(), _file(root, "panoptic", split, token))


def read_panoptic(root: str, split: Split, token: str, points: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(classes uint8, instances uint16) of a sweep. Raises ValueError as ``read_lidarseg`` does."""
    url = _file(root, "panoptic", split, token)
    data = _read(url, 4 * _MOST_POINTS)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > 4 * _MOST_POINTS:
            raise ValueError(f"unpacks to {size} bytes")
        labels = np.load(io.BytesIO(data), allow_pickle=False)["data"]
    except Exception as error:  # zip, zlib, header: numpy raises whatever they raise
        raise ValueError(f"{url}: not readable as an .npz with data ({str(error)[:120]}); write it again") from None
    if labels.dtype != np.uint16 or labels.ndim != 1:
        raise ValueError(f"{url}: data is {labels.dtype} {labels.shape}, expected uint16 (points,)")
    _check_points(url, labels, points)
    _check_panoptic(url, labels)
    return split_labels(labels)


def check_sweeps(root: str, kind: Literal["lidarseg", "panoptic"], split: Split, points: Mapping[str, int]) -> None:
    """Reads a whole submission again: its ``submission.json`` and the file of every sweep.

    Args:
        points: number of points by token of the LiDAR's ``sample_data``, of the whole split.

    Raises:
        ValueError: with the first file that is missing or wrong.
    """
    _check_split(split)
    url = join(str(root), split, "submission.json")
    try:
        meta = Row(url, json.loads(_read(url, 1 << 20))).row("meta")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{url}: not readable as JSON ({str(error)[:120]}); write it again") from None
    for name in Inputs().meta():
        meta.flag(name)
    for token, count in points.items():
        (read_lidarseg if kind == "lidarseg" else read_panoptic)(root, split, token, count)


def _check_classes(where: str, classes: np.ndarray) -> None:
    if not classes.size:
        raise ValueError(f"{where}: has no points")
    if bad := classes[(classes < 1) | (classes >= _KINDS)].tolist():
        raise ValueError(
            f"{where}: class {bad[0]} at {len(bad)} points; the benchmark takes 1..{_KINDS - 1}, choose among these"
        )


def _check_panoptic(where: str, labels: np.ndarray) -> None:
    classes, instances = split_labels(labels)
    _check_classes(where, classes)
    thing = np.isin(classes, list(_THINGS))
    if (~thing & (instances > 0)).any():
        raise ValueError(f"{where}: {int((~thing & (instances > 0)).sum())} points of stuff have an instance, not 0")


def _check_points(url: str, labels: np.ndarray, points: int | None) -> None:
    if points is not None and len(labels) != points:
        raise ValueError(f"{url}: has {len(labels)} labels, the sweep has {points} points")


def _check_token(token: str) -> None:
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"{token[:80]!r} is not a token of nuScenes")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; choose {', '.join(SPLITS)}")


def _file(root: str, kind: Literal["lidarseg", "panoptic"], split: Split, token: str) -> str:
    _check_split(split)
    _check_token(token)
    return join(str(root), kind, split, f"{token}_{kind}.{'bin' if kind == 'lidarseg' else 'npz'}")


def _read(url: str, most: int) -> bytes:
    try:
        data = read_bytes(url, 0, most + 1)
    except FileNotFoundError:
        raise ValueError(f"{url}: is missing; write it first") from None
    if len(data) > most:
        raise ValueError(f"{url}: is larger than {most} bytes")
    return data


def _compare(url: str, what: str, there: Collection[str], wanted: Collection[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    for names, verb in ((missing, "lacks"), (unknown, "has unknown")):
        if names:
            raise ValueError(f"{url}: {verb} {len(names)} of {len(set(wanted))} {what}s, the first is {names[0]}")
