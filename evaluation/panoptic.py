"""Panoptic quality of points or voxels.

Kirillov et al., "Panoptic Segmentation", CVPR 2019 (PQ, SQ, RQ), Porzi et al., "Seamless Scene Segmentation", CVPR 2019
(PQ†), with the rule for small segments of SemanticKITTI and Panoptic nuScenes (Fong et al., RA-L 2022).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch

from occstream.evaluation.gather import SHARE
from occstream.evaluation.metrics import sum_over_ranks
from occstream.sharding.schema import IGNORE, OCC3D, SEMANTICKITTI, Taxonomy

NUSCENES_THINGS = OCC3D.classes[1:11]  # the benchmark counts barriers and cones
PER_CLASS = 1000  # Panoptic nuScenes: label = class * 1000 + instance


class PanopticMetric:
    """PQ, SQ, RQ, PQ† and mIoU over frames.

    A segment is what has one class and one instance id. Points whose truth is ignored are dropped first. Segments of one
    class match if their IoU is above 0.5; unmatched ones count as false if they have at least ``min_points``.

    Args:
        names: of the scored classes, by id.
        things: names of those that are countable.
        ignored: ids of the truth whose points are dropped. ``IGNORE`` always is.
        min_points: points (or voxels) of an unmatched segment that counts.
        prefix: of the names of scores that are not comparable with published ones, as ``voxel-``.
    """

    def __init__(
        self,
        names: dict[int, str],
        things: Collection[str],
        *,
        ignored: Collection[int] = (),
        min_points: int = 1,
        prefix: str = "",
    ) -> None:
        self.names, self.things, self.min_points, self.prefix = dict(names), frozenset(things), min_points, prefix
        self.ignored = frozenset(ignored) | {IGNORE}
        # By class id: true positives, false positives, false negatives, sum of IoU (in units of 1 / SHARE), and points of
        # the intersection, of the truth and of the prediction.
        self.counts = torch.zeros(max(names) + 1, 7, dtype=torch.int64)

    def update(
        self,
        classes: np.ndarray,
        instances: np.ndarray,
        true_classes: np.ndarray,
        true_instances: np.ndarray,
        *,
        near: np.ndarray | None = None,
    ) -> None:
        """Adds a frame.

        Args:
            classes, instances: predicted, integers of one shape; ids of instances are of any size, not negative.
            true_classes, true_instances: of the same shape.
            near: bool of the same shape, the points that may be shared by two segments; others only make both larger. None:
                all.
        """
        arrays = [np.asarray(a).ravel().astype(np.int64) for a in (classes, instances, true_classes, true_instances)]
        if len({len(a) for a in arrays}) != 1:
            raise ValueError(
                f"panoptic labels of {', '.join(str(len(a)) for a in arrays)} points, they must be as many"
            )
        keep = ~np.isin(arrays[2], list(self.ignored))
        classes, instances, true_classes, true_instances = (a[keep] for a in arrays)
        found, found_of, found_size = _segments(classes, instances)
        truth, truth_of, truth_size = _segments(true_classes, true_instances)
        near = np.ones(len(classes), bool) if near is None else np.asarray(near).ravel()[keep]
        pairs, shared = np.unique((truth_of * max(len(found), 1) + found_of)[near], return_counts=True)
        i, j = pairs // max(len(found), 1), pairs % max(len(found), 1)
        iou = shared / (truth_size[i] + found_size[j] - shared)
        match = (truth[i] == found[j]) & (iou > 0.5)
        matched_truth, matched_found = np.zeros(len(truth), bool), np.zeros(len(found), bool)
        matched_truth[i[match]] = matched_found[j[match]] = True
        self._add(0, truth[i[match]])
        self._add(1, found[~matched_found & (found_size >= self.min_points)])
        self._add(2, truth[~matched_truth & (truth_size >= self.min_points)])
        self._add(3, truth[i[match]], np.rint(iou[match] * SHARE).astype(np.int64))
        self._add(4, true_classes[(classes == true_classes) & near])
        self._add(5, true_classes)
        self._add(6, classes)

    def _add(self, column: int, classes: np.ndarray, amounts: np.ndarray | None = None) -> None:
        inside = classes < len(self.counts)
        total = np.zeros(len(self.counts), np.int64)
        np.add.at(total, classes[inside], 1 if amounts is None else amounts[inside])
        self.counts[:, column] += torch.from_numpy(total)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sums over ranks (collective, once); exact, however frames are spread."""
        self.counts = sum_over_ranks(self.counts, device)

    def result(self) -> dict[str, float]:
        """Fractions: ``PQ``, ``SQ``, ``RQ``, ``mIoU``, ``PQ_dagger`` over all scored classes, a class that does not occur
        counting 0; ``PQ_things``, ``PQ_stuff`` and so on; ``PQ_present``, over the classes of truth or prediction; and
        ``PQ/class``, ``SQ/class``, ``RQ/class``, ``IoU/class``. All NaN where no point was valid.
        """
        tp, fp, fn, shares, hit, true, found = (c.numpy().astype(np.float64) for c in self.counts.T)
        ids = sorted(self.names)
        if not self.counts[:, 5].any():
            tp = np.full_like(tp, math.nan)
        with np.errstate(invalid="ignore"):
            sq = np.where(tp == 0, 0, shares / SHARE / np.where(tp == 0, 1, tp))
            half = tp + 0.5 * fp + 0.5 * fn
            rq = np.where(half == 0, 0, tp / np.where(half == 0, 1, half))
            union = true + found - hit
            iou = np.where(union == 0, 0, hit / np.where(union == 0, 1, union)) + 0 * tp
        of_class = {"PQ": sq * rq, "SQ": sq, "RQ": rq, "IoU": iou}
        of_class["PQ_dagger"] = np.array([of_class["PQ" if self._thing(c) else "IoU"][c] for c in range(len(iou))])
        groups = {
            "": ids,
            "_things": [c for c in ids if self._thing(c)],
            "_stuff": [c for c in ids if not self._thing(c)],
            "_present": [c for c in ids if union[c]],
        }
        out = {}
        for group, members in groups.items():
            for name, values in of_class.items():
                if name != "PQ_dagger" or not group:
                    out[f"{'mIoU' if name == 'IoU' else name}{group}"] = _mean(values[members])
        out |= {f"{name}/{self.names[c]}": float(of_class[name][c]) for c in ids for name in ("PQ", "SQ", "RQ", "IoU")}
        return {f"{self.prefix}{name}": value for name, value in out.items()}

    def of_occurring(self) -> dict[str, float]:
        """PQ by name of the classes that have a segment which counts."""
        found = self.result()
        there = [name for c, name in sorted(self.names.items()) if self.counts[c, :3].any()]
        return {name: found[f"{self.prefix}PQ/{name}"] for name in there}

    def _thing(self, c: int) -> bool:
        return self.names.get(c) in self.things

    def table(self) -> str:
        """For the terminal."""
        found, columns = self.result(), ("PQ", "SQ", "RQ", "IoU")
        means = ("PQ", "PQ_dagger", "SQ", "RQ", "mIoU", "PQ_things", "PQ_stuff")
        lines = [", ".join(f"{self.prefix}{name} {found[self.prefix + name]:.4f}" for name in means)]
        lines.append(f"  {'':<22} " + " ".join(f"{c:>7}" for c in columns))
        for name in self.names.values():
            lines.append(f"  {name:<22} " + " ".join(f"{found[f'{self.prefix}{c}/{name}']:7.4f}" for c in columns))
        return "\n".join(lines)


def nuscenes_panoptic() -> PanopticMetric:
    """Panoptic nuScenes: 16 classes by their ids 1..16, truth 0 is ignored, ten things, segments of 15 points."""
    names = dict(enumerate(OCC3D.classes[1:], 1))
    return PanopticMetric(names, NUSCENES_THINGS, ignored=(0,), min_points=15)


def semantickitti_panoptic(min_points: int = 50) -> PanopticMetric:
    """SemanticKITTI's panoptic task: 19 classes (ids of our taxonomy), segments of 50 points as its command line has it."""
    return PanopticMetric(dict(enumerate(SEMANTICKITTI.classes)), SEMANTICKITTI.things, min_points=min_points)


def voxel_panoptic(taxonomy: Taxonomy, min_voxels: int = 1) -> PanopticMetric:
    """The same procedure over voxels of dense labels, ``voxel-PQ``; no published score is comparable. Free voxels are no
    segment, but a predicted one that reaches into them is larger for it."""
    return PanopticMetric(dict(enumerate(taxonomy.classes)), taxonomy.things, min_points=min_voxels, prefix="voxel-")


def split_labels(panoptic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes uint8, instances uint16) of labels class * 1000 + instance."""
    labels = np.asarray(panoptic)
    return (labels // PER_CLASS).astype(np.uint8), (labels % PER_CLASS).astype(np.uint16)


def join_labels(classes: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """uint16 labels class * 1000 + instance. Raises ValueError for ids beyond 0..64 and 0..999."""
    classes, instances = np.asarray(classes).astype(np.int64), np.asarray(instances).astype(np.int64)
    for name, values, end in (("class", classes, 65), ("instance", instances, PER_CLASS)):
        if bad := values[(values < 0) | (values >= end)].tolist():
            raise ValueError(f"{name} {bad[0]} does not fit into a panoptic label (0..{end - 1})")
    return (classes * PER_CLASS + instances).astype(np.uint16)


def _segments(classes: np.ndarray, instances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(S,) class of each segment, (N,) segment of each point, (S,) points of each segment."""
    width = int(instances.max(initial=0)) + 1
    keys, place, sizes = np.unique(classes * width + instances, return_inverse=True, return_counts=True)
    return keys // width, place.reshape(-1), sizes


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
