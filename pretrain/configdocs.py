"""What each key of a recipe is: its type, default and explanation, read from the config dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from occstream.pretrain.config import Config


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: dotted.
        type: as written in the code, for example ``tuple[int, int]``.
        default: as a plain value; ``...`` if it must be given.
        doc: explanation, one paragraph.
    """

    name: str
    type: str
    default: Any
    doc: str


def field_docs(cls: type) -> dict[str, str]:
    """The string literals below the fields of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def keys_of(cls: type, prefix: str = "", inner: dict[str, type] | None = None) -> Iterator[Key]:
    """All keys of a config dataclass and of the sections in it, in their order.

    Args:
        prefix: of the names, with its dot.
        inner: the dataclasses of sections whose type the annotation leaves open, by dotted name.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        section = (inner or {}).get(name, hints[field.name])
        if dataclasses.is_dataclass(section):
            yield from keys_of(section, f"{name}.", inner)
            continue
        default = field.default if field.default is not dataclasses.MISSING else ...
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Key(name, str(field.type), default, docs.get(field.name, ""))


def recipe_keys(config: Config) -> list[Key]:
    """All keys that a recipe of this config's task and model may set."""
    return list(keys_of(type(config), inner=type(config).open_sections(config.to_dict())))
