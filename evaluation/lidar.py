"""Scores of LiDAR tasks by batches: boxes found, and classes of points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from occstream.evaluation.detection import (
    MEAN_ERRORS,
    BoxSet,
    DetectionMetric,
    DetectionRules,
    rules_of,
    without_attributes,
)
from occstream.evaluation.evaluate import EvalResult
from occstream.evaluation.pointseg import PointMetric
from occstream.models.batch import Batch, Boxes, PointLabels
from occstream.models.centerpoint import Detections
from occstream.sharding.schema import IGNORE, Taxonomy


@dataclass
class DetectionResult(EvalResult):
    """Mean average precision and NDS as nuScenes defines them, without attributes, which shards do not know.

    Attributes:
        mean: ``mAP``, ``NDS``, the same over the classes that the truth has (``mAP_present``, ``NDS_present``), and ``recall``,
            the share of true boxes that a prediction of any score lies within 2 m of; in percent.
        errors: ``mATE`` in m, ``mASE`` as 1 - IoU, ``mAOE`` in rad, ``mAVE`` in m/s.
        threshold: the score above which 80 % of the boxes found are right to within 2 m, 1 where there is none.
        reach: meters that the network looks, where that is less than the benchmark's; None: as far.
        per_class: average precision by class name, in percent; classes that the truth does not have count as 0 in ``mAP``.
        present: names of the classes that the truth has.
    """

    mean: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    threshold: float = 1.0
    reach: float | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    headline: ClassVar[Mapping[str, str]] = {"mAP": "mAP", "NDS": "NDS"}

    def scores(self) -> dict[str, float]:
        found = self.mean | self.errors | {"score_at_precision_80": self.threshold}
        return found | {f"class/{name}": value for name, value in self.per_class.items()}

    def conditions(self) -> str:
        absent = [name for name in self.per_class if name not in self.present]
        zero = f", classes without a true box count as 0: {', '.join(absent)}" if absent else ""
        units = {"mATE": " m", "mASE": "", "mAOE": " rad", "mAVE": " m/s"}
        errors = "".join(
            f"{name} {self.errors[name]:.2f}{unit}, " for name, unit in units.items() if name in self.errors
        )
        sure = f"80 % right above a score of {self.threshold:.2f}" if self.threshold < 1 else "no score with 80 % right"
        within = "" if self.reach is None else f" within {self.reach:g} m, where the network looks"
        return f"by center distance{within}, {errors}{sure}, attributes not scored{zero}"


class DetectionScores:
    """Counts boxes that a network finds against those of a batch.

    Args:
        taxonomy: of the labels; the classes are those of ``rules_of``.
        found: gives the boxes of each of the batch's frames, of the labeled ones at least, from a network's outputs.
        reach: meters; boxes further away do not count either, as a network that looks no further cannot find them. None: as
            far as the benchmark has it.
    """

    nothing = (
        "without a single true box that counts (of a scored class, in range, with a LiDAR point inside): there is no score; "
        "choose other scenes"
    )

    def __init__(
        self, taxonomy: Taxonomy, found: Callable[[Any, Batch], Sequence[Detections]], *, reach: float | None = None
    ) -> None:
        self.rules: DetectionRules = without_attributes(rules_of(taxonomy))
        self.reach = reach if reach is not None and reach < max(self.rules.reach) else None
        if self.reach is not None:
            self.rules = dataclasses.replace(self.rules, reach=tuple(min(self.reach, far) for far in self.rules.reach))
        self.found, self.metric = found, DetectionMetric(self.rules)

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns its number of true boxes that count."""
        before, truth = int(self.metric.truths.sum()), true_boxes(batch)
        for key, predicted, boxes in zip(batch.keys, self.found(outputs, batch), truth):
            if key:
                rows = BoxSet(predicted.boxes, predicted.classes, predicted.velocity, scores=predicted.scores)
                self.metric.update(key, rows, boxes)
        return int(self.metric.truths.sum()) - before

    def all_reduce(self, device: torch.device) -> None:
        """Brings the frames of all ranks together (collective)."""
        self.metric.all_reduce(device)

    def result(self) -> DetectionResult:
        """The scores."""
        found, names = self.metric.result(), self.rules.classes
        return DetectionResult(
            frames=0,
            mean={name: 100 * found[name] for name in ("mAP", "NDS", "mAP_present", "NDS_present", "recall")},
            errors={name: found[name] for name in MEAN_ERRORS if not np.isnan(found[name])},
            threshold=found["score_at_precision_80"],
            reach=self.reach,
            per_class={name: 100 * found[f"AP/{name}"] for name in names},
            present=tuple(name for name, count in zip(names, self.metric.truths.tolist()) if count),
        )


def true_boxes(batch: Batch) -> list[BoxSet]:
    """Of each labeled frame, those of scored classes."""
    part = batch.part(Boxes)
    ends = [0, *part.counts.cumsum(0).tolist()]
    rows = {name: getattr(part, name).cpu().numpy() for name in ("boxes", "classes", "velocity", "points")}
    rows["classes"] = rows["classes"].astype(np.int64)
    frames = [{name: a[first:last] for name, a in rows.items()} for first, last in pairwise(ends)]
    return [BoxSet(**frame).where(frame["classes"] != IGNORE) for frame in frames]


@dataclass
class PointResult(EvalResult):
    """Scores of points in percent.

    Attributes:
        mean: ``point_miou``, ``point_fwiou`` (weighted by the truth's points), ``point_accuracy``, and ``point_refused``, the
            share of answers that the nuScenes benchmark does not take, where there are any.
        per_class: IoU by class name, NaN for classes that do not occur.
        convention: how it is averaged.
    """

    mean: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)
    convention: str = ""
    headline: ClassVar[Mapping[str, str]] = {"point_miou": "point mIoU"}

    def scores(self) -> dict[str, float]:
        return self.mean | {f"class/{name}": value for name, value in self.per_class.items()}

    def conditions(self) -> str:
        return f"convention {self.convention}"


class PointScores:
    """Counts classes that a network gives to points against those of a batch.

    Args:
        taxonomy: of the labels.
        found: gives the class of each point of the labeled frames, (n,) integers, from a network's outputs.
    """

    nothing = "without a single point of a known class: there is no score; choose scenes with point labels"

    def __init__(self, taxonomy: Taxonomy, found: Callable[[Any, Batch], Tensor]) -> None:
        self.taxonomy, self.found, self.metric = taxonomy, found, PointMetric(taxonomy)

    @property
    def first(self) -> int:
        """Classes below it are not scored, and must not be answered: 1 where class 0 is noise."""
        return self.metric.matrix.convention.first

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns its number of points that count."""
        part = batch.part(PointLabels)
        known = torch.tensor([bool(key) for key in batch.keys[: batch.labeled]], device=part.classes.device)
        truth = torch.where(known[part.owners()], part.classes, IGNORE)
        self.metric.update(self.found(outputs, batch), truth)
        return int(((truth != IGNORE) & (truth >= self.first)).sum())

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        self.metric.all_reduce(device)

    def result(self) -> PointResult:
        """The scores."""
        found, scored = self.metric.result(), self.taxonomy.classes[self.first :]
        mean = {f"point_{name.lower()}": 100 * found[name] for name in ("mIoU", "fwIoU", "accuracy")}
        if found["refused"]:
            mean["point_refused"] = 100 * found["refused"]
        return PointResult(
            frames=0,
            mean=mean,
            per_class={name: 100 * found[f"IoU/{name}"] for name in scored},
            convention="lidarseg" if self.first else "all classes",
        )
