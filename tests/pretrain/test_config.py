"""Recipes: strict, complete, and the same after a round trip."""

import contextlib
import dataclasses
import functools
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from occstream.launch.study import load_study
from occstream.models import model_entry
from occstream.pretrain.config import (
    Config,
    load_config,
    merge,
    packaged_recipes,
    parse_config,
    parse_overrides,
    read_recipe,
)

PACKAGED = list(packaged_recipes())


STUDIES = [name for name in PACKAGED if "strategies" in read_recipe(name)]
GRIDS = [name for name in PACKAGED if "axes" in read_recipe(name)]
CHAINS = [name for name in PACKAGED if "steps" in read_recipe(name)]


@pytest.mark.parametrize("name", STUDIES)
def test_packaged_studies_are_valid(name):
    """And the settings of every stage are those of a recipe."""
    study = load_study(name)
    for stage in (study.pretrain, study.finetune):
        for arm in study.strategies.values():
            for family in study.families.values():
                layers = (read_recipe(stage.recipe), study.set, family, stage.set, arm.pretrain, arm.finetune)
                assert parse_config(functools.reduce(merge, layers))


@pytest.mark.parametrize("name", GRIDS)
def test_packaged_grids_are_valid(name):
    """Every value of every axis changes what its stage has, or leaves the stage out."""
    study = load_study(name)
    recipes = {spec.stage: spec for spec in study.stages}
    for values in study.axes.values():
        for overrides in values.values():
            for stage, changes in overrides.items():
                spec = recipes[stage]
                layers = (read_recipe(spec.recipe), study.set, spec.set, changes or {}, {"stage": stage})
                assert parse_config(functools.reduce(merge, layers))


@pytest.mark.parametrize("name", CHAINS)
def test_packaged_chains_are_valid(name):
    """Every training of them has the settings of a recipe."""
    study = load_study(name)
    trainings = [step for step in study.steps.values() if step.recipe]
    assert trainings
    for step in trainings:
        stage = {"stage": step.stage} if step.stage else {}
        assert parse_config(functools.reduce(merge, (read_recipe(step.recipe), study.set, step.set, stage)))


@pytest.mark.parametrize("name", [n for n in PACKAGED if n not in (*STUDIES, *GRIDS, *CHAINS)])
def test_packaged_recipes_are_valid_and_survive_a_round_trip(name):
    config = load_config(name)
    assert parse_config(config.to_dict()).to_dict() == config.to_dict()


def _number_keys(cls, prefix=""):
    """Keys of a config that hold a number, or several."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _number_keys(hints[f.name], f"{prefix}{f.name}.")
            continue
        try:
            TypeAdapter(hints[f.name]).validate_python(1)
            yield prefix + f.name, "{}"
        except ValidationError:
            for count in (1, 2, 3):
                with contextlib.suppress(ValidationError):
                    TypeAdapter(hints[f.name]).validate_python((1,) * count)
                    if "str" not in str(hints[f.name]):
                        yield prefix + f.name, f"[{', '.join(['{0}'] * count)}]"
                        break


@pytest.mark.parametrize(
    ("value", "reason"), [(".inf", "finite"), ("-.inf", "finite"), (".nan", "finite"), ("-1", "negative")]
)
def test_numbers_that_mean_nothing_are_refused_in_every_key(value, reason):
    keys = [*_number_keys(Config), *_number_keys(model_entry("b2s_ls").config, "model.")]
    assert len(keys) > 60
    signed = {"augment.resize"}
    for key, form in keys:
        if (reason == "negative" and key in signed) or "Literal" in key or key == "train.zero_stage":
            continue
        with pytest.raises(ValueError, match=key.rsplit(".", 1)[-1]) as caught:
            load_config("tiny", [f"{key}={form.format(value)}"])
        assert "\n" not in str(caught.value)


def test_a_recipe_file_may_hold_negative_numbers_where_they_mean_something():
    config = load_config("r50", ["augment.resize=[-0.1, 0.2]", "track.axes={x: -3}"])
    assert config.augment.resize == (-0.1, 0.2)
    assert config.track.axes == {"x": -3}


def test_recipe_base_and_overrides_are_merged_in_order(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo-scratch\noptim: {lr: 0.5}\n")
    config = load_config(str(tmp_path / "mine.yaml"), ["train.batch=6", "track.tags.note=x y"], stage="finetune")
    assert (config.optim.lr, config.train.batch, config.train.epochs, config.data.scenes) == (0.5, 6, 18, 6)
    assert config.track.tags == {"study": "demo", "arm": "scratch", "note": "x y"}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("a=[1, 2]", [1, 2]),
        ("a=s3://b/c", "s3://b/c"),
        ("a=true", True),
        ("a=", ""),
        ("a=null", None),
    ],
)
def test_override_values(word, value):
    tree = parse_overrides([word])
    while isinstance(tree, dict):
        [tree] = tree.values()
    assert tree == value


def test_names_of_modules_keep_their_dots():
    words = ["set.optim.groups.images.body=0.1", "set.optim.groups.images=1", "optim.decay_groups.a.b=0"]
    groups = {"groups": {"images.body": 0.1, "images": 1.0}}
    assert parse_overrides(words) == {"set": {"optim": groups}, "optim": {"decay_groups": {"a.b": 0.0}}}


TREES = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8),
)


@given(TREES)
def test_merging_nothing_changes_nothing(tree):
    assert merge(tree, {}) == tree
    assert merge({}, tree) == tree
    assert merge(tree, tree) == tree


def test_broken_yaml_and_wrong_shapes_are_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("train: {lr: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="sections of keys"):
        read_recipe(str(tmp_path / "list.yaml"))
    with pytest.raises(ValueError, match="train: expected a section"):
        parse_config({"train": 3})


@pytest.mark.parametrize(
    "word",
    ["eval.batch=0", "eval.every=-1", "eval.scenes=0", "train.threads=-1", "train.log_every=0", "train.data_timeout=0"]
    + ["train.timeout_minutes=-1", "train.save_every=-2", "replay.draw=0"],
)
def test_a_setting_under_which_a_run_would_hang_or_divide_by_zero_is_refused(word):
    key, _, value = word.partition("=")
    with pytest.raises(ValueError, match=f"{key.rpartition('.')[2]} is {value}"):
        load_config("demo", [word])
