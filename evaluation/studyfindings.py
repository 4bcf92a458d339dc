"""What a scaling study says: differences with intervals, laws, tables. Numbers and sentences; see ``studyreport`` for files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from occstream.evaluation.differences import difference
from occstream.evaluation.scaling import NotFitted, fit, predict_largest, worth_in_labels
from occstream.evaluation.studyscores import METRICS, Arm, StudyScores


def findings(study: StudyScores) -> list[str]:
    """What the study says, in sentences."""
    return [*_of_scenes(study), *_of_strategies(study), *_of_compute(study)]


def _of_scenes(study: StudyScores) -> Iterator[str]:
    """The most binary data against none."""
    for arm in study.arms:
        points = study.points(arm, "eval/miou")
        if len(points) > 1 and 0 in points:
            most = max(points)
            gain = difference(points[0], points[most])
            yield f"More binary data, {arm.label(study)}: {most} scenes against 0: {gain} (mIoU)"


def _of_strategies(study: StudyScores) -> Iterator[str]:
    """One strategy against another, at the largest size that both have."""
    for a, b in itertools.combinations(study.arms, 2):
        if a.family != b.family or a.finetune_scenes != b.finetune_scenes:
            continue
        pa, pb = study.points(a, "eval/miou"), study.points(b, "eval/miou")
        shared = sorted(pa.keys() & pb.keys() - {0})
        if shared:
            n = shared[-1]
            yield f"{b.label(study)} against {a.label(study)} at {n} scenes: {difference(pa[n], pb[n])} (mIoU)"
            iou = difference(study.points(a, "eval/iou")[n], study.points(b, "eval/iou")[n])
            yield f"{b.label(study)} against {a.label(study)} at {n} scenes: {iou} (IoU)"


def _of_compute(study: StudyScores) -> Iterator[str]:
    """Pre-training against controls of equal compute."""
    for (control, arm, n), seeds in study.controls.items():
        scores = [m["eval/miou"] for m in seeds.values()]
        points = study.points(arm, "eval/miou") if arm in study.cells else {}
        if control == "longer" and len(points) > 1:
            yield from _against_longer(study, arm, scores)
        elif control == "more-s" and n in points:
            yield (
                f"Equal compute: {arm.label(study)} with {n} scenes against S frames in place of the replayed ones: "
                f"{difference(scores, points[n])} (mIoU)"
            )


def _against_longer(study: StudyScores, arm: Arm, scores: Sequence[float]) -> Iterator[str]:
    for other in study.arms:
        theirs = study.points(other, "eval/miou")
        if (other.family, other.finetune_scenes) == (arm.family, arm.finetune_scenes) and max(theirs):
            most = max(theirs)
            yield (
                f"Equal compute: {other.label(study)} with {most} scenes against {arm.label(study)} with 0 that "
                f"trained as long: {difference(scores, theirs[most])} (mIoU)"
            )


def label_curve(study: StudyScores, family: str) -> dict[float, list[float]]:
    """mIoU by labeled scenes without pre-training, of the strategy that the study's label curve has."""
    curve = {}
    for (control, arm, _), seeds in study.controls.items():
        if control == "labels" and arm.family == family:
            curve[float(arm.finetune_scenes)] = [m["eval/miou"] for m in seeds.values()]
            strategy = arm.strategy
    if curve:
        for arm in study.arms:
            if (arm.family, arm.strategy) == (family, strategy) and 0 in study.cells[arm]:
                curve[float(arm.finetune_scenes)] = study.points(arm, "eval/miou")[0]
    return curve


def laws(study: StudyScores) -> list[str]:
    """Fits, predictions of the largest size and worth in labels, in sentences; refusals as well."""
    out = []
    for arm in study.arms:
        points = study.points(arm, "eval/miou")
        if len(points) < 2:
            continue
        for law in ("log", "power"):
            try:
                found = fit(points, law)
                out.append(f"{arm.label(study)}, {law} law: mIoU = {found.formula()}; sd of a run {found.sd:.2f}")
                out.append(f"{arm.label(study)}, {predict_largest(points, law).sentence()}")
            except NotFitted as error:
                out.append(f"{arm.label(study)}, {law} law: not fitted: {error}")
        curve = label_curve(study, arm.family)
        if curve and max(points):
            try:
                worth = worth_in_labels(curve, points[max(points)])
                out.append(
                    f"{arm.label(study)}: {arm.finetune_scenes} labeled scenes after pre-training on {max(points)} are "
                    f"{worth.sentence()} without pre-training"
                )
            except NotFitted as error:
                out.append(f"{arm.label(study)}: worth in labels is not known: {error}")
    return out


HEAD = ("", "pre-training scenes", "seeds", "mIoU", "IoU", "binary IoU", "gain in mIoU over 0 scenes")


def table(study: StudyScores) -> list[list[str]]:
    """Rows of the main table, below ``HEAD``; controls last."""
    rows = []
    for arm in study.arms:
        base = study.points(arm, "eval/miou").get(0)
        for n in sorted(study.cells[arm]):
            rows.append(_row(arm.label(study), n, study.cells[arm][n], base if n else None))
    names = {"longer": "trained longer", "more-s": "S frames for B frames", "labels": ""}
    for (control, arm, n), seeds in study.controls.items():
        labelled = f", {arm.finetune_scenes} labeled" if control == "labels" else ""
        rows.append(_row(f"{arm.label(study)} {names.get(control, control)}{labelled}".strip(), n, seeds, None))
    return rows


def _row(name: str, n: int, seeds: Mapping[str, Mapping[str, float]], base: Sequence[float] | None) -> list[str]:
    cells = [name, str(n), str(len(seeds))]
    for metric in METRICS:
        values = [v for m in seeds.values() if not math.isnan(v := m.get(metric, math.nan))]
        sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.2f}{sd}" if values else "-")
    gain = difference(base, [m["eval/miou"] for m in seeds.values()]) if base else None
    return [*cells, f"{gain.mean:+.2f}" if gain else ""]


def class_table(study: StudyScores) -> list[list[str]]:
    """IoU of each class at the largest number of pre-training scenes: a head, and a row for each class; [] without classes."""
    classes = sorted(
        {k for _, seeds in study.all_cells() for m in seeds.values() for k in m if k.startswith("eval/class/")}
    )
    if not classes:
        return []
    largest = {arm: max(study.cells[arm]) for arm in study.arms}
    rows = [["", *(f"{arm.label(study)}, {n}" for arm, n in largest.items())]]
    for key in classes:
        found = [study.points(arm, key).get(n, []) for arm, n in largest.items()]
        rows.append([key.removeprefix("eval/class/"), *(f"{np.mean(v):.2f}" if v else "-" for v in found)])
    return rows
