"""What voxels of other frames add to the scores of a target's classes, and what comes out (OccFiner, Sec. III-C)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

ABSTAIN = 127  # in a packed volume: this voxel says nothing
IN_VIEW = 128  # in a packed volume: added where a camera saw the voxel
VOTE_UNIT = 1_000_000  # of a vote's weight: decimal weights are whole numbers, and their ties are ties
SHARE_UNIT = 1_000  # of a class's share of the weight
LOG_UNIT = 65_536  # of a log probability
DOUBTFUL = np.array([16, 64, 128])  # 255ths: from each on, a free voxel that may be occupied is another kind of free


@dataclass(frozen=True, eq=False)
class Rule:
    """What a voxel of a source adds to the scores of the classes. Made by ``votes.voting`` and ``bayes.naive_bayes``.

    N is the number of voxels of a source grid, K the number of classes; class K is free. What voxels say are S words: the
    classes, free, and, under a table that reads evidence, kinds of free that are in doubt.

    Attributes:
        num_classes: K.
        weights: (2, N) int32, units of 1 / VOTE_UNIT: what a voxel's vote weighs out of view and in view. (2, 0): no votes,
            but ``table``.
        shares: (K + 1,) int64, units of 1 / SHARE_UNIT: by class that is said, the share of the weight that counts.
        place: (N,) uint8, the bin of a voxel; (0,) for votes.
        table: (bins * 2 * S, K + 1) int32, units of 1 / LOG_UNIT: log p(said | true, bin, in view), rows by bin, then
            in view, then word. (0, 0) for votes.
        prior: (K + 1,) int64, as ``table``: log p(true).
        things: (S,) bool, words for what may move.
        parked: things of other frames count only where at least half of the frames that see the voxel call it a thing;
            elsewhere the target's own things stay where the others say thing or free, if they are to be trusted.
        trusted: (bins * 2 * S,) bool, rows as of ``table``: whether what is said is most likely a thing. (0,): always.
    """

    num_classes: int
    weights: np.ndarray
    shares: np.ndarray
    things: np.ndarray
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    table: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    prior: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    parked: bool = False
    trusted: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def bayes(self) -> bool:
        return bool(len(self.table))

    def arguments(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool, np.ndarray]:
        """What ``_pull`` needs of it, in its order."""
        return self.weights, self.shares, self.place, self.table, self.prior, self.things, self.parked, self.trusted

    @property
    def voxels(self) -> int:
        """N."""
        return max(self.weights.shape[1], len(self.place))


@dataclass
class Pulled:
    """What came out for a box of target voxels; arrays (X, Y, Z).

    Attributes:
        semantic: uint8 class; where nobody votes what was there before.
        frames: int32, how many sources said something; None unless asked for.
        last: int32, the last source that did, -1 for none; None likewise.
        confidence: uint8, 255 is certain: the winner's share of the votes, or its posterior; None likewise.
    """

    semantic: np.ndarray
    frames: np.ndarray | None = None
    last: np.ndarray | None = None
    confidence: np.ndarray | None = None
