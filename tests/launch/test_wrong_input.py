"""Each wrong input: one clear line, a non-zero exit code, nothing half-written."""

import json

import pytest

from occstream.launch import cli
from occstream.launch.run import main
from occstream.pretrain.events import read_events
from tests.forked import Forked
from tests.pretrain.small import RECIPE, ROOT, environment, pack_small
from tests.sharding import toy_nuscenes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = tmp_path_factory.mktemp("wrong") / "data"
    pack_small(str(url), scenes=3)
    return url


@pytest.fixture
def said(capsys):
    """The one line on stderr."""

    def read():
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
        assert len(lines) == 1, lines
        return lines[0]

    return read


def pretrain(data, out, *overrides):
    return main("pretrain", ["--recipe", RECIPE, f"data.url={data}", f"output={out}", "train.steps=1", *overrides])


def trained(data, out, *overrides, code=0):
    """A run in a process of its own, because DeepSpeed cannot be started twice in one. Returns what it printed."""
    command = [ROOT / "launch/pretrain.py", "--recipe", RECIPE, f"data.url={data}", f"output={out}", "train.steps=1"]
    process = Forked([*command, *overrides], environment(), out.with_name(f"{out.name}.log"))
    text, _ = process.communicate(200)
    assert process.returncode == code, text
    return text


def test_missing_table(tmp_path, said):
    toy_nuscenes.write(tmp_path / "toy")
    (tmp_path / "toy/v1.0-toy/ego_pose.json").unlink()
    assert cli.main(["shard", "nuscenes", "--root", str(tmp_path / "toy"), "--out", str(tmp_path / "out")]) == 2
    assert "ego_pose.json: table is missing" in said()
    assert not (tmp_path / "out").exists()


def test_truncated_jpeg(tmp_path, said):
    toy_nuscenes.write(tmp_path / "toy", scenes=2)
    image = sorted((tmp_path / "toy/samples/CAM_FRONT").iterdir())[-1]
    image.write_bytes(image.read_bytes()[:-200])
    command = ["shard", "nuscenes", "--root", str(tmp_path / "toy"), "--out", str(tmp_path / "out"), "--grid", "tiny"]
    assert cli.main(command) == 2
    line = said()
    assert "scene-0001" in line
    assert "CAM_FRONT: JPEG is truncated" in line
    assert not (tmp_path / "out/manifest.json").exists()


def test_unknown_source_option_grid_and_recipe(tmp_path, said):
    assert cli.main(["shard", "nuscene", "--root", ".", "--out", str(tmp_path)]) == 2
    assert "did you mean 'nuscenes'" in said()
    assert cli.main(["shard", "synthetic", "scene=3", "--out", str(tmp_path)]) == 2
    assert "did you mean 'scenes'" in said()
    assert cli.main(["shard", "synthetic", "--grid", "tinny", "--out", str(tmp_path)]) == 2
    assert "presets: occ3d" in said()
    assert main("pretrain", ["--recipe", "demo-pretain"]) == 2
    assert "did you mean 'demo-pretrain'" in said()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.scene=2", "unknown key 'data.scene'; did you mean 'data.scenes'"),
        ("lr=1e-3", "did you mean 'optim.lr'"),
        ("model.flor=3", "did you mean 'model.floor'"),
        ("train.zero_stage=4", "zero_stage is 4, must be 0, 1, 2 or 3"),
        ("train.batch=many", "train.batch = 'many'"),
        ("data.scenes=50", "50 scenes requested, but it has 3"),
        ("data.scene_names=[synthetic-v2-s0-00001]", "did you mean 'synthetic-v2-s0-000001'"),
        ("model.compact_factor=8", "compact_factor is 8"),
        ("train.steps", "write key=value"),
        ("data.cameras=[CAM_TOP]", "has no camera 'CAM_TOP', only CAM_"),
    ],
)
def test_wrong_recipe_values(data, tmp_path, said, override, message):
    assert pretrain(data, tmp_path / "run", override) == 2
    assert message in said()


def test_options_that_need_another_say_so(tmp_path, said, capsys):
    assert cli.main(["predict", "run", "data", "--name", "pseudo-a", "--holdout", "2"]) == 2
    assert "--holdout requires --truth" in said()
    assert cli.main(["label", "synthetic", "--out", str(tmp_path / "out"), "--scenes", "2"]) == 2
    assert "--every and --scenes require --quality" in said()
    with pytest.raises(SystemExit):
        main("pretrain", ["--recipe", "demo", "--price", "2"])
    assert "require --dry-run" in capsys.readouterr().err


def test_manifest_of_another_grid_or_taxonomy(data, tmp_path, said):
    assert pretrain(data, tmp_path / "run", "grid=occ3d") == 2
    assert "its labels are on grid 'tiny' (48, 48, 8)" in said()
    assert pretrain(data, tmp_path / "run", "taxonomy=openscene") == 2
    assert "labels use taxonomy 'occ3d', the recipe expects 'openscene'" in said()


@pytest.mark.process
def test_no_data_and_missing_shard(tmp_path, said):
    assert pretrain(tmp_path / "nothing", tmp_path / "run") == 2
    assert "no manifest there" in said()
    pack_small(str(tmp_path / "data"), scenes=3)
    (tmp_path / "data/cameras/cameras-000000.tar").unlink()
    error = trained(tmp_path / "data", tmp_path / "run", "data.holdout=0", "train.steps=5", code=2)
    assert [line for line in error.splitlines() if "cameras-000000.tar" in line and line.startswith("error: ")]
    assert "Traceback" not in error
    assert cli.main(["verify", str(tmp_path / "data")]) == 1


@pytest.mark.process
def test_checkpoint_of_another_model_or_damaged(data, tmp_path, said):
    trained(data, tmp_path / "pre")
    fine = ["--recipe", RECIPE, f"data.url={data}", "train.steps=1", f"train.init={tmp_path / 'pre'}"]
    assert main("finetune", [*fine, f"output={tmp_path / 'fine'}", "model.lift_channels=4"]) == 2
    assert "have another shape" in said()
    assert pretrain(data, tmp_path / "pre", "optim.lr=1.0", "train.steps=2") == 2
    assert "was trained with optim.lr=0.001, this run has optim.lr=1.0" in said()
    weights = next((tmp_path / "pre").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main("finetune", [*fine, f"output={tmp_path / 'fine'}"]) == 2
    assert "model.safetensors: damaged" in said()
    assert main("finetune", [*fine[:-1], f"train.init={tmp_path / 'none'}", f"output={tmp_path / 'fine'}"]) == 2
    assert "no such checkpoint" in said()
    assert cli.main(["evaluate", str(tmp_path / "none")]) == 2
    assert "no complete checkpoint there" in said()


@pytest.mark.process
def test_training_goes_on_without_its_mlflow_server(data, tmp_path):
    error = trained(data, tmp_path / "run", "track.uri=http://127.0.0.1:9")
    assert "does not answer" in error
    assert f"occstream sync {tmp_path / 'run'}" in error
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    assert any("train/loss" in e.get("metrics", {}) for e in events)
    # The numbers get there once there is a server.
    assert cli.main(["sync", str(tmp_path / "run"), "--uri", "http://127.0.0.1:9"]) == 2
    assert cli.main(["sync", str(tmp_path / "run"), "--uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0


@pytest.mark.process
def test_checkpoint_evaluates_by_command(data, tmp_path, capsys):
    trained(data, tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--picture", str(tmp_path / "pictures")]) == 0
    assert "3 frames: binary IoU" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


@pytest.mark.process
def test_losses_that_are_not_finite_end_the_run_before_they_reach_the_weights(data, tmp_path):
    run = tmp_path / "run"
    error = trained(data, run, "optim.lr=1e30", "optim.warmup=1", "train.steps=9", "optim.clip=1e30", code=3)
    assert "no update was made" in error
    [report] = run.glob("nonfinite-step-*.json")
    assert len(json.loads(report.read_text())["keys"]) == 4
