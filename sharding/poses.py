"""Products and inverses of poses, the same to the last bit on every CPU.

BLAS and LAPACK choose their kernels by the CPU, and kernels round differently: a label made from such a product, and with
it the fingerprint of a data set, would depend on the machine that packed it. Here every sum is written out.
"""

from __future__ import annotations

import numpy as np


def compose(*maps: np.ndarray) -> np.ndarray:
    """Product of matrices (..., N, N), the rightmost applied first, float64; the leftmost may have fewer rows."""
    out = np.asarray(maps[0], np.float64)
    for right in maps[1:]:
        right = np.asarray(right, np.float64)
        total = out[..., :, 0, None] * right[..., None, 0, :]
        for k in range(1, right.shape[-2]):
            total = total + out[..., :, k, None] * right[..., None, k, :]
        out = total
    return out


def inverse(pose: np.ndarray) -> np.ndarray:
    """Inverse of affine maps (..., 4, 4) whose last row is 0 0 0 1, float64.

    Raises:
        ValueError: a map has no inverse, or holds what is not a number.
    """
    pose = np.asarray(pose, np.float64)
    a, b, c = pose[..., 0, :3], pose[..., 1, :3], pose[..., 2, :3]
    columns = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], -1)
    det = a[..., 0] * columns[..., 0, 0] + a[..., 1] * columns[..., 1, 0] + a[..., 2] * columns[..., 2, 0]
    if not (np.abs(det) > 0).all():
        raise ValueError(f"pose {pose.tolist()} has no inverse; its calibration or ego pose is damaged")
    out = np.zeros(pose.shape)
    out[..., :3, :3] = columns / det[..., None, None]
    out[..., :3, 3] = -rotate(out, pose[..., :3, 3])
    out[..., 3, 3] = 1
    return out


def apply(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 3) moved by one pose, or each by its own; float64."""
    return rotate(pose, points) + pose[..., :3, 3]


def rotate(pose: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) turned by the upper left (3, 3) of one map, or each by its own; float64."""
    x, y, z = (vectors[..., i, None].astype(np.float64, copy=False) for i in range(3))
    return x * pose[..., :3, 0] + y * pose[..., :3, 1] + z * pose[..., :3, 2]
