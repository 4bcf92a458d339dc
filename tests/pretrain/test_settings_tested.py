"""Every key of a recipe is set to another value than its default by some test."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from occstream.models import MODELS
from occstream.pretrain.config import Config, ReplaySource, parse_overrides
from occstream.pretrain.configdocs import Key, keys_of
from occstream.pretrain.events import flatten

UNKNOWN = object()  # a value that only the running test knows
# What no test on a CPU without a network can turn, and what turns it instead.
ELSEWHERE: dict[str, str] = {}


def all_keys() -> dict[str, list[Any]]:
    """Defaults by dotted name; a key of several models has several."""
    found: dict[str, list[Any]] = {}
    for entry in MODELS.values():
        key: Key
        for key in keys_of(Config, inner={"model": entry.config}):
            found.setdefault(key.name, []).append(key.default)
    for key in keys_of(ReplaySource, "replay.more."):
        found[key.name] = [key.default]
    return found


def settings(tree: ast.AST, sections: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) that a test module sets: overrides, YAML in strings, and config dataclasses that it makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values)
            yield from text_settings(text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from text_settings(node.value)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for word in node.keywords if name in sections else ():
                value = word.value.value if isinstance(word.value, ast.Constant) else UNKNOWN
                yield f"{sections[name]}{word.arg}", value
        elif isinstance(node, ast.Dict) and "model." in sections.values():
            # The tests of networks hand their settings on as words.
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield f"model.{key.value}", value.value


def text_settings(text: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of an override or of YAML."""
    if "=" in text and " " not in text.partition("=")[0] and "\n" not in text:
        try:
            for name, value in flatten(parse_overrides([text])).items():
                yield name, value
                for part in value if isinstance(value, list) else ():
                    yield from ((f"{name}.{key}", UNKNOWN) for key in (part if isinstance(part, dict) else ()))
        except (ValueError, TypeError, yaml.YAMLError):  # TypeError: a key that is no text
            return
    elif "\n" in text and ":" in text:
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError:
            return
        if isinstance(tree, dict):
            yield from flatten(tree).items()


def test_every_key_is_turned_by_a_test(repo_root: Path):
    keys = all_keys()
    sections = {type(getattr(Config(), f.name)).__name__: f"{f.name}." for f in dataclasses.fields(Config)}
    sections |= {entry.config.__name__: "model." for entry in MODELS.values()}
    sections |= {"build": "model.", "load_config": ""}
    turned = set()
    for path in sorted((repo_root / "tests").rglob("*")):
        if path == Path(__file__) or path.suffix not in (".py", ".yaml"):
            continue
        text = path.read_text()
        found = settings(ast.parse(text), sections) if path.suffix == ".py" else text_settings(text)
        for name, value in found:
            if name not in keys:  # an entry of a mapping
                name = next((key for key in keys if name.startswith(f"{key}.")), name)
            if value is UNKNOWN or any(plain(value) != plain(default) for default in keys.get(name, ())):
                turned.add(name)
    never = [name for name in keys if name not in turned]
    assert sorted(never) == sorted(ELSEWHERE), "test what these do, or say in ELSEWHERE what does"


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
