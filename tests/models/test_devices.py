"""Every network on a device that is not the CPU, and in bf16, without a GPU: what is made on the wrong device raises."""

import itertools
from typing import get_args

import pytest
import torch
from torch.fx.experimental import _config as fake

from occstream.models import attention, lift, transformer
from occstream.models.b2s import Strategy
from occstream.models.registry import MODELS
from occstream.pretrain.losses import LossConfig
from tests.models.helpers import SMALL, make_batch, occupancy_loss
from tests.models.test_b2s import build

# Pre-training ends at the binary head, which offboard lacks.
NETWORKS = [
    (name, semantic, strategy)
    for name, semantic, strategy in itertools.product(sorted(MODELS), (False, True), get_args(Strategy))
    if semantic or strategy != "offboard"
]


def step(name, semantic, strategy, device, frames=2):
    """Forward, loss and backward; the network, and its outputs."""
    with torch.device(device):
        parts = {"checkpointing": True, "head_rows": 4} if strategy == "intermediate" else {}
        model = build(name=name, semantic=semantic, strategy=strategy, dense_layers=1, **parts)
    batch = make_batch(frames, (frames - 1 if model.predicts_binary else frames) * semantic)
    lifting = hasattr(model.lift, "splat")
    if lifting:
        batch.cameras.depth = torch.full((frames, 3, 4, 8), 7.3)
    batch = batch.to(device)
    outputs = model(batch)
    loss, _ = occupancy_loss(outputs, batch, LossConfig(depth_weight=float(lifting)))
    loss.backward()
    return model, outputs


@pytest.mark.parametrize(("name", "semantic", "strategy"), NETWORKS)
def test_all_tensors_are_made_where_the_batch_is(name, semantic, strategy, monkeypatch):
    """The device "meta" computes shapes alone, and raises where it meets a tensor of another device. What depends on data
    (how many voxels are occupied, points inside, pixels seen) has fixed sizes."""
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read(torch.full(tensor.shape, 8, device="cpu")))
    with fake.patch(meta_nonzero_assume_all_nonzero=True):
        model, outputs = step(name, semantic, strategy, "meta")
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.device.type == "meta"
    if model.predicts_binary:
        assert outputs.binary_logits.shape[0] == 2
    if semantic:
        assert outputs.semantic_logits.shape == (1 if model.predicts_binary else 2, 17, *SMALL.shape)


@pytest.mark.parametrize(("name", "semantic", "strategy"), NETWORKS)
def test_all_networks_train_under_autocast(name, semantic, strategy):
    with torch.autocast("cpu", torch.bfloat16):
        model, outputs = step(name, semantic, strategy, "cpu")
    for tensor in (outputs.binary_logits, outputs.semantic_logits, outputs.depth):
        assert tensor is None or tensor.dtype == torch.float32
    for key, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", sorted(MODELS))
def test_geometry_under_autocast_is_that_of_fp32(name, monkeypatch):
    """The same voxel for every lifted point, pixels within 1e-3, and sampling locations and sums in fp32."""
    model, batch = build(name=name, dense_layers=1).eval(), make_batch(2, 2)
    grid, found = SMALL, {}

    def noting(function, key):
        def call(*args):
            result = function(*args)
            found.setdefault(key, []).append((args, result))
            return result

        return call

    for module, function in ((lift, "unproject"), (transformer, "project"), (attention, "sample")):
        monkeypatch.setattr(module, function, noting(getattr(module, function), function))
    seen = []
    for enabled in (False, True):
        found.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(batch)
        seen.append(dict(found))
    for (_, plain), (_, mixed) in zip(*(run.get("unproject", []) for run in seen), strict=True):
        lower, size = torch.tensor(grid.lower), torch.tensor(grid.voxel)
        assert mixed.dtype == torch.float32
        assert torch.equal(*(((points - lower) / size).floor() for points in (plain, mixed)))
    # The dense layer projects all voxels; the sparse part those of its selection, which follows the logits.
    (_, plain), (_, mixed) = (run["project"][0] for run in seen)
    for (pixels, depth), (mixed_pixels, mixed_depth) in zip(plain, mixed, strict=True):
        front = depth > 0.1
        torch.testing.assert_close(mixed_pixels[front], pixels[front], atol=1e-3, rtol=0)
        torch.testing.assert_close(mixed_depth, depth, atol=1e-5, rtol=0)
    for (values, locations, weights, _), result in seen[1]["sample"]:
        assert values.dtype == torch.bfloat16
        assert locations.dtype == weights.dtype == result.dtype == torch.float32


def test_geometry_in_less_than_fp32_is_refused():
    batch = make_batch(1, 1).to("cpu")
    points = lift.frustum((32, 64), (2, 2), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError, match="bfloat16"):
        lift.unproject(points.bfloat16(), batch)
    batch.cameras.intrinsics = batch.cameras.intrinsics.bfloat16()
    with pytest.raises(AssertionError, match="bfloat16"):
        lift.project([torch.zeros(1, 3)], batch)
    with pytest.raises(AssertionError, match="bfloat16"):
        attention.sample(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 1, 2).bfloat16(), torch.ones(1, 1, 1), [1])


def test_sums_of_samples_of_bf16_are_those_of_fp32():
    """As the kernels do it: many small terms do not vanish next to a large one."""
    values = torch.full((1, 2, 1, 64), 0.01).bfloat16().requires_grad_()
    values.data[..., 0] = 4
    wide = values.detach().float().requires_grad_()
    locations = torch.stack([(torch.arange(64) + 0.5) / 64, torch.full((64,), 0.5)], -1)[None, None]
    for one in (values, wide):
        attention.sample(one, locations, torch.ones(1, 1, 64), [1]).square().sum().backward()
    result = attention.sample(values, locations, torch.ones(1, 1, 64), [1])
    assert torch.equal(result, attention.sample(wide, locations, torch.ones(1, 1, 64), [1]))
    assert result[0, 0].item() == pytest.approx(4.63, abs=0.01)
    assert torch.equal(values.grad, wide.grad.bfloat16())
