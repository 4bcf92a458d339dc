"""RayIoU of occupancy by batches, and RayPQ where instances are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from occstream.evaluation.evaluate import EvalResult
from occstream.evaluation.rayiou import LIMITS, RayMetric
from occstream.models.batch import Batch, Occupancy
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import Taxonomy

Instances = Callable[[Any, Batch], Sequence[tuple[np.ndarray, np.ndarray] | None]]


@dataclass
class RayResult(EvalResult):
    """Scores of rays in percent.

    Attributes:
        mean: ``rayiou``, by limit ``rayiou_1m``, … , and ``raypq`` likewise where instances are known.
        per_class: RayIoU by class name, NaN for classes that no ray of truth or prediction meets.
    """

    mean: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)
    headline: ClassVar[Mapping[str, str]] = {"rayiou": "RayIoU", "raypq": "RayPQ"}

    def scores(self) -> dict[str, float]:
        return self.mean | {f"class/{name}": value for name, value in self.per_class.items()}

    def conditions(self) -> str:
        return f"within {', '.join(f'{limit:g}' for limit in LIMITS)} m"


class RayScores:
    """Casts rays into what a network predicts and into the labels of a batch. Voxels that the labels do not know let rays pass,
    as free ones do.

    Args:
        taxonomy: of the labels.
        grid: of the labels.
        origins: by the key of a frame, (A, 3) where its rays begin, in the grid's frame (``rayiou.ray_origins``).
        classes: gives (S, X, Y, Z) predicted classes or free of the labeled frames, from a network's outputs.
        instances: gives of each labeled frame (X, Y, Z) predicted and true ids, or None where they are not known; None: RayPQ is
            not computed.
    """

    nothing = "without a single labeled frame, or a place of the LiDAR within the grid: there are no rays"

    def __init__(
        self,
        taxonomy: Taxonomy,
        grid: VoxelGrid,
        origins: Callable[[str], np.ndarray],
        classes: Callable[[Any, Batch], Tensor],
        *,
        instances: Instances | None = None,
    ) -> None:
        self.taxonomy, self.origins, self.classes, self.instances = taxonomy, origins, classes, instances
        self.metric = RayMetric(taxonomy, grid, cache_bytes=0)

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns the number of rays' origins."""
        if not batch.labeled:
            return 0
        truth, found = batch.part(Occupancy).classes().cpu().numpy(), self.classes(outputs, batch).cpu().numpy()
        instances = self.instances(outputs, batch) if self.instances else [None] * len(truth)
        count = 0
        for index, key in enumerate(batch.keys[: batch.labeled]):
            if key:
                origins = self.origins(key)
                mine, theirs = instances[index] or (None, None)
                self.metric.update(found[index], truth[index], origins, instances=mine, true_instances=theirs)
                count += len(origins)
        return count

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        self.metric.all_reduce(device)

    def result(self) -> RayResult:
        """The scores."""
        found = self.metric.result()
        names = [name for name in ("RayIoU", "RayPQ") if name in found]
        mean = {name.lower(): 100 * found[name] for name in names}
        for limit in LIMITS:
            mean |= {f"{name.lower()}_{limit:g}m": 100 * found[f"{name}/{limit:g}m"] for name in names}
        return RayResult(
            frames=0, mean=mean, per_class={name: 100 * found[f"RayIoU/{name}"] for name in self.taxonomy.classes}
        )
