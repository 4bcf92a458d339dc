"""The network of a recipe, and how it computes: precision, kernels, compilation."""

from __future__ import annotations

import torch
from torch import nn

from occstream.models import build_model, kernels
from occstream.pretrain.config import Config
from occstream.pretrain.seeds import seed_everything


def create_model(config: Config) -> nn.Module:
    """The network of a recipe; its initial weights depend only on ``train.seed``."""
    seed_everything(config.train.seed)
    return build_model(
        config.model_name,
        config.model,
        grid=config.voxel_grid,
        num_classes=config.classes.num_classes,
        image_size=tuple(config.augment.image_size),
        semantic=config.stage == "finetune",
    )


def accelerate(model: nn.Module, device: torch.device, with_kernels: bool, compiled: bool, tf32: bool = False) -> None:
    """Turns on what makes steps faster on CUDA; nothing changes on the CPU, and no name of a parameter anywhere. Torch itself
    lets convolutions take TF32 where nobody says otherwise: here they do what ``tf32`` says, as matrix products do.

    Raises:
        ImportError: kernels are wanted and Triton is missing.
    """
    kernels.use(with_kernels and device.type == "cuda")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if compiled and device.type == "cuda":
        compile_encoder(model)


def compile_encoder(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the backbone alone: it is most of the FLOPs, and its shapes do not change. Activation checkpointing stays
    outside: it runs the compiled function again."""
    model.images.levels = torch.compile(model.images.levels, dynamic=False, backend=backend)


def at_precision(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """The same network, whose forward computes in the recipe's precision as the engine's does in training."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    return model
