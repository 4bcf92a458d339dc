"""Speed of a run and what it is lost to: step times, waiting for data, stragglers, counted FLOPs."""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from occstream.pretrain.distributed import World, control_group
from occstream.pretrain.streams import TrainData
from occstream.sharding import storage

WARM = 2  # steps that allocate and warm caches; not counted


class Meter:
    """Times a run's steps, without start-up, evaluation and saves.

    ``metrics`` is collective: it tells the ranks apart.

    Args:
        step, total: where the run starts and ends.
        data: of the run.
        bf16: whether matrix products run in bfloat16; says which ceiling ``perf/mfu`` is a share of.
        count: whether to count FLOPs; compiled modules hide theirs.
    """

    def __init__(
        self, step: int, total: int, data: TrainData, world: World, *, bf16: bool = False, count: bool = True
    ) -> None:
        self.total, self.data, self.world, self.count = total, data, world, count
        self.first, self.now = step, step
        self.times: deque[float] = deque(maxlen=100)
        self.waits: deque[float] = deque(maxlen=100)
        self.own: deque[float] = deque(maxlen=100)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.flops = 0.0
        self.ceiling = 0.0
        self._forward = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._before: tuple[float, list[tuple[torch.cuda.Event, torch.cuda.Event]]] | None = None
        self._read = (time.perf_counter(), 0)
        self._resume()

    def _resume(self) -> None:
        self.mark, self.waited = time.perf_counter(), self.data.waited

    def step(self) -> None:
        """Ends a step."""
        self.now += 1
        if self.now - self.first > WARM:
            wait = self.data.waited - self.waited
            self.times.append(time.perf_counter() - self.mark)
            self.waits.append(wait)
            if not self._events:
                self.own.append(wait + self._forward)
            else:
                # Of the step before: the device has done its forward by now, so asking costs no time.
                if self._before is not None:
                    self.own.append(self._before[0] + _seconds(self._before[1]))
                self._before = wait, self._events
        self._forward, self._events = 0.0, []
        self._resume()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward: no gradients are exchanged in it, so a rank that is slow here is slow itself."""
        if self.world.device.type == "cuda":
            marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[0].record()
            yield
            marks[1].record()
            self._events.append(marks)
        else:
            began = time.perf_counter()
            yield
            self._forward += time.perf_counter() - began

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around forward and backward: counts the FLOPs of the main rank's first warm step, once."""
        if not self.count or not self.world.is_main or self.now - self.first != WARM - 1:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops += counter.get_total_flops()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the context is not counted."""
        yield
        self._resume()

    @property
    def samples_per_s(self) -> float:
        """All frames (S and B) of all ranks."""
        return self.data.frames_per_step * len(self.times) / sum(self.times) if self.times else float("nan")

    def metrics(self) -> dict[str, float]:
        """The key set; empty in the first steps. Collective.

        ``perf/straggler_s`` is the largest less the smallest own time of a rank in a step (waiting for its readers, and its
        forward; the exchange of gradients makes everybody wait for the slowest, so whole steps tell nothing), and
        ``perf/slowest_rank`` has the largest. ``perf/mfu`` counts matrix products and convolutions only (recomputed ones
        too), of the main rank, as a share of what a large matrix product reaches on this device.
        """
        if not self.times:
            return {}
        counts, now = storage.counts(), time.perf_counter()
        read = self.data.bytes_read
        mine = [statistics.mean(self.own or (0.0,)), sum(self.waits) / sum(self.times), float(self.data.skipped)]
        mine += [(read - self._read[1]) / (now - self._read[0]) / 1e6]
        mine += [float(counts[name]) for name in ("retries", "hits", "misses")]
        self._read = now, read
        ranks = [mine]
        if self.world.size > 1:
            every = [torch.zeros(len(mine), dtype=torch.float64) for _ in range(self.world.size)]
            dist.all_gather(every, torch.tensor(mine, dtype=torch.float64), group=control_group())
            ranks = [t.tolist() for t in every]
        own, waits, skipped, speeds, retries, hits, misses = zip(*ranks)
        ordered = sorted(self.times)
        step_s = sum(self.times) / len(self.times)
        out = {
            "perf/samples_per_s": self.samples_per_s,
            "perf/samples_per_s_per_rank": self.samples_per_s / self.world.size,
            "perf/step_s_p50": ordered[len(ordered) // 2],
            "perf/step_s_p95": ordered[int(len(ordered) * 0.95)],
            "perf/data_wait_frac": max(waits),
            "perf/straggler_s": max(own) - min(own),
            "perf/slowest_rank": float(own.index(max(own))),
            "prog/eta_s": (self.total - self.now) * step_s,
            "prog/epoch": self.data.epoch_position,
            "data/mb_s": sum(speeds),
            "data/skipped": sum(skipped),
            "data/retries": sum(retries),
            **{f"data/share/{name}": share for name, share in self.data.shares().items()},
        }
        if sum(hits) + sum(misses):
            out["data/cache_hit"] = sum(hits) / (sum(hits) + sum(misses))
        if self.flops:
            self.ceiling = self.ceiling or matmul_ceiling(self.world.device, self.dtype)
            out["perf/tflops"] = self.flops / step_s / 1e12
            out["perf/mfu"] = self.flops / step_s / self.ceiling
        if self.world.device.type == "cuda":
            out["mem/max_alloc_gib"] = torch.cuda.max_memory_allocated() / 2**30
            out["mem/alloc_retries"] = float(torch.cuda.memory_stats().get("num_alloc_retries", 0))
        return out

    def show(self, step: int, metrics: dict[str, float], terms: Sequence[str]) -> None:
        """One line, over itself on a terminal.

        Args:
            terms: losses to show, where there are any.
        """
        parts = " ".join(f"{term} {metrics[f'train/{term}']:.4f}" for term in terms if f"train/{term}" in metrics)
        line = f"step {step}/{self.total} loss {metrics['train/loss']:.4f} ({parts}) lr {metrics['opt/lr']:.2e}"
        if "perf/samples_per_s" in metrics:  # not in the first steps
            eta = int(metrics["prog/eta_s"])
            line += (
                f" {metrics['perf/samples_per_s']:.1f} samples/s"
                f" data wait {100 * metrics['perf/data_wait_frac']:.0f} % eta {eta // 60}:{eta % 60:02d}"
            )
            late = metrics["perf/straggler_s"] / metrics["perf/step_s_p50"]
            if late > 0.2:
                line += f" rank {metrics['perf/slowest_rank']:.0f} is {100 * late:.0f} % of a step behind"
        terminal = sys.stdout.isatty()
        end = "\n" if step == self.total or not terminal else ""
        print(f"\r\033[K{line}" if terminal else line, end=end, flush=True)


def _seconds(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    for _, end in events:
        end.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / 1e3


@functools.cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on a device, TF32 off, measured once in a process."""
    size = 8192 if device.type == "cuda" else 1024
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    # Numbers of its own generator: measuring must not change what dropout draws. Constants would flatter the device.
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=draw)
    found = 2 * size**3 / best_time(lambda: a @ a, device)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return found


def best_time(work: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(tries):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
