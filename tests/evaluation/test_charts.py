"""The page of an experiment shows the scores and losses of whatever runs it has."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from occstream.evaluation.charts import NOTE, VIEW, arrange_charts, arrange_runs, page

B2S = {"eval/miou": "mIoU", "eval/iou": "IoU"}
SPOT = {"eval/mAP": "mAP", "eval/iou": "IoU"}


class Client:
    """Keeps an experiment's tags."""

    def __init__(self, **tags):
        self.tags, self.writes = tags, 0

    def get_experiment(self, number):
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, number, key, value):
        self.tags[key] = value
        self.writes += 1

    def view(self) -> dict[str, Any]:
        return json.loads(self.tags[VIEW])

    def charts(self, kind):
        return [card["metricKey"] for card in self.view()["compareRunCharts"] if card["type"] == kind]


def test_scores_are_columns_and_charts():
    client: Any = Client()
    arrange_runs(client, "7", B2S, ("binary",))
    view = client.view()
    assert view["selectedColumns"][:3] == ["metrics.`eval/miou`", "metrics.`eval/iou`", "metrics.`train/loss`"]
    assert "attributes.`Dataset`" in view["selectedColumns"]
    assert client.charts("BAR") == list(B2S)
    assert client.charts("LINE") == ["train/loss", "train/binary", "opt/lr"]
    assert view["groupBy"] is None
    assert page("7") in client.tags[NOTE]
    assert page("7", charts=False) in client.tags[NOTE]


def test_runs_of_another_task_add_theirs_and_the_same_again_write_nothing():
    client: Any = Client()
    arrange_runs(client, "1", B2S, ("binary",))
    before = client.writes
    arrange_runs(client, "1", B2S, ("binary",))
    assert client.writes == before
    arrange_runs(client, "1", SPOT, ("ce", "binary"), by="arm")
    assert client.charts("BAR") == ["eval/miou", "eval/iou", "eval/mAP"]
    assert client.charts("LINE") == ["train/loss", "train/binary", "train/ce", "opt/lr"]
    assert client.view()["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "arm"}]
    arrange_runs(client, "1", B2S, ("binary",))
    assert client.view()["groupBy"]


def test_the_page_of_a_study_stays_and_takes_the_place_of_another():
    client: Any = Client()
    arrange_runs(client, "1", B2S, ("binary",))
    found = arrange_charts(client, "1", B2S, ("binary", "semantic"))
    study = client.tags[VIEW]
    assert [card["type"] for card in client.view()["compareRunCharts"]].count("SCATTER") == 2
    arrange_runs(client, "1", SPOT, ("ce",))
    assert client.tags[VIEW] == study
    assert found == page("1")
    assert client.tags[NOTE].startswith("A study of occstream.")


def test_what_somebody_has_written_of_an_experiment_stays():
    client: Any = Client(**{NOTE: "Mine."})
    arrange_runs(client, "1", B2S, ())
    arrange_charts(client, "1", B2S, ())
    assert client.tags[NOTE] == "Mine."
