"""A study's runs as cluster jobs: a Slurm array or a Kubernetes Indexed Job for each stage."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import yaml

from occstream.launch.grid import Study, Training

USER = 10001  # of infra/Dockerfile

_SLURM = """#!/bin/bash
# Written by `occstream sweep --write slurm`. Set partition, account and GPUs for your cluster.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}/slurm-%x-%a.log
set -euo pipefail
cd {folder}
mapfile -t commands < {list}
echo "${{commands[$SLURM_ARRAY_TASK_ID]}}"
# A rerun or requeue resumes from the newest complete checkpoint.
exec bash -c "${{commands[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_jobs(kind: str, study: Study, runs: Sequence[Training]) -> list[Path]:
    """Writes jobs for runs that are not done; pre-training first, fine-tuning after it.

    Args:
        kind: "slurm" or "kubernetes".

    Returns:
        Files: per stage a list of commands (one line each) and a job; for Slurm also ``submit.sh``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("slurm", "kubernetes"):
        raise ValueError(f"--write {kind}: must be slurm or kubernetes")
    folder = Path(study.output) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    files, submit = [], ["#!/bin/bash", "set -euo pipefail"]
    for stage in ("pretrain", "finetune"):
        mine = [r for r in runs if r.config.stage == stage]
        if not mine:
            continue
        listed = folder / f"{stage}.txt"
        lines = [
            shlex.join(
                ["deepspeed", "--num_gpus=1", f"launch/{stage}.py", "--recipe", f"{study.output}/recipes/{r.name}.yaml"]
            )
            for r in mine
        ]
        listed.write_text("\n".join(lines) + "\n")
        files.append(listed)
        name = f"{study.name}-{stage}".lower().replace("_", "-")
        if kind == "slurm":
            script = folder / f"{stage}.sbatch"
            content = _SLURM.format(
                name=name,
                last=len(mine) - 1,
                output=shlex.quote(str(folder)),
                folder='"${SLURM_SUBMIT_DIR:?}"',
                list=shlex.quote(str(listed)),
            )
            script.write_text(content)
            after = ' --dependency=afterany:"$pretrain"' if stage == "finetune" and len(files) > 2 else ""
            quoted = shlex.quote(str(script))
            submit += [f"{stage}=$(sbatch --parsable{after} {quoted})", f'echo "{stage}: job ${stage}"']
        else:
            script = folder / f"{stage}.yaml"
            script.write_text(yaml.safe_dump(_indexed_job(name, lines), sort_keys=False))
        files.append(script)
    if kind == "slurm":
        (folder / "submit.sh").write_text("\n".join(submit) + "\n")
        files.append(folder / "submit.sh")
    return files


def _indexed_job(name: str, lines: Sequence[str]) -> dict:
    """One index per run; a failed one is tried again without the others."""
    script = 'set -euo pipefail\nmapfile -t commands <<"END"\n' + "\n".join(lines) + "\nEND\n"
    script += 'exec bash -c "${commands[$JOB_COMPLETION_INDEX]}"\n'
    mounts = {"runs": "/opt/occstream/runs", "scratch": "/tmp", "shm": "/dev/shm"}
    container = {
        "name": "occstream",
        "image": f"occstream:{metadata.version('occstream')}",
        "workingDir": "/opt/occstream",
        "command": ["bash", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "OCCSTREAM_CACHE", "value": "/tmp/shards"}],
        "envFrom": [{"secretRef": {"name": "occstream-s3", "optional": True}}],
        "resources": {"limits": {"nvidia.com/gpu": 1, "cpu": "16", "memory": "96Gi"}},
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name[:52].rstrip("-")},
        "spec": {
            "completions": len(lines),
            "parallelism": len(lines),
            "completionMode": "Indexed",
            "backoffLimitPerIndex": 3,
            "maxFailedIndexes": len(lines),
            "template": {
                "metadata": {"labels": {"occstream/tracking": "client"}},  # what the network policy of MLflow lets in
                "spec": {
                    "restartPolicy": "Never",
                    "serviceAccountName": "occstream-train",
                    "automountServiceAccountToken": False,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": USER,
                        "runAsGroup": USER,
                        "fsGroup": USER,
                        "fsGroupChangePolicy": "OnRootMismatch",
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [container],
                    "volumes": [
                        {"name": "runs", "persistentVolumeClaim": {"claimName": "occstream-runs"}},
                        {"name": "scratch", "emptyDir": {}},
                        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
                    ],
                },
            },
        },
    }
