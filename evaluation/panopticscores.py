"""Panoptic quality of voxels and of points by batches, and how boxes that a network finds give instances to what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from occstream.evaluation.detection import rules_of
from occstream.evaluation.evaluate import EvalResult
from occstream.evaluation.instances import (
    FoundBoxes,
    RefineConfig,
    Segments,
    refine_points,
    refine_voxels,
    taxonomy_ids,
    true_point_instances,
    true_voxel_instances,
    unknown_things,
)
from occstream.evaluation.lidar import true_boxes
from occstream.evaluation.panoptic import (
    NUSCENES_THINGS,
    PanopticMetric,
    nuscenes_panoptic,
    semantickitti_panoptic,
    voxel_panoptic,
)
from occstream.models.batch import Batch, Occupancy, PointLabels, Points
from occstream.models.centerpoint import Detections
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE, Taxonomy


@dataclass
class PanopticResult(EvalResult):
    """Scores in percent.

    Attributes:
        mean: ``pq``, ``sq``, ``rq``, ``pq_dagger``, ``pq_things``, ``pq_stuff`` and ``pq_present`` (over classes that occur); of
            voxels with ``voxel_`` before.
        per_class: PQ by class name; classes that do not occur count 0.
    """

    mean: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)
    headline: ClassVar[Mapping[str, str]] = {"voxel_pq": "PQ-voxel", "pq": "PQ", "pq_dagger": "PQ†"}

    def scores(self) -> dict[str, float]:
        return self.mean | {f"class/{name}": value for name, value in self.per_class.items()}


_MEANS = {
    "pq": "PQ", "sq": "SQ", "rq": "RQ", "pq_dagger": "PQ_dagger", "pq_things": "PQ_things", "pq_stuff": "PQ_stuff",
    "pq_present": "PQ_present",
}  # fmt: skip


def _result(metric: PanopticMetric, before: str = "") -> PanopticResult:
    found = metric.result()
    mean = {f"{before}{name}": 100 * found[metric.prefix + score] for name, score in _MEANS.items()}
    return PanopticResult(
        frames=0, mean=mean, per_class={n: 100 * found[f"{metric.prefix}PQ/{n}"] for n in metric.names.values()}
    )


class ThingBoxes:
    """Boxes, whose classes are those of ``detection.rules_of``, with ids of a taxonomy.

    Args:
        taxonomy: of the labels.
        things: its ids that are countable; boxes of other classes do not matter.
    """

    def __init__(self, taxonomy: Taxonomy, things: frozenset[int]) -> None:
        self.of_box, self.things = taxonomy_ids(rules_of(taxonomy).classes, taxonomy), things

    def found(self, boxes: Detections) -> FoundBoxes:
        """Boxes of a frame as what claims voxels and points."""
        classes = self.of_box[boxes.classes]
        keep = np.isin(classes, list(self.things))
        return FoundBoxes(boxes.boxes[keep], classes[keep], boxes.scores[keep])

    def true(self, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
        """(n, 7) and (n,) ids in the taxonomy of the true boxes of each labeled frame."""
        found = [(rows.boxes, self.of_box[rows.classes]) for rows in true_boxes(batch)]
        keep = [np.isin(classes, list(self.things)) for _, classes in found]
        return [(boxes[mine], classes[mine]) for (boxes, classes), mine in zip(found, keep)]


class VoxelSegments:
    """Panoptic voxels of the labeled frames of a batch; things are the taxonomy's. Computed once for several scores of the same
    outputs.

    Args:
        taxonomy: of the labels. grid: of the labels.
        config: how boxes give instances.
        classes: gives (S, X, Y, Z) predicted classes or free.
        boxes: gives the boxes of each frame; None: a network without, whose instances are what is left over.
        occupied: gives (S, X, Y, Z) bool, what another head says is occupied; None: there is none.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        grid: VoxelGrid,
        config: RefineConfig,
        classes: Callable[[Any, Batch], Tensor],
        *,
        boxes: Callable[[Any, Batch], Sequence[Detections]] | None = None,
        occupied: Callable[[Any, Batch], Tensor] | None = None,
    ) -> None:
        self.taxonomy, self.grid, self.config = taxonomy, grid, config
        self.things = frozenset(taxonomy.id(name) for name in taxonomy.things)
        self.rows = ThingBoxes(taxonomy, self.things)
        self.classes, self.boxes, self.occupied = classes, boxes, occupied
        self._last: tuple[Any, list[Segments]] | None = None

    def __call__(self, outputs: Any, batch: Batch) -> list[Segments]:
        """Of each labeled frame."""
        if self._last is None or self._last[0] is not outputs:
            found = self.boxes(outputs, batch) if self.boxes else [_NOTHING] * batch.labeled
            semantic = self.classes(outputs, batch).cpu().numpy()
            occupied = self.occupied(outputs, batch).cpu().numpy() if self.occupied else [None] * batch.labeled
            segments = [
                refine_voxels(
                    frame,
                    self.rows.found(boxes),
                    self.grid,
                    taxonomy=self.taxonomy,
                    things=self.things,
                    config=self.config,
                    occupied=known,
                )
                for frame, boxes, known in zip(semantic, found, occupied)
            ]
            self._last = outputs, segments
        return self._last[1]

    def truth(self, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
        """True classes and ids of each labeled frame; ``IGNORE`` where something countable is in no box."""
        semantic, found = batch.part(Occupancy).classes().cpu().numpy(), []
        for frame, (boxes, kinds) in zip(semantic, self.rows.true(batch)):
            ids = true_voxel_instances(frame, boxes, kinds, self.grid, things=self.things)
            found.append((unknown_things(frame, ids, self.things), ids))
        return found

    def of_rays(self, outputs: Any, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
        """Predicted and true ids of each labeled frame."""
        return [(s.instances, ids) for s, (_, ids) in zip(self(outputs, batch), self.truth(batch))]


_NOTHING = Detections(np.zeros((0, 7), np.float32), None, np.zeros(0, np.int64), np.zeros(0, np.float32))


class VoxelPanopticScores:
    """PQ of voxels; those of things whose instance no box tells do not count.

    Args:
        segments: of the network.
    """

    nothing = "without a single voxel of a known class and instance: there is no score; choose other scenes"

    def __init__(self, segments: VoxelSegments) -> None:
        self.segments, self.metric = segments, voxel_panoptic(segments.taxonomy)

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns its number of voxels that count."""
        count = 0
        for key, mine, (truth, ids) in zip(batch.keys, self.segments(outputs, batch), self.segments.truth(batch)):
            if key:
                self.metric.update(mine.classes, mine.instances, truth, ids)
                count += int((truth != IGNORE).sum())
        return count

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        self.metric.all_reduce(device)

    def result(self) -> PanopticResult:
        """The scores."""
        return _result(self.metric, "voxel_")


def point_panoptic(taxonomy: Taxonomy) -> PanopticMetric:
    """Panoptic quality of points as the benchmark of their classes has it."""
    if taxonomy.name == "occ3d":
        return nuscenes_panoptic()
    if taxonomy.name == "semantickitti":
        return semantickitti_panoptic()
    return PanopticMetric(dict(enumerate(taxonomy.classes)), taxonomy.things, min_points=15)


def point_things(taxonomy: Taxonomy) -> frozenset[int]:
    """Ids of what is countable in the benchmark of points: ten classes of nuScenes, with barriers and cones."""
    names = NUSCENES_THINGS if taxonomy.name == "occ3d" else taxonomy.things
    return frozenset(taxonomy.id(name) for name in names)


class PointPanopticScores:
    """PQ of points, as the benchmark of their classes has it. True instances are those that sweeps have, or follow from true
    boxes.

    Args:
        taxonomy: of the labels.
        config: how boxes give instances.
        classes: gives the class of each point of the labeled frames, (n,) integers, from a network's outputs.
        boxes: gives the boxes of each frame; None: a network without.
    """

    nothing = "without a single point of a known class: there is no score; choose scenes with point labels"

    def __init__(
        self,
        taxonomy: Taxonomy,
        config: RefineConfig,
        classes: Callable[[Any, Batch], Tensor],
        boxes: Callable[[Any, Batch], Sequence[Detections]] | None,
    ) -> None:
        self.taxonomy, self.config, self.classes, self.boxes = taxonomy, config, classes, boxes
        self.metric, self.things = point_panoptic(taxonomy), point_things(taxonomy)
        self.rows = ThingBoxes(taxonomy, self.things)

    def segments(self, outputs: Any, batch: Batch) -> list[Segments]:
        """Of the points of each labeled frame."""
        part, counts = batch.part(Points), batch.part(Points).counts[: batch.labeled].tolist()
        clouds = [cloud.cpu().numpy() for cloud in part.xyz[: sum(counts)].split(counts)]
        classes = [found.cpu().numpy() for found in self.classes(outputs, batch).split(counts)]
        said = self.boxes(outputs, batch) if self.boxes else [_NOTHING] * batch.labeled
        return [
            refine_points(xyz, found, self.rows.found(boxes), things=self.things, config=self.config)
            for xyz, found, boxes in zip(clouds, classes, said)
        ]

    def truth(self, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
        """True classes and ids of the points of each labeled frame; ``IGNORE`` where the instance of something countable is not
        known."""
        labels, points = batch.part(PointLabels), batch.part(Points)
        counts = labels.counts.tolist()
        classes = [c.cpu().numpy() for c in labels.classes.split(counts)]
        clouds = [cloud.cpu().numpy() for cloud in points.xyz[: sum(counts)].split(counts)]
        said = labels.instances.split(counts) if labels.instances is not None else [None] * len(counts)
        boxes = self.rows.true(batch) if batch.boxes is not None else [None] * len(counts)
        instances = []
        for xyz, kinds, own, rows in zip(clouds, classes, said, boxes):
            if own is not None and not (own < 0).any():
                instances.append(own.cpu().numpy())
            elif rows is not None:
                instances.append(true_point_instances(xyz, kinds, *rows, things=self.things)[0])
            else:
                raise ValueError(
                    "neither instances of points nor boxes are there: nothing says which points are of one thing"
                )
        return [(unknown_things(c, i, self.things), i) for c, i in zip(classes, instances)]

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns its number of points that count."""
        count = 0
        for key, mine, (classes, ids) in zip(batch.keys, self.segments(outputs, batch), self.truth(batch)):
            if key:
                self.metric.update(mine.classes, mine.instances, classes, ids)
                count += int((~np.isin(classes, list(self.metric.ignored))).sum())
        return count

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        self.metric.all_reduce(device)

    def result(self) -> PanopticResult:
        """The scores."""
        return _result(self.metric)
