"""Triton kernels against the reference in float64, through Triton's interpreter (on a GPU: infra/gpu_check.sh)."""

import os
import subprocess
import sys

import pytest
import torch

from occstream.models import kernels
from occstream.models.attention import sample
from occstream.models.lift import _Pool, voxel_pool
from occstream.pretrain.losses import LossConfig, _NegativeFocal
from tests.models.helpers import SMALL, make_batch, occupancy_loss
from tests.models.test_b2s import build

pytest.importorskip("triton")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grads(out, seed, *inputs):
    return torch.autograd.grad(out, inputs, draw(seed, *out.shape))


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
    found = kernels.pool(depth, context, voxel, size)
    torch.testing.assert_close(found, expected)
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
    expected, found = (run(values, locations, weights, counts) for run in (sample, kernels.sample))
    torch.testing.assert_close(found, expected)
    inputs = values, locations, weights
    for mine, theirs in zip(grads(found, 3, *inputs), grads(expected, 3, *inputs)):
        torch.testing.assert_close(mine, theirs)


def test_in_bf16_the_reference_sums_in_fp32_as_the_kernels_do():
    """A run may turn the kernels on or off between two starts: neither results nor gradients may depend on them."""
    counts = [12, 9]
    values, features = draw(0, 2, 4, 3, 5).bfloat16(), draw(1, 1, 3, 2, 3, 5).bfloat16()
    locations, weights = (0.5 + 0.4 * draw(2, 21, 2, 8, 2)).float(), draw(3, 21, 2, 8).float()
    depth = draw(4, 1, 3, 20, 3, 5).float().softmax(2)
    points = draw(5, 1, 3, 20, 3, 5, 3).float() * 2
    found = []
    for wanted in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "wanted_for", lambda tensor, wanted=wanted: wanted)
            inputs = [t.clone().requires_grad_() for t in (values, locations, weights, depth, features)]
            sampled, pooled = sample(*inputs[:3], counts), voxel_pool(*inputs[3:], points, SMALL)
            assert sampled.dtype == pooled.dtype == torch.float32
            total = (sampled * draw(6, *sampled.shape).float()).sum() + (pooled * draw(7, *pooled.shape).float()).sum()
            found.append((sampled, pooled, *torch.autograd.grad(total, inputs)))
    for name, mine, theirs in zip(["sampled", "pooled", "values", "locations", "weights", "depth", "features"], *found):
        assert mine.dtype == theirs.dtype, name
        # One unit of bf16's last place: sums are rounded to it, by Triton's interpreter toward zero.
        loose = 2**-7 if mine.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=loose, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss(gamma, weighted):
    logits = (4 * draw(0, 150, 9)).requires_grad_()
    columns = draw(1, 9).abs() if weighted else None
    expected = _NegativeFocal.apply(logits, gamma, columns)
    [slope] = torch.autograd.grad(expected, [logits])
    value, mine = kernels.negative_focal(logits.detach(), gamma, columns)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(mine, slope)
    empty, none = kernels.negative_focal(logits[:0].detach(), gamma, columns)
    assert float(empty) == 0
    assert none.shape == (0, 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b2s_ls", "b2s_bevformer"])
def test_a_whole_network_is_the_same_with_them(name, monkeypatch):
    """Outputs, loss and the gradient of every parameter, in float32."""
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(kernels, "wanted_for", lambda tensor, wanted=wanted: wanted)
        model, batch = build(name=name), make_batch(2, 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # They begin at whole cells, where linear interpolation has a kink and rounding picks the side.
                if key.endswith("offsets.bias"):
                    parameter += 0.3
        loss, _ = occupancy_loss(model(batch), batch, LossConfig())
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    largest = max(float(g.abs().max()) for g in found[0][1].values() if g is not None)
    for key, grad in found[0][1].items():
        if grad is not None:
            torch.testing.assert_close(found[1][1][key], grad, rtol=1e-3, atol=1e-5 * largest, msg=key)


@pytest.mark.process
def test_they_compile_for_the_gpus_of_the_field_without_one():
    """PTX and machine code for A100 and H100, by a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.compile_kernels"], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert done.stdout.count("sm_80") == done.stdout.count("sm_90") == 9


def test_only_cuda_tensors_run_them():
    kernels.use(True)
    try:
        assert not kernels.wanted_for(torch.zeros(1))
    finally:
        kernels.use(False)
