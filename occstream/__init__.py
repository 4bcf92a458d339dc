"""occstream: pre-training of 3D occupancy networks on streamed shards. ``occstream.open`` opens a packed data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occstream.sharding.dataset import open_dataset as open

__all__ = ["open"]


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is asked for.
    if name == "open":
        from occstream.sharding.dataset import open_dataset

        return open_dataset
    raise AttributeError(f"module 'occstream' has no attribute {name!r}")
