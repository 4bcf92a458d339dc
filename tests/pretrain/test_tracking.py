"""Numbers reach MLflow exactly once, also over restarts and a server that was down."""

from __future__ import annotations

import json
import time

import pytest

from occstream.pretrain.tracking import EVENTS, STATE, Sender, Tracker, flatten, open_client, read_events, redact


def _tracker(folder, uri, **more):
    return Tracker(folder, uri, "study", "run-1", {"arm": "a"}, {"train": {"lr": 0.1}, "grid": "tiny"}, **more)


def _uri(tmp_path):
    return f"sqlite:///{tmp_path}/db/mlflow.db"


def _history(uri, run_id, key):
    return [(m.step, m.value) for m in open_client(uri).get_metric_history(run_id, key)]


def test_everything_arrives_once(tmp_path):
    uri, folder = _uri(tmp_path), tmp_path / "run"
    tracker = _tracker(folder, uri)
    for step in range(1, 1203):
        tracker.log(step, {"train/loss": step / 2, "bad": float("nan")})
    (folder / "note.txt").write_text("hello")
    tracker.artifact(folder / "note.txt")
    tracker.close()
    client = open_client(uri)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {"train.lr": "0.1", "grid": "tiny"}
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
    assert "training goes on" in said
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


def test_inactive_ranks_write_nothing(tmp_path):
    tracker = _tracker(tmp_path / "run", _uri(tmp_path), active=False)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("https://u:p@host/x", "https://***@host/x"), ("sqlite:///a.db", "sqlite:///a.db"), ("s3://b/k", "s3://b/k")],
)
def test_redact(uri, shown):
    assert redact(uri) == shown


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}
