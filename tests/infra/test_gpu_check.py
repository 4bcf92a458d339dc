"""The GPU check, dry: every section on the CPU at the smallest size, in one process."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra/gpu_check.sh"


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu-check")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = Forked([ROOT / "infra/gpu_check/run.py", "--dry", "--out", out], env, out / "all.log")
    done.wait(280)
    return done, out


def test_the_script_hands_its_arguments_over():
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPT, "--help"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dry" in done.stdout


def test_every_section_runs_and_none_stops_the_others(dry):
    done, out = dry
    found = json.loads((out / "table.json").read_text())
    assert list(found) == [
        *("doctor", "agree", "geometry", "kernels", "votes", "batch norm", "decoder", "compile", "waits"),
        *("step", "bevformer", "offboard", "zero", "resume", "evaluate", "trace", "train"),
    ]
    failed = {name: f["found"] for name, f in found.items() if f["status"] == "FAILED"}
    assert not failed, failed
    assert done.returncode == 0
    table = (out / "table.md").read_text()
    assert table.count("\n|") == len(found) + 2
    assert table.strip() in done.log.read_text()


def test_a_section_that_fails_is_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "infra/gpu_check"))
    import checks
    import run as driver

    def broken(check):
        raise RuntimeError("no such kernel\nat 0x0")

    sections = {
        name: checks.Section(name, "nothing", work)
        for name, work in {"one": broken, "two": lambda c: checks.need(False, "3 | 4"), "three": lambda c: "5"}.items()
    }
    monkeypatch.setattr(driver, "_sections", lambda: sections)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert driver.main(["--dry", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "| one | nothing | RuntimeError: no such kernel" in out
    assert "| two | nothing | 3 / 4 | FAILED |" in out
    assert "| three | nothing | 5 | ok |" in out
    assert driver.main(["--dry", "--only", "four"]) == 2
    assert "no section four; there are one, two, three" in capsys.readouterr().err


def test_a_section_that_hangs_or_dies_ends_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "infra/gpu_check"))
    import checks
    import run as driver

    script = tmp_path / "section.py"
    monkeypatch.setattr(driver, "__file__", str(script))
    section, args = checks.Section("one", "nothing", lambda check: ""), argparse.Namespace(out=tmp_path)
    script.write_text("import sys; sys.exit('CUDA error: an illegal memory access')")
    assert driver._apart(section, args) == ("FAILED", "ended with code 1: CUDA error: an illegal memory access")
    script.write_text(f"open({str(tmp_path / 'one.json')!r}, 'w').write('[\"ok\", \"5\"]')")
    assert driver._apart(section, args) == ("ok", "5")
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(driver, "MINUTES", 0.002)
    assert driver._apart(section, args)[1].startswith("not done after")
