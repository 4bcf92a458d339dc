"""``train.profile=N``: a trace of some steps, for Perfetto or chrome://tracing, and the table of what took longest."""

from __future__ import annotations

from pathlib import Path

import torch

from occstream.pretrain.distributed import World
from occstream.pretrain.tracking import Tracker

AFTER = 10  # steps of this start that are not traced: allocation, caches, autotuning


class Profile:
    """Traces ``steps`` steps of the main rank; a context manager that writes what it has when a run ends early.

    Args:
        run: gets ``profile.json.gz`` and ``profile.txt``; both become artifacts.
        steps: 0 for none.
    """

    def __init__(self, run: Path, world: World, tracker: Tracker, steps: int) -> None:
        self.run, self.tracker, self.device = run, tracker, world.device.type
        self.steps = steps if world.is_main else 0
        self.seen = 0
        self.trace: torch.profiler.profile | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._write()

    def step(self) -> None:
        """Call after every step."""
        self.seen += 1
        if not self.steps:
            return
        if self.seen == AFTER:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device == "cuda" else []
            self.trace = torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True)
            self.trace.start()
        elif self.seen == AFTER + self.steps:
            self._write()

    def _write(self) -> None:
        if self.trace is None:
            if self.steps and self.seen < AFTER:
                print(
                    f"profile: nothing was traced, as it begins at step {AFTER} of a start and this one had {self.seen}",
                    flush=True,
                )
                self.steps = 0
            return
        trace, self.trace = self.trace, None
        trace.stop()
        # Kineto writes no other end than .json.gz compressed.
        chrome, table = self.run / "profile.json.gz", self.run / "profile.txt"
        trace.export_chrome_trace(str(chrome))
        by = f"self_{self.device}_time_total"
        table.write_text(trace.key_averages(group_by_input_shape=True).table(sort_by=by, row_limit=40))
        for path in (chrome, table):
            self.tracker.artifact(path)
        print(f"profile: {chrome} (open it in Perfetto), {table}", flush=True)
