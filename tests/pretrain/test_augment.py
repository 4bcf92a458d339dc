"""Augmentation: pixels and matrices tell the same story, and draws depend on nothing but their keys."""

import dataclasses

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from occstream.models import Batch
from occstream.models.lift import project
from occstream.pretrain.augment import AugmentConfig, flip_matrix, flip_voxels, image_affine, warp_jpeg
from occstream.pretrain.samples import FrameFiller
from occstream.sharding.codec import IncompleteSample
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.order import generator
from occstream.sharding.schema import OCC3D
from occstream.sharding.sources import open_source

CONFIG = AugmentConfig(image_size=(64, 176))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("source", [(352, 198), (1408, 792)])
def test_a_blob_lands_where_the_affine_says(seed, source):
    """Also where the decoder shrinks first (4 times for the large image)."""
    width, height = source
    rng = np.random.default_rng(seed)
    affine = image_affine(rng, source, CONFIG)
    inverse = np.linalg.inv(np.vstack([affine, [0, 0, 1]]))
    target = np.array([88 + rng.uniform(-40, 40), 32 + rng.uniform(-15, 15)])
    x, y = (inverse @ [*target, 1])[:2]
    image = np.zeros((height, width), np.float32)
    yy, xx = np.mgrid[:height, :width]
    sigma = 3.0 * width / 176
    image = 250 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2))
    jpeg = simplejpeg.encode_jpeg(np.repeat(image[..., None], 3, 2).astype(np.uint8), quality=98)
    out = np.zeros((3, 64, 176), np.uint8)
    warp_jpeg(jpeg, source, affine, out)
    weight = out[0].astype(float)
    vv, uu = np.mgrid[:64, :176]
    found = np.array([(uu * weight).sum(), (vv * weight).sum()]) / weight.sum()
    assert np.abs(found - target).max() < 0.15


def test_evaluation_takes_the_centre_without_jitter():
    affine = image_affine(None, (352, 198), CONFIG)
    # Scaled by one half, bottom kept: the last source row maps to the last row.
    np.testing.assert_allclose(affine @ [351.5 - 1, 197.5 - 1, 1], [175 - 0.25 - 0.0, 63 - 0.25], atol=0.3)
    assert np.allclose(affine, image_affine(None, (352, 198), CONFIG))


def test_draws_depend_on_seed_epoch_and_key_only():
    def draw(*keys):
        return image_affine(generator(*keys), (352, 198), CONFIG)

    assert np.array_equal(draw(0, 3, "a-0001"), draw(0, 3, "a-0001"))
    for other in ((1, 3, "a-0001"), (0, 4, "a-0001"), (0, 3, "a-0002")):
        assert not np.array_equal(draw(0, 3, "a-0001"), draw(*other))


def test_flips_reverse_labels_and_geometry_alike():
    labels = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    grid = VoxelGrid("g", (-1, -1.5, 0), (1, 1.5, 4), (1, 1, 1))
    for flips in ((True, False), (False, True), (True, True)):
        mirrored = flip_voxels(labels, flips)
        centers = grid.centers() @ flip_matrix(flips).T.astype(float)
        index, inside = grid.to_index(centers)
        assert inside.all()
        # What was at voxel v is now where scene_aug takes the center of v.
        assert (mirrored[tuple(index.reshape(-1, 3).T)] == labels.reshape(-1)).all()


@pytest.fixture(scope="module")
def frame():
    source = open_source("synthetic", {"scenes": 1, "frames": 1, "image_size": (64, 176), "grid": "tiny"})
    return source.load(source.scene_names()[0]).frames[0]


def views_of(filler):
    return {name: np.zeros(shape, dtype) for name, (shape, dtype, _) in filler.fields().items()}


def filler_for(frame, **settings):
    options = {"mask": "camera", **settings}
    return FrameFiller(CONFIG, tuple(frame.cameras), get_grid("tiny"), OCC3D, seed=0, **{"train": True, **options})


def test_filler_masks_labels_and_is_the_same_every_time(frame):
    filler = filler_for(frame)
    a, b = views_of(filler), views_of(filler)
    filler(frame, 2, a)
    filler(frame, 2, b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert (a["occupancy.semantic"][~a["occupancy.binary_valid"]] == 255).all()
    assert a["occupancy.binary_valid"].mean() == pytest.approx(frame.labels.mask_camera.mean())
    filler(frame, 3, b)
    assert not np.array_equal(a["cameras.images"], b["cameras.images"])


def test_binary_target_from_semantic_labels(frame):
    from_semantic, plain = filler_for(frame, binary_from="semantic", train=False), filler_for(frame, train=False)
    a, b = views_of(from_semantic), views_of(plain)
    from_semantic(frame, 0, a)
    plain(frame, 0, b)
    np.testing.assert_array_equal(a["occupancy.binary"], b["occupancy.binary"])


def test_missing_parts_are_named(frame):
    filler = FrameFiller(CONFIG, ("CAM_TOP",), get_grid("tiny"), OCC3D, seed=0, train=True)
    with pytest.raises(IncompleteSample, match="camera CAM_TOP is missing"):  # replaced by the stream
        filler(frame, 0, views_of(filler))
    lopsided = VoxelGrid("lopsided", (0, -8, -1), (16, 8, 3), (1, 1, 1))
    with pytest.raises(ValueError, match=r"set augment\.flip_x=false"):
        FrameFiller(CONFIG, ("CAM_FRONT",), lopsided, OCC3D, seed=0, train=True)
    assert cv2.getNumThreads() == 1


def test_depth_maps_hold_the_nearest_point_where_the_image_shows_it():
    """Points of a sweep, projected by the batch's own geometry, fall into the cells that have a depth."""
    source = open_source("synthetic", {"scenes": 1, "frames": 2, "image_size": [64, 176], "grid": "tiny"})
    frame = source.load(source.scene_names()[0]).frames[1]
    cameras = tuple(frame.cameras)
    filler = FrameFiller(CONFIG, cameras, get_grid("tiny"), OCC3D, seed=3, train=True, depth_cell=8)
    assert filler.needs_lidar
    arrays = {n: np.zeros((1, *shape), dtype) for n, (shape, dtype, _) in filler.fields().items()}
    assert arrays["cameras.depth"].shape == (1, len(cameras), 8, 22)
    filler(frame, 0, {n: a[0] for n, a in arrays.items()})
    assert (arrays["cameras.depth"] > 0).mean() > 0.2
    batch = Batch.of({n: torch.from_numpy(a) for n, a in arrays.items()})
    ego = frame.lidar.xyz @ frame.lidar.sensor_to_ego[:3, :3].T + frame.lidar.sensor_to_ego[:3, 3]
    points = torch.from_numpy(ego).float() @ batch.scene_aug[0].mT
    [(pixels, depth)] = project([points], batch)
    for view in range(len(cameras)):
        seen = (depth[view] > 0.1) & ((pixels[view] >= 0) & (pixels[view] < torch.tensor([175, 63]))).all(-1)
        cells = (pixels[view][seen] / 8 + 1e-4).long()
        nearest = batch.cameras.depth[0, view][cells[:, 1], cells[:, 0]]
        close = (nearest > 0) & (nearest <= depth[view][seen] + 0.05)
        assert close.float().mean() > 0.9, "pixels at the border of two cells may differ by rounding"


def test_a_frame_before_without_a_sweep_is_named():
    source = open_source("synthetic", {"scenes": 1, "frames": 2, "image_size": [64, 176], "grid": "tiny"})
    before, frame = source.load(source.scene_names()[0]).frames
    frame.window[-1] = dataclasses.replace(before, lidar=None)
    filler = filler_for(frame, depth_cell=8, history=1, mask="auto")
    with pytest.raises(ValueError, match=rf"frame {before.key} has no LiDAR sweep, which .*; pack the lidar group"):
        filler(frame, 0, views_of(filler))


def test_labels_in_the_frame_of_the_lidar_move_the_cameras_there():
    source = open_source("synthetic", {"scenes": 1, "frames": 1, "image_size": [64, 176], "grid": "tiny"})
    frame = source.load(source.scene_names()[0]).frames[0]
    found = []
    for where in ("ego", "lidar"):
        grid = dataclasses.replace(get_grid("tiny"), frame=where)
        filler = FrameFiller(CONFIG, tuple(frame.cameras), grid, OCC3D, seed=3, train=False, semantic=False)
        assert filler.needs_lidar == (where == "lidar")
        arrays = {n: np.zeros(shape, dtype) for n, (shape, dtype, _) in filler.fields().items()}
        filler(frame, 0, arrays)
        found.append(arrays["cameras.camera_to_ego"])
    np.testing.assert_allclose(frame.lidar.sensor_to_ego @ found[1], found[0], atol=1e-5)


def test_frames_before_are_further_views_of_what_stands_still():
    """A voxel that a camera sees in the frame before is where its view of now says it is."""
    source = open_source(
        "synthetic", {"scenes": 3, "frames": 3, "image_size": [64, 176], "grid": "tiny", "lidar": False}
    )
    frames = max((source.load(n).frames for n in source.scene_names()), key=lambda f: np.ptp(f[0].ego_to_global[:2, 3]))
    old, frame = frames[1], frames[2]
    cameras = tuple(frame.cameras)
    frame.window = {-1: old, -2: frames[0]}
    plain, wide = filler_for(frame, mask="none"), filler_for(frame, mask="none", history=1)
    now, both = views_of(plain), views_of(wide)
    plain(frame, 1, now)
    wide(frame, 1, both)
    assert len(both["cameras.images"]) == 2 * len(cameras), "one frame of the two"
    np.testing.assert_array_equal(both["cameras.images"][: len(cameras)], now["cameras.images"])
    alone = views_of(filler_for(old, train=False, mask="none"))
    filler_for(old, train=False, mask="none")(old, 0, alone)
    still = views_of(filler_for(frame, train=False, mask="none", history=1))
    filler_for(frame, train=False, mask="none", history=1)(frame, 0, still)
    point = np.append(np.random.default_rng(0).uniform(-15, 15, 3), 1)
    before = np.linalg.inv(old.ego_to_global) @ frame.ego_to_global @ point  # the same place in the old ego frame
    for i in range(len(cameras)):
        seen = np.linalg.inv(still["cameras.camera_to_ego"][len(cameras) + i]) @ point
        expected = np.linalg.inv(alone["cameras.camera_to_ego"][i]) @ before
        np.testing.assert_allclose(seen, expected, atol=1e-3)
        np.testing.assert_array_equal(still["cameras.images"][len(cameras) + i], alone["cameras.images"][i])


def test_frames_before_are_augmented_as_their_camera_is_now():
    """One draw for each camera and sample, as if there were no frames before."""
    source = open_source(
        "synthetic", {"scenes": 1, "frames": 3, "image_size": [64, 176], "grid": "tiny", "lidar": False}
    )
    first, second, frame = source.load(source.scene_names()[0]).frames
    frame.window = {-1: second, -2: first}
    alone, wide = filler_for(frame, mask="none"), filler_for(frame, mask="none", history=2)
    now, all_views = views_of(alone), views_of(wide)
    alone(frame, 1, now)
    wide(frame, 1, all_views)
    for name in ("cameras.post_rot", "cameras.post_tran"):
        for past in range(3):
            np.testing.assert_array_equal(all_views[name].reshape(3, -1, *now[name].shape[1:])[past], now[name])
    assert len(np.unique(now["cameras.post_tran"], axis=0)) == len(frame.cameras), "each camera has its own"
    np.testing.assert_array_equal(all_views["scene_aug"], now["scene_aug"])
