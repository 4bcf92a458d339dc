"""Whole runs by the commands a user types."""

import signal
import subprocess
import time

import pytest

from occstream.pretrain.events import read_events
from tests.forked import Forked
from tests.pretrain.small import RECIPE, ROOT, environment, free_port, losses, pack_small, run_jobs

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("runs") / "data")
    pack_small(url)
    return url


def command(stage, output, *overrides):
    script = str(ROOT / "launch" / f"{stage}.py")
    return [script, "--recipe", RECIPE, f"output={output}", *map(str, overrides)]


def start(stage, output, *overrides):
    return Forked(command(stage, output, *overrides), environment(), output.with_name(f"{output.name}.log"))


def run(*args):
    process = start(*args)
    said, _ = process.communicate(200)
    assert process.returncode == 0, said[-3000:]
    return said


def test_a_killed_run_resumes_as_if_nothing_had_happened(data, tmp_path):
    """Fine-tuning with replay, dropout, EMA and cosine schedule; killed without warning between two checkpoints."""
    settings = [f"data.url={data}", f"replay.url={data}", "data.scenes=2", "train.save_every=5", "train.steps=16"]
    run("finetune", tmp_path / "whole", *settings)
    process = start("finetune", tmp_path / "killed", *settings)
    deadline = time.monotonic() + 120
    while max(losses(tmp_path / "killed"), default=0) < 7 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 7 <= max(losses(tmp_path / "killed")) < 16, "killed in the middle"
    said = run("finetune", tmp_path / "killed", *settings)
    assert "resumed from" in said
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    results = [
        [e["metrics"] for e in read_events(tmp_path / name / "metrics.jsonl") if "eval/miou" in e.get("metrics", {})]
        for name in ("killed", "whole")
    ]
    assert len(results[0]) == 1
    assert repr(results[0]) == repr(results[1]), "weights, averages and statistics are the same"


def test_deepspeed_launcher_trains_on_two_processes_and_fine_tuning_goes_on_from_there(data, tmp_path):
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    words = command("pretrain", tmp_path / "pre", f"data.url={data}", "train.zero_stage=2", "train.steps=2")
    done = subprocess.run([*launcher, *words], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    settings = [f"data.url={data}", f"replay.url={data}", f"train.init={tmp_path / 'pre'}", "train.zero_stage=1"]
    settings += [f"output={tmp_path / 'fine'}", "train.steps=2", "train.accumulate=2", "train.precision=bf16"]
    run_jobs([{"recipe": RECIPE, "stage": "finetune", "overrides": settings}], 2, tmp_path / "logs")
    assert sorted(losses(tmp_path / "fine")) == [1, 2]


def test_a_run_continues_at_another_zero_stage_and_length(data, tmp_path):
    # A small learning rate: Adam turns the rounding of gradients that are zero into whole steps.
    settings = [f"data.url={data}", "optim.schedule=constant", "optim.lr=2e-5"]
    run("pretrain", tmp_path / "whole", *settings, "train.steps=8")
    run("pretrain", tmp_path / "parts", *settings, "train.steps=4")
    run("pretrain", tmp_path / "parts", *settings, "train.steps=8", "train.zero_stage=3")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(parts) == list(range(1, 9))
    for step in range(1, 9):
        assert parts[step]["train/loss"] == pytest.approx(whole[step]["train/loss"], abs=1e-5)
