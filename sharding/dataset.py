"""Packed data sets in training code of your own: ``occstream.open``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from occstream.sharding import storage
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Order, by_scenes, evaluation_batches, training_batches
from occstream.sharding.schema import Frame
from occstream.sharding.stream import ShardReader, Stream


def open_dataset(
    url: str,
    groups: Sequence[str] = (),
    *,
    window: Sequence[int] = (),
    batch: int = 1,
    scenes: Sequence[str] = (),
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    threads: int = 2,
    transform: Callable[[Frame, int], Any] | None = None,
    cache: str = "",
    cache_gb: float = 64.0,
) -> Dataset:
    """A packed data set as an iterable over batches of decoded frames.

    Args:
        url: a folder, ``file://``, ``s3://``, or another URL that fsspec knows.
        groups: to read, such as cameras, lidar, labels or a sidecar; other bytes are never fetched. Empty: all.
        window: offsets of key-frames around each one, in ``frame.window`` where the scene has them.
        batch: frames over all ranks.
        scenes: names; empty: all.
        shuffle: endless, each epoch in an order of its own that depends on the scenes and ``seed`` alone, not on the number of
            ranks. False: every frame once, in order, ``batch`` at a time on each rank.
        rank, world: this process among those that share each batch.
        threads: that read and decode; 0: the caller's own.
        transform: called in the threads with a frame and its epoch; what it returns takes the frame's place.
        cache: folder for shards of a remote data set; "": ranges are read from the store. ``cache_gb`` is its size.

    Raises:
        ValueError: no data set there, or no such group or scene.
    """
    manifest = Manifest.load(url)
    wanted = tuple(groups) or manifest.groups
    sidecars = [g for g in wanted if g not in manifest.groups and g in manifest.sidecars()]
    return Dataset(
        manifest.with_label_sets(sidecars),
        groups=wanted,
        window=tuple(window),
        batch=batch,
        scenes=manifest.named(tuple(scenes)) if scenes else list(range(len(manifest.scenes))),
        seed=seed if shuffle else None,
        ranks=(rank, world),
        threads=threads,
        transform=transform or (lambda frame, epoch: frame),
        cache=storage.ShardCache(cache, int(cache_gb * 2**30)) if cache and not storage.is_local(url) else None,
    )


class Dataset:
    """Made by ``open_dataset``. Iterating starts where the last iteration was, or at what ``load_state_dict`` says.

    Attributes:
        manifest: of the data set.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        groups: Sequence[str],
        window: tuple[int, ...],
        batch: int,
        scenes: list[int],
        seed: int | None,
        ranks: tuple[int, int],
        threads: int,
        transform: Callable[[Frame, int], Any],
        cache: storage.ShardCache | None,
    ) -> None:
        self.manifest, self._groups, self._window, self._batch = manifest, tuple(groups), window, batch
        self._scenes, self._seed, self._ranks, self._threads = scenes, seed, ranks, threads
        self._transform, self._cache = transform, cache
        self._state = {"epoch": 0, "offset": 0, "batches": 0}

    def __len__(self) -> int:
        """Frames of one epoch over all ranks."""
        return int(self.manifest.scenes.frames[self._scenes].sum(dtype="int64"))

    def __iter__(self) -> Iterator[list]:
        """This rank's share of each batch."""
        scenes = self.manifest.scenes
        frames = scenes.frames[self._scenes].tolist()
        rank, world = self._ranks
        if self._seed is None:
            plan, most = evaluation_batches(self._scenes, frames, self._batch, rank=rank, world=world), self._batch
        else:
            key = by_scenes(scenes.names(self._scenes), frames)
            shards = scenes.shards[self._scenes]
            order = Order(key, self._scenes, frames, self._seed, shards=shards, lanes=self._batch)
            plan, most = training_batches(order, self._batch, rank, world, **self._state), -(-self._batch // world)
        reader = ShardReader(self.manifest, self._groups, self._cache)
        work = lambda frame, epoch, views: self._transform(frame, epoch)  # noqa: E731
        with Stream(reader, plan, {}, work, capacity=most, threads=self._threads, window=self._window) as stream:
            for got in stream:
                self._state = got.state
                yield got.returned

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch: three integers, the same on every rank, good for any number of ranks."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a position. Raises ValueError without shuffling, where there is none."""
        if self._seed is None:
            raise ValueError("a data set that is read in order, once, has no position to continue from")
        self._state = dict(state)
