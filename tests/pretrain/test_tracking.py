"""Numbers reach MLflow exactly once, also over restarts and a server that was down."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE

from occstream.evaluation.charts import VIEW
from occstream.evaluation.compare import headline_tag
from occstream.launch import cli
from occstream.pretrain.config import load_config
from occstream.pretrain.events import EVENTS, STATE, VARIABLE, describe_uri, flatten, read_events
from occstream.pretrain.runconfig import write_config
from occstream.pretrain.sender import Sender, open_client, sync
from occstream.pretrain.tracking import Tracker
from tests.pretrain.small import RECIPE


def _tracker(folder, uri, **more):
    return Tracker(
        folder,
        uri=uri,
        experiment="study",
        name="run-1",
        tags={"arm": "a"},
        params={"optim": {"lr": 0.1}, "grid": "tiny"},
        **more,
    )


def _uri(tmp_path):
    return f"sqlite:///{tmp_path}/db/mlflow.db"


def _history(uri, run_id, key):
    return [(m.step, m.value) for m in open_client(uri).get_metric_history(run_id, key)]


@pytest.mark.slow
def test_everything_arrives_once(tmp_path):
    uri, folder = _uri(tmp_path), tmp_path / "run"
    tracker = _tracker(folder, uri, datasets=[DATA])
    for step in range(1, 1203):
        tracker.log(step, {"train/loss": step / 2, "bad": float("nan")})
    (folder / "note.txt").write_text("hello")
    tracker.artifact(folder / "note.txt")
    tracker.close()
    client = open_client(uri)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {"optim.lr": "0.1", "grid": "tiny"}
    [kept] = run.inputs.dataset_inputs
    assert (kept.dataset.digest, kept.dataset.source, kept.tags[0].value) == (
        DATA["digest"],
        DATA["source"],
        DATA["context"],
    )
    assert (run.data.tags["arm"], run.info.run_name, run.info.status) == ("a", "run-1", "FINISHED")
    assert sorted(_history(uri, tracker.run_id, "train/loss")) == [(s, s / 2) for s in range(1, 1203)]
    assert "bad" not in run.data.metrics
    assert [a.path for a in client.list_artifacts(tracker.run_id)] == ["note.txt"]


def test_restart_goes_on_with_the_same_run_and_repeats_nothing(tmp_path):
    uri, folder = _uri(tmp_path), tmp_path / "run"
    first = _tracker(folder, uri)
    for step in (1, 2, 3):
        first.log(step, {"x": float(step)})
    first.close()
    with (folder / EVENTS).open("a") as file:
        file.write('{"step": 4, "time"')  # killed while writing
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, "sent": 0}))  # killed between sending and noting it
    second = _tracker(folder, uri)
    assert second.last_step == 3
    for step in (2, 3, 4, 5):
        second.log(step, {"x": float(step)})
    second.close()
    assert second.run_id == first.run_id
    assert sorted(_history(uri, first.run_id, "x")) == [(s, float(s)) for s in (1, 2, 3, 4, 5)]
    assert [e["step"] for e in read_events(folder / EVENTS) if "step" in e] == [1, 2, 3, 4, 5]


def test_dead_server_costs_nothing_and_is_made_up_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    tracker = _tracker(folder, "http://user:secret@127.0.0.1:9")
    began = time.perf_counter()
    for step in range(100):
        tracker.log(step, {"x": 1.0})
    assert time.perf_counter() - began < 2
    tracker.close(wait=20)
    said = capsys.readouterr().err
    assert "training continues" in said
    assert "occstream sync" in said
    assert "secret" not in said
    later = Sender(folder, _uri(tmp_path), "study")
    later.send()
    assert later.done()
    assert len(_history(_uri(tmp_path), later.run_id, "x")) == 100


def test_a_sender_that_ends_says_so_and_loses_nothing(tmp_path, capsys, monkeypatch):
    def broken(self):
        raise SystemExit("a client library that ends its thread")

    monkeypatch.setattr(Sender, "send", broken)
    tracker = _tracker(tmp_path / "run", uri=_uri(tmp_path))
    tracker.log(1, {"a": 1.0})
    tracker.close(wait=10)
    assert "nothing more is sent to MLflow (SystemExit" in capsys.readouterr().err
    assert [e["metrics"] for e in read_events(tmp_path / "run" / EVENTS) if "metrics" in e] == [{"a": 1.0}]


class Server:
    """A tracking server in memory, as its client sees it. ``error`` is raised by the next ``failures`` writes."""

    def __init__(self):
        self.runs, self.error, self.failures, self.bad = {}, None, 0, ()
        self.tags = {}
        self.knows_data_sets = True

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment, tags):
        info = SimpleNamespace(
            run_id=f"run{len(self.runs)}", experiment_id=experiment, lifecycle_stage="active", status="RUNNING"
        )
        data = SimpleNamespace(tags=dict(tags), params={})
        run = self.runs[info.run_id] = SimpleNamespace(info=info, data=data, history=defaultdict(list), files=[])
        return run

    def search_runs(self, experiments, words, max_results):
        key = words.split("'")[1]
        return [r for r in self.runs.values() if r.data.tags.get("run_key") == key]

    def get_run(self, run_id):
        if run_id not in self.runs:
            raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
        return self.runs[run_id]

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        run = self.get_run(run_id)
        if self.failures:
            self.failures -= 1
            raise self.error
        if [m for m in metrics if m.key in self.bad]:
            raise MlflowException("bad name", INVALID_PARAMETER_VALUE)
        for m in metrics:
            if (m.step, m.timestamp) not in [(n.step, n.timestamp) for n in run.history[m.key]]:
                run.history[m.key].append(m)
        for p in params:
            if run.data.params.setdefault(p.key, p.value) != p.value:
                raise MlflowException("a parameter cannot change", INVALID_PARAMETER_VALUE)
        run.data.tags |= {t.key: t.value for t in tags}

    def get_experiment(self, experiment):
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, experiment, key, value):
        self.tags[key] = value

    def log_inputs(self, run_id, inputs):
        if not self.knows_data_sets:
            raise MlflowException("no such page", RESOURCE_DOES_NOT_EXIST)
        known = {(one.dataset.name, one.dataset.digest): one for one in inputs}
        self.get_run(run_id).inputs = {**known, **vars(self.get_run(run_id)).get("inputs", {})}

    def get_metric_history(self, run_id, key):
        return self.get_run(run_id).history[key]

    def list_artifacts(self, run_id):
        return [SimpleNamespace(path=p) for p in self.get_run(run_id).files]

    def log_artifact(self, run_id, path):
        self.get_run(run_id).files.append(path.rsplit("/", 1)[-1])

    def update_run(self, run_id, status):
        self.get_run(run_id).info.status = status

    set_terminated = update_run


@pytest.fixture
def server(monkeypatch):
    it = Server()
    monkeypatch.setattr(Sender, "_connect", lambda self: it)
    return it


DATA = {
    "name": "synthetic",
    "digest": "0" * 32,
    "source_type": "s3",
    "source": '{"uri": "s3://b/set"}',
    "profile": '{"scenes": 3}',
    "context": "training, evaluation",
}


def test_data_sets_and_charts_reach_the_server(server, tmp_path):
    tags = {**headline_tag({"eval/miou": "mIoU"}), "arm": "a"}
    tracker = Tracker(
        tmp_path, uri="", experiment="x", name="one", tags=tags, params={}, datasets=[DATA], terms=["binary"]
    )
    tracker.close()
    sender = Sender(tmp_path, "http://tracker", "study")
    sender.send()
    [found] = server.get_run(sender.run_id).inputs.values()
    assert (found.dataset.name, found.dataset.digest, found.dataset.source) == (DATA["name"], "0" * 32, DATA["source"])
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training, evaluation")]
    view = json.loads(server.tags[VIEW])
    assert "metrics.`eval/miou`" in view["selectedColumns"]
    assert "line-train/binary" in [card["uuid"] for card in view["compareRunCharts"]]
    server.get_run(sender.run_id).inputs = {}
    sender.repair()
    assert server.get_run(sender.run_id).inputs  # what was lost there is sent again


def test_a_server_that_knows_no_data_sets_gets_everything_else(server, tmp_path, capsys):
    server.knows_data_sets = False
    tracker = Tracker(tmp_path, uri="", experiment="x", name="one", tags={}, params={}, datasets=[DATA])
    tracker.log(1, {"x": 1.0})
    tracker.close()
    sender = Sender(tmp_path, "http://tracker", "study")
    sender.send()
    assert sender.done()
    assert _steps(server, sender.run_id) == [1]
    assert "rejects data sets permanently" in capsys.readouterr().err


def _steps(server, run_id, key="x"):
    return sorted(m.step for m in server.get_metric_history(run_id, key))


def _write(folder, steps, **more):
    """A run's event file, and nothing sent."""
    tracker = _tracker(folder, "", **more)
    for step in steps:
        tracker.log(step, {"x": float(step), "y": 1.0})
    tracker.close()
    return tracker


@pytest.mark.parametrize(
    "error",
    [lambda: MlflowException("connection refused"), lambda: MlflowException("busy", TEMPORARILY_UNAVAILABLE)],
)
def test_only_what_the_server_has_acknowledged_counts_as_sent(server, tmp_path, error):
    _write(tmp_path, range(1, 4))
    sender = Sender(tmp_path, "http://tracker", "study")
    _drop_status(tmp_path)
    sender.send()
    tracker = _tracker(tmp_path, "")
    tracker.log(4, {"x": 4.0})
    before = sender.state["sent"]
    server.error, server.failures = error(), 1
    with pytest.raises(MlflowException):
        sender.send()
    assert not sender.done()
    assert sender.state["sent"] == before
    assert json.loads((tmp_path / STATE).read_text())["sent"] == before
    sender.send()
    assert sender.done()
    assert _steps(server, sender.run_id) == [1, 2, 3, 4]


def _drop_status(folder):
    lines = (folder / EVENTS).read_text().splitlines(keepends=True)
    (folder / EVENTS).write_text("".join(line for line in lines if "status" not in json.loads(line)))


def test_what_the_server_refuses_for_good_is_named_and_holds_nothing_up(server, tmp_path, capsys):
    _write(tmp_path, range(1, 9))
    server.bad = ("y",)
    sender = Sender(tmp_path, "http://tracker", "study")
    sender.send()
    assert sender.done()
    assert _steps(server, sender.run_id) == list(range(1, 9))
    said = capsys.readouterr().err
    assert said.count("rejects y permanently (bad name)") == 1
    assert "does not answer" not in said
    assert "it rejects y" in sync(tmp_path, "http://tracker")


def test_sync_sends_what_the_server_has_lost(server, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    tracker = _tracker(tmp_path, "")
    for step in range(1, 61):
        tracker.log(step, {"x": float(step)})
    tracker.artifact(tmp_path / "note.txt")
    tracker.close()
    assert "all 60 numbers are at http://tracker" in sync(tmp_path, "http://tracker")
    run = server.runs["run0"]
    run.history["x"] = run.history["x"][:20]
    run.files.clear()
    run.data.params.clear()
    run.info.status = "RUNNING"
    assert "40 of them were missing there and have been sent again" in sync(tmp_path, "http://tracker")
    assert _steps(server, "run0") == list(range(1, 61))
    assert (run.files, run.data.params["grid"], run.info.status) == (["note.txt"], "tiny", "FINISHED")
    server.runs.clear()  # a new data base behind the same address
    sync(tmp_path, "http://tracker")
    assert _steps(server, "run0") == list(range(1, 61))


def test_another_machine_goes_on_with_the_run_of_the_checkpoint(server, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = _write(here, (1, 2, 3))
    Sender(here, "http://tracker", "study").send()
    # From a checkpoint at step 2, which knows the run by its key; step 3 was sent and is trained once more.
    second = _tracker(there, "", key=first.key)
    for step in (3, 4):
        second.log(step, {"x": float(step)})
    second.changed(2, {"train.steps": (2, 4)})
    second.close()
    sender = Sender(there, "http://other-name-of-it", "study")
    sender.send()
    assert list(server.runs) == ["run0"]
    assert _steps(server, "run0") == [1, 2, 3, 4]
    assert server.runs["run0"].data.tags["changed/train.steps"] == "2 -> 4 at step 2"
    assert server.runs["run0"].info.status == "FINISHED"


def test_a_run_that_the_server_took_without_an_answer_is_found_again(server, tmp_path):
    _write(tmp_path, (1,))
    create = server.create_run

    def lost(*args, **words):
        create(*args, **words)
        raise MlflowException("the answer got lost")

    server.create_run = lost
    sender = Sender(tmp_path, "http://tracker", "study")
    with pytest.raises(MlflowException):
        sender.send()
    sender.send()
    assert list(server.runs) == ["run0"]


def test_a_run_of_another_experiment_is_not_taken_over(server, tmp_path):
    server.create_run("7", {})
    _write(tmp_path, (1,), run_id="run0")
    sender = Sender(tmp_path, "http://tracker", "study")
    sender.send()
    assert sender.run_id == "run1"


def test_the_environment_names_the_server_where_the_recipe_does_not(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert load_config("r50").track.uri == "sqlite:///runs/mlflow.db"
    monkeypatch.setenv(VARIABLE, "http://tracker:5000")
    for recipe in ("r50", "demo", "tiny"):
        assert load_config(recipe).track.uri == "http://tracker:5000"
    assert describe_uri("http://tracker:5000") == f"http://tracker:5000 (from {VARIABLE})"
    assert load_config("r50", ["track.uri=http://mine"]).track.uri == "http://mine"
    assert "http://tracker:5000 is not used" in describe_uri("http://mine")
    assert load_config("r50", ["track.uri="]).track.uri == ""


def test_sync_does_not_send_to_a_server_that_only_the_folder_names(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    _write(tmp_path, (1,))
    (tmp_path / STATE).write_text(json.dumps({"uri": "http://theirs", "experiment": "e", "run_id": None, "sent": 0}))
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "give the server: --uri http://theirs" in capsys.readouterr().err


def test_artifacts_stay_below_the_folder(server, tmp_path):
    folder = tmp_path / "run"
    _write(folder, (1,))
    (tmp_path / "secret").write_text("x")
    with (folder / EVENTS).open("a") as file:
        file.write('{"artifact": "../secret"}\nnonsense\n')
    sender = Sender(folder, "http://tracker", "study")
    sender.send()
    assert sender.done()
    assert server.runs["run0"].files == []


def test_inactive_ranks_write_nothing(tmp_path):
    tracker = _tracker(tmp_path / "run", _uri(tmp_path), active=False)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_what_a_resumed_run_changes_is_noted(tmp_path, capsys):
    before, now = load_config(RECIPE, ["train.steps=2"]), load_config(RECIPE, ["train.steps=4"])
    saved = SimpleNamespace(state={"config": before.to_dict(), "world_size": 1, "step": 2})
    tracker = _tracker(tmp_path, "")
    write_config(tmp_path, now, 1, saved=saved, tracker=tracker)
    tracker.close()
    assert "changed from step 2 on: train.steps 2 -> 4" in capsys.readouterr().out
    kept = tmp_path / "config-step-00000002.yaml"
    assert (tmp_path / "config.yaml").read_text() == kept.read_text()
    events = read_events(tmp_path / EVENTS)
    assert {"changed": {"train.steps": [2, 4]}, "step": 2} in events
    assert {"artifact": kept.name} in events


def test_settings_that_an_older_run_did_not_have_yet_are_not_changes(tmp_path, capsys):
    words = ["replay.url=b", "loss.replay_normalizer=joint", "augment.resize_relative=true"]
    config = load_config(RECIPE, words, stage="finetune")
    older = config.to_dict()
    del older["loss"]["replay_normalizer"], older["augment"]["resize_relative"]
    saved = SimpleNamespace(state={"config": older, "world_size": 1, "step": 2})
    tracker = _tracker(tmp_path, "")
    write_config(tmp_path, config, 1, saved=saved, tracker=tracker)
    tracker.close()
    assert "changed" not in capsys.readouterr().out
    assert not any("changed" in event for event in read_events(tmp_path / EVENTS))
