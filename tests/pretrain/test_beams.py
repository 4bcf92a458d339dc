"""Beam re-sampling on worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from occstream.pretrain.beams import density, kept_by_angle, kept_ranks, resample_beams
from occstream.sharding.scanrows import rows_of_scan, spherical


def test_angles():
    points = np.array([(10, 0, 0), (10, 0, 1), (0, 10, -2), (-5, 0, -5), (0, -20, 1)])
    expected = [(10, 0, 0), (10.0499, 5.7106, 0), (10.198, -11.3099, 90), (7.0711, -45, 180), (20.025, 2.8624, -90)]
    np.testing.assert_allclose(spherical(points), expected, atol=1e-4)


def test_densities():
    waymo, nuscenes = density(64, -17.6, 2.4), density(32, -30.67, 10.66)
    kitti, once = density(64, -24.8, 2), density(40, -25, 15)
    found = (waymo, nuscenes, kitti, once, nuscenes / waymo, kitti / waymo, once / waymo)
    np.testing.assert_allclose(found, (3.2, 0.7743, 2.3881, 1.0, 0.2420, 0.7463, 0.3125), atol=5e-5)
    with pytest.raises(ValueError, match="need at least one"):
        density(32, 10, 10)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.2420, [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59]),
        (0.3125, [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 32, 35, 38, 41, 44, 48, 51, 54, 57, 60]),
        (0.7463, [4 * i + j for i in range(16) for j in (0, 1, 2)]),
        (0.5, list(range(0, 64, 2))),
        (1.0, list(range(64))),
        (1.7, list(range(64))),
        (0.001, [0]),
    ],
)
def test_rows_of_64_beams(ratio, expected):
    assert kept_ranks(64, ratio).tolist() == expected


def test_a_phase_moves_the_rows_within_a_stride():
    assert kept_ranks(64, 0.25, 0.5).tolist() == list(range(2, 64, 4))
    assert kept_ranks(64, 0.25, 0.999).tolist() == list(range(3, 64, 4))
    for phase in np.linspace(0, 0.999, 50):
        ranks = kept_ranks(40, 0.3125, phase)
        assert len(set(ranks)) == 13
        assert ranks.max() < 40


UNEVEN = np.array([-10.0, -6, -4, -3, -2, -1, 0, 1])


def test_uneven_rows():
    assert UNEVEN[kept_ranks(8, 0.5)].tolist() == [-10, -4, -2, 0]
    assert UNEVEN[kept_by_angle(UNEVEN, 0.5)].tolist() == [-10, -6, -3, 1]
    assert kept_by_angle(UNEVEN, 0.125).tolist() == [0]
    # Two of five angles are nearest to one row, which is kept once.
    assert kept_by_angle(np.array([0.0, 9, 9.5, 9.8, 10]), 1.0).tolist() == [0, 1, 4]


def rig(angles, turns=50, origin=(0, 0, 0), radius=20.0):
    """Points of rows at the given inclinations; rows are numbered in the order of ``angles``."""
    azimuth = np.linspace(-np.pi, np.pi, turns, endpoint=False)
    rows, azimuth = np.meshgrid(np.arange(len(angles)), azimuth, indexing="ij")
    up = np.radians(np.asarray(angles))[rows]
    points = np.stack([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)], -1) * radius
    return points.reshape(-1, 3) + origin, rows.ravel()


@pytest.mark.parametrize(("mode", "expected"), [("rows", [-10, -4, -2, 0]), ("angle", [-10, -6, -3, 1])])
def test_rows_are_ranked_by_their_height_not_their_number(mode, expected):
    """A sensor that numbers its rows in the order of firing."""
    firing = np.array([5, 0, 3, 7, 1, 6, 2, 4])
    points, rows = rig(UNEVEN[firing])
    stay = resample_beams(points, 10 + rows, 0.5, mode=mode)
    assert sorted(UNEVEN[firing][np.unique(rows[stay])]) == expected
    assert stay.sum() == 4 * 50  # whole rows
    order = np.random.default_rng(0).permutation(len(points))
    assert (resample_beams(points[order], 10 + rows[order], 0.5, mode=mode) == stay[order]).all()


def test_each_lidar_is_thinned_from_its_own_origin():
    """Two LiDARs with the same row numbers, one upside down and both far from the origin of the points."""
    origins = np.array([(1.35, 0, 1.64), (1.347, 0.005, 1.525)])
    up, rows_up = rig(UNEVEN, origin=origins[0], radius=3)
    down, rows_down = rig(-UNEVEN, origin=origins[1], radius=3)
    points, rows = np.concatenate([up, down]), np.concatenate([rows_up, rows_down])
    lidar = np.repeat([0, 1], [len(up), len(down)])
    stay = resample_beams(points, rows, 0.5, lidar=lidar, origins=origins)
    assert np.unique(rows[stay & (lidar == 0)]).tolist() == [0, 2, 4, 6]
    assert np.unique(rows[stay & (lidar == 1)]).tolist() == [1, 3, 5, 7]  # counted from below


def test_missing_rows_empty_sweeps_and_points_that_are_not_numbers():
    points, rows = rig(UNEVEN)
    some = (rows != 2) & (rows != 5)
    assert np.unique(rows[some][resample_beams(points[some], rows[some], 0.5)]).tolist() == [0, 3, 6]
    assert resample_beams(points[:0], rows[:0], 0.5).shape == (0,)
    assert resample_beams(points[:1], rows[:1], 0.1).tolist() == [True]
    points[3] = np.nan
    stay = resample_beams(points, rows, 0.5)
    assert not stay[3]
    assert stay.sum() == 4 * 50 - 1
    assert resample_beams(points, rows, 1.0).sum() == len(points) - 1


def test_settings_that_cannot_be_are_refused():
    points, rows = rig(UNEVEN)
    for changes, message in (
        ({"ratio": 0}, "must be positive"),
        ({"ratio": float("nan")}, "must be positive"),
        ({"phase": 1.0}, "must be from 0 to below 1"),
        ({"mode": "random"}, "must be rows or angle"),
        ({"rows": rows[1:]}, "399 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            resample_beams(**{"points": points, "rows": rows, "ratio": 0.5, **changes})


def test_rows_in_the_order_of_a_scan():
    points, rows = rig(np.linspace(2, -24, 64), turns=200)
    # A turn begins where the azimuth passes zero upward: half a turn after the rig's.
    moved = np.roll(points.reshape(64, 200, 3), 100, 1).reshape(-1, 3)
    assert (rows_of_scan(moved, 64) == rows).all()
    # Noise at the seam makes turns of a few points, which are none.
    noisy = moved.copy()
    noisy[::200, 1] -= 0.3
    assert len(np.unique(rows_of_scan(noisy, 64))) in (63, 64)
    # Out of order: bins of the inclination.
    mixed = np.random.default_rng(0).permutation(len(points))
    found = rows_of_scan(points[mixed], 64)
    assert found.min() == 0
    assert found.max() == 63
    assert (np.diff(found[np.argsort(spherical(points[mixed])[:, 1], kind="stable")]) >= 0).all()
    assert rows_of_scan(points[:0], 64).shape == (0,)


def test_a_kitti_scan_has_64_rows(shared_data):
    path = shared_data / "kitti_object" / "training" / "velodyne" / "000000.bin"
    if not path.exists():
        pytest.skip("no KITTI scan")
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 4)
    rows = rows_of_scan(points, 64)
    assert len(np.unique(rows)) == 64
    medians = np.array([np.median(spherical(points[rows == i])[:, 1]) for i in range(64)])
    assert (np.diff(medians) < 0).mean() > 0.95  # from above to below
