"""What watches over a run: stop requests, hangs, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from occstream.pretrain.config import Config
from occstream.pretrain.distributed import World
from occstream.pretrain.engine import buffers_of, clip_gradients, decides, drop_step, or_nan, put_back
from occstream.sharding import threads

if TYPE_CHECKING:
    from occstream.pretrain.engine import Engine

STOP = "STOP"
LOCK = ".lock"
WATCHED = "OCCSTREAM_WATCHED"  # set by a parent whose end means the end of the run
REQUEUE = 75  # exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL)
HUNG = 3  # exit code of a process that a watchdog ended
UNSAID = 30.0  # seconds after which a hang that cannot be told of ends all the same


class RunLock:
    """Keeps a second job out of a run's folder for as long as this process lives; a kill leaves nothing behind.

    Raises:
        ValueError, OSError: on every rank, if another job trains there, or the folder cannot be written.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.file: TextIO | None = None
        error: Exception | None = None
        if world.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
                self.file = (run / LOCK).open("a+")
                error = _take(self.file, run)
            except OSError as problem:
                error = problem
        world.agree(error)

    def close(self) -> None:
        """Lets others in."""
        if self.file:
            self.file.close()


def _take(file: TextIO, run: Path) -> ValueError | None:
    """Takes the lock of a run's folder; an error if another job has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return ValueError(
            f"{run}: another job trains there ({file.read().strip()}): wait for it, stop it (touch {run / STOP}), "
            "or give another output="
        )
    except OSError:
        return None  # a file system without locks: the user's care
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return None


def in_use(run: Path) -> bool:
    """Whether a job trains in a run's folder, as far as this machine's locks tell."""
    try:
        with (run / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Stopper:
    """Notices that the run is asked to stop: SIGTERM, SIGINT or SIGUSR1 (Slurm's warning), a file ``STOP`` in its folder, or
    the end of the launcher that started it (a launcher that was killed tells nobody).

    A rank that is asked tells the others with the next step, which is finished and saved.
    A second SIGINT interrupts at once.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.file, self.world = run / STOP, world
        self.reason = ""
        # Without a launcher, a parent that ends is a shell that somebody has left.
        watched = world.launched or WATCHED in os.environ
        self.parent = os.getppid() if watched else 0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            with contextlib.suppress(ValueError):  # not in the main thread: somebody else's business
                self._before[number] = signal.signal(number, self._noticed)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def wanted(self) -> bool:
        """Whether this rank has been asked."""
        if not self.reason and self.world.is_main and self.file.exists():
            self.reason = f"the file {self.file}"
        if not self.reason and self.parent and os.getppid() != self.parent:
            self.reason = "the end of its launcher"
        return bool(self.reason)

    def done(self) -> None:
        """Removes the file, so that the next start does not stop at once."""
        if self.world.is_main:
            self.file.unlink(missing_ok=True)


class Watchdog:
    """Writes the stacks of all threads, says so and ends the process when a step takes longer than ``minutes``: a hang that
    no collective's time-out ends. Other ranks then end by theirs.

    Args:
        run: the stacks go to ``stacks-rank-<n>.txt`` there, after those of earlier starts.
        minutes: 0 turns it off.
    """

    def __init__(self, run: Path, world: World, minutes: float) -> None:
        self.minutes, self.rank = minutes, world.rank
        self._deadline, self._closed = math.inf, False
        self._change = threading.Condition()
        if self.minutes:
            run.mkdir(parents=True, exist_ok=True)
            self.path = run / f"stacks-rank-{world.rank}.txt"
            self.file = self.path.open("a")
            self._thread = threads.start("watchdog", self._watch, self._unwatched)

    def alive(self) -> None:
        """Call at every step: the time begins anew."""
        if self.minutes:
            seconds = self.minutes * 60
            # Who holds Python's lock and hangs stops the thread below too; faulthandler needs no lock, but says nothing.
            faulthandler.dump_traceback_later(seconds + UNSAID, exit=True, file=self.file)
            self._until(time.monotonic() + seconds)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Time within the context (evaluation, saving) is not watched."""
        faulthandler.cancel_dump_traceback_later()
        self._until(math.inf)
        yield
        self.alive()

    def close(self) -> None:
        """Ends the watch, and removes the file where no stacks were written. May be called again."""
        faulthandler.cancel_dump_traceback_later()
        if self.minutes and not self._closed:
            self._until(math.inf, closed=True)
            self._thread.join()
            self.file.close()
            if not os.path.getsize(self.path):
                self.path.unlink()

    def _until(self, deadline: float, closed: bool = False) -> None:
        with self._change:
            self._deadline, self._closed = deadline, closed
            self._change.notify_all()

    def _watch(self) -> None:
        with self._change:
            while not self._closed and (left := self._deadline - time.monotonic()) > 0:
                self._change.wait(None if left == math.inf else left)
            if self._closed:
                return
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}", file=self.file, flush=True)
        faulthandler.dump_traceback(self.file, all_threads=True)
        print(
            f"{'' if self.rank == 0 else f'[rank {self.rank}] '}error: a step has taken longer than {self.minutes:g} minutes "
            f"(train.timeout_minutes): this process hangs and is terminated. The stack traces "
            f"of all its threads are in {self.path}. "
            "The same command resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(HUNG)

    def _unwatched(self, error: BaseException) -> None:
        print(f"hangs are no longer detected ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


class FiniteGuard:
    """Ends every step of the engine: takes it, or, where loss or gradients are not finite, stops the run or leaves the step
    out. All ranks decide alike, as they see the same norm of the gradients.

    A fused optimizer (CUDA, ZeRO stage 0) is told on the device, so that nobody waits for the norm: the update does nothing,
    and the host learns of it one step later, or before anything is logged, saved or evaluated (``settle``).

    Args:
        heard: gets the sums over ranks of the flags that go with each step (``TrainData.heard``).
        run: gets the frame keys of a bad step, one file of each rank.

    Attributes:
        norm: of the gradients of the last step before clipping; a number, or a scalar on the device.
        skipped: steps left out so far.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        run: Path,
        world: World,
        *,
        heard: Callable[[float, float], None],
    ) -> None:
        self.engine, self.config, self.run, self.world, self.heard = engine, config, run, world, heard
        self.limit, self.skipped = config.train.skip_nonfinite, 0
        self.norm: Tensor | float = math.nan
        self._late = decides(world.device) and not config.train.zero_stage and not self.limit
        self._held: tuple[_Step, list[Tensor], torch.cuda.Event | None] | None = None
        self._now = _Step(0)

    def begin(self, step: int) -> None:
        """Call before the first forward of a step."""
        self._now = _Step(step, buffers=buffers_of(self.engine.module) if self.limit else {})

    def backward(self, loss: Tensor, keys: list[str], flags: Tensor | None = None) -> None:
        """Gradients of a micro-batch.

        Args:
            flags: (2,) float32, sums over ranks: with errors (the first) the step changes nothing.
        """
        self._now.losses.append(loss.detach())
        self._now.keys += keys
        self._now.flags = flags
        self.engine.backward(or_nan(loss, None if flags is None else flags[0]))

    def step(self) -> bool:
        """Ends a micro-batch, and a step where it is the last one.

        Returns:
            False if the step is left out.

        Raises:
            FloatingPointError: it must be, and the limit is reached; names the file.
            DataError: a rank could not get its data.
        """
        engine = self.engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return True
        if engine.zero_optimization_stage():
            engine.step()  # with NaN or infinity in any gradient, it changes nothing
            self.norm = math.nan if engine.optimizer.overflow else float(engine.get_global_grad_norm())
            return self._judge(self._now, self._now.flags, self.norm)
        self.norm = norm = clip_gradients(engine, self.config.optim.clip, self.world)
        if self._late:
            self.settle()
            engine.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self._hold(norm)
            engine.step()
            return True
        taken = self._judge(self._now, self._now.flags, float(norm))
        if taken:
            engine.step()
        else:
            drop_step(engine)
        return taken

    def settle(self) -> None:
        """Waits for what is not known yet of the last step. Raises as ``step``."""
        if self._held is None:
            return
        (step, [norm, *flags], copied), self._held = self._held, None
        if copied is not None:
            copied.synchronize()
        self._judge(step, flags[0] if flags else None, float(norm))

    def _hold(self, norm: Tensor) -> None:
        """Brings the norm and the flags to the host, without waiting for them."""
        host, copied = [], None
        for value in (norm, self._now.flags):
            if value is not None:
                host.append(torch.empty(value.shape, pin_memory=value.is_cuda).copy_(value, non_blocking=True))
        if norm.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._held = self._now, host, copied

    def _judge(self, step: _Step, flags: Tensor | None, norm: float) -> bool:
        """Whether a step counts. If it does not: names its frames; raises, or puts buffers back."""
        if flags is not None:
            self.heard(*flags.tolist())
        if math.isfinite(norm):
            return True
        file = self.run / f"nonfinite-step-{step.number:08d}-rank-{self.world.rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        value = float(torch.stack(step.losses).mean())
        file.write_text(json.dumps({"step": step.number, "loss": value, "keys": step.keys}, indent=1))
        said = f"step {step.number}: loss or gradients are not finite (loss {value}); no update was made. "
        said += f"Frame keys are in {file}"
        if self.skipped >= self.limit:
            more = f", after {self.skipped} steps left out" if self.limit else ""
            raise FloatingPointError(f"{said}{more}. Lower optim.lr, raise optim.warmup, or look at those frames")
        self.skipped += 1
        put_back(self.engine.module, step.buffers)
        if self.world.is_main:
            print(f"left out {said[0].lower()}{said[1:]} ({self.skipped} of at most {self.limit})", flush=True)
        return False


@dataclass
class _Step:
    """What a message about a step needs."""

    number: int
    losses: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    flags: Tensor | None = None
