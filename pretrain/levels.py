"""Losses of a decoder that says at each of its levels what is occupied (PanoOcc, Sec. 3.5), fp32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from occstream.models.batch import Occupancy, pool_binary
from occstream.models.decoding import Level
from occstream.models.layers import full_precision
from occstream.pretrain.losses import sigmoid_focal_sum


def level_sums(levels: Sequence[Level], labels: Occupancy, gamma: float, alpha: float) -> dict[str, Tensor]:
    """Sums of the focal loss of each level, as roles of one term: ``occupied@1`` is the coarsest.

    Args:
        levels: of the frames of ``labels``, each on a grid that theirs divides by. Labels are pooled to it: a voxel is
            occupied if any known part of it is, and unknown ones are left out, as are those that the level did not look at.
    """
    found = {}
    for n, level in enumerate(levels, 1):
        occupied, known = (level.at(part) for part in pool_binary(labels.binary, labels.binary_valid, level.shape))
        with full_precision(level.logits.device):
            index = known.nonzero().squeeze(1)
            classes = (~occupied[index]).long()  # the one class is number 0
            logits = level.logits.float()[index, None]
            found[f"occupied@{n}"] = sigmoid_focal_sum(logits, [(classes, None)], gamma, alpha)
    return found


def level_counts(levels: Sequence[Level], labels: Occupancy) -> dict[str, Tensor]:
    """What ``level_sums`` are divided by: voxels of each level's grid that the labels call occupied. That holds for what was
    pruned as well: the labels alone count."""
    shapes = [level.shape for level in levels]
    pooled = (pool_binary(labels.binary, labels.binary_valid, shape)[0] for shape in shapes)
    return {f"occupied@{n}": occupied.sum() for n, occupied in enumerate(pooled, 1)}
