"""Soak test: one training, killed again and again in every way, must come out as if nothing had happened.

    python tests/pretrain/soak.py FOLDER [--kills 30] [--steps 300] [--seed 0]

Kills: SIGKILL of a rank, of all ranks, of the deepspeed launcher (its ranks stay behind), SIGTERM of all, a STOP file; at
random moments (forward, backward, saving, uploading). The world size changes at every third restart. Compared with an
undisturbed run: every logged loss, the frame keys of every step, and the final weights; to the bit with one world size
(``--worlds 2``), else to twice what an undisturbed run at another world size differs by (sums over ranks round, and Adam
turns the rounding of gradients that are zero into steps). Nothing is cleaned by hand. Prints a summary; exit code 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from occstream.pretrain.checkpoint import Checkpoint, complete_steps
from occstream.pretrain.guards import in_use
from tests.pretrain.small import RECIPE, ROOT, environment, free_port, launch_ranks, losses, pack_small

KINDS = ("kill one", "kill all", "terminate", "stop file", "kill while saving", "kill while uploading", "kill launcher")


def soak(folder: Path, kills: int, steps: int, seed: int, worlds: tuple[int, ...] = (2, 1, 4)) -> dict:
    """Runs it; returns what was done and what differed (``problems``, empty if all is well)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = str(folder / "data")
    if not (folder / "data").exists():
        pack_small(data, scenes=8)

    def job(name: str) -> list[dict]:
        # Dropout is drawn per rank and step: without it the sum is the same at every world size.
        words = [f"data.url={data}", f"replay.url={data}", f"output={folder}/{name}", f"train.steps={steps}"]
        words += ["train.save_every=3", "optim.lr=2e-5", "train.log_keys=true", "model.dropout=0.0", "data.scenes=4"]
        words += ["data.holdout=2", "replay.holdout=2"]
        words += [f"train.upload=file://{folder}/store/{name}", "train.threads=1"]
        return [{"recipe": RECIPE, "stage": "finetune", "overrides": words}]

    rng = random.Random(seed)
    began = time.monotonic()
    processes, logs = launch_ranks(job("whole"), worlds[0], folder / "log-whole")
    assert not any([p.wait(1200) for p in processes]), logs[0].read_text()[-2000:]
    duration = time.monotonic() - began
    allowed = None
    if len(worlds) > 1:
        # How far rounding alone takes a run: the same, undisturbed, at another world size.
        processes, logs = launch_ranks(job("other"), max(worlds[1:]), folder / "log-other")
        assert not any([p.wait(1200) for p in processes]), logs[0].read_text()[-2000:]
        allowed = _gaps(folder / "whole", folder / "other")
    run, made, starts, codes = folder / "killed", collections.Counter(), 0, None
    while True:
        size, kind = worlds[starts // 3 % len(worlds)], KINDS[sum(made.values()) % len(KINDS)]
        going_on = sum(made.values()) < kills
        start = _by_launcher if going_on and kind == "kill launcher" else launch_ranks
        processes, logs = start(job("killed"), size, folder / f"log-{starts:03d}")
        starts += 1
        if going_on and _disturb(kind, processes, run, rng, duration / 4):
            made[kind] += 1
        codes = [p.wait(300) for p in processes]
        while in_use(run):  # ranks whose launcher was killed save and stop by themselves
            time.sleep(0.1)
        if all(code == 0 for code in codes):
            break
        assert starts < 6 * kills + 10, f"no progress after {starts} starts: {logs[0].read_text()[-2000:]}"
    return {
        "starts": starts,
        "kills": dict(made),
        "seconds": time.monotonic() - began,
        "largest difference of a loss": _gaps(folder / "whole", run)["loss"],
        "of an undisturbed run at another world size": allowed["loss"] if allowed else 0,
        "problems": _compare(folder / "whole", run, steps, allowed),
    }


def _disturb(kind: str, processes, run: Path, rng: random.Random, patience: float) -> bool:
    """One disturbance, once training runs; whether there was time for it."""
    seen = max(losses(run), default=0)
    moments = {
        "kill while saving": lambda: any((run / "checkpoints").glob(".partial-*")),
        "kill while uploading": lambda: any(
            not (step / "COMPLETE.json").exists() for step in (run.parent / "store/killed").glob("step-*")
        ),
    }
    reached = moments.get(kind, lambda: max(losses(run), default=0) > seen)
    deadline = time.monotonic() + 120
    while not reached():
        if any(p.poll() is not None for p in processes) or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    if kind not in moments:
        time.sleep(rng.random() * min(1.0, patience))
    if kind == "stop file":
        (run / "STOP").touch()
    elif kind == "terminate":
        for p in processes:
            p.send_signal(signal.SIGTERM)
    elif kind == "kill launcher":
        root = psutil.Process(processes[0].pid)
        started = root.children(recursive=True)
        for p in [root, *(p for p in started if not any(w.startswith("--local_rank") for w in p.cmdline()))]:
            p.kill()
    else:
        victims = [rng.choice(processes)] if kind == "kill one" else processes
        for p in victims:
            p.kill()
    if kind == "kill one":
        time.sleep(0.5)
        for p in processes:  # as a launcher does when a rank is gone
            p.terminate()
    return True


def _by_launcher(jobs: list[dict], ranks: int, folder: Path) -> tuple[list[subprocess.Popen], list[Path]]:
    """As ``launch_ranks``, through ``deepspeed``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "launch/finetune.py"),
    ]
    command += ["--recipe", jobs[0]["recipe"], *jobs[0]["overrides"]]
    log = folder / "launcher.log"
    process = subprocess.Popen(command, env=environment(), stdout=log.open("w"), stderr=subprocess.STDOUT)
    return [process], [log]


def _keys(run: Path) -> dict[int, list[str]]:
    """Frame keys by step, sorted; of a step that ran more than once all runs must have had the same."""
    records: dict[int, list[list[str]]] = {}
    for path in run.glob("keys-rank-*.txt"):
        for line in path.read_text().splitlines():
            step, *keys = line.split()
            records.setdefault(int(step), []).append(keys)
    return {step: sorted({k for keys in lists for k in keys}) for step, lists in records.items()}


def _gaps(whole: Path, other: Path) -> dict[str, float]:
    """Largest difference of any loss, and of the final tensors relative to the largest value in each."""
    a, b = losses(whole), losses(other)
    found = {"loss": max((abs(a[s]["train/loss"] - b[s]["train/loss"]) for s in a if s in b), default=float("inf"))}
    first, second = Checkpoint(whole).tensors("model"), Checkpoint(other).tensors("model")
    apart = [
        (t.double() - second[n].double()).abs().max() / t.double().abs().max().clamp_min(0.1) for n, t in first.items()
    ]
    return found | {"tensors": float(max(apart))}


def _compare(whole: Path, killed: Path, steps: int, allowed: dict[str, float] | None) -> list[str]:
    problems = []
    if sorted(losses(killed)) != list(range(1, steps + 1)):
        problems.append(f"steps logged: {sorted(set(range(1, steps + 1)) - set(losses(killed)))} missing")
    for what, gap in _gaps(whole, killed).items():
        # Twice: two disturbed roundings apart.
        limit = 2 * allowed[what] if allowed else 0
        if gap > limit:
            problems.append(f"{what}: differ by up to {gap:.2e}, more than {limit:.2e}")
    one, two = _keys(whole), _keys(killed)
    wrong = [s for s in one if one[s] != two.get(s)]
    if wrong:
        problems.append(f"frames of steps {wrong[:5]} differ")
    if Checkpoint(whole).state["data"] != Checkpoint(killed).state["data"]:
        problems.append("the streams ended at different positions")
    if list(killed.glob("checkpoints/.partial-*")) or len(complete_steps(killed / "checkpoints")) > 2:
        problems.append("checkpoints were left lying about")
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worlds", default="2,1,4", help="world sizes, changed at every third start")
    args = parser.parse_args()
    worlds = tuple(int(n) for n in args.worlds.split(","))
    found = soak(args.folder, args.kills, args.steps, args.seed, worlds)
    print(found)
    done = sum(found["kills"].values())
    if done < args.kills:
        print(f"only {done} kills: give more --steps")
    sys.exit(bool(found["problems"]) or done < args.kills)
