"""``train.compile`` without a GPU: the backbone through Dynamo, and through AOTAutograd, whose graphs run as they are."""

import contextlib

import pytest
import torch

from occstream.models import backbones
from occstream.pretrain.config import load_config
from occstream.pretrain.networks import accelerate
from occstream.pretrain.tasks.registry import task_of
from tests.models.helpers import two_equal_ranks
from tests.models.test_b2s import build
from tests.pretrain.small import RECIPE

IMAGES = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))


def trained(backend, checkpointing, ranks):
    """Output, gradients and buffers after two steps, and how many graphs there are."""
    torch._dynamo.reset()
    encoder = (model := build(semantic=False, checkpointing=checkpointing)).images
    if backend:
        task_of(load_config(RECIPE)).compile(model, backend)
    with ranks():
        for _ in range(2):
            encoder.zero_grad()
            out = encoder(IMAGES)
            out.square().mean().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return out.detach(), {n: p.grad for n, p in encoder.named_parameters()}, dict(encoder.named_buffers()), graphs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("ranks", [contextlib.nullcontext, two_equal_ranks])
def test_the_compiled_backbone_learns_the_same_in_one_graph(backend, checkpointing, ranks, monkeypatch):
    """With activation checkpointing, and with batch norms over ranks; a batch is counted once."""
    monkeypatch.setitem(backbones._DEPTHS, "resnet18", ("basic", (1, 1, 1, 1)))
    torch._dynamo.utils.counters.clear()
    *plain, none = trained("", checkpointing, ranks)
    *compiled, graphs = trained(backend, checkpointing, ranks)
    assert (none, graphs) == (0, 1)
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_is_fp32_unless_tf32_is_asked_for(tf32):
    """Torch's own default lets convolutions take it."""
    config = load_config(RECIPE, [f"train.tf32={tf32}"] if tf32 else [])
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = not tf32
        accelerate(torch.nn.Identity(), torch.device("cuda"), False, tf32=config.train.tf32)
        assert products.allow_tf32 == convolutions.allow_tf32 == tf32
        accelerate(torch.nn.Identity(), torch.device("cpu"), False, tf32=not tf32)
        assert products.allow_tf32 == convolutions.allow_tf32 == tf32, "nothing changes on the CPU"
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
