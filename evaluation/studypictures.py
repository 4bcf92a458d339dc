"""Pictures of a scaling study."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from occstream.evaluation.scaling import NotFitted, Scenes, fit, mean_interval
from occstream.evaluation.studyfindings import label_curve
from occstream.evaluation.studyscores import METRICS, StudyScores

COLORS = ("#3b6fb6", "#c4622d", "#4f9a4f", "#8a55a8", "#a8812b", "#3a9a9a")
MARKS = "osD^vP"


def _style(axes: Axes, study: StudyScores, ylabel: str) -> None:
    sizes = sorted({n for cells in study.cells.values() for n in cells})
    positive = [n for n in sizes if n]
    if positive:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
        axes.set_xticks(sizes, [f"{n:g}" for n in sizes])
        axes.minorticks_off()
    axes.set_xlabel("pre-training scenes")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(
    axes: Axes, points: Mapping[Scenes, Sequence[float]], number: int, label: str, *, shift: float = 0.0, **style: Any
) -> None:
    """Mean, its 95 % interval and the seeds; lines are moved apart a little so that bars do not hide each other."""
    color, mark = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
    sizes = np.array(list(points), float)
    places = sizes * (1 + shift) + shift * sizes[sizes > 0].min() * (sizes == 0)
    means = [np.mean(v) for v in points.values()]
    axes.plot(places, means, color=color, label=label, lw=1.8, **style)
    for place, values in zip(places, points.values()):
        axes.plot([place] * len(values), values, mark, color=color, ms=4.5, alpha=0.6, mec="none")
        low, high = mean_interval(values)
        if not math.isnan(low):
            axes.plot([place, place], [low, high], color=color, lw=1.0, alpha=0.5)


def _limits(axes: Axes, values: Iterable[float]) -> None:
    """Shows all seeds; the interval of three may be many times as wide and is cut."""
    values = [v for v in values if not math.isnan(v)]
    if values:
        margin = 0.12 * (max(values) - min(values)) or 1.0
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _shift(number: int, count: int) -> float:
    return 0.05 * (number - (count - 1) / 2)


def _seeds(study: StudyScores) -> str:
    counts = {len(c) for cells in study.cells.values() for c in cells.values()}
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def draw_scenes(study: StudyScores) -> Figure:
    """mIoU and IoU against pre-training scenes, by strategy (the paper's Figs. 5 and 6)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("eval/miou", "eval/iou")):
        for number, arm in enumerate(study.arms):
            points = study.points(arm, metric)
            if points:
                _line(axes, points, number, arm.label(study), shift=_shift(number, len(study.arms)))
        for (control, _, n), seeds in study.controls.items():
            if control in ("longer", "more-s"):
                values = [m[metric] for m in seeds.values()]
                name = "0 scenes, trained as long" if control == "longer" else "S frames for B frames"
                mark = "*" if control == "longer" else "X"
                axes.plot([n] * len(values), values, mark, color="#222222", ms=5, alpha=0.4, mec="none")
                axes.plot([n], [np.mean(values)], mark, color="#222222", ms=11, label=name, zorder=5, mec="none")
        _style(axes, study, f"{METRICS[metric]} (%)")
        _limits(
            axes,
            [m.get(metric, math.nan) for p, seeds in study.all_cells() if p[2] != "labels" for m in seeds.values()],
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        f"{study.name}: dots are seeds, lines their mean, bars its 95 % interval (n = {_seeds(study)})", size=10
    )
    return figure


def draw_binary(study: StudyScores) -> Figure | None:
    """Binary IoU before and after fine-tuning (the paper's Fig. 10)."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for number, arm in enumerate(study.arms):
        after = study.points(arm, "eval/binary_iou")
        if after:
            _line(axes, after, number, f"{arm.label(study)}, after", shift=_shift(number, len(study.arms)))
            drawn = True
        before = dict(sorted(study.before.get(arm, {}).items()))
        if before:
            shift = _shift(number, len(study.arms))
            _line(axes, before, number, f"{arm.label(study)}, before", shift=shift, ls="--", marker="")
    if not drawn:
        return None
    _style(axes, study, "binary IoU (%)")
    seen = [m.get("eval/binary_iou", math.nan) for _, seeds in study.all_cells() for m in seeds.values()]
    _limits(axes, [*seen, *(v for cells in study.before.values() for values in cells.values() for v in values)])
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(f"binary IoU before and after fine-tuning (n = {_seeds(study)} seeds)", size=10)
    return figure


def draw_labels(study: StudyScores) -> Figure | None:
    """mIoU against labeled scenes without pre-training, and where pre-training comes to lie."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    shown: list[float] = []
    families = [f for f in dict.fromkeys(a.family for a in study.arms) if label_curve(study, f)]
    if not families:
        return None
    for number, family in enumerate(families):
        curve = dict(sorted(label_curve(study, family).items()))
        _line(axes, curve, number, f"{family}, no pre-training")
        shown += [v for values in curve.values() for v in values]
    for number, arm in enumerate(study.arms):
        points = study.points(arm, "eval/miou")
        most = max(points)
        if most:
            color = COLORS[(number + len(families)) % len(COLORS)]
            name = f"{arm.label(study)}, {most} pre-training scenes"
            axes.axhline(float(np.mean(points[most])), color=color, lw=1.2, ls="--", label=name)
            axes.plot([arm.finetune_scenes], [np.mean(points[most])], "o", color=color)
            shown.append(float(np.mean(points[most])))
    _limits(axes, shown)
    axes.set_xscale("log")
    ticks = sorted({n for f in families for n in label_curve(study, f)})
    axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labeled scenes")
    axes.set_ylabel("mIoU (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("what pre-training is worth in labeled scenes", size=10)
    return figure


def draw_fits(study: StudyScores) -> Figure | None:
    """Fitted laws with their intervals, and the prediction of the largest size from the smaller ones."""
    found = []
    for number, arm in enumerate(study.arms):
        points = study.points(arm, "eval/miou")
        for law in ("power", "log"):
            try:
                found.append((number, arm, fit(points, law)))
                break
            except NotFitted:
                continue
    if not found:
        return None
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, arm, law in found:
        color, points = COLORS[number % len(COLORS)], study.points(arm, "eval/miou")
        first = min(n for n in points if n)
        grid = np.concatenate([np.linspace(0, first, 25), np.geomspace(first, 2 * max(points), 40)])
        axes.plot(grid, law(grid), color=color, lw=1.6, label=f"{arm.label(study)}: {law.law} law")
        bands = np.array([law.interval(n) for n in grid])
        axes.fill_between(grid, bands[:, 0], bands[:, 1], color=color, alpha=0.12, lw=0)
        for n, values in points.items():
            axes.plot([n] * len(values), values, MARKS[number % len(MARKS)], color=color, ms=4, alpha=0.6, mec="none")
    _style(axes, study, "mIoU (%)")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title(f"fitted laws with 95 % intervals, to twice the largest size (n = {_seeds(study)} seeds)", size=10)
    return figure


PICTURES: dict[str, Callable[[StudyScores], Figure | None]] = {
    "scenes": draw_scenes,
    "binary": draw_binary,
    "labels": draw_labels,
    "fits": draw_fits,
}
