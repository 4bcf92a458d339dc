"""Runs training jobs of a JSON file one after the other in one process group: ``worker.py JOBS``, started once per rank.

A job may ask for ``frozen_norms`` (batch norms never see the batch), ``infinite_at`` (rank 0's loss is infinite at that call),
``fused`` (AdamW and the guard as on CUDA) and ``fails`` (it ends with an error: the message becomes a file).
A job with ``disks`` looks for the checkpoint to resume from, one folder and one ``local`` rank for each rank.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

from occstream.models.layers import SyncBatchNorm
from occstream.pretrain import checkpoint, guards, resume, trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import DataError, init_distributed
from occstream.pretrain.tasks.registry import import_modules

create, loss_of = trainer.create_model, trainer.combine


def frozen_model(config):
    model = create(config)
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            module.eval()
            module.train = lambda mode=True: None
    return model


def infinite_loss(at, rank):
    calls = itertools.count()

    def loss(*args):
        value, parts = loss_of(*args)
        return (value + float("inf") if next(calls) == at and not rank else value), parts

    return loss


def find(job, world):
    """What a rank with its own disk would resume from, and how many files it has hashed."""
    disk, place = Path(job["disks"][world.rank]), dataclasses.replace(world, local=job["local"][world.rank])
    found = {}
    with mock.patch.object(checkpoint, "sha256", side_effect=checkpoint.sha256) as hashing:
        try:
            saved, found["uploaded"] = resume.newest(disk, job["url"], place)
            found["step"] = saved.state["step"]
        except ValueError as error:
            found["error"] = str(error)
    Path(job["out"], f"found-{world.rank}.json").write_text(json.dumps({**found, "hashed": hashing.call_count}))


if __name__ == "__main__":
    world = init_distributed(2.0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "disks" in job:
            find(job, world)
            continue
        import_modules(job.get("import", ()))
        config = load_config(job["recipe"], job["overrides"], stage=job["stage"])
        with contextlib.ExitStack() as stack:
            if job.get("frozen_norms"):
                stack.enter_context(mock.patch.object(trainer, "create_model", frozen_model))
            if "infinite_at" in job:
                broken = infinite_loss(job["infinite_at"], world.rank)
                stack.enter_context(mock.patch.object(trainer, "combine", broken))
            if job.get("fused"):
                stack.enter_context(mock.patch.object(guards, "decides", return_value=True))
            if "fails" in job:
                try:
                    trainer.train(config, world)
                except (FloatingPointError, DataError) as error:
                    Path(config.output, f"error-{world.rank}.txt").write_text(str(error))
                    continue
            result = trainer.train(config, world)
        if world.is_main:
            Path(config.output, "result.json").write_text(json.dumps(result.evaluation.metrics()))
