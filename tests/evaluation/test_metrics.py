"""Worked numbers of the benchmarks' rules, a brute-force check, and evaluation of a model that is known."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from occstream.evaluation.evaluate import evaluate
from occstream.evaluation.metrics import ConfusionMatrix
from occstream.evaluation.occupancy import OccupancyMetric, classify
from occstream.models import OccOutputs
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import OCC3D, OPENSCENE
from tests.models.helpers import make_batch


def test_occ3d_example():
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 0, 2])
    found = torch.tensor([0, 0, 1, 1, 2, 2, 0, 2, 2, 1, 2, 2])
    valid = torch.arange(12) < 10
    matrix = ConfusionMatrix(2)
    matrix.update(found, truth, valid)
    assert matrix.counts.tolist() == [[2, 1, 0], [0, 2, 1], [1, 0, 3]]
    torch.testing.assert_close(matrix.class_iou(), torch.tensor([0.5, 0.5, 0.6], dtype=torch.float64))
    assert matrix.miou() == pytest.approx(0.5, abs=1e-6)
    assert matrix.iou() == pytest.approx(0.714286, abs=1e-6)


def test_counts_equal_a_loop_and_ignore_255():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 6, (3, 4, 5, 2), generator=g).to(torch.uint8)
    truth[truth == 5] = 255
    found = torch.randint(0, 5, truth.shape, generator=g).to(torch.uint8)
    matrix = ConfusionMatrix(4)
    for i in range(3):
        matrix.update(found[i : i + 1], truth[i : i + 1])
    slow = torch.zeros(5, 5, dtype=torch.int64)
    for t, f in zip(truth.flatten().tolist(), found.flatten().tolist()):
        if t != 255:
            slow[t, f] += 1
    assert matrix.counts.tolist() == slow.tolist()


def test_decision_at_a_quarter():
    """The best class if its probability is above 0.25 (logit -1.0986), else free."""
    logits = torch.tensor([[-1.09, -3.0], [-1.11, -3.0], [0.0, 2.0]]).T.reshape(1, 2, 3, 1, 1)
    assert classify(logits).flatten().tolist() == [0, 2, 1]
    assert classify(logits, "softmax_focal").flatten().tolist() == [2, 2, 1]


class Oracle(nn.Module):
    """Answers with the labels, but calls class 3 class 4."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.seen = classes, []

    def forward(self, batch):
        self.seen.append(self.training)
        answer = torch.where(batch.occupancy.semantic == 3, 4, batch.occupancy.semantic.long())
        logits = nn.functional.one_hot(answer, self.classes + 1)[..., :-1].movedim(-1, 1) * 20.0 - 10
        return OccOutputs(batch.occupancy.binary.float() * 2 - 1, logits if batch.labeled else None)


@pytest.mark.parametrize("convention", ["occ3d", "openscene"])
def test_evaluation_of_a_known_model(convention):
    taxonomy = OPENSCENE
    batches = [make_batch(2, 2, classes=6, seed=i) for i in range(3)]
    for batch in batches:
        batch.occupancy.semantic[batch.occupancy.semantic == 6] = taxonomy.free_id  # classes 6 and 7 never occur
    model, watched = Oracle(taxonomy.num_classes).train(), []
    metric = OccupancyMetric(taxonomy, convention=convention)
    result = evaluate(model, batches, metric, watch=lambda b, o: watched.extend(b.keys))
    assert result.frames == len(watched) == 6
    assert model.training
    assert model.seen == [False] * 3
    assert [result.iou, result.binary_iou] == pytest.approx([100, 100], abs=1e-4)
    assert result.per_class["generic_object"] == 0
    assert result.per_class["vehicle"] == pytest.approx(100, abs=1e-3)
    three, four = (sum(int((b.occupancy.semantic == k).sum()) for b in batches) for k in (3, 4))
    assert result.per_class["pedestrian"] == pytest.approx(100 * four / (three + four), abs=1e-3)
    total = 100 * 4 + result.per_class["pedestrian"]
    # Absent classes are left out by Occ3D's script and count as zero in OpenScene's.
    assert result.miou == pytest.approx(total / (6 if convention == "occ3d" else 8), abs=1e-3)
    assert "mIoU" in result.summary()
    assert f"convention {convention}" in result.summary()


def test_scores_by_range_of_a_known_model():
    """A model that is right near by and finds nothing far away."""
    grid = VoxelGrid("wide", (-32, -32, 0), (32, 32, 8), (2, 2, 2))
    batch = make_batch(2, 2, classes=6, seed=0, grid=grid)
    far = (torch.from_numpy(np.abs(grid.centers()[..., :2]).max(-1)) >= 25).expand(batch.occupancy.binary.shape)

    class Near(nn.Module):
        def forward(self, batch):
            answer = torch.where(far, 17, batch.occupancy.semantic.long())
            logits = nn.functional.one_hot(answer.clamp_max(17), 18)[..., :-1].movedim(-1, 1) * 20.0 - 10
            return OccOutputs(torch.where(far, -1.0, batch.occupancy.binary.float() * 2 - 1), logits)

    batch.occupancy.semantic[batch.occupancy.semantic == 6] = 17
    result = evaluate(Near(), [batch], OccupancyMetric(OCC3D, grid))
    assert result.ranges["near 25 m"] == {"binary_iou": 100, "iou": 100, "miou": 100}
    assert result.ranges["far 25 m"] == {"binary_iou": 0, "iou": 0, "miou": 0}
    assert 0 < result.miou < 100
    assert result.metrics()["eval/range/near 25 m/miou"] == 100
    assert "near 25 m" in result.table()


def test_binary_model_has_no_semantic_scores():
    result = evaluate(Oracle(17), [make_batch(2, 0)], OccupancyMetric(OCC3D))
    assert result.miou is None
    assert set(result.metrics()) == {"eval/binary_iou", "eval/frames"}


def test_an_evaluation_of_other_frames_than_planned_is_an_error():
    batches = [make_batch(2, 0)]
    assert evaluate(Oracle(17), batches, OccupancyMetric(OCC3D), expected=2).frames == 2
    for given, expected, said in ((batches, 3, "evaluated 2 frames where 3"), ([], None, "0 frames where some")):
        with pytest.raises(ValueError, match=f"{said} were to be"):
            evaluate(Oracle(17), given, OccupancyMetric(OCC3D), expected=expected)


def test_an_evaluation_without_a_valid_voxel_is_an_error():
    batch = make_batch(2, 0)
    batch.occupancy.binary_valid[:] = False
    with pytest.raises(ValueError, match="2 frames without a single valid voxel"):
        evaluate(Oracle(17), [batch], OccupancyMetric(OCC3D))


def test_what_ends_the_evaluation_of_one_rank_ends_that_of_all(monkeypatch):
    module, batch = sys.modules[evaluate.__module__], make_batch(2, 0)
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)

    def broken():
        yield batch
        raise OSError("shard is gone")

    def run(batches, others):
        """``others`` are the other rank's words, one for each turn."""
        monkeypatch.setattr(module, "_most", lambda mine: max(mine, next(others)))
        return [counted for _, counted in module._in_step(batches)]

    assert run([batch], iter([1, 1, 0])) == [True, False], "the last batch again, not counted, while another has some"
    with pytest.raises(OSError, match="shard is gone"):
        run(broken(), iter([1, 1]))
    with pytest.raises(ValueError, match="another rank could not read its frames"):
        run([batch, batch], iter([1, 2]))
    with pytest.raises(ValueError, match="rank 1 had no frames"):
        run([], iter([1]))
