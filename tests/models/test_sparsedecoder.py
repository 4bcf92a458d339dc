"""Pruned decoding against dense decoding by the same weights, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from occstream.models.batch import pool_binary
from occstream.models.sparsedecoder import SparseDecoder, kept_count

COARSE, STRIDES = (4, 3, 2), ((1, 1, 1), (2, 2, 1), (2, 2, 2))  # no two sizes alike
SHAPES = ((4, 3, 2), (8, 6, 2), (16, 12, 4))
CHANNELS, WIDTHS = 6, (8, 5, 4)


def decoder(keep=(1.0, 1.0, 1.0), seed=0, **choices) -> SparseDecoder:
    torch.manual_seed(seed)
    return SparseDecoder(CHANNELS, WIDTHS, STRIDES, keep=keep, **choices)


def coarse(frames=2, seed=1):
    return torch.randn(frames, CHANNELS, *COARSE, generator=torch.Generator().manual_seed(seed))


def labels(frames=2, share=0.02, seed=2):
    return torch.rand(frames, *SHAPES[-1], generator=torch.Generator().manual_seed(seed)) < share


def densely(model: SparseDecoder, x):
    """The same weights in transposed convolutions of dense volumes: features, and logits of each level."""
    said = []
    for level in model.levels:
        outputs = level.norm.normalized_shape[0]
        weight = level.up.weight.view(*level.stride, outputs, -1).permute(4, 3, 0, 1, 2)
        x = F.conv_transpose3d(x, weight, stride=level.stride)
        x = x + level.up.bias.view(*level.stride, outputs).permute(3, 0, 1, 2).repeat(1, *_times(x, level.stride))
        x = F.relu(level.norm(x.movedim(1, -1)))
        logits = level.score(x).squeeze(-1)
        said.append(logits)
        x = (x * logits.sigmoid()[..., None]).movedim(-1, 1)
        if level.near is not None:
            near = F.conv3d(x, level.near.conv.weight.permute(0, 4, 1, 2, 3), padding=1)
            x = x + F.relu(level.near.norm(near.movedim(1, -1))).movedim(-1, 1)
    return x, said


def _times(x, stride):
    return [n // s for n, s in zip(x.shape[2:], stride)]


@pytest.mark.parametrize("submanifold", [False, True])
def test_keeping_all_is_dense_decoding(submanifold):
    model = decoder(submanifold=submanifold)
    a, b = coarse(), coarse()
    sparse, (dense, said) = model(a), densely(model, b)
    torch.testing.assert_close(sparse.volume(sparse.rows()), dense, rtol=0, atol=1e-5)
    for level, logits in zip(sparse.levels, said, strict=True):
        torch.testing.assert_close(level.logits, logits.flatten(), rtol=0, atol=1e-5)
        assert torch.equal(level.places, torch.arange(logits.numel()))
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    sparse, (dense, _) = model.double()(a), densely(model, b)
    upstream = torch.randn_like(dense)
    parts = list(model.parameters())
    ours = torch.autograd.grad((sparse.volume(sparse.rows()) * upstream).sum(), [a, *parts])
    theirs = torch.autograd.grad((dense * upstream).sum(), [b, *parts])
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_what_is_kept_has_the_features_of_dense_decoding():
    model = decoder((0.5, 0.5, 0.25))
    sparse, (dense, said) = model(coarse()), densely(model, coarse())
    active = torch.zeros(2, *SHAPES[-1], dtype=torch.bool)
    active[sparse.indices.unbind(1)] = True
    whole = sparse.volume(sparse.rows())
    torch.testing.assert_close(whole, dense * active[:, None], rtol=0, atol=1e-5)
    first = said[0].flatten(1).topk(12, 1).indices.sort(1).values + torch.tensor([[0], [24]])
    children = torch.zeros(2 * 24, dtype=torch.bool).index_fill(0, first.flatten(), True).view(2, *COARSE)
    expected = children.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten().nonzero().squeeze(1)
    assert torch.equal(sparse.levels[1].places, expected)


def test_counts_of_the_paper():
    """50 x 50 x 16 and 0.2, 0.5, 0.5 leave 5 % of 200 x 200 x 32 (Sec. 4.5)."""
    torch.manual_seed(0)
    model = SparseDecoder(1, (1, 1, 1), STRIDES, keep=(0.2, 0.5, 0.5)).eval()
    found = model(torch.randn(1, 1, 50, 50, 16))
    assert [len(level.logits) for level in found.levels] == [40_000, 32_000, 128_000]
    assert [level.kept.tolist() for level in found.levels] == [[8_000], [16_000], [64_000]]
    assert found.shape == (200, 200, 32)
    assert len(found.features) == len(found.indices) == 64_000


def test_halves_are_rounded_up():
    assert [kept_count(0.5, n) for n in (1, 3, 5, 6)] == [1, 2, 3, 3]
    assert kept_count(0.01, 24) == 0


def test_of_equal_scores_the_first_voxels_are_kept():
    """By their place in the grid, not by the order in which parents made them."""
    model = decoder((0.5, 0.5, 0.125))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = model(coarse(1))
    first = found.levels[0].places[:12]
    assert first.tolist() == list(range(12))
    for level, after in zip(found.levels, [level.places for level in found.levels[1:]] + [found.places], strict=False):
        assert torch.equal(level.places, level.places.unique())  # ascending, none twice
        kept = int(level.kept)
        if after is found.places:
            assert torch.equal(after, level.places[:kept])


def test_frames_do_not_matter_to_each_other():
    model, x = decoder((0.5, 0.4, 0.3)), coarse(3)
    whole = model(x)
    for i in range(3):
        alone = model(x[i : i + 1])
        mine = whole.indices[:, 0] == i
        assert torch.equal(alone.indices[:, 1:], whole.indices[mine, 1:])
        torch.testing.assert_close(alone.features, whole.features[mine], rtol=0, atol=1e-6)


def test_labels_are_never_cut_off_in_training():
    truth = labels(share=0.05)
    model = decoder((0.05, 0.05, 0.05))
    found = model(coarse(), truth)
    for level, shape in zip(found.levels, SHAPES, strict=True):
        wanted = pool_binary(truth, truth, shape)[0]
        assert int(level.at(wanted).sum()) == int(wanted.sum())  # all were looked at, so all their parents were kept
    assert torch.equal(torch.zeros(2, *SHAPES[-1]).bool().index_put(found.indices.unbind(1), torch.tensor(True)), truth)
    model.eval()
    assert torch.equal(model(coarse(), truth).indices, model(coarse()).indices)
    chosen = decoder((0.05, 0.05, 0.05), selection="predicted")
    assert torch.equal(chosen(coarse(), truth).indices, model(coarse()).indices)


def test_labels_take_their_place_within_the_share():
    truth, shares = labels(share=0.001), (0.75, 0.75, 0.75)
    found = decoder(shares)(coarse(), truth)
    assert [level.kept.tolist() for level in found.levels] == [[18, 18], [54, 54], [324, 324]]
    assert int(found.volume(torch.ones(len(found.features), 1))[:, 0][truth].sum()) == int(truth.sum())


def test_thresholds_keep_what_is_probable_enough():
    model = decoder((0.5, 0.45, 0.5), by="threshold", selection="predicted")
    found = model(coarse())
    kept = [int((level.logits.sigmoid() >= t).sum()) for level, t in zip(found.levels, (0.5, 0.45, 0.5), strict=True)]
    assert [int(level.kept.sum()) for level in found.levels] == kept
    assert 0 < kept[-1] < len(found.levels[-1].logits)


@pytest.mark.parametrize("submanifold", [False, True])
def test_every_parameter_learns_something_even_if_nothing_is_kept(submanifold):
    model = decoder((1.0, 1.0, 1.0), by="threshold", selection="predicted", submanifold=submanifold)
    with torch.no_grad():
        model.levels[0].score.bias.fill_(-50)
    found = model(coarse(), labels())
    assert not len(found.features)
    assert found.volume(found.rows(), 3.0).unique().tolist() == [3.0]
    assert not found.bev(found.rows()).any()
    (found.bev(found.rows()).sum() + sum(level.logits.sum() for level in found.levels)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_autocast_changes_features_little_and_scores_are_full():
    model = decoder((0.5, 0.5, 0.5))
    full = model(coarse())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(coarse())
    assert half.levels[-1].logits.dtype == torch.float32
    a, b = (found.volume(torch.ones(len(found.features), 1)).bool() for found in (full, half))
    both = a & b
    assert both.sum() > 0.9 * a.sum()
    features = [found.volume(found.rows()).float()[both.expand(-1, WIDTHS[-1], -1, -1, -1)] for found in (full, half)]
    torch.testing.assert_close(features[1], features[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("keep", "by", "message"),
    [
        ((0.5, 0.5), "share", "one for each of 3 levels"),
        ((0.5, 0.0, 0.5), "share", "a share above 0"),
        ((0.5, 1.5, 0.5), "share", "a share above 0"),
        ((0.5, math.nan, 0.5), "threshold", "a probability from 0 to 1"),
    ],
)
def test_wrong_numbers_are_refused(keep, by, message):
    with pytest.raises(ValueError, match=message):
        decoder(keep, by=by)
