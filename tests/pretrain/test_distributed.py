"""Two gloo processes give what one gives, at every ZeRO stage, with replay and with an empty S part."""

import contextlib
import itertools
import json
import math
import shutil
import time
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch

from occstream.models import MODELS
from occstream.models.b2s import Strategy
from occstream.pretrain import checkpoint, reading
from occstream.pretrain.checkpoint import Checkpoint, complete_steps, read_weights
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.events import read_events
from occstream.pretrain.export import export
from occstream.pretrain.reading import Prefetcher
from occstream.pretrain.streams import TrainData
from tests.pretrain.small import RECIPE, launch_ranks, losses, pack_small, run_jobs, start_jobs

pytestmark = pytest.mark.process

STAGES = (0, 1, 2, 3)
CASES = [*((kind, stage) for kind in ("pretrain", "replay") for stage in STAGES), ("mix", 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a packed set."""
    folder = tmp_path_factory.mktemp("distributed")
    pack_small(str(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def runs(root):
    """The folder, with runs <kind>-<ranks>-<stage>."""
    data = str(root / "data")

    def job(kind, ranks, stage):
        # A small learning rate: Adam turns the rounding of gradients that are zero into whole steps.
        overrides = [f"data.url={data}", f"output={root}/{kind}-{ranks}-{stage}", f"train.zero_stage={stage}"]
        overrides += ["optim.lr=2e-5", "optim.warmup=20", "train.save_every=10"]
        if kind == "mix":
            # Two sources of B, two to one; a batch of four takes 3 + 1, 2 + 2, 3 + 1.
            more = f"[{{url: {data}, weight: 1, holdout: 1, subset_seed: 5}}]"
            overrides += [
                f"replay.url={data}",
                "replay.weight=2",
                f"replay.more={more}",
                "train.batch=2",
                "replay.batch=4",
            ]
            overrides += ["data.scenes=2", "model.dropout=0.0", "optim.schedule=onecycle"]
            overrides += ["optim.groups={images: 0.1, images.smooth: 0.5}", "optim.decay_vectors=false"]
        if kind == "replay":
            # One S frame per step: rank 0 of two has none. Dropout differs between one and two processes.
            overrides += [f"replay.url={data}", "train.batch=1", "replay.batch=3", "data.scenes=2", "model.dropout=0.0"]
            # Groups that change nothing but how DeepSpeed holds the parameters.
            overrides += ["optim.groups={images: 1, binary_head: 1}"] if ranks == 2 else []
        return {"recipe": RECIPE, "stage": "pretrain" if kind == "pretrain" else "finetune", "overrides": overrides}

    run_jobs([job(k, 1, 0) for k in ("pretrain", "replay", "mix")], 1, root / "one")
    run_jobs([job(k, 2, s) for k, s in CASES], 2, root / "two")
    return root


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_one_process_and_two_agree_for_twenty_steps(runs, kind, stage):
    one, two = losses(runs / f"{kind}-1-0"), losses(runs / f"{kind}-2-{stage}")
    assert sorted(one) == sorted(two) == list(range(1, 21))
    for step in one:
        # Adam does not see the scale of gradients; their norm does.
        a, b = (dict(run[step]) for run in (one, two))
        assert b.pop("opt/grad_norm") == pytest.approx(a.pop("opt/grad_norm"), rel=1e-2), step
        assert b == pytest.approx(a, abs=1e-5), step
    if kind != "pretrain":
        assert all(two[s]["train/semantic"] > 0 for s in two)


GOLDEN = {
    "pretrain": {1: 0.69441, 5: 0.70030, 10: 0.69227, 20: 0.69251},
    "replay": {1: 2.53715, 5: 2.52190, 10: 2.54986, 20: 2.52836},
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_curve(runs, kind):
    """Losses as they were: a change of order, data, initialization or loss shows, rounding on another CPU does not.

    Measured with the kernels of OpenBLAS for Haswell, SkylakeX, Zen and Nehalem, and of PyTorch, MKL and oneDNN for SSE 4,
    AVX2 and AVX-512: equal to 4e-6 after 20 steps.
    """
    curve = losses(runs / f"{kind}-1-0")
    assert {step: curve[step]["train/loss"] for step in GOLDEN[kind]} == pytest.approx(GOLDEN[kind], abs=1e-4)


@pytest.mark.parametrize("kind", ["pretrain", "replay"])
def test_evaluation_counts_the_same_voxels_on_one_process_and_two(runs, kind):
    results = [json.loads((runs / f"{kind}-{r}" / "result.json").read_text()) for r in ("1-0", "2-0", "2-3")]
    assert results[0]["eval/frames"] == 3
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=0.05, nan_ok=True)


def test_save_resume_resize_and_export_at_every_stage(runs):
    """From the checkpoint in the middle of each two-process run: on one process, and from its export. Runs with replay, which
    have groups of parameters, go on at the next stage, the others at the same one."""
    jobs, names = [], []
    for kind, stage in itertools.product(("pretrain", "replay"), STAGES):
        source = runs / f"{kind}-2-{stage}"
        step = source / "checkpoints/step-00000010"
        other = runs / f"resized-{kind}-{stage}"
        shutil.copytree(step, other / "checkpoints" / step.name)
        config = json.loads((step / "state.json").read_text())["config"]
        words = [f"output={other}", *([f"train.zero_stage={(stage + 1) % 4}"] if kind == "replay" else [])]
        job = {"recipe": str(source / "config.yaml"), "stage": config["stage"], "overrides": words}
        jobs.append(job)
        names.append((source, other))
        exported = export(step, runs / f"export/{kind}-{stage}.safetensors")
        card = json.loads(exported.with_suffix(".json").read_text())
        assert (card["step"], card["averaged"], card["stage"]) == (10, True, config["stage"])
    run_jobs(jobs, 1, runs / "resized")
    for source, other in names:
        whole, resumed = losses(source), losses(other)
        assert sorted(resumed) == list(range(11, 21))
        for step, parts in resumed.items():
            assert parts["train/loss"] == pytest.approx(whole[step]["train/loss"], abs=1e-5), (other, step)
    first, *rest = [read_weights(runs / f"export/replay-{stage}.safetensors") for stage in STAGES]
    for weights in rest:
        assert weights.keys() == first.keys()
        assert all(torch.allclose(weights[k].double(), v.double(), rtol=1e-3, atol=1e-3) for k, v in first.items())


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


def test_a_step_that_is_not_finite_is_left_out_whole_at_every_stage(root):
    def job(stage):
        overrides = [
            f"data.url={root}/data",
            f"output={root}/nan-{stage}",
            f"train.zero_stage={stage}",
            "train.steps=4",
        ]
        overrides += ["train.save_every=1", "train.keep=9", "train.skip_nonfinite=1", "optim.groups.images=0"]
        return {"recipe": RECIPE, "stage": "pretrain", "overrides": overrides, "infinite_at": 2}

    def late(name, **more):
        words = [
            f"data.url={root}/data",
            f"output={root}/{name}",
            "train.steps=9",
            "train.save_every=2",
            "train.log_every=9",
        ]
        return {"recipe": RECIPE, "stage": "pretrain", "overrides": words, "fused": True, **more}

    failing = [late("late-2", infinite_at=2, fails=True), late("late-3", infinite_at=3, fails=True)]
    run_jobs([*(job(stage) for stage in STAGES), *failing], 2, root / "nan-log")
    for bad, seen_before_saving in ((2, False), (3, True)):
        run = root / f"late-{bad}"
        for rank in (0, 1):
            said = (run / f"error-{rank}.txt").read_text()
            assert said.startswith(f"step {bad}: loss or gradients are not finite"), said
            record = json.loads((run / f"nonfinite-step-{bad:08d}-rank-{rank}.json").read_text())
            assert len(record["keys"]) == 2, "two of the step's four frames are this rank's"
        assert [p.name for p in complete_steps(run / "checkpoints")] == ["step-00000002"], seen_before_saving
    for stage in STAGES:
        before, after, later = (Checkpoint(root / f"nan-{stage}/checkpoints/step-{n:08d}") for n in (2, 3, 4))
        for kind in ("model", "optimizer", "ema"):
            old, same, new = (saved.tensors(kind) for saved in (before, after, later))
            # Integers count batches.
            assert all(torch.equal(old[k], same[k]) for k in old if old[k].is_floating_point()), (stage, kind)
            assert any(not torch.equal(old[k], new[k]) for k in old), (stage, kind)
            if kind == "model":
                moved = {k for k in old if not torch.equal(old[k], new[k])}
                moved = {k.partition(".")[0] for k in moved if "running_" not in k and "num_batches" not in k}
                assert moved == {"lift", "decoder", "binary_head"}, (stage, "a group whose rate is 0 stays")
        assert sorted(losses(root / f"nan-{stage}")) == [1, 2, 4]
    assert "left out step 2" in (root / "nan-log/rank0.log").read_text()


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


def test_a_rank_without_its_data_goes_on_with_its_first_batch_until_all_know(root, monkeypatch):
    asked = []

    class Half(World):
        def agree(self, error, flag=False):
            asked.append(error)
            if error:
                raise error
            return flag

    data = TrainData(load_config(RECIPE, [f"data.url={root}/data"], stage="finetune"), Half(0, 2, torch.device("cpu")))
    [first] = data.micro_batches(1)
    keys, images = list(first.keys), first.cameras.images.clone()
    [second] = data.micro_batches(1)
    assert (asked, data.flags.tolist()) == ([None], [0.0, 0.0])
    assert second.keys != keys
    data.close()  # asking for more is an error from here on
    for batch in data.micro_batches(3, stop=True):
        assert batch.keys == keys
        assert torch.equal(batch.cameras.images, images)
    assert (asked, data.flags.tolist(), data.stopping) == ([None], [1.0, 1.0], False)
    with pytest.raises(ValueError, match="closed"):
        data.heard(1.0, 1.0)
    data.heard(0.0, 1.0)
    assert data.stopping


def test_nodes_with_disks_of_their_own_go_on_from_what_all_have(tmp_path):
    def disk(name, *steps):
        for step in steps:
            checkpoint.save(tmp_path / name, step, {"model": {"w": torch.ones(2)}}, {"step": step})
        return str(tmp_path / name)

    def job(name, first, second, local=(0, 0), url=""):
        (tmp_path / name).mkdir()
        return {"disks": [first, second], "local": local, "url": url, "out": str(tmp_path / name)}

    def found(name):
        return [json.loads((tmp_path / name / f"found-{rank}.json").read_text()) for rank in (0, 1)]

    both = disk("both", 1, 2)
    store = f"file://{tmp_path}/store"
    jobs = [
        job("shared", both, both, local=(0, 1)),
        job("older", disk("a", 1, 2), disk("b", 1)),
        job("alone", disk("c", 1, 2), disk("d")),
        job("upload", disk("e", 3), disk("f"), url=store),
        job("again", disk("g"), disk("h"), url=store),
    ]
    run_jobs(jobs, 2, tmp_path / "log")
    first, second = found("shared")
    assert (first["step"], second["step"]) == (2, 2)
    assert first["hashed"] > 0
    assert second["hashed"] == 0, "another rank of its node has done it"
    assert [f["step"] for f in found("older")] == [1, 1]
    assert all("only on the main rank" in f["error"] for f in found("alone"))
    for name in ("upload", "again"):
        assert [(f["step"], f["uploaded"]) for f in found(name)] == [(3, 3), (3, 3)]
    assert [p.name for p in complete_steps(tmp_path / "f")] == ["step-00000003"]
    assert "step-00000002 is not on every node's disk; resuming from step 1" in (tmp_path / "log/rank0.log").read_text()


def test_shares_of_replay_sources_are_exact_and_logged(runs):
    shares = {}
    for event in read_events(runs / "mix-2-1" / "metrics.jsonl"):
        if "data/share/replay" in event.get("metrics", {}):
            shares[event["step"]] = event["metrics"]["data/share/replay"]
    assert shares[3] == shares[6] == shares[18] == pytest.approx(2 / 3)
    assert max(abs(v - 2 / 3) for v in shares.values()) < 0.1


def test_a_missing_shard_ends_all_ranks_and_is_named(tmp_path):
    """Only one rank needs it, and only after a while; the other must not wait in a collective until it times out."""
    data = tmp_path / "data"
    pack_small(str(data), scenes=9)
    (data / "labels/labels-000002.tar").unlink()
    job = {
        "recipe": RECIPE,
        "stage": "pretrain",
        "overrides": [f"data.url={data}", f"output={tmp_path}/run", "train.steps=200"],
    }
    late = {**job, "overrides": [*job["overrides"], f"output={tmp_path}/late"], "fused": True, "fails": True}
    began = time.monotonic()
    codes, logs = start_jobs([late, job], 2, tmp_path / "logs")
    for rank in (0, 1):
        assert "labels-000002.tar: shard is missing" in (tmp_path / f"late/error-{rank}.txt").read_text()
    assert time.monotonic() - began < 90
    assert 0 not in codes
    assert all("labels-000002.tar: shard is missing" in log for log in logs)
    assert all("DataError: rank " in log for log in logs)


def test_one_rank_killed_and_the_job_started_again(tmp_path):
    """The other rank ends by itself; the rerun resumes from the checkpoint with the losses of an undisturbed run."""
    data = str(tmp_path / "data")
    pack_small(data)

    def job(name):
        words = [
            f"data.url={data}",
            f"output={tmp_path}/{name}",
            "train.steps=12",
            "train.save_every=4",
            "optim.lr=2e-5",
        ]
        return [{"recipe": RECIPE, "stage": "pretrain", "overrides": words}]

    run_jobs(job("whole"), 2, tmp_path / "one")
    processes, logs = launch_ranks(job("killed"), 2, tmp_path / "two")
    for _ in range(600):
        if list((tmp_path / "killed/checkpoints").glob("step-*/COMPLETE.json")):
            break
        time.sleep(0.1)
    processes[1].kill()
    assert processes[0].wait(100) != 0, logs[0].read_text()[-2000:]
    run_jobs(job("killed"), 2, tmp_path / "three")
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert killed == whole
