"""Preemption, hangs and a short soak."""

import gzip
import itertools
import json
import signal
import threading
import time

import pytest
import torch

from occstream.pretrain import guards
from occstream.pretrain.checkpoint import Checkpoint, latest_remote
from occstream.pretrain.distributed import World
from occstream.pretrain.events import read_events
from occstream.pretrain.guards import REQUEUE, Watchdog
from tests.forked import Forked
from tests.pretrain.small import RECIPE, ROOT, environment, losses, pack_small
from tests.pretrain.soak import soak


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("guards") / "data")
    pack_small(url)
    return url


def start(output, *words, **env):
    command = [ROOT / "launch/pretrain.py", "--recipe", RECIPE, f"output={output}", *words]
    log = next(p for n in itertools.count() if not (p := output.with_name(f"{output.name}-{n}.log")).exists())
    return Forked(command, environment(**env), log)


def wait_for_step(run, step):
    deadline = time.monotonic() + 100
    while max(losses(run), default=0) < step and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.process
@pytest.mark.parametrize("way", ["SIGTERM", "SIGUSR1", "STOP"])
def test_a_run_that_is_asked_to_stop_saves_and_says_so_by_its_exit_code(data, tmp_path, way):
    words = [f"data.url={data}", "train.steps=400", f"train.upload=file://{tmp_path}/store"]
    process = start(tmp_path / "run", *words)
    wait_for_step(tmp_path / "run", 3)
    if way == "STOP":
        (tmp_path / "run/STOP").touch()
    else:
        process.send_signal(getattr(signal, way))
    said, _ = process.communicate(timeout=100)
    assert process.returncode == REQUEUE, said
    assert f"stopped by {'the file' if way == 'STOP' else way}" in said
    step = Checkpoint(tmp_path / "run").state["step"]
    assert step == max(losses(tmp_path / "run")) >= 3
    assert not (tmp_path / "run/STOP").exists()
    assert latest_remote(f"file://{tmp_path}/store") == step
    events = read_events(tmp_path / "run/metrics.jsonl")
    assert [e["status"] for e in events if "status" in e] == ["KILLED"]
    if way == "STOP":
        # On another disk: the run resumes from the copy, with the metrics it would have had.
        process = start(tmp_path / "elsewhere", *words[:1], f"train.steps={step + 2}", words[2])
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
        assert f"at step {step}" in said
        assert sorted(losses(tmp_path / "elsewhere")) == [step + 1, step + 2]


@pytest.mark.process
def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(data, tmp_path):
    words = [f"data.url={data}", "train.steps=400"]
    first = start(tmp_path / "run", *words)
    wait_for_step(tmp_path / "run", 2)
    second = start(tmp_path / "run", *words)
    said, _ = second.communicate(timeout=100)
    assert second.returncode == 2
    assert f"another job trains there (process {first.pid} on" in said
    (tmp_path / "run/STOP").touch()
    first.communicate(timeout=100)
    assert first.returncode == REQUEUE


@pytest.mark.process
def test_a_profile_is_a_trace_and_a_table(data, tmp_path):
    process = start(tmp_path / "run", f"data.url={data}", "train.steps=13", "--profile", "2")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    with gzip.open(tmp_path / "run/profile.json.gz", "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert "aten::convolution_backward" in names or "aten::conv2d" in names
    assert "aten::" in (tmp_path / "run/profile.txt").read_text()
    last = [e["metrics"] for e in read_events(tmp_path / "run/metrics.jsonl") if "train/loss" in e.get("metrics", {})][
        -1
    ]
    assert 0 < last["perf/mfu"] < 1.5
    assert last["perf/straggler_s"] == 0
    assert last["data/mb_s"] > 0


def test_a_hang_ends_with_the_stacks_of_all_threads_and_a_line_that_names_them(tmp_path, monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(guards.os, "_exit", lambda code: (codes.append(code), ended.set()))
    dog = Watchdog(tmp_path, World(1, 2, torch.device("cpu")), 1 / 600)
    dog.alive()
    with dog.off():
        assert not ended.wait(0.3)

    def stuck():
        assert ended.wait(30)

    stuck()
    dog.close()
    assert codes == [3]
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("[rank 1] error: a step has taken longer than")
    assert str(tmp_path / "stacks-rank-1.txt") in line
    assert "in stuck" in (tmp_path / "stacks-rank-1.txt").read_text()


def test_a_watchdog_that_saw_no_hang_leaves_nothing(tmp_path):
    dog = Watchdog(tmp_path, World(0, 1, torch.device("cpu")), 5)
    dog.alive()
    dog.close()
    dog.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_hang_that_holds_pythons_lock_ends_too(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(
        "import ctypes, torch\nfrom pathlib import Path\nfrom occstream.pretrain import guards\n"
        "from occstream.pretrain.distributed import World\nguards.UNSAID = 0.1\n"
        f"dog = guards.Watchdog(Path({str(tmp_path)!r}), World(0, 1, torch.device('cpu')), 1 / 120)\n"
        "dog.alive()\ndef stuck():\n    ctypes.PyDLL(None).sleep(300)\nstuck()\n"
    )
    assert Forked([script], environment(), tmp_path / "log").wait(200) == 1
    assert "in stuck" in (tmp_path / "stacks-rank-0.txt").read_text()


@pytest.mark.process
def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(data, tmp_path):
    words = [f"data.url={data}", "train.steps=6"]
    assert start(tmp_path / "run", *words[:1], "train.steps=2").wait(100) == 0
    script = tmp_path / "full.py"
    script.write_text(
        "import resource, sys\nfrom occstream.pretrain import checkpoint\nreal = checkpoint.save\n"
        "def full(*args):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n    return real(*args)\n"
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "checkpoint.save = full\nfrom occstream.launch.run import main\n"
        f"sys.exit(main('pretrain', ['--recipe', {RECIPE!r}, 'output={tmp_path}/run', *{words!r}]))"
    )
    # Its log is next to the run's folder and small.
    process = Forked([script], environment(), tmp_path / "full.log")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2, said
    [line] = [x for x in said.splitlines() if x.startswith("error:")]
    assert "cannot be written" in line
    assert "resumes from the previous checkpoint" in line
    assert Checkpoint(tmp_path / "run").state["step"] == 2
    process = start(tmp_path / "run", *words)
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert Checkpoint(tmp_path / "run").state["step"] == 6


def test_out_of_memory_names_the_knobs(capsys):
    from occstream.launch.run import guarded

    def greedy():
        import torch

        return torch.empty(1 << 60)

    assert guarded(greedy) == 3
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "train.accumulate" in said


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError])
def test_ranks_that_went_away_are_one_line(kind, capsys):
    from occstream.launch.run import guarded

    def lonely():
        raise kind("[/a/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4021")

    assert guarded(lonely) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "another rank failed" in line
    assert "Connection closed by peer [10.0.0.7]" in line


@pytest.mark.process
def test_a_short_soak(tmp_path):
    """Four of the kills of soak.py, over one and two processes."""
    found = soak(tmp_path, kills=4, steps=18, seed=3, worlds=(2, 1))
    assert found["problems"] == []
    assert sum(found["kills"].values()) >= 3, found
