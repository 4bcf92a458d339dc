"""Check values, and losses whose mean over ranks is that of the joint batch."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from occstream.models import Batch, OccOutputs
from occstream.models.batch import concat
from occstream.pretrain.config import load_config
from occstream.pretrain.losses import LossConfig, sigmoid_focal, sigmoid_focal_sum, softmax_focal
from occstream.pretrain.losses import counts as counts_of
from occstream.pretrain.resume import check_same_run
from occstream.pretrain.terms import joint_counts
from tests.models.helpers import make_batch, occupancy_loss
from tests.pretrain.small import RECIPE


def test_sigmoid_focal_check_values():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert sigmoid_focal(torch.tensor(0.0), one, 2.0, 0.25).item() == pytest.approx(0.04332, abs=5e-6)
    assert sigmoid_focal(torch.tensor(0.0), zero, 2.0, 0.25).item() == pytest.approx(0.12997, abs=5e-6)
    assert sigmoid_focal(torch.tensor(2.0), one, 2.0, 0.25).item() == pytest.approx(0.000451, abs=5e-7)


def test_sigmoid_focal_without_focusing_is_cross_entropy():
    logits, target = torch.randn(50) * 3, (torch.rand(50) > 0.5).float()
    want = 0.5 * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(sigmoid_focal(logits, target, 0.0, 0.5), want)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_fast_sum_equals_the_reference_with_its_gradient(gamma):
    g = torch.Generator().manual_seed(2)
    logits = (torch.randn(300, 7, generator=g, dtype=torch.float64) * 6).requires_grad_()
    labels = torch.randint(0, 8, (300,), generator=g)  # 7: free
    target = F.one_hot(labels, 8)[:, :7].double()
    slow = sigmoid_focal(logits, target, gamma, 0.25).sum()
    fast = sigmoid_focal_sum(logits, [(labels, None)], gamma, 0.25)
    torch.testing.assert_close(fast, slow)
    weight = torch.tensor(0.37, dtype=torch.float64)
    a, b = (torch.autograd.grad(x * weight, logits)[0] for x in (fast, slow))
    torch.testing.assert_close(a, b)


def test_fast_sum_of_soft_labels_and_class_weights_equals_the_reference():
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(200, 5, generator=g, dtype=torch.float64) * 3).requires_grad_()
    first, second = torch.randint(0, 6, (2, 200), generator=g)  # 5: free
    share = torch.rand(200, generator=g, dtype=torch.float64)
    columns = torch.rand(5, generator=g, dtype=torch.float64) + 0.5
    hard = lambda labels: (sigmoid_focal(logits, F.one_hot(labels, 6)[:, :5].double(), 2.0, 0.25) * columns).sum(1)  # noqa: E731
    slow = (share * hard(first) + (1 - share) * hard(second)).sum()
    fast = sigmoid_focal_sum(logits, [(first, share), (second, 1 - share)], 2.0, 0.25, columns=columns)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (fast, slow)))


@pytest.mark.parametrize("kind", ["sigmoid_focal", "softmax_focal"])
def test_sure_soft_labels_are_hard_ones_and_half_sure_ones_lie_between(kind):
    batch = make_batch(2, 2)
    batch.occupancy.semantic[:, :2] = 255
    outputs, config = outputs_for(batch), LossConfig(kind=kind, binary_weight=0)
    hard, _ = occupancy_loss(outputs, batch, config)
    batch.occupancy.second = torch.full_like(batch.occupancy.semantic, 255)
    batch.occupancy.confidence = torch.ones(batch.occupancy.semantic.shape)
    torch.testing.assert_close(occupancy_loss(outputs, batch, config)[0], hard)
    other = torch.where(batch.occupancy.semantic == 255, 255, (batch.occupancy.semantic.int() + 1) % 18).to(torch.uint8)
    batch.occupancy.second, batch.occupancy.confidence = other, torch.full(batch.occupancy.semantic.shape, 0.5)
    half, _ = occupancy_loss(outputs, batch, config)
    counts = [(labels[labels != 255] < 17).sum() for labels in (batch.occupancy.semantic, other)]
    batch.occupancy.semantic, batch.occupancy.second = other, None
    swapped = occupancy_loss(outputs, batch, config)[0] * counts[1] / counts[0]
    torch.testing.assert_close(half, (hard + swapped) / 2)


def test_class_weights_scale_their_class():
    batch = make_batch(1, 1)
    batch.occupancy.semantic[...] = 3
    outputs = outputs_for(batch)
    weights = [1.0] * 18
    weights[3] = 2.5
    base = LossConfig(kind="softmax_focal", binary_weight=0)
    plain, heavy = (occupancy_loss(outputs, batch, c)[0] for c in (base, replace(base, class_weights=tuple(weights))))
    torch.testing.assert_close(heavy, 2.5 * plain)
    with pytest.raises(ValueError, match="has 18 values, must have 17"):
        occupancy_loss(outputs, batch, LossConfig(class_weights=tuple(weights)))


def test_softmax_focal_stays_finite_when_it_is_sure():
    logits = torch.tensor([[60.0, -60.0]]).requires_grad_()
    loss = softmax_focal(logits, torch.tensor([0]), 2.0)
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()


def outputs_for(batch, classes=17):
    g = torch.Generator().manual_seed(1)
    binary = torch.randn(batch.size, 8, 8, 4, generator=g, requires_grad=True)
    semantic = torch.randn(batch.labeled, classes, *batch.occupancy.binary.shape[1:], generator=g, requires_grad=True)
    return OccOutputs(binary, semantic, torch.full((batch.labeled,), 7))


@pytest.mark.parametrize("kind", ["sigmoid_focal", "softmax_focal"])
def test_ignored_and_masked_voxels_have_no_gradient_and_no_weight(kind):
    batch = make_batch(3, 2)
    batch.occupancy.semantic[:, :4] = 255
    batch.occupancy.binary_valid[:, :4] = False
    outputs = outputs_for(batch)
    config = LossConfig(kind=kind)
    loss, parts = occupancy_loss(outputs, batch, config)
    loss.backward()
    assert outputs.semantic_logits.grad[:, :, :4].abs().max() == 0
    assert outputs.binary_logits.grad[:, :2].abs().max() == 0
    assert outputs.semantic_logits.grad[:, :, 4:].abs().min() >= 0
    # Whatever stands in ignored voxels changes nothing.
    changed = batch.clone()
    changed.occupancy.binary[:, :4] = ~changed.occupancy.binary[:, :4]
    again, _ = occupancy_loss(outputs, changed, config)
    assert again.item() == loss.item()
    assert set(parts) == {"binary", "semantic", "selected"}


def test_normalizers_differ_by_the_share_of_occupied_voxels():
    batch = make_batch(2, 2)
    outputs = outputs_for(batch)
    by = {
        n: occupancy_loss(outputs, batch, LossConfig(normalizer=n))[1]["semantic"].item() for n in ("occupied", "valid")
    }
    share = (batch.occupancy.semantic < 17).float().mean().item()
    assert by["valid"] == pytest.approx(by["occupied"] * share, rel=1e-5)


def test_weights():
    batch = make_batch(2, 1)
    outputs = outputs_for(batch)
    loss, parts = occupancy_loss(outputs, batch, LossConfig(binary_weight=2.0, semantic_weight=3.0))
    assert loss.item() == pytest.approx(2 * parts["binary"].item() + 3 * parts["semantic"].item(), rel=1e-6)


def slope_of_semantic_frames(batch, config, counts=None):
    """Sum of the absolute gradients of the S frames' binary logits, all 0: 0.5 if they are one mean of a weight of 1."""
    shape = (batch.size, *batch.occupancy.binary.shape[1:])
    outputs = OccOutputs(
        torch.zeros(shape, requires_grad=True), torch.zeros(batch.labeled, 17, *batch.occupancy.binary.shape[1:])
    )
    counts = joint_counts([counts_of(outputs, batch, config)]) if counts is None else counts
    loss, _ = occupancy_loss(outputs, batch, config, counts)
    loss.backward()
    return outputs.binary_logits.grad[: batch.labeled].abs().sum().item()


@pytest.mark.parametrize(("normalizer", "all_valid", "a_quarter"), [("own", 0.5, 0.5), ("joint", 0.25, 0.1)])
def test_replay_leaves_the_weight_of_semantic_frames(normalizer, all_valid, a_quarter):
    config = LossConfig(replay_normalizer=normalizer)
    s, b = make_batch(1, 1, seed=1), make_batch(1, 0, seed=2)
    s.occupancy.binary_valid[...], b.occupancy.binary_valid[...] = True, True
    assert slope_of_semantic_frames(s, config) == pytest.approx(0.5)
    assert slope_of_semantic_frames(concat(s, b), config) == pytest.approx(all_valid)
    s.occupancy.binary_valid[:, 4:] = False  # 4 of 16 rows
    assert slope_of_semantic_frames(s, config) == pytest.approx(0.5)
    assert slope_of_semantic_frames(concat(s, b), config) == pytest.approx(a_quarter)


@pytest.mark.parametrize("ranks", [1, 2])
def test_normalizers_of_roles_are_joint_over_ranks_and_micro_batches(ranks, monkeypatch):
    """Four parts of one batch, S frames, B frames or both in each, as micro-batches of one process and of two."""
    config, both = (
        LossConfig(depth_weight=0.5),
        [(make_batch(1, 1, seed=i), make_batch(1, 0, seed=9 - i)) for i in (1, 2)],
    )
    for s, b in both:
        s.cameras.depth, b.cameras.depth = (torch.rand(1, 3, 4, 8) * 9 for _ in range(2))
        s.occupancy.binary_valid[:, 5:] = False
    parts = [concat(*both[0]), both[1][0], both[1][1], concat(*both[1])]
    whole = functools.reduce(concat_both, parts)
    outputs = [lifted(outputs_for(p), p) for p in parts]
    order = sorted(range(whole.size), key=lambda i: (kinds(parts)[i], i))  # S first
    joined = OccOutputs(
        torch.cat([o.binary_logits for o in outputs])[order],
        torch.cat([o.semantic_logits for o in outputs]),
        depth=torch.cat([o.depth for o in outputs])[order],
        depth_bins=outputs[0].depth_bins,
    )
    for o in outputs:
        o.selected = None
    expected, _ = occupancy_loss(joined, whole, config)
    share = [list(range(4))[r::ranks] for r in range(ranks)]
    sums = sum(
        torch.stack(
            [torch.stack([n.float() for n in counts_of(outputs[i], parts[i], config).values()]) for i in range(4)]
        )
    )
    monkeypatch.setattr("occstream.pretrain.terms.world_size", lambda: ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.copy_(sums))
    found = []
    for mine in share:
        counts = joint_counts([counts_of(outputs[mine[0]], parts[i], config) for i in mine])
        found.append(sum(occupancy_loss(outputs[i], parts[i], config, counts)[0] for i in mine) / len(mine))
    torch.testing.assert_close(sum(found) / ranks, expected)


def lifted(outputs, batch):
    g = torch.Generator().manual_seed(batch.size)
    outputs.depth = torch.rand(batch.size, 3, 5, 4, 8, generator=g).softmax(2)
    outputs.depth_bins = torch.arange(1.0, 10.0, 2.0)
    return outputs


def kinds(parts):
    return [int(i >= p.labeled) for p in parts for i in range(p.size)]


def concat_both(first, second):
    """S frames of both, then B frames of both."""
    order = [
        *range(first.labeled),
        *range(first.size, first.size + second.labeled),
        *range(first.labeled, first.size),
        *range(first.size + second.labeled, first.size + second.size),
    ]
    joined = {}
    for name, part in first.parts():
        for f, value in part.present():
            both = torch.cat([value, getattr(getattr(second, name), f.name)])
            joined[f"{name}.{f.name}"] = both[order] if f.metadata["axis"] == "frame" else both
    joined["scene_aug"] = torch.cat([first.scene_aug, second.scene_aug])[order]
    return replace(Batch.of(joined), labeled=first.labeled + second.labeled)


def test_a_run_with_replay_that_began_before_the_choice_says_which_to_set(tmp_path):
    words = [f"output={tmp_path}", "replay.url=b"]
    config = load_config(RECIPE, words, stage="finetune")
    before = config.to_dict()
    del before["loss"]["replay_normalizer"]
    saved = SimpleNamespace(path="step", state={"config": before, "fingerprints": {}})
    with pytest.raises(ValueError, match=r"trained with loss\.replay_normalizer=joint, this run has .*=own"):
        check_same_run(config, {}, saved)
    check_same_run(load_config(RECIPE, [*words, "loss.replay_normalizer=joint"], stage="finetune"), {}, saved)
