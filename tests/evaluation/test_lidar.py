"""Scores of LiDAR tasks by batches: the metrics' numbers in percent, frames that count for nothing, ranks."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import rules_of
from occstream.evaluation.evaluate import Metric, evaluate
from occstream.evaluation.lidar import DetectionResult, DetectionScores, PointScores, true_boxes
from occstream.models.batch import Batch, Boxes, PointLabels, Points
from occstream.models.centerpoint import Detections
from occstream.sharding.schema import IGNORE, OCC3D, OPENSCENE
from tests.evaluation.ranks import run_ranks

CLASSES = rules_of(OCC3D).classes
CAR, PEDESTRIAN = CLASSES.index("car"), CLASSES.index("pedestrian")


def make_batch(counts: list[int], seed: int = 0, keys: list[str] | None = None) -> Batch:
    """Cars and pedestrians within 25 m."""
    g, n = torch.Generator().manual_seed(seed), sum(counts)
    boxes = torch.cat([torch.rand(n, 3, generator=g) * 30 - 15, torch.rand(n, 4, generator=g) + 1], 1)
    classes = torch.tensor([CAR, PEDESTRIAN], dtype=torch.uint8)[torch.randint(0, 2, (n,), generator=g)]
    labels = torch.randint(0, 17, (10 * len(counts),), generator=g, dtype=torch.uint8)
    return Batch(
        torch.eye(3).repeat(len(counts), 1, 1),
        len(counts),
        keys or [f"s{seed}-{i}" for i in range(len(counts))],
        points=Points(torch.randn(10 * len(counts), 3, generator=g), torch.full((len(counts),), 10)),
        point_labels=PointLabels(labels, torch.full((len(counts),), 10)),
        boxes=Boxes(
            boxes, classes, torch.randn(n, 2, generator=g), torch.ones(n, dtype=torch.int32), torch.tensor(counts)
        ),
    )


def answers(batch: Batch, shift: float = 0.0) -> list[Detections]:
    """The true boxes, moved along x."""
    found = []
    for truth in true_boxes(batch):
        scores = np.linspace(0.9, 0.5, len(truth.boxes), dtype=np.float32)
        boxes = truth.boxes + np.array([shift, 0, 0, 0, 0, 0, 0], np.float32)
        found.append(Detections(boxes, np.nan_to_num(truth.velocity), truth.classes, scores))
    return found


def detection(answer=answers) -> DetectionScores:
    return DetectionScores(OCC3D, lambda outputs, batch: answer(batch))


def test_perfect_boxes_score_in_percent_and_absent_classes_are_named():
    metric: Metric = detection()
    batch = make_batch([4, 0, 7])
    assert metric.update(None, batch) == 11
    result = metric.result()
    scores = result.scores()
    assert [scores[f"class/{name}"] for name in ("car", "pedestrian", "bus")] == pytest.approx([100, 100, 0])
    assert scores["mAP"] == pytest.approx(20)  # two classes of ten
    assert [scores[name] for name in ("mAP_present", "NDS_present", "recall")] == pytest.approx([100] * 3, abs=1e-4)
    assert "mAAE" not in scores
    assert scores["mATE"] == pytest.approx(0.8), "of classes without truth it is 1"
    assert "attributes not scored, classes without a true box count as 0: truck, bus" in result.conditions()
    assert "car" not in result.conditions()
    result.frames = 3
    assert result.table().startswith("3 frames: mAP 20.00, NDS")
    assert "car                    100.00" in result.table()


def test_moved_boxes_have_errors_and_far_ones_are_not_found():
    near, far = detection(lambda b: answers(b, 0.75)), detection(lambda b: answers(b, 30.0))
    for metric in (near, far):
        metric.update(None, make_batch([4, 7], seed=1))
    scores = near.result().scores()
    assert scores["recall"] == 100
    assert scores["mATE"] == pytest.approx((2 * 0.75 + 8) / 10, abs=1e-5)
    assert scores["class/car"] == pytest.approx(75, abs=1), "three of four distances"
    assert far.result().scores()["recall"] == 0


def test_boxes_that_are_not_scored_do_not_count():
    batch = make_batch([6])
    batch.boxes.classes[0], batch.boxes.points[1], batch.boxes.boxes[2, 0] = IGNORE, 0, 300
    assert detection().update(None, batch) == 3
    assert len(true_boxes(batch)[0].boxes) == 5


def test_unknown_velocities_are_no_errors():
    batch = make_batch([6], seed=3)
    batch.boxes.velocity[:] = math.nan
    metric = detection()
    metric.update(None, batch)
    assert "mAVE" in metric.result().scores()  # of classes without truth
    batch = make_batch([2], seed=4, keys=["other"])
    batch.boxes.velocity[0] = math.nan
    metric.update(None, batch)
    assert math.isfinite(metric.result().scores()["NDS"])


def test_classes_are_those_of_the_taxonomy():
    metric = DetectionScores(OPENSCENE, lambda outputs, batch: outputs)
    batch = make_batch([0])
    batch.boxes = Boxes(
        torch.tensor([[5.0, 0, 0, 1, 1, 1, 0]]),
        torch.tensor([1], dtype=torch.uint8),
        torch.zeros(1, 2),
        torch.ones(1, dtype=torch.int32),
        torch.tensor([1]),
    )
    metric.update(answers(batch), batch)
    assert metric.result().scores()["class/bicycle"] == pytest.approx(100)


def test_points_score_in_percent():
    metric: Metric = PointScores(OCC3D, lambda outputs, batch: outputs)
    batch = make_batch([0, 0], seed=5)
    batch.point_labels.classes[:4] = torch.tensor([0, IGNORE, 4, 11])
    truth = batch.point_labels.classes
    counted = int(((truth != IGNORE) & (truth != 0)).sum())
    assert metric.update(truth.clamp(1, 16), batch) == counted < 20
    scores = metric.result().scores()
    assert (scores["point_miou"], scores["point_accuracy"], scores["class/car"]) == (100, 100, 100)
    assert "point_refused" not in scores
    assert "class/others" not in scores
    wrong = PointScores(OCC3D, lambda outputs, batch: torch.zeros_like(outputs))
    wrong.update(truth, batch)
    scores = wrong.result().scores()
    assert (scores["point_miou"], scores["point_refused"]) == (0, 100)
    assert wrong.result().conditions() == "convention lidarseg"
    assert (metric.first, PointScores(OPENSCENE, lambda *_: None).first) == (1, 0)


def test_frames_without_a_key_count_for_nothing():
    batch = make_batch([3, 2], seed=6, keys=["", "b"])
    boxes, points = detection(), PointScores(OCC3D, lambda outputs, batch: batch.point_labels.classes.clamp_min(1))
    assert boxes.update(None, batch) == 2
    assert boxes.metric.keys == ["b"]
    rest = batch.point_labels.classes[10:]
    assert points.update(None, batch) == int((rest > 0).sum()) == int(points.metric.matrix.counts[1:].sum())


def test_ranks_agree_with_one_process(monkeypatch):
    batches = [make_batch([3, 0, 2], seed=7), make_batch([1, 4], seed=8)]

    def made():
        return (
            detection(lambda b: answers(b, 0.6)),
            PointScores(OCC3D, lambda outputs, b: b.point_labels.classes.flip(0).clamp(1, 16)),
        )

    alone = made()
    for metric in alone:
        for batch in batches:
            metric.update(None, batch)

    def rank(number):
        mine = made()
        for metric in mine:
            metric.update(None, batches[number])
            metric.all_reduce(torch.device("cpu"))
        return [metric.result().scores() for metric in mine]

    for found in run_ranks(2, rank, monkeypatch):
        for scores, metric in zip(found, alone):
            np.testing.assert_equal(scores, metric.result().scores())


class Nothing(torch.nn.Module):
    def forward(self, batch):
        return None


def test_the_evaluation_takes_them_and_says_when_nothing_counts():
    result = evaluate(Nothing(), [make_batch([3, 1], seed=9)], detection())
    assert (result.frames, result.scores()["recall"]) == (2, 100)
    assert result.metrics()["eval/mAP"] == result.scores()["mAP"]
    empty = make_batch([0], seed=10)
    with pytest.raises(ValueError, match="without a single true box that counts"):
        evaluate(Nothing(), [empty], detection())
    unknown = dataclasses.replace(empty, point_labels=PointLabels(torch.full((10,), IGNORE), torch.tensor([10])))
    with pytest.raises(ValueError, match="without a single point of a known class"):
        evaluate(Nothing(), [unknown], PointScores(OCC3D, lambda outputs, batch: torch.zeros(10)))


def test_a_summary_of_boxes_tells_their_errors_and_which_are_sure():
    found = DetectionResult(
        4,
        mean={"mAP": 30.0, "NDS": 41.0},
        errors={"mATE": 0.5, "mAVE": 1.25},
        threshold=0.3125,
        per_class={"car": 30.0},
    )
    said = found.summary()
    assert "mAP 30.00, NDS 41.00" in said
    assert "mATE 0.50 m, mAVE 1.25 m/s, 80 % right above a score of 0.31" in said
    assert "classes without a true box count as 0: car" in said
    assert "no score with 80 % right" in DetectionResult(4, mean=found.mean).summary()
    assert "within 19.2 m, where the network looks" in DetectionResult(4, mean=found.mean, reach=19.2).summary()


@pytest.mark.parametrize(("reach", "counted"), [(None, 2), (60.0, 2), (30.0, 1), (9.0, 0)])
def test_boxes_beyond_what_a_network_looks_at_do_not_count(reach, counted):
    rows = torch.zeros(2, 7)
    rows[:, 0], rows[:, 3:6] = torch.tensor([10.0, 40.0]), 2.0
    boxes = Boxes(
        rows, torch.zeros(2, dtype=torch.uint8), torch.zeros(2, 2), torch.ones(2, dtype=torch.int32), torch.tensor([2])
    )
    batch = Batch(torch.eye(3)[None], 1, ["a-0000"], boxes=boxes)
    nothing = Detections(np.zeros((0, 7), np.float32), None, np.zeros(0, np.int64), np.zeros(0, np.float32))
    metric = DetectionScores(OCC3D, lambda *_: [nothing], reach=reach)
    assert metric.update(None, batch) == counted
    assert (metric.result().reach is None) == (reach in (None, 60.0))
