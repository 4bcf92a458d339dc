"""Naive Bayes over frames: what a network's classes mean, counted where the truth is known, instead of weights.

log p(true) + λ Σ over frames log p(said | true, range, in view). The table is the network's confusion matrix by range and
by whether a camera saw the voxel. λ below 1 stands for errors that neighboring frames share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from occstream.evaluation.rules import ABSTAIN, DOUBTFUL, LOG_UNIT, Rule
from occstream.evaluation.votes import things_of
from occstream.sharding.codec import canonical_json
from occstream.sharding.exactmath import log
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import Taxonomy

BIN = 6.4  # meters of a range bin
BINS = 9  # the last holds the rest
EXTRA = (0, len(DOUBTFUL))  # words beyond the classes
LAMBDAS = tuple(n / 10 for n in range(1, 11))


def range_bins(grid: VoxelGrid) -> np.ndarray:
    """(N,) uint8: bin of each voxel by its distance from the origin of the grid's frame, seen from above."""
    x, y, _ = grid.centers().reshape(-1, 3).T
    return np.minimum(np.sqrt(x * x + y * y) / BIN, BINS - 1).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Confusions:
    """How often a network says what, counted on frames that it was not trained on.

    Attributes:
        counts: (BINS, 2, K + 1, S) int64: voxels by bin, in view or not, truth (the last class is free), and word: S is K + 1, or
            that and the kinds of free that evidence tells apart (``propagate.packed``).
        exponent: λ.
    """

    counts: np.ndarray
    exponent: float = 1.0

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts, np.int64)
        if (
            counts.ndim != 4
            or counts.shape[:2] != (BINS, 2)
            or counts.shape[3] - counts.shape[2] not in EXTRA
            or counts.min() < 0
        ):
            raise ValueError(
                f"a table of confusions has shape {counts.shape}, expected {BINS} x 2 x classes x classes said"
            )
        if not 0 < self.exponent <= 1:
            raise ValueError(f"λ is {self.exponent}, must be above 0 and at most 1")
        object.__setattr__(self, "counts", counts)

    def likelihoods(self) -> np.ndarray:
        """(BINS, 2, K + 1 true, S said) float64: p(said | true, bin, in view), each count with 0.5 added."""
        smooth = self.counts + 0.5
        return smooth / smooth.sum(-1, keepdims=True)

    def prior(self) -> np.ndarray:
        """(K + 1,) float64: p(true), likewise."""
        counts = self.counts.sum((0, 1, 3)) + 0.5
        return counts / counts.sum()

    @property
    def evidence(self) -> bool:
        """Whether it tells kinds of free apart."""
        return self.counts.shape[3] > self.counts.shape[2]

    @property
    def digest(self) -> str:
        """Names the table."""
        return hashlib.blake2b(canonical_json(self.to_dict()), digest_size=8).hexdigest()

    def to_dict(self) -> dict:
        return {"counts": self.counts.tolist(), "exponent": self.exponent}

    @classmethod
    def from_dict(cls, data: dict, where: str) -> Confusions:
        """The inverse of ``to_dict``. Raises ValueError that names ``where``."""
        try:
            counts, exponent = np.array(data["counts"]), float(data["exponent"])
            if counts.dtype.kind != "i" or counts.ndim != 4:
                raise ValueError("its counts are not whole numbers by bin, view, truth and class")
            return cls(counts, exponent)
        except (KeyError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:120]
            raise ValueError(f"{where}: is no table of confusions ({said}); measure it with --holdout") from None


def naive_bayes(confusions: Confusions, grid: VoxelGrid, taxonomy: Taxonomy) -> Rule:
    """The rule on a grid.

    Raises:
        ValueError: the table is of another number of classes.
    """
    classes = taxonomy.num_classes + 1
    if confusions.counts.shape[2] != classes:
        raise ValueError(
            f"the table of confusions has {confusions.counts.shape[2] - 1} classes, taxonomy {taxonomy.name} has "
            f"{taxonomy.num_classes}; measure it on this data"
        )
    rows = np.swapaxes(log(confusions.likelihoods()), 2, 3).reshape(-1, classes)
    things = things_of(taxonomy)
    words = np.append(things, np.zeros(confusions.counts.shape[3] - classes, bool))
    likeliest = (rows + log(confusions.prior())).argmax(1)
    return Rule(
        taxonomy.num_classes,
        np.zeros((2, 0), np.int32),
        np.zeros(classes, np.int64),
        words,
        place=range_bins(grid),
        table=np.ascontiguousarray(np.rint(confusions.exponent * LOG_UNIT * rows).astype(np.int32)),
        prior=np.rint(LOG_UNIT * log(confusions.prior())).astype(np.int64),
        trusted=things[likeliest],
    )


def confusions_of(
    said: np.ndarray, truth: np.ndarray, grid: VoxelGrid, classes: int, *, words: int | None = None
) -> np.ndarray:
    """(BINS, 2, classes, words) int64 of one frame.

    Args:
        said: (X, Y, Z) of ``propagate.packed``.
        truth: (X, Y, Z) uint8; ids from ``classes`` on are not counted.
        classes: number of them with free.
        words: number of what may be said; None: the classes.
    """
    words = words or classes
    said, truth = said.reshape(-1), truth.reshape(-1)
    index = (range_bins(grid).astype(np.int64) * 2 + (said >> 7)) * classes * words
    keep = (truth < classes) & (said & 127 != ABSTAIN)
    index = index[keep] + truth[keep].astype(np.int64) * words + (said[keep] & 127)
    return np.bincount(index, minlength=BINS * 2 * classes * words).reshape(BINS, 2, classes, words)


def confusions_by_exponent(scores: np.ndarray, truth: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(len(LAMBDAS), K + 1, K + 1) int64: voxels by truth and by the class that wins at each λ.

    Args:
        scores: (V, K + 1) int64 of ``propagate.evidence`` by a table at λ = 1.
        truth: (V,) class ids.
        prior: (K + 1,) of the rule.
    """
    classes = len(prior)
    won = [(prior + exponent * scores).argmax(1) for exponent in LAMBDAS]
    found = [np.bincount(truth.astype(np.int64) * classes + w, minlength=classes**2) for w in won]
    return np.stack(found).reshape(-1, classes, classes)


def scores_by_exponent(counts: np.ndarray) -> np.ndarray:
    """(len(LAMBDAS), 2) float64: IoU and mIoU of ``confusions_by_exponent``, 0..1; classes that do not occur are skipped."""
    hit = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(1) + counts.sum(2) - hit
    each = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
    solid = counts[:, :-1, :-1].sum((1, 2)) / np.maximum(counts.sum((1, 2)) - hit[:, -1], 1)
    return np.stack([solid, np.nan_to_num(each[:, :-1]).sum(1) / np.maximum((union[:, :-1] > 0).sum(1), 1)], 1)


def best_exponent(scores: np.ndarray) -> float:
    """λ of the highest sum of IoU and mIoU, the smallest of equal ones."""
    return LAMBDAS[int(np.argmax(np.round(scores.sum(1), 9)))]
