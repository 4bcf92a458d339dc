"""The devkit's half of the check; runs in its own environment, reads submissions, names scores as ours does.

Usage: DEVKIT/bin/python infra/metrics_check/theirs.py OUT
"""

# The devkit is installed in that environment alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_prediction
from nuscenes.eval.detection.config import config_factory
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.lidarseg.utils import ConfusionMatrix
from nuscenes.eval.panoptic.panoptic_seg_evaluator import PanopticEval
from nuscenes.utils.data_io import load_bin_file, panoptic_to_lidarseg

NAMES = (
    "noise", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
    "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade", "vegetation",
)  # fmt: skip
ERRORS = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}


class Tables:
    """What the devkit asks a data set for: the ego's place in a sample, and its bicycle racks."""

    def __init__(self, truth: dict[str, Any]) -> None:
        self.truth = truth

    def get(self, table: str, token: str) -> dict[str, Any]:
        if table == "sample":
            racks = [f"{token}/{i}" for i in range(len(self.truth["racks"][token]))]
            return {"data": {"LIDAR_TOP": token}, "anns": racks}
        if table == "sample_data":
            return {"ego_pose_token": token}
        if table == "ego_pose":
            return {"translation": self.truth["ego"][token]}
        sample, place = token.split("/")
        return {"category_name": "static_object.bicycle_rack", **self.truth["racks"][sample][int(place)]}


def detection(out: Path) -> dict[str, float]:
    truth, config = json.loads((out / "truth.json").read_text()), config_factory("detection_cvpr_2019")
    predicted, _ = load_prediction(str(out / "detection.json"), config.max_boxes_per_sample, DetectionBox)
    true = EvalBoxes()
    for sample in predicted.sample_tokens:
        true.add_boxes(sample, [true_box(record) for record in truth["boxes"][sample]])
    tables = Tables(truth)
    evaluation = object.__new__(DetectionEval)  # its constructor reads the data set
    evaluation.cfg, evaluation.verbose = config, False
    evaluation.gt_boxes, evaluation.pred_boxes = (
        filter_eval_boxes(tables, add_center_dist(tables, boxes), config.class_range) for boxes in (true, predicted)
    )
    found = evaluation.evaluate()[0].serialize()
    scores = {"NDS": found["nd_score"], "mAP": found["mean_ap"]}
    scores |= {ours: found["tp_errors"][theirs] for theirs, ours in ERRORS.items()}
    for name in config.class_names:
        scores[f"AP/{name}"] = found["mean_dist_aps"][name]
        scores |= {f"AP/{name}/{float(d):g}": ap for d, ap in found["label_aps"][name].items()}
        scores |= {f"{ours}/{name}": found["label_tp_errors"][name][theirs] for theirs, ours in ERRORS.items()}
    return scores


def true_box(record: dict[str, Any]) -> DetectionBox:
    return DetectionBox(
        sample_token=record["sample_token"],
        translation=record["translation"],
        size=record["size"],
        rotation=record["rotation"],
        velocity=record["velocity"] or (np.nan, np.nan),
        num_pts=record["points"],
        detection_name=record["detection_name"],
        attribute_name=record["attribute_name"],
    )


def points(out: Path) -> dict[str, dict[str, float]]:
    quality, semantic = PanopticEval(len(NAMES), ignore=[0], min_points=15), ConfusionMatrix(len(NAMES), 0)
    for file in sorted(out.glob("truth-*.npz")):
        sweep = file.stem[len("truth-") :]
        truth = np.load(file)["data"]
        found = load_bin_file(str(out / f"panoptic/val/{sweep}_panoptic.npz"), "panoptic")
        quality.addBatch(panoptic_to_lidarseg(found), found, panoptic_to_lidarseg(truth), truth)
        semantic.update(panoptic_to_lidarseg(truth), load_bin_file(str(out / f"lidarseg/val/{sweep}_lidarseg.bin")))
    pq, sq, rq, *of_class = quality.getPQ()
    miou, iou = quality.getSemIoU()
    scores = {"PQ": pq, "SQ": sq, "RQ": rq, "mIoU": miou}
    for c, name in enumerate(NAMES[1:], 1):
        scores |= {f"{key}/{name}": values.flatten()[c] for key, values in zip(("PQ", "SQ", "RQ"), of_class)}
        scores[f"IoU/{name}"] = iou[c]
    kinds = [scores[f"{'PQ' if c <= 10 else 'IoU'}/{name}"] for c, name in enumerate(NAMES[1:], 1)]
    scores["PQ_dagger"] = np.mean(kinds)
    lidarseg = {"mIoU": semantic.get_mean_iou(), "fwIoU": semantic.get_freqweighted_iou()}
    lidarseg |= {f"IoU/{name}": iou for name, iou in zip(NAMES[1:], semantic.get_per_class_iou()[1:])}
    plain = lambda scores: {name: float(value) for name, value in scores.items()}  # noqa: E731
    return {"panoptic": plain(scores), "lidarseg": plain(lidarseg)}


def main(out: Path) -> None:
    packages = ("nuscenes-devkit", "numpy", "pyquaternion", "shapely")
    versions = {name: importlib.metadata.version(name) for name in packages}
    scores = {"versions": {"python": platform.python_version(), **versions}, "detection": detection(out), **points(out)}
    (out / "theirs.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
