"""Samples of a refiner: which key-frames a window has, where their voxels are, and what is said where there is none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from occstream.models.batch import Batch
from occstream.pretrain.volumes import VolumeFiller, WindowConfig
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import evaluation_batches
from occstream.sharding.pack import pack
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE, OCC3D
from occstream.sharding.stream import ShardReader, Stream
from tests.evaluation.drives import FREE, GRID, Street, predictions, semantics

AHEAD = VoxelGrid("ahead", (0, -6, -1), (9, 6, 3), (0.5, 0.5, 0.5), "lidar")  # as SemanticKITTI's: nothing behind


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Manifest:
    url = str(tmp_path_factory.mktemp("volumes") / "data")
    base = pack(Street(scenes=2, frames=8), url, groups=("labels",), grid=GRID)
    predictions(url, "pseudo-a")
    return base.with_label_sets(["pseudo-a"])


def filler(config: WindowConfig | None = None, **changes) -> VolumeFiller:
    return VolumeFiller(config or WindowConfig(), "pseudo-a", **{"grid": GRID, "taxonomy": OCC3D, **changes})


def filled(made: VolumeFiller, frame, epoch: int = 0) -> dict[str, np.ndarray]:
    views = {name: np.full(f.shape, 9, f.dtype) for name, f in made.fields().items()}
    made(frame, epoch, views)
    return views


def test_the_clip_is_fixed_and_references_lie_around_it():
    made = filler()
    assert made.config.frames == 6
    assert made.offsets("k", 20, 50, 0) == (-1, 1, 2, -10, 10)
    assert made.offsets("k", 0, 50, 0) == (1, 2, 10), "nothing is repeated where a scene begins"
    assert made.offsets("k", 6, 8, 0) == (-1, 1, -6), "as far as the scene reaches"
    assert made.offsets("k", 0, 1, 0) == ()
    four = filler(WindowConfig(references=4))
    assert four.offsets("k", 20, 50, 0) == (-1, 1, 2, -10, -5, 5, 10)
    assert filler(WindowConfig(references=0)).offsets("k", 20, 50, 0) == (-1, 1, 2)


def test_references_of_training_are_drawn_by_seed_epoch_and_key():
    made, seen = filler(seed=3), set()
    for epoch in range(60):
        near, references = made.offsets("k", 5, 50, epoch)[:3], made.offsets("k", 5, 50, epoch)[3:]
        assert near == (-1, 1, 2)
        assert len(set(references)) == 2
        seen |= set(references)
    assert seen == {o for o in range(-5, 11) if not -1 <= o <= 2}
    assert made.offsets("k", 5, 50, 4) == filler(seed=3).offsets("k", 5, 50, 4)
    draws = {made.offsets(key, 5, 50, epoch) for key in "ab" for epoch in range(3)}
    assert len(draws) > 3
    assert filler(WindowConfig(enabled=False), seed=3).offsets("k", 20, 50, 1) == (-1, 1, 2, -10, 10)


def test_a_clip_without_room_for_references_is_refused():
    with pytest.raises(ValueError, match="radius is 2, must reach beyond the clip"):
        WindowConfig(radius=2)
    assert WindowConfig(radius=0, references=0, before=0, after=0).frames == 1


def test_a_stream_gives_windows_with_the_truth_of_their_pivot(street):
    made = filler()
    plan = evaluation_batches([0, 1], [8, 8], 4, rank=0, world=1)
    noisy, truth = semantics(Manifest.load(street.url).with_sidecar("pseudo-a")), semantics(street)
    reader = ShardReader(street, made.groups)
    with Stream(reader, plan, made.fields(), made, capacity=4, window=made.window) as stream:
        for got in stream:
            batch = Batch.of({name: torch.as_tensor(array) for name, array in got.arrays.items()}, got.keys)
            assert batch.labeled == batch.size
            for i, drawn in enumerate(got.samples):
                key, volumes = got.keys[i], batch.volumes
                offsets = [0, *(made.offsets(key, drawn.frame, 8, 0))]
                places = {0: 0, **{place: o for place, o in enumerate((-1, 1, 2), 1) if o in offsets}}
                places |= dict(enumerate([o for o in offsets if not -1 <= o <= 2], 4))
                assert volumes.exists[i].tolist() == [place in places for place in range(6)]
                for place in range(6):
                    want = IGNORE
                    if place in places:
                        want = noisy[f"street-{drawn.scene}-{drawn.frame + places[place]:04d}"]
                    assert (volumes.classes[i, place].numpy() == want).all()
                assert (batch.occupancy.semantic[i].numpy() == truth[key]).all()
                assert (batch.occupancy.binary[i].numpy() == (truth[key] != FREE)).all()


def test_only_the_predictions_of_neighbors_are_read(street):
    made = filler()
    reader = ShardReader(street, made.groups)
    frame = reader.window(0, 4, made.window)
    assert set(frame.label_sets) == {"labels", "pseudo-a"}
    assert list(frame.window) == [-1, 1, 2, -4, 3]
    assert all(set(near.label_sets) == {"pseudo-a"} for near in frame.window.values())
    assert filler(truth=False).groups == ("pseudo-a",)


def test_predictions_are_read_beside_labels_that_were_attached_too(street):
    """The truth of a refiner may be a sidecar itself."""
    predictions(street.url, "labels-b", wrong=0.0)
    base = Manifest.load(street.url)
    both = base.with_sidecar("labels-b").with_label_sets(["pseudo-a"])
    assert both.groups == ("labels-b", "pseudo-a")
    assert both.fingerprint not in (base.fingerprint, base.with_sidecar("labels-b").fingerprint)
    frame = ShardReader(both, ("labels-b", "pseudo-a")).frame(0, 1)
    assert frame.labels is frame.label_sets["labels-b"]
    want = semantics(base.with_sidecar("pseudo-a"))[frame.key]
    assert (frame.label_sets["pseudo-a"].semantic == want).all()
    assert base.with_label_sets(["pseudo-a"]).with_sidecar("pseudo-a").groups == ("pseudo-a",)


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_poses_put_voxels_where_the_world_has_them(flips):
    """A voxel of a neighbor and the voxel of the pivot that its center falls into are of one class of what stands, on a grid that
    only reaches ahead, in the frame of a turned LiDAR, mirrored or not."""
    source = Street(scenes=1, frames=4, grid=AHEAD, rig=True)
    frames = source.load("street-0").frames
    for each in frames:
        each.label_sets["pseudo-a"] = each.labels
    frames[1].window = {-1: frames[0], 1: frames[2], 2: frames[3]}
    made = filler(WindowConfig(flip_x=flips[0], flip_y=flips[1]), grid=AHEAD, seed=0)
    assert made.groups == ("labels", "pseudo-a", "lidar")
    assert made.window.groups == ("pseudo-a", "lidar")
    for epoch in range(20):
        views = filled(made, frames[1], epoch)
        drawn = views["scene_aug"].diagonal()[:2] < 0
        if tuple(drawn.tolist()) == flips:
            break
    assert tuple(drawn.tolist()) == flips
    middle = (np.asarray(AHEAD.lower) + AHEAD.upper) / 2
    for place in (1, 2, 3):
        moved = apply(views["volumes.to_pivot"][place].astype(np.float64), AHEAD.centers() - middle) + middle
        index, inside = AHEAD.to_index(moved)
        said = views["volumes.classes"][place][inside]
        there = views["occupancy.semantic"][tuple(index[inside].T)]
        # The world is of pieces larger than a voxel: surfaces alone may fall into a neighbor.
        assert (said == there).mean() > 0.85
    assert views["volumes.exists"].tolist() == [True] * 4 + [False] * 2
    assert (views["volumes.to_pivot"][4] == np.eye(4)).all()
    assert np.allclose(views["volumes.to_pivot"][0], np.eye(4), atol=1e-6)


def test_second_classes_and_how_sure_they_were():
    frame = Street(scenes=1, frames=1).load("street-0").frames[0]
    labels = frame.labels
    count = int(labels.binary.sum())
    ranked = np.stack([labels.semantic[labels.binary], np.full(count, FREE, np.uint8)], 1)
    logits = np.tile(np.float16([0.0, -1.0]), (count, 1))
    frame.label_sets["pseudo-a"] = dataclasses.replace(labels, logits=logits, ranked=ranked)
    views = filled(filler(WindowConfig(soft=True)), frame)
    second, confidence = (views[f"volumes.{name}"] for name in ("second", "confidence"))
    assert (second[0][labels.binary] == FREE).all()
    assert (confidence[0][labels.binary] == round(255 / (1 + np.exp(-1)))).all()
    assert (second[0][~labels.binary] == IGNORE).all()
    assert (confidence[0][~labels.binary] == 255).all()
    assert (second[1:] == IGNORE).all()
    assert (confidence[1:] == 0).all()
    frame.label_sets["pseudo-a"] = labels
    with pytest.raises(ValueError, match="pseudo-a has no second classes; predict with --keep top2"):
        filled(filler(WindowConfig(soft=True)), frame)


def test_what_the_labels_do_not_know_does_not_count():
    frame = Street(scenes=1, frames=1).load("street-0").frames[0]
    frame.label_sets["pseudo-a"] = frame.labels
    camera = frame.labels.mask_camera
    views = filled(filler(mask="camera"), frame)
    assert (views["occupancy.binary_valid"] == camera).all()
    assert (views["occupancy.semantic"][~camera] == IGNORE).all()
    arrays = {name: value[None] for name, value in views.items()}
    filler().invalidate(arrays, 0)
    assert not arrays["occupancy.binary_valid"].any()
    assert (arrays["occupancy.semantic"] == IGNORE).all()


def test_what_cannot_be_refined_is_named():
    frame = Street(scenes=1, frames=1).load("street-0").frames[0]
    with pytest.raises(ValueError, match="street-0-0000: pseudo-a has no classes of it to refine"):
        filled(filler(), frame)
    frame.label_sets["pseudo-a"] = frame.labels
    with pytest.raises(ValueError, match="pseudo-a are"):
        filled(
            filler(grid=AHEAD, truth=False, mask="none"),
            dataclasses.replace(frame, lidar=Street(rig=True).load("street-0").frames[0].lidar),
        )
    bare = dataclasses.replace(frame, labels=dataclasses.replace(frame.labels, mask_lidar=None))
    with pytest.raises(ValueError, match="has no lidar mask"):
        filled(filler(mask="lidar"), bare)
    with pytest.raises(ValueError, match="has no ego pose"):
        filled(filler(), dataclasses.replace(frame, ego_to_global=None))
