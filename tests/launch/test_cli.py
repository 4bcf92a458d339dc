"""The ``occstream`` command itself: what it loads before it knows what to do."""

import json
import subprocess
import sys

import pytest

from tests.pretrain.small import ROOT, environment

# Each takes up to seconds to load, and none is needed to print help.
HEAVY = {"torch", "deepspeed", "mlflow", "numba", "numpy", "scipy", "cv2", "transformers", "matplotlib", "pydantic"}
PROBE = """
import json, sys
from occstream.launch import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps([stop.code, sorted(sys.modules)]))
"""


@pytest.mark.process
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sweep", "--help"], ["shard"]], ids=" ".join)
def test_no_heavy_package_is_loaded_to_print_help(words):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == (2 if words == ["shard"] else 0)
    assert {name.partition(".")[0] for name in modules} & HEAVY == set()


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    from occstream.launch import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"occstream {version('occstream')}\n"


def test_benches_of_the_repository_are_found_in_a_checkout_and_named_elsewhere(tmp_path, monkeypatch, capsys):
    from occstream.launch import cli

    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("stream", "pack"):
        assert cli._from_checkout(name).__file__ == str(ROOT / "infra" / "bench" / f"{name}.py")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "occstream" / "launch" / "cli.py"))
    assert cli.main(["bench", "pack"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: bench pack is in infra/bench/pack.py of occstream's repository")
    assert said.count("\n") == 1
