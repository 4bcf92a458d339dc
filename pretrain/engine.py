"""The DeepSpeed engine, the process group and what ZeRO does to a parameter: the only file that knows DeepSpeed's inside.

It leans on private attributes of DeepSpeed (pinned exactly in pyproject.toml): ``single_partition_of_fp32_groups``,
``fp32_partitioned_groups_flat``, ``ds_tensor``. ``tests/pretrain/test_distributed.py`` proves each by the next losses.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import random
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.pretrain.config import TrainConfig
from occstream.pretrain.device import pick_device
from occstream.pretrain.limits import check_limits


@dataclass(frozen=True)
class World:
    """This process's place. ``device`` is ``cuda:<local rank>`` or ``cpu`` (``pick_device``);
    ``launched``: a launcher started this process and watches over it; ``local``: the rank among those of its node."""

    rank: int
    size: int
    device: torch.device
    launched: bool = False
    local: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line once, whatever the number of ranks."""
        if self.is_main:
            print(text, flush=True)

    def agree(self, error: Exception | None, flag: bool = False) -> bool:
        """Raises on every rank if any rank brings an error: nobody is left waiting in a collective.

        Returns:
            Whether any rank's flag is set.

        Raises:
            DataError: naming the first such rank and its error; the error itself on a single process.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return flag
        flags = torch.tensor([int(error is not None), int(flag)])
        dist.all_reduce(flags, group=control_group())
        bad, any_set = flags.tolist()
        if not bad:
            return bool(any_set)
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(
            said, None if error is None else f"{type(error).__name__}: {error}", group=control_group()
        )
        rank, text = next((r, t) for r, t in enumerate(said) if t)
        raise DataError(f"rank {rank}: {text}") from error


class DataError(ValueError):
    """Some rank could not get its data."""


BUCKET = 50_000_000  # elements; buckets of DeepSpeed's default size (5e8) would take 2 GB each
_timeout = datetime.timedelta(minutes=10)


@functools.cache
def control_group() -> dist.ProcessGroup:
    """A gloo group for small agreements on the CPU, besides NCCL, with its time-out; all ranks must call it first at the same
    place."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_timeout)


def init_distributed(timeout_minutes: float = 10.0) -> World:
    """Joins the process group of the launcher; without a launcher (plain ``python``) a group of one process.

    Returns:
        rank, world size and device. CUDA uses NCCL, CPU uses gloo.

    Raises:
        ValueError: as ``pick_device``.
    """
    global _timeout
    _timeout = datetime.timedelta(minutes=timeout_minutes) if timeout_minutes else datetime.timedelta(days=365)
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    os.environ["DS_ACCELERATOR"] = device.type  # or DeepSpeed looks for one itself, and warns
    import deepspeed
    import deepspeed.ops

    # DeepSpeed compiles this op with g++ at every first CPU start, only for inference all-reduce, which we never call.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched = "RANK" in os.environ
    if not launched:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in alone.items()})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        rank = int(os.environ["RANK"])
        if warning := check_limits(int(os.environ["WORLD_SIZE"]), rank):
            print(f"warning: {warning}", flush=True)
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=_timeout,
            verbose=False,
        )
    return World(dist.get_rank(), dist.get_world_size(), device, launched, int(os.environ.get("LOCAL_RANK", 0)))


def seed_everything(*keys: int) -> None:
    """Makes torch's, numpy's and Python's global generators a function of ``keys`` (weights, dropout)."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in keys]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)
    np.random.seed(int(state) & 0xFFFFFFFF)  # noqa: NPY002  third-party layers may draw from it
    random.seed(int(state))


def build_engine(model: nn.Module, config: TrainConfig, world: World):
    """DeepSpeed engine over AdamW with ZeRO ``config.zero_stage``; fp32 parameters and optimizer state always.

    Args:
        model: on the CPU or on ``world.device``, with the weights to start from: ZeRO copies them here.

    Returns:
        The engine. ``engine.optimizer.param_groups`` are live: the trainer sets ``lr`` itself.
    """
    import deepspeed

    model.to(world.device)
    params = [p for p in model.parameters() if p.requires_grad]
    fused = fuses(world.device)
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    settings = {
        # Only bookkeeping: the frames of a rank are the stream's business (a rank may even have none of one kind).
        "train_micro_batch_size_per_gpu": max(1, config.batch // config.accumulate // world.size),
        "gradient_accumulation_steps": config.accumulate,
        # Stage 0 is clipped in ``clip_gradients``: DeepSpeed would launch some kernels for each parameter.
        "gradient_clipping": config.clip if config.zero_stage else 0.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": world.device.type == "cuda" and config.zero_stage > 0,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # Everything is partitioned and freed after use, so that EMA and checkpoints see one kind of parameter.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }
    if config.precision == "bf16":
        # No "safe modules": gradients are reduced in fp32, whatever the forward computed in.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    with _quiet(world):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def fuses(device: torch.device) -> bool:
    """Whether AdamW is one kernel there, which can also be told on the device to change nothing."""
    return device.type == "cuda"


def clip_gradients(engine, config: TrainConfig, world: World) -> Tensor:
    """Stage 0, at the end of a step's last backward: scales gradients to a norm of at most ``config.clip`` (0: leaves them).

    Returns:
        Scalar float32 on the device: their L2 norm before; the same on every rank, not finite if any gradient is not.
    """
    params = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if world.size > 1:
        norm = norm / world.size
        dist.all_reduce(norm)
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(params, config.clip, norm)
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


def drop_step(engine) -> None:
    """Stage 0: in place of ``engine.step()`` at the end of a step that must change nothing."""
    engine.module.zero_grad(set_to_none=True)
    engine.micro_steps += 1  # the engine's own count, by which it knows where a step ends


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


def learning_rate(samples: int, total: int, config: TrainConfig) -> float:
    """Learning rate of the step that begins after ``samples`` frames: a function of samples, not of calls,
    so that a resume at another world size continues the same curve.

    Args:
        samples: S frames already trained on.
        total: S frames of the whole run.
    """
    warm = config.warmup * config.batch
    if samples < warm:
        return config.lr * (0.001 + 0.999 * samples / warm)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (samples - warm) / max(1, total - warm))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


# --- parameters under ZeRO -------------------------------------------------------------------------------------------


def is_partitioned(param: Tensor) -> bool:
    """True for a ZeRO-3 parameter, whose values live in ``ds_tensor``, 1/world of them on each rank, zero-padded."""
    return hasattr(param, "ds_tensor")


def local_values(tensor: Tensor) -> Tensor:
    """The values this rank holds: the whole tensor, or its ZeRO-3 slice (1-D)."""
    return tensor.ds_tensor.data if is_partitioned(tensor) else tensor.data


def to_local(tensor: Tensor, full: Tensor, world: World) -> Tensor:
    """This rank's part of a full value, in the layout of ``local_values(tensor)``."""
    if not is_partitioned(tensor):
        return full
    length = tensor.ds_tensor.ds_numel
    padded = torch.zeros(length * world.size, dtype=full.dtype)
    padded[: full.numel()] = full.reshape(-1).cpu()
    return padded[world.rank * length : (world.rank + 1) * length]


def to_full(tensor: Tensor, local: Tensor, world: World) -> Tensor | None:
    """Inverse of ``to_local`` (collective for ZeRO-3), for the rank that saves: on its CPU; None on others, which copy
    nothing."""
    if is_partitioned(tensor):
        whole = local.new_empty(world.size * local.numel())
        dist.all_gather_single(whole, local.detach().contiguous())
        local = whole[: tensor.ds_numel].reshape(tensor.ds_shape)
    return local.detach().to("cpu", copy=True) if world.is_main else None


def full_state(module: nn.Module, values: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """``to_full`` of every parameter and floating buffer (collective); {} on ranks that do not save."""
    state = {name: to_full(t, values[name], world) for name, t in float_state(module)}
    return state if world.is_main else {}


def float_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and floating buffers of the state dict by name (what an EMA averages)."""
    kept = module.state_dict(keep_vars=True)
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and name in kept:
            yield name, buffer


class Ema:
    """Exponential moving average of parameters and floating buffers, in fp32, on each rank's own slices."""

    def __init__(self, module: nn.Module, config: TrainConfig):
        self.decay, self.updates = config.ema_decay, config.ema_start
        self.values = {name: local_values(t).detach().float().clone() for name, t in float_state(module)}
        # Parameters stay the same objects at every stage, whatever holds their values. A layer may assign a new buffer.
        self._parameters = [(self.values[name], p) for name, p in module.named_parameters()]
        owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_buffers()}
        self._buffers = [
            (self.values[n], owner, n.rpartition(".")[2]) for n, owner in owners.items() if n in self.values
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Call once after each optimizer step."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / 2000))
        state = [(old, local_values(p).float()) for old, p in self._parameters]
        state += [(old, getattr(owner, leaf).float()) for old, owner, leaf in self._buffers]
        torch._foreach_lerp_([old for old, _ in state], [new for _, new in state], 1 - decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module computes with the averaged values."""
        kept = {name: local_values(t).clone() for name, t in float_state(module)}
        self._write(module, self.values)
        try:
            yield
        finally:
            self._write(module, kept)

    @staticmethod
    @torch.no_grad()
    def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, tensor in float_state(module):
            if is_partitioned(tensor):
                tensor.partition()  # a gathered copy that a forward left behind would hide the new values
            local_values(tensor).copy_(values[name])


def module_state(module: nn.Module, world: World) -> dict[str, Tensor]:
    """Full parameters and buffers on the CPU, by name (collective); {} on ranks that do not save. fp32 masters: we never
    train in lower precision."""
    state = {name: to_full(p, local_values(p), world) for name, p in module.named_parameters()}
    if not world.is_main:
        return {}
    state.update({name: b.detach().to("cpu", copy=True) for name, b in module.named_buffers()})
    persistent = set(module.state_dict().keys())
    return {name: value for name, value in state.items() if name in persistent}


MOMENTS = ("exp_avg", "exp_avg_sq")
BY_DEVICE = ("fused", "foreach", "capturable", "differentiable")  # how AdamW computes, not what


def optimizer_state(engine, world: World) -> tuple[dict[str, Tensor], list[dict]]:
    """AdamW's full moments by ``<moment>/<parameter>`` plus ``step`` (collective; {} on ranks that do not save), and the
    hyper-parameters by group."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    base = optimizer if stage == 0 else optimizer.optimizer
    if stage in (1, 2):
        # DeepSpeed links the states once, after the first group's first step: other groups would be missed.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    tensors: dict[str, Tensor] = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        for moment in MOMENTS:
            if stage == 0:
                value = base.state[p][moment]
            elif stage == 3:
                value = to_full(p, safe_get_local_optimizer_state(p, moment).reshape(-1), world)
            else:
                value = safe_get_full_optimizer_state(p, moment)
            if world.is_main:
                tensors[f"{moment}/{name}"] = value.detach().reshape(_shape(p)).to("cpu", copy=True)
    steps = {float(s["step"]) for s in base.state.values() if "step" in s}
    if world.is_main:
        tensors["step"] = torch.tensor(max(steps, default=0.0))
    groups = [
        {k: v for k, v in g.items() if k not in BY_DEVICE and isinstance(v, (int, float, bool, str))}
        for g in base.param_groups
    ]
    return tensors, groups


def load_optimizer_state(engine, tensors: dict[str, Tensor], groups: list[dict], world: World) -> None:
    """Puts back what ``optimizer_state`` gave, at any stage and world size. Parameters must be loaded already."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    base = optimizer if stage == 0 else optimizer.optimizer
    for group, saved in zip(base.param_groups, groups, strict=True):
        group.update({k: v for k, v in saved.items() if k not in BY_DEVICE})
    # A fused optimizer counts on the device.
    count = tensors["step"].to(world.device if base.param_groups[0].get("fused") else "cpu")
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        for name, p in named:
            moments = {m: tensors[f"{m}/{name}"].to(p.device, copy=True) for m in MOMENTS}
            base.state[p] = {"step": count.clone(), **moments}
        return
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        base.state[flat] = {"step": count.clone(), **{m: torch.zeros_like(flat) for m in MOMENTS}}
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in named:
        for moment in MOMENTS:
            full = tensors[f"{moment}/{name}"]
            if stage == 3:
                safe_set_local_optimizer_state(p, to_local(p, full, world).to(world.device), moment)
            else:
                safe_set_full_optimizer_state(p, full.to(world.device), moment)


def _shape(param: Tensor) -> torch.Size:
    return param.ds_shape if is_partitioned(param) else param.shape
