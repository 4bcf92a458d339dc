"""Sections that train: ZeRO stages, resuming, evaluation, a trace, and the launcher."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from checks import Check, Failed, need, peak, section

from occstream.pretrain import profile
from occstream.pretrain.distributed import init_distributed
from occstream.pretrain.engine import BUCKET
from occstream.pretrain.networks import create_model
from occstream.pretrain.tracking import read_events
from occstream.pretrain.trained import evaluate_checkpoint
from occstream.pretrain.trainer import train
from tests.pretrain.small import losses

QUIET = ("eval.every=0", "train.log_every=1")


def _train(check: Check, name: str, stage: str, *words: str, keep: bool = False) -> Path:
    """Trains the smallest recipe in this process; returns the run's folder."""
    run = check.out / "runs" / name
    if not keep:
        shutil.rmtree(run, ignore_errors=True)
    train(check.small(stage, f"output={run}", *QUIET, *words), init_distributed(2.0))
    return run


def _last(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in read_events(run / "metrics.jsonl"):
        found |= event.get("metrics", {})
    return found


def _gap(a: Path, b: Path, after: int = 0) -> float:
    """Largest relative difference of a loss of the steps that both have."""
    one, two = losses(a), losses(b)
    steps = [s for s in two if s in one and s > after]
    if not steps:
        raise Failed(f"{a.name} and {b.name} have no step in common")
    return max(abs(one[s]["train/loss"] - two[s]["train/loss"]) / abs(one[s]["train/loss"]) for s in steps)


@section(
    "zero",
    "ZeRO 0 to 3, fine-tuning with replay: losses within 1e-3 of stage 0, memory at most 10 % above it, plus two buckets of "
    "gradients and two copies of the parameters",
)
def zero(check: Check) -> str:
    steps, said, worst, memory = 2 if check.dry else 20, [], 0.0, []
    # What DeepSpeed adds to the network: buckets of gradients, of which overlap_comm fills one while another is reduced, and
    # flat parameters. The smallest network is far smaller than the buckets.
    extra = 2 * BUCKET + 2 * sum(p.numel() for p in create_model(check.small("finetune")).parameters())
    extra *= 4 / 2**30
    words = (f"train.steps={steps}", "data.holdout=0", "replay.holdout=0")  # nothing to evaluate
    for stage in (0, 3) if check.dry else range(4):
        gc.collect()  # the engine of the stage before
        with peak(check.device) as so_far:
            before = so_far()
            run = _train(check, f"zero-{stage}", "finetune", *words, f"train.zero_stage={stage}")
            memory.append(so_far() - before)
        gap = _gap(check.out / "runs/zero-0", run)
        worst = max(worst, gap)
        said.append(f"stage {stage}: {gap:.1e}, {memory[-1]:.3f} GiB")
    return need(worst < 1e-3 and max(memory) <= 1.1 * memory[0] + extra, "\n".join(said))


@section(
    "resume",
    "two micro-steps a step, saved at stage 1 and resumed at stage 3: losses within 1e-3 of never having stopped",
)
def resume(check: Check) -> str:
    steps = 2 if check.dry else 20
    words = ("train.accumulate=2", f"train.save_every={steps // 2}", f"train.steps={steps}")
    whole = _train(check, "whole", "finetune", *words, "train.zero_stage=1")
    again = check.out / "runs" / "again"
    shutil.rmtree(again, ignore_errors=True)
    name = f"checkpoints/step-{steps // 2:08d}"
    shutil.copytree(whole / name, again / name)
    _train(check, "again", "finetune", *words, "train.zero_stage=3", keep=True)
    gap = _gap(whole, again, after=steps // 2)
    return need(gap < 1e-3, f"largest relative difference {gap:.1e} over {steps - steps // 2} steps")


@section("evaluate", "evaluating a run's checkpoint gives the run's own score: within 1e-3 IoU points")
def evaluation(check: Check) -> str:
    run = check.out / "runs" / "whole"
    if not check.dry:
        # Sums in another order would move voxels over the threshold, each by more than what is allowed.
        torch.use_deterministic_algorithms(True, warn_only=True)
        run = _train(check, "evaluated", "finetune", "train.steps=20")
    elif not (run / "checkpoints").exists():
        run = _train(check, "whole", "finetune", "train.steps=2")
    own = {k: v for k, v in _last(run).items() if k.startswith("eval/") and "class" not in k}
    found = evaluate_checkpoint(run).metrics()
    gaps = [abs(own[k] - found[k]) for k in own if not math.isnan(own[k])]
    need(len(gaps) >= 3, f"the run's own scores are {own}")
    return need(max(gaps) < 1e-3, f"largest difference of {len(gaps)} scores {max(gaps):.1e}")


@section("trace", "train.profile=5 writes a trace of five steps and a table")
def trace(check: Check) -> str:
    after, steps = (1, 1) if check.dry else (profile.AFTER, 5)
    with mock.patch.object(profile, "AFTER", after):
        words = ("data.holdout=0", f"train.profile={steps}", f"train.steps={after + steps}")
        run = _train(check, "trace", "pretrain", *words)
    table, chrome = run / "profile.txt", run / "profile.json.gz"
    need(table.exists() and chrome.exists(), "no trace was written")
    rows = [line.split()[0] for line in table.read_text().splitlines() if line.strip() and not line.startswith("--")]
    return f"{chrome.stat().st_size / 1e6:.1f} MB; most time: {', '.join(rows[1:6])}"


@section("train", "r50 from shards by the launcher, bf16: pre-training and fine-tuning with replay end, losses fall")
def launched(check: Check) -> str:
    data, said = check.data(), []
    if not check.dry:
        data = str(check.out / "shards")
        options = ["scenes=64", "frames=4", "image_size=[256,704]", "lidar=false", "--groups", "cameras,labels"]
        options += ["--scenes-per-shard", "8", "--workers", str(os.cpu_count()), "--out", data]
        _call("occstream", "shard", "synthetic", *options)
    for stage in ("pretrain", "finetune"):
        run = check.out / "runs" / f"r50-{stage}"
        words = [f"train.init={check.out}/runs/r50-pretrain", f"replay.url={data}"] if stage == "finetune" else []
        if check.dry:
            _train(check, run.name, stage, *words, "data.holdout=0", "replay.holdout=0", "train.steps=2")
        else:
            shutil.rmtree(run, ignore_errors=True)
            words += [
                f"data.url={data}",
                "data.holdout=4",
                "replay.holdout=4",
                "eval.batch=2",
                "track.uri=",
                f"output={run}",
            ]
            words += ["train.steps=60", "train.batch=8", "train.log_every=10", "train.threads=8", "optim.warmup=10"]
            command = ["deepspeed", "--num_gpus", "1", f"launch/{stage}.py", "--recipe", "r50", *words]
            _call(*command, "train.kernels=true")
        seen = [v["train/loss"] for v in losses(run).values() if "train/loss" in v]
        last = _last(run)
        keys = ("perf/samples_per_s", "perf/step_s_p50", "perf/data_wait_frac", "mem/max_alloc_gib")
        numbers = ", ".join(f"{k.split('/')[1]} {last[k]:.3g}" for k in keys if k in last)
        said.append(f"{stage}: loss {seen[0]:.4f} to {seen[-1]:.4f}" + (f", {numbers}" if numbers else ""))
        need(check.dry or seen[-1] < seen[0], "\n".join(said))
    for weights in (check.out / "runs").rglob("*.safetensors"):
        weights.unlink()  # large, and not what this is about
    return "\n".join(said)


def _call(*command: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{' '.join(command[:4])} … ended with code {done.returncode}: {json.dumps(last[:200])}")
    sys.stdout.flush()
