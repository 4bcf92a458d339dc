"""Losses of boxes that queries say: the assignment, worked numbers, ranks, and frames without boxes or with many."""

import itertools
import math

import numpy as np
import pytest
import torch

from occstream.models.batch import Boxes
from occstream.models.detr import CODE, Queried, encode
from occstream.pretrain.boxlosses import BoxLossConfig, BoxLosses, focal_cost
from occstream.pretrain.losses import sigmoid_focal
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.grid import VoxelGrid

GRID = VoxelGrid("street", (-12.0, -8.0, -2.0), (12.0, 8.0, 4.0), (0.5, 0.5, 0.5))


def boxes(counts: list[int], seed: int = 0, reach: float = 1.0) -> Boxes:
    g, n = torch.Generator().manual_seed(seed), sum(counts)
    centers = (torch.rand(n, 3, generator=g) * 2 - 1) * torch.tensor([12.0, 8.0, 2.0]) * reach
    sizes, yaw = torch.rand(n, 3, generator=g) * 4 + 0.5, torch.rand(n, 1, generator=g) * 6 - 3
    return Boxes(
        torch.cat([centers, sizes, yaw], 1),
        torch.randint(0, 3, (n,), generator=g).to(torch.uint8),
        torch.randn(n, 2, generator=g),
        torch.ones(n, dtype=torch.int32),
        torch.tensor(counts),
    )


def outputs(layers: int, frames: int, queries: int, seed: int = 0) -> Queried:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, frames, queries, 3, generator=g)
    codes = torch.randn(layers, frames, queries, CODE, generator=g)
    return Queried(logits.requires_grad_(), codes.requires_grad_())


def losses(queries: int = 9, **changes) -> BoxLosses:
    return BoxLosses(GRID, 3, queries, BoxLossConfig(**changes))


class Tables(BoxLosses):
    """Whose costs are given."""

    table: np.ndarray

    def cost(self, *_):
        return torch.from_numpy(self.table)[None]

    def of(self, table: np.ndarray) -> list[tuple[int, int]]:
        self.table = table
        queries, n = table.shape
        said = Queried(torch.zeros(1, 1, queries, 3), torch.zeros(1, 1, queries, CODE))
        nothing = torch.zeros(n, dtype=torch.int64)
        taken, chosen = self.assign(said, nothing, torch.zeros(n, CODE), nothing)
        return list(zip(taken.tolist(), chosen.tolist()))


TABLES = Tables(GRID, 3, 9, BoxLossConfig())


def test_the_cost_of_a_class_worked():
    assert float(focal_cost(torch.zeros(()))) == pytest.approx(-0.0866434, abs=1e-7)
    z = torch.randn(50, dtype=torch.float64)
    change = sigmoid_focal(z, torch.ones_like(z), 2.0, 0.25) - sigmoid_focal(z, torch.zeros_like(z), 2.0, 0.25)
    torch.testing.assert_close(focal_cost(z), change)


def test_the_assignment_is_not_greedy_worked():
    table = np.array([[1.0, 2.0], [1.1, 5.0]])
    pairs = TABLES.of(table)
    assert sorted(pairs) == [(0, 1), (1, 0)]
    assert sum(table[q, b] for q, b in pairs) == pytest.approx(3.1)


def test_the_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 6))
        queries = int(rng.integers(n, 7))
        table = rng.normal(size=(queries, n)).astype(np.float32)
        best = min(sum(table[q, b] for b, q in enumerate(some)) for some in itertools.permutations(range(queries), n))
        pairs = TABLES.of(table)
        assert sorted(b for _, b in pairs) == list(range(n))
        assert len({q for q, _ in pairs}) == n
        assert sum(table[q, b] for q, b in pairs) == pytest.approx(float(best), abs=1e-6)
        order = rng.permutation(queries)
        moved = TABLES.of(table[order])
        assert sorted((int(order[q]), b) for q, b in moved) == sorted(pairs)


def test_costs_are_the_published_ones():
    said, truth = outputs(2, 1, 4), boxes([3])
    goal, classes = encode(truth.boxes, truth.velocity), truth.classes.long()
    cost = losses().cost(said.logits[:, 0], said.codes[:, 0], classes, goal)
    expected = torch.zeros(2, 4, 3)
    for layer, q, b in itertools.product(range(2), range(4), range(3)):
        z = said.logits[layer, 0, q, classes[b]]
        distance = sum(abs(said.codes[layer, 0, q, k] - goal[b, k]) for k in range(8))
        expected[layer, q, b] = 2.0 * focal_cost(z) + 0.25 * distance
    torch.testing.assert_close(cost, expected)
    far = torch.full_like(goal, math.nan)
    assert losses().cost(said.logits[:, 0], said.codes[:, 0], classes, far).isfinite().all()


def test_losses_are_those_of_a_loop():
    net, said, truth = losses(), outputs(2, 3, 9), boxes([4, 0, 9])
    truth.velocity[1] = math.nan
    goal = encode(truth.boxes, truth.velocity)
    found = net.sums(said, truth)
    first, focal, distance = 0, 0.0, 0.0
    for frame, count in enumerate([4, 0, 9]):
        for layer in range(2):
            target = torch.zeros(9, 3)
            rows = slice(first, first + count)
            z, code = said.logits[layer : layer + 1, frame], said.codes[layer : layer + 1, frame]
            if count:
                table = net.cost(z, code, truth.classes[rows].long(), goal[rows])[0].detach().numpy()
                for q, b in TABLES.of(table):
                    target[q, int(truth.classes[first + b])] = 1
                    errors = (code[0, q] - goal[first + b]).detach().abs()
                    known = torch.where(errors.isnan(), 0.0, errors)
                    distance += float((known * torch.tensor([1.0] * 8 + [0.2] * 2)).sum())
            focal += float(sigmoid_focal(z[0], target, 2.0, 0.25).detach().sum())
        first += count
    assert float(found["box_class"].detach()) == pytest.approx(focal, rel=1e-5)
    assert float(found["box"].detach()) == pytest.approx(distance, rel=1e-5)
    assert {name: int(n) for name, n in net.counts(truth).items()} == {"box_class": 13, "box": 13}


def test_the_order_of_queries_and_boxes_does_not_matter():
    net, said, truth = losses(), outputs(2, 1, 9), boxes([6])
    order, turned = torch.randperm(9), torch.randperm(6)
    other = Boxes(*(part[turned] for part in (truth.boxes, truth.classes, truth.velocity, truth.points)), truth.counts)
    moved = Queried(said.logits[:, :, order], said.codes[:, :, order])
    for name, value in net.sums(said, truth).items():
        torch.testing.assert_close(net.sums(moved, other)[name], value)


def test_perfect_boxes_cost_nothing():
    net, truth = losses(), boxes([5])
    goal = encode(truth.boxes, truth.velocity)
    logits, codes = torch.full((2, 1, 9, 3), -40.0), torch.randn(2, 1, 9, CODE)
    codes[:, 0, 2:7] = goal.flip(0)
    logits[:, 0, torch.arange(2, 7), truth.classes.long().flip(0)] = 40.0
    found = net.sums(Queried(logits, codes), truth)
    assert float(found["box_class"]) == pytest.approx(0, abs=1e-6)
    assert float(found["box"]) == pytest.approx(0, abs=1e-6)


def test_unknown_velocities_teach_nothing():
    truth, said = boxes([3]), outputs(1, 1, 9)
    truth.velocity[:] = math.nan
    losses().sums(said, truth)["box"].backward()
    assert said.codes.grad is not None
    assert said.codes.grad.isfinite().all()
    assert not said.codes.grad[..., 8:].any()
    assert said.codes.grad[..., :8].any()


def test_boxes_beyond_the_grid_or_of_other_classes_are_not_learned():
    truth = boxes([8])
    truth.boxes[0, 0], truth.boxes[1, 1], truth.boxes[2, 2] = 12.0, -8.1, 40.0  # the last: only too high
    truth.classes[3], truth.boxes[4, 6], truth.boxes[5, 3] = 255, math.nan, 0.0
    assert losses().learned(truth).tolist() == [False, False, True, False, False, False, True, True]
    assert int(losses().counts(truth)["box"]) == 3
    assert losses().sums(outputs(1, 1, 9), truth)["box"].isfinite()


@pytest.mark.parametrize("counts", [[0, 0], [300, 0], [0, 300]])
def test_frames_without_boxes_and_with_more_than_queries(counts):
    net, said, truth = losses(60), outputs(2, 2, 60), boxes(counts, reach=0.9)
    found = net.sums(said, truth)
    assert int(net.counts(truth)["box"]) == min(60, sum(counts))
    sum(found.values()).backward()
    assert said.logits.grad is not None
    assert said.codes.grad is not None
    assert said.logits.grad.any()
    assert bool(said.codes.grad.any()) == bool(sum(counts))


def test_a_rank_without_labeled_frames_takes_part():
    said = outputs(2, 1, 9)
    said.codes.data[0, 0, 0, 0] = math.nan  # of a frame that teaches nothing
    nothing = boxes([])
    found = losses().sums(said, nothing)
    assert {name: float(v.detach()) for name, v in found.items()} == {"box_class": 0.0, "box": 0.0}
    sum(found.values()).backward()
    assert said.codes.grad is not None
    assert not said.codes.grad.any()
    assert int(losses().counts(nothing)["box"]) == 0


def test_halves_of_a_batch_have_the_loss_of_the_whole():
    """Of two micro-batches (or ranks) with joint counts, one without a box."""
    net, truth, said = losses(), boxes([7, 3, 0, 0]), outputs(2, 4, 9)
    whole, _ = combine(net.sums(said, truth), joint_counts([net.counts(truth)]), net.weights)
    halves = []
    parts = [truth.select(slice(0), slice(f, f + 2)) for f in (0, 2)]
    joint = joint_counts([net.counts(part) for part in parts])
    for first, part in zip((0, 2), parts):
        mine = Queried(said.logits[:, first : first + 2], said.codes[:, first : first + 2])
        halves.append(combine(net.sums(mine, part), joint, net.weights)[0])
    torch.testing.assert_close(sum(halves) / 2, whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"class_weight": -1.0}, "class_weight is -1.0, must not be negative"),
        ({"class_weight": 0.0, "box_weight": 0.0}, "nothing to learn"),
        ({"alpha": 1.5}, "alpha is 1.5"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        BoxLossConfig(**wrong)
