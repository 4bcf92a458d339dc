"""Raw data sets by name, one module each, of this folder or of somebody else."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter, ValidationError

from occstream.sharding.places import place
from occstream.sharding.schema import Source

_REGISTERED: dict[str, Callable[..., Source]] = {}
_GROUP = "occstream.sources"


def register_source(name: str) -> Callable:
    """Decorator of an ``open_source`` that is not in this folder. Raises ValueError if the name is taken."""

    def add(work: Callable[..., Source]) -> Callable[..., Source]:
        if name in _packaged() or _REGISTERED.get(name, work) is not work:
            raise ValueError(f"source {name!r} is registered twice")
        _REGISTERED[name] = work
        return work

    return add


def _packaged() -> list[str]:
    """Modules of this folder that have an ``open_source``."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "open_source")]


def source_names() -> list[str]:
    """Sources that come with the package, those that are registered, and those of installed packages (entry points in
    ``occstream.sources``)."""
    points = [point.name for point in metadata.entry_points(group=_GROUP)]
    return list(dict.fromkeys([*_packaged(), *_REGISTERED, *points]))


def _opener(name: str) -> Callable[..., Source]:
    """The function that opens a source. Raises ValueError that lists the sources."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in _packaged():
        return importlib.import_module(f"{__name__}.{name}").open_source
    for point in metadata.entry_points(group=_GROUP, name=name):
        return point.load()
    near = difflib.get_close_matches(name, source_names(), 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown source {name!r}{hint} Sources: {', '.join(source_names())}")


def source_options(name: str) -> dict[str, inspect.Parameter]:
    """Options of a source: the parameters of its ``open_source``. Raises ValueError that lists the sources."""
    return dict(inspect.signature(_opener(name)).parameters)


def open_source(name: str, options: Mapping[str, Any]) -> Source:
    """Opens a raw data set by module name.

    Args:
        name: for example ``"synthetic"`` or ``"nuscenes"``.
        options: arguments of that module's ``open_source``; checked against its annotations.

    Raises:
        ValueError: unknown source, unknown option (names the nearest), bad value, or what the source itself finds.
    """
    known = source_options(name)
    opener = _opener(name)
    hints = typing.get_type_hints(opener)
    values = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"source {name!r} has no option {key!r}{hint} Options: {', '.join(known)}")
        try:
            values[key] = TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            problems = error.errors()
            listed = any(problem["type"] == "tuple_type" for problem in problems)
            said = f"write a list, {key}=[{value}]" if listed else problems[0]["msg"]
            raise ValueError(f"source {name!r}: {key}={value!r}: {said}") from None
    missing = [k for k, p in known.items() if p.default is p.empty and k not in values]
    if missing:
        raise ValueError(f"source {name!r} needs {' and '.join(missing)}")
    for key in values.keys() & {"root", "labels_root", "metadata"}:
        values[key] = place(values[key]) if isinstance(values[key], str) else values[key]
    return opener(**values)
