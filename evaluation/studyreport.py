"""The report of a scaling study, from MLflow alone: text, tables, pictures and a page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from occstream.evaluation.charts import arrange_charts
from occstream.evaluation.compare import experiment_id
from occstream.evaluation.studyfindings import HEAD, class_table, findings, laws, table
from occstream.evaluation.studypictures import PICTURES
from occstream.evaluation.studyscores import METRICS, StudyScores, read_study
from occstream.sharding import datacard

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def study_report(client: MlflowClient, experiment: str, out: Path | None, partial: bool = False) -> str | None:
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
    report = _Report(study, table(study), findings(study), laws(study), missing)
    lines = [_align([list(HEAD), *report.rows]), "mean ± sample standard deviation over seeds", ""]
    lines += [*report.said, "", *report.fitted]
    if missing:
        lines += ["", f"MISSING {len(missing)} cells: {'; '.join(missing)}"]
    if out:
        pictures = {name: draw(study) for name, draw in PICTURES.items()}
        pictures = {name: figure for name, figure in pictures.items() if figure is not None}
        _write(report, out, pictures)
        _log(client, experiment, out)
        lines += ["", f"report: {out / 'report.html'}"]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Report:
    """What is written: a study, rows of its main table, its findings and laws in sentences, and cells that are missing."""

    study: StudyScores
    rows: list[list[str]]
    said: list[str]
    fitted: list[str]
    missing: list[str]


def _log(client: MlflowClient, experiment: str, out: Path) -> None:
    number = experiment_id(client, experiment)
    arrange_charts(client, number, METRICS, ("binary", "semantic"))
    run = client.create_run(number, run_name="report", tags={"kind": "report"})
    for path in sorted(out.iterdir()):
        if path.suffix in (".html", ".png", ".csv", ".md"):
            client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, "FINISHED")


def _write(report: _Report, out: Path, pictures: Mapping[str, Figure]) -> None:
    study = report.study
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in pictures.items():
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        images[name] = buffer.getvalue()
        (out / f"{name}.png").write_bytes(buffer.getvalue())
    lines = [
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(r) + " |" for r in report.rows),
    ]
    (out / "study.md").write_text("\n".join([*lines, "", *(f"* {s}" for s in [*report.said, *report.fitted])]) + "\n")
    with (out / "study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        metrics = sorted(
            {k for seeds in study.all_cells() for m in seeds[1].values() for k in m if k.startswith(("eval/", "perf/"))}
        )
        writer.writerow(["family", "strategy", "finetune_scenes", "pretrain_scenes", "control", "seed", *metrics])
        for (arm, n, control), seeds in study.all_cells():
            for seed, values in seeds.items():
                place = [arm.family, arm.strategy, arm.finetune_scenes, n, control, seed]
                writer.writerow([*place, *(values.get(m, "") for m in metrics)])
    (out / "report.html").write_text(_page(report, images))


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}.warn{background:#fff3cd;padding:.6rem}li{margin:.2rem 0}"""


def _page(report: _Report, images: Mapping[str, bytes]) -> str:
    text, study, missing = html.escape, report.study, report.missing
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{text(study.name)}</title>"]
    parts.append(f"<style>{_STYLE}</style><h1>Scaling study {text(study.name)}</h1>")
    if missing:
        parts.append(f"<p class='warn'>{len(missing)} cells are missing: {text('; '.join(missing))}</p>")
    parts.append("<h2>Findings</h2>" + _list(report.said))
    for name, data in images.items():
        parts.append(f"<p><img alt='{name}' src='data:image/png;base64,{base64.b64encode(data).decode()}'></p>")
    parts.append(f"<h2>Table</h2>{_table(HEAD, report.rows)}<p>Mean ± sample standard deviation over seeds.</p>")
    parts.append("<h2>Laws</h2>" + _list(report.fitted))
    if classes := class_table(study):
        head, *body = classes
        parts.append("<h2>Per class</h2>" + _table(head, body))
    if study.card:
        card = {k.removeprefix("card/"): v for k, v in study.card.items() if k.startswith("card/")}
        parts.append("<h2>Data card</h2>" + _table((), [(words, str(value)) for words, value in datacard.rows(card)]))
    return "\n".join(parts) + "</html>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line('th', head) if head else ''}{''.join(line('td', r) for r in rows)}</table>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(i)}</li>" for i in items) + "</ul>"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]).rstrip() for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
