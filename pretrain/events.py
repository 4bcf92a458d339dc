"""The event file of a run, ``metrics.jsonl``, and names around it.

One JSON object per line: ``{"run": {name, tags, params, datasets, terms, key, id}}``, ``{"step", "time", "metrics": {…}}``,
``{"artifact": path in the run's folder}``, ``{"params": {…}}``, ``{"changed": {setting: [before, now]}, "step"}``,
``{"status": "FINISHED" | "FAILED" | "KILLED" | "RUNNING"}`` (killed: told to stop; running: started again).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from occstream.sharding.secrets import redact, refuse_secrets

EVENTS, STATE = "metrics.jsonl", "tracking.json"
KEY = "run_key"  # tag that names a run at the server
VARIABLE = "MLFLOW_TRACKING_URI"


def default_uri(otherwise: str = "sqlite:///runs/mlflow.db") -> str:
    """Tracking URI where none is given: that of the environment, else a data base in a folder. Raises ValueError if the
    environment's has a password in it."""
    return refuse_secrets(os.environ.get(VARIABLE) or otherwise, VARIABLE)


def describe_uri(uri: str) -> str:
    """Where numbers go and who said so, for one line of output."""
    given = os.environ.get(VARIABLE)
    if given and given != uri:
        return (
            f"{redact(uri) or 'none'} ({VARIABLE}={redact(given)} is not used, as the recipe or command names another)"
        )
    return f"{redact(uri) or 'none'}{f' (from {VARIABLE})' if given else ''}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys (MLflow parameters are flat)."""
    out = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def read_events(path: Path) -> list[dict]:
    """All complete events of an event file; [] if there is none. A line torn by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def parse_event(line: bytes) -> dict:
    """One line of an event file; {} if a kill has damaged it."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
