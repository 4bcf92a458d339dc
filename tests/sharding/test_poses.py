"""Poses and trigonometry written out: as right as those of NumPy."""

import math

import numpy as np
import pytest

from occstream.sharding.exactmath import angle_of, cos, decay, sin
from occstream.sharding.poses import apply, compose, inverse, rotate


@pytest.fixture
def poses():
    poses = np.random.default_rng(0).normal(size=(20, 4, 4))
    poses[:, 3] = [0, 0, 0, 1]
    return poses


def test_products_and_inverses_are_those_of_linear_algebra(poses):
    np.testing.assert_allclose(compose(poses, poses[::-1], poses[3]), poses @ poses[::-1] @ poses[3], atol=1e-12)
    np.testing.assert_allclose(inverse(poses), np.linalg.inv(poses), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(compose(poses[0, :3, :3], poses[1, :3, :3]), poses[0, :3, :3] @ poses[1, :3, :3])
    points = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    one = poses[5]
    np.testing.assert_allclose(apply(one, points), points.astype(float) @ one[:3, :3].T + one[:3, 3], atol=1e-12)
    np.testing.assert_allclose(apply(poses, points)[7], rotate(poses[7], points[7]) + poses[7, :3, 3], atol=1e-12)


def test_a_pose_without_inverse_is_named():
    for broken in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="has no inverse"):
            inverse(broken)


def test_trigonometry_and_decay_are_right_to_the_last_bits():
    angles = np.concatenate([np.linspace(-1000, 1000, 9999), np.arange(-8, 9) * math.pi / 4])
    np.testing.assert_allclose(cos(angles), np.cos(angles), atol=3e-16)
    np.testing.assert_allclose(sin(angles), np.sin(angles), atol=3e-16)
    for angle in np.linspace(-math.pi, math.pi, 1001):
        found = angle_of(3 * math.cos(angle), 3 * math.sin(angle))
        assert abs(math.remainder(found - angle, 2 * math.pi)) < 1e-15
    assert [angle_of(*v) for v in ((0.0, 0.0), (1.0, 0.0), (0.0, -2.0))] == [0, 0, -math.pi / 2]
    for x in np.linspace(0, 100, 101):
        assert decay(x) == pytest.approx(math.exp(-x), rel=1e-11)
