"""Predictions of scenes that a network was trained on are too good to learn corrections from: who knows, and who refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from occstream.evaluation.refinement import RefineConfig, refine
from occstream.launch.cli import main
from occstream.launch.predict import predict_checkpoint
from occstream.pretrain import trainer
from occstream.pretrain.checkpoint import Checkpoint, scenes_of
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from occstream.pretrain.trained import evaluate_checkpoint
from occstream.sharding.check import verify
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Author, Manifest
from occstream.sharding.pack import pack
from occstream.sharding.stream import ShardReader
from tests.evaluation.drives import Street, predictions, semantics
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE

GRID = VoxelGrid("street", (-6, -6, -1), (6, 6, 1), (0.5, 0.5, 0.5))
SMALL = str(HERE / "small-occfiner.yaml")
FAST = ("train.batch=2", "train.steps=1", "window.references=0", "data.holdout=0", "trust=false", "train.log_every=1")
STREET = (f"grid={','.join(map(str, (*GRID.lower, *GRID.upper, 0.5)))}", *FAST)
SCENES = [f"street-{i}" for i in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, world):  # noqa: F811
    """Drives, predictions of them by a network that saw none, and two refiners that saw two drives each: networks enough."""
    root = tmp_path_factory.mktemp("honest")
    base = pack(Street(scenes=5, frames=2, grid=GRID), str(root / "data"), groups=("labels",), grid=GRID)
    predictions(base.url, "pseudo-noise")
    assert base.author("pseudo-noise") == Author()
    base.with_sidecar("pseudo-noise").publish_sidecar(base.fingerprint, Author("noise", frozenset()))
    for name, scenes in (("a", SCENES[:2]), ("b", SCENES[2:4])):
        words = [f"data.scene_names=[{','.join(scenes)}]", f"output={root}/{name}"]
        train(root, world, *words)
    return root


def train(root, world, *words: str) -> trainer.Result:  # noqa: F811
    return trainer.train(load_config(SMALL, [*STREET, f"data.url={root}/data", *words]), world)


def streams(root, *words: str) -> TrainData:
    config = load_config(SMALL, [*STREET, f"data.url={root}/data", *words])
    return TrainData(config, World(0, 1, torch.device("cpu")))


def test_checkpoints_name_the_scenes_of_all_that_they_come_from(place, world, tmp_path):  # noqa: F811
    assert scenes_of(place / "a") == set(SCENES[:2])
    words = [f"data.scene_names=[{SCENES[4]}]", f"output={tmp_path}/c", f"train.init={place}/a"]
    train(place, world, *words)
    assert scenes_of(tmp_path / "c") == {*SCENES[:2], SCENES[4]}
    train(place, world, *words, "train.steps=2")
    assert Checkpoint(tmp_path / "c").state["step"] == 2
    assert scenes_of(tmp_path / "c") == {*SCENES[:2], SCENES[4]}, "after a resume too"


def test_what_starts_from_a_file_of_weights_does_not_know(place, world, tmp_path):  # noqa: F811
    assert main(["export", str(place / "a"), str(tmp_path / "a.safetensors")]) == 0
    train(
        place, world, f"data.scene_names=[{SCENES[4]}]", f"output={tmp_path}/d", f"train.init={tmp_path}/a.safetensors"
    )
    assert scenes_of(tmp_path / "d") is None
    found = predict_checkpoint(tmp_path / "d", f"{place}/data", "pseudo-d")
    assert found.manifest.author("pseudo-d").trained_on is None
    with pytest.raises(ValueError, match="pseudo-d does not say which scenes its network was trained on"):
        streams(place, "data.input=pseudo-d")


def test_a_refiner_is_not_trained_on_predictions_that_are_too_good(place, capsys):
    found = predict_checkpoint(place / "a", f"{place}/data", "pseudo-a")
    author = found.manifest.author("pseudo-a")
    assert author == Author(Checkpoint(place / "a").digest, frozenset(SCENES[:2]))
    with pytest.raises(
        ValueError, match="trained on 2 of these 5 scenes, such as street-0, street-1; a refiner learns nothing"
    ):
        streams(place, "data.input=pseudo-a")
    streams(place, "data.input=pseudo-a", f"data.scene_names=[{','.join(SCENES[2:])}]")
    [note] = streams(place, "data.input=pseudo-a", "trust=true").notes
    assert note.startswith("trust=true: ")
    assert "street-0, street-1" in note
    # Votes of such predictions are theirs as well.
    voted = refine(f"{place}/data", "pseudo-a", "pseudo-voted", RefineConfig(window=1))
    assert voted.manifest.author("pseudo-voted") == author
    kept = predict_checkpoint(place / "a", f"{place}/data", "pseudo-kept", truth=3)
    assert len(kept.manifest.author("pseudo-kept").trained_on) >= 3, "true labels are too good as well"


def test_folds_predict_each_scene_by_a_run_that_has_not_seen_it(place, capsys):
    url = f"{place}/data"
    words = ["predict", str(place / "a"), str(place / "b"), url, "--folds", "--name", "pseudo-folds", "eval.batch=3"]
    assert main(words) == 0
    base = Manifest.load(url)
    digests = [Checkpoint(place / name).digest for name in "ab"]
    assert base.author("pseudo-folds") == Author("+".join(digests), frozenset())
    streams(place, "data.input=pseudo-folds")
    both, alone = semantics(base.with_sidecar("pseudo-folds")), {}
    for name in "ab":
        alone[name] = semantics(predict_checkpoint(place / name, url, f"pseudo-only-{name}").manifest)
    for key, said in both.items():
        by = "b" if key.startswith(("street-0", "street-1")) else "a"
        assert (said == alone[by][key]).all()


def test_folds_that_leave_a_scene_out_are_refused(place, capsys):
    url = f"{place}/data"
    assert main(["predict", str(place / "a"), str(place / "a"), url, "--folds", "--name", "pseudo-x"]) == 2
    assert (
        "were trained on 2 scenes, such as street-0, street-1: add a run that holds them out" in capsys.readouterr().err
    )
    assert main(["predict", str(place / "a"), url, "--folds", "--name", "pseudo-x"]) == 2
    assert "--folds needs two runs or more" in capsys.readouterr().err
    assert "pseudo-x" not in Manifest.load(url).sidecars()


def test_a_refiner_says_when_it_is_given_another_networks_predictions(place, capsys):
    url = f"{place}/data"
    predict_checkpoint(place / "a", url, "pseudo-a")
    capsys.readouterr()
    evaluate_checkpoint(place / "a", ["eval.scene_names=[street-4]"])
    assert "has learned" not in capsys.readouterr().out
    evaluate_checkpoint(place / "a", ["eval.scene_names=[street-4]", "eval.input=pseudo-a"])
    said = (
        f"pseudo-a is of network {Checkpoint(place / 'a').digest}; this refiner has learned the errors of network noise"
    )
    assert said in capsys.readouterr().out
    predict_checkpoint(place / "b", url, "pseudo-b", overrides=("data.input=pseudo-a",))
    assert said in capsys.readouterr().out


def test_predictions_are_made_again_when_their_input_has_changed(place):
    url = f"{place}/data"
    base = Manifest.load(url)
    predictions(url, "pseudo-changing", seed=1)
    first = predict_checkpoint(place / "b", url, "pseudo-e", overrides=("data.input=pseudo-changing",))
    again = predict_checkpoint(place / "b", url, "pseudo-e", overrides=("data.input=pseudo-changing",))
    assert (first.skipped, again.skipped) == (0, 5), "shards"
    predictions(url, "pseudo-changing", seed=2)
    third = predict_checkpoint(place / "b", url, "pseudo-e", overrides=("data.input=pseudo-changing",))
    assert third.skipped == 0
    assert base.author("pseudo-e").trained_on is None, "nobody knows whose predictions these were"


@pytest.mark.parametrize(("field", "value"), [("trained_on", 5), ("trained_on", [7]), ("network", ["a"])])
def test_a_forged_sidecar_is_refused(place, tmp_path, field, value):
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data/manifest.pseudo-noise.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"{field} is"):
        Manifest.load(str(tmp_path / "data")).author("pseudo-noise")


def test_a_refiners_logits_vote_and_both_orders_run(place, capsys):
    """Local then global in one command, whose second half is the two commands it stands for; and global then local."""
    url = f"{place}/data"
    words = ["refine", url, "--input", "pseudo-noise", "--window", "1"]
    assert main([*words, "--local", str(place / "b"), "--name", "pseudo-both"]) == 0
    assert f"pseudo-both-local: pseudo-noise as {place}/b corrects it, 10 frames made" in capsys.readouterr().out
    base = Manifest.load(url)
    both = base.with_sidecar("pseudo-both")
    assert base.author("pseudo-both") == Author(Checkpoint(place / "b").digest, frozenset(SCENES[2:4]))
    assert main(["predict", str(place / "b"), url, "--name", "pseudo-l", "--keep", "top2"]) == 0
    assert main(["refine", url, "--input", "pseudo-l", "--window", "1", "--soft", "--name", "pseudo-m"]) == 0
    soft = semantics(base.with_sidecar("pseudo-m"))
    assert all((said == soft[key]).all() for key, said in semantics(both).items())
    assert main(["refine", url, "--input", "pseudo-l", "--window", "1", "--name", "pseudo-h"]) == 0
    hard = semantics(base.with_sidecar("pseudo-h"))
    assert any((said != hard[key]).any() for key, said in soft.items()), "logits are not classes"
    assert main([*words, "--name", "pseudo-g"]) == 0
    assert main(["predict", str(place / "b"), url, "--name", "pseudo-gl", "data.input=pseudo-g"]) == 0
    assert main([*words, "--soft", "--name", "pseudo-x"]) == 2
    assert (
        "pseudo-noise has no second classes; predict with --keep top2 or logits, or refine" in capsys.readouterr().err
    )


def test_evidence_is_kept_beside_the_two_best_classes(place):
    found = predict_checkpoint(place / "b", f"{place}/data", "pseudo-evidence", keep="evidence").manifest
    labels = ShardReader(found, ("pseudo-evidence",)).frame(0, 1).labels
    assert labels.evidence.shape == GRID.shape
    assert labels.ranked is not None
    assert (labels.evidence[labels.binary] > labels.evidence[~labels.binary].mean()).all()
    assert verify(f"{place}/data", group="pseudo-evidence") == []


def test_parts_of_a_local_refinement_wait_for_each_other(place, capsys):
    url = f"{place}/data"
    words = [
        "refine",
        url,
        "--input",
        "pseudo-noise",
        "--window",
        "1",
        "--name",
        "pseudo-p",
        "--local",
        str(place / "b"),
    ]
    assert main([*words, "--part", "1/2"]) == 0
    assert (
        "part 1/2 of pseudo-p-local is done; when all parts are, run the same commands again" in capsys.readouterr().out
    )
    for part in ("2/2", "1/2"):
        assert main([*words, "--part", part]) == 0
    whole = semantics(Manifest.load(url).with_sidecar("pseudo-p"))
    assert len(whole) == 10
