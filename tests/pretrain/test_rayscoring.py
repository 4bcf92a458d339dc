"""RayIoU and panoptic quality in the evaluation of any task with voxel labels: where rays begin, and perfect and empty
predictions."""

import numpy as np
import pytest
import torch

from occstream.evaluation.evaluate import evaluate
from occstream.evaluation.occupancy import OccupancyMetric
from occstream.models.batch import OccOutputs
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import EvalData
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.poses import apply, compose, inverse
from occstream.sharding.stream import ShardReader
from tests.pretrain.small import HERE, pack_small, pack_sweeps

RECIPE = str(HERE / "small-spot.yaml")


class Says(torch.nn.Module):
    """The truth, or nothing."""

    def __init__(self, perfect: bool):
        super().__init__()
        self.perfect = perfect

    def forward(self, batch):
        labels = batch.occupancy.classes()
        logits = torch.full((len(labels), 17, *labels.shape[1:]), -9.0)
        if self.perfect:
            known = labels < 17
            logits.scatter_(1, torch.where(known, labels, 0).long()[:, None], torch.where(known, 9.0, -9.0)[:, None])
        return OccOutputs(None, logits)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    url = pack_sweeps(str(tmp_path_factory.mktemp("rays") / "data"), scenes=2, frames=3)
    settings = [f"data.url={url}", "data.holdout=1", "eval.mask=none", "eval.rays=true"]
    return EvalData(load_config(RECIPE, settings, stage="pretrain"), World(0, 1, torch.device("cpu")))


def test_perfect_predictions_score_one_and_empty_ones_nothing(held_out):
    found = evaluate(Says(True), held_out, held_out.scoring.metric()).scores()
    assert [found[name] for name in ("rayiou", "rayiou_1m", "rayiou_4m", "miou", "iou")] == pytest.approx([100] * 5)
    assert found["class/RayIoU driveable_surface"] == pytest.approx(100)
    assert "raypq" not in found
    found = evaluate(Says(False), held_out, held_out.scoring.metric()).scores()
    assert (found["rayiou"], found["miou"]) == (0, 0)


def test_instances_of_any_task_with_classes_are_scored_by_connected_voxels(held_out):
    """Of voxels that are all right; they differ from the truth where two objects touch."""
    url = held_out.scoring.metric().metrics["RayIoU"].origins.manifest.url
    settings = [f"data.url={url}", "data.holdout=1", "eval.mask=none", "eval.rays=true", "eval.panoptic=true"]
    both = EvalData(load_config(RECIPE, settings, stage="pretrain"), World(0, 1, torch.device("cpu")))
    found = evaluate(Says(True), both, both.scoring.metric()).scores()
    assert (found["miou"], found["rayiou"]) == pytest.approx((100, 100))
    assert found["class/PQ-voxel driveable_surface"] == pytest.approx(100)
    assert 30 < found["raypq"] <= 100
    assert 0 < found["voxel_pq_present"] <= 100
    assert {name for batch in both for name in vars(batch) if getattr(batch, name) is not None} >= {
        "boxes",
        "occupancy",
    }


@pytest.mark.parametrize(
    ("recipe", "stage", "more"),
    [("small.yaml", "finetune", ()), ("small-occfiner.yaml", "train", ("data.input=pseudo-x",))],
)
def test_evaluations_read_boxes_only_where_instances_are_scored(recipe, stage, more):
    for wanted, role, boxes in ((True, "eval", True), (False, "eval", False), (True, "main", False)):
        settings = ["data.url=nowhere", f"eval.panoptic={str(wanted).lower()}", *more]
        config = load_config(str(HERE / recipe), settings, stage=stage)
        sample = task_of(config).sample(role, config.eval if role == "eval" else config.data, ("CAM_FRONT",))
        assert ("boxes.boxes" in sample.fields()) == boxes
        assert sample.groups.count("labels") == 1


def test_rays_begin_where_the_lidar_of_the_scene_was(held_out):
    metric = held_out.scoring.metric().metrics["RayIoU"]
    manifest = metric.origins.manifest
    scene = next(iter({key.rpartition("-")[0] for batch in held_out for key in batch.keys}))
    number = [entry.name for entry in manifest.scenes].index(scene)
    reader = ShardReader(manifest, ("lidar",))
    frames = [reader.frame(number, i) for i in range(3)]
    reader.close()
    for frame in frames:
        places = [compose(other.lidar.ego_to_global, other.lidar.sensor_to_ego)[:3, 3] for other in frames]
        expected = [apply(inverse(frame.ego_to_global), place) for place in places]
        inside = [place for place in expected if np.abs(place[:2]).max() < 18.2]
        np.testing.assert_allclose(metric.origins(frame.key), inside, atol=1e-9)


def test_stages_without_classes_cast_no_rays(held_out):
    settings = [f"data.url={held_out.scoring.metric().metrics['RayIoU'].origins.manifest.url}", "data.holdout=1"]
    config = load_config(RECIPE, [*settings, "eval.rays=true", "occupancy=binary"], stage="pretrain")
    binary = EvalData(config, World(0, 1, torch.device("cpu")))
    assert isinstance(binary.scoring.metric(), OccupancyMetric)
    assert "eval.rays=true is without effect" in " ".join(binary.notes)


def test_a_set_without_sweeps_is_named(tmp_path):
    pack_small(str(tmp_path / "data"), scenes=2)
    settings = [f"data.url={tmp_path / 'data'}", "data.holdout=1", "eval.rays=true"]
    config = load_config(str(HERE / "small.yaml"), settings, stage="finetune")
    with pytest.raises(ValueError, match=r"has no group lidar, and eval.rays=true needs the places of the LiDAR"):
        EvalData(config, World(0, 1, torch.device("cpu")))
