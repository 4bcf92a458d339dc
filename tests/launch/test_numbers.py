"""Numbers on the command line: each says what it may be, and what means nothing is refused in a line."""

import argparse

import pytest

from occstream.launch.cli import _parser, main
from occstream.sharding.grid import get_grid
from occstream.sharding.labelconfig import LabelConfig


def options():
    [commands] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.option_strings and action.type is not None:
                yield f"{name} {action.option_strings[0]}", action.type


def test_every_whole_number_says_from_where_on():
    found = dict(options())
    assert len(found) > 30
    assert [name for name, kind in found.items() if kind is int] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect x --frames 0", "--frames: must be at least 1, not 0"),
        ("card x --frames -1", "--frames: must be at least 1, not -1"),
        ("subset x --scenes 0", "--scenes: must be at least 1, not 0"),
        ("subset x --holdout -1", "--holdout: must be at least 0, not -1"),
        ("shard synthetic --max-failures -1", "--max-failures: must be at least 0, not -1"),
        ("shard synthetic --workers two", "--workers: 'two' is not an integer"),
    ],
)
def test_numbers_out_of_range_are_named_with_their_option(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_label_settings_are_finite(value):
    with pytest.raises(ValueError, match=r"max_range is .*, must be at least 0 and finite"):
        LabelConfig(max_range=value)


@pytest.mark.parametrize("name", ["nan,0,0,1,1,1,1", "0,0,0,inf,1,1,1", "0,0,0,1,1,1,nan"])
def test_grids_are_finite(name):
    with pytest.raises(ValueError, match="must be finite numbers"):
        get_grid(name)


@pytest.mark.parametrize("words", [["--dilation", "2"], ["--no-level"], ["--labels", "none", "--min-points", "3"]])
def test_options_of_labels_from_lidar_are_not_ignored(words, tmp_path, capsys):
    command = ["shard", "synthetic", "scenes=1", "frames=1", "--out", str(tmp_path / "out")]
    assert main([*command, *words]) == 2
    flag = next(w for w in reversed(words) if w.startswith("--"))
    assert f"{flag} is given, but no labels are made from LiDAR here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["lots", "nan", "inf", "-1"])
def test_the_size_of_the_cache_is_a_number(value, monkeypatch):
    from occstream.pretrain.reading import cache

    monkeypatch.setenv("OCCSTREAM_CACHE_GB", value)
    with pytest.raises(ValueError, match=f"OCCSTREAM_CACHE_GB is '{value}': give GiB from 0, such as 64"):
        cache("s3://bucket/data")
