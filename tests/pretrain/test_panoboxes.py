"""PanoOcc with its detector: heads by stage, losses of both, what is scored, and panoptic voxels and points of one network."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occstream.models.batch import PointLabels, Points, concat
from occstream.pretrain.config import load_config
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.terms import combine, joint_counts
from tests.pretrain.small import HERE

RECIPE = str(HERE / "small-panoocc.yaml")


def task(*settings: str, stage: str = "finetune"):
    return task_of(load_config(RECIPE, ["data.url=nowhere", "model.frames=1", *settings], stage=stage))


@pytest.fixture(scope="module")
def joint():
    """Task, network in training and a batch of two labeled frames and one more."""
    of = task()
    torch.manual_seed(0)
    return of, of.model(), of.synthetic_batch(2, 1)


def test_each_choice_of_heads_has_its_parts_and_learns_them():
    batch = task().synthetic_batch(1, 0)
    for heads, parts, terms in (
        ("voxels", {"thing_head", "voxel_head"}, {"voxel", "lovasz", "thing"}),
        ("boxes", {"thing_head", "detector"}, {"box_class", "box"}),
        ("joint", {"thing_head", "voxel_head", "detector"}, {"voxel", "lovasz", "thing", "box_class", "box"}),
    ):
        of = task(f"heads={heads}")
        net = of.model()
        outputs = net(batch)
        assert parts == {n for n in ("thing_head", "voxel_head", "detector") if getattr(net, n) is not None}
        loss, found = of.loss(outputs, batch)
        assert {*found} == terms | {"binary"}
        assert {*found} <= {*of.terms}
        loss.backward()
        assert [n for n, p in net.named_parameters() if p.grad is None] == []
        assert net.detector is None or net.thing_head.weight.grad.any()
    pre = task(stage="pretrain")
    net = pre.model()
    assert net.detector is net.voxel_head is net.thing_head is None
    assert {*pre.loss(net(batch), batch)[1]} == {"binary"}
    assert (pre.detects, pre.segments) == (False, False)
    with pytest.raises(ValueError, match="has heads=boxes, which predict no classes of voxels"):
        task("heads=boxes").check_prediction()


def test_boxes_are_seen_in_the_foreground_alone(joint):
    """Where no voxel is of a thing, the map that the detector sees is empty."""
    _, net, batch = joint
    seen, features = [], []
    handle = net.detector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    before = net.thing_head.bias.data.clone()
    with torch.no_grad():
        for bias in (30.0, -30.0):
            net.thing_head.bias.data.fill_(bias)
            net.thing_head.weight.data.mul_(0)
            features.append(net(batch).decoded.features)
    handle.remove()
    net.thing_head.bias.data.copy_(before)
    torch.testing.assert_close(seen[0], features[0].mean(4), atol=1e-5, rtol=1e-4)
    assert not (seen[1].abs() > 1e-9).any()


def test_a_rank_without_labeled_frames_runs_the_detector_too(joint):
    of, net, batch = joint
    net.zero_grad()
    outputs = net(batch.unlabeled())
    sums, counts = of.sums(outputs, batch.unlabeled()), of.counts(outputs, batch.unlabeled())
    assert {*sums} == {*counts} == {*of.counts(net(batch), batch)}
    loss, _ = combine(sums, joint_counts([counts]), of.weights)
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert not any(p.grad.any() for p in net.detector.parameters())
    bare = dataclasses.replace(batch.unlabeled(), boxes=None)
    assert {*of.sums(outputs, bare)} == {*sums}
    with pytest.raises(ValueError, match="the batch has no boxes"):
        of.counts(outputs, dataclasses.replace(batch, boxes=None))


def test_replayed_frames_need_no_boxes(joint):
    of, net, _ = joint
    other = dataclasses.replace(of.synthetic_batch(0, 1), boxes=None)
    both = concat(of.synthetic_batch(1, 0), other)
    assert (both.labeled, both.size, len(both.boxes.counts)) == (1, 2, 1)
    assert of.loss(net(both), both)[0].isfinite()


@pytest.mark.parametrize("count", [0, 300])
def test_no_boxes_and_many(joint, count):
    of, net, batch = joint
    rows = of.synthetic_batch(2, 0).boxes
    many = rows.each(lambda f, v: v if f.name == "counts" else v[torch.arange(count) % len(v)])
    many.counts = torch.tensor([count, 0])
    crowded = dataclasses.replace(batch, boxes=many)
    outputs = net(crowded)
    assert int(of.counts(outputs, crowded)["box"]) == min(count, of.config.detect.queries)
    assert of.loss(outputs, crowded)[0].isfinite()


def test_points_have_the_class_of_their_voxel_and_never_one_that_is_refused(joint):
    of, net, batch = joint
    grid = of.config.voxel_grid
    with torch.no_grad():
        outputs = net(batch)
    g = np.random.default_rng(0)
    index = g.integers(0, grid.shape, (50, 3))
    inside = grid.centers(index) + g.uniform(-0.39, 0.39, (50, 3))
    beyond = np.array([[grid.upper[0] + 5, grid.lower[1] - 5, grid.upper[2] + 1]])
    xyz = torch.tensor(np.concatenate([inside, beyond, inside]), dtype=torch.float32)
    scored = dataclasses.replace(
        batch,
        points=Points(xyz, torch.tensor([51, 50, 0])),
        point_labels=PointLabels(torch.ones(101, dtype=torch.uint8), torch.tensor([51, 50])),
    )
    of = task("eval.point_classes=voxel")
    found = of._point_classes(outputs, scored)
    expected = [outputs.semantic_logits[b, 1:, x, y, z].argmax() + 1 for b in (0, 1) for x, y, z in index]
    corner = outputs.semantic_logits[0, 1:, -1, 0, -1].argmax() + 1
    assert found.tolist() == [*map(int, expected[:50]), int(corner), *map(int, expected[50:])]
    segments = of.point_segments(outputs, scored)
    assert [len(s.classes) for s in segments] == [51, 50]
    assert all((s.classes >= 1).all() and (s.instances < 1000).all() for s in segments)


def test_samples_have_what_the_heads_and_scores_need():
    def parts(of, role):
        names = of.sample(role, of.config.data if role != "eval" else of.config.eval, ("CAM_FRONT",)).fields()
        return {name.partition(".")[0] for name in names} - {"cameras", "history", "scene_aug", "occupancy"}

    assert parts(task(), "main") == {"boxes"}
    assert parts(task(), "replay") == set()
    assert parts(task(), "eval") == {"boxes", "points", "point_labels"}
    assert parts(task(), "predict") == {"points"}
    assert parts(task("eval.points=false"), "predict") == set()
    assert parts(task("heads=voxels", "eval.points=false", "eval.panoptic=false"), "eval") == set()
    assert parts(task("heads=boxes"), "eval") == {"boxes"}
    assert task("data.seen_boxes=false", "eval.points=false").sample("main", task().config.data, ("A",)).groups == (
        "cameras",
        "labels",
    )
    made = task("data.voxels_from=points").sample("main", task().config.data, ("A",))
    assert made.voxels_from == "points"
    assert "semantic" not in "".join(task("heads=boxes").sample("main", task().config.data, ("A",)).fields())


def test_points_are_classified_at_their_own_place(joint):
    """At the center of a fine voxel as that voxel; between two by the mean of their features; beyond the grid by its border."""
    of, net, batch = joint
    net.eval()
    grid, fine = of.config.voxel_grid, net.c.fine
    size = (np.array(grid.upper) - grid.lower) / fine
    index = np.random.default_rng(0).integers(0, np.array(fine) - (1, 0, 0), (20, 3))
    centers = np.array(grid.lower) + (index + 0.5) * size
    beyond = np.array(grid.upper)[None] + 3
    xyz = torch.tensor(np.concatenate([centers, centers + size * (0.5, 0, 0), beyond]), dtype=torch.float32)
    points = Points(torch.cat([xyz, xyz[:7]]), torch.tensor([41, 7, 0]))
    with torch.no_grad():
        outputs = net(dataclasses.replace(batch, points=points))
        rows = outputs.decoded.features.movedim(1, -1)
        here, ahead = (rows[0][tuple((index + step).T)] for step in ((0, 0, 0), (1, 0, 0)))
        expected = net.voxel_head.net(torch.cat([here, (here + ahead) / 2, rows[0, -1:, -1, -1]]))
        other = net.voxel_head.net(rows[1][tuple(index[:7].T)])
        assert net(batch).point_logits is None
    net.train()
    torch.testing.assert_close(outputs.point_logits, torch.cat([expected, other]), atol=1e-4, rtol=1e-4)
    labels = PointLabels(torch.ones(48, dtype=torch.uint8), torch.tensor([41, 7]))
    scored = dataclasses.replace(batch, points=points, point_labels=labels)
    assert of._point_classes(outputs, scored).tolist() == (outputs.point_logits[:, 1:].argmax(1) + 1).tolist()


def test_panoptic_voxels_are_scored_where_there_are_boxes():
    """Of voxels alone no true instances are known: an evaluation scores their classes."""
    manifest = SimpleNamespace(metric_convention=lambda: ("occ3d", "said"))
    kinds = []
    for heads in ("voxels", "boxes", "joint"):
        of = task_of(load_config(RECIPE, [f"heads={heads}", "eval.points=false"]))
        assert of.config.eval.panoptic
        kinds.append(type(of.scoring(manifest, None).metric()).__name__)
        metric = of.scoring(manifest, None).metric()
        assert ("PQ-voxel" in getattr(metric, "metrics", {})) == (heads == "joint")
    assert kinds == ["OccupancyMetric", "JointMetric", "JointMetric"]
