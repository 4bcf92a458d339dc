"""The network of a recipe, and how it computes: precision, kernels, compilation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from occstream.models import kernels
from occstream.pretrain.config import Config
from occstream.pretrain.seeds import seed_everything
from occstream.pretrain.tasks.registry import task_of


def create_model(config: Config) -> nn.Module:
    """The network of a recipe; its initial weights depend only on ``train.seed``."""
    seed_everything(config.train.seed)
    return task_of(config).model()


def accelerate(
    model: nn.Module,
    device: torch.device,
    with_kernels: bool,
    *,
    tf32: bool = False,
    compiled: Callable[[nn.Module, str], None] | None = None,
) -> None:
    """Turns on what makes steps faster; no name of a parameter changes. Torch itself lets convolutions take TF32 on CUDA where
    nobody says otherwise: here they do what ``tf32`` says, as matrix products do.

    Args:
        with_kernels: Triton's on CUDA, compiled loops on the CPU.
        compiled: what compiles a network on CUDA (``Task.compile``), None: nothing does.

    Raises:
        ImportError: kernels are wanted on CUDA and Triton is missing.
    """
    kernels.use(with_kernels, device.type)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if compiled:
            compiled(model, "inductor")


def at_precision(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """The same network, whose forward computes in the recipe's precision as the engine's does in training."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    return model
