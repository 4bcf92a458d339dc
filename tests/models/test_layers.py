"""Blocks that are computed in another way than they are defined: against the definition, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from occstream.models.layers import Merge, Pointwise2d, Pointwise3d


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "plain", "size"), [(Pointwise2d, nn.Conv2d, (4, 3)), (Pointwise3d, nn.Conv3d, (4, 3, 2))]
)
def test_a_pointwise_convolution_is_one(kind, plain, size):
    torch.manual_seed(0)
    mine = kind(5, 7).double()
    torch.manual_seed(0)
    theirs = plain(5, 7, 1).double()
    assert [*mine.state_dict()] == [*theirs.state_dict()]
    x = draw(1, 2, 5, *size).requires_grad_()
    found, expected = mine(x), theirs(x)
    torch.testing.assert_close(found, expected)
    assert found.movedim(1, -1).is_contiguous(), "channels last"
    grad = draw(2, *found.shape)
    pairs = zip(*(torch.autograd.grad(y, [x, *m.parameters()], grad) for y, m in ((found, mine), (expected, theirs))))
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_merging_is_a_convolution_of_resized_levels():
    merge, shape = Merge(5, 3).double(), (6, 4, 4)
    levels = [
        draw(i, 2, c, *size).requires_grad_()
        for i, (c, size) in enumerate([(2, (6, 4, 4)), (2, (6, 4, 2)), (1, (3, 2, 1))])
    ]
    resized = [F.interpolate(x, shape, mode="trilinear", align_corners=False) for x in levels]
    expected = F.conv3d(torch.cat(resized, 1), merge.weight, merge.bias)
    found = merge(levels, shape)
    torch.testing.assert_close(found, expected)
    inputs = [*levels, *merge.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, inputs, draw(9, *y.shape)) for y in (found, expected))):
        torch.testing.assert_close(one, other)
