"""Panoptic quality and point IoU: worked numbers, slow references, permutations and ranks."""

import math
import warnings

import numpy as np
import pytest
import torch

from occstream.evaluation.panoptic import (
    PanopticMetric,
    join_labels,
    nuscenes_panoptic,
    semantickitti_panoptic,
    split_labels,
    voxel_panoptic,
)
from occstream.evaluation.pointseg import PointMetric
from occstream.sharding.schema import OCC3D, SEMANTICKITTI
from tests.evaluation.ranks import run_ranks


def toy(min_points=1, classes=4, things=()):
    return PanopticMetric({c: f"c{c}" for c in range(1, classes + 1)}, things, ignored=(0,), min_points=min_points)


def points(*runs):
    """(classes, instances) of runs of points: (count, class, instance)."""
    counts = [run[0] for run in runs]
    return np.repeat([run[1] for run in runs], counts), np.repeat([run[2] for run in runs], counts)


def test_the_benchmarks_own_example():
    """Grass, sky, dog and three persons; sizes as in the self-test of SemanticKITTI's script."""
    grass, sky, dog, person = 1, 2, 3, 4
    truth = points((50, grass, 0), (50, sky, 0), (50, dog, 1), (150, person, 2), (50, person, 3), (100, person, 4))
    found = points(
        *((40, grass, 0), (10, sky, 0), (40, sky, 0), (10, grass, 0), (50, person, 9)),
        *((200, person, 5), (100, person, 6)),
    )
    metric = PanopticMetric({1: "grass", 2: "sky", 3: "dog", 4: "person"}, ("dog", "person"), ignored=(0,))
    metric.update(*found, *truth)
    scores = metric.result()
    assert [scores[n] for n in ("PQ", "SQ", "RQ", "mIoU")] == pytest.approx(
        [0.4791667, 0.5520833, 0.6666667, 0.5476190]
    )
    assert scores["PQ/grass"] == pytest.approx(2 / 3)
    assert [scores[f"{n}/person"] for n in ("PQ", "SQ", "RQ", "IoU")] == pytest.approx(
        [0.5833333, 0.875, 2 / 3, 0.857143]
    )
    assert scores["PQ/dog"] == 0
    assert scores["PQ_things"] == pytest.approx(0.5833333 / 2)
    assert scores["PQ_dagger"] == pytest.approx((0.5833333 + 2 / 3 + 2 / 3) / 4)
    assert "person" in metric.table()


@pytest.mark.parametrize(("least", "missed"), [(15, 0), (14, 1)])
def test_a_small_segment_that_is_missed(least, missed):
    metric = toy(least, classes=2, things=("c1",))
    metric.update(*points((34, 2, 0)), *points((14, 1, 1), (20, 2, 0)))
    assert metric.counts[1, 2] == missed
    scores = metric.result()
    assert scores["PQ"] == pytest.approx(0.2941176)
    assert scores["PQ/c2"] == pytest.approx(20 / 34)


def test_a_thing_called_ignored_is_missed():
    metric = toy(15, classes=2, things=("c1",))
    metric.update(*points((20, 0, 0), (20, 2, 0)), *points((20, 1, 1), (20, 2, 0)))
    assert metric.counts[1].tolist()[:3] == [0, 0, 1]
    assert metric.result()["PQ"] == 0.5


def test_stuff_at_an_iou_of_four_tenths_counts_only_in_pq_dagger():
    metric = toy(classes=1)
    metric.update(*points((4, 1, 0), (6, 2, 0)), *points((10, 1, 0)))
    scores = metric.result()
    assert scores["PQ"] == 0
    assert scores["PQ_dagger"] == scores["mIoU"] == pytest.approx(0.4)


def test_half_is_no_match():
    metric = toy(classes=2)
    metric.update(*points((10, 1, 0), (10, 1, 0)), *points((10, 1, 0), (10, 2, 0)))
    assert metric.counts[1].tolist()[:3] == [0, 1, 1]


def test_what_is_ignored_changes_nothing_and_nothing_valid_is_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, more = toy(), toy()
        whole.update(*points((10, 1, 1)), *points((10, 1, 1)))
        more.update(*points((10, 1, 1), (5, 1, 1), (5, 2, 0)), *points((10, 1, 1), (5, 0, 0), (5, 255, 0)))
        assert whole.counts.tolist() == more.counts.tolist()
        nothing = toy()
        nothing.update(*points((5, 1, 1)), *points((5, 0, 0)))
        assert all(math.isnan(v) for v in nothing.result().values())
        nothing.update(*(np.zeros(0, int),) * 4)
        missed = toy()
        missed.update(*points((5, 0, 0)), *points((5, 1, 1)))
        assert missed.result()["PQ"] == 0
    with pytest.raises(ValueError, match="5, 5, 4, 4 points"):
        toy().update(*points((5, 1, 1)), *points((4, 1, 1)))


def slow_panoptic(frames, classes, ignored, least):
    """By class (tp, fp, fn, sum of IoU), from loops over sets of points."""
    out = {c: [0, 0, 0, 0.0] for c in classes}
    for found, found_id, truth, truth_id in frames:
        valid = [n for n in range(len(truth)) if truth[n] not in ignored]
        for c in classes:
            theirs, ours = {}, {}
            for n in valid:
                if truth[n] == c:
                    theirs.setdefault(truth_id[n], set()).add(n)
                if found[n] == c:
                    ours.setdefault(found_id[n], set()).add(n)
            left, spare = dict(theirs), dict(ours)
            for a, mine in theirs.items():
                for b, other in ours.items():
                    iou = len(mine & other) / len(mine | other)
                    if iou > 0.5:
                        out[c][0] += 1
                        out[c][3] += iou
                        del left[a], spare[b]
            out[c][1] += sum(len(s) >= least for s in spare.values())
            out[c][2] += sum(len(s) >= least for s in left.values())
    return out


def random_frames(seed, count=4, n=120):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        truth = np.repeat(rng.integers(0, 5, 12), n // 12)
        ids = np.repeat(rng.integers(0, 3, 12), n // 12)
        noisy = rng.random(n) < 0.15
        found, found_id = np.where(noisy, rng.integers(0, 5, n), truth), np.where(noisy, rng.integers(0, 4, n), ids + 1)
        truth = np.where(rng.random(n) < 0.05, 255, truth)
        frames.append((found, found_id, truth, ids))
    return frames


@pytest.mark.parametrize("least", [1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_frames_equal_sets_of_points(seed, least):
    frames, metric = random_frames(seed), toy(least, things=("c1", "c2"))
    for frame in frames:
        metric.update(*frame)
    slow, scores = slow_panoptic(frames, (1, 2, 3, 4), (0, 255), least), metric.result()
    quality = []
    for c, (tp, fp, fn, total) in slow.items():
        assert metric.counts[c].tolist()[:3] == [tp, fp, fn]
        quality.append(total / (tp + fp / 2 + fn / 2) if tp else 0)
        assert scores[f"PQ/c{c}"] == pytest.approx(quality[-1], abs=1e-11)
        assert scores[f"SQ/c{c}"] == pytest.approx(total / tp if tp else 0, abs=1e-11)
    assert scores["PQ"] == pytest.approx(np.mean(quality), abs=1e-11)
    assert scores["PQ_things"] == pytest.approx(np.mean(quality[:2]), abs=1e-11)


def test_neither_names_of_instances_nor_order_nor_ranks_change_a_bit(monkeypatch):
    frames, whole, other = random_frames(5, 5), toy(3), toy(3)
    rng = np.random.default_rng(0)
    for frame in frames:
        whole.update(*frame)
    for frame in reversed(frames):
        order = rng.permutation(len(frame[0]))
        found, found_id, truth, ids = (a[order] for a in frame)
        other.update(found, rng.permutation(9)[found_id] * 10**6, truth, rng.permutation(9)[ids])
    assert other.result() == whole.result()

    def work(rank):
        metric = toy(3)
        for frame in frames[rank::3]:
            metric.update(*frame)
        metric.all_reduce()
        return metric.result()

    assert run_ranks(3, work, monkeypatch) == [whole.result()] * 3


def test_the_benchmarks_settings():
    metric = nuscenes_panoptic()
    assert list(metric.names) == list(range(1, 17))
    assert metric.things == set(OCC3D.classes[1:11])
    assert (metric.min_points, metric.ignored) == (15, {0, 255})
    kitti = semantickitti_panoptic()
    assert (len(kitti.names), kitti.min_points) == (19, 50)
    labels = join_labels([4, 4, 11, 0], [1, 2, 0, 0])
    assert labels.tolist() == [4001, 4002, 11000, 0]
    assert labels.dtype == np.uint16
    classes, instances = split_labels(labels)
    assert classes.tolist() == [4, 4, 11, 0]
    assert instances.tolist() == [1, 2, 0, 0]
    with pytest.raises(ValueError, match="instance 1000 does not fit"):
        join_labels([1], [1000])


def test_perfect_labels_score_one():
    rng = np.random.default_rng(0)
    classes, instances = np.repeat(np.arange(17), 20), np.repeat(rng.integers(0, 9, 17), 20)
    metric = nuscenes_panoptic()
    metric.update(classes, instances, classes, instances)
    assert {n: v for n, v in metric.result().items() if v != 1} == {}
    voxels = voxel_panoptic(OCC3D)
    dense = rng.integers(0, 18, (6, 6, 4))
    voxels.update(dense, dense * 0, dense, dense * 0)
    assert voxels.result()["voxel-PQ"] == 1


def test_voxels_of_free_space_make_a_predicted_segment_larger():
    metric = voxel_panoptic(SEMANTICKITTI)
    metric.update(*points((10, 0, 1), (4, 0, 1), (6, 19, 0)), *points((10, 0, 1), (10, 19, 0)))
    scores = metric.result()
    assert scores["voxel-PQ/car"] == pytest.approx(10 / 14)
    assert metric.counts[0, 1] == 0


def test_points_by_lidarsegs_convention():
    truth = torch.tensor([0, 1, 1, 2, 2, 2, 255, 4])
    found = torch.tensor([5, 1, 2, 2, 2, 0, 9, 17])
    metric = PointMetric()
    metric.update(found, truth)
    scores = metric.result()
    # Class 5 is answered only where the truth is noise: it does not occur. Class 4 was missed.
    assert scores["IoU/barrier"] == 0.5
    assert scores["IoU/bicycle"] == 0.5
    assert scores["IoU/car"] == 0
    assert math.isnan(scores["IoU/construction_vehicle"])
    assert scores["mIoU"] == pytest.approx(1 / 3)
    assert scores["fwIoU"] == pytest.approx((2 * 0.5 + 3 * 0.5) / 6)
    assert scores["accuracy"] == pytest.approx(0.5)
    assert scores["refused"] == pytest.approx(2 / 6)
    assert "IoU/others" not in scores
    assert "mIoU 0.3333" in metric.table()
    assert math.isnan(PointMetric().result()["mIoU"])
    for wrong in (18, -1):
        with pytest.raises(ValueError, match=r"a predicted class is not within 0\.\.17"):
            metric.update(torch.tensor([wrong]), torch.tensor([1]))
    with pytest.raises(ValueError, match="2 predicted classes for 1"):
        metric.update(torch.tensor([1, 1]), torch.tensor([1]))


def test_points_over_ranks_are_one_set(monkeypatch):
    g = torch.Generator().manual_seed(0)
    truth, found = torch.randint(0, 17, (2, 300), generator=g)
    found = torch.where(torch.rand(300, generator=g) < 0.5, truth, found)
    whole, perfect = PointMetric(), PointMetric()
    whole.update(found, truth)
    perfect.update(truth, truth)
    assert perfect.result()["mIoU"] == perfect.result()["fwIoU"] == 1

    def work(rank):
        metric = PointMetric()
        metric.update(found[rank::2], truth[rank::2])
        metric.all_reduce()
        return metric.result()

    assert run_ranks(2, work, monkeypatch) == [whole.result()] * 2
