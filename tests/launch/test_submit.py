"""Boxes of a run as a submission of the nuScenes benchmark."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from occstream.evaluation.submission import check_sweeps, ego_boxes, read_detection, read_lidarseg
from occstream.launch import cli
from occstream.launch.submit import _found, _to_global
from occstream.pretrain import trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.trained import load_trained
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import Frame, LidarSweep
from occstream.sharding.sources import open_source
from occstream.sharding.sources.synthetic import Synthetic
from occstream.sharding.stream import ShardReader
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE, pack_sweeps

SMALL = str(HERE / "small-spot.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return pack_sweeps(str(tmp_path_factory.mktemp("sweeps")), scenes=2, frames=2)


@pytest.fixture(scope="module")
def runs(data, world, tmp_path_factory):  # noqa: F811
    """A detector of one step, and a segmentor."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("detect", "segment"):
        words = [f"data.url={data}", f"output={folder}/{stage}", "data.holdout=0", "train.steps=1", "train.batch=1"]
        trainer.train(load_config(SMALL, words, stage=stage), world)
    return folder


def test_every_sample_has_its_boxes_in_the_global_frame(runs, data, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = ["detect.score_threshold=0", "detect.most=20"]
    assert cli.main(["submit", str(runs / "detect"), data, "--out", str(out), *words]) == 0
    assert "80 boxes of 4 samples" in capsys.readouterr().out
    reader = ShardReader(Manifest.load(data), ("lidar",))
    frames = [reader.frame(scene, index) for scene in range(2) for index in range(2)]
    meta, found = read_detection(str(out), samples=[frame.token for frame in frames])
    assert meta["use_lidar"]
    assert not meta["use_camera"]
    trained = load_trained(runs / "detect", tuple(words))
    own = dict(_found(trained, Manifest.load(data)))
    for frame in frames:
        boxes = ego_boxes(found[frame.token], frame.ego_to_global)
        # A pose with roll and pitch leaves a box upright in its own frame only nearly so.
        np.testing.assert_allclose(boxes.boxes[:, :6], own[frame.key].boxes[:, :6], atol=1e-3)
        np.testing.assert_allclose(boxes.scored(), own[frame.key].scores, atol=1e-6)
        assert (boxes.classes == own[frame.key].classes).all()


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> str:
    """A set whose sweeps have tokens, as those of nuScenes."""

    class Named(Synthetic):
        def load(self, name):
            scene = super().load(name)
            for frame in scene.frames:
                frame.lidar.token = f"sweep-{frame.token}"
            return scene

    plain = open_source("synthetic", {"scenes": 2, "frames": 2, "cameras": False, "grid": "tiny"})
    url = str(tmp_path_factory.mktemp("named") / "data")
    pack(
        Named(**{f.name: getattr(plain, f.name) for f in fields(plain)}),
        url,
        groups=("lidar", "labels"),
        grid=plain.grid,
    )
    return url


def test_points_have_their_classes_by_the_token_of_their_sweep(runs, named, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert (
        cli.main(["submit", str(runs / "segment"), named, "--out", out, "--kind", "lidarseg", "--split", "test"]) == 0
    )
    reader = ShardReader(Manifest.load(named), ("lidar",))
    sweeps = [reader.frame(scene, index).lidar for scene in range(2) for index in range(2)]
    check_sweeps(out, "lidarseg", "test", {sweep.token: len(sweep.xyz) for sweep in sweeps})
    found = np.concatenate([read_lidarseg(out, "test", sweep.token) for sweep in sweeps])
    assert f"{len(found):,} points of 4 sweeps" in capsys.readouterr().out
    own = dict(_found(load_trained(runs / "segment"), Manifest.load(named), "lidarseg"))
    assert (found == np.concatenate([own[key].classes for key in sorted(own)])).all()
    assert cli.main(["submit", str(runs / "segment"), named, "--out", out, "--kind", "panoptic"]) == 2
    assert "finds no boxes; give one of a detector" in capsys.readouterr().err


def test_panoptic_points_of_both_heads(data, named, world, tmp_path):  # noqa: F811
    words = [f"data.url={data}", f"output={tmp_path}/run", "data.holdout=0", "train.steps=1", "train.batch=1"]
    trainer.train(load_config(SMALL, words, stage="finetune"), world)
    out = str(tmp_path / "out")
    words = ["detect.score_threshold=0", "detect.most=20"]
    assert cli.main(["submit", f"{tmp_path}/run", named, "--out", out, "--kind", "panoptic", *words]) == 0
    reader = ShardReader(Manifest.load(named), ("lidar",))
    sweeps = [reader.frame(scene, index).lidar for scene in range(2) for index in range(2)]
    check_sweeps(out, "panoptic", "val", {sweep.token: len(sweep.xyz) for sweep in sweeps})


def test_sets_whose_sweeps_have_no_token_and_other_stages_are_named(runs, data, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--kind", "lidarseg"]
    assert cli.main(["submit", str(runs / "segment"), data, *words]) == 2
    assert "does not know the token of its sweep; pack the set again" in capsys.readouterr().err
    assert cli.main(["submit", str(runs / "detect"), data, *words]) == 2
    assert "gives points no classes; give one of a segmentor" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_segmentor_finds_no_boxes(runs, data, tmp_path, capsys):
    assert cli.main(["submit", str(runs / "segment"), data, "--out", str(tmp_path / "results.json")]) == 2
    err = capsys.readouterr().err
    assert "is of stage segment, which finds no boxes; give one of a detector" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["ego", "lidar"])
def test_boxes_leave_the_frame_of_the_grid(kind):
    ego, lidar = np.eye(4), np.eye(4)
    ego[:3, 3], lidar[:3, 3] = (100, 50, 1), (1, 0, 2)
    lidar[:2, :2] = [[0, -1], [1, 0]]
    sweep = LidarSweep(np.zeros((1, 3), np.float32), lidar, ego, 0)
    trained = SimpleNamespace(config=SimpleNamespace(voxel_grid=SimpleNamespace(frame=kind)))
    pose = _to_global(trained, Frame("s", 0, "t", 0, ego, lidar=sweep))
    expected = (110, 50, 1) if kind == "ego" else (101, 60, 3)
    np.testing.assert_allclose(pose @ [10, 0, 0, 1], [*expected, 1], atol=1e-9)
    with pytest.raises(ValueError, match="frame s-0000 has no ego pose"):
        _to_global(trained, Frame("s", 0, "t", 0, None, lidar=sweep))
