"""A run says which code and which data it comes from, without secrets."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from occstream.pretrain.provenance import Reading, code_version, datasets, description, source_tags


def manifest(url, fingerprint="f" * 32, group="labels") -> Any:
    return SimpleNamespace(
        url=url,
        fingerprint=fingerprint,
        source="nuscenes",
        label_group=group,
        scenes=[None] * 3,
        num_frames=120,
        labels="native",
        taxonomy="occ3d",
        grid=None,
    )


def test_a_data_set_is_named_once_with_all_that_it_is_used_for():
    one, other = manifest("s3://bucket/set"), manifest("sets/other", "e" * 32, "pseudo-teacher")
    readings = [Reading("training", one, 2, 80), Reading("replay", other, 3, 120), Reading("evaluation", one, 1, 40)]
    first, second = datasets(readings)
    assert (first["name"], first["digest"], first["context"]) == ("nuscenes", "f" * 32, "training, evaluation")
    assert first["source_type"] == "s3"
    assert json.loads(first["source"]) == {"uri": "s3://bucket/set"}
    assert json.loads(first["profile"]) == {"scenes": 3, "frames": 120, "labels": "native", "taxonomy": "occ3d"}
    assert (second["name"], second["source_type"]) == ("nuscenes/pseudo-teacher", "local")
    assert json.loads(second["source"])["uri"].startswith("/")


def test_secrets_stay_out_of_data_sets_and_descriptions():
    reading = Reading("training", manifest("https://me:word@host/set?token=abc&x=1"), 1, 2)
    [found] = datasets([reading])
    assert "word" not in str(found) + str(reading)
    assert "abc" not in str(found) + str(reading)
    assert "host/set" in found["source"]


@pytest.mark.parametrize(
    ("code", "commit"),
    [("0123abc", "0123abc"), ("a" * 40 + "+", "a" * 40), ("0.2.0", None), ("", None), ("release-7", None)],
)
def test_only_a_commit_is_given_as_one(code, commit):
    tags = source_tags(code)
    assert tags.get("mlflow.source.git.commit") == commit
    assert tags["mlflow.source.name"]


def test_the_version_is_the_commit_of_the_checkout():
    assert len(code_version().removesuffix("+")) == 40


def test_a_description_says_what_is_learned_from_what():
    train = SimpleNamespace(init="runs/pretrain", seed=3, batch=4, precision="bf16")
    config = SimpleNamespace(stage="finetune", output="runs/x", train=train)
    task: Any = SimpleNamespace(title="b2s", config=config, stages={"finetune": "Fine-tunes."})
    text = description(task, [Reading("training", manifest("/set"), 2, 1080)], steps=1200, processes=1, parameters=5000)
    assert text.splitlines() == [
        "**b2s**, stage finetune. Fine-tunes.",
        "",
        "* training: 2 scenes (1,080 frames) of `/set`",
        "* start: weights of `runs/pretrain`, seed 3",
        "* 1,200 steps of 4 frames on 1 process, 5,000 parameters, bf16",
        "",
        "Scores again: `occstream evaluate runs/x`",
    ]
