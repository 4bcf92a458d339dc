"""What may be done to a frame's cameras before it is packed: choose some, shrink the images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from occstream.sharding.schema import Camera, Frame


@dataclass(frozen=True)
class Images:
    """Choices about images at packing.

    Attributes:
        short_side: pixels; larger images are shrunk so that their shorter side has so many. 0: stored as they are.
        quality: of the JPEGs of shrunk images, 1..100.
        cameras: names of the cameras to keep; empty: all.

    Raises:
        ValueError: a value is out of range.
    """

    short_side: int = 0
    quality: int = 90
    cameras: tuple[str, ...] = ()

    def __post_init__(self):
        if self.short_side < 0 or 0 < self.short_side < 16:
            raise ValueError(f"short side {self.short_side} must be 0 (as they are) or at least 16 pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality} is out of range 1..100")

    def __call__(self, frame: Frame) -> Frame:
        """The frame with the chosen cameras and sizes. Raises ValueError if it lacks a chosen camera, or a JPEG is broken."""
        cameras = frame.cameras
        if self.cameras and cameras:
            missing = [name for name in self.cameras if name not in cameras]
            if missing:
                raise ValueError(f"frame {frame.key} has no camera {missing[0]!r}, only {', '.join(cameras)}")
            cameras = {name: cameras[name] for name in self.cameras}
        if self.short_side:
            cameras = {name: shrink(camera, self.short_side, self.quality) for name, camera in cameras.items()}
        return dataclasses.replace(frame, cameras=cameras)


def shrink(camera: Camera, short_side: int, quality: int) -> Camera:
    """A camera with a smaller image and the intrinsics that belong to it; unchanged if it is small enough.

    The centre of the top-left pixel is (0, 0): u' = (u + 0.5) * scale - 0.5, for each axis with its own exact scale.
    """
    if min(camera.width, camera.height) <= short_side:
        return camera
    factor = short_side / min(camera.width, camera.height)
    width, height = round(camera.width * factor), round(camera.height * factor)
    try:
        # The decoder shrinks by 1/2, 1/4, 1/8 for less than the cost of decoding; never below twice the size wanted.
        image = simplejpeg.decode_jpeg(camera.jpeg, "BGR", min_width=2 * width, min_height=2 * height, min_factor=1)
    except ValueError as error:
        raise ValueError(f"image cannot be decoded ({error}); fetch it again") from None
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    scale = np.array([width / camera.width, height / camera.height, 1.0])
    shift = np.array([0.5, 0.5, 0.0])
    intrinsics = camera.intrinsics * scale[:, None]
    intrinsics[:, 2] += shift * scale - shift
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "BGR", "420")
    return dataclasses.replace(camera, jpeg=jpeg, width=width, height=height, intrinsics=intrinsics)
