"""The encoder of a voxel detector with both heads: they learn one frame by heart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import rules_of
from occstream.evaluation.lidar import DetectionScores, PointScores
from occstream.models.batch import Batch, Boxes, PointLabels, Points
from occstream.models.centerpoint import CenterPointConfig, CenterPointHead
from occstream.models.rotated import corners
from occstream.models.segmentor import PointSegmentor, SegmentorConfig
from occstream.models.voxelbackbones import LidarEncoder
from occstream.models.voxels import voxelize
from occstream.pretrain.pointloss import PointLossConfig, point_counts, point_sums
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import OCC3D

GRID = VoxelGrid("points", (-12.8, -12.8, -2), (12.8, 12.8, 4), (0.2, 0.2, 0.15))
RULES = rules_of(OCC3D)
SIZES = {"car": (4.5, 1.9, 1.6), "pedestrian": (0.7, 0.7, 1.8), "bus": (9.0, 2.8, 3.2)}
TASKS = (RULES.classes[:5], RULES.classes[5:])
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


class TwoHeads(torch.nn.Module):
    """One encoder for boxes and for points."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = LidarEncoder(
            "plain", 3, GRID.shape, width=8, bev_channels=(32, 32), bev_layers=(1, 1), bev_up=32
        )
        self.head = CenterPointHead(
            self.encoder.outputs, GRID, RULES.classes, CenterPointConfig(channels=32, tasks=TASKS)
        )
        for layer in self.encoder.modules():  # published: 0.01, for a hundred times as many steps
            if hasattr(layer, "momentum"):
                layer.momentum = 0.1
        self.segmentor = PointSegmentor(8, self.encoder.outputs, GRID, OCC3D.num_classes, config=SegmentorConfig())

    def forward(self, batch: Batch):
        xyz, frame = batch.points.xyz, batch.points.owners()
        voxels = voxelize(xyz, frame, GRID)
        found = self.encoder(voxels.features / 10, voxels.indices, batch.size)
        return self.head(found.bev), self.segmentor(found, xyz, frame, voxels.rows)


@pytest.mark.slow
def test_both_heads_learn_a_frame_by_heart():
    torch.manual_seed(0)
    net, batch, config = TwoHeads(), street(), PointLossConfig()
    counts = joint_counts([net.head.counts(batch.boxes) | point_counts(batch, OCC3D.num_classes, config, first=1)])
    weights = net.head.config.weights() | config.weights()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        boxes, points = net(batch)
        sums = net.head.sums(boxes, batch.boxes) | point_sums(points, batch, config, first=1)
        optimizer.zero_grad()
        combine(sums, counts, weights)[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10)
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        outputs = net(batch)
    detection = DetectionScores(OCC3D, lambda outputs, batch: net.head.decode(outputs[0]))
    points = PointScores(OCC3D, lambda outputs, batch: outputs[1][:, 1:].argmax(1) + 1)
    assert detection.update(outputs, batch) == 9
    assert points.update(outputs, batch) == len(batch.points.xyz)
    boxes, classes = detection.result().scores(), points.result().scores()
    assert boxes["recall"] >= 90
    assert boxes["mAP_present"] >= 90
    assert boxes["mATE"] < 0.85  # 1 for the seven of ten classes without truth
    assert classes["point_accuracy"] >= 95
    assert len(net.head.decode(outputs[0])[0].boxes) < 18
