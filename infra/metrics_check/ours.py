"""Our half of the check: scores random frames, and writes them as submissions with the truth beside them.

Usage: python infra/metrics_check/ours.py OUT [SEED]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import frames
import numpy as np
import torch

from occstream.evaluation.detection import ATTRIBUTES, NUSCENES, BoxSet, DetectionMetric
from occstream.evaluation.panoptic import nuscenes_panoptic, split_labels
from occstream.evaluation.pointseg import PointMetric
from occstream.evaluation.submission import (
    Inputs,
    check_sweeps,
    global_boxes,
    write_detection,
    write_lidarseg,
    write_meta,
    write_panoptic,
)
from occstream.sharding.rawfiles import pose_of


def score_boxes(scenes: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, float]:
    """Of the frames as they are, in their ego frames."""
    metric = DetectionMetric()
    for i, scene in enumerate(scenes):
        metric.update(token(i), BoxSet(**scene["predicted"]), BoxSet(**scene["truth"]), scene["racks"]["boxes"])
    return metric.result()


def score_points(scenes: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    panoptic, semantic = nuscenes_panoptic(), PointMetric()
    for scene in scenes:
        (classes, instances), (true, true_instances) = (split_labels(scene[k]) for k in ("predicted", "truth"))
        panoptic.update(classes, instances, true, true_instances)
        semantic.update(torch.from_numpy(classes), torch.from_numpy(true))
    return {"panoptic": panoptic.result(), "lidarseg": semantic.result()}


def token(i: int) -> str:
    return f"frame{i:04d}"


def pose(i: int) -> np.ndarray:
    """Ego to global of a frame, on a flat road: distances in x and y are those of the ego frame."""
    return pose_of((600 + 3.7 * i, 1600 - 1.3 * i, 0.3), (math.cos(0.1 * i), 0, 0, math.sin(0.1 * i)))


def write_boxes(scenes: list[dict[str, dict[str, np.ndarray]]], out: Path) -> None:
    results, truth, racks = {}, {}, {}
    for i, scene in enumerate(scenes):
        results[token(i)] = global_boxes(token(i), BoxSet(**scene["predicted"]), pose(i))
        truth[token(i)] = _truth_records(i, scene["truth"])
        rows = scene["racks"]["boxes"]
        as_cars = BoxSet(rows, np.zeros(len(rows), np.int64), scores=np.zeros(len(rows)))
        racks[token(i)] = global_boxes(token(i), as_cars, pose(i))
    write_detection(str(out / "detection.json"), results, Inputs(lidar=True), samples=truth)
    poses = {token(i): pose(i)[:3, 3].tolist() for i in range(len(scenes))}
    (out / "truth.json").write_text(json.dumps({"boxes": truth, "racks": racks, "ego": poses}))


def _truth_records(i: int, rows: dict) -> list[dict]:
    """As the exporter has them, with what only the truth knows or does not know."""
    known = {k: v for k, v in rows.items() if k != "points"}
    known |= {"velocity": np.nan_to_num(rows["velocity"]), "scores": np.ones(len(rows["boxes"]))}
    records = global_boxes(token(i), BoxSet(**known), pose(i))
    for n, record in enumerate(records):
        attribute = rows["attributes"][n]
        record["attribute_name"] = ATTRIBUTES[attribute] if attribute >= 0 else ""
        record["points"] = int(rows["points"][n])
        if np.isnan(rows["velocity"][n]).any():
            record["velocity"] = None
    return records


def write_points(scenes: list[dict[str, np.ndarray]], out: Path) -> None:
    write_meta(str(out), "val", Inputs(lidar=True))
    counts = {}
    for i, scene in enumerate(scenes):
        classes, instances = split_labels(scene["predicted"])
        counts[token(i)] = len(classes)
        write_lidarseg(str(out), "val", token(i), classes)
        write_panoptic(str(out), "val", token(i), classes, instances=instances)
        np.savez_compressed(out / f"truth-{token(i)}.npz", data=scene["truth"])
    for kind in ("lidarseg", "panoptic"):
        check_sweeps(str(out), kind, "val", counts)


def main(out: Path, seed: int = 0) -> None:
    out.mkdir(parents=True, exist_ok=True)
    boxes, points = frames.boxes(seed), frames.points(seed)
    assert set(frames.CLASSES) == set(NUSCENES.classes)
    write_boxes(boxes, out)
    write_points(points, out)
    scores = {"detection": score_boxes(boxes), **score_points(points)}
    (out / "ours.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
