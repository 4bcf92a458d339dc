"""What watches over a run: stop requests, hangs, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.pretrain.engine import World

STOP = "STOP"
REQUEUE = 75  # exit code of a run that was asked to stop and can go on (EX_TEMPFAIL)


class Stopper:
    """Notices that the run is asked to stop: SIGTERM, SIGINT or SIGUSR1 (Slurm's warning), or a file ``STOP`` in its folder.

    A rank's own wish becomes all ranks' at the next batch (``World.agree``), the step is finished and saved.
    A second SIGINT interrupts at once.
    """

    def __init__(self, run: Path, world: World):
        self.file, self.world = run / STOP, world
        self.reason = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not in the main thread: somebody else's business
                self._before[number] = signal.signal(number, self._noticed)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _noticed(self, number: int, frame) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank has been asked."""
        if not self.reason and self.world.is_main and self.file.exists():
            self.reason = f"the file {self.file}"
        return bool(self.reason)

    def honoured(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self.world.is_main:
            self.file.unlink(missing_ok=True)


class Watchdog:
    """Writes the stacks of all threads and ends the process when a step takes longer than ``minutes``: a hang that no
    collective's time-out ends. Other ranks then end by theirs.

    Args:
        run: the stacks go to ``stacks-rank-<n>.txt`` there.
        minutes: 0 turns it off.
    """

    def __init__(self, run: Path, world: World, minutes: float):
        self.seconds = minutes * 60
        if self.seconds:
            run.mkdir(parents=True, exist_ok=True)
            self.path = run / f"stacks-rank-{world.rank}.txt"
            self.file = self.path.open("w")

    def alive(self) -> None:
        """Call at every step: the time begins anew."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Time within the context (evaluation, saving) is not watched."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self.alive()

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.seconds:
            self.file.close()
            if not os.path.getsize(self.path):
                self.path.unlink()


class FiniteGuard:
    """Stops a run before a step that would write NaN or infinity into the weights."""

    def __init__(self, module: nn.Module, run: Path, world: World):
        self.run, self.world = run, world
        self.sum = torch.zeros((), device=world.device)
        for p in module.parameters():
            if p.requires_grad:
                p.register_hook(self._add)

    def _add(self, grad: Tensor) -> None:
        # One number per parameter: NaN and infinity survive the sum and the factor 0.
        self.sum += grad.detach().float().sum() * 0.0

    def check(self, loss: Tensor, step: int, keys: list[str]) -> None:
        """All ranks agree (collective). Raises FloatingPointError that names the file with the step's frame keys."""
        bad = (~torch.isfinite(loss.detach().float() + self.sum)).float()
        self.sum.zero_()
        if self.world.size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item() == 0:
            return
        file = self.run / f"nonfinite-step-{step:08d}-rank-{self.world.rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"step": step, "loss": float(loss), "keys": keys}, indent=1))
        raise FloatingPointError(
            f"step {step}: loss or gradients are not finite (loss {float(loss)}); no update was made. "
            f"Frame keys are in {file}. Lower train.lr, raise train.warmup, or look at those frames"
        )
