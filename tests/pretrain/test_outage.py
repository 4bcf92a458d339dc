"""Tracking server and store go away in the middle of a run: every number and every checkpoint arrives all the same.

``outage.py`` does this to a training, with real servers and for minutes."""

import time

import torch
from mlflow.exceptions import MlflowException

from occstream.pretrain import checkpoint
from occstream.pretrain.events import EVENTS, read_events
from occstream.pretrain.sender import Sender
from occstream.pretrain.tracking import Tracker
from tests.pretrain.test_tracking import Server


def test_numbers_and_checkpoints_arrive_after_both_were_away(tmp_path, monkeypatch):
    server, store, run = Server(), tmp_path / "store", tmp_path / "run"
    monkeypatch.setattr(Sender, "_connect", lambda self: server)
    monkeypatch.setattr(checkpoint.Uploader, "AGAIN", 0.01)
    tracker = Tracker(run, uri="http://tracker", experiment="study", name="run", tags={}, params={"seed": 0})
    uploader = checkpoint.Uploader(f"file://{store}")
    for step in range(1, 31):
        if step == 11:
            server.error, server.failures = MlflowException("connection refused"), 1_000_000
            store.rename(tmp_path / "elsewhere")
            store.write_text("not a folder")
        if step == 21:
            server.failures = 0
            store.unlink()
            (tmp_path / "elsewhere").rename(store)
        tracker.log(step, {"train/loss": 1.0 / step})
        if step % 5 == 0:
            uploader.add(checkpoint.save(run / "checkpoints", step, {"model": {"w": torch.ones(2)}}, {"step": step}))
            if step == 5:
                while uploader.busy or not server.runs or not server.runs["run0"].history["train/loss"]:
                    time.sleep(0.001)
            while 10 < step < 21 and not uploader.failed:
                time.sleep(0.001)
    assert uploader.close(30)
    tracker.close()
    sent = [m.step for m in server.runs["run0"].history["train/loss"]]
    assert sorted(sent) == [e["step"] for e in read_events(run / EVENTS) if "step" in e] == list(range(1, 31))
    assert checkpoint.remote_steps(f"file://{store}") == [5, 10, 15, 20, 25, 30]
