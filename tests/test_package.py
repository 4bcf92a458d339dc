"""What is installed and what the code promises about itself."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from occstream.launch import cli

FOLDERS = ("sharding", "models", "evaluation", "pretrain", "launch")
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.process
def test_wheel_holds_every_module_recipe_and_page(tmp_path):
    # In a copy: setuptools would add what an earlier build has left in build/.
    copy = tmp_path / "copy"
    for folder in (*FOLDERS, "infra", "occstream"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "out"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    [wheel] = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        code = "\n".join(archive.read(name).decode() for name in names if name.endswith(".py"))
    wanted = {f"occstream/{p.relative_to(ROOT)}" for p in FILES}
    wanted |= {f"occstream/{p.relative_to(ROOT)}" for p in (ROOT / "launch" / "recipes").rglob("*.yaml")}
    wanted |= {
        "occstream/__init__.py",
        "occstream/py.typed",
        "occstream/sharding/FORMAT.md",
        *(f"occstream/{folder}/py.typed" for folder in FOLDERS),
    }
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names} == {"occstream", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    for peer in ("litdata", "megatron", "mosaicml"):
        assert peer not in code, "other projects' loaders stay in infra/bench"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder):
    """launch -> pretrain -> evaluation -> models -> sharding; models know only grid and schema of sharding."""
    rank = {name: i for i, name in enumerate(FOLDERS)}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("occstream."):
                other = node.module.split(".")[1]
                assert rank[other] <= rank[folder], f"{path}: imports {node.module}"
                if folder == "models" and other == "sharding":
                    assert node.module in ("occstream.sharding.grid", "occstream.sharding.schema"), path


@pytest.mark.parametrize("folder", [*FOLDERS, "infra", "docs", "tests"])
def test_functions_have_at_most_80_lines_and_files_600(folder):
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 600, path
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        lines = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)}
        assert not [name for name, count in lines.items() if count > 80], path


def test_no_pickle_from_outside():
    for path in FILES:
        text = path.read_text()
        assert "extractall" not in text, path
        # One place reads pickles, with a list of what they may name (tests/sharding/test_pickles.py tries hostile ones).
        assert "import pickle" not in text or path.name == "pickles.py", path
        assert "pickle.load" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_every_thread_tells_of_its_errors():
    for path in FILES:
        if path.name != "threads.py":
            assert "Thread(" not in path.read_text(), f"{path}: start it by sharding.threads"


@pytest.mark.process
def test_launch_scripts_say_how_to_install(tmp_path):
    """Without the package they print the command that fixes it."""
    script = ROOT / "launch" / "pretrain.py"
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr


def test_doctor_names_what_the_machine_has(capsys):
    code = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert code in (0, 1)
    for word in ("Python", "torch", "CUDA", "DeepSpeed", "spconv"):
        assert word.lower() in out.lower()


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("shard", "inspect", "verify", "evaluate", "compare", "sync", "doctor", "demo"):
        assert command in out
