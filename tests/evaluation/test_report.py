"""Pictures show what the arrays say; the comparison says what the runs say."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from occstream.evaluation import report
from occstream.evaluation.compare import Row, Run, compare, gain, headline_of, headline_tag, mean_and_spread, rows_by
from occstream.evaluation.report import height_colors, overlay, prediction_picture, render
from occstream.launch import cli
from occstream.models import OccOutputs
from occstream.pretrain.tracking import Tracker
from occstream.sharding.schema import OCC3D
from tests.models.helpers import SMALL, make_batch


def test_rendering_shows_left_on_the_left_and_far_at_the_top():
    solid = np.zeros((20, 20, 4), bool)
    solid[15, 16, 0] = True  # far ahead, to the left (y points left)
    picture = render(solid, height_colors(solid.shape), (200, 300))
    rows, columns = np.nonzero((picture < 200).any(-1))
    assert len(rows) > 5
    assert columns.mean() < 140
    solid[:] = False
    solid[3, 16, 0] = True
    near = np.nonzero((render(solid, height_colors(solid.shape), (200, 300)) < 200).any(-1))[0]
    assert near.mean() > rows.mean()


def test_overlay_draws_near_points_over_far_ones_and_skips_those_behind():
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    pixels, depth = np.array([[30, 20], [30, 20], [10, 10]]), np.array([2.0, 20.0, -5.0])
    for times in (1, 9):  # a small image is enlarged, and its dots lie where they did
        image = np.zeros((40 * 9 // times, 60 * 9 // times, 3), np.uint8)
        out = overlay(image, pixels * (9 // times), depth, colors)
        assert out.shape == (360, 540, 3)
        assert out[184, 274, 0] > out[184, 274, 1]
        assert out[94, 94].max() == 0
        rows, columns, _ = np.nonzero(out)
        assert (round(rows.mean()), round(columns.mean())) == ((184, 274) if times == 9 else (180, 270))


def test_cameras_are_shown_as_a_driver_sees_them():
    """Names and order of nuScenes' rig; the way that a camera looks is the third column of its pose."""
    yaws = {"front": 0, "front right": -55, "front left": 55, "back": 180, "back left": 110, "back right": -110}
    poses = np.zeros((6, 4, 4))
    poses[:, :2, 2] = [(np.cos(np.radians(a)), np.sin(np.radians(a))) for a in yaws.values()]
    shown = [list(yaws)[i] for i in report._around(poses)]
    assert shown == ["front left", "front", "front right", "back left", "back", "back right"]


def test_prediction_picture_is_written(tmp_path):
    batch = make_batch(2, 1)
    logits = batch.occupancy.binary.float()[:, ::2, ::2] * 4 - 2
    semantic = np.zeros((1, 17, *SMALL.shape), np.float32)

    outputs = OccOutputs(logits, torch.from_numpy(semantic))
    for index in (0, 1):
        path = tmp_path / "deep" / f"{index}.png"
        prediction_picture(path, batch, outputs, index=index, grid=SMALL, taxonomy=OCC3D, cameras=("A", "B", "C"))
        with Image.open(path) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 200


def test_views_of_earlier_key_frames_are_not_shown(tmp_path, monkeypatch):
    """A temporal network, or ``data.history``, has more views than cameras."""
    shown = []
    monkeypatch.setattr(report, "_compose", lambda path, images, *_, **__: shown.extend(name for name, _ in images))
    batch = make_batch(1, 1, views=6)
    outputs = OccOutputs(None, torch.zeros(1, 17, *SMALL.shape))
    prediction_picture(tmp_path / "a.png", batch, outputs, index=0, grid=SMALL, taxonomy=OCC3D, cameras=("A", "B", "C"))
    assert sorted(shown) == ["A", "B", "C"]


def runs(arm, seed, miou):
    return Run(f"{arm}-{seed}", {"arm": arm, "seed": str(seed)}, {"eval/miou": miou, "eval/iou": 2 * miou})


def test_gain_is_only_claimed_beyond_the_spread():
    rows = rows_by(
        [runs("a", 0, 10.0), runs("a", 1, 11.0), runs("b", 0, 12.0), runs("b", 1, 12.5), runs("c", 0, 11.0)], "arm"
    )
    a, b, c = rows
    assert a.seeds == ["0", "1"]
    assert mean_and_spread([10.0, 11.0, float("nan")]) == pytest.approx((10.5, 0.70710678))
    assert "+1.75 mIoU, more than the largest difference between seeds of one row (1.00)" in gain(a, b)
    assert "NOT more than" in gain(a, Row("d", ["0", "1"], {"eval/miou": [11.0, 11.2]}))
    assert "nothing is known about the spread" in gain(a, c)


def test_compare_reads_finished_runs_from_mlflow(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for arm, values in {"scratch": [10.0, 10.4], "replay": [12.0, 12.2]}.items():
        for seed, miou in enumerate(values):
            folder = tmp_path / f"{arm}-{seed}"
            tracker = Tracker(
                folder,
                uri=uri,
                experiment="study",
                name=folder.name,
                tags={"arm": arm, "seed": str(seed)},
                params={"optim": {"lr": 0.1}},
            )
            tracker.log(1, {"perf/samples_per_s": 5.0})
            tracker.log_result(
                1, {"eval/miou": miou, "eval/iou": 30.0, "eval/class/car": miou / 2, "eval/class/bus": float("nan")}
            )
            tracker.close()
    Tracker(
        tmp_path / "card", uri=uri, experiment="study", name="data-card", tags={"kind": "data-card"}, params={}
    ).close()
    tags = {"arm": "scratch", "seed": "9"}
    Tracker(tmp_path / "failed", uri=uri, experiment="study", name="failed", tags=tags, params={}).close("FAILED")
    text = compare(uri, "study", out=tmp_path / "out")
    assert "10.20 ± 0.28" in text
    assert "12.10 ± 0.14" in text
    assert "replay against scratch: +1.90 mIoU, more than" in text
    # Standard error sqrt(0.04 + 0.01), 1.47 degrees of freedom (Welch), quantile 6.14.
    assert re.search(r"^replay +\+1.90 \(\+0.5[23] to \+3.2[78]\) +\+0.00", text, re.MULTILINE)
    assert "data-card" not in text
    assert "| scratch | 0, 1 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert (
        (tmp_path / "out" / "comparison.csv").read_text().splitlines()[2].startswith("replay,0 1,12.1000,0.1414,30.0")
    )
    assert cli.main(["compare", "--uri", uri, "--experiment", "studdy"]) == 2
    assert "it has: study" in capsys.readouterr().err
    assert json.loads((tmp_path / "replay-0" / "tracking.json").read_text())["run_id"]


def test_tasks_with_other_scores_are_not_compared():
    ours, theirs = ({**headline_tag({f"eval/{name}": name})} for name in ("miou", "map"))
    assert headline_of([Run("a", ours, {}), Run("b", {}, {})]) == {"eval/miou": "miou"}
    with pytest.raises(ValueError, match="runs of different tasks cannot be compared"):
        headline_of([Run("a", ours, {}), Run("b", theirs, {})])
