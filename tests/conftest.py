"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

# Kernels are tested through Triton's interpreter, which must be chosen before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Expected values are the CPU's, also on a machine with a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest


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
