"""Settings that had another name in earlier versions: an error in recipes, read as what they are in checkpoints."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from occstream.sharding.secrets import redacted

RENAMED = {
    **{f"train.{key}": f"optim.{key}" for key in ("lr", "weight_decay", "warmup", "schedule", "min_lr_ratio", "clip")},
    "loss.normaliser": "loss.normalizer",
    "loss.replay_normaliser": "loss.replay_normalizer",
}


def old_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of earlier versions among nested settings, with their names now."""
    found = {}
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        inside = settings.get(section)
        if isinstance(inside, Mapping) and key in inside:
            found[old] = new
    return found


def refuse_old_names(settings: Mapping[str, Any]) -> None:
    """Raises ValueError with the new names if a recipe has old ones."""
    if found := old_names(settings):
        raise ValueError(f"settings have new names: {_listed(found)}; change them in the recipe or on the command line")


def saved_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a checkpoint was trained with, under their names now and without secrets; what had another name is
    printed.

    Args:
        state: of the checkpoint.
    """
    settings = dict(redacted(state["config"]))
    found = old_names(settings)
    for old, new in found.items():
        (section, _, key), (target, _, name) = old.partition("."), new.partition(".")
        if not isinstance(settings.get(target, {}), Mapping):
            continue  # ``parse_config`` says what is wrong with it
        settings[section] = dict(settings[section])
        value = settings[section].pop(key)
        settings[target] = {name: value, **settings.get(target, {})}
    if found and int(os.environ.get("RANK", 0)) == 0:
        _say_once(f"settings of a checkpoint of an earlier version are read by their new names: {_listed(found)}")
    return settings


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{old} is now {new}" for old, new in found.items())


@functools.cache
def _say_once(text: str) -> None:
    print(text, flush=True)
