"""Encoders of runs go to detection frameworks and come back, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from occstream.launch import cli
from occstream.models.voxels import voxelize
from occstream.pretrain import trainer
from occstream.pretrain.checkpoint import read_weights
from occstream.pretrain.config import load_config
from occstream.pretrain.tasks.registry import task_of
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE, pack_sweeps

# The published network on a grid that costs nothing.
FULL = ("model.width=16", "model.bev_channels=[128,256]", "model.bev_layers=[5,5]", "model.bev_up=256")
WORDS = (*FULL, "train.batch=1", "train.steps=1", "data.holdout=0")
SMALL = str(HERE / "small-spot.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return pack_sweeps(str(tmp_path_factory.mktemp("sweeps")), scenes=1, frames=1)


@pytest.fixture(scope="module", params=["plain", "res"])
def run(request, data, world, tmp_path_factory):  # noqa: F811
    """A run of one step of each variant."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    config = load_config(SMALL, [*WORDS, f"data.url={data}", f"output={out}", f"model.variant={request.param}"])
    trainer.train(config, world)
    return request.param, out, config


@pytest.mark.parametrize("framework", ["openpcdet", "mmdet3d"])
def test_a_run_is_handed_on_whole_and_comes_back(run, framework, tmp_path, capsys):
    variant, folder, config = run
    out = tmp_path / "out.pth"
    words = ["--for", framework, "--variant", variant, "--in-features", "x,y,z,intensity,t", "--intensity-scale", "255"]
    assert cli.main(["export", str(folder), str(out), *words]) == 0
    count = {"plain": 156, "res": 226}[variant] - (16 if (framework, variant) == ("mmdet3d", "res") else 0)
    assert f"{count} of {count} tensors of the encoder for {framework}" in capsys.readouterr().out
    about = json.loads((tmp_path / "occstream.json").read_text())["out.pth"]
    assert (about["variant"], about["tensors"], about["intensity_scale"]) == (variant, count, 255)
    assert about["in_features"] == ["x", "y", "z", "intensity", "time"]

    wide = load_config(SMALL, [*WORDS, f"model.variant={variant}", "model.in_features=[x,y,z,intensity,time]"])
    task, before = task_of(wide), task_of(config).model().eval()
    found = task.adopt(read_weights(out))
    assert set(found) == set(task.transfer(task.model()).expected)
    before.load_state_dict({**before.state_dict(), **{k: v for k, v in read_weights(folder).items()}})
    after = task.model().eval()
    after.load_state_dict({**after.state_dict(), **found})
    xyz = (torch.rand(500, 3) - 0.5) * torch.tensor([30.0, 30, 4])
    ours, time = torch.rand(500, 1), torch.rand(500, 1)
    sweep, grid = torch.zeros(500, dtype=torch.int64), config.model.points_grid()
    narrow, more = (
        voxelize(torch.cat([xyz, ours], 1), sweep, grid),
        voxelize(torch.cat([xyz, 255 * ours, time], 1), sweep, grid),
    )
    with torch.no_grad():
        expected = before.encoder(narrow.features, narrow.indices, 1).bev
        torch.testing.assert_close(after.encoder(more.features, more.indices, 1).bev, expected, rtol=1e-5, atol=1e-5)


def test_training_starts_from_a_detector_of_openpcdet(run, data, world, tmp_path, capsys):  # noqa: F811
    variant, folder, _ = run
    assert cli.main(["export", str(folder), str(tmp_path / "out.pth"), "--for", "openpcdet"]) == 0
    words = [*WORDS, f"data.url={data}", f"output={tmp_path}/run", f"model.variant={variant}"]
    trainer.train(load_config(SMALL, [*words, f"train.init={tmp_path}/out.pth"]), world)
    count = {"plain": 156, "res": 226}[variant]
    assert f"all {count} declared tensors loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--for", "openpcdet", "--variant", "OTHER"], "leave --variant out, or train another"),
        (["--for", "openpcdet", "--in-features", "x,y,z"], "the encoder was trained with intensity"),
        (["--variant", "plain"], "--variant, --in-features and --intensity-scale require --for"),
    ],
)
def test_what_cannot_be_handed_on_is_a_sentence_and_no_file(run, words, said, tmp_path, capsys):
    variant, folder, _ = run
    other = {"plain": "res", "res": "plain"}[variant]
    words = [other if word == "OTHER" else word for word in words]
    assert cli.main(["export", str(folder), str(tmp_path / "out.pth"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_widths_of_nobody_are_refused(data, world, tmp_path, capsys):  # noqa: F811
    words = [*WORDS[2:3], *WORDS[4:], f"data.url={data}", f"output={tmp_path}/run"]
    trainer.train(load_config(SMALL, words), world)
    assert cli.main(["export", f"{tmp_path}/run", f"{tmp_path}/out.pth", "--for", "mmdet3d"]) == 2
    # The sizes of the run, those of the published network, and a recipe that has these.
    err = capsys.readouterr().err
    assert "of width 4, bev_channels (8, 8), bev_up 8; the published one has width 16, bev_channels (128, 256)" in err
    assert err.endswith("as recipe spot has\n")
    assert not (tmp_path / "out.pth").exists()
