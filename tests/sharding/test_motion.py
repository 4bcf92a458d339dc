"""Trajectories, and turns of a LiDAR that are measured while the vehicle moves."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from occstream.sharding.motion import Trajectory, deskew
from occstream.sharding.schema import LidarSweep

SPEED, TURN = 8.0, 0.3  # m/s, rad/s
START = 1_700_000_000_000_000
MOUNT = np.eye(4)
MOUNT[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix()
MOUNT[:3, 3] = [1.0, 0.1, 1.8]


def driven(seconds):
    """(N, 4, 4): a circle at constant speed."""
    yaw = TURN * np.asarray(seconds)
    poses = np.tile(np.eye(4), (len(yaw), 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(yaw[:, None] * [0, 0, 1]).as_matrix()
    poses[:, 0, 3], poses[:, 1, 3], poses[:, 2, 3] = SPEED / TURN * np.sin(yaw), SPEED / TURN * (1 - np.cos(yaw)), 5.0
    return poses


def trajectory(hertz, seconds=2.0):
    times = np.arange(0, seconds + 1e-9, 1 / hertz)
    return Trajectory("drive-7", START + np.rint(times * 1e6).astype(np.int64), driven(times))


def turn_of(world, at=1.0, took=0.1):
    """A sweep of what stands still, each point in the LiDAR's axes at its own time; the time stamp is the middle."""
    lag = np.random.default_rng(1).uniform(-took / 2, took / 2, len(world)).astype(np.float32)
    to_sensor = np.linalg.inv(driven(at - lag.astype(np.float64)) @ MOUNT)
    xyz = np.einsum("nij,nj->ni", to_sensor[:, :3, :3], world) + to_sensor[:, :3, 3]
    pose = driven([at])[0]
    return LidarSweep(xyz.astype(np.float32), MOUNT, pose, START + round(at * 1e6), time_lag=lag)


def error(sweep, world):
    pose = sweep.ego_to_global @ sweep.sensor_to_ego
    return np.linalg.norm(sweep.xyz @ pose[:3, :3].T + pose[:3, 3] - world, axis=1)


@pytest.mark.parametrize("hertz", [10, 100])
def test_deskew_of_a_moving_ego(hertz):
    world = np.random.default_rng(0).uniform([-30, -30, 3], [45, 40, 12], (4000, 3))
    raw = turn_of(world)
    assert np.quantile(error(raw, world), 0.5) > 0.2
    made = deskew(raw, trajectory(hertz))
    assert error(made, world).max() < 1e-3
    assert made.xyz.dtype == np.float32
    np.testing.assert_array_equal(made.time_lag, raw.time_lag)
    assert (made.timestamp, made.ego_to_global is raw.ego_to_global) == (raw.timestamp, True)


@pytest.mark.parametrize(("hertz", "limit"), [(4, 2e-3), (10, 1e-4), (100, 5e-4)])
def test_poses_between_poses(hertz, limit):
    times = np.linspace(0, 2, 501)
    got, want = trajectory(hertz).at(START + np.rint(times * 1e6).astype(np.int64)), driven(times)
    assert np.abs(got[:, :3, 3] - want[:, :3, 3]).max() < limit
    np.testing.assert_allclose(got[:, :3, :3], want[:, :3, :3], atol=1e-7)


def test_rotations_between_poses_are_as_scipy_has_them():
    turns = Rotation.random(12, random_state=3)
    poses = np.tile(np.eye(4), (12, 1, 1))
    poses[:, :3, :3] = turns.as_matrix()
    poses[5] = poses[4]  # standing still
    times = np.arange(12) * 100_000
    at = np.linspace(0, times[-1], 301)
    want = Slerp(times, Rotation.from_matrix(poses[:, :3, :3]))(at).as_matrix()
    np.testing.assert_allclose(Trajectory("s", times, poses).at(at)[:, :3, :3], want, atol=1e-12)


def test_two_poses_and_the_shorter_way_round():
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(np.radians([[0, 0, 170], [0, 0, -170]])).as_matrix()
    poses[1, 0, 3] = 2
    middle = Trajectory("s", [0, 1_000_000], poses).at([500_000])[0]
    np.testing.assert_allclose(middle[:3, 3], [1, 0, 0])
    np.testing.assert_allclose(middle[:2, :2], [[-1, 0], [0, -1]], atol=1e-9)


def test_nothing_is_extrapolated():
    path = trajectory(10)
    end = START + 2_000_000
    np.testing.assert_allclose(path.at([end + 15_000]), path.at([end]))  # clocks differ by milliseconds
    with pytest.raises(ValueError, match=rf"scene drive-7: no pose at {end + 21_000} µs, they reach from {START}"):
        path.at([end, end + 21_000])
    with pytest.raises(ValueError, match="scene drive-7: no pose at"):
        deskew(turn_of(np.ones((5, 3)), at=2.2), path)
    with pytest.raises(ValueError, match=r"scene drive-7: the sweep at .* has no times of points"):
        deskew(dataclasses.replace(turn_of(np.ones((5, 3))), time_lag=None), path)


def test_turns_without_points_or_with_one_time():
    path = trajectory(10)
    empty = deskew(turn_of(np.zeros((0, 3))), path)
    assert empty.xyz.shape == (0, 3)
    world = np.array([[20.0, 3, 6], [15, -8, 7]])
    at_once = turn_of(world, took=0.0)
    np.testing.assert_allclose(deskew(at_once, path).xyz, at_once.xyz, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "poses", "message"),
    [
        ([0], np.eye(4)[None], "needs two poses"),
        ([0, 5, 5], np.tile(np.eye(4), (3, 1, 1)), "must increase, but 5 follows 5"),
        ([0, 7], np.stack([np.eye(4), np.full((4, 4), np.nan)]), "the pose at 7 µs is not finite"),
    ],
)
def test_a_broken_trajectory_is_named(times, poses, message):
    with pytest.raises(ValueError, match=f"scene s: .*{message}"):
        Trajectory("s", times, poses)
