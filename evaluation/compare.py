"""Comparing runs: reads MLflow only, so that runs of other tools can join by tags."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from occstream.evaluation.differences import difference

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

HEADLINE = "occstream.headline"
"""Tag that names the metrics to compare and what people call them."""
SPEED = {"perf/samples_per_s": "samples/s"}
DATA_CARD = "data-card"
"""Value of the tag ``kind`` of a run that describes data and has no scores."""
OTHERS = {"eval/miou": "mIoU", "eval/iou": "IoU", "eval/binary_iou": "binary IoU"}
"""Of runs without the tag: earlier versions' and other tools'."""


def headline_tag(headline: Mapping[str, str]) -> dict[str, str]:
    """A run's tag of its task's headline: metrics by name with what people call them, the one that decides first."""
    return {HEADLINE: json.dumps(dict(headline))} if headline else {}


def headline_of(runs: Sequence[Run]) -> dict[str, str]:
    """The headline that runs name, metric -> word. Raises ValueError if they are of tasks with different ones."""
    found = {run.tags.get(HEADLINE, "") for run in runs} - {""}
    if len(found) > 1:
        raise ValueError(
            f"runs of different tasks cannot be compared; their scores are {' and '.join(sorted(found)[:2])}"
        )
    return json.loads(found.pop()) if found else OTHERS


@dataclass
class Run:
    """One finished run: tags and last metrics."""

    name: str
    tags: dict[str, str]
    metrics: dict[str, float]


@dataclass
class Row:
    """Runs that differ in their seed only.

    Attributes:
        name: value of the tag that names rows.
        seeds: in order.
        values: metric -> one number per seed that has it.
    """

    name: str
    seeds: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)


def experiment_id(client: MlflowClient, experiment: str) -> str:
    """Of an experiment by name. Raises ValueError that lists the experiments if there is none by this name."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments() if e.name != "Default") or "none"
        raise ValueError(f"MLflow has no experiment {experiment!r}; it has: {names}")
    return found.experiment_id


def run_name(run: MlflowRun) -> str:
    """What people call a run; its id where nobody named it."""
    return run.info.run_name or run.info.run_id


def all_runs(client: MlflowClient, experiment: str) -> list[MlflowRun]:
    """Every run of an experiment, oldest first. Raises ValueError as ``experiment_id``."""
    number = experiment_id(client, experiment)
    runs, token = [], None
    while True:
        page = client.search_runs([number], order_by=["attributes.start_time ASC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def collect(client: MlflowClient, experiment: str) -> list[Run]:
    """Finished runs of an experiment, oldest first; of several with equal tags the newest counts.

    Args:
        client: an MLflow client.

    Raises:
        ValueError: no such experiment, or no finished run in it.
    """
    runs = [r for r in all_runs(client, experiment) if r.info.status == "FINISHED"]
    newest: dict[tuple, Run] = {}
    for r in runs:
        tags = {k: v for k, v in r.data.tags.items() if not k.startswith("mlflow.")}
        if tags.get("kind") == DATA_CARD:
            continue
        newest[tuple(sorted(tags.items()))] = Run(run_name(r), tags, dict(r.data.metrics))
    if not newest:
        raise ValueError(f"experiment {experiment!r} has no finished run")
    return list(newest.values())


def rows_by(runs: list[Run], by: str) -> list[Row]:
    """Groups runs by a tag; runs without it are named by stage and run name."""
    rows: dict[str, Row] = {}
    for run in runs:
        name = run.tags.get(by) or run.tags.get("stage") or run.name
        row = rows.setdefault(name, Row(name))
        row.seeds.append(run.tags.get("seed", "?"))
        for key, value in run.metrics.items():
            row.values.setdefault(key, []).append(value)
    return list(rows.values())


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation (NaN below two values); NaN values are left out."""
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        return math.nan, math.nan
    return statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else math.nan


def gain(base: Row, other: Row, metric: str = "eval/miou", label: str = "mIoU") -> str:
    """One honest sentence on the difference of two rows."""
    a, b = base.values.get(metric, []), other.values.get(metric, [])
    if not a or not b:
        return f"{other.name} against {base.name}: {metric} is missing"
    (mean_a, sd_a), (mean_b, sd_b) = mean_and_spread(a), mean_and_spread(b)
    ranges = [max(v) - min(v) for v in (a, b)]
    text = f"{other.name} against {base.name}: {mean_b - mean_a:+.2f} {label}"
    if len(a) < 2 or len(b) < 2:
        return f"{text}; one seed, so nothing is known about the spread"
    verdict = "more than" if abs(mean_b - mean_a) > max(ranges) else "NOT more than"
    return (
        f"{text}, {verdict} the largest difference between seeds of one row ({max(ranges):.2f}); "
        f"n = {len(a)} and {len(b)} seeds, sd {sd_a:.2f} and {sd_b:.2f}"
    )


def compare(uri: str, experiment: str, by: str = "arm", out: Path | None = None) -> str:
    """Table of the runs of an experiment, mean ± sd over seeds.

    Args:
        uri: MLflow tracking URI.
        by: tag that names the rows.
        out: folder for ``comparison.csv`` and ``comparison.md``.

    Returns:
        The table and, if there are rows with the first score of the headline, the gain of each over the first, as text.
    """
    from mlflow.tracking import MlflowClient

    runs = collect(MlflowClient(uri), experiment)
    rows, headline = rows_by(runs, by), headline_of(runs)
    main, word = next(iter(headline.items()))
    scored = [r for r in rows if main in r.values]
    shown = {k for r in scored or rows for k in r.values if k.startswith("eval/class/")}
    classes = sorted(shown, key=_class_order(scored or rows))
    scores = [*headline.items(), *SPEED.items()]
    columns = [*scores, *((k, k.removeprefix("eval/class/")) for k in classes)]
    text = [_text_table(rows, scores)]
    if classes:
        text += ["", "per class, in percent:", _class_table(scored, classes)]
    gains = [gain(scored[0], r, main, word) for r in scored[1:]]
    apart = _differences(scored, headline)
    text += ["", *gains, *(["", apart] if apart else [])]
    missing = [f"{r.name} (seed {s}): {k}" for r in scored for k in list(headline)[:2] for s in _missing(r, k)]
    if missing:
        text += ["missing: " + "; ".join(missing)]
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text("\n\n".join([_markdown(rows, columns), *gains, apart]).rstrip() + "\n")
        with (out / "comparison.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "seeds", *(f"{k} {w}" for k, _ in columns for w in ("mean", "sd"))])
            for r in rows:
                numbers = [v for k, _ in columns for v in mean_and_spread(r.values.get(k, []))]
                writer.writerow([r.name, " ".join(r.seeds), *("" if math.isnan(v) else f"{v:.4f}" for v in numbers)])
    return "\n".join(text)


def _differences(rows: list[Row], headline: Mapping[str, str]) -> str:
    """Table of what each row gains over the first, with 95 % intervals; "" where no two rows have several seeds."""
    table = [["", *(r.name for r in rows[1:])]]
    for key, word in headline.items():
        cells = [_interval(rows[0].values.get(key, []), r.values.get(key, [])) for r in rows[1:]]
        if any(cell != "-" for cell in cells):
            table.append([word, *cells])
    title = f"against {rows[0].name}: difference of the means, 95 % interval (Welch)" if rows else ""
    return _align([list(line) for line in zip(*table)]) + "\n" + title if len(table) > 1 else ""


def _interval(base: list[float], other: list[float]) -> str:
    known = [[v for v in values if not math.isnan(v)] for values in (base, other)]
    if min(map(len, known)) < 2:
        return "-"
    found = difference(*known)
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _missing(row: Row, key: str) -> list[str]:
    return row.seeds[len(row.values.get(key, [])) :]


def _class_order(rows: list[Row]) -> Callable[[str], float]:
    """Frequent (well predicted) classes first keeps the table readable."""
    best = {}
    for r in rows:
        for k, v in r.values.items():
            mean = mean_and_spread(v)[0]
            best[k] = max(best.get(k, -1.0), -1.0 if math.isnan(mean) else mean)
    return lambda k: -best[k]


def _cell(row: Row, key: str) -> str:
    mean, sd = mean_and_spread(row.values.get(key, []))
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}" if math.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


def _text_table(rows: list[Row], columns: list[tuple[str, str]]) -> str:
    head = ["", "seeds", *(label for _, label in columns)]
    body = [[r.name, str(len(r.seeds)), *(_cell(r, k) for k, _ in columns)] for r in rows]
    return _align([head, *body]) + "\nmean ± sample standard deviation over seeds"


def _class_table(rows: list[Row], classes: list[str]) -> str:
    head = ["", *(r.name for r in rows)]
    return _align([head, *([k.removeprefix("eval/class/"), *(_cell(r, k) for r in rows)] for k in classes)])


def _align(table: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown(rows: list[Row], columns: list[tuple[str, str]]) -> str:
    lines = ["| | seeds | " + " | ".join(label for _, label in columns) + " |", "|---|---|" + "---|" * len(columns)]
    lines += [
        f"| {r.name} | {', '.join(r.seeds)} | " + " | ".join(_cell(r, k) for k, _ in columns) + " |" for r in rows
    ]
    return "\n".join(lines)
