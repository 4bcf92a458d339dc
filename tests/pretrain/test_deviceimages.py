"""Images that the device decodes, against those of the reader threads; nvImageCodec runs on the CPU here."""

import dataclasses

import numpy as np
import pytest
import simplejpeg
import torch

from occstream.pretrain.augment import AugmentConfig, image_affine, shrink_factor, warp_jpeg
from occstream.pretrain.config import load_config
from occstream.pretrain.deviceimages import DeviceImages, warp
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from occstream.sharding.schema import Camera
from occstream.sharding.sources import open_source
from occstream.sharding.stream import StreamBatch
from tests.pretrain.small import RECIPE, pack_small

CONFIG = AugmentConfig(image_size=(64, 176))
CPU = torch.device("cpu")


def rendered(height, width):
    source = open_source(
        "synthetic", {"scenes": 1, "frames": 1, "image_size": (height, width), "grid": "tiny", "lidar": False}
    )
    return source.load(source.scene_names()[0]).frames[0].cameras["CAM_FRONT"].jpeg


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "factor"), [(180, 101, 1), (352, 198, 2), (1401, 789, 8)])
def test_warping_is_that_of_the_readers(width, height, factor):
    """Enlarged, halved and shrunk eightfold by the decoder; odd sizes, mirrored, rotated, cropped and black outside."""
    jpeg = rendered(height, width)
    image = torch.from_numpy(simplejpeg.decode_jpeg(jpeg, "RGB").copy()).permute(2, 0, 1)
    config = dataclasses.replace(CONFIG, resize=(-0.136, 0.0), resize_relative=True)
    affines = np.stack([image_affine(np.random.default_rng(s), (width, height), config) for s in range(6)])
    factors = [shrink_factor(a) for a in affines]
    assert factor in factors
    for affine, by in zip(affines, factors):
        expected = np.zeros((3, 64, 176), np.uint8)
        warp_jpeg(jpeg, (width, height), affine, expected)
        found = warp(image[None], affine[None], by, (64, 176))[0].numpy()
        gap = np.abs(found.astype(int) - expected)
        assert gap.mean() < (0.7 if by == 1 else 2.5), (
            "OpenCV weighs by 32nds; the decoder's own shrinking is no plain mean"
        )
        assert (found.max(0) == 0).sum() == pytest.approx((expected.max(0) == 0).sum(), abs=30)


def test_warping_by_whole_pixels_is_exact():
    image = torch.randint(0, 256, (2, 3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shift = np.array([[1, 0, -4], [0, 1, -7]], float)
    assert torch.equal(warp(image, np.stack([shift, shift]), 1, (10, 16)), image[:, :, 7:17, 4:20])
    blocks = warp(image, np.stack([np.array([[0.5, 0, -0.25], [0, 0.5, -0.25]])] * 2), 2, (10, 15))
    means = image.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (blocks - means).abs().max() <= 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("nvidia.nvimgcodec")
    url = str(tmp_path_factory.mktemp("device-images") / "data")
    pack_small(url, scenes=6)
    return url


def batches(url, decoder, *words, count=4):
    config = load_config(RECIPE, [f"data.url={url}", f"train.decoder={decoder}", *words], stage="finetune")
    feed = TrainData(config, World(0, 1, CPU))
    try:
        return [feed.next().clone() for _ in range(count)]
    finally:
        feed.close()


@pytest.mark.parametrize("words", [(), ("data.history=1",), ("train.threads=0",)])
def test_a_stream_gives_the_same_batches(data, words):
    for mine, theirs in zip(batches(data, "nvimagecodec", *words), batches(data, "cpu", *words), strict=True):
        assert mine.keys == theirs.keys
        assert mine.cameras.images.shape == theirs.cameras.images.shape
        assert (mine.cameras.images.int() - theirs.cameras.images).abs().float().mean() < 1
        for name in ("intrinsics", "camera_to_ego", "post_rot", "post_tran"):
            assert torch.equal(getattr(mine.cameras, name), getattr(theirs.cameras, name)), name
        for name in ("semantic", "binary_valid"):
            assert torch.equal(getattr(mine.occupancy, name), getattr(theirs.occupancy, name)), name


def stored(jpeg, size=(352, 198)):
    return [("frame s-0003, CAM_FRONT", Camera(jpeg, *size, np.eye(3), np.eye(4), np.eye(4), 0))]


def completed(*samples):
    n = len(samples)
    arrays = {
        "cameras.post_rot": np.tile(np.eye(3, dtype=np.float32), (n, 1, 1, 1)),
        "cameras.post_tran": np.zeros((n, 1, 3), np.float32),
    }
    batch = StreamBatch(arrays | {"cameras.intrinsics": np.zeros((n, 1, 3, 3))}, [], [], {}, list(samples))
    DeviceImages((64, 176), CPU, 1)(batch)
    return batch.made["cameras.images"]


def test_empty_shares_and_damage():
    pytest.importorskip("nvidia.nvimgcodec")
    assert completed().shape == (0, 1, 3, 64, 176)
    jpeg = rendered(198, 352)
    assert np.array_equal(
        completed(stored(jpeg))[0, 0].permute(1, 2, 0), simplejpeg.decode_jpeg(jpeg, "RGB")[:64, :176]
    )
    with pytest.raises(ValueError, match=r"frame s-0003, CAM_FRONT: nvImageCodec cannot decode its JPEG"):
        completed(stored(jpeg[:4] + b"\xff\xd8" * 100))
    with pytest.raises(ValueError, match=r"CAM_FRONT: image has 352x198 pixels, its metadata says 400x198"):
        completed(stored(jpeg, (400, 198)))


def test_without_it_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.nvimgcodec", None)
    monkeypatch.setitem(__import__("sys").modules, "nvidia", None)
    with pytest.raises(ImportError, match=r"pip install 'occstream\[jpeg\]', or set train.decoder=cpu"):
        DeviceImages((64, 176), CPU, 1)
