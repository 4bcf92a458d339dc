"""What goes wrong on one process of several ends, skips or resumes the same way on all."""

import json
import time

import pytest
import torch

from occstream.pretrain import checkpoint
from occstream.pretrain.checkpoint import Checkpoint, complete_steps
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from tests.pretrain.small import RECIPE, launch_ranks, losses, pack_small, run_jobs, start_jobs

pytestmark = pytest.mark.process

STAGES = (0, 1, 2, 3)


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
