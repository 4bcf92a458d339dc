"""The DeepSpeed engine, clipping, and a step that must not be taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.pretrain.config import Config
from occstream.pretrain.distributed import World
from occstream.pretrain.optim import describe_groups, make_optimizer

if TYPE_CHECKING:

    class EngineOptimizer(torch.optim.Optimizer):
        """What an engine updates with: Adam (stage 0), or what ZeRO puts around it. DeepSpeed's own annotation is a union of
        all that it has, most of which have none of these.

        Attributes:
            found_inf: Adam, fused: () float32, not 0: its next step changes nothing.
            optimizer: ZeRO: Adam.
            overflow: ZeRO: the last step changed nothing.
            single_partition_of_fp32_groups, fp32_partitioned_groups_flat: stages 1 and 2, and 3: what Adam updates.
        """

        found_inf: Tensor
        optimizer: torch.optim.Optimizer
        overflow: bool
        single_partition_of_fp32_groups: list[Tensor]
        fp32_partitioned_groups_flat: list[Tensor]
        _hp_optimizer_states_linked: bool

        def _lazy_init_hp_params_optimizer_state(self) -> None: ...

    class Engine(nn.Module):
        """What is used of a ``DeepSpeedEngine``, with the types that it has here.

        Attributes:
            micro_steps: its own count, by which it knows where a step ends.
        """

        module: nn.Module
        optimizer: EngineOptimizer
        micro_steps: int

        def backward(self, loss: Tensor) -> Any:
            """Adds gradients of a micro-batch (collective for ZeRO)."""

        def step(self) -> None:
            """Ends a micro-batch; at a boundary updates (collective)."""

        def is_gradient_accumulation_boundary(self) -> bool:
            """Whether the micro-batch is the last one of its step."""
            ...

        def zero_optimization_stage(self) -> int:
            """0 to 3."""
            ...

        def get_global_grad_norm(self) -> float:
            """Of the last step, before clipping; ZeRO alone."""
            ...


BUCKET = 50_000_000  # elements; buckets of DeepSpeed's default size (5e8) would take 2 GB each


def build_engine(model: nn.Module, config: Config, world: World) -> Engine:
    """DeepSpeed engine with ZeRO ``train.zero_stage``; fp32 parameters and optimizer state always.

    Args:
        model: on the CPU or on ``world.device``, with the weights to start from: ZeRO copies them here. Modules with
            ``gathered_whole = True`` are one to ZeRO-3: what their own modules pass on may be anything.

    Returns:
        The engine. ``engine.optimizer.param_groups`` are live: ``Schedule.apply`` sets rates there.

    Raises:
        ValueError: as ``parameter_groups``.
    """
    import deepspeed

    model.to(world.device)
    optimizer = make_optimizer(model, config.optim, fuses(world.device))
    if len(optimizer.param_groups) > 1:
        world.say(f"groups of parameters: {describe_groups(optimizer.param_groups)}")
    cfg = config.train
    settings = {
        # Only bookkeeping: the frames of a rank are the stream's business (a rank may even have none of one kind).
        "train_micro_batch_size_per_gpu": max(1, cfg.batch // cfg.accumulate // world.size),
        "gradient_accumulation_steps": cfg.accumulate,
        # Stage 0 is clipped in ``clip_gradients``: DeepSpeed would launch some kernels for each parameter.
        "gradient_clipping": config.optim.clip if cfg.zero_stage else 0.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
        "zero_optimization": {
            "stage": cfg.zero_stage,
            "overlap_comm": world.device.type == "cuda" and cfg.zero_stage > 0,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # Everything is partitioned and freed after use, so that EMA and checkpoints see one kind of parameter.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }
    if cfg.precision == "bf16":
        # No "safe modules": gradients are reduced in fp32, whatever the forward computed in.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if cfg.zero_stage == 3:
        gather_whole(model)
    with _quiet(world):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return cast("Engine", engine)


def gather_whole(model: nn.Module) -> None:
    """Makes one module for ZeRO-3 of each with ``gathered_whole = True``. DeepSpeed gathers parameters by hooks that look for
    tensors in what a module takes and gives, and finds none in tensors of our own kinds."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if getattr(module, "gathered_whole", False):
            set_z3_leaf_module(model=module, flag=True)
            module.register_forward_pre_hook(_with_gradients)


def _with_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed takes the parameters' gradients for complete when those of the inputs are: without any, before they exist."""
    if not torch.is_grad_enabled():
        return inputs
    floating = [isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad for x in inputs]
    return tuple(x.detach().requires_grad_() if wanted else x for x, wanted in zip(inputs, floating))


def fuses(device: torch.device) -> bool:
    """Whether Adam is one kernel there, in place of a dozen calls for each parameter."""
    return device.type in ("cuda", "cpu")


def decides(device: torch.device) -> bool:
    """Whether a fused Adam is to be told on the device to change nothing, as the host would have to wait for the reason."""
    return device.type == "cuda"


def clip_gradients(engine: Engine, limit: float, world: World) -> Tensor:
    """Stage 0, at the end of a step's last backward: scales gradients to a norm of at most ``limit`` (0: leaves them).

    Returns:
        Scalar float32 on the device: their L2 norm before; the same on every rank, not finite if any gradient is not.
    """
    learned = [(p, p.grad) for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([grad for _, grad in learned])
    if world.size > 1:
        norm = norm / world.size
        dist.all_reduce(norm)
    if limit:
        torch.nn.utils.clip_grads_with_norm_([p for p, _ in learned], limit, norm)
    return norm


# --- a step that must not be taken --------------------------------------------------------------


def or_nan(loss: Tensor, errors: Tensor | None = None) -> Tensor:
    """The same loss and gradients if it is finite; else every gradient becomes NaN, which all ranks and stages notice. So it
    does if there are ``errors`` (scalar)."""
    if errors is not None:
        loss = loss * torch.ones_like(errors).masked_fill(errors > 0, math.nan)
    value = loss.detach()
    return loss * (1 + (value - value))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating buffers (running statistics)."""
    return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def put_back(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Buffers as ``buffers_of`` found them: a forward may write NaN into running statistics."""
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def drop_step(engine: Engine) -> None:
    """Stage 0: in place of ``engine.step()`` at the end of a step that must change nothing."""
    engine.module.zero_grad(set_to_none=True)
    engine.micro_steps += 1


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """DeepSpeed prints its whole configuration at every start; warnings stay."""
    import logging

    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.WARNING if world.is_main else logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
