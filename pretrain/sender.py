"""From a run's event file to MLflow: what was not acknowledged is sent, what the server lost is sent again."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from occstream.evaluation.charts import arrange_runs
from occstream.evaluation.compare import HEADLINE
from occstream.pretrain.events import EVENTS, KEY, STATE, VARIABLE, describe_uri, parse_event, read_events
from occstream.sharding import storage
from occstream.sharding.secrets import redact, refuse_secrets

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


class Sender:
    """Sends the events of a run's folder to MLflow, from what the server has acknowledged on.

    Attributes:
        refused: what the server refuses for good, such as a metric's name; left out, said once each.
    """

    def __init__(self, folder: Path, uri: str = "", experiment: str = "") -> None:
        self.folder, self.path = folder, folder / STATE
        uri = _absolute(uri)
        self.state = {"uri": uri, "experiment": experiment, "run_id": None, "sent": 0}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            kept["uri"] = _absolute(kept["uri"])
            if not uri or (kept["uri"], kept["experiment"]) == (uri, experiment or kept["experiment"]):
                self.state = kept
            else:
                self.state["experiment"] = experiment or kept["experiment"]
        self._client: MlflowClient | None = None
        self._there: dict[str, set[int]] = {}
        self.refused: set[str] = set()

    @property
    def uri(self) -> str:
        """Of the server; "" if there is none yet."""
        return self.state["uri"]

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the server has it."""
        return self.state["run_id"]

    @property
    def _run(self) -> str:
        """``run_id`` of a run that has begun: the first event of every file begins it."""
        if self.run_id is None:
            raise ValueError(f"{self.folder / EVENTS} does not begin with a run")
        return self.run_id

    def done(self) -> bool:
        """True when the server has acknowledged every complete event of the file."""
        return self.state["sent"] >= (self.folder / EVENTS).read_bytes().rfind(b"\n") + 1

    def send(self) -> None:
        """Sends all complete events that have not been acknowledged. Raises what MLflow raises."""
        with (self.folder / EVENTS).open("rb") as file:
            file.seek(self.state["sent"])
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        client, at = self._connect(), self.state["sent"]
        metrics: list = []
        try:
            for line in data.splitlines(keepends=True):
                event = parse_event(line)
                if "metrics" in event:
                    metrics += self._metrics(event)
                else:
                    self._flush(client, metrics, at)
                    self._other(client, event)
                    self._acknowledged(at + len(line))
                at += len(line)
                if len(metrics) > 900:
                    self._flush(client, metrics, at)
            self._flush(client, metrics, at)
        except Exception as error:
            if status_of(error) == 404:
                self.begin_anew_if_gone()
            raise

    def begin_anew_if_gone(self) -> None:
        """Where the server has lost the run (another data base behind its address), everything goes there once more."""
        try:
            if self.run_id:
                self._connect().get_run(self.run_id)
        except Exception as error:
            if status_of(error) == 404:
                self.state |= {"run_id": None, "sent": 0}
                self._remember()

    def repair(self) -> tuple[int, int]:
        """Compares what was acknowledged with what the server has, and sends what it lacks.

        Returns:
            Numbers in the file (of one metric at one step), and how many of them were sent again.

        Raises:
            ConnectionError: the server has lost some of them again.
        """
        client = self._connect()
        events = read_events(self.folder / EVENTS)
        wanted: dict[tuple[str, int], tuple] = {}
        for event in events:
            wanted |= {(m[0], m[3]): m for m in self._metrics(event)} if "metrics" in event else {}

        def lost() -> list[tuple]:
            self._there.clear()
            return [m for place, m in wanted.items() if not self._has(client, *place) and m[0] not in self.refused]

        again = lost()
        if again:
            self._post(client, again)
            if left := lost():
                raise ConnectionError(
                    f"{len(left)} of {len(wanted)} metrics do not stay at {redact(self.uri)}; check the server"
                )
        known, files = client.get_run(self._run), {a.path for a in client.list_artifacts(self._run)}
        for event in events:
            if "params" in event or "run" in event:
                self._params(client, event.get("run", event)["params"], known.data.params)
                self._datasets(client, event.get("run", {}))
            elif "artifact" in event and Path(event["artifact"]).name not in files:
                self._other(client, event)
        last = [e for e in events if "status" in e][-1:]
        if last and known.info.status != last[0]["status"]:
            self._other(client, last[0])
        return len(wanted), len(again)

    def _has(self, client: MlflowClient, key: str, step: int) -> bool:
        """Whether the server has a number of a metric at a step."""
        if key not in self._there:
            self._there[key] = {m.step for m in client.get_metric_history(self._run, key)}
        return step in self._there[key]

    def _flush(self, client: MlflowClient, metrics: list[tuple], at: int) -> None:
        """Sends numbers; then everything before byte ``at`` of the event file is acknowledged."""
        if self.state.get("adopted"):
            # Another machine has sent numbers of the same steps, at other times.
            metrics[:] = [m for m in metrics if not self._has(client, m[0], m[3])]
        self._post(client, metrics)
        metrics.clear()
        self._acknowledged(at)

    def _post(self, client: MlflowClient, metrics: list[tuple]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(metrics), 1000):
            chunk = metrics[start : start + 1000]
            self._log(client, chunk, lambda part: {"metrics": [Metric(*m) for m in part]})

    def _params(self, client: MlflowClient, params: Mapping[str, Any], known: Iterable[str] = ()) -> None:
        from mlflow.entities import Param

        items = [(k, str(v)[:500]) for k, v in params.items() if k not in known]
        for start in range(0, len(items), 100):
            self._log(client, items[start : start + 100], lambda part: {"params": [Param(*p) for p in part]})

    def _log(self, client: MlflowClient, items: list[tuple], batch: Callable[[list[tuple]], dict[str, Any]]) -> None:
        """Logs items, the first of each its name, as arguments of ``log_batch`` that ``batch`` makes of them; those that the
        server refuses for good are found, named and left out."""
        try:
            client.log_batch(self._run, **batch(items))
        except Exception as error:
            if status_of(error) not in (400, 413, 422):
                raise
            if len(items) == 1:
                self._refuse(items[0][0], error)
                return
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self._log(client, half, batch)

    def _refuse(self, name: str, error: Exception) -> None:
        if name not in self.refused:
            self.refused.add(name)
            reason = redact(" ".join(str(error).split()))[:160]
            print(
                f"MLflow at {redact(self.uri)} rejects {name} permanently ({reason}); it is only in {self.folder / EVENTS}",
                file=sys.stderr,
                flush=True,
            )

    def _acknowledged(self, at: int) -> None:
        if at != self.state["sent"]:
            self.state["sent"] = at
            self._remember()

    @staticmethod
    def _metrics(event: dict) -> list[tuple]:
        values = {k: float(v) for k, v in event["metrics"].items() if v is not None}
        return [(k, v, event["time"], event["step"]) for k, v in values.items() if math.isfinite(v)]

    def _other(self, client: MlflowClient, event: dict) -> None:
        from mlflow.entities import RunTag

        if "run" in event:
            self._begin(client, event["run"])
        elif "params" in event:
            self._params(client, event["params"], client.get_run(self._run).data.params)
        elif "changed" in event:
            tags = [(f"changed/{k}", f"{a} -> {b} at step {event['step']}") for k, (a, b) in event["changed"].items()]
            for start in range(0, len(tags), 100):
                part = tags[start : start + 100]
                self._log(client, part, lambda part: {"tags": [RunTag(k, v[:5000]) for k, v in part]})
        elif "artifact" in event:
            self._artifact(client, event["artifact"])
        elif "status" in event:
            client.log_batch(self._run, tags=[RunTag("status", event["status"])])
            if event["status"] == "RUNNING":
                client.update_run(self._run, status="RUNNING")
            else:
                client.set_terminated(self._run, event["status"])

    def _artifact(self, client: MlflowClient, name: str) -> None:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return
        try:
            client.log_artifact(self._run, str(path))
        except Exception as error:
            if status_of(error) not in (400, 413, 422):
                raise
            self._refuse(name, error)

    def _begin(self, client: MlflowClient, about: dict) -> None:
        """Goes on with the run that the server has of this one, or creates it; then its parameters."""
        if self.run_id is None:
            experiment, key = self.experiment(client), about.get("key", "")
            self._arrange(client, experiment, about)
            found = self._find(client, experiment, key, about.get("id", ""))
            if found is None:
                tags = {**about["tags"], "mlflow.runName": about["name"], **({KEY: key} if key else {})}
                found = client.create_run(experiment, tags=tags)
            else:
                # What of it came from here cannot be told from what did not, so every number is compared.
                self.state["adopted"] = True
                client.update_run(found.info.run_id, status="RUNNING")
            self.state["run_id"] = found.info.run_id
            self._remember()
        self._params(client, about["params"], client.get_run(self._run).data.params)
        self._datasets(client, about)

    def _datasets(self, client: MlflowClient, about: dict) -> None:
        """Gives the run its data sets. The server knows by name and digest which it has already."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for one in about.get("datasets", []):
            context, *fields = (str(one[key]) for key in ("context", "name", "digest", "source_type", "source"))
            tags = [InputTag("mlflow.data.context", context)]
            inputs.append(DatasetInput(Dataset(*fields, profile=str(one["profile"])), tags))
        if not inputs:
            return
        try:
            client.log_inputs(self._run, inputs)
        except Exception as error:
            if not refuses(error):
                raise
            if status_of(error) == 404:
                client.get_run(self._run)  # raises if it is the run that is gone: else an old server knows no data sets
            self._refuse("data sets", error)

    def _arrange(self, client: MlflowClient, experiment: str, about: dict) -> None:
        """Puts the scores and losses of a new run on the experiment's page."""
        tags = about["tags"]
        headline = json.loads(tags.get(HEADLINE, "{}"))
        if not headline:
            return
        try:
            arrange_runs(client, experiment, headline, about.get("terms", []), by="arm" if "arm" in tags else "")
        except Exception as error:
            if not refuses(error):
                raise
            self._refuse("the arrangement of charts", error)

    @staticmethod
    def _find(client: MlflowClient, experiment: str, key: str, run_id: str) -> Run | None:
        """The run with a key, or with an id if it has none, in an experiment; None if there is none."""
        if key:
            found = client.search_runs([experiment], f"tags.{KEY} = '{key}'", max_results=1)
            if found:
                return found[0]
        if run_id:
            try:
                run = client.get_run(run_id)
            except Exception as error:
                if status_of(error) != 404:
                    raise
                return None
            ours = run.info.experiment_id == experiment and run.data.tags.get(KEY, key) == key
            return run if ours and run.info.lifecycle_stage == "active" else None
        return None

    def experiment(self, client: MlflowClient) -> str:
        """Id of the experiment, created if there is none."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.state["experiment"])
        if found:
            return found.experiment_id
        location = None
        if self.uri.startswith("sqlite:///"):
            # MLflow's own default is ./mlruns of whoever comes first; keep artifacts next to the database.
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

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = open_client(self.uri)
        return self._client

    def _remember(self) -> None:
        storage.publish(json.dumps(self.state).encode(), str(self.path))


def sync(run: Path, uri: str = "", experiment: str = "") -> str:
    """Sends what MLflow lacks of a run, whether it was never sent or has been lost there.

    Args:
        run: its folder.
        uri: of the server; "": that of the environment. The one that the folder names is not taken unasked: folders come
            from other people.
        experiment: where the run is new there; "": the run's own.

    Returns:
        One line that says what is there now.

    Raises:
        ValueError: not a run's folder, or no server given.
        ConnectionError: the server does not answer, or refuses.
    """
    if not (run / EVENTS).is_file():
        raise ValueError(f"{run}: not a run's folder (no {EVENTS})")
    sender = Sender(run)
    uri = uri or os.environ.get(VARIABLE, "")
    refuse_secrets(uri, "--uri")
    if not uri:
        last = sender.uri or "sqlite:///runs/mlflow.db"
        raise ValueError(f"{run}: give the server: --uri {redact(last)} (or set {VARIABLE})")
    sender = Sender(run, uri, experiment or sender.state["experiment"] or "occstream")
    try:
        sender.begin_anew_if_gone()
        sender.send()
        total, again = sender.repair()
    except Exception as error:  # whatever MLflow raises: the numbers stay where they are
        if isinstance(error, ConnectionError):
            raise
        later = "" if refuses(error) else "; try again later"
        raise ConnectionError(f"{trouble(uri, error)}{later}; the metrics stay in {run / EVENTS}") from error
    lost = f" ({again} of them were missing there and have been sent again)" if again else ""
    left = f"; it rejects {', '.join(sorted(sender.refused))}" if sender.refused else ""
    return f"{run}: all {total} numbers are at {describe_uri(uri)}, run {sender.run_id}{lost}{left}"


def status_of(error: BaseException) -> int:
    """HTTP status that stands behind what MLflow raised; 500 if there is none, such as when nobody answers."""
    code = getattr(error, "get_http_status_code", None)
    return code() if code else 500


def refuses(error: BaseException) -> bool:
    """Whether the server has answered that it will not, so that asking again changes nothing."""
    return 400 <= status_of(error) < 500 and status_of(error) not in (408, 425, 429, 499)


def trouble(uri: str, error: BaseException) -> str:
    """One line on an error of MLflow: whether the server is away or refuses, and what helps."""
    reason = redact(" ".join(str(error).split()))[:160]
    where, status = f"MLflow at {redact(uri)}", status_of(error)
    if status in (401, 403):
        return (
            f"{where} denies access ({reason}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN; a 403 for a server reached by another name: name it in its MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    if refuses(error):
        return f"{where} rejects what it is sent ({type(error).__name__}: {reason}): check the URI, or restore the run there"
    return f"{where} does not answer ({type(error).__name__}: {reason})"


def _absolute(uri: str) -> str:
    """A data base by its full path, so that it is the same one from every working folder."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri or path.startswith(("/", ":memory:")) else f"sqlite:///{Path(path).resolve()}"


def open_client(uri: str) -> MlflowClient:
    """MLflow client; a SQLite data base is brought up to date under a lock first, because several processes that meet a
    fresh one crash in its migration."""
    import fcntl
    import logging

    refuse_secrets(uri, "the tracking URI")

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
