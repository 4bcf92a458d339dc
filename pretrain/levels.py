"""Decoders that say at each of their levels what is occupied and prune the rest (PanoOcc, Sec. 3.5): losses, fp32, and how
much of what labels call occupied a share that is kept can hold."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from occstream.models.batch import Occupancy, pool_binary
from occstream.models.decoding import Level, Shape
from occstream.models.layers import full_precision
from occstream.pretrain.config import Mask
from occstream.pretrain.losses import sigmoid_focal_sum
from occstream.pretrain.reading import cache
from occstream.sharding.manifest import Manifest
from occstream.sharding.stream import ShardReader

ALL = {"": slice(None)}


def level_sums(
    levels: Sequence[Level], labels: Occupancy, gamma: float, alpha: float, *, roles: Mapping[str, slice] = ALL
) -> dict[str, Tensor]:
    """Sums of the focal loss of each level, as roles of one term: ``occupied@1`` is the coarsest.

    Args:
        levels: of the frames of ``labels``, each on a grid that theirs divides by. Labels are pooled to it: a voxel is
            occupied if any known part of it is, and unknown ones are left out, as are those that the level did not look at.
        roles: frames whose losses have a normalizer of their own, by role ("" or "@…").
    """
    found = {}
    for n, level in enumerate(levels, 1):
        occupied, known = pool_binary(labels.binary, labels.binary_valid, level.shape)
        occupied = level.at(occupied)
        for role, frames in roles.items():
            ours = torch.zeros_like(known)
            ours[frames] = known[frames]
            with full_precision(level.logits.device):
                index = level.at(ours).nonzero().squeeze(1)
                classes = (~occupied[index]).long()  # the one class is number 0
                logits = level.logits.float()[index, None]
                found[_name(role, n)] = sigmoid_focal_sum(logits, [(classes, None)], gamma, alpha)
    return found


def level_counts(levels: Sequence[Level], labels: Occupancy, *, roles: Mapping[str, slice] = ALL) -> dict[str, Tensor]:
    """What ``level_sums`` are divided by: voxels of each level's grid that the labels call occupied. That holds for what was
    pruned as well: the labels alone count."""
    found = {}
    for n, level in enumerate(levels, 1):
        occupied, _ = pool_binary(labels.binary, labels.binary_valid, level.shape)
        found |= {_name(role, n): occupied[frames].sum() for role, frames in roles.items()}
    return found


def _name(role: str, level: int) -> str:
    return f"occupied{role or '@'}{level}"


def occupied_shares(
    manifest: Manifest, scenes: Sequence[int], shapes: Sequence[Shape], *, mask: Mask = "auto", frames: int = 8
) -> np.ndarray:
    """(frames, grids) share in 0..1 of the voxels of each grid that labels call occupied, in evenly spaced frames.

    Args:
        shapes: (X, Y, Z) of grids that the labels' divides by; voxels are pooled as for ``level_sums``.
        mask: which voxels count, as of ``data.mask``.
    """
    places = [(i, k) for i in scenes for k in range(manifest.scenes[i].frames)]
    reader = ShardReader(manifest, (manifest.label_group,), cache(manifest.url))
    found = []
    try:
        for n in np.unique(np.linspace(0, len(places) - 1, min(frames, len(places))).astype(int)):
            labels = reader.frame(*places[n]).labels
            if labels is None:
                continue  # the streams say which frame lacks what
            known = {"camera": labels.mask_camera, "none": np.ones_like(labels.binary)}.get(mask)
            occupied = torch.from_numpy(labels.binary & (labels.known() if known is None else known))[None]
            found.append([float(pool_binary(occupied, occupied, shape)[0].float().mean()) for shape in shapes])
    finally:
        reader.close()
    return np.array(found).reshape(-1, len(shapes))


def keep_notes(
    key: str, shares: np.ndarray, shapes: Sequence[Shape], keep: Sequence[float], *, setting: str = "model.keep"
) -> list[str]:
    """What to print of the shares that a decoder keeps against those that labels of a stream call occupied.

    Args:
        key: of the stream's section.
        shares: of ``occupied_shares``.
        shapes: of the levels' grids, coarse to fine.
        keep: share of the children that each level keeps.
        setting: name of ``keep``.
    """
    if not len(shares):
        return []
    kept = list(itertools.accumulate(keep, operator.mul))
    each = zip(shapes, shares.mean(0), kept)
    grids = ", ".join(f"{100 * share:.1f} % of {'x'.join(map(str, s))} ({100 * k:.1f} %)" for s, share, k in each)
    notes = [f"{key}: labels of {len(shares)} frames occupy (and {setting} keeps) {grids}"]
    total = shares.sum(0)
    held = np.where(total > 0, np.minimum(shares, kept).sum(0) / np.maximum(total, 1e-12), 1.0)
    if held.min() < 1:
        worst = int(held.argmin())
        notes.append(
            f"warning: {setting} is too small for these labels: it holds at most {math.floor(100 * held[worst])} % of what "
            f"they call occupied at level {worst + 1}, and recall cannot be above that; "
            f"{setting}=[{', '.join(f'{n:g}' for n in _enough(shares.max(0)))}] holds all of these frames"
        )
    return notes


def _enough(shares: np.ndarray) -> list[float]:
    """Shares of children to keep, in hundredths, so that each level keeps at least a share of its grid."""
    found, left = [], 1.0
    for share in shares:
        found.append(min(1.0, max(1, math.ceil(100 * share / left - 1e-9)) / 100))
        left *= found[-1]
    return found
