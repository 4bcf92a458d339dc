"""Losses of any task: sums over valid elements, divided by counts over all ranks and micro-batches of a step.

DeepSpeed averages gradients over ranks. So that this equals one process with the joint batch, each rank returns
``sum * world / count`` with its own sum and the count of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from occstream.models.syncnorm import world_size

Counts = dict[str, Tensor]


def joint_counts(batches: Sequence[Mapping[str, Tensor]], flags: Tensor | None = None) -> Counts:
    """Counts of the micro-batches of a step, over all ranks (collective). With each micro-batch's own counts, gradient
    accumulation would weigh elements of sparse frames more than one large batch does.

    Args:
        batches: the rank's own counts, by term; the same terms on every rank.
        flags: (n,) float32, summed over ranks in place on the way.

    Returns:
        float32 scalars per micro-batch, at least 1 in all of them together.
    """
    names = list(batches[0])
    sums = torch.stack([torch.stack([counts[name].float() for name in names]) for counts in batches]).sum(0)
    if world_size() > 1:
        joint = sums if flags is None else torch.cat([sums, flags])
        dist.all_reduce(joint)
        sums = joint[: len(sums)]
        if flags is not None:
            flags.copy_(joint[len(sums) :])
    return dict(zip(names, sums.clamp_min(1) / len(batches)))


def combine(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rank's loss (its mean over ranks and micro-batches is the loss of the joint batch) and detached terms.

    Args:
        sums: by term; what follows an "@" is a role, and roles are reported together.
        counts: of ``joint_counts``.
        weights: by term without role; None: only reported.

    Raises:
        ValueError: all of them are only reported.
    """
    weighted: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    for name, total in sums.items():
        term = name.partition("@")[0]
        value = total * world_size() / counts[name]
        terms[term] = terms[term] + value.detach() if term in terms else value.detach()
        weight = weights[term]
        if weight is not None:
            weighted.append(weight * value)
    if not weighted:
        raise ValueError(f"none of the losses ({', '.join(terms)}) has a weight: there is nothing to learn")
    return functools.reduce(torch.add, weighted), terms
