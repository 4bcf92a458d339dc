"""Which frame is sample i: pure functions of (fingerprint, scenes, seed, epoch, position), no I/O.

World size, threads, restarts and cache state cannot change it. An epoch permutes the scenes, lays their frames end to
end, cuts the sequence into fixed *lanes* and shuffles each lane in blocks; sample i is the (i // L)-th of lane i % L. So
consecutive samples come from L places, while each lane walks through few shards at a time. Epochs follow each other
without padding or dropping: a batch may straddle two.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_LANES = 64
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One draw: which pass over the data, which scene (number in the manifest), which of its frames."""

    epoch: int
    scene: int
    frame: int


def generator(*keys: object) -> np.random.Generator:
    """Random generator that is a function of ``keys`` alone, on any machine and in any thread."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class Order:
    """The sequence of samples of one stream.

    Args:
        fingerprint: of the manifest.
        scenes: scene numbers of the subset.
        frames: number of frames of each of them.
        seed: of the run.
        draw: scenes drawn afresh without replacement for each epoch (replay, SPEC A.12); None: all, every epoch.

    Raises:
        ValueError: no frames, or more scenes to draw than there are.
    """

    def __init__(
        self, fingerprint: str, scenes: Sequence[int], frames: Sequence[int], seed: int, draw: int | None = None
    ):
        self.scenes, self.frames = np.asarray(scenes, np.int64), np.asarray(frames, np.int64)
        if len(self.scenes) != len(self.frames) or self.frames.sum() == 0:
            raise ValueError(f"cannot order {len(self.scenes)} scenes with {int(self.frames.sum())} frames in all")
        if draw is not None and not 1 <= draw <= len(self.scenes):
            raise ValueError(f"cannot draw {draw} scenes an epoch from {len(self.scenes)}; lower replay.draw")
        self.draw = draw
        # The scenes enter the key: another subset is another sequence.
        names = hashlib.blake2b(self.scenes.tobytes(), digest_size=8).hexdigest()
        self._key = (fingerprint, names, seed, draw)
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
        return rng.permutation(len(self.scenes))[: self.draw]

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """Normal form of a position: ``offset`` lies within ``epoch``."""
        while offset >= (size := self.epoch(epoch).size):
            epoch, offset = epoch + 1, offset - size
        return epoch, offset

    def samples(self, epoch: int, offset: int) -> Iterator[Sample]:
        """Samples from a position on, for ever."""
        while True:
            epoch, offset = self.locate(epoch, offset)
            yield self.epoch(epoch).sample(offset)
            offset += 1


class _Epoch:
    """One pass: O(scenes) to set up, O(log scenes) for a sample."""

    def __init__(self, order: Order, number: int):
        self.number, self._key = number, (*order._key, number)
        chosen = order._chosen(generator(*order._key, "scenes", number))
        self.scenes, frames = order.scenes[chosen], order.frames[chosen]
        self.ends = np.cumsum(frames)
        self.starts = self.ends - frames
        self.size = int(self.ends[-1])
        # Few frames, few lanes: a lane shorter than some frames would not mix.
        self.lanes = max(1, min(MAX_LANES, self.size // 4))
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def sample(self, i: int) -> Sample:
        lane, step = i % self.lanes, i // self.lanes
        # The first (size mod lanes) lanes are one longer, so i < size always hits a lane that long.
        base, longer = divmod(self.size, self.lanes)
        start = lane * base + min(lane, longer)
        length = base + (lane < longer)
        block, within = divmod(step, BLOCK)
        position = start + block * BLOCK + self._block(lane, block, min(BLOCK, length - block * BLOCK))[within]
        at = int(np.searchsorted(self.ends, position, side="right"))
        return Sample(self.number, int(self.scenes[at]), int(position - self.starts[at]))

    def _block(self, lane: int, block: int, length: int) -> np.ndarray:
        key = (lane, block)
        if key not in self._blocks:
            self._blocks[key] = generator(*self._key, "block", lane, block).permutation(length)
            if len(self._blocks) > 2 * MAX_LANES:
                self._blocks.popitem(last=False)
        return self._blocks[key]


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """Rank's slice [low, high) of ``count`` samples: contiguous, sizes differ by at most 1, may be empty."""
    return count * rank // world, count * (rank + 1) // world


def training_batches(
    order: Order, batch: int, rank: int, world: int, epoch: int = 0, offset: int = 0
) -> Iterator[tuple[list[Sample], dict[str, int]]]:
    """This rank's part of each global batch of ``batch`` samples, with the position *after* that batch."""
    low, high = share(batch, rank, world)
    while True:
        samples, at, to = [], epoch, offset
        for i in range(low, high):
            at, to = order.locate(epoch, offset + i)
            samples.append(order.epoch(at).sample(to))
        epoch, offset = order.locate(epoch, offset + batch)
        yield samples, {"epoch": epoch, "offset": offset}


def evaluation_batches(
    scenes: Sequence[int], frames: Sequence[int], batch: int, rank: int, world: int
) -> Iterator[tuple[list[Sample], dict[str, int]]]:
    """Every frame exactly once over all ranks, in scene order; the last batch of a rank may be short, a rank may have
    none: nothing is padded."""
    everything = [Sample(0, s, f) for s, n in zip(scenes, frames) for f in range(n)]
    low, high = share(len(everything), rank, world)
    for start in range(low, high, batch):
        stop = min(start + batch, high)
        yield everything[start:stop], {"epoch": 0, "offset": stop}
