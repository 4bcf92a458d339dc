"""Settings side by side: each is measured in a process of its own."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest

from occstream.launch import bench_step, cli
from tests.pretrain.small import HERE

RECIPE = str(HERE / "small-spot.yaml")  # needs no library of images


class Here:
    """Stands for a pool of one process; remembers what it was asked for."""

    asked: list  # set by the test

    def __init__(self, workers, context):
        assert (workers, context.get_start_method()) == (1, "spawn")
        self.fresh = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, recipe, settings, stage, **how):
        assert self.fresh, "a process was used twice"
        self.fresh = False
        Here.asked.append(settings)
        future = Future()
        future.set_result(work(recipe, settings, stage, **how))
        return future


def test_settings_are_measured_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "ProcessPoolExecutor", Here)
    Here.asked, out = [], tmp_path / "found.json"
    words = ["bench", "step", "--recipe", RECIPE, "optim.lr=0.1", "--repeats", "1", "--json", str(out)]
    assert cli.main([*words, "--against", "optim.lr=0.2 optim.warmup=9"]) == 0
    assert Here.asked == [
        ("optim.lr=0.1",),
        ("optim.lr=0.1", "optim.lr=0.2", "optim.warmup=9"),
    ]
    found = json.loads(out.read_text())
    given, other = found[""], found["optim.lr=0.2 optim.warmup=9"]
    assert given["peak_bytes"] > 0
    assert given["step"] > 0
    assert other["loss"] == pytest.approx(given["loss"], rel=1e-5)  # neither setting changes what is computed
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in table[2:4]] == ["as", "optim.lr=0.2"]
    ratio = other["peak_bytes"] / given["peak_bytes"]
    assert f"{ratio:.2f}" in table[3]


def test_settings_that_do_not_exist_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "ProcessPoolExecutor", Here)
    Here.asked = []
    assert cli.main(["bench", "step", "--recipe", RECIPE, "--against", "optim.rl=0"]) == 2
    assert "unknown key 'optim.rl'" in capsys.readouterr().err
