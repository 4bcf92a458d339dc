"""Processes that start at once: forked from one that has imported torch, DeepSpeed and MLflow already.

They are processes like any other (own memory, own signals, own exit code, killed by ``kill``), but a script begins within
milliseconds instead of seconds. For tests whose subject is what happens in a run, not how a run is started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PRELOADED = ["deepspeed", "mlflow", "mlflow.tracking", "occstream.pretrain.trainer", "occstream.launch.run"]
_context = None


class Forked:
    """A script that runs in a process of its own; the part of ``subprocess.Popen`` that tests use.

    Args:
        command: script and its arguments, without the interpreter.
        env: the whole environment.
        log: file that gets stdout and stderr.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path):
        global _context
        if _context is None:
            _context = multiprocessing.get_context("forkserver")
            _context.set_forkserver_preload(PRELOADED)
        self.log = log
        log.touch()
        self._process = _context.Process(target=_run, args=(list(map(str, command)), env, str(log)), daemon=True)
        kept = dict(os.environ)
        os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # the server reads them when it imports
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(kept)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.log), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for its end; what it has printed, stdout and stderr together."""
        self.wait(timeout)
        return self.log.read_text(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _run(command: list[str], env: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
