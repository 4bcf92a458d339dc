"""``occstream bench step``: one training step of a recipe, taken apart, against what the machine can do and against a plain
fp32 build of the same network in the same run. It reports; it judges nothing."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from occstream.models import Batch, kernels
from occstream.pretrain.config import Config, load_config
from occstream.pretrain.device import pick_device
from occstream.pretrain.distributed import World
from occstream.pretrain.meter import best_time, matmul_ceiling
from occstream.pretrain.networks import accelerate, create_model, settled
from occstream.pretrain.tasks.registry import import_modules, task_of


def bench_step(recipe: str, overrides: tuple[str, ...], stage: str, *, batch: int, repeats: int) -> dict:
    """Times steps with data from memory.

    Args:
        recipe, overrides, stage: of the run.
        batch: frames (fine-tuning: half of them semantic if the recipe replays, else all).
        repeats: timed steps; builds take turns.

    Returns:
        Medians in seconds by build and part (CPU time where there is one thread of a CPU), FLOPs, ceilings, peak memory (CUDA).
    """
    config = load_config(recipe, overrides, **({"stage": stage} if stage else {}))
    device = pick_device()
    config = settled(config, World(0, 1, device))
    frames = _frames(config, batch).to(device)
    plain = _Build(config, device, frames, precision="fp32", tf32=False)
    builds = {"plain fp32": plain}
    if device.type == "cuda":
        builds["plain TF32"] = _Build(config, device, frames, precision="fp32")
    precision = config.train.precision
    if precision != "fp32":
        builds[precision] = _Build(config, device, frames, precision=precision)
    builds[f"{precision} kernels"] = _Build(config, device, frames, precision=precision, with_kernels=True)
    if device.type == "cuda":
        builds[f"{precision} kernels compile"] = _Build(
            config, device, frames, precision=precision, with_kernels=True, compiled=True
        )
    for build in builds.values():
        build.step()
    flops = _flops(plain)
    for _ in range(repeats):
        for build in builds.values():
            build.step()
    found: dict = {"device": _device(device), "batch": batch, "flops": flops, "ceilings": _ceilings(device)}
    found["parts"] = list(plain.task.timed(plain.model))
    found["builds"] = {name: build.summary() for name, build in builds.items()}
    _show(found, recipe, config.stage)
    return found


def compare_settings(
    recipe: str,
    overrides: tuple[str, ...],
    stage: str,
    *,
    against: Sequence[str],
    batch: int,
    repeats: int,
) -> dict:
    """Memory and time of a step by the recipe and with other settings, each in a process of its own: what one has allocated
    is not there for the next.

    Args:
        recipe, overrides, stage, batch: as of ``bench_step``.
        against: one or more settings each, with spaces in between.
        repeats: steps after the first.

    Returns:
        Results of ``measure`` by settings, those of the recipe as it is given by "".
    """
    found = {}
    for more in ("", *against):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            settings = (*overrides, *more.split())
            found[more] = process.submit(measure, recipe, settings, stage, batch=batch, repeats=repeats).result()
    first, name = found[""], max(map(len, found))
    print(f"{first['task']}, {' '.join((recipe, *overrides))}, {batch} frames from memory, {first['device']}")
    print("settings".ljust(max(name, 8)), "peak MiB", "ratio", "s a step", "ratio", "first loss", sep="  ")
    for more, one in found.items():
        cells = [f"{one['peak_bytes'] / 2**20:8,.0f}", f"{one['peak_bytes'] / first['peak_bytes']:5.2f}"]
        cells += [f"{one['step']:8.2f}", f"{one['step'] / first['step']:5.2f}", f"{one['loss']:10.5f}"]
        print((more or "as given").ljust(max(name, 8)), *cells, sep="  ")
    print(
        "peak: most memory in use during the first forward and backward, less that in use before: activations, gradients"
    )
    return found


def measure(recipe: str, overrides: tuple[str, ...], stage: str, *, batch: int, repeats: int) -> dict:
    """One network's step, in this process, to which nothing else may have happened: the most memory in use during its first
    forward and backward less what was in use before (``peak_bytes``), the median time of later steps (``step``, in seconds)
    and the first loss."""
    import_modules()
    config = load_config(recipe, overrides, **({"stage": stage} if stage else {}))
    device, task = pick_device(), task_of(config)
    config = settled(config, World(0, 1, device))
    build = _Build(config, device, _frames(config, batch).to(device), precision=config.train.precision)
    before = _memory(device, reset=True)
    build.forward_backward()
    peak = _memory(device, peak=True) - before
    build.optimizer.zero_grad(set_to_none=True)
    for _ in range(repeats):
        build.step()
    step = statistics.median(build.times["step"])
    return {"device": _device(device), "task": task.title, "peak_bytes": peak, "step": step, "loss": build.losses[0]}


def _memory(device: torch.device, *, peak: bool = False, reset: bool = False) -> float:
    """Bytes in use by this process (on CUDA, by its tensors), now or at the peak since a reset. Not a number where the system
    does not say."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        name = "VmHWM:" if peak else "VmRSS:"
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    except OSError:
        return math.nan
    return 1024.0 * int(line.split()[1])


def _frames(config: Config, batch: int) -> Batch:
    task = task_of(config)
    labeled = (batch - batch // 2 if config.replay.url and task.replays else batch) if task.labeled else 0
    return task.synthetic_batch(labeled, batch - labeled)


class _Build:
    """A network, its optimizer and timers."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        frames: Batch,
        *,
        precision: str,
        tf32: bool = True,
        with_kernels: bool = False,
        compiled: bool = False,
    ) -> None:
        self.config, self.device, self.frames, self.tf32, self.kernels = config, device, frames, tf32, with_kernels
        self.autocast = precision == "bf16"
        self.model = create_model(config).to(device).train()
        self.task = task_of(config)
        accelerate(self.model, device, with_kernels, compiled=self.task.compile if compiled else None)
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.peak = 0
        for part, module in self.task.timed(self.model).items():
            self._watch(part, module)

    def _watch(self, part: str, module: nn.Module) -> None:
        begun = []
        module.register_forward_pre_hook(lambda *_: begun.append(self._now()))
        module.register_forward_hook(lambda *_: self.times[part].append(self._now() - begun.pop()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if _alone(self.device) else time.perf_counter()

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = self._now()
        yield
        self.times[part].append(self._now() - began)

    def step(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        kernels.use(self.kernels, self.device.type)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with self._timed("step"):
            self.forward_backward()
            with self._timed("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def forward_backward(self) -> None:
        with self._timed("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.model(self.frames)
        with self._timed("loss"):
            loss, _ = self.task.loss(outputs, self.frames)
        with self._timed("backward"):
            loss.backward()
        self.losses.append(float(loss.detach()))

    def summary(self) -> dict[str, float]:
        found = {part: statistics.median(values[1:] or values) for part, values in self.times.items()}
        found["loss of the first step"] = self.losses[0]
        return found | ({"peak_bytes": float(self.peak)} if self.peak else {})


def _alone(device: torch.device) -> bool:
    """Whether the time of this process tells what a step takes: others may load the machine meanwhile."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def _flops(build: _Build) -> float:
    """Forward and backward of matrix products and convolutions; sampling, sorting and losses are not counted."""
    kernels.use(build.kernels, build.device.type)
    with FlopCounterMode(display=False) as counter:
        outputs = build.model(build.frames)
        build.task.loss(outputs, build.frames)[0].backward()
    build.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def _ceilings(device: torch.device) -> dict[str, float]:
    """What a large matrix product and a large copy reach here: FLOP/s by type, bytes/s."""
    found = {"fp32": matmul_ceiling(device, torch.float32), "bf16": matmul_ceiling(device, torch.bfloat16)}
    x = torch.empty((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * x.nbytes / best_time(lambda: y.copy_(x), device)
    return found


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return "CPU, 1 thread, CPU time" if _alone(device) else f"CPU, {torch.get_num_threads()} threads"


def _show(found: dict, recipe: str, stage: str) -> None:
    builds, ceilings = found["builds"], found["ceilings"]
    print(f"{stage} {recipe}, {found['batch']} frames from memory, {found['device']}")
    head = ["part", *(f"{name} ms" for name in builds)]
    print("  ".join([head[0].ljust(16), *(h.rjust(14) for h in head[1:])]))
    last = ["forward", "loss", "backward", "optimizer", "step"]
    parts = [*(part for part in builds["plain fp32"] if part in found["parts"]), *last]
    for part in parts:
        if any(part in b for b in builds.values()):
            cells = [f"{1e3 * b[part]:14.1f}" if part in b else " " * 14 for b in builds.values()]
            print("  ".join([part.ljust(16), *cells]))
    slow = builds["plain fp32"]["step"]
    for name, b in builds.items():
        kind = "bf16" if name.startswith("bf16") else "fp32"
        line = f"{name}: loss {b['loss of the first step']:.5f}, {found['batch'] / b['step']:.1f} frames/s"
        line += f", {slow / b['step']:.2f} x plain fp32"
        line += f", {100 * found['flops'] / b['step'] / ceilings[kind]:.0f} % of this machine's {kind} matrix product"
        if "peak_bytes" in b:
            line += f", {b['peak_bytes'] / 2**30:.1f} GiB at its peak"
        print(line)
    print(
        f"counted {found['flops'] / 1e9:,.0f} GFLOP a step; ceilings {ceilings['fp32'] / 1e9:,.0f} GFLOP/s fp32, "
        f"{ceilings['bf16'] / 1e9:,.0f} bf16, copies {ceilings['copy'] / 1e9:,.1f} GB/s"
    )
