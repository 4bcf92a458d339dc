"""``launch/pretrain.py … --dry-run``: what a run will be, before a GPU is taken: batch arithmetic, data, memory, time, cost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from occstream.models.batch import Batch, Cameras, Occupancy
from occstream.models.layers import SyncBatchNorm
from occstream.pretrain.config import Config, load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.engine import BUCKET
from occstream.pretrain.losses import occupancy_loss
from occstream.pretrain.networks import create_model
from occstream.pretrain.optim import parameter_groups
from occstream.pretrain.replay import EvalData, TrainData
from occstream.sharding.manifest import Manifest

SLACK = 0.2  # measured on the CPU
KNOBS = (
    "train.accumulate (more micro-steps)",
    "model.checkpointing=true",
    "model.head_rows=16",
    "train.zero_stage",
    "more processes",
)


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


def activations(config: Config, semantic: int, binary: int) -> float:
    """Peak bytes of tensors of one forward and backward on the CPU beyond parameters and gradients, by counting them for two
    and three frames of each kind and going on in a line.

    Args:
        semantic, binary: frames of the largest micro-batch of a rank.
    """
    model = create_model(config).train()
    # From two frames on: for one, convolutions choose other algorithms.
    s, b = min(semantic, 2), min(binary, 2)
    _peak(config, model, s, b)  # kernels prepare themselves once
    found = _peak(config, model, s, b)
    more = (s + (semantic > 2), b + (binary > 2))
    step = sum(more) - s - b
    if step:
        found += (_peak(config, model, *more) - found) / step * (semantic + binary - s - b)
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


def _peak(config: Config, model, semantic: int, binary: int) -> float:
    batch = frames_like(config, semantic, binary)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    bf16 = config.train.precision == "bf16"
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(batch)
        loss, _ = occupancy_loss(outputs, batch, config.loss)
        loss.backward()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + 3 * batch.nbytes  # the batch itself, and the stream's two spare ones


def frames_like(config: Config, semantic: int, binary: int) -> Batch:
    """Frames of plausible content: six cameras around, a twentieth of the voxels occupied, in patches of 4 x 4."""
    g = torch.Generator().manual_seed(0)
    size, (height, width), shape = semantic + binary, config.augment.image_size, config.voxel_grid.shape
    cameras = len(config.data.cameras or range(6)) * (1 + config.data.history)
    to_ego = torch.eye(4).repeat(size, cameras, 1, 1)
    for v in range(cameras):
        a = 2 * math.pi * v / cameras
        turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1.0]])
        to_ego[:, v, :3, :3] = turn @ torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
        to_ego[:, v, 2, 3] = 1.5
    focal = torch.tensor([[width * 0.6, 0, width / 2], [0, width * 0.6, height / 2], [0, 0, 1]])
    patches = (size, -(-shape[0] // 4), -(-shape[1] // 4), shape[2])
    labels = torch.randint(0, config.classes.num_classes * 20, patches, generator=g).clamp_max(config.classes.free_id)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : shape[0], : shape[1]].to(torch.uint8)
    cell = config.model.feature_stride
    depth = torch.rand(size, cameras, -(-height // cell), -(-width // cell)) * 20 if config.loss.depth_weight else None
    return Batch(
        scene_aug=torch.eye(3).repeat(size, 1, 1),
        labeled=semantic,
        cameras=Cameras(
            images=torch.randint(0, 255, (size, cameras, 3, height, width), generator=g, dtype=torch.uint8),
            intrinsics=focal.expand(size, cameras, 3, 3).contiguous(),
            camera_to_ego=to_ego,
            post_rot=torch.eye(3).repeat(size, cameras, 1, 1),
            post_tran=torch.zeros(size, cameras, 3),
            depth=depth,
        ),
        occupancy=Occupancy(
            binary=labels != config.classes.free_id,
            binary_valid=torch.ones(labels.shape, dtype=torch.bool),
            semantic=labels[:semantic],
        ),
    )


def predicted_memory(config: Config, data: TrainData, ranks: int) -> Memory:
    """Peak of the rank with the most frames."""
    cfg = config.train
    semantic = -(-cfg.batch // cfg.accumulate // ranks) if config.stage == "finetune" else 0
    replayed = (data.frames_per_step - cfg.batch) // cfg.accumulate
    binary = -(-replayed // ranks) if config.stage == "finetune" else -(-cfg.batch // cfg.accumulate // ranks)
    model = create_model(config)
    parameter_groups(model, config.optim)  # or a name in it is wrong
    parameters = sum(p.numel() for p in model.parameters())
    live = activations(config, semantic, binary) + statistics(model, ranks)
    return Memory(**states(parameters, cfg.zero_stage, ranks, cfg.ema), activations=live, allocator=SLACK * live)


def dry_run(
    stage: str,
    recipe: str,
    overrides: Sequence[str],
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
    config = load_config(recipe, overrides, stage=stage)
    world = World(0, ranks, torch.device("cpu"))
    data = TrainData(config, world)
    held_out = EvalData(config, World(0, 1, world.device), data.cameras)
    cfg = config.train
    per_step = data.frames_per_step
    print(f"{stage} {recipe}: {config.model_name} {config.model.strategy}, grid {config.grid}, {ranks} processes")
    kind = "S frames" if stage == "finetune" else "frames"
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
            f"{_size(memory.activations)}: change {', '.join(KNOBS)}"
        )
    return 0


def _volume(config: Config, data: TrainData) -> dict[str, tuple[int, int]]:
    """Scenes and bytes of an epoch by stream; shards are counted whole if any of their scenes is used."""
    found = {}
    sources = [("data", config.data)]
    if config.replay.url and config.stage == "finetune":
        sources += [("replay", source) for source in (config.replay, *config.replay.more)]
    for name, source in sources:
        manifest = Manifest.load(source.url)
        if source.labels != "labels":
            manifest = manifest.with_sidecar(source.labels)
        names = getattr(source, "scene_names", None)
        chosen = manifest.named(names) if names else manifest.subset(source.scenes, source.subset_seed, source.holdout)
        numbers = {manifest.scenes[i].shard for i in chosen}
        groups = {"cameras", manifest.label_group} | ({"lidar"} if config.loss.depth_weight else set())
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
