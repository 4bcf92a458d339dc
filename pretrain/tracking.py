"""Numbers of a run: a local event file first, MLflow second.

``Tracker`` only appends to ``metrics.jsonl`` in the run's folder; a thread sends what is in the file to MLflow and
remembers in ``tracking.json`` how much of it the server has acknowledged. So a dead or slow server never stops training,
a restart sends what is missing, and ``occstream sync RUN`` does it afterwards and compares with what the server has.
Events (``pretrain/events.py``) carry their own time: sending one twice changes nothing.

A run is found again at the server by its key, a tag that goes into its checkpoints: also from another machine, and also
if the server took the run but its answer got lost.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from occstream.pretrain.events import EVENTS, flatten, read_events
from occstream.pretrain.sender import Sender, open_client, trouble
from occstream.sharding import threads
from occstream.sharding.secrets import redact

__all__ = ["Sender", "Tracker", "open_client"]


class Tracker:
    """Records one run; safe to construct again on the same folder after a restart.

    Args:
        folder: the run's folder, created if needed.
        uri: MLflow tracking URI; empty: only the event file.
        experiment: MLflow experiment.
        name, tags, params: of the MLflow run; used when the run is new.
        datasets: of ``provenance.datasets``, likewise; ``terms``: losses that charts are made for.
        active: False makes every call do nothing (ranks other than 0).
        key, run_id: of a run to continue, from its checkpoint, where the folder does not know it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        datasets: Sequence[Mapping[str, str]] = (),
        terms: Sequence[str] = (),
        active: bool = True,
        key: str = "",
        run_id: str = "",
    ) -> None:
        self.active, self.folder = active, folder
        self.last_step = -1
        self.key = key
        self._sender: Sender | None = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / EVENTS
        events = read_events(path)
        self.last_step = max((e["step"] for e in events if "step" in e), default=-1)
        if path.exists():
            _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        began = [e["run"] for e in events if "run" in e]
        if not began:
            self.key = key or uuid.uuid4().hex
            about = {"name": name, "tags": dict(tags), "params": flatten(params), "key": self.key}
            about |= {"datasets": [dict(one) for one in datasets], "terms": list(terms)}
            self._append({"run": about | ({"id": run_id} if run_id else {})})
        else:
            self.key = began[0].get("key", "")
            if any("status" in e for e in events):
                self._append({"status": "RUNNING"})
        if uri:
            self._sender = sender = Sender(folder, uri, experiment)
            self._stop, self._wake = threading.Event(), threading.Event()
            self._thread = threads.start("mlflow", lambda: self._send_loop(sender), self._ended)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run, once there is one."""
        return self._sender.run_id if self._sender else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step. Steps that were logged before a restart are not logged again."""
        if self.active and step > self.last_step:
            self._append({"step": step, "time": _now(), "metrics": dict(metrics)})

    def log_result(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``log``, for metrics outside of steps (evaluation): always recorded."""
        if self.active:
            self._append({"step": step, "time": _now(), "metrics": dict(metrics)})

    def artifact(self, path: Path) -> None:
        """A small file below the run's folder, to be shown in MLflow."""
        if self.active:
            self._append({"artifact": str(path.relative_to(self.folder))})

    def params(self, params: Mapping[str, Any]) -> None:
        """Facts that are only known once training has begun."""
        if self.active:
            self._append({"params": flatten(params)})

    def changed(self, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Settings that differ from here on: value before and now by name (MLflow's own parameters cannot change)."""
        if self.active and changes:
            self._append({"changed": {name: list(pair) for name, pair in changes.items()}, "step": step})

    def close(self, status: str = "FINISHED", wait: float = 30.0) -> None:
        """Ends the run and gives the sender ``wait`` seconds for what is left."""
        if not self.active:
            return
        self._append({"status": status})
        self._file.close()
        if self._sender:
            self._deadline = time.monotonic() + wait
            self._stop.set()
            self._wake.set()
            self._thread.join(wait)
            if not self._sender.done():
                print(
                    f"MLflow does not have all metrics yet; they are safe in {self.folder / EVENTS}. "
                    f"Send them later with: occstream sync {self.folder} --uri {redact(self._sender.uri)}",
                    file=sys.stderr,
                )

    def _append(self, event: dict) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        if self._sender:
            self._wake.set()

    def _ended(self, error: BaseException) -> None:
        print(
            f"nothing more is sent to MLflow ({type(error).__name__}: {redact(str(error))[:160]}); training continues, numbers "
            f"wait in {self.folder / EVENTS}",
            file=sys.stderr,
            flush=True,
        )

    def _send_loop(self, sender: Sender) -> None:
        pause, told = 1.0, ""
        while True:
            stopping = self._stop.is_set()
            try:
                sender.send()
                if told:
                    print("MLflow answers again and has all metrics so far", file=sys.stderr, flush=True)
                pause, told = 1.0, ""
            except Exception as error:  # whatever MLflow raises must not reach training
                pause = min(60.0, pause * 3)
                said = trouble(sender.uri, error)
                if said.split(" (")[0] != told:
                    told = said.split(" (")[0]
                    print(
                        f"{said}; training continues, metrics wait in {self.folder / EVENTS}",
                        file=sys.stderr,
                        flush=True,
                    )
            if stopping:
                # A server that never answered is not waited for.
                if not told or not self.run_id or time.monotonic() > self._deadline:
                    return
                time.sleep(1.0)
            elif pause > 1.0:
                self._stop.wait(pause)
            else:
                self._wake.wait()
                self._wake.clear()
                self._stop.wait(pause)  # gather some events into one request


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _now() -> int:
    return int(time.time() * 1000)
