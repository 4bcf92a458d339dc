"""A long job says how far it is: in place on a terminal, line by line in a log."""

from __future__ import annotations

import pytest

from occstream.launch.progress import Bar


class Clock:
    """Time that passes when it is told."""

    now = 0.0

    def __call__(self):
        return self.now


def shown(bar, clock, steps, total, notes=()):
    with bar:
        for done, seconds in steps:
            clock.now += seconds
            bar(done, total, notes)


def test_a_log_gets_lines_with_rate_and_rest(capsys):
    clock = Clock()
    bar = Bar("refine", terminal=False, clock=clock)
    shown(bar, clock, [(done, 2.0) for done in range(1, 41)], 40, ["1 scene failed"])
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert not error
    assert len(lines) == 11
    assert lines[0] == "refine: 1/40 shards, 2.0 s a shard, eta 0:01:18, 1 scene failed"
    assert lines[-1] == "refine: 40/40 shards, 2.0 s a shard, took 0:01:20, 1 scene failed"
    assert "\r" not in out


def test_slow_shards_get_a_line_each_minute(capsys):
    clock = Clock()
    shown(Bar("map", terminal=False, clock=clock), clock, [(done, 61.0) for done in range(1, 6)], 1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith("eta 16:51:35")


def test_shards_that_were_there_do_not_shorten_the_rest(capsys):
    """The rate is that of the last ones: a job that goes on after a hundred is as slow as before."""
    clock = Clock()
    steps = [(done, 0.0) for done in range(1, 101)] + [(done, 10.0) for done in range(101, 141)]
    shown(Bar("predict", terminal=False, clock=clock), clock, steps, 200)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "predict: 140/200 shards, 10.0 s a shard, eta 0:10:00"


def test_a_terminal_gets_a_bar(capsys):
    clock = Clock()
    shown(Bar("shard", terminal=True, clock=clock), clock, [(1, 0.1), (2, 0.1)], 2, ["7 frames"])
    out, error = capsys.readouterr()
    assert not out
    assert "shard: 100%|" in error
    assert "2/2 shards" in error
    assert "10.0 shards/s, took 0:00:00, 7 frames" in error
    assert error.endswith("\n")


def test_an_error_ends_the_line_of_the_bar(capsys):
    def fails(clock):
        with Bar("shard", terminal=True, clock=clock) as bar:
            clock.now += 1
            bar(1, 3)
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="full"):
        fails(Clock())
    assert capsys.readouterr().err.endswith("\n")
