"""Numbers of a run: a local event file first, MLflow second.

``Tracker`` only appends to ``metrics.jsonl`` in the run's folder; a thread sends what is in the file to MLflow and
remembers how far it came in ``tracking.json``. So a dead or slow server never stops training, a restart sends what is
missing, and ``occstream sync RUN`` does it afterwards. Events carry their own time: sending one twice changes nothing.

Events, one JSON object per line: ``{"run": {name, tags, params}}``, ``{"step", "time", "metrics": {…}}``,
``{"artifact": path in the run's folder}``, ``{"params": {…}}``, ``{"status": "FINISHED" | "FAILED" | "KILLED" | "RUNNING"}``
(killed: told to stop; running: started again).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from occstream.sharding import threads

EVENTS, STATE = "metrics.jsonl", "tracking.json"


def redact(uri: str) -> str:
    """A URI without user name and password, for messages."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


class Tracker:
    """Records one run; safe to construct again on the same folder after a restart.

    Args:
        folder: the run's folder, created if needed.
        uri: MLflow tracking URI; empty: only the event file.
        experiment: MLflow experiment.
        name, tags, params: of the MLflow run; used when the run is new.
        active: False makes every call do nothing (ranks other than 0).
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        active: bool = True,
    ):
        self.active, self.folder = active, folder
        self.last_step = -1
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
        if not any("run" in e for e in events):
            self._append({"run": {"name": name, "tags": dict(tags), "params": flatten(params)}})
        elif any("status" in e for e in events):
            self._append({"status": "RUNNING"})
        if uri:
            self._sender = Sender(folder, uri, experiment)
            self._stop, self._wake = threading.Event(), threading.Event()
            self._thread = threads.start("mlflow", self._send_loop, self._ended)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run, once there is one."""
        return self._sender.run_id if self._sender else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step. Steps that were logged before a restart are not logged again."""
        if self.active and step > self.last_step:
            self._append({"step": step, "time": _now(), "metrics": dict(metrics)})

    def log_result(self, step: int, metrics: Mapping[str, float]) -> None:
        """As ``log``, for numbers that come beside the steps (evaluation): always recorded."""
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

    def close(self, status: str = "FINISHED", wait: float = 30.0) -> None:
        """Ends the run and gives the sender ``wait`` seconds for what is left."""
        if not self.active:
            return
        self._append({"status": status})
        self._file.close()
        if self._sender:
            self._stop.set()
            self._wake.set()
            self._thread.join(wait)
            if not self._sender.done():
                print(
                    f"MLflow has not got all numbers; they are safe in {self.folder / EVENTS}. "
                    f"Send them later with: occstream sync {self.folder}",
                    file=sys.stderr,
                )

    def _append(self, event: dict) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        if self._sender:
            self._wake.set()

    def _ended(self, error: BaseException) -> None:
        print(
            f"nothing more is sent to MLflow ({type(error).__name__}: {redact(str(error))[:160]}); training goes on, numbers "
            f"wait in {self.folder / EVENTS}",
            file=sys.stderr,
            flush=True,
        )

    def _send_loop(self) -> None:
        pause, told = 1.0, False
        while True:
            stopping = self._stop.is_set()
            try:
                self._sender.send()
                pause = 1.0
            except Exception as error:  # whatever MLflow raises must not reach training
                pause = min(60.0, pause * 3)
                if not told:
                    reason = redact(" ".join(str(error).split()))[:160]
                    print(
                        f"MLflow at {redact(self._sender.uri)} does not answer ({type(error).__name__}: {reason}); "
                        f"training goes on, numbers wait in {self.folder / EVENTS}",
                        file=sys.stderr,
                        flush=True,
                    )
                    told = True
            if stopping:
                return
            if pause > 1.0:
                self._stop.wait(pause)
            else:
                self._wake.wait()
                self._wake.clear()
                self._stop.wait(pause)  # gather some events into one request


class Sender:
    """Sends the events of a run's folder to MLflow, from where the last one stopped."""

    def __init__(self, folder: Path, uri: str = "", experiment: str = ""):
        self.folder, self.path = folder, folder / STATE
        self.state = {"uri": uri, "experiment": experiment, "run_id": None, "sent": 0}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if not uri or (kept["uri"], kept["experiment"]) == (uri, experiment):
                self.state = kept
        self._client = None

    @property
    def uri(self) -> str:
        return self.state["uri"]

    @property
    def run_id(self) -> str | None:
        return self.state["run_id"]

    def done(self) -> bool:
        """True when every event of the file has been sent."""
        return self.state["sent"] >= (self.folder / EVENTS).stat().st_size

    def send(self) -> None:
        """Sends all complete events that have not been sent. Raises what MLflow raises."""
        with (self.folder / EVENTS).open("rb") as file:
            file.seek(self.state["sent"])
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        client = self._connect()
        metrics: list = []
        for line in data.splitlines(keepends=True):
            event = json.loads(line)
            if "metrics" in event:
                metrics += self._metrics(event)
            else:
                self._flush(metrics)
                self._other(client, event)
            self.state["sent"] += len(line)
            if len(metrics) > 900:
                self._flush(metrics)
        self._flush(metrics)

    def _flush(self, metrics: list) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(metrics), 1000):
            chunk = [Metric(*m) for m in metrics[start : start + 1000]]
            self._connect().log_batch(self.run_id, metrics=chunk)
        metrics.clear()
        self._remember()

    @staticmethod
    def _metrics(event: dict) -> list[tuple]:
        values = {k: float(v) for k, v in event["metrics"].items() if v is not None}
        return [(k, v, event["time"], event["step"]) for k, v in values.items() if math.isfinite(v)]

    def _other(self, client, event: dict) -> None:
        from mlflow.entities import Param, RunTag

        if "run" in event:
            if self.run_id is None:
                tags = {**event["run"]["tags"], "mlflow.runName": event["run"]["name"]}
                run = client.create_run(self.experiment(client), tags=tags)
                self.state["run_id"] = run.info.run_id
                self._remember()
            event = {"params": event["run"]["params"]}
        if "params" in event:
            params = [Param(k, str(v)[:500]) for k, v in event["params"].items()]
            for start in range(0, len(params), 100):
                client.log_batch(self.run_id, params=params[start : start + 100])
        elif "artifact" in event:
            path = self.folder / event["artifact"]
            if path.exists():
                client.log_artifact(self.run_id, str(path))
        elif "status" in event:
            client.log_batch(self.run_id, tags=[RunTag("status", event["status"])])
            if event["status"] == "RUNNING":
                client.update_run(self.run_id, status="RUNNING")
            else:
                client.set_terminated(self.run_id, event["status"])

    def experiment(self, client) -> str:
        """Id of the experiment, created if there is none."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.state["experiment"])
        if found:
            return found.experiment_id
        location = None
        if self.uri.startswith("sqlite:///"):
            # MLflow's own default is ./mlruns of whoever comes first; keep artifacts beside the data base.
            location = (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
        try:
            # The tag opens MLflow's page on the runs; untagged, version 3 shows an empty page for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(self.state["experiment"], artifact_location=location, tags=kind)
        except MlflowException:
            found = client.get_experiment_by_name(self.state["experiment"])  # somebody else was faster
            if not found:
                raise
            return found.experiment_id

    def _connect(self):
        if self._client is None:
            self._client = open_client(self.uri)
        return self._client

    def _remember(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state))
        temporary.replace(self.path)


def open_client(uri: str):
    """MLflow client; a SQLite data base is brought up to date under a lock first, because several processes that meet a
    fresh one crash in its migration (OPERATIONS "MLflow")."""
    import fcntl
    import logging

    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    # Without these a dead server blocks for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)  # creates the tables
    return client


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys (MLflow parameters are flat)."""
    out = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def read_events(path: Path) -> list[dict]:
    """All complete events of an event file; [] if there is none. A line torn by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _now() -> int:
    return int(time.time() * 1000)
