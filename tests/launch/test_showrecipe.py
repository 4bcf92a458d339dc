"""``occstream recipe``: what is printed is what the config holds."""

import subprocess
import sys

import pytest
import yaml

from occstream.launch import cli
from occstream.launch.showrecipe import show_recipe
from occstream.pretrain.config import dotted_keys, load_config
from occstream.pretrain.configdocs import recipe_keys


def test_every_recipe_is_listed(capsys):
    assert cli.main(["recipe"]) == 0
    out = capsys.readouterr().out
    assert "recipe  r50 " in out
    assert "study   study-b2s " in out


def test_every_key_has_a_type_and_an_explanation_and_reads_back_as_its_value():
    config = load_config("r50-offboard")
    keys = recipe_keys(config)
    assert len({k.name for k in keys}) == len(keys)
    assert {k.name for k in keys} >= {k for k in dotted_keys(type(config.train), "train.")}
    assert [k.name for k in keys if not k.doc or not k.type] == []
    shown = [line for line in show_recipe("r50-offboard").split("\n") if not line.startswith(" ")]
    for line, key in zip(shown, keys, strict=True):
        value = config.to_dict()
        for part in key.name.split("."):
            value = value[part]
        assert yaml.safe_load(line) == {key.name: value}


def test_one_key_shows_value_and_default_and_a_section_its_keys(capsys):
    assert cli.main(["recipe", "r50", "model.checkpointing"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == "model.checkpointing: true   # default false"
    assert "Recompute activations" in second
    assert show_recipe("r50", "augment").count("\naugment.") == len(recipe_section("augment")) - 1


def recipe_section(name):
    return [k for k in recipe_keys(load_config("r50")) if k.name.startswith(f"{name}.")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["r50", "optim.lrr"], "no key 'optim.lrr'; did you mean optim.lr"),
        (["r50", "train.lr"], "train.lr is now optim.lr: occstream recipe r50 optim.lr"),
        (["r51"], "unknown recipe 'r51'; did you mean 'r50'?"),
        (["study-b2s"], "is a study, not a recipe"),
    ],
)
def test_wrong_names_are_one_line(words, said, capsys):
    assert cli.main(["recipe", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.process
def test_a_reader_that_stops_early_is_no_error():
    """As in ``occstream recipe | head -1``."""
    command = [sys.executable, "-m", "occstream.launch.cli", "recipe"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 141
