"""Where a run comes from, as MLflow shows it: code, data sets, and a description in words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from occstream.sharding.manifest import Manifest
from occstream.sharding.secrets import redact

if TYPE_CHECKING:
    from occstream.pretrain.tasks.base import Task


@dataclass(frozen=True)
class Reading:
    """Scenes of a data set that a run reads.

    Attributes:
        use: what for: "training", "replay" or "evaluation".
        manifest: of the data set, with the labels in use.
        scenes, frames: how many of them.
    """

    use: str
    manifest: Manifest
    scenes: int
    frames: int

    def __str__(self) -> str:
        return f"{self.scenes} scenes ({self.frames:,} frames) of `{redact(self.manifest.url)}`"


def code_version() -> str:
    """Commit of the checkout this runs from ("+" if it has changes), else ``OCCSTREAM_COMMIT`` (set in the image, which
    has no .git), else the version of the installed package."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("OCCSTREAM_COMMIT") or metadata.version("occstream")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def source_tags(code: str) -> dict[str, str]:
    """Tags from which MLflow fills its columns Source and Version.

    Args:
        code: of ``code_version``. A version that is no commit is not given as one.
    """
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    if re.fullmatch(r"[0-9a-f]{7,40}\+?", code):
        tags["mlflow.source.git.commit"] = code.removesuffix("+")
    return tags


def datasets(readings: Sequence[Reading]) -> list[dict[str, str]]:
    """Data sets of a run, each once, as MLflow keeps them: name, digest (the fingerprint), where it is (without secrets),
    what is in it, and what it is used for."""
    found: dict[str, dict[str, str]] = {}
    for reading in readings:
        manifest, use = reading.manifest, reading.use
        if manifest.fingerprint in found:
            uses = found[manifest.fingerprint]["context"].split(", ")
            found[manifest.fingerprint]["context"] = ", ".join(dict.fromkeys([*uses, use]))
            continue
        group, url = manifest.label_group, redact(manifest.url)
        local = "://" not in url
        profile = {
            "scenes": len(manifest.scenes),
            "frames": manifest.num_frames,
            "labels": manifest.labels,
            "taxonomy": manifest.taxonomy,
            "grid": manifest.grid.name if manifest.grid else "",
        }
        found[manifest.fingerprint] = {
            "name": manifest.source if group == "labels" else f"{manifest.source}/{group}",
            "digest": manifest.fingerprint,
            "source_type": "local" if local else url.partition("://")[0],
            "source": json.dumps({"uri": str(Path(url).absolute()) if local else url}),
            "profile": json.dumps({key: value for key, value in profile.items() if value}),
            "context": use,
        }
    return list(found.values())


def description(task: Task, readings: Sequence[Reading], *, steps: int, processes: int, parameters: int) -> str:
    """What a run does, in Markdown.

    Args:
        readings: what it reads.
        steps: of the whole run; ``processes`` that share them, ``parameters`` of the network.
    """
    config = task.config
    lines = [f"**{task.title}**, stage {config.stage}. {task.stages[config.stage]}", ""]
    lines += [f"* {reading.use}: {reading}" for reading in readings]
    init = config.train.init
    lines.append(f"* start: {f'weights of `{redact(init)}`' if init else 'from scratch'}, seed {config.train.seed}")
    size = f"{parameters:,} parameters, {config.train.precision}"
    shared = "1 process" if processes == 1 else f"{processes} processes"
    lines.append(f"* {steps:,} steps of {config.train.batch} frames on {shared}, {size}")
    lines += ["", f"Scores again: `occstream evaluate {redact(config.output)}`"]
    return "\n".join(lines)
