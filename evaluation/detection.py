"""Detection scores as nuScenes defines them: average precision by center distance, five errors of true positives, and the
nuScenes detection score (NDS).

Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020, section 3.1, with the settings of its
2019 detection challenge. Everything is local to a frame until scores are sorted, so ranks only gather one row a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from occstream.evaluation.gather import gather_names, gather_rows
from occstream.evaluation.metrics import sum_over_ranks
from occstream.sharding.schema import Boxes, Taxonomy

ERRORS = ("translation", "scale", "yaw", "velocity", "attribute")
MEAN_ERRORS = ("mATE", "mASE", "mAOE", "mAVE", "mAAE")
ATTRIBUTES = (
    "pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing", "cycle.with_rider", "cycle.without_rider",
    "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
MOVING = 0.2  # m/s; above it the default attribute is a moving one
NO_ATTRIBUTE = -1
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class DetectionRules:
    """What counts, and how.

    Attributes:
        classes: names; ids are their places.
        reach: meters for each class; boxes whose center is not nearer to the ego (in x, y) do not count.
        unscored: by class the errors (of ``ERRORS``) that it does not have.
        half_turn: classes that look the same from behind: their yaw has a period of pi.
        distances: meters, thresholds of a match in x, y.
        error_distance: the threshold at which errors are taken, one of ``distances``.
        min_recall, min_precision: below them the curve does not count.
        most: predicted boxes a frame may have.
    """

    classes: tuple[str, ...]
    reach: tuple[float, ...]
    unscored: Mapping[str, frozenset[str]] = field(default_factory=dict)
    half_turn: frozenset[str] = frozenset()
    distances: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    error_distance: float = 2.0
    min_recall: float = 0.1
    min_precision: float = 0.1
    most: int = 500

    def scored(self, name: str) -> tuple[bool, ...]:
        """Which of ``ERRORS`` a class has."""
        return tuple(error not in self.unscored.get(name, ()) for error in ERRORS)


NUSCENES = DetectionRules(
    classes=(
        "car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian", "motorcycle", "bicycle", "traffic_cone",
        "barrier",
    ),
    reach=(50, 50, 50, 50, 50, 40, 40, 40, 30, 30),
    unscored={
        "traffic_cone": frozenset({"yaw", "velocity", "attribute"}),
        "barrier": frozenset({"velocity", "attribute"}),
    },
    half_turn=frozenset({"barrier"}),
)  # fmt: skip


def without_attributes(rules: DetectionRules) -> DetectionRules:
    """For boxes whose attributes nobody knows, as those of shards and of synthetic scenes. With attributes scored all the
    same, that error is 1."""
    return replace(rules, unscored={n: rules.unscored.get(n, frozenset()) | {"attribute"} for n in rules.classes})


def rules_of(taxonomy: Taxonomy) -> DetectionRules:
    """nuScenes' own rules for its classes; for other taxonomies the same procedure over their things, without attributes,
    with nuScenes' range where a class has a namesake there and 50 m elsewhere."""
    if taxonomy.name == "occ3d":
        return NUSCENES
    names = tuple(name for name in taxonomy.classes if name in taxonomy.things)
    reach = dict(zip(NUSCENES.classes, NUSCENES.reach))
    return without_attributes(replace(NUSCENES, classes=names, reach=tuple(reach.get(n, 50.0) for n in names)))


@dataclass(frozen=True)
class BoxSet:
    """Boxes of one frame, true or predicted.

    Attributes:
        boxes: (N, 7) center x, y, z; length, width, height; yaw. Meters and radians, ego frame of the key-frame.
        classes: (N,) integer ids in ``DetectionRules.classes``.
        velocity: (N, 2) m/s, ego axes; NaN where the truth does not know. None: all NaN, or of predictions 0.
        attributes: (N,) integer places in ``ATTRIBUTES``, ``NO_ATTRIBUTE`` for none. None: none.
        scores: (N,) of predictions, the larger the surer.
        points: (N,) LiDAR and radar points in true boxes: boxes without any do not count. None: all count.
    """

    boxes: np.ndarray
    classes: np.ndarray
    velocity: np.ndarray | None = None
    attributes: np.ndarray | None = None
    scores: np.ndarray | None = None
    points: np.ndarray | None = None

    @classmethod
    def of(cls, boxes: Boxes, rules: DetectionRules, **more: np.ndarray) -> BoxSet:
        """Of a frame's boxes, those whose class is scored. ``more``: the other arrays, one row for each of ``boxes``."""
        places = {name: i for i, name in enumerate(rules.classes)}
        ids = np.array([places.get(name, -1) for name in boxes.names], np.int64)
        rows = {"boxes": boxes.boxes, "classes": ids, "velocity": boxes.velocity, **more}
        return replace(cls(boxes.boxes, ids), **rows).where(ids >= 0)

    def scored(self) -> np.ndarray:
        """``scores`` of boxes that must have them. Raises ValueError."""
        if self.scores is None:
            raise ValueError("predicted boxes have no scores")
        return self.scores

    def where(self, keep: np.ndarray) -> BoxSet:
        """Those of a mask or of indices."""
        return replace(self, **{name: np.asarray(a)[keep] for name, a in vars(self).items() if a is not None})


def default_attributes(classes: np.ndarray, velocity: np.ndarray, rules: DetectionRules = NUSCENES) -> np.ndarray:
    """(N,) the attribute that a box most probably has, by class and speed, for models that predict none.

    Args:
        classes: (N,) ids. velocity: (N, 2) m/s.
    """
    still = {"pedestrian": 2, "motorcycle": 4, "bicycle": 4} | dict.fromkeys(NUSCENES.classes[:5], 6)
    moves = {"pedestrian": 0, "motorcycle": 3, "bicycle": 3} | dict.fromkeys(NUSCENES.classes[:5], 5)
    table = np.array([[t.get(name, NO_ATTRIBUTE) for t in (still, moves)] for name in rules.classes])
    fast = np.hypot(velocity[:, 0], velocity[:, 1]) > MOVING
    return table[np.asarray(classes, np.int64), fast.astype(np.int64)]


def in_reach(found: BoxSet, rules: DetectionRules, racks: np.ndarray | None = None) -> BoxSet:
    """Boxes that count: within their class's range, not without points, and no cycles in racks.

    Args:
        racks: (R, 7) bicycle racks, as ``BoxSet.boxes``; bicycles and motorcycles whose center is in one do not count.
    """
    boxes = np.asarray(found.boxes, np.float64).reshape(-1, 7)
    keep = np.sqrt(boxes[:, 0] ** 2 + boxes[:, 1] ** 2) < np.asarray(rules.reach, np.float64)[found.classes]
    if found.points is not None:
        keep &= np.asarray(found.points) > 0
    if racks is not None and len(racks):
        cycles = [i for i, name in enumerate(rules.classes) if name in ("bicycle", "motorcycle")]
        keep &= ~(np.isin(found.classes, cycles) & _inside(boxes[:, :3], racks))
    return found.where(keep)


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) bool: points (N, 3) in any of the boxes (B, 7), faces included."""
    offset = points[:, None] - boxes[None, :, :3]
    c, s = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    x, y = offset[..., 0] * c + offset[..., 1] * s, offset[..., 1] * c - offset[..., 0] * s
    half = boxes[:, 3:6] / 2
    inside = (abs(x) <= half[:, 0]) & (abs(y) <= half[:, 1]) & (abs(offset[..., 2]) <= half[:, 2])
    return np.asarray(inside.any(1))


class DetectionMetric:
    """mAP, NDS and its errors over frames.

    Args:
        rules: classes, ranges and thresholds.
    """

    def __init__(self, rules: DetectionRules = NUSCENES) -> None:
        self.rules = rules
        self.keys: list[str] = []
        self.truths = torch.zeros(len(rules.classes), dtype=torch.int64)
        # Rows: frame, place in it, class, score, matched at each distance (0 or 1), the five errors (NaN: none).
        self._rows: list[np.ndarray] = [np.zeros((0, 4 + len(rules.distances) + len(ERRORS)))]

    def update(self, key: str, predicted: BoxSet, truth: BoxSet, racks: np.ndarray | None = None) -> None:
        """Adds a frame; each frame once, over all ranks.

        Args:
            key: of the frame. Equal scores are ordered by it.
            predicted: with scores; at most ``rules.most``.
            truth: what it is compared with, all boxes of the frame.
            racks: see ``in_reach``.

        Raises:
            ValueError: too many boxes, or a value that no box can have.
        """
        check_boxes(key, predicted, self.rules, predicted=True)
        check_boxes(key, truth, self.rules, predicted=False)
        predicted, truth = (in_reach(found, self.rules, racks) for found in (predicted, truth))
        self.truths += torch.from_numpy(np.bincount(truth.classes, minlength=len(self.truths)))
        n, k = len(predicted.boxes), len(self.rules.distances)
        rows = np.full((n, 4 + k + len(ERRORS)), np.nan)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = (
            len(self.keys),
            np.arange(n),
            predicted.classes,
            predicted.scores,
        )
        rows[:, 4 : 4 + k] = 0
        for c in np.unique(predicted.classes):
            mine = np.flatnonzero(predicted.classes == c)
            mine = mine[_by_score(predicted.scored()[mine], mine)]
            theirs = np.flatnonzero(truth.classes == c)
            offset = predicted.boxes[mine, None, :2].astype(np.float64) - truth.boxes[None, theirs, :2]
            pairs = _match(np.sqrt((offset**2).sum(-1)), self.rules.distances)
            rows[mine, 4 : 4 + k] = pairs >= 0
            match = pairs[:, self.rules.distances.index(self.rules.error_distance)]
            hit = match >= 0
            period = math.pi if self.rules.classes[c] in self.rules.half_turn else 2 * math.pi
            rows[mine[hit], 4 + k :] = _errors(predicted.where(mine[hit]), truth.where(theirs[match[hit]]), period)
        self.keys.append(key)
        self._rows.append(rows)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Brings the frames of all ranks together (collective, once)."""
        keys, first, rows = gather_names(self.keys, device), 0, []
        for names, part in zip(keys, gather_rows(np.concatenate(self._rows), device)):
            rows.append(part.copy())
            rows[-1][:, 0] += first
            first += len(names)
        self.keys, self._rows = [key for names in keys for key in names], rows
        self.truths = sum_over_ranks(self.truths, device)

    def result(self) -> dict[str, float]:
        """Scores as fractions, errors in m, 1 - IoU, rad, m/s and 1 - accuracy.

        ``mAP``, ``NDS`` and the mean errors are the official ones: a class without truth has an AP of 0 and errors of 1.
        ``mAP_present`` and ``NDS_present`` are over the classes that the truth has, ``recall`` is the share of all true boxes
        that a prediction of any score matched at ``error_distance``, ``score_at_precision_80`` the score above which 80 % of
        the predictions matched there. ``AP/class``, ``AP/class/distance`` and
        ``mATE/class`` are of one class. Without frames everything is NaN; errors that no class has are NaN, and NDS is
        then a mean without them.

        Raises:
            ValueError: a frame came twice.
        """
        places = _unique_places(self.keys)
        rows, rules = np.concatenate(self._rows), self.rules
        if self.keys:
            order = np.lexsort((rows[:, 1], places[rows[:, 0].astype(np.int64)]))
            rows = rows[order]
        ap = np.zeros((len(rules.classes), len(rules.distances)))
        errors = np.ones((len(rules.classes), len(ERRORS)))
        for c, name in enumerate(rules.classes):
            mine = rows[rows[:, 2] == c]
            ap[c], errors[c] = _class_scores(mine, int(self.truths[c]), rules)
            errors[c][~np.array(rules.scored(name))] = np.nan
        if not self.keys:
            ap[:], errors[:] = np.nan, np.nan
        present = self.truths.numpy() > 0
        out = _summary(ap, errors)
        of_present = _summary(ap[present], errors[present])
        out |= {f"{name}_present": of_present[name] for name in ("mAP", "NDS")}
        right, total = rows[:, 4 + rules.distances.index(rules.error_distance)] > 0, int(self.truths.sum())
        out["recall"] = float(right.sum() / total) if total else math.nan
        out["score_at_precision_80"] = score_at_precision(rows[:, 3], right) if self.keys else math.nan
        for c, name in enumerate(rules.classes):
            out[f"AP/{name}"] = float(ap[c].mean())
            out |= {f"AP/{name}/{d:g}": float(v) for d, v in zip(rules.distances, ap[c])}
            out |= {f"{short}/{name}": float(v) for short, v in zip(MEAN_ERRORS, errors[c])}
        return out

    def table(self) -> str:
        """For the terminal: a line of means, and one for each class."""
        found = self.result()
        means = ", ".join(f"{name} {found[name]:.4f}" for name in ("NDS", "mAP", *MEAN_ERRORS))
        lines = [
            f"{len(self.keys)} frames: {means}",
            f"  {'':<22} {'AP':>7} " + " ".join(f"{m:>7}" for m in MEAN_ERRORS),
        ]
        for name in self.rules.classes:
            values = [found[f"AP/{name}"], *(found[f"{m}/{name}"] for m in MEAN_ERRORS)]
            lines.append(f"  {name:<22} " + " ".join(f"{v:7.4f}" for v in values))
        return "\n".join(lines)


def score_at_precision(scores: np.ndarray, right: np.ndarray, precision: float = 0.8) -> float:
    """The threshold of scores above which this share of boxes is right, as low as it may be; 1 where there is none.

    Args:
        scores: (n,) of boxes of all frames. right: (n,) bool.
    """
    order = np.argsort(-scores, kind="stable")
    scores, share = scores[order], right[order].cumsum() / np.arange(1, len(scores) + 1)
    # Equal scores are above a threshold together.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)
    good = ends[share[ends] >= precision]
    if not len(good):
        return 1.0
    last = int(good[-1])
    below = scores[last + 1] if last + 1 < len(scores) else 0.0
    return float((scores[last] + below) / 2)


def check_boxes(key: str, found: BoxSet, rules: DetectionRules, *, predicted: bool) -> None:
    """Raises ValueError where a frame's boxes cannot be scored, with the frame and the first of them."""
    kind = "predicted" if predicted else "true"
    n = len(found.boxes)
    if predicted and n > rules.most:
        raise ValueError(f"frame {key}: {n} predicted boxes, at most {rules.most} may be submitted; keep the surest")
    if predicted and found.scores is None:
        raise ValueError(f"frame {key}: predicted boxes have no scores")
    for name, rows in vars(found).items():
        if rows is not None and len(rows) != n:
            raise ValueError(f"frame {key}: {len(rows)} {name} for {n} {kind} boxes")
    wrong = {"a box that is not finite": ~np.isfinite(found.boxes).all(-1) if n else np.zeros(0, bool)}
    wrong["a size that is not positive"] = ~(found.boxes[:, 3:6] > 0).all(-1) if n else np.zeros(0, bool)
    wrong[f"a class outside 0..{len(rules.classes) - 1}"] = ~np.isin(found.classes, np.arange(len(rules.classes)))
    if predicted:
        wrong["a score that is not finite"] = ~np.isfinite(found.scored())
        if found.velocity is not None:
            wrong["a velocity that is not finite"] = ~np.isfinite(found.velocity).all(-1)
    if found.attributes is not None:
        wrong["an unknown attribute"] = ~np.isin(found.attributes, np.arange(NO_ATTRIBUTE, len(ATTRIBUTES)))
    for what, bad in wrong.items():
        if bad.any():
            raise ValueError(f"frame {key}: {kind} box {np.flatnonzero(bad)[0]} has {what}")


def _by_score(scores: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Order of falling scores; of equal ones the later comes first."""
    return np.lexsort((places, scores))[::-1]


def _match(distance: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Each prediction takes the nearest true box that is still there, if it is nearer than the limit.

    Args:
        distance: (P, G) meters, rows in order of falling scores.

    Returns:
        (P, limits) place of the true box, -1: none.
    """
    found = np.full((len(distance), len(limits)), -1)
    if not distance.size:
        return found
    nearest = distance.min(1)
    for k, limit in enumerate(limits):
        left = distance.copy()
        for p in np.flatnonzero(nearest < limit):
            j = int(left[p].argmin())
            if left[p, j] < limit:
                found[p, k] = j
                left[:, j] = np.inf
    return found


def _errors(found: BoxSet, truth: BoxSet, period: float) -> np.ndarray:
    """(N, 5) of matched pairs, in the order of ``ERRORS``; NaN where the truth does not know."""
    a, b = (np.asarray(s.boxes, np.float64) for s in (found, truth))
    out = np.full((len(a), len(ERRORS)), np.nan)
    out[:, 0] = np.sqrt(((a[:, :2] - b[:, :2]) ** 2).sum(-1))
    # As if both had one center and one heading.
    both = np.minimum(a[:, 3:6], b[:, 3:6]).prod(-1)
    out[:, 1] = 1 - both / (a[:, 3:6].prod(-1) + b[:, 3:6].prod(-1) - both)
    turn = b[:, 6] - a[:, 6]
    out[:, 2] = abs((turn + period / 2) % period - period / 2)
    if truth.velocity is not None:
        mine = 0 if found.velocity is None else np.asarray(found.velocity, np.float64)
        out[:, 3] = np.sqrt(((mine - np.asarray(truth.velocity, np.float64)) ** 2).sum(-1))
    if truth.attributes is not None:
        mine = NO_ATTRIBUTE if found.attributes is None else found.attributes
        out[:, 4] = np.where(truth.attributes == NO_ATTRIBUTE, np.nan, mine != truth.attributes)
    return out


def _unique_places(keys: Sequence[str]) -> np.ndarray:
    """Place of each key among the sorted ones, the same for every distribution over ranks."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for a, b in pairwise(order):
        if keys[a] == keys[b]:
            raise ValueError(f"frame {keys[a]} was evaluated twice; there is no score")
    places = np.zeros(len(keys), np.int64)
    places[order] = np.arange(len(keys))
    return places


def _class_scores(rows: np.ndarray, truths: int, rules: DetectionRules) -> tuple[np.ndarray, np.ndarray]:
    """(distances,) average precisions and (5,) errors of a class.

    Args:
        rows: of its predictions in all frames, in order of frames and places.
        truths: how many true boxes there are.
    """
    k = len(rules.distances)
    ap, errors = np.zeros(k), np.ones(len(ERRORS))
    if not truths or not len(rows):
        return ap, errors
    rows = rows[_by_score(rows[:, 3], np.arange(len(rows)))]
    first = round(100 * rules.min_recall) + 1
    for i, distance in enumerate(rules.distances):
        matched = rows[:, 4 + i] > 0
        if not matched.any():
            continue
        hits = matched.cumsum()
        recall, precision = hits / truths, hits / np.arange(1, len(rows) + 1)
        curve = np.interp(_RECALLS, recall, precision, right=0)
        ap[i] = np.maximum(curve[first:] - rules.min_precision, 0).mean() / (1 - rules.min_precision)
        if distance == rules.error_distance:
            scores = np.interp(_RECALLS, recall, rows[:, 3], right=0)
            errors = _mean_errors(rows[matched], scores, first)
    return ap, errors


def _mean_errors(matched: np.ndarray, scores: np.ndarray, first: int) -> np.ndarray:
    """(5,) each error's running mean over matches of falling scores, read off at the score of each recall, and averaged
    from ``first`` to the highest recall reached; 1 where that is not reached."""
    reached = np.flatnonzero(scores)
    last = int(reached[-1]) if len(reached) else 0
    out = np.ones(len(ERRORS))
    if last < first:
        return out
    for e in range(len(ERRORS)):
        values = matched[:, e - len(ERRORS)]
        known = ~np.isnan(values)
        if known.any():
            running = np.where(known, values, 0).cumsum() / np.maximum(known.cumsum(), 1)
            out[e] = np.interp(scores[::-1], matched[::-1, 3], running[::-1])[::-1][first : last + 1].mean()
    return out


def _summary(ap: np.ndarray, errors: np.ndarray) -> dict[str, float]:
    """Means over classes, and NDS: five parts mAP, one part each error that any class has."""
    if not len(ap):
        return dict.fromkeys(("NDS", "mAP", *MEAN_ERRORS), math.nan)
    known = ~np.isnan(errors)
    means = np.where(known.any(0), np.where(known, errors, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    scores = np.maximum(1 - means[known.any(0)], 0)
    nds = (5 * ap.mean() + scores.sum()) / (5 + len(scores))
    return {"NDS": float(nds), "mAP": float(ap.mean())} | {name: float(v) for name, v in zip(MEAN_ERRORS, means)}
