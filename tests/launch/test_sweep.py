"""Studies: planned, run, interrupted, broken in one cell, written as jobs, reported."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from occstream.launch.cli import main
from occstream.launch.grid import finish, plan
from occstream.launch.study import load_study
from occstream.pretrain.distributed import World
from occstream.pretrain.events import read_events
from occstream.pretrain.streams import EvalData, TrainData
from tests.forked import Forked
from tests.pretrain.small import RECIPE, environment, pack_small

STUDY = {
    "name": "little",
    "pretrain": {"recipe": RECIPE, "scenes": [0, 3], "set": {"train": {"steps": 3}}},
    "finetune": {"recipe": RECIPE, "scenes": [2], "set": {"train": {"steps": 2, "batch": 2}}},
    "strategies": {
        "Multi": {
            "pretrain": {"model": {"strategy": "replacing", "dense_layers": 1}},
            "finetune": {"model": {"strategy": "multi", "dense_layers": 1}, "data": {"binary_from": "semantic"}},
        },
        "Replacing": {
            "pretrain": {"model": {"strategy": "replacing", "dense_layers": 1}},
            "finetune": {"model": {"strategy": "replacing", "dense_layers": 1}},
        },
        "S+B*": {"finetune": {"data": {"binary_from": "semantic"}}},
        "S+B": {"replay": True, "without_replay": {"data": {"binary_from": "semantic"}}},
    },
    "reference": "S+B*",
    "controls": ["longer", "more-s"],
    "label_curve": [3],
    "seeds": [0],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("sweep") / "data")
    pack_small(url)
    return url


def write(folder: Path, data: str, **changes) -> str:
    content = {
        **STUDY,
        "output": str(folder / "runs"),
        "set": {"data": {"url": data}},
        "replay": {"url": data},
        **changes,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "study.yaml")


def test_plan_shares_runs_and_keeps_the_rules(data, tmp_path):
    runs = plan(load_study(write(tmp_path, data)))
    names = [r.name for r in runs]
    assert names.count("pre-LS-Multi-3-s0") == 1, "Multi and Replacing start from the same weights"
    assert "pre-LS-Replacing-3-s0" not in names
    by_name = {r.name: r for r in runs}
    assert by_name["LS-Replacing-3-2-s0"].needs == "pre-LS-Multi-3-s0"
    both = by_name["LS-SpBx-0-2-s0"]
    assert [c["strategy"] for c in both.cells] == ["S+B*", "S+B"], "with nothing to replay they are the same"
    replay, more = by_name["LS-SpB-3-2-s0"], by_name["LS-SpB-3-2-more-s-s0"]
    assert (replay.frames, more.frames) == (2 * 4, 2 * 4)
    assert more.config.train.batch == 4
    assert not more.config.replay.url
    longer = by_name["LS-SpBx-0-2-longer-s0"]
    assert longer.frames >= 2 * 2 + by_name["pre-LS-SpBx-3-s0"].frames
    assert by_name["LS-SpBx-0-3-labels-s0"].frames == 2 * 2
    for number, run in enumerate(runs):
        assert not run.needs or run.needs in names[:number]


def test_binary_scenes_of_another_world_change_nothing_but_where_they_come_from(data, tmp_path):
    pack_small(str(tmp_path / "other"), scenes=4, seed=1, style="rural", weather="night")
    source = {"url": str(tmp_path / "other"), "holdout": 0}
    strategies = {"S+B": {"replay": True}, "S+B shifted": {"replay": True, "source": source}, "gone": None}
    runs = {
        r.name: r for r in plan(load_study(write(tmp_path, data, strategies=strategies, controls=[], reference="S+B")))
    }
    assert not any("gone" in name for name in runs)
    pre, own = runs["pre-LS-SpB_shifted-3-s0"].config, runs["pre-LS-SpB-3-s0"].config
    assert (pre.data.url, pre.data.holdout) == (source["url"], 0)
    fine = runs["LS-SpB_shifted-3-2-s0"].config
    assert (fine.data.url, fine.replay.url, fine.replay.holdout) == (data, source["url"], 0)
    world = World(0, 1, torch.device("cpu"))
    assert EvalData(pre, world).scenes == EvalData(own, world).scenes == EvalData(fine, world).scenes
    assert not TrainData(pre, world).scenes & TrainData(own, world).scenes


def test_wrong_studies_are_named(data, tmp_path):
    for changes, reason in (
        ({"seeds": []}, "seeds must not be empty"),
        ({"strategies": {"A": {"source": {"subset_seed": 1}}}, "reference": "A"}, "would change the evaluation set"),
        ({"reference": "x"}, "reference is 'x', must be one of Multi"),
        ({"stratgies": {}}, "unknown key 'stratgies'; did you mean 'strategies'"),
        ({"finetune": {"recipe": RECIPE, "scenes": [50]}}, "50 scenes requested"),
        (
            {"set": {"data": {"url": data, "holdout": 0}, "eval": {"url": data}}},
            "are used for both training and evaluation",
        ),
        ({"set": {"train": {"lerning": 1}}}, "unknown key 'train.lerning'"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(load_study(write(tmp_path, data, **changes)))


def axes_study(folder: Path, data: str, **changes) -> str:
    """Learning rates with and without pre-training, which does not depend on the rate."""
    content = {
        "name": "rates",
        "output": str(folder / "runs"),
        "set": {"data": {"url": data, "scenes": 2}},
        "stages": [
            {"stage": "pretrain", "recipe": RECIPE, "set": {"train": {"steps": 3}}},
            {"stage": "finetune", "recipe": RECIPE, "set": {"train": {"steps": 2}}},
        ],
        "axes": {
            "start": {"binary": {}, "scratch": {"pretrain": None}},
            "rate": {"0.1": {"finetune": {"optim": {"lr": 0.1}}}, "0.2": {"finetune": {"optim": {"lr": 0.2}}}},
        },
        "seeds": [0, 1],
        **changes,
    }
    (folder / "axes.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "axes.yaml")


def test_a_study_of_any_axes_crosses_them_and_shares_parents(data, tmp_path):
    study = load_study(axes_study(tmp_path, data))
    runs = plan(study)
    by_name = {r.name: r for r in runs}
    assert list(by_name)[:4] == [
        "pretrain-binary-0_1-s0",
        "finetune-binary-0_1-s0",
        "finetune-binary-0_2-s0",
        "finetune-scratch-0_1-s0",
    ]
    assert len(runs) == 2 * (1 + 4), "both rates start from the same weights"
    shared, alone = by_name["finetune-binary-0_2-s1"], by_name["finetune-scratch-0_2-s1"]
    assert (shared.needs, alone.needs) == ("pretrain-binary-0_1-s1", "")
    assert shared.config.train.init == str(tmp_path / "runs" / shared.needs)
    assert (shared.config.optim.lr, shared.config.train.seed) == (0.2, 1)
    finish(runs, study)
    assert shared.config.track.tags.items() >= {"start": "binary", "rate": "0.2", "arm": "binary 0.2"}.items()
    assert by_name[shared.needs].config.track.tags["arm"] == "pretrain-binary-0_1"
    for changes, reason in (
        ({"stages": []}, "stages: give a list of different stages"),
        ({"axes": {"rate": {"low": {"finetun": {}}}}}, "axes.rate.low.finetun: no such stage"),
        ({"axes": {"seed": {"a": {}}}}, "axes.seed: the name is taken"),
        ({"axes": {"rate": {"low": {"finetune": {"optim": {"lrr": 1}}}}}}, "finetune-low-s0: unknown key 'optim.lrr'"),
        ({"strategies": {}}, "unknown key 'strategies'"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(load_study(axes_study(tmp_path, data, **changes)))


# The command, with runs that start at once.
FORKING = """
import sys
from occstream.launch import cli, sweep
from tests.forked import Forks
sweep.subprocess.Popen = Forks()
sys.exit(cli.main())
"""


@pytest.mark.process
def test_a_killed_sweep_goes_on_and_a_broken_cell_stops_nothing_else(data, tmp_path):
    strategies = {k: STUDY["strategies"][k] for k in ("S+B*", "S+B")}
    broken = {"finetune": {"optim": {"lr": 1e30, "warmup": 1, "clip": 1e30}, "train": {"steps": 8}}}
    path = write(tmp_path, data, strategies={**strategies, "Broken": broken}, controls=[], label_curve=[])
    script = tmp_path / "sweep.py"
    script.write_text(FORKING)
    command = [script, "sweep", path, "--jobs", "2"]
    process = Forked(command, environment(), tmp_path / "killed.log", parent=True)
    while process.poll() is None and "\n[1/" not in process.log.read_text():
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # its runs notice, save and stop; the next sweep waits for them
    ended = re.findall(r"^\[\d/6\] (\S+) done", process.log.read_text(), re.MULTILINE)
    assert ended
    logs = {p: p.stat().st_mtime for p in (tmp_path / "runs" / name / "log.txt" for name in ended)}
    for p in logs:
        assert [e["status"] for e in read_events(p.parent / "metrics.jsonl") if "status" in e][-1:] == ["FINISHED"]
    again = Forked(command, environment(), tmp_path / "again.log", parent=True)
    said, _ = again.communicate(280)
    assert again.returncode == 1, said
    assert "2 of " in said
    assert "not finite" in said
    assert all(p.stat().st_mtime == when for p, when in logs.items()), "finished runs are left alone"
    finished = [p.parent.name for p in (tmp_path / "runs").glob("*/metrics.jsonl")]
    assert {"LS-SpBx-0-2-s0", "LS-SpBx-3-2-s0", "LS-SpB-3-2-s0"} <= set(finished)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert main(["compare", "--uri", uri, "--experiment", "little"]) == 2, "broken cells are missing"
    assert main(["compare", "--uri", uri, "--experiment", "little", "--partial", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.html").exists()
    # The page that MLflow shows has its keys from what runs log.
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("little")
    view = json.loads(experiment.tags["mlflow.sharedViewState.occstream"])
    shown = {c.get("metricKey") or c["yaxis"]["key"] for c in view["compareRunCharts"]} | {"axis/pretrain_scenes"}
    [run] = client.search_runs([experiment.experiment_id], "tags.`mlflow.runName` = 'LS-SpB-3-2-s0'")
    assert shown <= set(run.data.metrics)
    assert view["groupBy"]["groupByKeys"][0]["groupByData"] in run.data.tags


def test_a_server_that_does_not_answer_is_one_line(capsys):
    assert main(["compare", "--uri", "http://127.0.0.1:9", "--experiment", "little"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: MLflow: ")
    assert "is the server up" in said


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_jobs_for_a_cluster(data, tmp_path, kind, capsys):
    path = write(tmp_path, data)
    assert main(["sweep", path, "--write", kind]) == 0
    study = load_study(path)
    runs = plan(study)
    finish(runs, study)
    jobs = tmp_path / "runs/jobs"
    for stage in ("pretrain", "finetune"):
        lines = (jobs / f"{stage}.txt").read_text().splitlines()
        assert len(lines) == sum(r.config.stage == stage for r in runs)
        assert all(Path(line.split()[-1]).exists() for line in lines)
        if kind == "slurm":
            text = (jobs / f"{stage}.sbatch").read_text()
            assert f"--array=0-{len(lines) - 1}" in text
            assert subprocess.run(["bash", "-n", str(jobs / f"{stage}.sbatch")], check=False).returncode == 0
        else:
            job = yaml.safe_load((jobs / f"{stage}.yaml").read_text())
            assert job["spec"]["completions"] == len(lines)
            assert job["spec"]["completionMode"] == "Indexed"
    if kind == "slurm":
        fake = tmp_path / "bin"
        fake.mkdir()
        (fake / "sbatch").write_text('#!/bin/bash\necho "$@" >> "$CALLS"\necho 17\n')
        (fake / "sbatch").chmod(0o755)
        env = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        subprocess.run(["bash", str(jobs / "submit.sh")], env=env, check=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert "--dependency" not in calls[0]
        assert "--dependency=afterany:17" in calls[1]
    capsys.readouterr()
