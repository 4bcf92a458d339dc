"""Models by function name. Registering a model is enough to have it tested (``tests/models/test_registry.py``)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from occstream.sharding.grid import VoxelGrid


@dataclass(frozen=True)
class Entry:
    """A registered model: the type of its settings, and what builds it from them."""

    config: type  # dataclass of the model's settings: the recipe's ``model`` section, without ``name``
    build: Callable[..., nn.Module]


MODELS: dict[str, Entry] = {}


def register(config: type) -> Callable:
    """Decorator for ``build(config, *, grid, num_classes, image_size, semantic) -> nn.Module``; its name is the key."""

    def add(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if build.__name__ in MODELS:
            raise ValueError(f"model {build.__name__!r} is registered twice")
        MODELS[build.__name__] = Entry(config, build)
        return build

    return add


def model_entry(name: str) -> Entry:
    """Entry by name. Raises ValueError that lists the names."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def build_model(
    name: str,
    config: Any,
    *,
    grid: VoxelGrid,
    num_classes: int,
    image_size: tuple[int, int],
    semantic: bool,
) -> nn.Module:
    """Builds a network.

    Args:
        name: key in ``MODELS``.
        config: an instance of the entry's config dataclass.
        grid: full-resolution output grid.
        num_classes: K, without free.
        image_size: (H, W) of the network's input, pixels.
        semantic: False builds the pre-training network: nothing after the binary decoder exists (B2S, Sec. 3.3).
    """
    entry = model_entry(name)
    if not isinstance(config, entry.config):
        raise ValueError(f"model {name!r} takes a {entry.config.__name__}, got {type(config).__name__}")
    return entry.build(config, grid=grid, num_classes=num_classes, image_size=image_size, semantic=semantic)
