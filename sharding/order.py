"""Which frame is sample i: pure functions of (names and lengths of the scenes, seed, epoch, position), no I/O.

World size, threads, restarts and cache state cannot change it, nor can what the frames hold: with other images, or other
labels, the same scenes come in the same order. An epoch permutes the shards and the scenes within each,
lays their frames end to end, cuts the sequence into fixed *lanes* and shuffles each lane in blocks; sample i is the
(i // L)-th of lane i % L. With as many lanes as a global batch has samples, each place in the batch walks through a part
of the data of its own: a node, which owns some places, fetches only its share. Epochs follow each other without padding
or dropping: a batch may straddle two.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LANES = 64  # where nobody says how many
WINDOW = 16384  # frames that are shuffled among each other: the blocks of all lanes together
BLOCK = 256  # frames of a lane's block, at least
BY_SCENES, BY_CONTENT = "scenes", "content"  # rules that checkpoints name: what the order is drawn from


@dataclass(frozen=True)
class Sample:
    """One draw: which pass over the data, which scene (number in the manifest), which of its frames, and which of the frame's
    occurrences in that pass."""

    epoch: int
    scene: int
    frame: int
    copy: int = 0

    @property
    def draw(self) -> int:
        """Number that random choices about the sample are keyed by: the epoch, and another one for each further copy."""
        return self.epoch + (self.copy << 32)


def generator(*keys: object) -> np.random.Generator:
    """Random generator that is a function of ``keys`` alone, on any machine and in any thread."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def by_scenes(names: Sequence[str], frames: Sequence[int]) -> str:
    """Identity of an order that depends on which scenes there are: their names and numbers of frames, in order."""
    digest, lines = hashlib.blake2b(digest_size=16), zip(names, frames, strict=True)
    first = True
    while piece := list(itertools.islice(lines, 4096)):  # of a million names, their text is not made at once
        listed = "\n".join(f"{name} {int(count)}" for name, count in piece)
        digest.update((listed if first else f"\n{listed}").encode())
        first = False
    return digest.hexdigest()


def by_content(fingerprint: str, scenes: Sequence[int]) -> str:
    """Identity by which runs were ordered before: the manifest's fingerprint and the scenes' numbers."""
    numbers = hashlib.blake2b(np.asarray(scenes, np.int64).tobytes(), digest_size=8).hexdigest()
    return f"{fingerprint}\x1f{numbers}"


def balance(holds: np.ndarray) -> np.ndarray:
    """How often each frame is to occur so that rare classes are seen more often (SPOT, Sec. 3.3).

    Class i, which N_i frames hold, has the share n_i = N_i / sum N among the C classes that any frame holds, and the weight
    sqrt(1 / (C n_i)); a frame takes the largest weight of its classes, and 1 at least.

    Args:
        holds: (F, classes) bool, which classes frames hold.

    Returns:
        (F,) float64, 1 or more.
    """
    counts = holds.sum(0)
    present = np.flatnonzero(counts)
    factors = np.ones(len(holds))
    for i in present:
        weight = math.sqrt(int(counts.sum()) / (len(present) * int(counts[i])))
        factors[holds[:, i]] = np.maximum(factors[holds[:, i]], weight)
    return factors


class Copies:
    """How often frames occur in each epoch: ``floor(r)`` times for a factor r, and once more with probability ``r - floor(r)``,
    drawn by (seed, epoch, scene, frame) alone.

    Args:
        names: of the scenes.
        frames: number of frames of each.
        factors: (all frames,) float64, scene after scene; 1 or more.

    Raises:
        ValueError: factors do not fit the frames, or one is below 1 or above a thousand.
    """

    def __init__(self, names: Sequence[str], frames: Sequence[int], factors: np.ndarray) -> None:
        if len(factors) != sum(frames) or not ((factors >= 1) & (factors <= 1000)).all():
            raise ValueError(f"{len(factors)} factors of {sum(frames)} frames: need one each, from 1 to 1000")
        self.names, self.factors = list(names), np.split(np.asarray(factors, np.float64), np.cumsum(frames)[:-1])

    def counts(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """(frames,) int64 of the chosen scenes (places in ``names``), one scene after the other."""
        drawn = []
        for i in chosen:
            more = generator(seed, "copies", epoch, self.names[i]).random(len(self.factors[i]))
            whole = np.floor(self.factors[i])
            drawn.append((whole + (more < self.factors[i] - whole)).astype(np.int64))
        return np.concatenate(drawn)


class Order:
    """The sequence of samples of one stream.

    Args:
        identity: of what is ordered; see ``by_scenes``.
        scenes: scene numbers of the subset.
        frames: number of frames of each of them.
        seed: of the run.
        draw: scenes drawn afresh without replacement for each epoch (replay); None: all, every epoch.
        shards: number of the shard of each scene: scenes of a shard stay together. None: every scene is one of its own.
        lanes: samples of a global batch.
        copies: of the same scenes, how often their frames occur in an epoch; None: once. With it an epoch takes memory by
            frame, not by scene.

    Raises:
        ValueError: no frames, or more scenes to draw than there are.
    """

    def __init__(
        self,
        identity: str,
        scenes: Sequence[int] | np.ndarray,
        frames: Sequence[int] | np.ndarray,
        seed: int,
        *,
        draw: int | None = None,
        shards: Sequence[int] | np.ndarray | None = None,
        lanes: int = LANES,
        copies: Copies | None = None,
    ) -> None:
        self.scenes, self.frames = np.asarray(scenes, np.int64), np.asarray(frames, np.int64)
        if len(self.scenes) != len(self.frames) or self.frames.sum() == 0:
            raise ValueError(f"cannot order {len(self.scenes)} scenes with {int(self.frames.sum())} frames in all")
        if draw is not None and not 1 <= draw <= len(self.scenes):
            raise ValueError(f"cannot draw {draw} scenes an epoch from {len(self.scenes)}; lower replay.draw")
        self.shards = None if shards is None else np.asarray(shards, np.int64)
        self.draw, self.lanes, self.seed, self.copies = draw, lanes, seed, copies
        self.identify(identity)

    def identify(self, identity: str) -> None:
        """Draws from another identity from now on."""
        self._key = (identity, self.seed, self.draw)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def epoch(self, number: int) -> _Epoch:
        """Plan of one pass; the two last used are kept."""
        if number not in self._epochs:
            self._epochs[number] = _Epoch(self, number)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(number)
        return self._epochs[number]

    def epoch_scenes(self, number: int) -> np.ndarray:
        """Numbers of the scenes that epoch ``number`` uses, in its order."""
        rng = generator(*self._key, "scenes", number)
        return self.scenes[self._chosen(rng)]

    def _chosen(self, rng: np.random.Generator) -> np.ndarray:
        chosen = rng.permutation(len(self.scenes))[: self.draw]
        if self.shards is None:
            return chosen
        _, first, which = np.unique(self.shards[chosen], return_index=True, return_inverse=True)
        return chosen[np.argsort(first[which], kind="stable")]  # a shard's scenes follow the first of them

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Normal form of a position: ``offset`` lies within ``epoch``."""
        while offset >= (size := self.epoch(epoch).size):
            epoch, offset = epoch + 1, offset - size
        return epoch, offset

    def samples(self, epoch: int, offset: int) -> Iterator[Sample]:
        """Samples from a position on, endlessly."""
        while True:
            epoch, offset = self.locate(epoch, offset)
            yield self.epoch(epoch).sample(offset)
            offset += 1


class _Epoch:
    """One pass: O(scenes) to set up (O(frames) with copies), O(log) of that for a sample."""

    def __init__(self, order: Order, number: int) -> None:
        self.number, self._key = number, (*order._key, number)
        chosen = order._chosen(generator(*order._key, "scenes", number))
        self.scenes, frames = order.scenes[chosen], order.frames[chosen]
        self.ends = np.cumsum(frames)
        self.firsts = self.ends - frames  # number of each scene's first frame among all
        self.frame_ends = np.zeros(0, np.int64)
        if order.copies is not None:
            self.frame_ends = np.cumsum(order.copies.counts(chosen, order.seed, number))
            self.ends = np.concatenate([[0], self.frame_ends])[self.ends]
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.size = int(self.ends[-1])
        # Few frames, few lanes: a lane shorter than some frames would not mix.
        self.lanes = max(1, min(order.lanes, self.size // 4))
        self.block = max(BLOCK, WINDOW // self.lanes)
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def sample(self, i: int) -> Sample:
        lane, step = i % self.lanes, i // self.lanes
        # The first (size mod lanes) lanes are one longer, so i < size always hits a lane that long.
        base, longer = divmod(self.size, self.lanes)
        start = lane * base + min(lane, longer)
        length = base + (lane < longer)
        block, within = divmod(step, self.block)
        position = start + block * self.block + self._permuted(lane, block, length)[within]
        at = int(np.searchsorted(self.ends, position, side="right"))
        if not len(self.frame_ends):
            return Sample(self.number, int(self.scenes[at]), int(position - self.starts[at]))
        frame = int(np.searchsorted(self.frame_ends, position, side="right"))
        copy = position - (self.frame_ends[frame - 1] if frame else 0)
        return Sample(self.number, int(self.scenes[at]), frame - int(self.firsts[at]), int(copy))

    def _permuted(self, lane: int, block: int, length: int) -> np.ndarray:
        key = (lane, block)
        if key not in self._blocks:
            count = min(self.block, length - block * self.block)
            self._blocks[key] = generator(*self._key, "block", lane, block).permutation(count)
            if len(self._blocks) > 2 * self.lanes:
                self._blocks.popitem(last=False)
        return self._blocks[key]


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """Rank's slice [low, high) of ``count`` samples: contiguous, sizes differ by at most 1, may be empty."""
    return count * rank // world, count * (rank + 1) // world


class Quotas:
    """How many samples of a batch come from each of several sources: exact in every period, even within it.

    Args:
        weights: positive integers; the shares are weight / sum.
        batch: samples of one batch over all ranks.

    Raises:
        ValueError: a weight is below 1, or their sum is beyond a million.
    """

    def __init__(self, weights: Sequence[int], batch: int) -> None:
        if not weights or min(weights) < 1 or sum(weights) > 10**6:
            raise ValueError(f"weights {list(weights)}: need whole numbers from 1, a million in all at most")
        period = sum(weights) // math.gcd(*weights)
        ends = (np.arange(1, period + 1)[:, None] * np.array(weights) / sum(weights)).round(12)
        self.batch, self.period = batch, period
        # Each place goes to the source that lags most behind its share.
        counts = np.zeros((period + 1, len(weights)), np.int64)
        for i, want in enumerate(ends):
            counts[i + 1] = counts[i]
            counts[i + 1, np.argmax(want - counts[i])] += 1
        self._counts = counts

    def taken(self, source: int, batches: int) -> int:
        """Number of a source's samples in this many batches from the start."""
        rounds, rest = divmod(batches * self.batch, self.period)
        return int(rounds * self._counts[-1, source] + self._counts[rest, source])

    def of(self, source: int, batch: int) -> int:
        """Samples of a source in batch number ``batch``."""
        return self.taken(source, batch + 1) - self.taken(source, batch)

    def most(self, source: int) -> int:
        """The largest of them over all batches."""
        return max(self.of(source, batch) for batch in range(self.period))


Plan = Iterator[tuple[list[Sample], dict[str, int]]]
"""Samples of each batch of a rank, and the position after it."""


def training_batches(
    order: Order,
    batch: int | Callable[[int], int],
    rank: int,
    world: int,
    *,
    epoch: int = 0,
    offset: int = 0,
    batches: int = 0,
) -> Plan:
    """This rank's part of each global batch, with the position *after* that batch.

    Args:
        order: of the stream.
        batch: samples of a global batch, or of batch number n as a function.
        rank, world: this process, and how many there are.
        epoch, offset, batches: position to continue from.
    """
    while True:
        size = batch if isinstance(batch, int) else batch(batches)
        low, high = share(size, rank, world)
        samples = []
        for i in range(low, high):
            at, to = order.locate(epoch, offset + i)
            samples.append(order.epoch(at).sample(to))
        epoch, offset = order.locate(epoch, offset + size)
        batches += 1
        yield samples, {"epoch": epoch, "offset": offset, "batches": batches}


def evaluation_batches(scenes: Sequence[int], frames: Sequence[int], batch: int, *, rank: int, world: int) -> Plan:
    """Every frame exactly once over all ranks, in scene order; the last batch of a rank may be short, a rank may have
    none: nothing is padded."""
    everything = [Sample(0, s, f) for s, n in zip(scenes, frames) for f in range(n)]
    low, high = share(len(everything), rank, world)
    for start in range(low, high, batch):
        stop = min(start + batch, high)
        yield everything[start:stop], {"epoch": 0, "offset": stop}
