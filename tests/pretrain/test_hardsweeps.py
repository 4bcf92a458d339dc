"""Task spot on sweeps with next to nothing in them, and on very large ones: loss, gradients and answers of every stage."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import NUSCENES
from occstream.models.batch import Batch
from occstream.pretrain import lidar
from occstream.pretrain.config import load_config
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.tasks.spot import SpotTask
from occstream.sharding.grid import get_grid
from occstream.sharding.schema import IGNORE, OCC3D, Boxes, Frame, Labels, LidarSweep
from occstream.sharding.sources import open_source
from tests.pretrain.small import HERE

GRID = get_grid("tiny")
BOTH = ("pretrain", "finetune")  # every head: the other stages have one of finetune's two


def frame(points: int = 300, boxes: int = 4, *, seed: int = 0, key: int = 0, reach: float = 12.0) -> Frame:
    """A frame of random points, of which some lie in its boxes, with voxel labels that know about half."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform((-reach, -reach, -1), (reach, reach, 3), (points, 3)).astype(np.float32)
    centers = np.resize(xyz, (boxes, 3)) if points else np.zeros((boxes, 3))
    found = np.column_stack([centers, np.tile([4.5, 1.9, 1.6, 0.3], (boxes, 1))]).astype(np.float32)
    sweep = LidarSweep(
        xyz,
        np.eye(4),
        np.eye(4),
        0,
        intensity=rng.uniform(0, 255, points).astype(np.float32),
        ring=rng.integers(0, 32, points).astype(np.uint8),
        classes=rng.integers(0, OCC3D.num_classes, points).astype(np.uint8),
    )
    known = Boxes(found, ["car", "pedestrian", "bus", "barrier"][:boxes], [str(i) for i in range(boxes)])
    semantic = rng.choice(np.array([4, 11, OCC3D.free_id], np.uint8), GRID.shape)
    labels = Labels(semantic != OCC3D.free_id, semantic, mask_lidar=rng.random(GRID.shape) < 0.5)
    return Frame("scene", key, str(key), 0, np.eye(4), lidar=sweep, boxes=known, labels=labels)


def with_sweep(of: Frame, **changes) -> Frame:
    return dataclasses.replace(of, lidar=dataclasses.replace(of.lidar, **changes))


def holes(of: Frame, share: float) -> Frame:
    """The same frame, in which the first share of the returns are not numbers, or without bounds."""
    xyz = of.lidar.xyz.copy()
    count = round(share * len(xyz))
    xyz[:count:2], xyz[1:count:2, 0] = np.nan, np.inf
    return with_sweep(of, xyz=xyz)


def unknown(of: Frame) -> Frame:
    """The same frame, of which no label knows anything."""
    labels = dataclasses.replace(of.labels, mask_lidar=np.zeros(GRID.shape, bool))
    return dataclasses.replace(with_sweep(of, classes=np.full(len(of.lidar.xyz), IGNORE, np.uint8)), labels=labels)


def empty_space(of: Frame) -> Frame:
    """The same boxes, without a point inside."""
    far = of.boxes.boxes + np.float32([0, 0, 3.5, 0, 0, 0, 0])
    return dataclasses.replace(of, boxes=dataclasses.replace(of.boxes, boxes=far))


CASES = {
    "empty sweeps": lambda: [frame(0), frame(0, key=1)],
    "an empty sweep beside another": lambda: [frame(0), frame(key=1)],
    "one point": lambda: [frame(1)],
    "one point in each sweep": lambda: [frame(1), frame(1, key=1, seed=1)],
    "no boxes": lambda: [frame(boxes=0), frame(boxes=0, key=1)],
    "boxes in one frame": lambda: [frame(boxes=0), frame(key=1)],
    "boxes without points": lambda: [empty_space(frame())],
    "no point within the grid": lambda: [with_sweep(frame(), xyz=frame().lidar.xyz + np.float32(1e4))],
    "nothing known": lambda: [unknown(frame()), unknown(frame(key=1))],
    "no return is a number": lambda: [holes(frame(), 1.0)],
    "half of the returns are numbers": lambda: [holes(frame(), 0.5), frame(key=1)],
    "no beam numbers": lambda: [with_sweep(frame(), ring=None)],
    "intensities that are not numbers": lambda: [with_sweep(frame(), intensity=np.full(300, np.nan, np.float32))],
}


@functools.cache
def task(stage: str, *words: str) -> SpotTask:
    tasks = (NUSCENES.classes[:2], NUSCENES.classes[2:])
    words = ("segment.channels=[16]", "detect.channels=8", f"detect.tasks={[list(t) for t in tasks]}", *words)
    found = task_of(load_config(str(HERE / "small-spot.yaml"), words, stage=stage))
    assert isinstance(found, SpotTask)
    return found


def batch(of: SpotTask, frames: list[Frame]) -> Batch:
    """As the stream makes it in training."""
    filler = of.sample("main", of.config.data, ())
    fields, rows = filler.fields(), {}
    for one in frames:
        views = {name: np.zeros(f.shape, f.dtype) for name, f in fields.items() if not f.ragged}
        filler(one, 0, views)
        for name in fields:
            rows.setdefault(name, []).append(views[name])
    tensors = {}
    for name, f in fields.items():
        tensors[name] = torch.from_numpy(np.concatenate(rows[name]) if f.ragged else np.stack(rows[name]))
        if f.ragged:
            tensors[f"{name.partition('.')[0]}.counts"] = torch.tensor([len(one) for one in rows[name]])
    return Batch.of(tensors, [one.key for one in frames])


def learn(of: SpotTask, frames: list[Frame]) -> tuple[torch.nn.Module, float]:
    """A network after a forward and a backward pass, and its loss."""
    torch.manual_seed(0)
    net, made = of.model().train(), batch(of, frames)
    loss, terms = of.loss(net(made), made)
    loss.backward()
    assert all(term.isfinite() for term in terms.values()), terms
    return net, loss.item()


@pytest.mark.parametrize(
    ("case", "stage"),
    [(case, stage) for case in CASES for stage in BOTH]
    + [(case, stage) for case in ("empty sweeps", "one point", "no boxes") for stage in ("detect", "segment")],
)
def test_every_stage_learns_and_answers(case, stage):
    of, frames = task(stage), CASES[case]()
    net, loss = learn(of, frames)
    assert np.isfinite(loss)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"{name} is left out"
        assert parameter.grad.isfinite().all(), name
    for name, buffer in net.named_buffers():
        assert buffer.isfinite().all(), name
    answers(of, net, frames)


def answers(of: SpotTask, net: torch.nn.Module, frames: list[Frame]) -> None:
    """What is evaluated: finite boxes, a class for every point, and a metric that takes them."""
    made = batch(of, frames)
    with torch.no_grad():
        outputs = net.eval()(made)
    metric = of.scoring(None, None).metric() if not of.pretrains else None
    if metric is not None:
        metric.update(outputs, made)
        metric.result()
    if of.detects:
        found = of._found_boxes(outputs, made)
        assert len(found) == len(frames)
        assert all(np.isfinite(one.boxes).all() for one in found)
    if of.segments:
        classes = of._found_classes(outputs, made)
        assert len(classes) == len(made.points.xyz)
        assert not len(classes) or 1 <= classes.min() <= classes.max() < OCC3D.num_classes
    if of.pretrains:
        assert outputs.all_logits.shape[0] == len(frames)
        assert outputs.all_logits.isfinite().all()


@pytest.mark.parametrize("stage", BOTH)
def test_returns_that_are_not_numbers_change_nothing(stage):
    """The loss is that of the same sweep without them."""
    of, whole = task(stage), frame()
    rest = np.arange(150, 300)
    sweep = whole.lidar
    arrays = {name: getattr(sweep, name)[rest] for name in ("xyz", "intensity", "ring", "classes")}
    assert learn(of, [holes(whole, 0.5)])[1] == learn(of, [with_sweep(whole, **arrays)])[1]


@pytest.mark.parametrize("stage", ["pretrain", "segment"])  # a frame without boxes says where there are none
def test_a_frame_that_knows_nothing_does_not_change_the_loss_of_another(stage):
    """Neither by its labels nor by its number: it has the same points, so that norms see the same values."""
    of = task(stage, "lidar.enabled=false")
    silent = dataclasses.replace(unknown(frame(key=1)), boxes=frame(boxes=0).boxes)
    alone, beside = learn(of, [frame()])[1], learn(of, [frame(), silent])[1]
    assert beside == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("stage", BOTH)
def test_two_hundred_thousand_points(stage):
    of, frames = task(stage), [frame(200_000, reach=4.0)]
    net, loss = learn(of, frames)
    assert np.isfinite(loss)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    answers(of, net, frames)


@pytest.mark.parametrize("stage", BOTH)
def test_beams_cannot_be_thinned_without_their_numbers(stage):
    of = task(stage, "lidar.beams=[0.5]", "lidar.beams_probability=1")
    message = r"frame scene-0*0: its LiDAR points have no beam numbers; pack them with ring, or set lidar\.beams=\[\]"
    with pytest.raises(ValueError, match=message):
        batch(of, [with_sweep(frame(), ring=None)])


@pytest.mark.parametrize(
    ("values", "fits"),
    [([], True), ([0.0, 0.0], True), ([np.nan], True), ([np.nan, np.inf, 200.0], True), ([np.nan, 0.9], False)],
)
def test_the_range_of_intensities_is_judged_by_those_that_are_there(values, fits, monkeypatch):
    of = with_sweep(frame(len(values)), intensity=np.array(values, np.float32))
    reader = SimpleNamespace(frame=lambda *_: of, close=lambda: None)
    monkeypatch.setattr(lidar, "ShardReader", lambda *_: reader)
    manifest = SimpleNamespace(url="data", scenes=[SimpleNamespace(name="s")])
    if fits:
        lidar.check_intensity(manifest, 0, "byte")
    else:
        with pytest.raises(ValueError, match=r"reach 0\.9, but lidar\.intensity is 'byte': set lidar\.intensity=unit"):
            lidar.check_intensity(manifest, 0, "byte")


@pytest.mark.parametrize(
    ("source", "folder", "options", "stage", "intensity"),
    [
        ("nuscenes", "nuscenes", {"scenes": ["scene-9001"]}, "finetune", "byte"),
        ("argoverse2", "argoverse2", {"sweeps": False}, "detect", "byte"),
        ("kitti_object", "kitti_object", {"scenes": ["000000"], "cameras": False}, "detect", "unit"),
    ],
)
def test_real_sweeps(source, folder, options, stage, intensity, shared_data):
    """Boxes that a source gives are of classes that are learned, and its points are in them."""
    made = open_source(source, {"root": str(shared_data / folder), **options})
    first = made.load(made.scene_names()[0]).frames[0]
    of = task(stage, f"lidar.intensity={intensity}", "lidar.beams=[0.5]", "lidar.beams_probability=0.5")
    net, _ = learn(of, [first])
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    boxes = batch(of, [first]).boxes
    assert 0 < len(boxes.boxes) <= len(first.boxes.names)
    assert (boxes.points > 0).all()
    assert boxes.boxes.isfinite().all()
    answers(of, net, [first])
