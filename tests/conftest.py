"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Folder with real nuScenes, SemanticKITTI and Occ3D samples (non-commercial licences, so never in the repository)."""
    path = repo_root.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data samples are not beside this checkout (../shared/data)")
    return path
