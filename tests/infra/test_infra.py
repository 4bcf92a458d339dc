"""Every file of infra/ passes its linter, offline."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from occstream.launch import clusterjobs
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


@pytest.mark.process
@pytest.mark.parametrize("file", SHELL, ids=lambda p: p.name)
def test_shell_scripts(file):
    passes("bash", "-n", file)
    passes(tool("shellcheck"), "-s", "bash", file)


@pytest.mark.process
@pytest.mark.parametrize("file", sorted(INFRA.glob("*Dockerfile")), ids=lambda p: p.name)
def test_dockerfiles(file):
    passes(tool("hadolint"), "--failure-threshold", "warning", file)
    text = file.read_text()
    assert re.search(r"^USER \w+", text, re.M), "not as root"
    assert all(re.search(r":\d", line) for line in re.findall(r"^FROM (.*)", text, re.M)), "a fixed version"
    assert "tini" in text or file.name != "Dockerfile"


@pytest.mark.process
def test_yaml_is_clean():
    passes(tool("yamllint"), "-d", RULES, INFRA, ROOT / "launch/recipes")


@pytest.mark.process
@pytest.mark.parametrize("name", ["accounts", "mlflow", "shard-job"])
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


def test_secrets_are_asked_for_and_not_here():
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert set(compose["services"]) == {"s3", "postgres", "mlflow"}
    for line in (INFRA / "example.env").read_text().splitlines():
        assert line.startswith("#") or line.endswith("="), line
    json.loads((INFRA / "seaweedfs-s3.example.json").read_text())
    ignored = (ROOT / ".gitignore").read_text()
    assert "infra/.env" in ignored
    # Ports are bound to this machine only.
    for service in compose["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


def _documents():
    files = [*sorted((INFRA / "k8s").glob("*.yaml")), INFRA / "compose.yaml"]
    return [d for f in files for d in yaml.safe_load_all(f.read_text())]


def _pods():
    """name → (labels, pod spec, container) of everything that runs on Kubernetes, also of a study's jobs."""
    found = {}
    for doc in [*_documents(), clusterjobs._indexed_job("study", ["true"])]:
        if doc.get("kind") == "TrainJob":
            [job] = doc["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            template = job["template"]["spec"]["template"]
        elif doc.get("kind") in ("Job", "Deployment"):
            template = doc["spec"]["template"]
        else:
            continue
        [container] = template["spec"]["containers"]
        found[doc["metadata"]["name"]] = template.get("metadata", {}).get("labels", {}), template["spec"], container
    return found


def _images(node):
    if isinstance(node, dict):
        return [v for k, v in node.items() if k == "image"] + [i for v in node.values() for i in _images(v)]
    return [i for v in node for i in _images(v)] if isinstance(node, list) else []


def test_images_have_a_version():
    images = _images(_documents())
    assert len(images) >= 5
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    for image in images:
        assert re.search(r":\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image), image
        assert not image.startswith("occstream") or image.endswith(f":{version}"), image


def test_every_pod_runs_confined():
    pods = _pods()
    assert set(pods) == {"mlflow", "occstream-shard", "occstream-pretrain", "study"}
    accounts = [d["metadata"]["name"] for d in _documents() if d.get("kind") == "ServiceAccount"]
    for name, (_, pod, container) in pods.items():
        context, own = pod["securityContext"], container["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] == context["fsGroup"] == clusterjobs.USER, name
        assert f"--uid {context['runAsUser']} " in (INFRA / "Dockerfile").read_text(), name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert pod["serviceAccountName"] in accounts, name
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert set(mounts.values()) == set(volumes), name
        assert "emptyDir" in volumes[mounts["/tmp"]], name
        if name in ("occstream-pretrain", "study"):
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory", name


def test_only_labeled_pods_reach_the_tracking_server():
    pods = _pods()
    [policy] = [d["spec"] for d in _documents() if d.get("kind") == "NetworkPolicy"]
    assert policy["podSelector"]["matchLabels"].items() <= pods["mlflow"][0].items()
    [rule] = policy["ingress"]
    [source] = rule["from"]
    wanted = source["podSelector"]["matchLabels"].items()
    assert [name for name, (labels, *_) in pods.items() if wanted <= labels.items()] == ["occstream-pretrain", "study"]


def test_a_study_job_fits_its_schema():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = clusterjobs._indexed_job("study", ["true"])
    kubernetes_validate.validate(job, "1.37", strict=True)
    job["spec"]["completion"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_policies_give_the_least_rights():
    may = {}
    for file in sorted((INFRA / "iam").glob("*.json")):
        found = json.loads(file.read_text())["Statement"]
        may[file.stem] = {a for s in found for a in s["Action"]}
        for statement in found:
            assert statement["Effect"] == "Allow"
            bucket, _, key = statement["Resource"].removeprefix("arn:aws:s3:::").partition("/")
            assert "*" not in bucket
            if statement["Action"] == ["s3:ListBucket"]:
                assert not key
                assert statement["Condition"]["StringLikeIfExists"]["s3:prefix"]
            else:
                assert re.fullmatch(r"[\w-]+/\*", key), "one prefix"
    assert may["reader"] == {"s3:ListBucket", "s3:GetObject"}
    writing = may["reader"] | {
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
        "s3:ListMultipartUploadParts",
    }
    assert may["writer"] == may["checkpoints"] == may["mlflow"] == writing


@pytest.mark.parametrize(("file", "context"), [("Dockerfile", ROOT), ("mlflow.Dockerfile", INFRA)])
def test_images_see_only_what_they_need(file, context):
    first, *rest = [w for w in (context / ".dockerignore").read_text().split("\n") if w and not w.startswith("#")]
    assert first == "*", "nothing goes to the Docker daemon that is not named: no data, runs, .git, .env"
    named = [w[1:] for w in rest if w.startswith("!")]
    assert named
    assert all((context / w).exists() for w in named)
    copied = re.findall(r"^COPY (\S+) ", (INFRA / file).read_text(), re.M)
    assert all(w in (".", *named) for w in copied)
    if context == ROOT:
        assert {"sharding", "models", "evaluation", "pretrain", "launch", "pyproject.toml"} <= set(named)


def test_the_tracking_image_is_installed_by_hashes():
    text = (INFRA / "mlflow.Dockerfile").read_text()
    assert all("--require-hashes" in line for line in text.split("\n") if "pip install" in line)
    lock = (INFRA / "mlflow.lock").read_text()
    pins = re.findall(r"^([\w.-]+)(?:\[\S+\])?==(\S+)(.*(?:\n    --hash=.*)+)", lock, re.M)
    assert len(pins) == len(re.findall(r"^[\w.-]+.*==", lock, re.M))
    assert {f"{name}=={version}" for name, version, _ in pins} >= set((INFRA / "mlflow.in").read_text().split())
    assert f"mlflow=={dict((n, v) for n, v, _ in pins)['mlflow']}" in (ROOT / "pyproject.toml").read_text()


def test_the_lock_file_pins_what_the_project_asks_for():
    lock = (INFRA / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.M))
    assert lock.count("--hash=sha256:") >= len(pins)
    text = (ROOT / "pyproject.toml").read_text()
    for name, version in re.findall(r'"([\w-]+)==([\d.]+)",', text.split("[project.optional")[0]):
        if name != "torch":
            assert pins[name] == version, f"{name}: run the command at the top of the lock file again"
    assert "torch" not in pins


@pytest.mark.parametrize(("cores", "given", "threads"), [("96", None, "6"), ("8", None, "1"), ("96", "3", "3")])
def test_the_slurm_job_hands_its_cores_to_the_ranks(tmp_path, cores, given, threads):
    """Run with a stand-in for srun, which says what it was given."""
    for name, line in {"scontrol": "echo node-0", "srun": 'echo "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_NODELIST": "node-[0-3]", "SLURM_NNODES": "4", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": cores}
    env |= {"SLURM_GPUS_ON_NODE": "8"} | ({"OMP_NUM_THREADS": given} if given else {})
    command = ["bash", INFRA / "slurm/train.sbatch", "pretrain", "tiny", f"output={tmp_path}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{cores} {threads} --kill-on-bad-exit=1 torchrun --nnodes 4 --nproc-per-node 8 ")


def test_the_ssh_launcher_forwards_what_the_ranks_need(tmp_path, monkeypatch):
    """DeepSpeed's own launcher reads the example, up to the command it would give to pdsh."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    example = INFRA / "deepspeed_env.example"
    commands = []

    class Started:
        returncode = 0

        def __init__(self, command, env):
            commands.append(command)

        def wait(self):
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", str(example))
    monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_PATHS", ["."])
    monkeypatch.setattr(runner.subprocess, "Popen", Started)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    monkeypatch.setattr(runner.PDSHRunner, "backend_exists", lambda _: True)
    words = [
        "--hostfile",
        str(INFRA / "hostfile.example"),
        "--no_ssh_check",
        "--master_addr",
        "node-0",
        "launch/pretrain.py",
    ]
    runner.main(words)
    [command] = commands
    [exports] = [word for word in command if word.startswith("export ")]
    given = dict(re.findall(r"export (\w+)=(.*?);", exports))
    listed = dict(line.split("=", 1) for line in example.read_text().splitlines())
    assert listed.items() <= given.items()
    assert given["MLFLOW_TRACKING_URI"]
    needed = {
        "GLOO_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "AWS_PROFILE",
        "AWS_ENDPOINT_URL_S3",
        "OCCSTREAM_CACHE",
    }
    assert needed <= set(listed)
    # The launcher prints the command: what it forwards is no place for secrets.
    assert not [name for name in listed if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", name)]
