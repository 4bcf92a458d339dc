"""``occstream refine`` over packed drives: results, parts, kills, and what is wrong with an input."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from occstream.evaluation.bayes import LAMBDAS, Confusions
from occstream.evaluation.drive import DriveReader
from occstream.evaluation.refinement import RefineConfig, SceneRefiner, measure, refine
from occstream.evaluation.votes import VoteConfig
from occstream.launch.cli import main
from occstream.sharding.manifest import Author, Manifest
from occstream.sharding.pack import pack
from tests.evaluation.drives import CAR, FREE, GRID, Street, predictions, semantics


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Four drives with labels and noisy predictions of them."""
    url = str(tmp_path_factory.mktemp("street") / "data")
    pack(Street(scenes=4), url, groups=("labels",), grid=GRID, scenes_per_shard=1)
    predictions(url, "pseudo-a")
    return url


def right(found, truth, only=None):
    """Share of voxels that are right, in percent."""
    return 100 * np.mean(
        [(found[k] == truth[k])[slice(None) if only is None else truth[k] == only].mean() for k in truth]
    )


def test_votes_and_bayes_bring_noisy_labels_nearer_to_the_truth(street):
    truth, noisy = (semantics(m) for m in (Manifest.load(street), Manifest.load(street).with_sidecar("pseudo-a")))
    votes = refine(street, "pseudo-a", "pseudo-v", RefineConfig(votes=VoteConfig("none", empty=1.0)))
    table, scores = measure(street, "pseudo-a", [2, 3], RefineConfig("bayes", movers="none"))
    assert scores.sum(1).argmax() == LAMBDAS.index(table.exponent)
    assert table.exponent >= 0.4, "errors are independent from frame to frame, but grids are not aligned"
    bayes = refine(street, "pseudo-a", "pseudo-b", RefineConfig("bayes"), table=table)
    before, voted, counted = (right(v, truth) for v in (noisy, semantics(votes.manifest), semantics(bayes.manifest)))
    assert before < 86
    assert voted > before + 6
    assert counted > voted
    assert votes.frames == bayes.frames == 24
    assert votes.changed > 0
    assert votes.view_from == "mask_camera of the labels"


def test_window_0_is_the_input(street):
    found = refine(street, "pseudo-a", "pseudo-zero", RefineConfig(window=0))
    want = semantics(Manifest.load(street).with_sidecar("pseudo-a"))
    assert all((v == want[k]).all() for k, v in semantics(found.manifest).items())
    assert found.changed == 0


def test_exact_labels_of_what_stands_survive_and_movers_need_a_rule(street):
    truth = semantics(Manifest.load(street))
    votes, kept = VoteConfig("none", empty=1.0), {}
    for movers in ("none", "parked", "tracks"):
        found = refine(street, "labels", f"pseudo-{movers}", RefineConfig(movers=movers, votes=votes))
        kept[movers] = right(semantics(found.manifest), truth, CAR)
        assert right(semantics(found.manifest), truth) > 97
    assert kept["none"] < 75, "the car that drives is voted away"
    assert kept["parked"] > kept["none"] + 15
    assert kept["tracks"] > 90


def test_a_kill_a_part_and_threads_give_the_bytes_of_one_run(street, monkeypatch, capsys):
    config = RefineConfig(votes=VoteConfig("lidar"))
    whole = refine(street, "pseudo-a", "pseudo-whole", config)
    calls = iter(range(100))
    frames = SceneRefiner.frames

    def dies(self, scene):
        for found in frames(self, scene):
            if next(calls) == 8:  # in the middle of the second shard
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(SceneRefiner, "frames", dies)
        with pytest.raises(KeyboardInterrupt):
            refine(street, "pseudo-a", "pseudo-parts", config)
    assert "pseudo-parts" not in Manifest.load(street).sidecars()
    second = refine(street, "pseudo-a", "pseudo-parts", config, part=(2, 2), threads=3)
    assert second.manifest is None
    first = refine(street, "pseudo-a", "pseudo-parts", config, part=(1, 2))
    assert first.skipped == 1, "the shard that was finished before the kill"
    ours, theirs = (semantics(m) for m in (whole.manifest, first.manifest))
    assert all((ours[k] == theirs[k]).all() for k in ours)
    sizes = [[s.size for s in m.shards if s.group == m.label_group] for m in (whole.manifest, first.manifest)]
    assert sizes[0] == sizes[1]
    fingerprint = first.manifest.fingerprint
    for place in Path(street).glob("*pseudo-parts*"):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert refine(street, "pseudo-a", "pseudo-parts", config).manifest.fingerprint == fingerprint
    again = refine(street, "pseudo-a", "pseudo-whole", config, threads=2)
    assert (again.frames, again.skipped) == (0, 4)
    assert again.manifest.fingerprint == whole.manifest.fingerprint
    other = refine(street, "pseudo-a", "pseudo-whole", RefineConfig(votes=VoteConfig("lidar"), window=3))
    assert other.skipped == 0, "another window, other labels"


def test_new_predictions_are_refined_again(street):
    predictions(street, "pseudo-n", seed=1)
    first = refine(street, "pseudo-n", "pseudo-m", RefineConfig(window=1))
    predictions(street, "pseudo-n", seed=2)
    second = refine(street, "pseudo-n", "pseudo-m", RefineConfig(window=1))
    assert second.skipped == 0
    assert first.manifest.fingerprint != second.manifest.fingerprint


def test_the_command_measures_a_table_once_and_says_what_it_did(street, tmp_path, capsys):
    table = tmp_path / "table.json"
    words = ["refine", street, "--input", "pseudo-a", "--rule", "bayes", "--window", "2", "--table", str(table)]
    assert main([*words, "--name", "pseudo-c", "--holdout", "2"]) == 0
    said = capsys.readouterr().out
    assert "measured on 2 held-out scenes" in said
    assert "in view: mask_camera of the labels" in said
    assert "published pseudo-c" in said
    assert main([*words, "--name", "pseudo-d", "--part", "1/2"]) == 0
    assert "measured on 2 scenes of pseudo-a of street" in (said := capsys.readouterr().out)
    assert "part 1/2 is done" in said
    assert main([*words, "--name", "pseudo-d", "--part", "2/2"]) == 0
    c, d = (semantics(Manifest.load(street).with_sidecar(name)) for name in ("pseudo-c", "pseudo-d"))
    assert all((c[k] == d[k]).all() for k in c)
    assert main(["verify", street, "--group", "pseudo-c"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "pseudo-x"], "has no sidecar group 'pseudo-x'"),
        (["--input", "pseudo-a", "--rule", "bayes"], "give --holdout N"),
        (["--input", "pseudo-a", "--rule", "bayes", "--holdout", "1"], "hold out two scenes"),
        (["--input", "pseudo-a", "--rule", "bayes", "--holdout", "9"], "has 4 scenes"),
        (["--input", "pseudo-a", "--holdout", "2"], "belong to --rule bayes"),
        (["--input", "pseudo-a", "--empty", "2"], "must be 0 to 1"),
        (["--input", "pseudo-a", "--evidence"], "is read by rule bayes"),
        (
            ["--input", "pseudo-a", "--rule", "bayes", "--holdout", "2", "--evidence"],
            "holds no evidence; predict with --keep",
        ),
        (["--input", "pseudo-a", "--keep-truth", "5"], "5 scenes requested"),
        (["--input", "pseudo-a", "--window", "501"], "must be 0 to 500"),
        (["--input", "pseudo-a", "--part", "3/2"], "needs i/n"),
        (["--input", "pseudo-a", "--name", "pseudo-a"], "choose another name"),
        (["--input", "pseudo-a", "--name", "Labels"], "pseudo-…"),
    ],
)
def test_wrong_input_is_one_line(street, capsys, words, said):
    name = [] if "--name" in words else ["--name", "pseudo-w"]
    before = Manifest.load(street).sidecars()
    assert main(["refine", street, *name, *words]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert Manifest.load(street).sidecars() == before


@pytest.mark.parametrize("data", ["[]", "{", '{"counts": [[1]], "exponent": 1}', '{"counts": "x", "exponent": 1}'])
def test_a_damaged_table_is_refused(street, tmp_path, capsys, data):
    path = tmp_path / "table.json"
    path.write_text(data)
    words = ["--input", "pseudo-a", "--rule", "bayes", "--table", str(path), "--name", "pseudo-w"]
    assert main(["refine", street, *words]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_table_of_other_classes_is_refused(street, tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(Confusions(np.ones((9, 2, 20, 20), np.int64)).to_dict()))
    words = ["--input", "pseudo-a", "--rule", "bayes", "--table", str(path), "--name", "pseudo-w"]
    assert main(["refine", street, *words]) == 2
    assert "has 19 classes, taxonomy occ3d has 17" in capsys.readouterr().err


def test_voxels_that_the_labels_do_not_know_may_be_silent(street):
    # All are known here: the setting changes nothing, and the group is another one.
    a = refine(street, "pseudo-a", "pseudo-k", RefineConfig(window=2))
    b = refine(street, "pseudo-a", "pseudo-l", RefineConfig(window=2, voxels="known"))
    first, second = semantics(a.manifest), semantics(b.manifest)
    assert all((first[k] == second[k]).all() for k in first)
    assert any((v == FREE).any() for v in first.values())


def test_without_masks_the_calibration_tells_what_is_in_view(tmp_path):
    url = str(tmp_path / "rig")
    pack(Street(scenes=1, frames=3, rig=True), url, groups=("cameras", "labels"), grid=GRID)
    found = refine(url, "labels", "pseudo-r", RefineConfig(window=1))
    assert found.view_from == "the cameras' calibration, as of each scene's first frame"
    reader = DriveReader(Manifest.load(url), "labels")
    _, view = reader.read(0, 1)
    reader.close()
    x, y, z = np.moveaxis(GRID.centers(), -1, 0)
    ahead = np.where(x > 0, x, np.nan)
    edge = np.maximum(np.abs(y / ahead), np.abs((z - 1) / ahead) * 12 / 8)  # of the image, at 1
    assert (view[edge < 0.999]).all()
    assert not view[~(edge < 1.001)].any()
    assert 100 < view.sum() < GRID.size / 2
    pack(Street(scenes=1, frames=3, rig=True), str(tmp_path / "bare"), groups=("labels",), grid=GRID)
    found = refine(str(tmp_path / "bare"), "labels", "pseudo-r", RefineConfig(window=1))
    assert "neither mask_camera nor calibration" in found.view_from


def test_grids_in_the_lidar_frame_are_placed_by_the_sweep(tmp_path, capsys):
    grid = dataclasses.replace(GRID, frame="lidar")
    street = Street(scenes=1, frames=5, grid=grid, rig=True)
    pack(street, str(tmp_path / "data"), groups=("lidar", "labels"), grid=grid)
    truth = semantics(Manifest.load(str(tmp_path / "data")))
    for movers in ("none", "tracks"):
        config = RefineConfig(movers=movers, votes=VoteConfig("none", empty=1.0))
        found = semantics(refine(str(tmp_path / "data"), "labels", f"pseudo-{movers}", config).manifest)
        assert right(found, truth) > 97
    assert right(found, truth, CAR) > 90, "boxes are in the ego frame"
    pack(street, str(tmp_path / "bare"), groups=("labels",), grid=grid)
    assert main(["refine", str(tmp_path / "bare"), "--input", "labels", "--name", "pseudo-r"]) == 2
    assert "no group 'lidar'" in capsys.readouterr().err


def test_scenes_of_the_truth_keep_it(street, capsys):
    """And a refiner may not learn from them: they count as scenes that the network has seen."""
    words = ["refine", street, "--input", "pseudo-a", "--window", "1", "--name", "pseudo-t"]
    assert main([*words, "--keep-truth", "2"]) == 0
    assert "2 scenes keep the set's own labels" in capsys.readouterr().out
    base = Manifest.load(street)
    kept = {base.scenes[i].name for i in base.subset(2)}
    made, truth = semantics(base.with_sidecar("pseudo-t")), semantics(base)
    plain = semantics(refine(street, "pseudo-a", "pseudo-u", RefineConfig(window=1)).manifest)
    for key, said in made.items():
        same = truth if key.rsplit("-", 1)[0] in kept else plain
        assert (said == same[key]).all(), key
    known = Author("network", frozenset({"street-9"}))
    base.with_sidecar("pseudo-a").publish_sidecar(base.fingerprint, known)
    refine(street, "pseudo-a", "pseudo-v", RefineConfig(window=0), kept=base.subset(2))
    assert Manifest.load(street).author("pseudo-v") == Author("network", frozenset(kept | {"street-9"}))


def test_evidence_tells_kinds_of_free_apart(street, tmp_path):
    """A network that is in doubt where it misses the occupied: what is in doubt in several frames comes back."""
    truth, url = semantics(Manifest.load(street)), str(tmp_path / "data")
    shutil.copytree(street, url)
    predictions(url, "pseudo-e", evidence=True)
    found = {}
    for evidence in (False, True):
        config = RefineConfig("bayes", window=3, evidence=evidence)
        table, _ = measure(url, "pseudo-e", [0, 1], config)
        assert table.evidence == evidence
        found[evidence] = right(
            semantics(refine(url, "pseudo-e", f"pseudo-{evidence}".lower(), config, table=table).manifest), truth
        )
        with pytest.raises(ValueError, match="measured with"):
            refine(url, "pseudo-e", "pseudo-x", dataclasses.replace(config, evidence=not evidence), table=table)
    assert found[True] > found[False]
