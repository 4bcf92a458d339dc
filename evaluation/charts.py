"""MLflow's page of an experiment, arranged: scores as columns and charts, losses; of a study also by arm and against the
number of pre-training scenes.

MLflow keeps an arrangement that is shared by link in a tag of the experiment (``mlflow.sharedViewState.<key>``, JSON of its
front end's state). Its form is that of MLflow 3; a version that does not know it shows its own default charts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "occstream"
VIEW = f"mlflow.sharedViewState.{KEY}"
NOTE, OURS, RUNS = "mlflow.note.content", "A study of occstream.", "Runs of occstream."
SHOWN = "occstream.shown"
"""Tag of an experiment whose page is arranged for whatever runs it has: what it shows; "": for a study."""
RESULTS, TRAINING = "occstream-results", "occstream-training"


def arrange_charts(client: MlflowClient, experiment_id: str, headline: Mapping[str, str], terms: Sequence[str]) -> str:
    """Writes the arrangement of a study, and a description that links to it unless somebody has written another.

    Args:
        client: ``MlflowClient``.
        experiment_id: of the study.
        headline: metrics that are compared and what people call them.
        terms: losses.

    Returns:
        The page, to put behind the server's address.
    """
    found = page(experiment_id)
    client.set_experiment_tag(experiment_id, VIEW, json.dumps(_view(headline, terms, by="arm", study=True)))
    client.set_experiment_tag(experiment_id, SHOWN, "")
    note = (
        f"{OURS} [Its curves, arranged]({found}); points are means over seeds. Fits and intervals: `occstream compare`."
    )
    _describe(client, experiment_id, note)
    return found


def arrange_runs(
    client: MlflowClient, experiment_id: str, headline: Mapping[str, str], terms: Sequence[str], *, by: str = ""
) -> None:
    """The same for an experiment that is no study, each time a run begins in it: what earlier runs showed stays.

    Args:
        by: tag whose values runs are grouped by; "": they are not.
    """
    tags = client.get_experiment(experiment_id).tags
    if VIEW in tags and not tags.get(SHOWN):
        return  # a study's
    shown = {"headline": {}, "terms": [], "by": ""} | json.loads(tags.get(SHOWN) or "{}")
    wanted = {
        "headline": {**shown["headline"], **headline},
        "terms": [*dict.fromkeys([*shown["terms"], *terms])],
        "by": shown["by"] or by,
    }
    if wanted == shown:
        return
    client.set_experiment_tag(experiment_id, VIEW, json.dumps(_view(wanted["headline"], wanted["terms"], wanted["by"])))
    client.set_experiment_tag(experiment_id, SHOWN, json.dumps(wanted))
    table, curves = page(experiment_id, charts=False), page(experiment_id)
    _describe(client, experiment_id, f"{RUNS} [Their scores]({table}), [their curves]({curves}).")


def page(experiment_id: str, *, charts: bool = True) -> str:
    """The arranged page of an experiment, to put behind a server's address: charts, or the table."""
    shown = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}{shown}"


def _describe(client: MlflowClient, experiment_id: str, note: str) -> None:
    if client.get_experiment(experiment_id).tags.get(NOTE, OURS).startswith((OURS, RUNS)):
        client.set_experiment_tag(experiment_id, NOTE, note)


def _view(headline: Mapping[str, str], terms: Sequence[str], by: str = "", *, study: bool = False) -> dict:
    charts: list[dict] = [
        _card(
            "SCATTER",
            f"scatter-{metric}",
            RESULTS,
            displayName=f"{word} against pre-training scenes",
            xaxis={"key": "axis/pretrain_scenes", "type": "METRIC"},
            yaxis={"key": metric, "type": "METRIC"},
            runsCountToCompare=100,
        )
        for metric, word in headline.items()
        if study
    ]
    bars = list(headline)[:1] if study else headline
    charts += [_card("BAR", f"bar-{metric}", RESULTS, metricKey=metric) for metric in bars]
    charts += [
        _card(
            "LINE",
            f"line-{metric}",
            TRAINING,
            metricKey=metric,
            selectedMetricKeys=[metric],
            lineSmoothness=0,
            scaleType="linear",
            xAxisKey="step",
        )
        for metric in ("train/loss", *(f"train/{term}" for term in terms), "opt/lr")
    ]
    sections = [
        {"uuid": uuid, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        for uuid, name in ((RESULTS, "Results"), (TRAINING, "Training"))
    ]
    group = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": by}]}
    columns = [*(f"metrics.`{metric}`" for metric in (*headline, "train/loss")), "tags.`stage`"]
    columns += [f"attributes.`{name}`" for name in ("Dataset", "Source", "Version", "Description")]
    return {
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 120),
        "hideEmptyCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": group if by else None,
        "useGroupedValuesInCharts": True,
        "isAccordionReordered": True,
    }


def _card(kind: str, uuid: str, section: str, **more: object) -> dict:
    return {"type": kind, "uuid": uuid, "metricSectionId": section, "deleted": False, "isGenerated": False, **more}
