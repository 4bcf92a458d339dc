"""Training in the process of the tests: a group of one rank, so that a run costs its steps alone."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from occstream.pretrain import distributed, trainer
from occstream.pretrain.config import load_config
from tests.pretrain.small import RECIPE


@pytest.fixture(scope="module")
def world():
    """A process group of this process alone; everything is as before afterwards."""
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            os.environ.pop(name, None)
        made = distributed.init_distributed(2.0)
        import deepspeed

        yield made
        deepspeed.comm.destroy_process_group()  # with what DeepSpeed remembers of it
        distributed.control_group.cache_clear()


def train(world, stage: str, data: str, output, *words: object) -> trainer.Result:
    """A run of the small recipe."""
    overrides = [f"data.url={data}", f"output={output}", *map(str, words)]
    return trainer.train(load_config(RECIPE, overrides, stage=stage), world)
