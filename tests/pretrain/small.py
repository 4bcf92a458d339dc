"""A data set, a recipe and runs that take seconds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

from occstream.pretrain.events import read_events
from occstream.sharding.grid import get_grid
from occstream.sharding.pack import pack
from occstream.sharding.sources import open_source
from tests.forked import Forked

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = str(HERE / "small.yaml")


def pack_sweeps(url: str, scenes: int, frames: int) -> str:
    """Packs sweeps and labels of synthetic scenes, without cameras; returns the URL."""
    source = open_source("synthetic", {"scenes": scenes, "frames": frames, "cameras": False, "grid": "tiny"})
    pack(source, url, groups=("lidar", "labels"), grid=get_grid("tiny"))
    return url


def pack_small(url: str, scenes: int = 5, grid: str = "tiny", **options) -> None:
    """Scenes of three frames with six small images and labels. In a folder of pytest's, equal sets are packed once a session."""
    session = next((p for p in Path(url).parents if re.fullmatch(r"pytest-\d+", p.name)), None)
    if session is None:
        _pack(url, scenes, grid, options)
        return
    name = hashlib.blake2b(repr((scenes, grid, sorted(options.items()))).encode(), digest_size=8).hexdigest()
    made = session / "packed" / name
    made.parent.mkdir(exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers share the session's folder
        if not (made / "manifest.json").exists():
            _pack(str(made), scenes, grid, options)
    shutil.copytree(made, url, dirs_exist_ok=True)


def _pack(url: str, scenes: int, grid: str, options: dict) -> None:
    options = {"scenes": scenes, "frames": 3, "image_size": (32, 88), "lidar": False, "grid": grid, **options}
    source = open_source("synthetic", options)
    pack(source, url, groups=("cameras", "labels"), grid=get_grid(grid), scenes_per_shard=2)


def environment(**extra: str) -> dict[str, str]:
    """One thread per process, and no rank of an outer launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu", **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_jobs(jobs: list[dict], ranks: int, folder: Path) -> None:
    """Runs jobs (recipe, stage, overrides) in one group of processes; fails if a rank does."""
    codes, logs = start_jobs(jobs, ranks, folder)
    assert codes == [0] * ranks, "\n".join(log[-3000:] for log in logs)


def start_jobs(jobs: list[dict], ranks: int, folder: Path) -> tuple[list[int], list[str]]:
    """Runs jobs in one group of processes; returns exit codes and outputs of the ranks."""
    processes, logs = launch_ranks(jobs, ranks, folder)
    codes = [p.wait(280) for p in processes]
    return codes, [log.read_text() for log in logs]


def launch_ranks(jobs: list[dict], ranks: int, folder: Path) -> tuple[list[Forked], list[Path]]:
    """Starts the processes of a group; returns them and the files of their outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    port = str(free_port())
    processes, logs = [], [folder / f"rank{rank}.log" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        command = [str(HERE / "worker.py"), str(folder / "jobs.json")]
        processes.append(Forked(command, environment(MASTER_ADDR="127.0.0.1", **place), log))
    return processes, logs


def losses(run: Path | str) -> dict[int, dict[str, float]]:
    """Loss, its parts and the gradient norm by step."""
    out = {}
    for event in read_events(Path(run) / "metrics.jsonl"):
        parts = {k: v for k, v in event.get("metrics", {}).items() if k.startswith(("train/", "opt/grad"))}
        if parts:
            out[event["step"]] = parts
    return out
