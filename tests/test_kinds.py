"""The kinds of tests: see ``conftest.py``."""

import multiprocessing
import subprocess
import sys

import pytest

from tests import conftest


class Item:
    """A test with markers and fixtures."""

    def __init__(self, *marks, fixtures=(), nodeid="test_x"):
        self.marks, self.fixturenames, self.nodeid = set(marks), fixtures, nodeid
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


def test_the_longest_files_begin_first(repo_root):
    assert [file for file in conftest.LONGEST if not (repo_root / file).is_file()] == []
    names = ["tests/test_a.py::b", f"{conftest.LONGEST[1]}::d", "tests/test_a.py::a", f"{conftest.LONGEST[0]}::c"]
    items = [Item(nodeid=name) for name in names]
    conftest.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[3], names[1], names[0], names[2]]


def test_a_unit_test_cannot_start_python():
    with pytest.raises(pytest.fail.Exception, match="mark it"):
        subprocess.run([sys.executable, "-c", ""], check=False)
    with pytest.raises(pytest.fail.Exception, match="mark it"):
        multiprocessing.get_context("spawn").Process(target=print).start()
    assert subprocess.run(["true"], check=False).returncode == 0
