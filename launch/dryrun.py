"""``launch/pretrain.py … --dry-run``: what a run will be, before a GPU is taken: batch arithmetic, data, memory, time, cost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from occstream.models.layers import SyncBatchNorm
from occstream.pretrain.config import Config, DataConfig, ReplaySource, load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.engine import BUCKET
from occstream.pretrain.networks import create_model
from occstream.pretrain.optim import parameter_groups
from occstream.pretrain.streams import EvalData, TrainData, check_manifest, open_manifest, training_scenes
from occstream.pretrain.tasks.base import Role
from occstream.pretrain.tasks.registry import task_of

SLACK = 0.2  # measured on the CPU


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank, by part.

    Attributes:
        weights, gradients, optimizer, average: under ZeRO.
        buckets: DeepSpeed's flat copies and communication buffers.
        activations: and temporary tensors, of the largest micro-batch.
        allocator: what it holds beyond live tensors, scratch memory of kernels: ``SLACK`` of the activations.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    buckets: float
    activations: float
    allocator: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def states(parameters: int, stage: int, ranks: int, ema: bool) -> dict[str, float]:
    """Bytes of parameters and what belongs to them on one rank: fp32 everywhere; Adam's two moments from stage 1, gradients
    from stage 2 and weights at stage 3 are divided by the ranks."""
    share = lambda from_stage: parameters * 4 / (ranks if stage >= from_stage else 1)  # noqa: E731
    return {
        "weights": share(3),
        "gradients": share(2),
        "optimizer": 2 * share(1),
        "average": share(3) if ema else 0.0,
        # Stages 1 to 3 work on a flat fp32 copy of this rank's part. Gradients are reduced in buckets of one size, however small
        # the network and however few the ranks: at stages 1 and 2 one is filled on CUDA while another is reduced.
        "buckets": (share(1) if stage else 0.0) + 4 * BUCKET * (0, 2, 2, 1)[stage],
    }


def statistics(model: nn.Module, ranks: int) -> float:
    """Bytes that batch norms over several ranks need in addition to those of one process: the row of every rank while the widest
    norm gathers them, and what each keeps for the backward pass. Its input it keeps as it came, as cuDNN's do."""
    widths = [m.weight.numel() for m in model.modules() if isinstance(m, SyncBatchNorm)]
    if ranks == 1 or not widths:
        return 0.0
    gathered = 2 * ranks * (2 * max(widths) + 1)  # as they come, and cut into means and deviations
    return 4.0 * (gathered + sum(3 * width + ranks for width in widths))


def activations(config: Config, labeled: int, other: int) -> float:
    """Peak bytes of tensors of one forward and backward on the CPU beyond parameters and gradients, by counting them for two
    and three frames of each kind and going on in a line.

    Args:
        labeled, other: frames, with and without semantic labels, of the largest micro-batch of a rank.
    """
    model = create_model(config).train()
    # From two frames on: for one, convolutions choose other algorithms.
    s, b = min(labeled, 2), min(other, 2)
    _peak(config, model, s, b)  # kernels prepare themselves once
    found = _peak(config, model, s, b)
    more = (s + (labeled > 2), b + (other > 2))
    step = sum(more) - s - b
    if step:
        found += (_peak(config, model, *more) - found) / step * (labeled + other - s - b)
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler's C++ side writes to the file descriptor of stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak(config: Config, model: nn.Module, labeled: int, other: int) -> float:
    batch = task_of(config).synthetic_batch(labeled, other)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    bf16 = config.train.precision == "bf16"
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(batch)
        loss, _ = task_of(config).loss(outputs, batch)
        loss.backward()
    live = peak = 0
    recorded = profile.profiler and profile.profiler.kineto_results
    assert recorded is not None  # a profile that has ended has results
    for event in sorted(recorded.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] (torch's stub of it has no such method)
            peak = max(peak, live)
    return peak + 3 * batch.nbytes  # the batch itself, and the stream's two spare ones


def predicted_memory(config: Config, data: TrainData, ranks: int) -> Memory:
    """Peak of the rank with the most frames."""
    cfg = config.train
    main = -(-cfg.batch // cfg.accumulate // ranks)
    replayed = (data.frames_per_step - cfg.batch) // cfg.accumulate
    labeled, other = (main, -(-replayed // ranks)) if task_of(config).labeled else (0, main - (-replayed // ranks))
    model = create_model(config)
    parameter_groups(model, config.optim)  # or a name in it is wrong
    parameters = sum(p.numel() for p in model.parameters())
    live = activations(config, labeled, other) + statistics(model, ranks)
    return Memory(**states(parameters, cfg.zero_stage, ranks, cfg.ema), activations=live, allocator=SLACK * live)


def dry_run(
    stage: str,
    recipe: str,
    overrides: Sequence[str],
    *,
    ranks: int,
    memory_gb: float,
    rate: float,
    price: float,
) -> int:
    """Prints what a run would be. Nothing is written or started.

    Args:
        ranks: processes (GPUs).
        memory_gb: of one GPU; 0: do not compare.
        rate: frames per second of one GPU; 0: unknown.
        price: of a GPU hour, in any currency; 0: unknown.

    Returns:
        0.

    Raises:
        ValueError: the run could not start, or does not fit into ``memory_gb``; with the knobs that help.
    """
    config = load_config(recipe, overrides, **({"stage": stage} if stage else {}))
    world = World(0, ranks, torch.device("cpu"))
    data = TrainData(config, world)
    held_out = EvalData(config, World(0, 1, world.device), data.sensors)
    cfg = config.train
    per_step = data.frames_per_step
    print(f"{config.stage} {recipe}: {task_of(config).title}, grid {config.grid}, {ranks} processes")
    kind = "labeled frames" if task_of(config).labeled else "frames"
    print(
        f"  batch      {cfg.batch} {kind} a step"
        f" in {cfg.accumulate} micro-steps: {cfg.batch / cfg.accumulate / ranks:g} per process"
        + (f", plus {per_step - cfg.batch} replayed" if per_step > cfg.batch else "")
    )
    print(f"  length     {data.steps:,} steps, {data.steps * per_step:,} frames, {data.epoch_samples:,} in an epoch")
    print(f"  evaluation {held_out.total:,} frames of {len(held_out.scenes)} scenes")
    for note in (*data.notes, *held_out.notes):
        print(f"  note       {note}")
    for name, (scenes, size) in _volume(config, data).items():
        print(f"  {name:<10} {scenes:,} scenes, {_size(size)} to read in an epoch (all nodes together)")
    memory = predicted_memory(config, data, ranks)
    parts = ", ".join(f"{f.name} {_size(getattr(memory, f.name))}" for f in dataclasses.fields(memory))
    print(f"  memory     {_size(memory.total)} per process at ZeRO stage {cfg.zero_stage}: {parts}")
    parameters = round(memory.weights / 4 * (ranks if cfg.zero_stage == 3 else 1))
    rest = memory.activations + memory.allocator
    others = [
        f"stage {stage} {_size(rest + sum(states(parameters, stage, ranks, cfg.ema).values()))}"
        for stage in range(4)
        if stage != cfg.zero_stage
    ]
    print(f"             at other stages: {', '.join(others)}; the process itself takes about 0.7 GiB more on a CPU,")
    print("             and a CUDA context about 0.5 GiB on a GPU")
    if rate:
        hours = data.steps * per_step / rate / ranks / 3600
        cost = f", cost {hours * ranks * price:,.0f}" if price else ""
        print(f"  time       {hours:,.2f} h, {hours * ranks:,.1f} GPU-hours at {rate:g} frames/s each{cost}")
    if memory_gb and memory.total > memory_gb * 2**30:
        raise ValueError(
            f"needs {_size(memory.total)} per process, a GPU has {memory_gb:g} GiB; activations take "
            f"{_size(memory.activations)}: change {', '.join(task_of(config).knobs)}"
        )
    return 0


def _volume(config: Config, data: TrainData) -> dict[str, tuple[int, int]]:
    """Scenes and bytes of an epoch by stream; shards are counted whole if any of their scenes is used."""
    found, task = {}, task_of(config)
    sources: list[tuple[str, Role, DataConfig | ReplaySource]] = [("data", "main", config.data)]
    if config.replay.url and task.replays:
        for source in (config.replay, *config.replay.more):
            sources.append(("replay", "replay", source))
    for name, role, source in sources:
        manifest = open_manifest(source.url, source.labels)
        chosen = training_scenes(manifest, source)
        numbers = {manifest.scenes[i].shard for i in chosen}
        sample = task.sample(role, source, data.sensors)
        manifest = check_manifest(manifest, sample, config)
        groups = {manifest.label_group if group == "labels" else group for group in sample.groups}
        size = sum(s.size for s in manifest.shards if s.group in groups and s.number in numbers)
        scenes, before = found.get(name, (0, 0))
        found[name] = scenes + len(chosen), before + size
    return found


def _size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:,.2f} {unit}"
        value /= 1024
    return ""
