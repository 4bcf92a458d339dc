"""Open files against the number of ranks, without opening any."""

import resource

import pytest

from occstream.pretrain import limits
from occstream.pretrain.limits import OTHER, check_limits


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Sets the limit of files (soft, hard) and the queue of connections; tells what was set."""
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    given = []

    def make(soft, hard, queue=4096):
        monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: given.append(pair))
        (tmp_path / "proc/sys/net/core").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/sys/net/core/somaxconn").write_text(f"{queue}\n")
        return given

    return make


def test_too_few_files_for_so_many_ranks_are_an_error_with_a_number(system):
    system(1024, 1024)
    with pytest.raises(
        ValueError, match=rf"may open 1024 files here, but a rank of 1000 needs {1000 + OTHER} .*ulimit -n"
    ):
        check_limits(1000, 5)


def test_the_own_limit_is_raised_as_far_as_needed(system):
    given = system(1024, 1_048_576)
    assert check_limits(1000, 0) == ""
    assert given == [(1000 + OTHER, 1_048_576)]
    given.clear()
    system(resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert check_limits(100_000, 1) == ""
    assert given == []


def test_a_short_queue_of_connections_is_warned_of_where_all_connect(system):
    system(65536, 65536, queue=128)
    assert "somaxconn lets 128 wait" in check_limits(1000, 0)
    assert check_limits(1000, 1) == ""
    assert check_limits(8, 0) == ""
