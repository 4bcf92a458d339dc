"""The network of a recipe, and how it computes: precision, kernels, compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from occstream.models import kernels
from occstream.pretrain.config import Config
from occstream.pretrain.device import computes_bf16
from occstream.pretrain.distributed import World
from occstream.pretrain.seeds import seed_everything
from occstream.pretrain.tasks.registry import task_of


def create_model(config: Config) -> nn.Module:
    """The network of a recipe; its initial weights depend only on ``train.seed``."""
    seed_everything(config.train.seed)
    return task_of(config).model()


def settled(config: Config, world: World) -> Config:
    """The recipe with what ``train.precision=auto`` stands for here, which is said (collective). A checkpoint holds it, and
    whoever resumes on another machine is told if it would be another."""
    if config.train.precision != "auto":
        return config
    able = torch.tensor(float(computes_bf16(world.device)), device=world.device)
    if world.size > 1:
        dist.all_reduce(able, dist.ReduceOp.MIN)
    precision, why = ("bf16", "computes in it") if able else ("fp32", "has no instructions for bf16")
    world.say(f"train.precision=auto: {precision}, as this {'GPU' if world.device.type == 'cuda' else 'CPU'} {why}")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


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
