"""MLflow's chart page of a study, arranged: mIoU, IoU and binary IoU against pre-training scenes, losses, by arm.

MLflow keeps an arrangement that is shared by link in a tag of the experiment (``mlflow.sharedViewState.<key>``, JSON of its
front end's state). Its form is that of MLflow 3; a version that does not know it shows its own default charts.
"""

from __future__ import annotations

import json

KEY = "occstream"
NOTE, OURS = "mlflow.note.content", "A study of occstream."
SCATTERS = (
    ("mIoU against pre-training scenes", "eval/miou"),
    ("IoU against pre-training scenes", "eval/iou"),
    ("binary IoU against pre-training scenes", "eval/binary_iou"),
)
LINES = ("train/loss", "train/binary", "train/semantic", "opt/lr")
RESULTS, TRAINING = "occstream-results", "occstream-training"


def arrange_charts(client, experiment_id: str) -> str:
    """Writes the arrangement, and a description that links to it unless somebody has written another.

    Args:
        client: ``MlflowClient``.
        experiment_id: of the study.

    Returns:
        The page, to put behind the server's address.
    """
    page = f"#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}&compareRunsMode=CHART"
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{KEY}", json.dumps(_view()))
    if client.get_experiment(experiment_id).tags.get(NOTE, OURS).startswith(OURS):
        note = f"{OURS} [Its curves, arranged]({page}); points are means over seeds. Fits and intervals: `occstream compare`."
        client.set_experiment_tag(experiment_id, NOTE, note)
    return page


def _view() -> dict:
    charts: list[dict] = [
        _card(
            "SCATTER",
            f"scatter-{metric}",
            RESULTS,
            displayName=title,
            xaxis={"key": "axis/pretrain_scenes", "type": "METRIC"},
            yaxis={"key": metric, "type": "METRIC"},
            runsCountToCompare=100,
        )
        for title, metric in SCATTERS
    ]
    charts.append(_card("BAR", "bar-miou", RESULTS, metricKey="eval/miou"))
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
        for metric in LINES
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


def _card(kind: str, uuid: str, section: str, **more) -> dict:
    return {"type": kind, "uuid": uuid, "metricSectionId": section, "deleted": False, "isGenerated": False, **more}
