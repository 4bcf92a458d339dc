"""The encoder of a voxel detector with both heads: they learn one frame by heart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import rules_of
from occstream.evaluation.evaluate import evaluate
from occstream.models.batch import Batch, Boxes, PointLabels, Points
from occstream.models.layers import SyncBatchNorm
from occstream.models.lidarnet import LidarOutputs
from occstream.models.rotated import corners
from occstream.models.spot import SpotConfig
from occstream.pretrain.config import parse_config
from occstream.pretrain.tasks.spot import SpotTask
from occstream.sharding.schema import IGNORE, OCC3D

RULES = rules_of(OCC3D)
RECIPE = {
    "task": "spot",
    "stage": "finetune",
    "grid": "tiny",
    "model": {
        "point_range": (-12.8, -12.8, -2.0, 12.8, 12.8, 4.0),
        "voxel": (0.2, 0.2, 0.15),
        "in_features": ("x", "y", "z"),
        "sparse": "torch",
        "width": 8,
        "bev_channels": (32, 32),
        "bev_layers": (1, 1),
        "bev_up": 32,
        "norm_momentum": 0.1,
    },
    "detect": {"channels": 32, "tasks": (RULES.classes[:5], RULES.classes[5:])},
    "loss": {"foreground_weight": 1.0},
}
SIZES = {"car": (4.5, 1.9, 1.6), "pedestrian": (0.7, 0.7, 1.8), "bus": (9.0, 2.8, 3.2)}
STEPS = 70
GROUND = OCC3D.id("driveable_surface")


def street(seed: int = 0) -> Batch:
    """A frame of 4 cars, 4 pedestrians and a bus with points on their sides, on a road."""
    rng = np.random.default_rng(seed)
    names = ["car"] * 4 + ["pedestrian"] * 4 + ["bus"]
    at = np.array([(-9, -8), (-9, 0), (3, 8), (9, -3), (-3, -4), (0, 3), (5, -9), (-2, 9), (1, -2.0)]) + 0.3
    yaw = rng.uniform(-math.pi, math.pi, len(names))
    size = np.array([SIZES[name] for name in names])
    boxes = np.concatenate([at, size[:, 2:] / 2, size, yaw[:, None]], 1)
    xyz, classes = [], []
    for box, name, around in zip(boxes, names, corners(boxes)):
        share, side = rng.random((120, 1)), rng.integers(0, 4, 120)
        ground = around[side] * share + around[(side + 1) % 4] * (1 - share)
        xyz.append(np.concatenate([0.98 * (ground - box[:2]) + box[:2], rng.random((120, 1)) * box[5]], 1))
        classes += [OCC3D.id(name)] * 120
    road = rng.uniform(-12.8, 12.8, (1200, 3)) * [1, 1, 0]
    points, labels = np.concatenate([*xyz, road]), np.array([*classes, *[GROUND] * 1200], np.uint8)
    ids, n = [RULES.classes.index(name) for name in names], len(names)
    return Batch(
        torch.eye(3)[None],
        1,
        ["frame"],
        points=Points(torch.from_numpy(points).float(), torch.tensor([len(points)])),
        point_labels=PointLabels(torch.from_numpy(labels), torch.tensor([len(points)])),
        boxes=Boxes(
            torch.from_numpy(boxes).float(),
            torch.tensor(ids, dtype=torch.uint8),
            torch.from_numpy(rng.normal(0, 3, (n, 2))).float(),
            torch.full((n,), 120, dtype=torch.int32),
            torch.tensor([n]),
        ),
    )


@pytest.mark.parametrize("momentum", [0.01, 0.1])
def test_norms_of_the_encoder_follow_the_recipe(momentum):
    net = SpotTask(parse_config(RECIPE | {"model": RECIPE["model"] | {"norm_momentum": momentum}})).model()
    norms = [layer for layer in net.encoder.modules() if isinstance(layer, SyncBatchNorm)]
    assert len(norms) == 18
    assert {layer.momentum for layer in norms} == {momentum}
    with pytest.raises(ValueError, match="norm_momentum is 2"):
        SpotConfig(norm_momentum=2)


def test_noise_is_not_learned():
    task, batch = SpotTask(parse_config(RECIPE | {"stage": "segment"})), street()
    outputs = LidarOutputs(None, point_logits=torch.randn(len(batch.points.xyz), OCC3D.num_classes))
    found = []
    for noise in (OCC3D.id("others"), IGNORE):
        batch.point_labels.classes[:300] = noise
        found.append(task.counts(outputs, batch) | {f"sum of {n}": v for n, v in task.sums(outputs, batch).items()})
    assert found[0] == found[1]
    assert found[0]["ce"] == len(batch.points.xyz) - 300


@pytest.mark.slow
def test_both_heads_learn_a_frame_by_heart():
    torch.manual_seed(0)
    task, batch = SpotTask(parse_config(RECIPE)), street()
    net = task.model()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        loss, _parts = task.loss(net(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
        schedule.step()
    found: list[int] = []
    metric = task.scoring(None, None).metric()
    watch = lambda batch, outputs: found.append(len(task._found_boxes(outputs, batch)[0].boxes))  # noqa: E731
    scores = evaluate(net, [batch], metric, watch=watch).scores()
    assert min(scores["recall"], scores["mAP_present"]) >= 90
    assert scores["point_accuracy"] >= 95
    assert found[0] < 18, "nine boxes, and little that is not there"
