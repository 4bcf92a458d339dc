"""Streams of a run: the data it trains on, the replayed pre-training frames, and what it is evaluated on.

A step is one S batch plus one B batch, concatenated (B2S, Sec. 3.3). Each has its own order and position; both
positions go into the checkpoint and know nothing of ranks.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from occstream.models import Batch, concat
from occstream.pretrain.augment import FrameFiller
from occstream.pretrain.config import Config, Mask
from occstream.pretrain.deviceimages import DeviceImages
from occstream.pretrain.distributed import World
from occstream.sharding import storage
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import (
    BY_CONTENT,
    BY_SCENES,
    Order,
    Quotas,
    by_content,
    by_scenes,
    evaluation_batches,
    training_batches,
)
from occstream.sharding.places import place
from occstream.sharding.schema import IGNORE, frame_key
from occstream.sharding.stream import Field, ShardReader, Stream, StreamBatch


class TrainData:
    """Batches of one run for one rank.

    Attributes:
        epoch_samples: S frames of one pass.
        steps: optimizer steps of the whole run.
        scenes: names of all scenes that any stream takes frames from.
        frames_per_step: S and B frames of all ranks in one optimizer step.
        fingerprint, fingerprints: of the S manifest; of all.
        unknown: share of unknown voxels that a setting counts (see ``unknown_share``), by setting; ``notes``: of those above
            0, a line to print.
        cameras: names in order.
        rule: what the order is drawn from.
    """

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.stopping, self.rule = config, world, False, BY_SCENES
        self.flags: Tensor | None = None
        self._error: Exception | None = None
        self._spare: Batch | None = None
        data, cfg = config.data, config.train
        semantic = config.stage == "finetune"
        manifest = _load(config, data.url, data.labels)
        if data.scene_names:
            scenes = manifest.named(data.scene_names)
        else:
            scenes = manifest.subset(data.scenes, data.subset_seed, data.holdout)
        self.cameras = camera_names(manifest, scenes[0], data.cameras)
        order = _order(manifest, scenes, cfg.seed, None, cfg.batch)
        self.epoch_samples = order.epoch(0).size
        samples = cfg.steps * cfg.batch if cfg.steps else round(cfg.epochs * self.epoch_samples)
        self.steps = math.ceil(samples / cfg.batch)
        self.scenes = {manifest.scenes[i].name for i in scenes}
        filler = frame_filler(
            config,
            self.cameras,
            train=True,
            mask=data.mask,
            semantic=semantic,
            binary_from=data.binary_from,
            soft=data.soft,
        )
        micro = cfg.batch // cfg.accumulate
        self._feeds = {"main": _Feed(manifest, order, filler, micro, micro, config, world)}
        self.fingerprints = {"data": manifest.fingerprint}
        self.unknown: dict[str, float] = {}
        self.notes: list[str] = []
        self._note_unknown("data.mask", manifest, scenes, data.mask, data.binary_from)
        self.frames_per_step = cfg.batch
        if config.replay.url and semantic:
            self._add_replay(len(scenes))
        if micro // world.size == 0 and not any(f.least // world.size for f in self._feeds.values()):
            raise ValueError(
                f"{world.size} processes share {micro} frames per micro-step: some would have none; "
                f"raise train.batch to at least {world.size * cfg.accumulate} or use fewer processes"
            )

    def _add_replay(self, semantic_scenes: int) -> None:
        """Opens the sources of B frames; each step takes from them by weight."""
        config, cfg, replay = self.config, self.config.train, self.config.replay
        total = cfg.batch if replay.batch is None else replay.batch
        if total % cfg.accumulate:
            raise ValueError(f"replay.batch {total} does not divide by train.accumulate {cfg.accumulate}")
        sources = (replay, *replay.more)
        quotas = self._quotas = Quotas([s.weight for s in sources], total // cfg.accumulate)
        for number, source in enumerate(sources):
            pool = _load(config, source.url, source.labels)
            chosen = pool.subset(source.scenes, source.subset_seed, source.holdout)
            self.scenes |= {pool.scenes[i].name for i in chosen}
            # As many B scenes each pass as there are S scenes.
            draw = min(source.draw or semantic_scenes, len(chosen))
            most = quotas.most(number)
            order = _order(pool, chosen, cfg.seed, draw, most * cfg.accumulate)
            filler = frame_filler(config, self.cameras, train=True, mask=source.mask, semantic=False)
            batch = most if len(sources) == 1 else functools.partial(quotas.of, number)
            name = f"replay-{number}" if number else "replay"
            self._feeds[name] = _Feed(pool, order, filler, batch, most, config, self.world)
            self.fingerprints[name] = pool.fingerprint
            self._note_unknown(f"{name}.mask", pool, chosen, source.mask)
        self.frames_per_step += total

    def _note_unknown(self, key: str, manifest: Manifest, scenes: list[int], mask: Mask, binary_from: str = "labels"):
        share = unknown_share(manifest, scenes, mask, binary_from)
        if share is not None:
            self.unknown[key] = share
        if share:
            self.notes.append(unknown_line(key, mask, share))

    @property
    def fingerprint(self) -> str:
        return self.fingerprints["data"]

    def next(self, stop: bool = False) -> Batch:
        """The next micro-batch of this rank, on its device. Its CPU buffers are valid until the next call.

        Args:
            stop: this rank is asked to stop; ``stopping`` then says on all ranks whether any is (no collective of its own).

        Raises:
            DataError: a rank could not get its part; on every rank, naming the first one and what it said.
        """
        error, batch = None, None
        try:
            batch = self._take()
        except Exception as problem:
            error = problem
        self.stopping = self.world.agree(error, stop)
        return batch

    def micro_batches(self, count: int, stop: bool = False) -> list[Batch]:
        """All micro-batches of a step, valid until the next call; see ``next``.

        After the first step of a start no agreement of its own is needed: ``flags`` (errors, stop requests) are to be summed over
        ranks on some way that is gone anyway, and what came of it handed to ``heard``. A rank with an error goes on with its
        first batch until then, so that nobody waits for it in a forward; no such step may be taken.
        """
        batches = []
        try:
            if self._error is None:
                batches = [self._take() if count == 1 else self._take().clone() for _ in range(count)]
        except Exception as problem:
            self._error = problem
        if self.world.size == 1 or self._spare is None:
            self.stopping |= self.world.agree(self._error, stop)
            self._spare = batches[0].clone() if self.world.size > 1 else None
        if self.world.size > 1:
            # Filled there: a copy from the host would wait for all that the device has to do.
            self.flags = torch.zeros(2, device=self.world.device)
            for flag, said in zip(self.flags, (self._error is not None, stop)):
                flag.fill_(float(said))
        return batches if self._error is None else [self._spare] * count

    def heard(self, errors: float, stops: float) -> None:
        """Sums of ``flags`` over all ranks (collective where there are errors).

        Raises:
            DataError: as ``next``.
        """
        if errors:
            self.world.agree(self._error)
        self.stopping |= bool(stops)

    def _take(self) -> Batch:
        return functools.reduce(concat, [feed.next() for feed in self._feeds.values()])

    def state_dict(self) -> dict:
        """Positions after the last batch taken: a handful of integers, the same on every rank."""
        return {name: feed.state for name, feed in self._feeds.items()}

    def load_state_dict(self, state: dict, rule: str = BY_SCENES) -> None:
        """Continues from positions, in the order that they belong to; call before the first ``next``.

        Raises:
            ValueError: the positions are of other streams, or of an order that this version does not know.
        """
        if rule not in (BY_SCENES, BY_CONTENT):
            raise ValueError(f"the checkpoint was trained in an order by {rule!r}, which this version does not know")
        self.rule = rule
        for name, feed in self._feeds.items():
            if name not in state:
                raise ValueError(
                    f"the checkpoint has no position of the {name} stream: it was made without this replay"
                )
            feed.state = _position(state[name], name)
            if rule == BY_CONTENT:
                feed.order.identify(by_content(feed.manifest.fingerprint, feed.order.scenes))

    def shares(self) -> dict[str, float]:
        """Share of each source of B frames among all B frames so far, by name; empty with fewer than two sources."""
        replays = [name for name in self._feeds if name != "main"]
        if len(replays) < 2:
            return {}
        taken = [self._quotas.taken(n, self._feeds[name].state["batches"]) for n, name in enumerate(replays)]
        return {name: count / max(1, sum(taken)) for name, count in zip(replays, taken)}

    @property
    def waited(self) -> float:
        """Seconds that ``next`` has waited for readers."""
        return sum(f.stream.waited for f in self._feeds.values() if f.stream)

    @property
    def skipped(self) -> int:
        """Corrupt samples replaced so far (this rank)."""
        return sum(len(f.stream.skipped) for f in self._feeds.values() if f.stream)

    @property
    def bytes_read(self) -> int:
        return sum(f.stream.bytes_read for f in self._feeds.values() if f.stream)

    @property
    def epoch_position(self) -> float:
        state = self._feeds["main"].state
        return state["epoch"] + state["offset"] / self.epoch_samples

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()


class _Feed:
    """One stream, opened at its position when the first batch is asked for.

    Args:
        batch: frames of a micro-batch over all ranks, or of micro-batch number n.
        most: the largest of them.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        filler: FrameFiller,
        batch: int | Callable[[int], int],
        most: int,
        config: Config,
        world: World,
    ):
        self.manifest, self.order, self.filler, self.batch, self.most = manifest, order, filler, batch, most
        self.config, self.world = config, world
        self.least = batch if isinstance(batch, int) else 0
        self.state = {"epoch": 0, "offset": 0, "batches": 0}
        self.stream: Stream | None = None
        self.prefetcher: Prefetcher | None = None

    def next(self) -> Batch:
        if self.stream is None:
            batches = training_batches(self.order, self.batch, self.world.rank, self.world.size, **self.state)
            # No share of a batch is larger than this.
            capacity = -(-self.most // self.world.size)
            self.stream = open_stream(self.manifest, batches, self.filler, capacity, self.config, self.world)
        if self.world.device.type == "cpu":
            got = next(self.stream)
            self.state = got.state
            return to_batch(got, self.world.device)
        self.prefetcher = self.prefetcher or Prefetcher(self.stream, self.world.device)
        batch, self.state = self.prefetcher.next()
        return batch

    def close(self) -> None:
        if self.stream:
            self.stream.close()


class Prefetcher:
    """Copies the next batch to the GPU, on a stream of its own, while the network works on the one before.

    Only a batch that is already there is taken ahead: nobody waits for data earlier than without it, and the stream's
    buffers go back to the readers once their copy is done.
    """

    def __init__(self, stream: Stream, device: torch.device):
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


def _order(manifest: Manifest, scenes: list[int], seed: int, draw: int | None, lanes: int) -> Order:
    entries = [manifest.scenes[i] for i in scenes]
    shards = [e.shard for e in entries]
    frames = [e.frames for e in entries]
    return Order(by_scenes([e.name for e in entries], frames), scenes, frames, seed, draw, shards, lanes)


class EvalData:
    """Every frame of the evaluation scenes once over all ranks, each time it is iterated over; of ``Batch``.

    Attributes:
        total: frames; 0: nothing is held out.
        scenes: their names.
        unknown: share of unknown voxels that ``eval.mask`` counts (see ``unknown_share``); ``notes``: as of ``TrainData``.
        convention: of the metric, from the labels or the recipe.
    """

    def __init__(self, config: Config, world: World, cameras: tuple[str, ...] | None = None):
        self.world, self.total, self.scenes = world, 0, set()
        self.unknown: float | None = None
        self.convention = "occ3d"
        self.notes: list[str] = []
        ev = config.eval
        manifest = _load(config, ev.url or config.data.url)
        if ev.scene_names:
            scenes = manifest.named(ev.scene_names)
        elif ev.url and not ev.holdout:
            scenes = list(range(len(manifest.scenes)))
        else:
            scenes = manifest.held_out(ev.holdout or config.data.holdout, config.data.subset_seed)
        scenes = scenes[: ev.scenes]
        if not scenes:
            return
        counts = [manifest.scenes[i].frames for i in scenes]
        self.scenes = {manifest.scenes[i].name for i in scenes}
        self.total = sum(counts)
        if self.total < world.size:
            raise ValueError(
                f"{self.total} frames to evaluate on, but {world.size} processes: evaluate on more, or use fewer processes"
            )
        self.cameras = camera_names(manifest, scenes[0], cameras or config.data.cameras)
        self._choose_convention(manifest, ev.convention)
        self.unknown = unknown_share(manifest, scenes, ev.mask, config.data.binary_from)
        if self.unknown:
            self.notes.append(unknown_line("eval.mask", ev.mask, self.unknown))
        semantic = config.stage == "finetune"
        filler = frame_filler(
            config, self.cameras, train=False, mask=ev.mask, semantic=semantic, binary_from=config.data.binary_from
        )

        def open_plan() -> Stream:
            plan = evaluation_batches(scenes, counts, ev.batch, world.rank, world.size)
            return open_stream(manifest, plan, filler, ev.batch, config, world)

        self._open, self._manifest = open_plan, manifest

    def _choose_convention(self, manifest: Manifest, wanted: str) -> None:
        own, how = manifest.metric_convention()
        self.convention = own if wanted == "auto" else wanted
        if self.convention != own:
            self.notes.append(f"eval.convention={wanted}: the labels' own is {own} ({how})")
        elif wanted == "auto" and how.startswith("inferred"):
            self.notes.append(f"eval.convention=auto: {own}, {how}")

    def __iter__(self) -> Iterator[Batch]:
        with self._open() as stream:
            yield from device_batches(_without_replaced(stream, self._manifest), self.world.device)


def _without_replaced(stream: Stream, manifest: Manifest) -> Iterator[StreamBatch]:
    """Batches in which a frame that stands in for one that cannot be read has no key and no valid voxel: it counts once, at its
    own place."""
    for got in stream:
        for i, sample in enumerate(got.samples):
            if got.keys[i] != frame_key(manifest.scenes[sample.scene].name, sample.frame):
                got.keys[i] = ""
                got.arrays["occupancy.binary_valid"][i] = False
                if "occupancy.semantic" in got.arrays:
                    got.arrays["occupancy.semantic"][i] = IGNORE
        yield got


def frame_filler(config: Config, cameras: tuple[str, ...], *, train: bool, **choices) -> FrameFiller:
    """What makes samples of frames by a recipe.

    Args:
        train: augment, and make the depth maps that the loss needs.
        choices: mask, semantic, binary_from, soft, labels of ``FrameFiller``.
    """
    return FrameFiller(
        config.augment,
        cameras,
        config.voxel_grid,
        config.classes,
        config.train.seed if train else 0,
        train,
        depth_cell=depth_cell(config) if train else 0,
        history=config.data.history,
        decode=config.train.decoder == "cpu",
        **choices,
    )


def depth_cell(config: Config) -> int:
    """Pixels per cell of the depth maps that the recipe's loss needs; 0 if it needs none."""
    return config.model.feature_stride if config.loss.depth_weight else 0


def to_batch(got: StreamBatch, device: torch.device) -> Batch:
    """Stream arrays as tensors; on the CPU they share memory with the ring, to a GPU they are being copied."""
    batch = Batch.of({name: torch.as_tensor(array) for name, array in got.arrays.items()}, got.keys)
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
    manifest: Manifest, batches, filler: FrameFiller, capacity: int, config: Config, world: World
) -> Stream:
    groups = ["cameras"]
    groups += [manifest.label_group] if filler.labels else []
    groups += ["lidar"] if filler.needs_lidar else []
    allocate = _pinned if world.device.type == "cuda" else None
    size, threads = config.augment.image_size, config.train.threads
    finish = None if filler.decode else DeviceImages(size, world.device, threads)
    return Stream(
        ShardReader(manifest, groups, cache(manifest.url)),
        batches,
        {name: Field(shape, dtype) for name, (shape, dtype) in filler.fields().items()},
        filler,
        max(1, capacity),
        threads,
        allocate=allocate,
        deadline=config.train.data_timeout,
        history=config.data.history,
        finish=finish,
    )


def _pinned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return torch.zeros(shape, dtype=getattr(torch, dtype)).pin_memory().numpy()


def _position(state: object, name: str) -> dict[str, int]:
    """A stream's position as a checkpoint has it. Raises ValueError if it is none."""
    names = {"epoch", "offset", "batches"}
    good = isinstance(state, dict) and state.keys() == names
    if not good or any(type(n) is not int or not 0 <= n < 2**53 for n in state.values()):
        raise ValueError(
            f"the checkpoint's position of the {name} stream is {str(state)[:80]}: it is damaged, take another"
        )
    return dict(state)


def cache(url: str) -> storage.ShardCache | None:
    """Node-local shard cache for remote data: ``OCCSTREAM_CACHE`` (default ~/.cache/occstream), 64 GiB or
    ``OCCSTREAM_CACHE_GB``."""
    if storage.is_local(url):
        return None
    folder = place(os.environ.get("OCCSTREAM_CACHE", "")) or Path.home() / ".cache" / "occstream"
    size = storage.from_environment("OCCSTREAM_CACHE_GB", 64, "GiB from 0, such as 64")
    return storage.ShardCache(folder, int(size * 2**30))


def unknown_share(
    manifest: Manifest, scenes: Sequence[int], mask: Mask, binary_from: str = "labels", frames: int = 8
) -> float | None:
    """Share (0..1) of the voxels that count under a mask although the labels do not know them, over evenly spaced frames;
    None for the masks that never count one."""
    if mask not in ("none", "camera"):
        return None
    places = [(i, k) for i in scenes for k in range(manifest.scenes[i].frames)]
    reader = ShardReader(manifest, (manifest.label_group,), cache(manifest.url))
    counted = unknown = 0
    try:
        for n in np.unique(np.linspace(0, len(places) - 1, min(frames, len(places))).astype(int)):
            labels = reader.frame(*places[n]).labels
            if labels is None or (mask == "camera" and labels.mask_camera is None):
                continue  # the streams say which frame lacks what
            counts = labels.mask_camera if mask == "camera" else np.ones(labels.binary.shape, bool)
            if binary_from == "semantic" and labels.semantic is not None:
                counts = counts & (labels.semantic != IGNORE)
            counted += int(counts.sum())
            unknown += int((counts & ~labels.known()).sum())
    finally:
        reader.close()
    return unknown / max(1, counted)


def unknown_line(key: str, mask: Mask, share: float) -> str:
    """What to print of a setting that makes unknown voxels count."""
    return f"{key}={mask}: {100 * share:.1f} % of the voxels that count are unknown to the labels; {key}=auto leaves them out"


def _load(config: Config, url: str, labels: str = "labels") -> Manifest:
    manifest = Manifest.load(url)
    if labels != "labels":
        manifest = manifest.with_sidecar(labels)
    manifest.check(config.voxel_grid, config.taxonomy, ("cameras", labels))
    return manifest


def camera_names(manifest: Manifest, scene: int, wanted: tuple[str, ...] | None = ()) -> tuple[str, ...]:
    """Names of the cameras to train on, in order: the wanted ones, else all that a scene's first, middle and last frame have.

    Raises:
        ValueError: these frames have no cameras, or none by a wanted name.
    """
    reader = ShardReader(manifest, ("cameras",), cache(manifest.url))
    frames = manifest.scenes[scene].frames
    try:
        found = [list(reader.frame(scene, index).cameras) for index in sorted({0, frames // 2, frames - 1})]
    finally:
        reader.close()
    names = tuple(dict.fromkeys(name for cameras in found for name in cameras))
    if unknown := [name for name in wanted or () if names and name not in names]:
        raise ValueError(
            f"{manifest.url}: scene {manifest.scenes[scene].name} has no camera {unknown[0]!r}, only {', '.join(names)}; set "
            "data.cameras"
        )
    if not names:
        raise ValueError(
            f"{manifest.url}: scene {manifest.scenes[scene].name} has no cameras; this model trains on images"
        )
    return wanted or names
