"""MLflow's chart page of a study, arranged: scores against pre-training scenes, losses, by arm.

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
NOTE, OURS = "mlflow.note.content", "A study of occstream."
RESULTS, TRAINING = "occstream-results", "occstream-training"


def arrange_charts(client: MlflowClient, experiment_id: str, headline: Mapping[str, str], terms: Sequence[str]) -> str:
    """Writes the arrangement, and a description that links to it unless somebody has written another.

    Args:
        client: ``MlflowClient``.
        experiment_id: of the study.
        headline: metrics that are compared and what people call them.
        terms: losses.

    Returns:
        The page, to put behind the server's address.
    """
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}&compareRunsMode=CHART"
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{KEY}", json.dumps(_view(headline, terms)))
    if client.get_experiment(experiment_id).tags.get(NOTE, OURS).startswith(OURS):
        note = f"{OURS} [Its curves, arranged]({page}); points are means over seeds. Fits and intervals: `occstream compare`."
        client.set_experiment_tag(experiment_id, NOTE, note)
    return page


def _view(headline: Mapping[str, str], terms: Sequence[str]) -> dict:
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
    ]
    first = next(iter(headline))
    charts.append(_card("BAR", f"bar-{first}", RESULTS, metricKey=first))
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
    return {
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "arm"}]},
        "useGroupedValuesInCharts": True,
        "isAccordionReordered": True,
    }


def _card(kind: str, uuid: str, section: str, **more: object) -> dict:
    return {"type": kind, "uuid": uuid, "metricSectionId": section, "deleted": False, "isGenerated": False, **more}
