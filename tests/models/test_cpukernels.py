"""Compiled loops for the CPU against the reference, in float64 where rounding would hide what is wrong."""

import numpy as np
import pytest
import torch

from occstream.models import attention, cpukernels, kernels
from occstream.models.lift import _Pool, voxel_pool
from occstream.pretrain.losses import LossConfig
from tests.models.helpers import SMALL, make_batch, occupancy_loss
from tests.models.test_b2s import build

ODD = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(seed, *shape):
    return np.random.default_rng(seed).random(shape)


def grads(out, seed, *inputs):
    return torch.autograd.grad(out, inputs, draw(seed, *out.shape, dtype=out.dtype))


@pytest.fixture
def wanted():
    kernels.use(True, "cpu")
    yield
    kernels.use(False)


@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("inside", [0.0, 0.6, 1.0])
def test_voxel_pooling(channels, inside):
    n, bins, cells, size = 2, 19, 6, 20
    depth, context = draw(0, n, bins, cells).requires_grad_(), draw(1, n * cells, channels).requires_grad_()
    voxel = torch.randint(0, size, (n, bins, cells), generator=torch.Generator().manual_seed(2))
    voxel[torch.rand(voxel.shape, generator=torch.Generator().manual_seed(3)) >= inside] = -1
    keep = (voxel.reshape(-1) >= 0).nonzero().squeeze(1)
    pixel = keep // (bins * cells) * cells + keep % cells
    expected = _Pool.apply(depth.reshape(-1)[keep], context, pixel, voxel.reshape(-1)[keep], size)
    found = cpukernels.pool(depth, context, voxel, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, msg="added up in the same order")
    for mine, theirs in zip(grads(found, 4, depth, context), grads(expected, 4, depth, context)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("heads", "width", "counts"), [(1, 4, [0, 1]), (2, 3, [21, 17]), (1, 2, [0, 0])])
def test_deformable_sampling(dims, heads, width, counts):
    """Locations within the volume, beyond its border (0 there) and far away; as many of each volume as it has."""
    shape = (4, 3, 5)[3 - dims :]
    values = draw(0, 2, heads * width, *shape).requires_grad_()
    locations = (0.5 + 0.5 * draw(1, sum(counts), heads, 3, dims)).requires_grad_()
    weights = draw(2, sum(counts), heads, 3).requires_grad_()
    inputs = values, locations, weights
    expected, found = (run(*inputs, counts) for run in (attention.sample, cpukernels.sample))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(grads(found, 3, *inputs), grads(expected, 3, *inputs)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dims", [2, 3])
def test_sampling_nowhere_gives_nothing_and_writes_nowhere(dims):
    values = draw(0, 1, 2, *(4, 3, 5)[3 - dims :]).requires_grad_()
    places = [[odd if axis == i else 0.5 for axis in range(dims)] for odd in ODD for i in range(dims)]
    locations = torch.tensor(places, dtype=torch.float64).view(-1, 1, 1, dims).requires_grad_()
    weights = torch.ones(len(places), 1, 1, dtype=torch.float64, requires_grad=True)
    found = cpukernels.sample(values, locations, weights, [len(places)])
    assert not found.any()
    assert not any(grad.any() for grad in grads(found, 1, values, locations, weights))


def test_places_are_those_of_the_reference():
    """Borders of voxels and of the grid; what is not in it is nowhere."""
    lower, voxel, shape = (np.array(v, np.float32) for v in (SMALL.lower, SMALL.voxel, SMALL.shape))
    steps = np.concatenate([np.indices((2, 2, 2)).reshape(3, -1).T * shape, (rand(0, 500, 3) * 1.4 - 0.2) * shape])
    points = np.concatenate([lower + voxel * steps, lower + voxel * np.round(steps)]).astype(np.float32)
    points = np.concatenate([points, [[odd, 0.0, 0.0] for odd in ODD]]).astype(np.float32)
    batch = torch.from_numpy(np.stack([points, points[::-1]]))
    found = cpukernels.places(batch, SMALL)
    with np.errstate(invalid="ignore"):
        index = np.floor((batch.numpy() - lower) / voxel)
    inside = ((index >= 0) & (index < shape)).all(-1)
    assert 100 < inside.sum() < inside.size - 100
    flat = np.ravel_multi_index(index[inside].astype(int).T, SMALL.shape)
    flat += (np.nonzero(inside)[0] * shape.prod()).astype(int)
    assert (found.numpy()[inside] == flat).all()
    assert (found.numpy()[~inside] == -1).all()


def test_in_bf16_they_sum_in_fp32_as_the_reference_does(wanted):
    """A run may turn the kernels on or off between two starts: neither results nor gradients may depend on them."""
    counts = [12, 9]
    values, features = draw(0, 2, 4, 3, 5).bfloat16(), draw(1, 1, 3, 2, 3, 5).bfloat16()
    locations, weights = (0.5 + 0.4 * draw(2, 21, 2, 8, 2)).float(), draw(3, 21, 2, 8).float()
    depth = draw(4, 1, 3, 20, 3, 5).float().softmax(2)
    points = draw(5, 1, 3, 20, 3, 5, 3).float() * 2
    found = []
    for used in (False, True):
        kernels.use(used, "cpu")
        inputs = [t.clone().requires_grad_() for t in (values, locations, weights, depth, features)]
        sampled, pooled = attention.sample(*inputs[:3], counts), voxel_pool(*inputs[3:], points, SMALL)
        assert sampled.dtype == pooled.dtype == torch.float32
        total = (sampled * draw(6, *sampled.shape).float()).sum() + (pooled * draw(7, *pooled.shape).float()).sum()
        found.append((sampled, pooled, *torch.autograd.grad(total, inputs)))
    for mine, theirs in zip(*found):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if mine.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["b2s_ls", "b2s_bevformer"])
def test_a_whole_network_is_the_same_with_them(name, wanted, monkeypatch):
    """Loss and the gradient of every parameter, in float32; both loops are used."""
    found, used = [], []
    for function in ("pool", "sample"):
        work = getattr(cpukernels, function)
        monkeypatch.setattr(cpukernels, function, lambda *a, f=function, w=work: used.append(f) or w(*a))
    for on in (False, True):
        kernels.use(on, "cpu")
        model, batch = build(name=name), make_batch(2, 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # They begin at whole cells, where linear interpolation has a kink and rounding picks the side.
                if key.endswith("offsets.bias"):
                    parameter += 0.3
        loss, _ = occupancy_loss(model(batch), batch, LossConfig())
        assert bool(used) == on
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert set(used) == ({"pool", "sample"} if name == "b2s_ls" else {"sample"})
    torch.testing.assert_close(found[0][0], found[1][0])
    largest = max(float(g.abs().max()) for g in found[0][1].values() if g is not None)
    for key, grad in found[0][1].items():
        if grad is not None:
            torch.testing.assert_close(found[1][1][key], grad, rtol=1e-3, atol=1e-5 * largest, msg=key)


def test_they_are_used_where_they_are_asked_for_alone():
    tensor = torch.zeros(1)
    kernels.use(False)
    try:
        assert kernels.compiled_for(tensor) is None
        kernels.use(True, "cpu")
        assert kernels.compiled_for(tensor) is cpukernels
        assert not kernels.wanted_for(tensor)
    finally:
        kernels.use(False)
    assert kernels.compiled_for(tensor) is None
