"""Every network on a device that is not the CPU, and in bf16, without a GPU: what is made on the wrong device raises."""

import itertools
from typing import get_args

import pytest
import torch
from torch.fx.experimental import _config as fake

from occstream.models.b2s import Strategy
from occstream.models.registry import MODELS
from occstream.pretrain.losses import LossConfig, occupancy_loss
from tests.models.helpers import SMALL, make_batch
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
        batch.depth = torch.full((frames, 3, 4, 8), 7.3)
    batch = batch.to(device)
    outputs = model(batch)
    loss, _ = occupancy_loss(outputs, batch, LossConfig(depth_weight=float(lifting)))
    loss.backward()
    return model, outputs


@pytest.mark.parametrize(("name", "semantic", "strategy"), NETWORKS)
def test_all_tensors_are_made_where_the_batch_is(name, semantic, strategy, monkeypatch):
    """The device "meta" computes shapes alone, and raises where it meets a tensor of another device. What depends on data
    (how many voxels are occupied, points inside, pixels seen) has fixed sizes."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [8] * len(tensor))
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
