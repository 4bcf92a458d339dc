"""Panoptic quality of batches: perfect predictions in every score, boxes that claim, instances of sweeps, and things by score."""

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import rules_of
from occstream.evaluation.instances import RefineConfig
from occstream.evaluation.lidar import DetectionScores
from occstream.evaluation.panopticscores import (
    PointPanopticScores,
    VoxelPanopticScores,
    VoxelSegments,
    point_things,
)
from occstream.evaluation.rayscores import RayScores
from occstream.models.batch import Batch, Boxes, Occupancy, PointLabels, Points
from occstream.models.centerpoint import Detections
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, OCC3D, sweep_to_key_ego
from occstream.sharding.sources import synthetic

RULES = rules_of(OCC3D)


@pytest.fixture(scope="module")
def street():
    """Two frames of synthetic scenes as a labeled batch, and the grid."""
    source = synthetic.open_source(scenes=2, frames=1, grid="tiny", cameras=False, beams=8, style="urban", seed=4)
    frames = [source.load(name).frames[0] for name in source.scene_names()]
    semantic = torch.from_numpy(np.stack([f.labels.semantic for f in frames]))
    ids = [[RULES.classes.index(name) for name in f.boxes.names] for f in frames]
    clouds = [apply(sweep_to_key_ego(f, f.lidar), f.lidar.xyz).astype(np.float32) for f in frames]
    rows, counts = [len(c) for c in clouds], [len(i) for i in ids]
    batch = Batch(
        torch.eye(3).repeat(2, 1, 1),
        2,
        ["a-0000", "b-0000"],
        occupancy=Occupancy(semantic != 17, torch.ones(semantic.shape, dtype=torch.bool), semantic),
        points=Points(torch.from_numpy(np.concatenate(clouds)), torch.tensor(rows)),
        point_labels=PointLabels(
            torch.from_numpy(np.concatenate([f.lidar.classes for f in frames])), torch.tensor(rows)
        ),
        boxes=Boxes(
            torch.from_numpy(np.concatenate([f.boxes.boxes for f in frames])),
            torch.tensor([i for frame in ids for i in frame], dtype=torch.uint8),
            torch.from_numpy(np.concatenate([f.boxes.velocity for f in frames])),
            torch.ones(sum(counts), dtype=torch.int32),
            torch.tensor(counts),
        ),
    )
    return batch, source.grid


def perfect(outputs, batch):
    """The true boxes, all as sure."""
    part, found = batch.boxes, []
    for index in range(batch.labeled):
        mine = part.owners() == index
        kinds = part.classes[mine].numpy().astype(np.int64)
        found.append(
            Detections(part.boxes[mine].numpy(), part.velocity[mine].numpy(), kinds, np.ones(len(kinds), np.float32))
        )
    return found


def voxels(grid, boxes=perfect, **settings):
    return VoxelSegments(OCC3D, grid, RefineConfig(**settings), lambda o, b: b.occupancy.semantic, boxes=boxes)


def points(batch, boxes=perfect):
    scores = PointPanopticScores(OCC3D, RefineConfig(), lambda o, b: b.point_labels.classes, boxes)
    return scores, scores.update(object(), batch)


def test_perfect_predictions_score_one_in_every_metric(street):
    batch, grid = street
    segments = voxels(grid)
    voxel, rays = (
        VoxelPanopticScores(segments),
        RayScores(OCC3D, grid, lambda key: np.array([[1.0, 0.0, 1.84]]), segments.classes, instances=segments.of_rays),
    )
    detection, outputs = DetectionScores(OCC3D, perfect), object()
    for metric in (voxel, rays, detection):
        assert metric.update(outputs, batch) > 0
    assert voxel.result().scores()["voxel_pq_present"] == pytest.approx(100)
    assert voxel.result().per_class["car"] == pytest.approx(100)
    assert [rays.result().mean[name] for name in ("rayiou", "raypq", "raypq_1m")] == pytest.approx([100] * 3)
    found = detection.result()
    assert (found.mean["mAP_present"], found.errors["mATE"] < 1) == (pytest.approx(100), True)
    assert found.scores()["score_at_precision_80"] < 1
    point, count = points(batch)
    assert count > 10_000
    scores = point.result().scores()
    assert scores["pq_present"] == pytest.approx(100)
    assert scores["class/car"] == pytest.approx(100)


def test_without_boxes_neighbors_are_one_instance(street):
    batch, grid = street
    metric = VoxelPanopticScores(voxels(grid, boxes=None))
    metric.update(object(), batch)
    scores = metric.result().scores()
    assert 10 < scores["voxel_pq_things"] < scores["voxel_pq_stuff"]
    assert scores["class/driveable_surface"] == pytest.approx(100)


def test_boxes_that_are_not_sure_claim_nothing(street):
    batch, grid = street

    def unsure(outputs, batch):
        return [found._replace(scores=0.5 * found.scores) for found in perfect(outputs, batch)]

    same = [VoxelPanopticScores(voxels(grid, boxes, leftover="one")) for boxes in (unsure, None)]
    for metric in same:
        metric.update(object(), batch)
    assert same[0].result().scores() == same[1].result().scores()


def test_frames_without_a_key_do_not_count(street):
    batch, grid = street
    metric = VoxelPanopticScores(voxels(grid))
    assert metric.update(object(), Batch(**{**vars(batch), "keys": ["", ""]})) == 0
    assert np.isnan(metric.result().scores()["voxel_pq"])


def test_instances_of_sweeps_go_before_those_of_boxes(street):
    batch, _ = street
    scores, _ = points(batch)
    truth = scores.truth(batch)
    count = int(batch.point_labels.classes.shape[0])
    car = OCC3D.id("car")
    own = Batch(**vars(batch))
    own.point_labels = PointLabels(
        batch.point_labels.classes, batch.point_labels.counts, torch.full((count,), 777, dtype=torch.int32)
    )
    for (classes, ids), (_, given) in zip(truth, scores.truth(own)):
        assert set(given[classes == car]) == {777}
        assert 777 not in ids[classes == car]
    nothing = Batch(**vars(batch))
    nothing.point_labels = PointLabels(
        batch.point_labels.classes, batch.point_labels.counts, torch.zeros(count, dtype=torch.int32)
    )
    things = point_things(OCC3D)
    assert len(things) == 10
    for classes, _ in scores.truth(nothing):
        assert not np.isin(classes, list(things)).any()
        assert (classes == IGNORE).any()


def test_segments_of_the_same_outputs_are_made_once(street):
    batch, grid = street
    calls = []

    def counted(outputs, batch):
        calls.append(outputs)
        return perfect(outputs, batch)

    segments, first, second = voxels(grid, counted), object(), object()
    for outputs in (first, first, second):
        segments(outputs, batch)
    assert calls == [first, second]
