"""Whole runs in one process: their order, their evaluations, and which checkpoints they keep."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from occstream.pretrain import trained, trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from occstream.pretrain.tracking import read_events
from occstream.sharding.attach import attach
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Order, by_content
from occstream.sharding.schema import frame_key
from tests.pretrain.inprocess import train, world  # noqa: F401  a fixture
from tests.pretrain.small import RECIPE, losses, pack_small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("training") / "data")
    pack_small(url)
    return url


def drawn(data: str, *words: str) -> list[list[str]]:
    """Keys of the first batches of a fine-tuning with replay."""
    overrides = [f"data.url={data}", f"replay.url={data}", "data.scenes=2", *words]
    stream = TrainData(load_config(RECIPE, overrides, stage="finetune"), World(0, 1, torch.device("cpu")))
    try:
        return [list(stream.next().keys) for _ in range(6)]
    finally:
        stream.close()


@pytest.mark.slow
def test_other_images_and_other_labels_of_the_same_scenes_come_in_the_same_order(data, tmp_path):
    other = str(tmp_path / "other")
    pack_small(other, image_size=(64, 176))
    assert Manifest.load(data).fingerprint != Manifest.load(other).fingerprint
    want = drawn(data)
    assert len({key for batch in want for key in batch}) > 6
    assert drawn(other) == want
    attach(other, data, "labels-again")
    assert drawn(other, "data.labels=labels-again") == want
    more = str(tmp_path / "more")
    pack_small(more, scenes=6)
    assert drawn(more) != want


def keys(run: Path) -> list[str]:
    """Keys of the frames that a run trained on, in order."""
    return [key for line in (run / "keys-rank-0.txt").read_text().splitlines() for key in line.split()[1:]]


def test_a_checkpoint_of_the_old_rule_goes_on_in_its_order(data, tmp_path, capsys, world):  # noqa: F811
    run = tmp_path / "run"
    train(world, "pretrain", data, run, "train.steps=1", "train.log_keys=true")
    step = run / "checkpoints/step-00000001"
    state = json.loads((step / "state.json").read_text())
    assert state["order"] == "scenes"
    capsys.readouterr()

    def rewrite(**changes):
        written = json.dumps({k: v for k, v in {**state, **changes}.items() if v is not None}).encode()
        (step / "state.json").write_bytes(written)
        listed = json.loads((step / "COMPLETE.json").read_text())
        listed["files"]["state.json"] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        (step / "COMPLETE.json").write_text(json.dumps(listed))

    rewrite(order="by moonlight")
    with pytest.raises(ValueError, match="'by moonlight', which this version does not know"):
        train(world, "pretrain", data, run, "train.steps=3", "train.log_keys=true")
    old = json.loads(json.dumps(state["config"]))
    del old["augment"]["resize_relative"]  # jitter was a share then
    rewrite(order=None, config=old)
    with pytest.raises(ValueError, match=r"augment\.resize_relative=True, this run has .*=False"):
        train(world, "pretrain", data, run, "train.steps=3", "train.log_keys=true")
    words = ["train.steps=3", "train.log_keys=true", "augment.resize_relative=true"]
    train(world, "pretrain", data, run, *words)
    assert "continues in the order by content" in capsys.readouterr().out
    manifest = Manifest.load(data)
    scenes = manifest.subset(None, 0, 1)
    entries = [manifest.scenes[i] for i in scenes]
    order = Order(
        by_content(manifest.fingerprint, scenes),
        scenes,
        [e.frames for e in entries],
        0,
        shards=[e.shard for e in entries],
        lanes=4,
    )
    frames = [frame_key(manifest.scenes[s.scene].name, s.frame) for s in itertools.islice(order.samples(0, 4), 8)]
    assert keys(run)[4:] == frames
    assert json.loads((run / "checkpoints/step-00000003/state.json").read_text())["order"] == "content"
    assert sorted(losses(run)) == [1, 2, 3]


def scores(run: Path) -> dict[int, dict[str, float]]:
    """What evaluations logged, by step."""
    events = [e for e in read_events(run / "metrics.jsonl") if "eval/frames" in e.get("metrics", {})]
    found = {e["step"]: {k: v for k, v in e["metrics"].items() if k.startswith("eval/")} for e in events}
    assert len(found) == len(events), "each step is evaluated once"
    return found


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory, world):  # noqa: F811
    """A run of six steps that is evaluated after two, four and six, and stopped after two and after four."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    words = ["train.steps=6", "train.save_every=2", "train.keep=9", "eval.every=2", "data.holdout=2", "eval.batch=4"]
    wanted = trainer.Stopper.wanted
    for steps in (2, 2, 99):  # of this start, after which it is asked to stop
        calls = itertools.count(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Stopper, "wanted", lambda self, n=steps, c=calls: wanted(self) or next(c) >= n)
            result = train(world, "finetune", data, run, *words)
        assert bool(result.stopped) == (steps == 2)
    return run, result


@pytest.mark.slow
def test_a_run_logs_a_curve_of_scores_and_ends_with_one(evaluated):
    run, result = evaluated
    curve = scores(run)
    assert sorted(curve) == [2, 4, 6]
    for step, values in curve.items():
        assert values["eval/frames"] == 6, step
        assert math.isfinite(values["eval/miou"]), step
    assert result.evaluation.metrics() == pytest.approx(curve[6], nan_ok=True)


def test_a_run_says_what_it_is_made_of(evaluated, data):
    run, _ = evaluated
    [about] = [e["run"] for e in read_events(run / "metrics.jsonl") if "run" in e]
    [found] = about["datasets"]
    assert found["digest"] == Manifest.load(data).fingerprint
    assert found["context"] == "training, evaluation"
    assert about["terms"] == ["binary", "semantic", "depth"]
    assert "* evaluation: 2 scenes (6 frames)" in about["tags"]["mlflow.note.content"]
    assert about["tags"]["mlflow.source.git.commit"] == about["params"]["code"].removesuffix("+")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_each_evaluation_is_that_of_its_checkpoint(evaluated, step):
    run, _ = evaluated
    alone = trained.evaluate_checkpoint(run / f"checkpoints/step-{step:08d}")
    assert alone.metrics() == pytest.approx(scores(run)[step], nan_ok=True)


@pytest.mark.parametrize(("given", "best"), [([50.0, math.nan, 10.0], 2), ([math.nan, 20.0, 10.0], 4)])
def test_the_best_checkpoint_is_kept(data, tmp_path, world, monkeypatch, given, best):  # noqa: F811
    """Not saved for any other reason; a score that is not a number is never the best."""
    evaluate, left = trainer.evaluate_on, iter(given)
    monkeypatch.setattr(
        trainer, "evaluate_on", lambda *args: dataclasses.replace(evaluate(*args), binary_iou=next(left))
    )
    words = ["train.steps=6", "train.save_every=0", "train.keep=1", "eval.every=2", "train.keep_best=eval/binary_iou"]
    train(world, "pretrain", data, tmp_path / "run", *words)
    there = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert there == [best, 6]


def test_a_best_that_no_evaluation_gives_is_named(data, tmp_path, world):  # noqa: F811
    words = ["train.steps=2", "eval.every=1", "train.keep_best=eval/mIoU"]
    with pytest.raises(ValueError, match=r"train.keep_best=eval/mIoU: evaluations of this run give .*eval/binary_iou"):
        train(world, "pretrain", data, tmp_path / "a", *words)
    with pytest.raises(ValueError, match=r"nothing to evaluate on; set data\.holdout"):
        train(world, "pretrain", data, tmp_path / "b", *words, "data.holdout=0")


def test_multiples_of_a_number_of_steps_are_kept(data, tmp_path, world):  # noqa: F811
    words = ["train.steps=5", "train.save_every=1", "train.keep=1", "train.keep_every=2"]
    train(world, "pretrain", data, tmp_path / "run", *words)
    there = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert there == [2, 4, 5]
