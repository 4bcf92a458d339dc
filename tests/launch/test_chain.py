"""Studies of several steps: planned, run in order, stopped by what fails, and scored by scene."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from occstream.evaluation.labelnoise import NoiseConfig, attach_corrupted
from occstream.evaluation.labelscores import paired, score_groups, scores_of, table
from occstream.launch import sweep
from occstream.launch.cli import main
from occstream.launch.study import load_study
from occstream.pretrain.config import load_config
from occstream.pretrain.streams import training_scenes
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from tests.evaluation.drives import GRID, Street
from tests.pretrain.small import HERE

REFINER = str(HERE / "small-occfiner.yaml")
STEPS = {
    "table": {"run": "inspect {output}/data"},
    "net-s{seed}": {"recipe": REFINER, "set": {"data": {"input": "pseudo-a", "url": "{output}/data"}}},
    "again-s{seed}": {"run": "predict {output}/net-s{seed} {output}/data --name pseudo-b-s{seed}"},
}


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Two drives, and their labels with errors of two seeds."""
    url = str(tmp_path_factory.mktemp("chain") / "data")
    pack(Street(scenes=2, frames=3), url, groups=("labels",), grid=GRID)
    for seed in range(2):
        attach_corrupted(url, f"pseudo-b-s{seed}", NoiseConfig(seed=seed))
    return url


def write(folder: Path, street: str, **changes) -> str:
    rows = {"truth": "labels", "b": "pseudo-b-s{seed}"}
    content = {"name": "chain", "output": str(folder / "runs"), "steps": STEPS, "score": {"url": street, "rows": rows}}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": [0, 1], **changes}, sort_keys=False))
    return str(path)


def test_steps_of_every_seed_follow_each_other_and_shared_ones_come_once(street, tmp_path):
    steps = load_study(write(tmp_path, street)).plan()
    assert [(s.name, s.needs) for s in steps] == [
        ("table", ""),
        ("net-s0", "table"),
        ("again-s0", "net-s0"),
        ("net-s1", "table"),
        ("again-s1", "net-s1"),
    ]
    assert steps[2].line == f"predict {tmp_path}/runs/net-s0 {tmp_path}/runs/data --name pseudo-b-s0"
    assert (steps[3].config.train.seed, steps[3].config.data.url) == (1, f"{tmp_path}/runs/data")
    assert steps[1].cell_id != steps[3].cell_id
    assert load_config(f"{tmp_path}/runs/recipes/net-s1.yaml", []).output == f"{tmp_path}/runs/net-s1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": {}}, "steps: give at least one"),
        ({"steps": dict(reversed(STEPS.items()))}, "come before those with it"),
        ({"steps": {"a": {"run": "inspect {seed}"}}}, "names {seed}, and its own name does not"),
        ({"steps": {"a": {"run": "inspect x", "recipe": REFINER}}}, "either a recipe or run"),
        ({"steps": {"a": {"rnu": "inspect x"}}}, "unknown key 'steps.a.rnu'"),
        ({"steps": {"a": {"recipe": REFINER, "set": {"train": {"lerning": 1}}}}}, "a: unknown key 'train.lerning'"),
        ({"score": {"url": "x"}}, "score: give a url and rows"),
    ],
)
def test_a_wrong_study_is_one_line(street, tmp_path, capsys, changes, said):
    assert main(["sweep", write(tmp_path, street, **changes), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.process
def test_every_step_runs_after_the_one_it_reads_and_the_rows_are_scored(street, tmp_path, monkeypatch, capsys):
    journal = tmp_path / "journal"
    note = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
    monkeypatch.setattr(sweep, "command", lambda study, step: [sys.executable, "-c", note, str(journal), step.name])
    assert main(["sweep", write(tmp_path, street), "--jobs", "1"]) == 0
    assert journal.read_text().split() == ["table", "net-s0", "again-s0", "net-s1", "again-s1"]
    out = capsys.readouterr().out
    assert "| truth | 1 | 100.00 | 100.00 | – | – |" in out
    assert "| b | 2 | " in out
    saved = json.loads((tmp_path / "runs" / "scores.json").read_text())
    assert saved["scenes"] == ["street-0", "street-1"]
    assert saved["rows"]["b"] == ["pseudo-b-s0", "pseudo-b-s1"]
    assert (tmp_path / "runs" / "scores.md").read_text() in out


@pytest.mark.process
def test_what_needs_a_failed_step_is_not_started(street, tmp_path, monkeypatch, capsys):
    fails = "import sys; sys.exit(sys.argv[1] == 'net-s0')"
    monkeypatch.setattr(sweep, "command", lambda study, step: [sys.executable, "-c", fails, step.name])
    assert main(["sweep", write(tmp_path, street), "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "2 of 5 steps failed" in out
    assert "again-s0: net-s0, which it starts from, failed" in out
    assert "again-s1 done" in out


def test_it_is_no_array_job(street, tmp_path, capsys):
    assert main(["sweep", write(tmp_path, street), "--write", "slurm"]) == 2
    assert "run it on one machine, without --write" in capsys.readouterr().err


def test_scores_count_what_the_truth_knows():
    counts = np.array([[6, 0, 2], [0, 0, 0], [4, 0, 88]])  # class 1 does not occur
    assert scores_of(counts) == pytest.approx((50.0, 50.0))
    assert np.isnan(scores_of(np.diag([0, 0, 9]))).all()


def test_gains_are_paired_by_scene():
    """Scenes differ by far more than rows do: the interval is of the differences."""
    counts = lambda hit: np.array([[hit, 100 - hit], [0, 900]])  # noqa: E731
    first, other = np.stack([counts(10), counts(60), counts(90)]), np.stack([counts(13), counts(64), counts(92)])
    (gain, half), _ = paired([first], [other])
    assert gain == pytest.approx(3.0)
    assert half == pytest.approx(4.3026527 / 3**0.5)  # t of 2 degrees of freedom, differences 3, 4, 2
    assert "| b | 1 | 56.33 | 56.33 | +3.00 ± 2.48 |" in table({"a": [first], "b": [other]})


def test_groups_are_scored_scene_by_scene(street):
    found = score_groups(street, ["labels", "pseudo-b-s0"], [0, 1])
    assert found["labels"].shape == (2, 18, 18)
    assert (found["labels"].sum((1, 2)) == 3 * GRID.size).all()
    assert not (found["labels"] * (1 - np.eye(18, dtype=int))).any()
    assert scores_of(found["pseudo-b-s0"][0])[0] < 95
    camera = score_groups(street, ["labels"], [0], camera=True)["labels"]
    assert camera.sum() == 3 * GRID.size // 2, "the mask is the half in front"


def test_folds_divide_the_scenes_of_a_subset(street):
    base = Manifest.load(street)
    scenes = [training_scenes(base, load_config(REFINER, [f"data.fold={i}/2", "data.holdout=0"]).data) for i in (1, 2)]
    assert sorted(scenes[0] + scenes[1]) == [0, 1]
    assert len(scenes[0]) == len(scenes[1]) == 1
    with pytest.raises(ValueError, match="fold 1/2 of one scene leaves nothing"):
        training_scenes(base, load_config(REFINER, ["data.fold=1/2", "data.scenes=1", "data.holdout=0"]).data)
    for wrong in ("0/2", "3/2", "1/1", "x"):
        with pytest.raises(ValueError, match="must be i/n"):
            load_config(REFINER, [f"data.fold={wrong}"])
