"""Raw data sets, one module each; ``open_source`` finds them by module name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from occstream.sharding.places import place
from occstream.sharding.schema import Source


def source_names() -> list[str]:
    """Modules of this folder that have an ``open_source``."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if hasattr(importlib.import_module(f"{__name__}.{module.name}"), "open_source"):
            found.append(module.name)
    return found


def source_options(name: str) -> dict[str, inspect.Parameter]:
    """Options of a source: the parameters of its ``open_source``. Raises ValueError that lists the sources."""
    if name not in source_names():
        near = difflib.get_close_matches(name, source_names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown source {name!r}{hint} Sources: {', '.join(source_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return dict(inspect.signature(module.open_source).parameters)


def open_source(name: str, options: Mapping[str, Any]) -> Source:
    """Opens a raw data set by module name.

    Args:
        name: for example ``"synthetic"`` or ``"nuscenes"``.
        options: arguments of that module's ``open_source``; checked against its annotations.

    Raises:
        ValueError: unknown source, unknown option (names the nearest), bad value, or what the source itself finds.
    """
    known = source_options(name)
    module = importlib.import_module(f"{__name__}.{name}")
    hints = typing.get_type_hints(module.open_source)
    values = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"source {name!r} has no option {key!r}{hint} Options: {', '.join(known)}")
        try:
            values[key] = TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"source {name!r}: {key}={value!r}: {error.errors()[0]['msg']}") from None
    missing = [k for k, p in known.items() if p.default is p.empty and k not in values]
    if missing:
        raise ValueError(f"source {name!r} needs {' and '.join(missing)}")
    for key in values.keys() & {"root", "labels_root", "metadata"}:
        values[key] = place(values[key]) if isinstance(values[key], str) else values[key]
    return module.open_source(**values)
