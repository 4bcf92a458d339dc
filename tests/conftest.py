"""Fixtures that more than one folder of tests uses, and the three kinds of tests.

Every test is of one kind, by marker:

* ``process``: it starts processes with Python in them, or needs the object store, which is one. Tests that use the fixture
  ``endpoint`` are of this kind by themselves.
* ``slow``: one process, but more than about two seconds of CPU time.
* ``unit``: everything else. No marker needs to be written; a unit test that starts a process with Python in it fails.

``process`` and ``slow`` are written at the test (``@pytest.mark.slow``) or for its file (``pytestmark = pytest.mark.process``).
Where a process takes long, ``process`` is the kind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

# Kernels are tested through Triton's interpreter, which must be chosen before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Expected values are the CPU's, also on a machine with a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

KINDS = ("unit", "process", "slow")

# Begun first, longest first: whole files go to the cores, and a long one that begins last leaves the others idle.
LONGEST = (
    "tests/pretrain/test_distributed.py",
    "tests/pretrain/test_rankfaults.py",
    "tests/pretrain/test_ranks.py",
    "tests/sharding/test_object_storage.py",
    "tests/launch/test_sweep.py",
    "tests/sharding/test_cache.py",
    "tests/pretrain/test_guards.py",
    "tests/launch/test_runs.py",
    "tests/infra/test_gpu_check.py",
    "tests/pretrain/test_tasks.py",
    "tests/pretrain/test_panoocc.py",
    "tests/sharding/test_physicalai.py",
    "tests/sharding/test_synthetic.py",
    "tests/sharding/test_job.py",
    "tests/sharding/test_sources.py",
    "tests/models/test_kernels.py",
)


def kinds_of(item: pytest.Item) -> list[str]:
    """The kinds that a test is marked with, one if all is well."""
    return [kind for kind in KINDS if item.get_closest_marker(kind)]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "endpoint" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
        elif not kinds_of(item):
            item.add_marker("unit")
        if len(kinds_of(item)) > 1:
            raise pytest.UsageError(f"{item.nodeid} is marked {' and '.join(kinds_of(item))}: one kind for each test")
    place = {file: n for n, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    if "unit" not in kinds_of(item):
        return (yield)
    start = subprocess.Popen._execute_child

    def execute(self, args, executable, *rest):
        command = [args] if isinstance(args, (str, bytes)) else list(args)
        program = Path(os.fsdecode(executable or command[0]))
        if program.parent == Path(sys.executable).parent or program.name.startswith("python"):
            refuse()
        return start(self, args, executable, *rest)

    with (
        mock.patch.object(BaseProcess, "start", refuse),
        mock.patch.object(subprocess.Popen, "_execute_child", execute),
    ):
        return (yield)


def refuse(*_) -> None:
    pytest.fail("a unit test starts a process: mark it @pytest.mark.process", pytrace=False)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Folder with real nuScenes, SemanticKITTI and Occ3D samples (non-commercial licenses, so never in the repository)."""
    path = repo_root.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data samples are not next to this checkout (../shared/data)")
    return path
