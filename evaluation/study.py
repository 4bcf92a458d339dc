"""The report of a scaling study: reads MLflow only, so that runs of other tools can join by tags.

A run joins with the tags ``strategy``, ``family``, ``pretrain_scenes``, ``finetune_scenes``, ``seed``, and ``control`` for
equal-compute controls; ``|`` between values where one run serves several cells. Pre-training runs have ``stage=pretrain``
and are found by the tag ``pretrain_run`` of the runs that start from them.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from occstream.evaluation.charts import arrange_charts
from occstream.evaluation.scaling import LEVEL, NotFitted, fit, mean_interval, predict_largest, worth_in_labels
from occstream.sharding import datacard

METRICS = {"eval/miou": "mIoU", "eval/iou": "IoU", "eval/binary_iou": "binary IoU"}
COLORS = ("#3b6fb6", "#c4622d", "#4f9a4f", "#8a55a8", "#a8812b", "#3a9a9a")
MARKS = "osD^vP"


@dataclass(frozen=True)
class Arm:
    """One line of a plot."""

    family: str
    strategy: str
    finetune_scenes: int

    def label(self, study: Study) -> str:
        """As short as the study allows."""
        parts = [self.family] if len({a.family for a in study.arms}) > 1 else []
        parts.append(self.strategy)
        several = len({a.finetune_scenes for a in study.arms}) > 1
        return " ".join([*parts, *([f"{self.finetune_scenes} labeled"] if several else [])])


@dataclass
class Study:
    """Cells of a study with what each seed scored.

    Attributes:
        name: experiment.
        cells: arm -> pre-training scenes -> seed -> metrics, without controls.
        controls: (control, arm, pre-training scenes) -> seed -> metrics.
        before: arm -> pre-training scenes -> binary IoU of the pre-training runs that it starts from.
        card: metrics of the data card.
        unfinished: runs that count for nothing, with their status.
        begun: their cells: arm, pre-training scenes, seed.
    """

    name: str
    cells: dict[Arm, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)
    controls: dict[tuple[str, Arm, int], dict[str, dict[str, float]]] = field(default_factory=dict)
    before: dict[Arm, dict[int, list[float]]] = field(default_factory=dict)
    card: dict[str, float] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)
    begun: set[tuple[Arm, int, str]] = field(default_factory=set)

    @property
    def arms(self) -> list[Arm]:
        return list(self.cells)

    def points(self, arm: Arm, metric: str) -> dict[int, list[float]]:
        """Scores by pre-training scenes, smallest first."""
        found = {
            n: [m[metric] for m in seeds.values() if not math.isnan(m.get(metric, math.nan))]
            for n, seeds in sorted(self.cells[arm].items())
        }
        return {n: v for n, v in found.items() if v}

    def missing(self) -> list[str]:
        """Cells that the axes call for and no finished run fills, by name."""
        sizes = sorted({n for cells in self.cells.values() for n in cells})
        seeds = sorted({s for cells in self.cells.values() for c in cells.values() for s in c})
        wanted = dict.fromkeys(itertools.product(self.cells, sizes, seeds))
        wanted |= dict.fromkeys(sorted(self.begun, key=str))
        return [
            f"{arm.family} {arm.strategy} pretrain_scenes={n} finetune_scenes={arm.finetune_scenes} seed={seed}"
            for arm, n, seed in wanted
            if seed not in self.cells.get(arm, {}).get(n, {})
        ]


def read_study(client, experiment: str) -> Study | None:
    """A study from MLflow; None if the experiment's runs have no axes of a study. Raises ValueError without experiment."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments() if e.name != "Default") or "none"
        raise ValueError(f"MLflow has no experiment {experiment!r}; it has: {names}")
    runs, token = [], None
    while True:
        page = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    study = Study(experiment)
    binary = {
        r.info.run_name: r.data.metrics.get("eval/binary_iou")
        for r in runs
        if r.data.tags.get("stage") == "pretrain" and r.info.status == "FINISHED"
    }
    for run in runs:
        tags = run.data.tags
        if tags.get("kind") == "data-card":
            study.card = dict(run.data.metrics)
        if not {"strategy", "pretrain_scenes", "finetune_scenes", "seed"} <= tags.keys():
            continue
        if run.info.status != "FINISHED":
            study.unfinished[run.info.run_name] = run.info.status
            if not tags.get("control"):
                study.begun |= {(arm, n, tags["seed"]) for arm, n in _places(tags)}
            continue
        _add(study, tags, dict(run.data.metrics), binary.get(tags.get("pretrain_run")))
    return study if study.cells else None


def _places(tags: Mapping[str, str]) -> list[tuple[Arm, int]]:
    """Arms and pre-training scenes that a run stands for."""
    split = lambda key: tags.get(key, "").split("|")  # noqa: E731
    axes = (split("family"), split("strategy"), split("pretrain_scenes"), split("finetune_scenes"))
    return [(Arm(family or "-", s, int(labelled)), int(n)) for family, s, n, labelled in itertools.product(*axes)]


def _add(study: Study, tags: Mapping[str, str], metrics: dict[str, float], before: float | None) -> None:
    control = tags.get("control", "")
    for arm, n in _places(tags):
        if control:
            study.controls.setdefault((control, arm, n), {})[tags["seed"]] = metrics
            continue
        study.cells.setdefault(arm, {}).setdefault(n, {})[tags["seed"]] = metrics
        if before is not None:
            study.before.setdefault(arm, {}).setdefault(n, []).append(before)


@dataclass(frozen=True)
class Difference:
    """Mean of b minus mean of a, with Welch's 95 % interval (NaN below two seeds)."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "one seed: nothing is known about the spread"
        return "beyond the spread of seeds" if self.low > 0 or self.high < 0 else "NOT beyond the spread of seeds"

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" (95 % {self.low:+.2f} to {self.high:+.2f})"
        return f"{self.mean:+.2f}{interval}: {self.verdict}"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How much better b is than a."""
    mean = float(np.mean(b) - np.mean(a))
    if len(a) < 2 or len(b) < 2:
        return Difference(mean, math.nan, math.nan)
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if va + vb == 0:
        return Difference(mean, mean, mean)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(va + vb)
    return Difference(mean, mean - half, mean + half)


def findings(study: Study) -> list[str]:
    """What the study says, in sentences."""
    metric, name = "eval/miou", "mIoU"
    out = []
    for arm in study.arms:
        points = study.points(arm, metric)
        if len(points) > 1 and 0 in points:
            most = max(points)
            out.append(
                f"More binary data, {arm.label(study)}: {most} scenes against 0: {difference(points[0], points[most])} ({name})"
            )
    for a, b in itertools.combinations(study.arms, 2):
        if a.family != b.family or a.finetune_scenes != b.finetune_scenes:
            continue
        pa, pb = study.points(a, metric), study.points(b, metric)
        shared = sorted(pa.keys() & pb.keys() - {0})
        if shared:
            n = shared[-1]
            out.append(f"{b.label(study)} against {a.label(study)} at {n} scenes: {difference(pa[n], pb[n])} ({name})")
            iou = difference(study.points(a, "eval/iou")[n], study.points(b, "eval/iou")[n])
            out.append(f"{b.label(study)} against {a.label(study)} at {n} scenes: {iou} (IoU)")
    for (control, arm, n), seeds in study.controls.items():
        scores = [m[metric] for m in seeds.values()]
        points = study.points(arm, metric) if arm in study.cells else {}
        if control == "longer" and len(points) > 1:
            for other in study.arms:
                theirs = study.points(other, metric)
                if (other.family, other.finetune_scenes) == (arm.family, arm.finetune_scenes) and max(theirs):
                    most = max(theirs)
                    out.append(
                        f"Equal compute: {other.label(study)} with {most} scenes against {arm.label(study)} with 0 that "
                        f"trained as long: {difference(scores, theirs[most])} ({name})"
                    )
        elif control == "more-s" and n in points:
            out.append(
                f"Equal compute: {arm.label(study)} with {n} scenes against S frames in place of the replayed ones: "
                f"{difference(scores, points[n])} ({name})"
            )
    return out


def label_curve(study: Study, family: str) -> dict[float, list[float]]:
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


def laws(study: Study) -> list[str]:
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


def table(study: Study) -> list[list[str]]:
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


def study_report(client, experiment: str, out: Path | None, partial: bool = False) -> str | None:
    """Text of a study's report; with ``out`` also the files.

    Args:
        client: MLflow client.
        experiment: its name.
        out: folder for ``report.html`` (self-contained), ``scenes.png`` and the other pictures, ``study.csv``,
            ``study.md``. They are logged to MLflow as well, in a run named ``report``.
        partial: report although cells are missing, and name them.

    Returns:
        None if the experiment is not a study.

    Raises:
        ValueError: cells are missing, by name; or there is no such experiment.
    """
    study = read_study(client, experiment)
    if study is None:
        return None
    missing = study.missing()
    if missing and not partial:
        stopped = "; ".join(f"{n} is {s}" for n, s in list(study.unfinished.items())[:5])
        raise ValueError(
            f"{len(missing)} cells of study {experiment!r} have no finished run: {'; '.join(missing[:5])}"
            f"{'; …' if missing[5:] else ''}{f' ({stopped})' if stopped else ''}. Run the sweep again, or compare with "
            "--partial"
        )
    said, fitted = findings(study), laws(study)
    rows = table(study)
    lines = [_align([list(HEAD), *rows]), "mean ± sample standard deviation over seeds", "", *said, "", *fitted]
    if missing:
        lines += ["", f"MISSING {len(missing)} cells: {'; '.join(missing)}"]
    if out:
        pictures = {name: draw(study) for name, draw in PICTURES.items()}
        pictures = {name: figure for name, figure in pictures.items() if figure is not None}
        _write(study, out, rows, said, fitted, missing, pictures)
        _log(client, experiment, out)
        lines += ["", f"report: {out / 'report.html'}"]
    return "\n".join(lines)


def _log(client, experiment: str, out: Path) -> None:
    found = client.get_experiment_by_name(experiment)
    arrange_charts(client, found.experiment_id)
    run = client.create_run(found.experiment_id, run_name="report", tags={"kind": "report"})
    for path in sorted(out.iterdir()):
        if path.suffix in (".html", ".png", ".csv", ".md"):
            client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, "FINISHED")


def _style(axes, study: Study, ylabel: str) -> None:
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


def _line(axes, points: Mapping[float, Sequence[float]], number: int, label: str, shift: float = 0.0, **style) -> None:
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


def _limits(axes, values: Iterable[float]) -> None:
    """Shows all seeds; the interval of three may be many times as wide and is cut."""
    values = [v for v in values if not math.isnan(v)]
    if values:
        margin = 0.12 * (max(values) - min(values)) or 1.0
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _shift(number: int, count: int) -> float:
    return 0.05 * (number - (count - 1) / 2)


def _seeds(study: Study) -> str:
    counts = {len(c) for cells in study.cells.values() for c in cells.values()}
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def draw_scenes(study: Study) -> Figure:
    """mIoU and IoU against pre-training scenes, by strategy (the paper's Figs. 5 and 6)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("eval/miou", "eval/iou")):
        for number, arm in enumerate(study.arms):
            points = study.points(arm, metric)
            if points:
                _line(axes, points, number, arm.label(study), _shift(number, len(study.arms)))
        for (control, _, n), seeds in study.controls.items():
            if control in ("longer", "more-s"):
                values = [m[metric] for m in seeds.values()]
                name = "0 scenes, trained as long" if control == "longer" else "S frames for B frames"
                mark = "*" if control == "longer" else "X"
                axes.plot([n] * len(values), values, mark, color="#222222", ms=5, alpha=0.4, mec="none")
                axes.plot([n], [np.mean(values)], mark, color="#222222", ms=11, label=name, zorder=5, mec="none")
        _style(axes, study, f"{METRICS[metric]} (%)")
        _limits(axes, [m.get(metric, math.nan) for p, seeds in _all(study) if p[2] != "labels" for m in seeds.values()])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        f"{study.name}: dots are seeds, lines their mean, bars its 95 % interval (n = {_seeds(study)})", size=10
    )
    return figure


def draw_binary(study: Study) -> Figure | None:
    """Binary IoU before and after fine-tuning (the paper's Fig. 10)."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for number, arm in enumerate(study.arms):
        after = study.points(arm, "eval/binary_iou")
        if after:
            _line(axes, after, number, f"{arm.label(study)}, after", _shift(number, len(study.arms)))
            drawn = True
        before = dict(sorted(study.before.get(arm, {}).items()))
        if before:
            shift = _shift(number, len(study.arms))
            _line(axes, before, number, f"{arm.label(study)}, before", shift, ls="--", marker="")
    if not drawn:
        return None
    _style(axes, study, "binary IoU (%)")
    seen = [m.get("eval/binary_iou", math.nan) for _, seeds in _all(study) for m in seeds.values()]
    _limits(axes, [*seen, *(v for cells in study.before.values() for values in cells.values() for v in values)])
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(f"binary IoU before and after fine-tuning (n = {_seeds(study)} seeds)", size=10)
    return figure


def draw_labels(study: Study) -> Figure | None:
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
            axes.axhline(np.mean(points[most]), color=color, lw=1.2, ls="--", label=name)
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


def draw_fits(study: Study) -> Figure | None:
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


PICTURES: dict[str, Callable[[Study], Figure | None]] = {
    "scenes": draw_scenes,
    "binary": draw_binary,
    "labels": draw_labels,
    "fits": draw_fits,
}


def _write(study, out: Path, rows, said, fitted, missing, pictures: Mapping[str, Figure]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in pictures.items():
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        images[name] = buffer.getvalue()
        (out / f"{name}.png").write_bytes(buffer.getvalue())
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *("| " + " | ".join(r) + " |" for r in rows)]
    (out / "study.md").write_text("\n".join([*lines, "", *(f"* {s}" for s in [*said, *fitted])]) + "\n")
    with (out / "study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        metrics = sorted(
            {k for seeds in _all(study) for m in seeds[1].values() for k in m if k.startswith(("eval/", "perf/"))}
        )
        writer.writerow(["family", "strategy", "finetune_scenes", "pretrain_scenes", "control", "seed", *metrics])
        for (arm, n, control), seeds in _all(study):
            for seed, values in seeds.items():
                place = [arm.family, arm.strategy, arm.finetune_scenes, n, control, seed]
                writer.writerow([*place, *(values.get(m, "") for m in metrics)])
    (out / "report.html").write_text(_page(study, rows, said, fitted, missing, images))


def _all(study: Study) -> Iterable[tuple[tuple[Arm, int, str], dict[str, dict[str, float]]]]:
    for arm, cells in study.cells.items():
        for n, seeds in sorted(cells.items()):
            yield (arm, n, ""), seeds
    for (control, arm, n), seeds in study.controls.items():
        yield (arm, n, control), seeds


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.warn{background:#fff3cd;padding:.6rem}li{margin:.2rem 0}"""


def _page(study, rows, said, fitted, missing, images: Mapping[str, bytes]) -> str:
    text = html.escape
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{text(study.name)}</title>"]
    parts.append(f"<style>{_STYLE}</style><h1>Scaling study {text(study.name)}</h1>")
    if missing:
        parts.append(f"<p class='warn'>{len(missing)} cells are missing: {text('; '.join(missing))}</p>")
    parts.append("<h2>Findings</h2>" + _list(said))
    for name, data in images.items():
        parts.append(f"<p><img alt='{name}' src='data:image/png;base64,{base64.b64encode(data).decode()}'></p>")
    head = "".join(f"<th>{text(h)}</th>" for h in HEAD)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in r) + "</tr>" for r in rows)
    parts.append(
        f"<h2>Table</h2><table><tr>{head}</tr>{body}</table><p>Mean ± sample standard deviation over seeds.</p>"
    )
    parts.append("<h2>Laws</h2>" + _list(fitted))
    classes = sorted({k for _, seeds in _all(study) for m in seeds.values() for k in m if k.startswith("eval/class/")})
    if classes:
        parts.append("<h2>Per class</h2>" + _class_table(study, classes))
    if study.card:
        card = {k.removeprefix("card/"): v for k, v in study.card.items() if k.startswith("card/")}
        body = "".join(f"<tr><td>{text(words)}</td><td>{value}</td></tr>" for words, value in datacard.rows(card))
        parts.append(f"<h2>Data card</h2><table>{body}</table>")
    return "\n".join(parts) + "</html>\n"


def _class_table(study: Study, classes: Sequence[str]) -> str:
    """IoU of each class at the largest number of pre-training scenes."""
    arms = study.arms
    head = "".join(f"<th>{html.escape(a.label(study))}, {max(study.cells[a])}</th>" for a in arms)
    rows = []
    for key in classes:
        cells = []
        for arm in arms:
            values = study.points(arm, key).get(max(study.cells[arm]), [])
            cells.append(f"<td>{np.mean(values):.2f}</td>" if values else "<td>-</td>")
        rows.append(f"<tr><td>{html.escape(key.removeprefix('eval/class/'))}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(i)}</li>" for i in items) + "</ul>"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]).rstrip() for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
