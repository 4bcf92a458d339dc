"""How sure predictions are: the second class of each voxel, and the share of the first beside it, the same on every CPU."""

from __future__ import annotations

import numpy as np

from occstream.sharding.exactmath import log
from occstream.sharding.schema import IGNORE, Labels

# By how much the first logit must exceed the second for a share of 129, …, 255 of 255. Comparing does not depend on the CPU, as
# exp does.
_STEPS = np.asarray(log((np.arange(129, 256) - 0.5) / (255.5 - np.arange(129, 256))), np.float32)


def doubts(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Of labels with logits, of all classes or of the best ones.

    Returns:
        (X, Y, Z) uint8 second class, ``IGNORE`` where only one is known, and (X, Y, Z) uint8 from 128 to 255: the probability of
        the first class beside the second, in 255ths.

    Raises:
        ValueError: the labels are hard.
    """
    if labels.logits is None:
        raise ValueError("has no second classes; predict with --keep top2 or logits")
    second = np.full(labels.binary.shape, IGNORE, np.uint8)
    sure = np.full(labels.binary.shape, 255, np.uint8)
    logits, ranked = labels.logits.astype(np.float32), labels.ranked
    if ranked is None:
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, :2].astype(np.uint8)
        logits = np.take_along_axis(logits, ranked.astype(np.int64), 1)
    if ranked.shape[1] > 1:
        second[labels.binary] = ranked[:, 1]
        sure[labels.binary] = 128 + np.searchsorted(_STEPS, logits[:, 0] - logits[:, 1], side="right")
    return second, sure
