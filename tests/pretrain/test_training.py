"""Whole runs in one process: their order, their evaluations, and which checkpoints they keep."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from occstream.pretrain.config import load_config
from occstream.pretrain.engine import World
from occstream.pretrain.replay import TrainData
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
    rewrite(order=None)
    train(world, "pretrain", data, run, "train.steps=3", "train.log_keys=true")
    assert "goes on in the order by content" in capsys.readouterr().out
    manifest = Manifest.load(data)
    scenes = manifest.subset(None, 0, 1)
    entries = [manifest.scenes[i] for i in scenes]
    order = Order(
        by_content(manifest.fingerprint, scenes),
        scenes,
        [e.frames for e in entries],
        0,
        None,
        [e.shard for e in entries],
        4,
    )
    old = [frame_key(manifest.scenes[s.scene].name, s.frame) for s in islice(order.samples(0, 4), 8)]
    assert keys(run)[4:] == old
    assert json.loads((run / "checkpoints/step-00000003/state.json").read_text())["order"] == "content"
    assert sorted(losses(run)) == [1, 2, 3]
