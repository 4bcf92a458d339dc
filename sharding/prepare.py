"""What is done to a frame's cameras before it is packed: lenses are taken out, some cameras chosen, images shrunk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg

from occstream.sharding.lenses import Lens, View, default_view
from occstream.sharding.poses import compose
from occstream.sharding.schema import Camera, Frame, Scene

DENSEST = (
    1.3  # source pixels a pixel of a view at most; denser images are shrunk first, or fine structures would flicker
)
FINE = 32  # maps are rounded to this many parts of a pixel, which makes them the same on every processor
KEPT_MAPS = 16  # a rig's cameras; one of 1920 x 1080 pixels takes 15 MB


@dataclass
class Aimed(Camera):
    """A camera that has the calibration of one of its views, but still the raw image and the lens it was taken with."""

    view: View | None = None


@dataclass(frozen=True)
class Images:
    """Choices about images at packing.

    Attributes:
        short_side: pixels; larger images are shrunk so that their shorter side has this many. 0: stored unchanged.
        quality: of the JPEGs of images that are shrunk or rectified, 1..100.
        cameras: names of the cameras to keep; empty: all.
        max_black: share 0..1 of a rectified image that may lie outside what the lens saw; such pixels are black.

    Raises:
        ValueError: a value is out of range.
    """

    short_side: int = 0
    quality: int = 90
    cameras: tuple[str, ...] = ()
    max_black: float = 0.1

    def __post_init__(self) -> None:
        if self.short_side < 0 or 0 < self.short_side < 16:
            raise ValueError(f"short side {self.short_side} must be 0 (as they are) or at least 16 pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality} is out of range 1..100")
        if not 0 <= self.max_black <= 1:
            raise ValueError(f"share of black pixels {self.max_black} is out of range 0..1")

    def aim(self, scene: Scene) -> Scene:
        """The scene with the calibration that its cameras will have once they are rectified; images are still raw.

        Labels are made with it, so that their camera masks fit the images. ``attributes["rectified"]`` gets the largest
        share of black pixels by camera.

        Raises:
            ValueError: no frame has a chosen camera, or more of an image than ``max_black`` would be black.
        """
        black: dict[str, float] = {}
        frames = []
        rig = dict.fromkeys(n for f in scene.frames for name, c in f.cameras.items() for n, _ in _aimed(name, c))
        if rig and (missing := [name for name in self.cameras if name not in rig]):
            raise ValueError(f"scene {scene.name} has no camera {missing[0]!r}, only {', '.join(rig)}")
        for frame in scene.frames:
            cameras = {}
            for name, camera in frame.cameras.items():
                for view_name, aimed in _aimed(name, camera):
                    cameras[view_name] = aimed
                    if not isinstance(aimed, Aimed) or (self.cameras and view_name not in self.cameras):
                        continue
                    share = _map(aimed.lens, aimed.view).black
                    if share > self.max_black:
                        raise ValueError(
                            f"frame {frame.key}, {view_name}: {100 * share:.1f} % of the rectified image lie outside what its "
                            f"lens saw, {100 * self.max_black:.0f} % are allowed; narrow the view or raise --max-black"
                        )
                    black[view_name] = max(black.get(view_name, 0.0), share)
            frames.append(dataclasses.replace(frame, cameras=cameras))
        if not black:
            return scene
        shares = {name: round(share, 6) for name, share in sorted(black.items())}
        return dataclasses.replace(scene, frames=frames, attributes={**scene.attributes, "rectified": shares})

    def __call__(self, frame: Frame) -> Frame:
        """The frame with those of the chosen cameras that it has, all of them pinholes with a JPEG.

        Raises:
            ValueError: an image is broken.
        """
        cameras = dict(pair for name, camera in frame.cameras.items() for pair in _aimed(name, camera))
        if self.cameras and cameras:
            cameras = {name: cameras[name] for name in self.cameras if name in cameras}
        return dataclasses.replace(frame, cameras={name: self._made(camera) for name, camera in cameras.items()})

    def _made(self, camera: Camera) -> Camera:
        if isinstance(camera, Aimed):
            camera = _resampled(camera)
        if self.short_side:
            camera = shrink(camera, self.short_side, self.quality)
        return encoded(camera, self.quality)


def _aimed(name: str, camera: Camera) -> list[tuple[str, Camera]]:
    """Name and camera of each view; a pinhole, and what is aimed already, as it is."""
    if camera.lens is None or isinstance(camera, Aimed):
        return [(name, camera)]
    return [(name + view.name, aim(camera, view)) for view in camera.views or (default_view(camera.lens),)]


def _lens(camera: Camera) -> Lens:
    if camera.lens is None:
        raise ValueError("a camera without lens needs no rectifying")
    return camera.lens


def aim(camera: Camera, view: View) -> Aimed:
    """A camera with the calibration of a view; its image is still the raw one. Raises ValueError if lens and image differ."""
    lens = _lens(camera)
    if (lens.width, lens.height) != (camera.width, camera.height):
        raise ValueError(
            f"image has {camera.width}x{camera.height} pixels, its lens is calibrated for {lens.width}x{lens.height}"
        )
    values = {f.name: getattr(camera, f.name) for f in dataclasses.fields(Camera)}
    values |= {"width": view.width, "height": view.height, "intrinsics": view.intrinsics, "views": ()}
    turn = view.to_camera
    if not np.array_equal(turn, np.eye(3)):
        values["sensor_to_ego"] = camera.sensor_to_ego.copy()
        values["sensor_to_ego"][:3, :3] = compose(camera.sensor_to_ego[:3, :3], turn)
    return Aimed(**values, view=view)


def rectify(camera: Camera, view: View | None = None) -> Camera:
    """The image that a pinhole through the same optical center would have taken.

    Args:
        camera: with a lens, and a JPEG or an image.
        view: the pinhole; None for the lens's size, focal length and principal point.

    Returns:
        A camera with ``image`` (RGB; black where the lens saw nothing), the view's intrinsics, and a ``sensor_to_ego`` that
        is turned by it; without lens and JPEG.

    Raises:
        ValueError: the image is broken, or of another size than the lens.
    """
    return _resampled(aim(camera, view or default_view(_lens(camera))))


def _resampled(camera: Aimed) -> Camera:
    lens = _lens(camera)
    chart = _map(lens, camera.view)
    raw = camera.image if camera.image is not None else decoded(camera.jpeg)
    if raw.shape != (lens.height, lens.width, 3):
        size = f"{raw.shape[1]}x{raw.shape[0]}"
        raise ValueError(f"image has {size} pixels, its lens is calibrated for {lens.width}x{lens.height}")
    if chart.size != (lens.width, lens.height):
        raw = cv2.resize(raw, chart.size, interpolation=cv2.INTER_AREA)
    image = cv2.remap(raw, chart.whole, chart.part, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    image[~chart.seen] = 0
    values = {f.name: getattr(camera, f.name) for f in dataclasses.fields(Camera)}
    return Camera(**values | {"jpeg": b"", "image": image, "lens": None, "distortion": None})


@dataclass(frozen=True)
class _Map:
    """Where the pixels of a view lie in the raw image.

    Attributes:
        size: width and height that the raw image is shrunk to first.
        whole: (height, width, 2) int16 pixels, part: (height, width) uint16 the rest in 1/32 pixels, as ``cv2.remap`` takes them.
        seen: (height, width) bool. ``black``: share of pixels that are not.
    """

    size: tuple[int, int]
    whole: np.ndarray
    part: np.ndarray
    seen: np.ndarray
    black: float


@lru_cache(maxsize=KEPT_MAPS)
def _map(lens: Lens, view: View) -> _Map:
    at, seen = lens.pixels(view.rays())
    at, seen = at.reshape(view.height, view.width, 2), seen.reshape(view.height, view.width)
    size = np.array([lens.width, lens.height])
    # Source pixels from one pixel of the view to the next, where it is coarsest.
    steps = [np.abs(np.diff(at[..., 1 - axis], axis=axis))[_pairs(seen, axis)] for axis in (0, 1)]
    dense = max((float(np.round(np.quantile(step, 0.99), 3)) for step in steps if step.size), default=1.0)
    if dense > DENSEST:
        smaller = np.maximum(1, np.round(size * DENSEST / dense)).astype(int)
        at, size = (at + 0.5) * (smaller / size) - 0.5, smaller
    fine = np.rint(np.where(seen[..., None], np.clip(at, -2, size + 1), 0) * FINE).astype(np.int32)
    part = ((fine[..., 1] & (FINE - 1)) * FINE + (fine[..., 0] & (FINE - 1))).astype(np.uint16)
    width, height = (int(v) for v in size)
    return _Map((width, height), (fine >> 5).astype(np.int16), part, seen, 1 - float(seen.mean()))


def _pairs(seen: np.ndarray, axis: int) -> np.ndarray:
    """Which neighbors along an axis are both seen."""
    return seen[1:] & seen[:-1] if axis == 0 else seen[:, 1:] & seen[:, :-1]


def decoded(jpeg: bytes, least_width: int = 0, least_height: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 RGB, smaller by 1/2, 1/4 or 1/8 where it still is as large as asked for; 0: as it is. Raises ValueError
    that says what to do."""
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", min_width=least_width, min_height=least_height)
    except ValueError as error:
        raise ValueError(f"image cannot be decoded ({error}); download it again") from None


def encoded(camera: Camera, quality: int) -> Camera:
    """A camera whose image is a JPEG; unchanged if it is one already."""
    if camera.image is None:
        return camera
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(camera.image), quality, "RGB", "420")
    return dataclasses.replace(camera, jpeg=jpeg, image=None)


def shrink(camera: Camera, short_side: int, quality: int) -> Camera:
    """A camera with a smaller image and the intrinsics that belong to it; unchanged if it is small enough.

    The center of the top-left pixel is (0, 0): u' = (u + 0.5) * scale - 0.5, for each axis with its own exact scale.
    """
    if min(camera.width, camera.height) <= short_side:
        return camera
    factor = short_side / min(camera.width, camera.height)
    width, height = round(camera.width * factor), round(camera.height * factor)
    image = camera.image
    if image is None:
        # The decoder shrinks by 1/2, 1/4, 1/8 for less than the cost of decoding; never below twice the size wanted.
        image = decoded(camera.jpeg, 2 * width, 2 * height)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    scale = np.array([width / camera.width, height / camera.height, 1.0])
    shift = np.array([0.5, 0.5, 0.0])
    intrinsics = camera.intrinsics * scale[:, None]
    intrinsics[:, 2] += shift * scale - shift
    smaller = dataclasses.replace(camera, image=image, width=width, height=height, intrinsics=intrinsics)
    return encoded(smaller, quality)
