"""The kinds of tests: see ``conftest.py``."""

import multiprocessing
import subprocess
import sys

import pytest

from tests import conftest


class Item:
    """A test with markers and fixtures."""

    nodeid = "test_x"

    def __init__(self, *marks, fixtures=()):
        self.marks, self.fixturenames = set(marks), fixtures
        self.add_marker = self.marks.add

    def get_closest_marker(self, name):
        return name in self.marks


def test_every_test_is_of_one_kind(request):
    assert request.session.items
    assert [item.nodeid for item in request.session.items if len(conftest.kinds_of(item)) != 1] == []


def test_what_is_not_marked_is_a_unit_test_unless_it_needs_the_object_store():
    plain, slow, stored = Item(), Item("slow"), Item(fixtures=("tmp_path", "endpoint"))
    conftest.pytest_collection_modifyitems([plain, slow, stored])
    assert [plain.marks, slow.marks, stored.marks] == [{"unit"}, {"slow"}, {"process"}]
    with pytest.raises(pytest.UsageError, match="test_x is marked unit and slow"):
        conftest.pytest_collection_modifyitems([Item("slow", "unit")])


def test_a_unit_test_cannot_start_python():
    with pytest.raises(pytest.fail.Exception, match="mark it"):
        subprocess.run([sys.executable, "-c", ""], check=False)
    with pytest.raises(pytest.fail.Exception, match="mark it"):
        multiprocessing.get_context("spawn").Process(target=print).start()
    assert subprocess.run(["true"], check=False).returncode == 0
