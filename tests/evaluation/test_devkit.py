"""Scores of 200 random frames against those that the nuScenes devkit gave for them (infra/metrics_check.sh)."""

import importlib
import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads(Path(__file__).with_name("devkit.json").read_text())


@pytest.fixture
def check(monkeypatch):
    """Modules of the check, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "infra/metrics_check"))
    return importlib.import_module


def test_the_golden_scores_are_the_devkits():
    assert GOLDEN["versions"]["nuscenes-devkit"] == "1.2.0"
    assert {kind: len(scores) for kind, scores in GOLDEN.items()} == {
        "versions": 5,
        "detection": 107,
        "panoptic": 69,
        "lidarseg": 18,
    }


@pytest.mark.parametrize("kind", ["detection", "panoptic", "lidarseg"])
def test_ours_are_equal(kind, check):
    frames, ours = check("frames"), check("ours")
    scores = ours.score_boxes(frames.boxes()) if kind == "detection" else ours.score_points(frames.points())[kind]
    for name, value in GOLDEN[kind].items():
        if value is None:
            assert math.isnan(scores[name]), name
        else:
            assert scores[name] == pytest.approx(value, rel=0, abs=1e-9), name


def test_a_difference_is_found(check):
    differences = check("compare").differences
    nan = math.nan
    found = differences({"a": 1.0, "b": nan, "c": nan, "d": 0.5}, {"a": 1.0, "b": nan, "c": 1.0, "d": 0.25, "e": 0.0})
    assert found == {"a": 0, "b": 0, "c": math.inf, "d": 0.25, "e": math.inf}
