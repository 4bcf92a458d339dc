"""Image and scene augmentation (after BEVDet), and the step from a ``Frame`` to the arrays of a sample.

Every draw is keyed by (seed, epoch, frame key): threads, order, restarts and world size do not change it. Geometry is
exact for our pixel convention (the center of the top-left pixel is (0, 0)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from occstream.sharding.exactmath import cos_sin
from occstream.sharding.poses import apply, compose, inverse, rotate
from occstream.sharding.schema import IGNORE, Camera, Frame, Labels, LidarSweep

cv2.setNumThreads(1)  # the stream's threads are the parallelism; OpenCV's own would fight them


@dataclass
class AugmentConfig:
    """What may vary in training; evaluation uses the center of everything."""

    image_size: tuple[int, int] = (256, 704)
    """(H, W) of the network's input, pixels."""
    resize: tuple[float, float] = (-0.06, 0.11)
    """Range of what is added to the resize factor, the input's width by the stored image's, as BEVDet does."""
    resize_relative: bool = False
    """``resize`` is a share of that factor instead: -0.136..0.25 is BEVDet's range at its factor of 0.44, whatever size the
    images were packed at."""
    rotate: float = 5.4
    """Largest image rotation, degrees."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    flip_x: bool = True
    """Mirror the scene front to back with probability 1/2."""
    flip_y: bool = True
    """Mirror the scene left to right with probability 1/2."""
    enabled: bool = True
    """False: train without any augmentation (for overfitting checks)."""

    def __post_init__(self) -> None:
        if min(self.image_size) < 16:
            raise ValueError(f"image_size is {self.image_size}, must be at least 16 x 16 (H, W)")
        if not -1 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"resize is {self.resize}, must be a range above -1, low end first")


def image_affine(rng: np.random.Generator | None, source: tuple[int, int], config: AugmentConfig) -> np.ndarray:
    """Map from source pixels to pixels of the network's input.

    Args:
        rng: None for evaluation: no jitter, centered crop.
        source: (width, height) of the image.
        config: ranges.

    Returns:
        (2, 3) float64: resize, crop (bottom-aligned, random or centered across), mirror, rotation about the center.
    """
    (height, width), (w, h) = config.image_size, source
    factor = width / w
    if rng is not None:
        change = rng.uniform(*config.resize)
        factor = factor * (1 + change) if config.resize_relative else factor + change
        if factor <= 0:
            raise ValueError(
                f"augment.resize {config.resize} leaves nothing of an image {w} pixels wide; raise its low end"
            )
    new_w, new_h = round(w * factor), round(h * factor)
    spare = max(0, new_w - width)
    left = rng.uniform(0, spare) if rng is not None else spare / 2
    sx, sy = new_w / w, new_h / h
    # Pixel centers: x' = (x + 1/2) s - 1/2.
    affine = np.array([[sx, 0, (sx - 1) / 2 - left], [0, sy, (sy - 1) / 2 - (new_h - height)], [0, 0, 1]])
    if rng is None:
        return affine[:2]
    if config.flip and rng.random() < 0.5:
        affine = compose(np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]), affine)
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    (c, s), cx, cy = cos_sin(angle), (width - 1) / 2, (height - 1) / 2
    return compose(np.array([[c, -s, cx - c * cx + s * cy], [s, c, cy - s * cx - c * cy], [0, 0, 1]]), affine)[:2]


def shrink_factor(affine: np.ndarray) -> int:
    """1, 2, 4 or 8: by how much an image may be shrunk before it goes through an affine map (2, 3), and not lack pixels."""
    (a, b), (c, d) = affine[:, :2]
    shrink = math.sqrt(abs(a * d - b * c))
    return max(n for n in (1, 2, 4, 8) if n == 1 or n * shrink <= 1)


def warp_jpeg(jpeg: bytes, source: tuple[int, int], affine: np.ndarray, out: np.ndarray) -> None:
    """Decodes and warps an image into ``out`` (3, H, W) uint8 RGB, contiguous; black outside.

    The decoder itself shrinks by 2, 4 or 8 where the affine shrinks as much, so one bilinear warp is enough.

    Raises:
        ValueError: the JPEG is damaged or has another size than ``source`` says.
    """
    w, h = source
    factor = shrink_factor(affine)
    need = {"min_width": math.ceil(w / factor), "min_height": math.ceil(h / factor)} if factor > 1 else {}
    # strict, because libjpeg fills what a truncated file lacks with gray.
    # Four channels, because OpenCV warps them twice as fast as three.
    image = simplejpeg.decode_jpeg(jpeg, "RGBX", strict=True, **need)
    if (math.ceil(h / factor), math.ceil(w / factor)) != image.shape[:2]:
        raise ValueError(
            f"image has {image.shape[1]}x{image.shape[0]} pixels (at 1/{factor}), its metadata says {w}x{h}"
        )
    to_source = np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1.0]])
    size = (out.shape[2], out.shape[1])
    warped = cv2.warpAffine(
        image, compose(affine, to_source), size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )
    cv2.split(warped, [*out, np.empty(out.shape[1:], np.uint8)])  # ten times as fast as a transposed copy


def scene_flips(rng: np.random.Generator | None, config: AugmentConfig) -> tuple[bool, bool]:
    """Whether to mirror the scene along x and along y."""
    if rng is None:
        return False, False
    draws = rng.random(2) < 0.5
    return bool(draws[0] and config.flip_x), bool(draws[1] and config.flip_y)


def flip_matrix(flips: tuple[bool, bool]) -> np.ndarray:
    """(3, 3) float32 ``scene_aug`` of the mirrored scene: x' = scene_aug x."""
    return np.diag([-1.0 if flips[0] else 1.0, -1.0 if flips[1] else 1.0, 1.0]).astype(np.float32)


def flip_voxels(array: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
    """View of a voxel array (X, Y, Z) of the mirrored scene."""
    return array[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]


def two_best(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Second class of each voxel and the probability of the first (B2S, App. D).

    Returns:
        (X, Y, Z) uint8, ``IGNORE`` where the label is hard, and (X, Y, Z) float32, 1 there.
    """
    second = np.full(labels.binary.shape, IGNORE, np.uint8)
    confidence = np.ones(labels.binary.shape, np.float32)
    if labels.logits is None:
        return second, confidence
    logits, ranked = labels.logits.astype(np.float32), labels.ranked
    if ranked is None:
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, :2].astype(np.uint8)
        logits = np.take_along_axis(logits, ranked.astype(np.int64), 1)
    if ranked.shape[1] > 1:
        second[labels.binary] = ranked[:, 1]
        confidence[labels.binary] = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    return second, confidence


def needed_sweep(frame: Frame) -> LidarSweep:
    """The key sweep of a frame. Raises ValueError if it has none."""
    if frame.lidar is None:
        raise ValueError(f"frame {frame.key} has no LiDAR sweep, which this recipe needs; pack the lidar group")
    return frame.lidar


def depth_map(
    frame: Frame, camera: Camera, affine: np.ndarray, image_size: tuple[int, int], *, cell: int, out: np.ndarray
) -> None:
    """Writes the distance along the camera's axis of the nearest LiDAR point in each cell of an augmented image.

    Args:
        frame: with its key sweep.
        affine: (2, 3) from the source's pixels to the augmented ones.
        image_size: (H, W) augmented.
        cell: pixels.
        out: (ceil(H / cell), ceil(W / cell)) float32, meters; 0 where no point falls.
    """
    sweep = needed_sweep(frame)
    to_camera = compose(
        inverse(compose(camera.ego_to_global, camera.sensor_to_ego)), sweep.ego_to_global, sweep.sensor_to_ego
    )
    points = apply(to_camera, sweep.xyz)
    points = points[points[:, 2] > 0.1]
    image = rotate(camera.intrinsics, points)
    pixels = image[:, :1] / image[:, 2:] * affine[:, 0] + image[:, 1:2] / image[:, 2:] * affine[:, 1] + affine[:, 2]
    height, width = image_size
    seen = ((pixels > -0.5) & (pixels < (width - 0.5, height - 0.5))).all(1)
    cells = np.floor((pixels[seen] + 0.5) / cell).astype(np.int64)
    nearest = np.full(out.shape, np.inf, np.float32)
    np.minimum.at(nearest, (cells[:, 1], cells[:, 0]), points[seen, 2].astype(np.float32))
    out[...] = np.where(np.isinf(nearest), 0, nearest)
