"""Every file of infra/ passes its linter, offline."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from occstream.pretrain.config import load_config

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SHELL = sorted([*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch"), *(ROOT / "docs").glob("*.sh"), ROOT / ".ci/run"])
OFF = "line-length: disable, document-start: disable, truthy: disable"
RULES = f"{{extends: default, rules: {{{OFF}, braces: {{max-spaces-inside: 1}}}}}}"


def passes(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tool(name):
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}")
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("file", SHELL, ids=lambda p: p.name)
def test_shell_scripts(file):
    passes("bash", "-n", file)
    passes(tool("shellcheck"), "-s", "bash", file)


@pytest.mark.parametrize("file", sorted(INFRA.glob("*Dockerfile")), ids=lambda p: p.name)
def test_dockerfiles(file):
    passes(tool("hadolint"), "--failure-threshold", "warning", file)
    text = file.read_text()
    assert re.search(r"^USER \w+", text, re.M), "not as root"
    assert all(re.search(r":\d", line) for line in re.findall(r"^FROM (.*)", text, re.M)), "a fixed version"
    assert "tini" in text or file.name != "Dockerfile"


def test_yaml_is_clean():
    passes(tool("yamllint"), "-d", RULES, INFRA, ROOT / "launch/recipes")


@pytest.mark.parametrize("name", ["shard-job", "mlflow"])
def test_kubernetes_manifests_fit_their_schemas(name):
    passes(tool("kubernetes-validate"), "--strict", INFRA / f"k8s/{name}.yaml")


def test_the_trainjob_fits_the_types_of_kubeflow_trainer():
    """Its published models know every key of ours, and take every value as it is."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = yaml.safe_load((INFRA / "k8s/trainjob.yaml").read_text())
    assert _keeps(job, models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()) == []
    job["spec"]["trainer"]["numProcesses"] = 8
    assert _keeps(job, models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()) == [".spec.trainer.numProcesses"]


def _keeps(given, found, at=""):
    """Paths of what is not in ``found``, or not the same there."""
    if isinstance(given, dict) and isinstance(found, dict):
        return [p for key in given for p in _keeps(given[key], found.get(key), f"{at}.{key}")]
    if isinstance(given, list) and isinstance(found, list):
        return [p for i, pair in enumerate(zip(given, found)) for p in _keeps(*pair, f"{at}[{i}]")]
    return [] if given == found else [at]


def test_manifests_and_scripts_name_recipes_and_options_that_exist():
    job = yaml.safe_load((INFRA / "k8s/trainjob.yaml").read_text())
    words = job["spec"]["trainer"]["args"]
    assert (ROOT / words[0]).exists()
    load_config(words[2], words[3:], stage="pretrain")
    config = load_config("a100-openscene", stage="pretrain")
    assert config.data.scenes == 8000
    used = re.findall(r"sbatch .* (\S+) (\S+) data\.url", (INFRA / "slurm/train.sbatch").read_text())
    assert all((ROOT / f"launch/{stage}.py").exists() and load_config(recipe) for stage, recipe in used)
    json.loads((INFRA / "seaweedfs-s3.example.json").read_text())


def test_secrets_are_asked_for_and_not_here():
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert set(compose["services"]) == {"s3", "postgres", "mlflow"}
    for line in (INFRA / "example.env").read_text().splitlines():
        assert line.startswith("#") or line.endswith("="), line
    ignored = (ROOT / ".gitignore").read_text()
    assert "infra/.env" in ignored
    # Ports are bound to this machine only.
    for service in compose["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_lock_file_pins_what_the_project_asks_for():
    lock = (INFRA / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.M))
    assert lock.count("--hash=sha256:") >= len(pins)
    text = (ROOT / "pyproject.toml").read_text()
    for name, version in re.findall(r'"([\w-]+)==([\d.]+)",', text.split("[project.optional")[0]):
        if name != "torch":
            assert pins[name] == version, f"{name}: run the command at the top of the lock file again"
    assert "torch" not in pins
