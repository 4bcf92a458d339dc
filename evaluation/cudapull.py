"""``propagate.pull`` on a GPU, by one Triton program for some target voxels: bit by bit what the CPU makes.

Only torch's device and Triton are needed; where either is missing the CPU does it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from occstream.evaluation.rules import Pulled, Rule

VOXELS = 32  # of a program: two scores of all classes fit into its registers
INTERPRETED = 128  # in the interpreter, whose programs take as long whatever their size


@functools.cache
def usable() -> bool:
    """Whether there are a CUDA device and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def pull_into(
    out: Pulled,
    rule: Rule,
    maps: np.ndarray,
    sources: np.ndarray,
    *,
    slots: Sequence[int],
    itself: int,
    index: np.ndarray,
    numbers: Sequence[int] | None,
    doubts: tuple[np.ndarray, np.ndarray] | None,
    device: str = "cuda",
) -> None:
    """Decides target voxels.

    Args:
        out: to write to; ``semantic`` is what the target says itself. Confidence is that of votes.
        rule, maps, sources, slots, itself, numbers, doubts: as for ``propagate.pull``.
        index: (V, 3) of the voxels to decide.
        device: cpu for Triton's interpreter.
    """
    import triton

    from occstream.evaluation import tritonpull

    if not len(index):
        return
    used = sorted(set(slots))  # of all slots only these travel
    place_of = {slot: number for number, slot in enumerate(used)}

    def move(array: np.ndarray, dtype: Any = None) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array if dtype is None else array.astype(dtype)), device=device)

    nothing = np.zeros(1, np.uint8)
    second, sure = (each[used] for each in doubts) if doubts else (nothing, nothing)
    said_by = np.asarray(range(len(slots)) if numbers is None else numbers)
    where = tuple(index.T)
    found = move(out.semantic[where])
    details = out.frames is not None
    made = [move(each[where] if each is not None else nothing) for each in (out.frames, out.last, out.confidence)]
    classes = rule.num_classes + 1
    voxels = INTERPRETED if device == "cpu" else VOXELS
    program: Any = tritonpull.pull[(-(-len(index) // voxels),)]  # to the type checker, its options are no arguments
    program(
        move(index, np.int32), move(maps.reshape(-1), np.float64), move(sources[used]), move(second), move(sure),
        move(np.array([place_of[slot] for slot in slots], np.int64)), move(said_by, np.int32),
        move(rule.weights if rule.weights.size else nothing), move(rule.shares),
        move(rule.place if rule.place.size else nothing), move(rule.table if rule.table.size else nothing),
        move(rule.prior if rule.prior.size else nothing), move(rule.things, np.uint8),
        move(rule.trusted if rule.trusted.size else nothing, np.uint8), found, *made,
        len(index), len(slots), itself, classes, len(rule.things), *sources.shape[1:],
        BAYES=rule.bayes, DOUBTS=doubts is not None, PARKED=rule.parked, TRUSTED=bool(rule.trusted.size) and itself >= 0,
        DETAILS=details, VOXELS=voxels, CH=triton.next_power_of_2(classes), enable_fp_fusion=False,
    )  # fmt: skip
    for target, value in zip((out.semantic, out.frames, out.last, out.confidence), (found, *made)):
        if target is not None:
            target[where] = value.cpu().numpy()
