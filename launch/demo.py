"""``occstream demo``: the main job end to end on the embedded default, small enough for two CPU cores.

Packs synthetic scenes, pre-trains on their binary occupancy, fine-tunes on the semantic labels of a few of them (a) from
scratch and (b) from the pre-trained weights with replay, evaluates on held-out scenes and compares the runs in MLflow.
Seeds run side by side, one per share of the cores.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from occstream.evaluation.charts import page
from occstream.evaluation.compare import compare
from occstream.pretrain.events import describe_uri

HERE = Path(__file__).resolve().parent
EXPERIMENT = "demo"
# 96 scenes of 6 key-frames; the recipes hold 16 of them out and label 6.
SCENES = ("scenes=96", "frames=6", "image_size=[64, 176]", "lidar=false")


# What the launcher says of itself, and that there is neither GPU nor hostfile: not news here.
_NOISE = ("[launch.py:", "[runner.py:", "[real_accelerator.py:")


def demo(out: Path, seeds: int) -> int:
    """Runs the demo in a folder. Rerunning resumes what was interrupted.

    Returns:
        Exit code.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    # The demo is made for the CPU: the same numbers with and without a GPU.
    threads = str(max(1, cores // max(1, seeds)))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu"}

    _heading("1. Pack synthetic scenes into shards")
    occstream = [sys.executable, "-m", "occstream.launch.cli"]
    shard = [*occstream, "shard", "synthetic", *SCENES, "--grid", "tiny", "--groups", "cameras,labels"]
    _run([*shard, "--out", str(out / "shards"), "--scenes-per-shard", "8", "--workers", str(min(cores, 8))], env)
    _run([*occstream, "inspect", str(out / "shards")], env)

    _heading("2. Pre-train on binary labels; fine-tune on 6 labeled scenes from scratch and from it")
    with ThreadPoolExecutor(seeds) as pool:
        failures = [said for said in pool.map(lambda seed: _seed(out, seed, env), range(seeds)) if said]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 3

    _heading("3. Compare on the held-out scenes")
    uri = _uri(out)
    print(f"MLflow: {describe_uri(uri)}")
    print(compare(uri, EXPERIMENT, by="arm", out=out))
    picture = min(out.glob("replay-*/pictures/*.png"), default="none")
    print(f"\npictures:  {out}/*/pictures/, for example {picture}")
    print(f"MLflow:    mlflow ui --backend-store-uri {uri}")
    print(f"           then open http://127.0.0.1:5000/{page('1', charts=False)}")
    print(f"took       {time.perf_counter() - began:.0f} s")
    return 0


def _seed(out: Path, seed: int, env: Mapping[str, str]) -> str:
    """Pre-training, then both fine-tunings, of one seed. Returns what went wrong."""
    pretrained = out / f"pretrain-{seed}"
    common = [f"train.seed={seed}", f"data.url={out / 'shards'}", f"track.uri={_uri(out)}"]
    tag = f"[seed {seed}]"
    try:
        # The job as it runs on a cluster; plain `python` does for one process.
        launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(_free_port())]
        script = [*launcher, str(HERE / "pretrain.py"), "--recipe", "demo-pretrain"]
        _run([*script, *common, f"output={pretrained}"], env, tag)
        script = [sys.executable, str(HERE / "finetune.py"), "--recipe"]
        _run([*script, "demo-scratch", *common, f"output={out}/scratch-{seed}"], env, tag)
        replay = [f"train.init={pretrained}", f"replay.url={out / 'shards'}"]
        _run([*script, "demo-replay", *common, *replay, f"output={out}/replay-{seed}"], env, tag)
    except subprocess.CalledProcessError as error:
        return f"{tag} ended with code {error.returncode}: {error.cmd}"
    return ""


def _run(command: Sequence[str], env: Mapping[str, str], tag: str = "") -> None:
    prefix = f"{tag} " if tag else ""
    shown = shlex.join(command).replace(f"{sys.executable} -m occstream.launch.cli", "occstream")
    shown = shown.replace(sys.executable, "python").replace(f"{HERE}/", "launch/")
    print(f"{prefix}$ {shown}", flush=True)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout or ():
        if not any(noise in line for noise in _NOISE):
            print(f"{prefix}{line}", end="", flush=True)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, shown)


def _uri(out: Path) -> str:
    return f"sqlite:///{out}/mlflow.db"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)
