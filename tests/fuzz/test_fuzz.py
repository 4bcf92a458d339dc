"""A little of ``tests.fuzz.run`` in every test run, the same inputs each time."""

import random

import pytest

from tests.fuzz.run import failures
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs_raise_what_is_documented(name):
    assert list(failures(TARGETS[name], random.Random(1), iter(range(150)))) == []
