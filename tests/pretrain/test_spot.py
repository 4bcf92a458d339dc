"""Task spot beyond what every task is asked for: its losses, its teacher, and wrong recipes."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch

from occstream.models.batch import Batch, Occupancy
from occstream.models.lidarnet import LidarOutputs
from occstream.pretrain import trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.ema import Ema, ema_decay
from occstream.pretrain.engine import build_engine
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.tasks.spot import TeacherConfig, foreground
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.schema import IGNORE, TAXONOMIES
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE, losses, pack_sweeps

SMALL = str(HERE / "small-spot.yaml")
TEACHER = ("teacher.weight=0.5", "train.ema=true", "train.ema_start=0", "train.ema_warmup=mean", "replay.batch=2")


def task(*words: str, stage: str = "pretrain"):
    return task_of(load_config(SMALL, words, stage=stage))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return pack_sweeps(str(tmp_path_factory.mktemp("sweeps")), scenes=4, frames=2)


def frames(labels: torch.Tensor, labeled: int, taught: torch.Tensor | None = None) -> Batch:
    known = labels != IGNORE
    part = Occupancy(known & (labels < 1), known, semantic=labels[:labeled], taught=taught)
    return Batch(
        torch.eye(3).repeat(len(labels), 1, 1), labeled, [f"f-{i}" for i in range(len(labels))], occupancy=part
    )


def test_weighted_cross_entropy_is_divided_by_the_weights_of_all_voxels():
    """Car 2, others 1, free 0.01: two frames together are neither frame's mean."""
    of = task("loss.lovasz_weight=0")
    k = of.config.classes.num_classes
    labels = torch.full((2, 1, 2, 2), IGNORE, dtype=torch.uint8)
    labels[0, 0, 0] = torch.tensor([4, 11])  # car, road
    labels[1, 0, 1, 1] = k
    logits = torch.randn(2, k, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch, outputs = frames(labels, 2), LidarOutputs(None, logits, all_logits=logits)
    loss, parts = combine(of.sums(outputs, batch), joint_counts([of.counts(outputs, batch)]), of.weights)
    wide = torch.cat([logits, torch.zeros(2, 1, 1, 2, 2)], 1).log_softmax(1)
    expected = -(2 * wide[0, 4, 0, 0, 0] + wide[0, 11, 0, 0, 1] + 0.01 * wide[1, k, 0, 1, 1]) / 3.01
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["ce"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("occ3d", {"bicycle", "car", "motorcycle", "pedestrian"}),
        ("openscene", {"vehicle", "bicycle", "pedestrian"}),
        ("waymo", {"vehicle", "pedestrian", "cyclist", "bicycle", "motorcycle"}),
        ("semantickitti", {"car", "bicycle", "motorcycle", "person", "bicyclist", "motorcyclist"}),
    ],
)
def test_foreground(name, expected):
    assert set(foreground(TAXONOMIES[name], task().config.loss)) == expected


def test_a_teacher_labels_voxels_of_which_it_is_sure():
    """At least 0.7 of a class and 0.9 of free, and no voxel of frames that have labels."""
    of = task("replay.url=somewhere", *TEACHER)
    k = of.config.classes.num_classes
    odds = {"car": 0.69, "car+": 0.71, "free": 0.89, "free+": 0.91}
    logits = torch.full((2, k, 1, 1, 4), -40.0)
    for column, (name, p) in enumerate(odds.items()):
        logits[:, 4, 0, 0, column] = math.log(p / (1 - p)) if name.startswith("car") else math.log((1 - p) / p)
    batch = frames(torch.full((2, 1, 1, 4), IGNORE, dtype=torch.uint8), 1)
    taught = of.taught(batch, LidarOutputs(None, logits[:1], all_logits=logits)).occupancy.taught
    assert taught[0].unique().tolist() == [IGNORE]
    assert taught[1].flatten().tolist() == [IGNORE, 4, IGNORE, k]


def test_what_a_teacher_said_is_a_loss_of_its_own():
    """It is divided by its own voxels, and its weight rises over the first share of the run."""
    of = task("replay.url=somewhere", "loss.lovasz_weight=0", *TEACHER)
    k = of.config.classes.num_classes
    labels = torch.full((2, 1, 1, 2), IGNORE, dtype=torch.uint8)
    labels[0, 0, 0, 0] = 11
    taught = torch.full((2, 1, 1, 2), IGNORE, dtype=torch.uint8)
    taught[1, 0, 0, 1] = 4
    logits = torch.randn(2, k, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    batch, outputs = frames(labels, 1, taught), LidarOutputs(None, logits[:1], all_logits=logits)
    wide = torch.cat([logits, torch.zeros(2, 1, 1, 1, 2)], 1).log_softmax(1)
    main, teacher = -wide[0, 11, 0, 0, 0], -wide[1, 4, 0, 0, 1]
    for progress, factor in ((0.0, math.exp(-5)), (0.15, math.exp(-1.25)), (0.3, 1.0), (1.0, 1.0)):
        of.progress = progress
        loss, _ = combine(of.sums(outputs, batch), joint_counts([of.counts(outputs, batch)]), of.weights)
        assert loss.item() == pytest.approx((main + 0.5 * factor * teacher).item(), rel=1e-5)


def test_a_teacher_is_the_mean_of_all_weights_until_its_decay_is_reached():
    assert [round(ema_decay(n, 0.999, "mean"), 4) for n in range(1, 6)] == [0, 0.5, 0.6667, 0.75, 0.8]
    assert ema_decay(5000, 0.999, "mean") == 0.999
    config = load_config(SMALL, ["train.ema=true", "train.ema_start=2000", "train.ema_warmup=mean"]).train
    student = torch.nn.Linear(1, 1)
    student.weight.data.fill_(1.0)
    teacher = Ema(student, config)
    student.weight.data.zero_()
    for _ in range(3):
        teacher.update()
    assert teacher.values["weight"].item() == pytest.approx(0.997003, abs=1e-6)


def test_no_stage_reads_cameras():
    wanted = {"pretrain": ("lidar", "labels"), "detect": ("lidar", "labels"), "segment": ("lidar",)}
    for stage, groups in wanted.items():
        of = task(stage=stage)
        assert of.sample("main", of.config.data, ()).groups == groups
        assert of.sample("predict", of.config.data, ()).groups == ("lidar",)


def test_the_weight_of_a_teacher_needs_no_ramp():
    assert TeacherConfig(ramp=0.0).factor(0.0) == 1


def test_a_run_with_a_teacher_continues_as_if_it_had_not_been_killed(data, world, tmp_path):  # noqa: F811
    words = [
        f"data.url={data}",
        f"replay.url={data}",
        *TEACHER,
        "lidar.beams=[0.5]",
        "train.batch=2",
        "train.save_every=2",
    ]
    whole = trainer.train(load_config(SMALL, [*words, f"output={tmp_path}/whole"]), world)
    assert whole.steps == 4
    before = losses(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    trainer.train(load_config(SMALL, [*words, f"output={tmp_path}/again"]), world)
    again = losses(tmp_path / "again")
    assert {step: again[step] for step in (3, 4)} == {step: before[step] for step in (3, 4)}
    alone = [word for word in words if not word.startswith(("teacher", "replay"))]
    trainer.train(load_config(SMALL, [*alone, f"output={tmp_path}/alone"]), world)
    assert losses(tmp_path / "alone")[4]["train/ce"] != before[4]["train/ce"]


def test_a_partitioned_network_learns_the_same(world):  # noqa: F811
    """ZeRO-3 finds no tensors in what sparse layers pass on: their parameters are gathered together."""
    of, found = task(stage="segment"), []
    batch = of.synthetic_batch(1, 0)
    for zero in (0, 3):
        config = load_config(SMALL, [f"train.zero_stage={zero}", "train.batch=1", "optim.lr=1e-4"], stage="segment")
        torch.manual_seed(0)
        engine = build_engine(of.model().train(), config, world)
        found.append([])
        for _ in range(3):
            loss, _ = of.loss(engine(batch), batch)
            found[-1].append(loss.item())
            engine.backward(loss)
            engine.step()
    assert found[0][0] - found[0][2] > 0.01
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.weight=1"], "there are no frames to label: set replay.url"),
        (["teacher.weight=1", "replay.url=URL", "train.ema=false"], "set train.ema=true, or teacher.weight=0"),
    ],
)
def test_a_teacher_needs_frames_and_an_average(words, message, data, world, tmp_path):  # noqa: F811
    words = [word.replace("URL", data) for word in words]
    config = load_config(SMALL, [f"data.url={data}", f"output={tmp_path}", *words])
    with pytest.raises(ValueError, match=message):
        trainer.train(config, world)


@pytest.mark.parametrize(("stage", "head"), [("detect", "detector"), ("segment", "segmentor")])
@pytest.mark.parametrize("name", ["spot", "spot-tiny"])
def test_recipes_serve_every_stage(name, stage, head):
    of = task_of(load_config(name, [], stage=stage))
    with torch.device("meta"):
        keys = of.model().state_dict()
    assert {key.split(".")[0] for key in keys} == {"encoder", head}


def test_unknown_foreground_is_named():
    with pytest.raises(ValueError, match=r"loss\.foreground has 'cars', which taxonomy 'occ3d' has not"):
        task("loss.foreground=[cars]")


def test_predictions_of_other_stages_are_refused():
    for words, stage in (([], "detect"), (["occupancy=binary"], "pretrain"), (["model.target=bev"], "pretrain")):
        with pytest.raises(ValueError, match="predicts no classes of voxels"):
            task(*words, stage=stage).check_prediction()


def test_columns_are_scored_as_voxels_of_one_layer(data, world, tmp_path):  # noqa: F811
    words = [f"data.url={data}", f"output={tmp_path}", "model.target=bev", "train.steps=1"]
    found = trainer.train(load_config(SMALL, words), world).evaluation
    assert found.miou is not None
    assert dataclasses.asdict(task("model.target=bev").label_grid)["voxel"][2] == pytest.approx(6.4)
