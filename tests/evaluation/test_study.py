"""A study's report from MLflow alone."""

import ast
import csv
import shutil

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from occstream.evaluation.differences import difference
from occstream.evaluation.studyreport import study_report
from occstream.evaluation.studyscores import read_study

SIZES = (0, 20, 40, 80, 160)


def add(client, experiment, name, tags, metrics, status="FINISHED"):
    run = client.create_run(experiment, run_name=name, tags={k: str(v) for k, v in tags.items()})
    for key, value in metrics.items():
        client.log_metric(run.info.run_id, key, value)
    if status:
        client.set_terminated(run.info.run_id, status)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """MLflow's file with the runs of a study."""
    folder = tmp_path_factory.mktemp("study")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.experiment = client.create_experiment("study", artifact_location=(folder / "artifacts").as_uri())
    rng = np.random.default_rng(0)
    for seed in range(3):
        for n in SIZES:
            if n:
                tags = {"stage": "pretrain", "seed": seed}
                add(client, client.experiment, f"pre-{n}-{seed}", tags, {"eval/binary_iou": 50 + n / 10})
            for strategy, gain in (("S+B*", 1.0), ("S+B", 1.5)):
                if strategy == "S+B" and not n:
                    continue
                tags = {"strategy": strategy, "family": "LS", "pretrain_scenes": n, "finetune_scenes": 6, "seed": seed}
                tags |= {"control": "", "pretrain_run": f"pre-{n}-{seed}"}
                if not n:
                    tags["strategy"] = "S+B*|S+B"
                score = 8 + gain * np.log1p(n / 20) + rng.normal(0, 0.1)
                metrics = {"eval/miou": score, "eval/iou": 60 + score, "eval/binary_iou": 55 + n / 10}
                add(client, client.experiment, f"{strategy}-{n}-{seed}", tags, metrics | {"eval/class/car": score})
        for control, labelled, score in (("longer", 6, 8.5), ("labels", 12, 10.0), ("labels", 24, 14.0)):
            tags = {"strategy": "S+B*", "family": "LS", "pretrain_scenes": 0, "finetune_scenes": labelled, "seed": seed}
            add(
                client,
                client.experiment,
                control,
                tags | {"control": control},
                {"eval/miou": score + 0.1 * seed, "eval/iou": 60},
            )
    return folder / "mlflow.db"


@pytest.fixture
def client(store, tmp_path):
    """Of a copy of it."""
    client = MlflowClient(f"sqlite:///{shutil.copy(store, tmp_path)}")
    client.experiment = client.get_experiment_by_name("study").experiment_id
    return client


@pytest.mark.slow
def test_report_of_a_whole_study(client, tmp_path):
    text = study_report(client, "study", tmp_path / "out")
    study = read_study(client, "study")
    assert not study.missing()
    assert [a.strategy for a in study.arms] == ["S+B*", "S+B"], "a run of both strategies counts for both"
    assert study.points(study.arms[0], "eval/miou")[0] == study.points(study.arms[1], "eval/miou")[0]
    assert "S+B: 160 scenes against 0" in text
    assert "beyond the spread of seeds" in text
    assert "Equal compute" in text
    assert "worth" in text
    assert "log law fitted to the smaller sizes predicts" in text
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page, "nothing is fetched"
    rows = list(csv.DictReader((tmp_path / "out/study.csv").open()))
    assert len(rows) == 2 * len(SIZES) * 3 + 9
    assert {r["pretrain_scenes"] for r in rows} == {str(n) for n in SIZES}
    assert "| S+B | 160 | 3 |" in (tmp_path / "out/study.md").read_text()
    logged = client.search_runs([client.experiment], "tags.kind = 'report'")
    assert {f.path for f in client.list_artifacts(logged[0].info.run_id)} >= {"report.html", "scenes.png", "study.csv"}
    assert study_report(client, "study", None) is not None, "its own report run is no cell"


@pytest.mark.slow
def test_missing_cells_are_named_and_refused_or_marked(client, tmp_path):
    tags = {"strategy": "S+B", "family": "LS", "pretrain_scenes": 320, "finetune_scenes": 6, "seed": 0}
    add(client, client.experiment, "late", tags, {"eval/miou": 1.0}, status="FAILED")
    assert "late" in read_study(client, "study").unfinished
    tags["pretrain_scenes"] = 640
    add(client, client.experiment, "early", tags, {"eval/miou": 12.0, "eval/iou": 60})
    with pytest.raises(
        ValueError, match=r"6 cells .* S\+B\* pretrain_scenes=640 finetune_scenes=6 seed=0.*late is FAILED"
    ):
        study_report(client, "study", None)
    text = study_report(client, "study", tmp_path / "out", partial=True)
    assert "MISSING 6 cells" in text
    assert "cells are missing" in (tmp_path / "out/report.html").read_text()


def test_experiments_that_are_no_study(client):
    other = client.create_experiment("plain")
    add(client, other, "a", {"arm": "x"}, {"eval/miou": 1})
    assert study_report(client, "plain", None) is None
    with pytest.raises(ValueError, match=r"no experiment 'nothing'; it has: .*study"):
        study_report(client, "nothing", None)


def test_differences_say_what_is_known():
    assert "one seed" in str(difference([1.0], [2.0, 2.1]))
    assert "NOT beyond" in str(difference([1.0, 3.0], [2.0, 4.0]))
    clear = difference([1.0, 1.1, 0.9], [5.0, 5.1, 4.9])
    assert clear.verdict == "beyond the spread of seeds"
    # Welch by hand: variance 0.01 / 3 each, 4 degrees of freedom, t = 2.776.
    assert clear.high - clear.mean == pytest.approx(2.776 * (0.02 / 3) ** 0.5, rel=1e-3)


def test_statistics_know_no_html_and_the_page_no_statistics(repo_root):
    def imported(name):
        tree = ast.parse((repo_root / "evaluation" / f"{name}.py").read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
            n.module for n in nodes if isinstance(n, ast.ImportFrom)
        }

    for name in ("scaling", "studyscores", "studyfindings"):
        assert not {"html", "base64", "matplotlib.figure"} & imported(name)
    assert not {"numpy", "scipy", "statistics", "math"} & imported("studyreport")
