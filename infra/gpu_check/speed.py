"""Sections about time and memory: compiling, waits of the host, steps taken apart."""

from __future__ import annotations

import collections
import contextlib
import json
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from checks import Check, need, peak, section
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from occstream.launch.bench_step import bench_step
from occstream.models import Batch, kernels
from occstream.pretrain.config import Config
from occstream.pretrain.meter import best_time
from occstream.pretrain.networks import accelerate, create_model
from occstream.pretrain.tasks.registry import task_of

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8


def _step(model: nn.Module, frames: Batch, config: Config, device: torch.device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        outputs = model(frames)
    loss, _ = task_of(config).loss(outputs, frames)
    loss.backward()
    return loss.detach()


@section("compile", "train.compile gives the loss of the plain network within 1e-2, with and without checkpointing")
def compiled(check: Check) -> str:
    device, said, good = check.device, [], True
    for recompute in ("true", "false") if not check.dry else ("true",):
        config = check.sized("r50", "pretrain", f"model.checkpointing={recompute}")
        frames = task_of(config).synthetic_batch(0, 2).to(device)
        found = {}
        for way in ("plain", "compiled"):
            torch.manual_seed(0)
            model = create_model(config).to(device).train()
            if way == "compiled" and check.dry:
                task_of(config).compile(model, "aot_eager")
            else:
                accelerate(model, device, False, compiled=task_of(config).compile if way == "compiled" else None)
            torch.manual_seed(1)
            loss = float(_step(model, frames, config, device))
            took = (
                0.0 if check.dry else best_time(lambda m=model, f=frames, c=config: _step(m, f, c, device), device, 6)
            )
            found[way] = (loss, took)
        (a, slow), (b, fast) = found.values()
        gap = abs(a - b) / abs(a)
        good &= gap < 1e-2
        said.append(f"checkpointing={recompute}: {gap:.1e}, {1e3 * slow:.0f} ms to {1e3 * fast:.0f} ms")
    return need(good, "\n".join(said))


class _Waits(TorchDispatchMode):
    """Calls that make the host wait for a GPU, by line of this project; works on the CPU."""

    SYNC = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "unique",
        "linalg_inv_ex",
        "repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).removeprefix("aten.")
        masked = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in _flat(args[1:2])
        )
        if masked or name.startswith(self.SYNC):
            mine = [
                f
                for f in traceback.extract_stack()
                if f.filename.startswith(str(ROOT)) and "gpu_check" not in f.filename
            ]
            where = f"{Path(mine[-1].filename).relative_to(ROOT)}:{mine[-1].lineno}" if mine else "elsewhere"
            self.lines[where] += 1
        return func(*args, **(kwargs or {}))


def _flat(value: Iterable[object]) -> list[object]:
    return [v for item in value for v in (item if isinstance(item, list | tuple) else [item])]


@contextlib.contextmanager
def _waits(device: torch.device) -> Iterator[collections.Counter]:
    """Counts waits of the host by line: as CUDA reports them, or by the operators that would wait."""
    if device.type == "cpu":
        with _Waits() as mode:
            yield mode.lines
        return
    lines: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        # Not what torch says once of the debug mode itself, which "does not yet detect all synchronizing operations".
        if "called a synchronizing" in str(warning.message):
            path = Path(warning.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            lines[f"{name}:{warning.lineno}"] += 1


@section("waits", "waits of the host in one step of r50 fine-tuning, forward to backward: at most 6, by line")
def waits(check: Check) -> str:
    device = check.device
    config = check.sized("r50", "finetune", "replay.url=")
    model = create_model(config).to(device).train()
    accelerate(model, device, not check.dry)
    frames = task_of(config).synthetic_batch(1, 1).to(device)
    _step(model, frames, config, device)
    with _waits(device) as lines:
        _step(model, frames, config, device)
    kernels.use(False)
    said = "\n".join(f"{count} x {line}" for line, count in lines.most_common(20))
    print(said)
    total = sum(lines.values())
    if not check.dry:
        _profiled(model, frames, config, device, out=check.out)
    # Off the GPU operators are counted that may wait there.
    return need(total <= 6, f"{total}: " + ", ".join(f"{c} x {line}" for line, c in lines.most_common(8)))


def _profiled(model: nn.Module, frames: Batch, config: Config, device: torch.device, *, out: Path) -> None:
    """What the CUDA runtime was waited for, by the profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, with_stack=True) as trace:
        _step(model, frames, config, device)
        torch.cuda.synchronize()
    table = trace.key_averages(group_by_stack_n=6).table(sort_by="self_cpu_time_total", row_limit=200)
    (out / "waits-profile.txt").write_text(table)
    names = collections.Counter(
        e.name for e in trace.events() or () if "Synchronize" in e.name or "cudaMemcpy" in e.name
    )
    print(dict(names))


@section(
    "step",
    f"a step of r50 pre-training at batch {BATCH} broken down: 5 times plain fp32 or faster with everything enabled",
)
def step(check: Check) -> str:
    return _bench(check, "r50", "pretrain", batch=2 if check.dry else BATCH, faster=5.0)


@section("bevformer", "a step of r50-bevformer at batch 2 broken down: faster than plain fp32")
def bevformer(check: Check) -> str:
    return _bench(check, "r50-bevformer", "pretrain", batch=2, faster=1.0)


@section("offboard", "an offboard fine-tuning step at batch 1, with and without kernels: fits into 80 GB")
def offboard(check: Check) -> str:
    """Without a build in plain fp32, which need not fit."""
    device, said, most = check.device, [], 0.0
    config = check.sized("r50-offboard", "finetune", "replay.url=")
    model = create_model(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not check.dry)
    frames = task_of(config).synthetic_batch(1, 0).to(device)
    for with_kernels in (False,) if check.dry else (False, True):
        accelerate(model, device, with_kernels)
        with peak(device) as so_far:
            for _ in range(1 if check.dry else 3):  # from the second on with the optimizer's moments
                _step(model, frames, config, device)
                optimizer.step()
                optimizer.zero_grad()
            most = max(most, so_far())
        said.append(f"{'with' if with_kernels else 'without'} kernels: {so_far():.1f} GiB at its peak")
    return need(most < 74.5, "\n".join(said))


def _bench(check: Check, recipe: str, stage: str, *, batch: int, faster: float) -> str:
    """Speed against plain fp32 and peak memory of the fastest build."""
    words: tuple[str, ...] = ()
    if check.dry:
        c = check.sized(recipe, stage)
        recipe = str(ROOT / "tests/pretrain/small.yaml")
        words = (f"model_name={c.model_name}", f"model.strategy={c.model.strategy}", "replay.url=")
        words += (f"model.dense_layers={c.model.dense_layers}", f"model.cap={c.model.cap}")
        words += (f"data.binary_from={c.data.binary_from}",)
    found = bench_step(recipe, words, stage, batch=batch, repeats=1 if check.dry else 5)
    (check.out / f"step-{stage}-{Path(recipe).stem}.json").write_text(json.dumps(found, indent=1))
    builds = found["builds"]
    best = min(builds, key=lambda name: builds[name]["step"])
    ratio = builds["plain fp32"]["step"] / builds[best]["step"]
    gib = builds[best].get("peak_bytes", 0) / 2**30
    said = f"{best}: {batch / builds[best]['step']:.1f} frames/s, {ratio:.1f} x plain fp32, {gib:.1f} GiB at its peak"
    return need(check.dry or ratio >= faster, said)
