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
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

PRELOADED = [
    *("deepspeed", "mlflow", "mlflow.tracking", "s3fs", "transformers.models.resnet.modeling_resnet"),
    *("occstream.pretrain.trainer", "occstream.sharding.pack", "occstream.launch.cli", "occstream.launch.sweep"),
]
_context = None


class Forked:
    """A script that runs in a process of its own; the part of ``subprocess.Popen`` that tests use.

    Args:
        command: script and its arguments, without the interpreter.
        env: the whole environment.
        log: file that gets stdout and stderr.
        errors: file that gets stderr.
        parent: it starts processes itself; the test must wait for its end.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        log: Path,
        errors: Path | None = None,
        parent: bool = False,
    ):
        global _context
        if _context is None:
            _context = multiprocessing.get_context("forkserver")
            _context.set_forkserver_preload(PRELOADED)
        self.log = log
        log.touch()
        args = (list(map(str, command)), env, str(log), str(errors or log))
        self._process = _context.Process(target=_run, args=args, daemon=not parent)
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


class Forks:
    """Stands in for ``subprocess.Popen`` in a program that starts scripts: they are forked from what the program was when
    this was made, before it had opened anything. Their parent ends when the program does.

        program.subprocess.Popen = Forks()
    """

    def __init__(self):
        self._pipe, theirs = multiprocessing.Pipe()
        if not os.fork():
            self._pipe.close()
            _serve(theirs)
        theirs.close()

    def __call__(
        self, command: Sequence[str], *, env: dict[str, str], stdout: TextIO, stderr: int, start_new_session: bool
    ) -> _Fork:
        assert stderr == subprocess.STDOUT
        assert start_new_session
        assert command[0] == sys.executable
        self._pipe.send((list(command[1:]), env, stdout.name))
        return _Fork(self._pipe, self._pipe.recv())


class _Fork:
    """The part of ``subprocess.Popen`` that a program uses of a script that it has started."""

    def __init__(self, pipe: Connection, pid: int):
        self._pipe, self.pid = pipe, pid

    def poll(self) -> int | None:
        self._pipe.send(self.pid)
        return self._pipe.recv()

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code


def _asked(pipe: Connection) -> object:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _serve(pipe: Connection) -> None:
    """Starts scripts and tells how they ended, for as long as somebody asks."""
    context, running = multiprocessing.get_context("fork"), {}
    try:
        while asked := _asked(pipe):
            if isinstance(asked, int):
                pipe.send(running[asked].exitcode)
                continue
            command, env, log = asked
            process = context.Process(target=_run, args=(command, env, log, log, True))
            process.start()
            running[process.pid] = process
            pipe.send(process.pid)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run(command: list[str], env: dict[str, str], log: str, errors: str, alone: bool = False) -> None:
    if alone:
        os.setsid()
    for stream, name in ((1, log), (2, errors)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
