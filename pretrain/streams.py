"""Streams of a run: the data it trains on, replayed frames of an earlier stage, and what it is evaluated on.

A step is one batch of the main stream plus what is replayed, concatenated (B2S, Sec. 3.3). Each stream has its own order and
position; all positions go into the checkpoint and know nothing of ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from occstream.models import Batch, concat
from occstream.pretrain.config import Config, DataConfig, EvalConfig, ReplaySource
from occstream.pretrain.distributed import World
from occstream.pretrain.provenance import Reading
from occstream.pretrain.reading import Prefetcher, device_batches, open_stream, to_batch
from occstream.pretrain.tasks.base import Role, Sample, Scoring, without_replaced
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.frameclasses import FrameClasses
from occstream.sharding.manifest import Manifest, is_labels
from occstream.sharding.order import (
    BY_CONTENT,
    BY_SCENES,
    Copies,
    Order,
    Quotas,
    balance,
    by_content,
    by_scenes,
    evaluation_batches,
    training_batches,
)
from occstream.sharding.stream import Stream


class TrainData:
    """Batches of one run for one rank.

    Attributes:
        epoch_samples: S frames of one pass (of the first, where frames of rare classes occur more often).
        steps: optimizer steps of the whole run.
        scenes: names of all scenes that any stream takes frames from.
        frames_per_step: S and B frames of all ranks in one optimizer step.
        fingerprint, fingerprints: of the S manifest; of all.
        unknown: numbers that the task found out about its streams, by setting; ``notes``: lines to print.
        readings: what is read, stream by stream.
        sensors: names that samples are made of, in order.
        rule: what the order is drawn from.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.stopping, self.rule = config, world, False, BY_SCENES
        self.flags: Tensor | None = None
        self._error: Exception | None = None
        self._spare: Batch | None = None
        self._task = task_of(config)
        data, cfg = config.data, config.train
        manifest = open_manifest(data.url, data.labels)
        scenes = training_scenes(manifest, data)
        self.sensors = self._task.sensors(manifest, scenes[0])
        self.notes: list[str] = []
        order = self._order("data", manifest, data, scenes, draw=None, lanes=cfg.batch)
        self.epoch_samples = order.epoch(0).size
        samples = cfg.steps * cfg.batch if cfg.steps else round(cfg.epochs * self.epoch_samples)
        self.steps = math.ceil(samples / cfg.batch)
        self.frames_per_step = cfg.batch
        self.scenes: set[str] = set()
        self.fingerprints: dict[str, str] = {}
        self.unknown: dict[str, float] = {}
        self.readings: list[Reading] = []
        self._feeds: dict[str, _Feed] = {}
        micro = cfg.batch // cfg.accumulate
        self._add("data", "main", manifest, data, scenes=scenes, order=order, batch=micro, most=micro)
        if config.replay.url and self._task.replays:
            self._add_replay(len(scenes))
        if micro // world.size == 0 and not any(f.least // world.size for f in self._feeds.values()):
            raise ValueError(
                f"{world.size} processes share {micro} frames per micro-step: some would have none; "
                f"raise train.batch to at least {world.size * cfg.accumulate} or use fewer processes"
            )

    def _add_replay(self, main_scenes: int) -> None:
        """Opens the sources of replayed frames; each step takes from them by weight."""
        cfg, replay = self.config.train, self.config.replay
        total = cfg.batch if replay.batch is None else replay.batch
        if total % cfg.accumulate:
            raise ValueError(f"replay.batch {total} does not divide by train.accumulate {cfg.accumulate}")
        sources = (replay, *replay.more)
        quotas = self._quotas = Quotas([s.weight for s in sources], total // cfg.accumulate)
        for number, source in enumerate(sources):
            pool = open_manifest(source.url, source.labels)
            chosen = training_scenes(pool, source)
            # As many replayed scenes each pass as there are in the main stream.
            draw = min(source.draw or main_scenes, len(chosen))
            most = quotas.most(number)
            name = f"replay-{number}" if number else "replay"
            order = self._order(name, pool, source, chosen, draw=draw, lanes=most * cfg.accumulate)
            batch = most if len(sources) == 1 else functools.partial(quotas.of, number)
            self._add(name, "replay", pool, source, scenes=chosen, order=order, batch=batch, most=most)
        self.frames_per_step += total

    def _add(
        self,
        name: str,
        role: Role,
        manifest: Manifest,
        source: DataConfig | ReplaySource,
        *,
        scenes: list[int],
        order: Order,
        batch: int | Callable[[int], int],
        most: int,
    ) -> None:
        """One stream more.

        Args:
            name: of its section, and of its position and fingerprint.
        """
        sample = self._task.sample(role, source, self.sensors)
        manifest = check_manifest(manifest, sample, self.config)
        self._feeds["main" if name == "data" else name] = _Feed(
            manifest, order, sample, batch=batch, most=most, config=self.config, world=self.world
        )
        self.scenes.update(manifest.scenes.names(scenes))
        self.fingerprints[name] = manifest.fingerprint
        facts = self._task.facts(name, source, manifest, scenes)
        self.unknown |= facts.numbers
        self.notes += facts.notes
        frames = sum(manifest.scenes[i].frames for i in scenes)
        self.readings.append(Reading("training" if role == "main" else role, manifest, len(scenes), frames))

    def _order(
        self,
        name: str,
        manifest: Manifest,
        source: DataConfig | ReplaySource,
        scenes: list[int],
        *,
        draw: int | None,
        lanes: int,
    ) -> Order:
        """The order of a stream, in which frames of rare classes occur more often where the task balances them."""
        names, frames = manifest.scenes.names(scenes), manifest.scenes.frames[scenes].tolist()
        copies = None
        if (wanted := self._task.balance(source)) is not None:
            holds = FrameClasses.load(manifest).holds(scenes, wanted)
            copies = Copies(names, frames, balance(holds))
            self.notes.append(_balance_note(name, manifest, wanted, holds))
        shards = manifest.scenes.shards[scenes]
        seed, identity = self.config.train.seed, by_scenes(names, frames)
        return Order(identity, scenes, frames, seed, draw=draw, shards=shards, lanes=lanes, copies=copies)

    @property
    def fingerprint(self) -> str:
        """Of the S manifest."""
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
        assert batch is not None  # else there was an error
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
        if self._error is None:
            return batches
        assert self._spare is not None  # an error in the first step is raised above
        return [self._spare] * count

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
                feed.order.identify(by_content(feed.manifest.fingerprint, feed.order.scenes.tolist()))

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
        """Bytes of shards read so far (this rank)."""
        return sum(f.stream.bytes_read for f in self._feeds.values() if f.stream)

    @property
    def epoch_position(self) -> float:
        """Passes over the S frames so far, with the part of the one under way."""
        feed = self._feeds["main"]
        return feed.state["epoch"] + feed.state["offset"] / feed.order.epoch(feed.state["epoch"]).size

    def close(self) -> None:
        """Ends the readers of all streams."""
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
        sample: Sample,
        *,
        batch: int | Callable[[int], int],
        most: int,
        config: Config,
        world: World,
    ) -> None:
        self.manifest, self.order, self.sample, self.batch, self.most = manifest, order, sample, batch, most
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
            self.stream = open_stream(
                self.manifest, batches, self.sample, capacity=capacity, config=self.config, world=self.world
            )
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


class EvalData:
    """Every frame of the evaluation scenes once over all ranks, each time it is iterated over; of ``Batch``.

    Attributes:
        total: frames; 0: nothing is held out.
        scenes: their names.
        sensors: names that samples are made of, in order.
        unknown: the number that the task found out about the data, or None; ``notes``: lines to print.
        readings: what is read; empty if nothing is held out.
        scoring: how it scores; None if nothing is held out.
    """

    def __init__(self, config: Config, world: World, sensors: tuple[str, ...] = ()) -> None:
        self.world, self.total, self.scenes, self.sensors = world, 0, set(), sensors
        self.unknown: float | None = None
        self.scoring: Scoring | None = None
        self.notes: list[str] = []
        self.readings: list[Reading] = []
        task, ev = task_of(config), config.eval
        manifest = open_manifest(ev.url or config.data.url)
        scenes = evaluation_scenes(manifest, config.data, ev)
        if not scenes:
            return
        counts = manifest.scenes.frames[scenes].tolist()
        self.scenes = set(manifest.scenes.names(scenes))
        self.total = sum(counts)
        if self.total < world.size:
            raise ValueError(
                f"{self.total} frames to evaluate on, but {world.size} processes: evaluate on more, or use fewer processes"
            )
        self.sensors = task.sensors(manifest, scenes[0], sensors)
        sample = task.sample("eval", ev, self.sensors)
        manifest = check_manifest(manifest, sample, config)
        self.readings.append(Reading("evaluation", manifest, len(scenes), self.total))
        facts = task.facts("eval", ev, manifest, scenes)
        self.unknown = next(iter(facts.numbers.values()), None)
        self.scoring = task.scoring(manifest, self.unknown)
        self.notes += [*self.scoring.notes, *facts.notes, *task.remarks(manifest, ev)]

        def batches() -> Iterator[Batch]:
            plan = evaluation_batches(scenes, counts, ev.batch, rank=world.rank, world=world.size)
            with open_stream(manifest, plan, sample, capacity=ev.batch, config=config, world=world) as stream:
                yield from device_batches(without_replaced(stream, manifest, sample), world.device)

        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


def training_scenes(manifest: Manifest, source: DataConfig | ReplaySource) -> list[int]:
    """Numbers of the scenes that a stream of training takes frames from. Raises ValueError if its fold is all there is."""
    if names := getattr(source, "scene_names", None):
        found = manifest.named(names)
    else:
        found = manifest.subset(source.scenes, source.subset_seed, source.holdout)
    if fold := getattr(source, "fold", ""):
        part, parts = map(int, fold.split("/"))
        found = [scene for number, scene in enumerate(found) if number % parts != part - 1]
        if not found:
            raise ValueError(f"{manifest.url}: fold {fold} of one scene leaves nothing to train on; give more scenes")
    return found


def evaluation_scenes(manifest: Manifest, data: DataConfig, ev: EvalConfig) -> list[int]:
    """Numbers of the scenes that a run is evaluated on; none: nothing is held out."""
    if ev.scene_names:
        scenes = manifest.named(ev.scene_names)
    elif ev.url and not ev.holdout:
        scenes = list(range(len(manifest.scenes)))
    else:
        scenes = manifest.held_out(ev.holdout or data.holdout, data.subset_seed)
    return scenes[: ev.scenes]


def open_manifest(url: str, labels: str = "labels") -> Manifest:
    """A data set, with the label group that a stream reads."""
    manifest = Manifest.load(url)
    return manifest if labels == "labels" else manifest.with_sidecar(labels)


def check_manifest(manifest: Manifest, sample: Sample, config: Config) -> Manifest:
    """The data set with the sidecar groups that samples read beside the labels in use.

    Raises:
        ValueError: it has another taxonomy than the recipe, lacks a group that samples read, or has labels on another grid.
    """
    for group in sample.groups:
        if is_labels(group) and group != "labels":
            manifest.with_sidecar(group).check(config.voxel_grid, config.taxonomy, ())
            manifest = manifest.with_label_sets([group])
    groups = tuple(manifest.label_group if group == "labels" else group for group in sample.groups)
    manifest.check(config.voxel_grid if "labels" in sample.groups else None, config.taxonomy, groups)
    return manifest


def _balance_note(name: str, manifest: Manifest, wanted: Sequence[str], holds: np.ndarray) -> str:
    """What balancing does to a stream. Raises ValueError if it has none of the classes."""
    if not holds.any():
        raise ValueError(
            f"{manifest.url}: none of its frames holds any of {', '.join(wanted)}, so they cannot be balanced; switch "
            "balancing off, or train on labels with classes or boxes"
        )
    counts = ", ".join(f"{c} {n}" for c, n in zip(wanted, holds.sum(0).tolist()))
    passes = f"a pass has about {balance(holds).sum():.0f} samples"
    return f"{name}: {len(holds)} frames hold {counts}; those of rare classes occur more often, {passes}"


def _position(state: object, name: str) -> dict[str, int]:
    """A stream's position as a checkpoint has it. Raises ValueError if it is none."""
    found = state if isinstance(state, dict) else {}
    if found.keys() == {"epoch", "offset", "batches"} and all(
        type(n) is int and 0 <= n < 2**53 for n in found.values()
    ):
        return dict(found)
    raise ValueError(
        f"the checkpoint's position of the {name} stream is {str(state)[:80]}: it is damaged, take another"
    )
