"""Lenses against themselves, against OpenCV, and rectified images against what a pinhole would have taken."""

import dataclasses
import hashlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from occstream.sharding.codec import encode
from occstream.sharding.lenses import BrownConrady, FTheta, KannalaBrandt, Pinhole, View, default_view, lens_of
from occstream.sharding.pack import pack
from occstream.sharding.prepare import Images, rectify
from occstream.sharding.schema import Camera, Frame, Scene
from tests.sharding.toy import ToySource, toy_frame

W, H = 160, 90
NUPLAN = (-0.356123, 0.172545, -0.00213, 0.000464, -0.05231)
LENSES = {
    "pinhole": Pinhole(W, H, (129.0, 129.0), (80.2, 43.1)),
    "nuplan": BrownConrady(W, H, (129.0, 129.0), (80.2, 43.1), NUPLAN),
    "rational": BrownConrady(W, H, (100.0, 101.0), (79.0, 45.0), (0.3, 0.05, 1e-3, -1e-3, 0.01, 0.6, 0.1, 0.01)),
    "ftheta": FTheta(W, H, (79.0, 44.0), (0.0, 76.0, 1.5, -2.0), None, 1.3, (1.001, 2e-3, -1e-3)),
    "ftheta-backward": FTheta(W, H, (79.0, 44.0), None, (0.0, 1 / 76, 1e-6, 2e-8), 1.3),
    "fisheye": KannalaBrandt(W, H, (76.0, 76.5), (79.3, 44.6), (0.02, -0.01, 0.003, -0.0005)),
}


def _grid(lens, step=7):
    u, v = np.meshgrid(np.arange(0, lens.width, step), np.arange(0, lens.height, step))
    return np.stack([u.ravel(), v.ravel()], 1).astype(np.float64)


def _round_trip(lens):
    pixels = _grid(lens)
    rays = lens.rays(pixels)
    there = np.isfinite(rays).all(1)
    np.testing.assert_allclose(np.linalg.norm(rays[there], axis=1), 1, atol=1e-12)
    back, seen = lens.pixels(rays[there])
    assert seen.all()
    np.testing.assert_allclose(back, pixels[there], atol=1e-6)
    return there


@pytest.mark.parametrize("name", LENSES)
def test_pixels_of_rays_of_pixels(name):
    assert _round_trip(LENSES[name]).all()


@given(
    k1=st.floats(-0.4, 0.3), k2=st.floats(-0.1, 0.2), p1=st.floats(-0.003, 0.003), p2=st.floats(-0.003, 0.003),
    k3=st.floats(-0.06, 0.05), focal=st.floats(90, 400),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_brown_conrady_round_trip(k1, k2, p1, p2, k3, focal):
    lens = BrownConrady(W, H, (focal, focal), (80.0, 45.0), (k1, k2, p1, p2, k3))
    assert _round_trip(lens)[len(_grid(lens)) // 2]


@given(a=st.floats(60, 120), b=st.floats(-5, 5), c=st.floats(-4, 4), d=st.floats(-0.01, 0.01))
@settings(max_examples=40, deadline=None)
def test_ftheta_and_fisheye_round_trip(a, b, c, d):
    assert _round_trip(FTheta(W, H, (80.0, 45.0), (0.0, a, b, c), None, 1.2, (1 + d, d, -d))).any()
    assert _round_trip(KannalaBrandt(W, H, (a, a), (80.0, 45.0), (d, b / 100, c / 100, d))).any()


@pytest.mark.parametrize("name", ["nuplan", "rational", "fisheye"])
def test_as_opencv_has_it(name):
    lens = LENSES[name]
    rays = np.random.default_rng(0).uniform([-0.5, -0.3, 1], [0.5, 0.3, 1], (200, 3))
    k = default_view(lens).intrinsics
    if name == "fisheye":
        want, _ = cv2.fisheye.projectPoints(rays[:, None], np.zeros(3), np.zeros(3), k, np.array(lens.coefficients))
    else:
        want, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), k, np.array(lens.coefficients))
    np.testing.assert_allclose(lens.pixels(rays)[0], want.reshape(-1, 2), atol=1e-9)


def test_ftheta_on_its_axis_and_beyond_its_edge():
    lens = LENSES["ftheta"]
    pixels, seen = lens.pixels(np.array([[0.0, 0, 1], [1e-12, 0, 1], [1, 0, 0], [0, 0, -1]]))
    np.testing.assert_allclose(pixels[:2], [[79, 44]] * 2, atol=1e-9)
    assert seen.tolist() == [True, True, False, False]
    backward = dataclasses.replace(lens, forward=None, backward=(0.0, 1 / 76))
    assert backward.focal == pytest.approx((76 * 1.001, 76))


def test_rays_that_the_polynomial_folds_back_are_not_seen():
    lens = LENSES["nuplan"]
    rays = np.stack([np.linspace(lens.reach + 0.01, 3, 500), np.zeros(500), np.ones(500)], 1)
    pixels, seen = lens.pixels(rays)
    assert ((pixels[:, 0] > 0) & (pixels[:, 0] < W)).any()  # the formula puts them onto the image
    assert not seen.any()


def test_a_calibration_in_opencv_terms():
    k = np.array([[50.0, 0, 31.5], [0, 51, 23.5], [0, 0, 1]])
    assert lens_of(64, 48, k, None) is None
    assert lens_of(64, 48, k, np.zeros(5)) is None
    assert lens_of(64, 48, k, np.array([[-0.3, 0.1, 0, 0, 0.02]])) == BrownConrady(
        64, 48, (50.0, 51.0), (31.5, 23.5), (-0.3, 0.1, 0.0, 0.0, 0.02)
    )
    with pytest.raises(ValueError, match="3 coefficients of distortion: give 4, 5 or 8"):
        lens_of(64, 48, k, np.array([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="not finite"):
        lens_of(64, 48, k, np.array([0.1, np.nan, 0, 0]))


def room(rays):
    """(N, 3) colors 0..255 of a room of 10 x 6 x 16 m with tiles of 2 m, seen from inside by rays in camera axes."""
    half = np.array([5.0, 3.0, 8.0])
    with np.errstate(divide="ignore"):
        reach = half / np.abs(rays)
    wall = reach.argmin(1)
    at = rays * reach.min(1)[:, None]
    tiles = (np.floor(at / 2.0 + 1e-6 + 100).astype(int) * (np.arange(3) != wall[:, None])).sum(1) % 2
    base = np.array([[200, 90, 60], [70, 160, 90], [80, 110, 210]])[wall]
    return base * (0.45 + 0.55 * tiles[:, None]) + 12 * np.sin(at[:, [2, 0, 1]])


def taken(lens, over=3):
    """(H, W, 3) uint8 of the room through a lens, several rays a pixel."""
    steps = (np.arange(over) - (over - 1) / 2) / over
    u, v = np.meshgrid(np.arange(lens.width), np.arange(lens.height))
    total = np.zeros((lens.height * lens.width, 3))
    for du in steps:
        for dv in steps:
            rays = lens.rays(np.stack([u.ravel() + du, v.ravel() + dv], 1))
            total += np.where(np.isfinite(rays).all(1)[:, None], room(np.nan_to_num(rays, nan=1.0)), 0)
    return np.clip(total / over**2, 0, 255).round().astype(np.uint8).reshape(lens.height, lens.width, 3)


class Turned:
    """A pinhole's rays in the axes of the camera that its view is turned against."""

    def __init__(self, view):
        self.width, self.height, self.view = view.width, view.height, view

    def rays(self, pixels):
        v = self.view
        return Pinhole(v.width, v.height, v.focal, v.center).rays(pixels) @ v.to_camera.T


def raw(lens, image, **more):
    k = default_view(lens).intrinsics
    return Camera(b"", lens.width, lens.height, k, np.eye(4), np.eye(4), 0, image=image, lens=lens, **more)


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize("yaw", [0, 12])
def test_rectified_is_what_a_pinhole_takes(name, yaw):
    """By values and by edges: shifted by one pixel the picture fits far worse, and the raw one does not fit at all."""
    lens = LENSES[name]
    view = dataclasses.replace(default_view(lens), yaw=yaw, pitch=yaw / 4)
    source = taken(lens)
    made, want = rectify(raw(lens, source), view).image.astype(float), taken(Turned(view)).astype(float)
    seen = (made > 0).any(2)
    assert seen.mean() > 0.6

    def psnr(image):
        return 10 * np.log10(255**2 / max(1e-9, np.mean((image[seen] - want[seen]) ** 2)))

    assert psnr(made) > 27
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        assert psnr(np.roll(made, shift, (0, 1))) < psnr(made) - 3
    if yaw or name != "pinhole":
        assert psnr(source) < psnr(made) - 5


def test_view_is_a_rotation_about_the_optical_center():
    """A point at any depth has the same pixel by the raw lens and the map as by the rectified camera's own numbers."""
    lens = LENSES["ftheta"]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], [1.5, 0.2, 1.6]
    image = np.zeros((H, W, 3), np.uint8)
    camera = dataclasses.replace(raw(lens, image), sensor_to_ego=pose)
    view = View(100, 60, (70.0, 70.0), (49.5, 29.5), yaw=20, pitch=-5)
    made = rectify(camera, view)
    assert (made.lens, made.distortion, made.jpeg, made.image.shape) == (None, None, b"", (60, 100, 3))
    np.testing.assert_allclose(made.sensor_to_ego[:3, 3], pose[:3, 3])
    np.testing.assert_allclose(made.sensor_to_ego[:3, :3] @ made.sensor_to_ego[:3, :3].T, np.eye(3), atol=1e-9)
    points = pose[:3, 3] + np.array(
        [[3.0, 1.2, -0.1], [30.0, 14.0, -3.0], [8.0, 3, 0.2]]
    )  # ego axes, ahead to the left
    local = (points - pose[:3, 3]) @ made.sensor_to_ego[:3, :3]
    pixels = local @ made.intrinsics.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    assert ((pixels > 0) & (pixels < [99, 59])).all()
    rays = view.rays().reshape(60, 100, 3)
    for (u, v), point in zip(pixels, points):
        low = np.floor([u, v]).astype(int)
        part = np.array([u, v]) - low
        corner = rays[low[1], low[0]], rays[low[1], low[0] + 1], rays[low[1] + 1, low[0]]
        ray = corner[0] + part[0] * (corner[1] - corner[0]) + part[1] * (corner[2] - corner[0])
        by_map, _ = lens.pixels(ray[None])
        by_lens, _ = lens.pixels(((point - pose[:3, 3]) @ pose[:3, :3])[None])
        np.testing.assert_allclose(by_map, by_lens, atol=1e-6)


def test_fine_stripes_do_not_alias():
    """A view that is four times coarser than the image must average, not pick."""
    lens = Pinhole(640, 360, (500.0, 500.0), (319.5, 179.5))
    stripes = np.zeros((360, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    made = rectify(raw(lens, stripes), View(160, 90, (125.0, 125.0), (79.5, 44.5)))
    inner = made.image[5:-5, 5:-5].astype(float)
    assert abs(inner.mean() - 127.5) < 6
    assert inner.std() < 25


def test_bytes_of_a_rectified_image_are_the_same_everywhere():
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3)).astype(np.uint8)
    digest = hashlib.sha256()
    for name in ("nuplan", "ftheta", "fisheye"):
        digest.update(
            rectify(raw(LENSES[name], image), View(96, 54, (80.0, 80.0), (47.5, 26.5), yaw=10)).image.tobytes()
        )
    assert digest.hexdigest()[:16] == "e0534971fdabf652"


def distorted(frame: Frame, **more) -> Frame:
    camera = frame.cameras["CAM_A"]
    lens = BrownConrady(24, 16, (20.0, 20.0), (11.5, 7.5), (0.15, 0.02, 0.001, 0.0))
    return dataclasses.replace(frame, cameras={"CAM_A": dataclasses.replace(camera, lens=lens, **more)})


class Distorted(ToySource):
    views = ()

    def load(self, name: str) -> Scene:
        scene = super().load(name)
        return Scene(name, [distorted(f, views=self.views) for f in scene.frames], scene.attributes)


def test_shards_hold_pinholes_only(tmp_path):
    frame = distorted(toy_frame("a", 0))
    with pytest.raises(ValueError, match="frame a-0000, CAM_A: has a distorting lens, and shards hold pinholes only"):
        encode(frame, "cameras")
    old = dataclasses.replace(toy_frame("a", 0).cameras["CAM_A"], distortion=(0.1, 0.0))
    with pytest.raises(ValueError, match="shards hold pinholes only"):
        encode(dataclasses.replace(frame, cameras={"CAM_A": old}), "cameras")
    made = Images()(frame).cameras["CAM_A"]
    assert (made.lens, made.image, made.width, made.height) == (None, None, 24, 16)
    assert made.jpeg != frame.cameras["CAM_A"].jpeg
    small = Images(short_side=16, quality=95)(frame).cameras["CAM_A"]
    assert simplejpeg.decode_jpeg(small.jpeg).shape == (16, 24, 3)


def test_packing_rectifies_names_the_black_share_and_limits_it(tmp_path):
    from occstream.sharding.check import verify
    from occstream.sharding.datacard import black_shares, data_card

    source = Distorted((2,))
    manifest = pack(source, str(tmp_path / "a"))
    assert verify(str(tmp_path / "a")) == []
    [share] = black_shares(manifest.scenes).values()
    assert 0 < share < 0.1
    assert data_card(manifest)["black_share"] == pytest.approx(100 * share)
    with pytest.raises(ValueError, match=r"toy-0-0000, CAM_A: .* % of the rectified image lie outside .* --max-black"):
        pack(source, str(tmp_path / "b"), images=Images(max_black=share / 2))


def test_two_views_of_one_camera(tmp_path):
    class Two(Distorted):
        views = (
            View(20, 12, (30.0, 30.0), (9.5, 5.5), yaw=10, name="_L"),
            View(20, 12, (30.0, 30.0), (9.5, 5.5), yaw=-10, name="_R"),
        )

    scene = Images().aim(Two((1,)).load("toy-0"))
    assert list(scene.frames[0].cameras) == ["CAM_A_L", "CAM_A_R"]  # labels see the views that the images will have
    assert scene.frames[0].cameras["CAM_A_L"].width == 20
    frame = Images(cameras=("CAM_A_R",))(scene.frames[0])
    assert list(frame.cameras) == ["CAM_A_R"]
    assert simplejpeg.decode_jpeg(frame.cameras["CAM_A_R"].jpeg).shape == (12, 20, 3)


def test_verify_flags_shards_that_carry_a_distortion(tmp_path, monkeypatch):
    from occstream.sharding import check

    pack(ToySource((1,)), str(tmp_path / "a"))
    decode = check.decode

    def old(groups):
        frame = decode(groups)
        frame.cameras["CAM_A"].distortion = (-0.356, 0.17)
        return frame

    monkeypatch.setattr(check, "decode", old)
    [problem] = check.verify(str(tmp_path / "a"))
    assert "CAM_A: image is distorted (coefficients -0.356, 0.17)" in problem
    assert "pack the data set again" in problem
