"""A small packed set for the tests that train on several processes."""

import pytest

from tests.pretrain.small import pack_small


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a packed set at ``data``, for one file's runs."""
    folder = tmp_path_factory.mktemp("runs")
    pack_small(str(folder / "data"))
    return folder
