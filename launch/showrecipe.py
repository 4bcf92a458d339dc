"""``occstream recipe``: the packaged recipes, and what their keys are, mean and default to."""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
from typing import Any

import yaml

from occstream.pretrain.config import load_config, packaged_recipes, read_recipe
from occstream.pretrain.configdocs import Key, recipe_keys
from occstream.pretrain.renamed import RENAMED


def show_recipe(name: str = "", key: str = "") -> str:
    """Text for the terminal.

    Args:
        name: of a packaged recipe, or the path of a ``.yaml`` file. Empty: the list of the packaged ones.
        key: a dotted key or a section. Empty: all keys.

    Raises:
        ValueError: no such recipe or key, or the recipe is a study, which ``occstream sweep`` runs.
    """
    return _shown(name, key) if name else _listed()


def _listed() -> str:
    lines = []
    for path in packaged_recipes().values():
        kind = "study " if _is_study(path.stem) else "recipe"
        head = f"{kind}  {path.stem:<17} "
        lines.append(
            textwrap.fill(
                _summary(path.read_text()), 110, initial_indent=head, subsequent_indent=" " * 26, break_on_hyphens=False
            )
        )
    lines.append("\nKeys and their values: occstream recipe NAME; one of them: occstream recipe NAME KEY")
    return "\n".join(lines)


def _is_study(name: str) -> bool:
    return not {"strategies", "axes", "steps"}.isdisjoint(read_recipe(name))


def _summary(text: str) -> str:
    """First sentence of the comment that a recipe begins with."""
    comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda x: x.startswith("#"), text.split("\n")))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0].rstrip(".:")


def _shown(name: str, key: str) -> str:
    if _is_study(name):
        raise ValueError(f"{name} is a study, not a recipe: see its plan with occstream sweep {name} --dry-run")
    config = load_config(name)
    keys = recipe_keys(config)
    values = {k.name: _value(config.to_dict(), k.name) for k in keys}
    chosen = [k for k in keys if not key or k.name == key or k.name.startswith(f"{key}.")]
    if not chosen:
        if key in RENAMED:
            raise ValueError(f"{key} is now {RENAMED[key]}: occstream recipe {name} {RENAMED[key]}")
        near = difflib.get_close_matches(key, values, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; occstream recipe {name} lists them"
        raise ValueError(f"recipe {name} has no key {key!r}{hint}")
    return "\n".join(_entry(k, values[k.name]) for k in chosen)


def _value(values: dict, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values


def _entry(key: Key, value: Any) -> str:
    """Value, what it would be by default where that differs, type, and the explanation below."""
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    note = "" if value == default or (not value and not default) else f"   # default {_plain(default)}"
    head = f"{key.name}: {_plain(value)}{note}"
    text = textwrap.fill(
        f"{key.doc.replace('``', '')} ({key.type})", 110, initial_indent="    ", subsequent_indent="    "
    )
    return f"{head}\n{text}"


def _plain(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # as YAML reads numbers
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
