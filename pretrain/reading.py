"""From a data set to batches on a device: one stream opened, its arrays as tensors, copied ahead on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from occstream.models import Batch
from occstream.pretrain.distributed import World
from occstream.sharding import storage
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Plan
from occstream.sharding.places import place
from occstream.sharding.stream import ShardReader, Stream, StreamBatch

if TYPE_CHECKING:
    from occstream.pretrain.config import Config
    from occstream.pretrain.tasks.base import Sample


def to_batch(got: StreamBatch, device: torch.device) -> Batch:
    """Stream arrays as tensors; on the CPU they share memory with the ring, to a GPU they are being copied."""
    arrays = {**got.arrays, **got.made}
    batch = Batch.of({name: torch.as_tensor(array) for name, array in arrays.items()}, got.keys)
    return batch if device.type == "cpu" else batch.to(device)


def device_batches(stream: Iterable[StreamBatch], device: torch.device) -> Iterator[Batch]:
    """Batches of a stream that ends, on a device; on the CPU each is valid until the next."""
    for got in stream:
        batch = to_batch(got, device)
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            current.synchronize()  # the stream's buffers go back to the readers
            batch.record(current)  # what another thread made is not given away while the network reads it
        yield batch


def open_stream(
    manifest: Manifest, batches: Plan, sample: Sample, *, capacity: int, config: Config, world: World
) -> Stream:
    """A stream of a data set's frames as a task's samples.

    Args:
        batches: samples of each batch of this rank, and the position after it.
        capacity: most samples in a batch.
    """
    threads = config.train.threads
    groups = tuple(manifest.label_group if group == "labels" else group for group in sample.groups)
    return Stream(
        ShardReader(manifest, groups, cache=cache(manifest.url)),
        batches,
        sample.fields(),
        sample,
        capacity=max(1, capacity),
        threads=threads,
        allocate=_pinned if world.device.type == "cuda" else None,
        deadline=config.train.data_timeout,
        window=sample.window,
        finish=sample.finish(world.device, threads),
    )


def _pinned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return torch.zeros(shape, dtype=getattr(torch, dtype)).pin_memory().numpy()


def cache(url: str) -> storage.ShardCache | None:
    """Node-local shard cache for remote data: ``OCCSTREAM_CACHE`` (default ~/.cache/occstream), 64 GiB or
    ``OCCSTREAM_CACHE_GB``."""
    if storage.is_local(url):
        return None
    folder = place(os.environ.get("OCCSTREAM_CACHE", "")) or Path.home() / ".cache" / "occstream"
    size = storage.from_environment("OCCSTREAM_CACHE_GB", 64, "GiB from 0, such as 64")
    return storage.ShardCache(folder, int(size * 2**30))


class Prefetcher:
    """Copies the next batch to the GPU, on a stream of its own, while the network works on the one before.

    Only a batch that is already there is taken ahead: nobody waits for data earlier than without it, and the stream's
    buffers go back to the readers once their copy is done.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: tuple[Batch, dict, torch.cuda.Event | None] | None = None
        self.copied: torch.cuda.Event | None = None  # of the batch whose buffers the stream has lent

    def next(self) -> tuple[Batch, dict]:
        """The next batch on the device and the position after it."""
        batch, state, done = self.held or self._copy()
        self.held = None
        if done is not None:
            # The network's kernels wait for the copy, and its memory is not given away before they are done.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            batch.record(current)
        if self.stream.ready():
            self.held = self._copy()
        return batch, state

    def _copy(self) -> tuple[Batch, dict, torch.cuda.Event | None]:
        if self.copies is None:
            got = next(self.stream)
            return to_batch(got, self.device).clone(), got.state, None
        if self.copied is not None:
            # Asking for a batch gives the last one's buffers back to the readers. Between micro-batches nothing else has waited
            # for their copy.
            self.copied.synchronize()
        with torch.cuda.stream(self.copies):
            got = next(self.stream)
            batch = to_batch(got, self.device)
            self.copied = torch.cuda.Event()
            self.copied.record()
        return batch, got.state, self.copied
