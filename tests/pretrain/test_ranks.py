"""Models, micro-batches and batches taken ahead, on several processes as on one."""

import contextlib
import itertools
import math
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch

from occstream.models import MODELS
from occstream.models.b2s import Strategy
from occstream.pretrain import reading
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.reading import Prefetcher
from occstream.pretrain.streams import TrainData
from tests.pretrain.small import RECIPE, losses, run_jobs, start_jobs

pytestmark = pytest.mark.process


def test_every_model_and_strategy_trains_on_two_processes(root):
    """Two steps of fine-tuning, for each strategy after pre-training of one of the models; the multi and the intermediate
    head with replay, the others without. ZeRO stages take turns: every model meets each of them, every strategy two."""
    data, jobs, outputs = root / "data", [], []
    pairs = itertools.product(enumerate(sorted(MODELS)), enumerate(get_args(Strategy)))
    for (row, model), (column, strategy) in pairs:
        base, stage = root / f"matrix-{model}-{strategy}", (row + column) % 4
        words = [f"data.url={data}", f"model_name={model}", f"model.strategy={strategy}", "model.dense_layers=1"]
        words += [f"train.zero_stage={stage}", "train.steps=2", "train.batch=2", "eval.scenes=1"]
        words += ["model.cap=4608"] if strategy == "offboard" else []  # its labels choose, as many as there are
        then = []
        if strategy != "offboard" and column % len(MODELS) == row:
            jobs.append({"recipe": RECIPE, "stage": "pretrain", "overrides": [*words, f"output={base}-pre"]})
            then.append(f"train.init={base}-pre")
        if strategy in ("multi", "intermediate"):
            then.append(f"replay.url={data}")
        jobs.append({"recipe": RECIPE, "stage": "finetune", "overrides": [*words, *then, f"output={base}"]})
        outputs.append(base)
    run_jobs(jobs, 2, root / "matrix")
    for base in outputs:
        assert all(math.isfinite(v) for step in losses(base).values() for v in step.values()), base
        assert sorted(losses(base)) == [1, 2]


def test_accumulated_micro_batches_are_one_large_batch_also_on_four_processes(root):
    """S and B frames with unequal numbers of occupied voxels; batch norms frozen, as they see micro-batches alone."""

    def job(name, *words):
        overrides = [
            f"data.url={root}/data",
            f"output={root}/{name}",
            "optim.lr=2e-5",
            "train.steps=3",
            "model.dropout=0.0",
        ]
        overrides += [f"replay.url={root}/data", "train.batch=8", "replay.batch=8", "data.mask=camera", *words]
        overrides += ["data.holdout=2", "replay.holdout=2"]
        return {"recipe": RECIPE, "stage": "finetune", "overrides": overrides, "frozen_norms": True}

    run_jobs([job("large"), job("parts", "train.accumulate=4")], 1, root / "large-log")
    run_jobs([job("four"), job("four-parts", "train.accumulate=2", "train.zero_stage=2")], 4, root / "four-log")
    large = losses(root / "large")
    for name in ("parts", "four", "four-parts"):
        other = losses(root / name)
        for step, expected in large.items():
            for key in ("train/loss", "train/binary", "train/semantic"):
                assert other[step][key] == pytest.approx(expected[key], rel=1e-5), (name, step)
            assert other[step]["opt/grad_norm"] == pytest.approx(expected["opt/grad_norm"], rel=1e-2), (name, step)


def test_both_families_train_on_frames_before(root):
    """At a scene's beginning its first frame is shown again; embeddings of too few cameras are named."""

    def job(model, *words):
        overrides = [f"data.url={root}/data", f"output={root}/history-{model}", f"model_name={model}", "train.steps=2"]
        return {"recipe": RECIPE, "stage": "finetune", "overrides": [*overrides, "data.history=1", *words]}

    run_jobs([job("b2s_ls"), job("b2s_bevformer", "model.cameras=12", "model.dense_layers=1")], 1, root / "history-log")
    assert sorted(losses(root / "history-b2s_ls")) == [1, 2]
    codes, [said] = start_jobs(
        [job("b2s_bevformer", f"output={root}/few", "model.dense_layers=1")], 1, root / "few-log"
    )
    assert codes != [0]
    assert "12 cameras, but the model has embeddings for 8: set model.cameras" in said


@pytest.mark.parametrize("there", [True, False])
def test_a_batch_taken_ahead_is_the_same_batch_with_its_own_position(root, there, monkeypatch):
    """What CUDA does with streams and events, without them: order, positions and content are those of the plain way."""
    config = load_config(RECIPE, [f"data.url={root}/data"], stage="finetune")
    world = World(0, 1, torch.device("cpu"))
    plain, other = TrainData(config, world), TrainData(config, world)
    expected = [(plain.next().clone(), plain.state_dict()["main"]) for _ in range(7)]
    other.next()
    stream = other._feeds["main"].stream
    monkeypatch.setattr(stream, "ready", lambda: there)
    ahead = Prefetcher(stream, world.device)
    found = [ahead.next() for _ in range(6)]
    for (batch, state), (want, position) in zip(found, expected[1:], strict=True):
        assert state == position
        assert batch.keys == want.keys
        assert torch.equal(batch.cameras.images, want.cameras.images)
        assert torch.equal(batch.occupancy.semantic, want.occupancy.semantic)
    assert (ahead.held is not None) == there
    plain.close()
    other.close()


class LateCopies:
    """CUDA as ``Prefetcher`` sees it: a copy reads its source only when somebody waits for it, or at the end of the test."""

    def __init__(self, monkeypatch):
        self.pending = []
        for name, fake in {
            "Stream": lambda device: "copies",
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock())
        monkeypatch.setattr(torch.cuda, "Event", lambda: mock.Mock(synchronize=self.finish))
        monkeypatch.setattr(reading, "to_batch", self.copy)

    def copy(self, got, device):
        target = mock.Mock(values=None)
        self.pending.append((target, got.arrays["x"]))
        return target

    def finish(self):
        for target, source in self.pending:
            target.values = source.copy()
        self.pending.clear()


class Overwriting:
    """A stream whose readers write into a buffer as soon as it is given back."""

    def __init__(self, ready):
        self.count, self.lent, self.ready = 0, None, lambda: next(ready)

    def __next__(self):
        if self.lent is not None:
            self.lent[:] = -1
        self.count += 1
        self.lent = np.full(2, self.count)
        return mock.Mock(arrays={"x": self.lent}, state={"batches": self.count})


@pytest.mark.parametrize("ready", [[False], [True], [True, False], [False, False, True]])
def test_a_buffer_goes_back_to_the_readers_only_after_its_copy(monkeypatch, ready):
    """Micro-batches are taken one after the other; nothing but ``Prefetcher`` waits for their copies."""
    cuda = LateCopies(monkeypatch)
    ahead = Prefetcher(Overwriting(itertools.cycle(ready)), torch.device("cuda", 0))
    batches = [ahead.next() for _ in range(7)]
    cuda.finish()
    assert [(b.values.tolist(), state["batches"]) for b, state in batches] == [([n, n], n) for n in range(1, 8)]
