"""RayIoU: the rays, worked hits and scores, a walk written out slowly, and ranks."""

import math
import warnings

import numpy as np
import pytest

from occstream.evaluation import rayiou
from occstream.evaluation.rayiou import RayHits, RayMetric, cast, ray_directions, ray_origins
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.schema import OCC3D, Taxonomy
from tests.evaluation.ranks import run_ranks

GRID = get_grid("occ3d")
FREE = OCC3D.free_id
SMALL = VoxelGrid("small", (-4, -4, -1), (4, 4, 3), (0.4, 0.4, 0.5))
TWO = Taxonomy("two", ("a", "b"), frozenset(), ((0, 0, 0), (1, 1, 1)))


def meters(voxels, grid=GRID):
    return np.array([np.array(grid.lower) + np.array(voxels) * grid.voxel])


def test_the_rays_are_the_benchmarks():
    rays = ray_directions()
    assert rays.shape == (14040, 3)
    assert rays.dtype == np.float32
    pitch = np.degrees(np.arcsin(rays[::360, 2].astype(float)))
    assert len(pitch) == 39
    assert pitch[[0, 9, 38]] == pytest.approx([-45, -5.7106, 12.5478], abs=1e-4)
    assert np.diff(pitch)[9:] == pytest.approx(0.6296, abs=1e-3)
    assert np.linalg.norm(rays.astype(float), axis=1) == pytest.approx(1, abs=1e-6)
    assert np.degrees(np.arctan2(*rays[[0, 90, 270], 1::-1].T.astype(float))) == pytest.approx(
        [90 - 90, 90, -90], abs=1e-4
    )


@pytest.mark.parametrize(("x", "depth"), [(105, 2.2), (107, 3.0), (109, 3.8), (None, 39.8)])
def test_a_ray_ends_where_it_leaves_the_voxel(x, depth):
    labels = np.full(GRID.shape, FREE, np.uint8)
    if x:
        labels[x, 100, 8] = 4
    hits = cast(labels, meters((100.5, 100.5, 8.5)), GRID, FREE, directions=np.array([[1, 0, 0]], np.float32))
    assert hits.depth == pytest.approx([depth])
    assert np.unravel_index(hits.voxel[0], GRID.shape) == (x or 199, 100, 8)
    assert hits.classes.tolist() == [4 if x else FREE]


def slow_cast(labels, origin, direction, grid, free):
    """One ray in meters: the nearest face of the current voxel ahead, again and again."""
    at = [int((origin[a] - grid.lower[a]) / grid.voxel[a]) for a in range(3)]
    if not all(0 <= at[a] < grid.shape[a] for a in range(3)):
        return None
    while True:
        faces = []
        for a in range(3):
            face = grid.lower[a] + (at[a] + (direction[a] > 0)) * grid.voxel[a]
            faces.append((face - origin[a]) / direction[a] if direction[a] else math.inf)
        axis = min(range(3), key=lambda a: faces[a])
        if labels[tuple(at)] < free:
            return int(labels[tuple(at)]), faces[axis]
        at[axis] += 1 if direction[axis] > 0 else -1
        if not 0 <= at[axis] < grid.shape[axis]:
            return free, faces[axis]


@pytest.mark.parametrize(
    ("direction", "first"), [((1, 1, 0), (0, 1, 0)), ((1, 0, 1), (0, 0, 1)), ((1, 1, 1), (0, 0, 1))]
)
def test_of_equal_faces_z_goes_before_y_before_x(direction, first):
    grid = VoxelGrid("unit", (0, 0, 0), (3, 3, 3), (1, 1, 1))
    labels = np.full(grid.shape, 2, np.uint8)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):  # what may come next
        labels[other] = 0
    hits = cast(labels, [[0.5, 0.5, 0.5]], grid, 2, directions=np.array([direction], np.float32))
    assert np.unravel_index(hits.voxel[0], grid.shape) == first


def random_labels(seed, share=0.05, k=2):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(SMALL.shape) < share, rng.integers(0, k, SMALL.shape), k).astype(np.uint8)


def test_random_rays_equal_a_walk_written_out():
    rng = np.random.default_rng(0)
    labels = random_labels(1)
    origins, directions = rng.uniform(-3.9, 3.9, (6, 3)) * [1, 1, 0.2], rng.normal(size=(80, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hits = cast(labels, origins, SMALL, 2, directions=directions)
    for n in range(6 * 80):
        kind, depth = slow_cast(labels, origins[n // 80], directions[n % 80].astype(float), SMALL, 2)
        assert hits.classes[n] == kind
        assert hits.depth[n] == pytest.approx(depth, abs=1e-9)


def test_rays_from_outside_enter_or_are_dropped():
    labels = random_labels(2, 0)
    labels[3, 10, 2] = 1
    center = SMALL.centers(np.array([3, 10, 2]))
    start = center - [10, 0, 0]
    ahead, away = np.array([[1, 0, 0]], np.float32), np.array([[-1, 0, 0], [0, 1, 0]], np.float32)
    hits = cast(labels, [start], SMALL, 2, directions=ahead)
    assert hits.classes.tolist() == [1]
    assert hits.depth == pytest.approx([10.2])
    gone = cast(labels, [start], SMALL, 2, directions=away)
    assert gone.classes.tolist() == [2, 2]
    assert np.isnan(gone.depth).all()


def fake_hits(monkeypatch, *pairs):
    """``cast`` answers with these (classes, depths), one call after the other."""
    queue = [RayHits(np.array(c, np.uint8), np.array(d, float), np.arange(len(c))) for c, d in pairs]
    monkeypatch.setattr(rayiou, "cast", lambda *_, **__: queue.pop(0))


def empty(k=2):
    return np.full(SMALL.shape, k, np.uint8)


def test_the_worked_score(monkeypatch):
    fake_hits(monkeypatch, ([0, 0, 0, 1, 1], [5, 5, 5, 8, 8]), ([0, 0, 1, 1, 2], [5.5, 6.5, 5, 8, 60]))
    metric = RayMetric(TWO, SMALL)
    metric.update(empty(), empty(), np.zeros((1, 3)))
    scores = metric.result()
    assert scores["RayIoU"] == pytest.approx(0.4305556)
    assert scores["RayIoU/1m"] == pytest.approx((0.25 + 1 / 3) / 2)
    assert scores["RayIoU/2m"] == scores["RayIoU/4m"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert "mAVE" not in scores
    assert metric.table().startswith("RayIoU 0.4306, RayIoU/1m 0.2917")


def test_depth_must_be_strictly_nearer_and_free_truth_is_dropped(monkeypatch):
    fake_hits(monkeypatch, ([0, 0, 2], [5, 5, 9]), ([0, 0, 0], [6, 6.999, 9]))
    metric = RayMetric(TWO, SMALL)
    metric.update(empty(), empty(), np.zeros((1, 3)))
    assert metric.counts[0].tolist() == [2, 2, 0, 2, 2]
    assert math.isnan(metric.result()["RayIoU/b"])
    assert metric.result()["RayIoU"] == pytest.approx(2 / 3)


def test_velocity_error_and_the_occupancy_score(monkeypatch):
    fake_hits(monkeypatch, ([4, 4, 15], [5, 5, 5]), ([4, 4, 15], [5, 5, 5]))
    metric = RayMetric(OCC3D, SMALL)
    flow, true_flow = np.zeros((2, *SMALL.shape, 2))
    true_flow.reshape(-1, 2)[:2] = 1, 0
    flow.reshape(-1, 2)[1] = 1, 1
    flow.reshape(-1, 2)[2] = 9, 9  # no mover
    metric.update(empty(17), empty(17), np.zeros((1, 3)), flow=flow, true_flow=true_flow)
    scores = metric.result()
    assert scores["mAVE"] == scores["AVE/car"] == pytest.approx(1)
    assert scores["OccScore"] == pytest.approx(0.9)
    assert math.isnan(scores["AVE/bus"])


def test_panoptic_quality_of_rays(monkeypatch):
    """Two cars of 20 and 10 rays and a road of 12. The first is found 1.5 m too far by 8 rays of 20, the second is called a
    part of it, and the road is split into two ids, which are one segment."""
    car, road = OCC3D.id("car"), OCC3D.id("driveable_surface")
    true = np.repeat([car, car, road], [20, 10, 12])
    depth = np.full(42, 5.0)
    depth[:8] = 6.5
    fake_hits(monkeypatch, (true, np.full(42, 5.0)), (true, depth))
    metric = RayMetric(OCC3D, SMALL)
    ids, true_ids = np.zeros((2, *SMALL.shape), int)
    true_ids.reshape(-1)[:42] = np.repeat([3, 4, 0], [20, 10, 12])
    ids.reshape(-1)[:42] = np.repeat([7, 7, 1, 2], [20, 10, 6, 6])
    metric.update(empty(17), empty(17), np.zeros((1, 3)), instances=ids, true_instances=true_ids)
    scores = metric.result()
    # Within 1 m the pair shares 12 of 38 rays: no match, the prediction is false and both cars are missed.
    assert scores["RayPQ/1m"] == pytest.approx((0 + 1) / 2)
    # Within 2 and 4 m it shares 20 of 30: a match, and one car is missed.
    assert scores["RayPQ/2m"] == scores["RayPQ/4m"] == pytest.approx((20 / 30 / 1.5 + 1) / 2)
    assert scores["RayPQ"] == pytest.approx((scores["RayPQ/1m"] + 2 * scores["RayPQ/2m"]) / 3)
    assert metric.panoptic[0].counts[car, :3].tolist() == [0, 1, 2]
    metric.reset()
    assert "RayPQ" not in metric.result()


def test_perfect_and_empty_predictions():
    origins = np.array([[0, 0, 1.0], [1, 1, 1.0]])
    truth = random_labels(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, none, void = (RayMetric(TWO, SMALL) for _ in range(3))
        same.update(truth, truth, origins)
        none.update(empty(), truth, origins)
        void.update(truth, empty(), origins)
        void.update(truth, truth, np.zeros((0, 3)))
        assert [same.result()[n] for n in ("RayIoU", "RayIoU/1m", "RayIoU/a", "RayIoU/b")] == [1] * 4
        assert none.result()["RayIoU"] == 0
        assert math.isnan(void.result()["RayIoU"])


def test_the_truth_of_a_frame_is_cast_once(monkeypatch):
    origins, truth, calls = np.array([[0, 0, 1.0]]), random_labels(3), []
    real = rayiou.cast
    monkeypatch.setattr(rayiou, "cast", lambda *a, **b: calls.append(1) or real(*a, **b))
    metric = RayMetric(TWO, SMALL)
    metric.update(truth, truth, origins, key="f")
    first = metric.result()
    metric.reset()
    assert math.isnan(metric.result()["RayIoU"])
    metric.update(truth, truth, origins, key="f")
    assert (metric.result(), len(calls)) == (first, 3)
    metric.update(truth, truth, origins + 0.1, key="f")  # other rays
    assert len(calls) == 5
    bounded = RayMetric(TWO, SMALL, cache_bytes=10)
    for _ in range(2):
        bounded.update(truth, truth, origins, key="f")
    assert len(calls) == 9


def test_origins_are_eight_of_the_scenes_lidar_places_that_lie_inside():
    turn = np.array([[0, -1, 0, 100], [1, 0, 0, 50], [0, 0, 1, 2], [0, 0, 0, 1.0]])  # the ego looks along y
    poses = np.tile(np.eye(4), (60, 1, 1))
    poses[:, :3, 3] = np.stack([np.full(60, 100), 50 + np.arange(60) - 10, np.full(60, 3.8)], 1)
    found = ray_origins(list(poses), turn, GRID)
    places = np.arange(60) - 10
    inside = places[places < 39]
    expected = inside[np.round(np.linspace(0, len(inside) - 1, 8)).astype(int)]
    assert found == pytest.approx(np.stack([expected, np.zeros(8), np.full(8, 1.8)], 1))
    assert len(ray_origins(list(poses[8:11]), turn, GRID)) == 3
    forward = ray_origins(list(poses), turn, get_grid("semantickitti"))
    assert forward[:, 0].min() == pytest.approx(2)


def test_frames_over_ranks_are_one_set(monkeypatch):
    origins = np.array([[0, 0, 1.0]])
    rng = np.random.default_rng(0)
    frames = [(random_labels(i), random_labels(i + 10), rng.normal(size=(2, *SMALL.shape, 2))) for i in range(4)]

    def scores(mine, reduce=False):
        metric = RayMetric(TWO, SMALL, movers=("a",))
        for found, truth, (flow, true_flow) in mine:
            ids = {"instances": truth % 2, "true_instances": truth}
            metric.update(found, truth, origins, flow=flow, true_flow=true_flow, **ids)
        if reduce:
            metric.all_reduce()
        return metric.result()

    whole = scores(frames)
    assert 0 < whole["RayIoU"] < 1
    assert whole["mAVE"] > 0
    assert 0 <= whole["RayPQ"] < 1
    assert scores(frames[::-1]) == whole
    for found in run_ranks(2, lambda rank: scores(frames[rank::2], True), monkeypatch):
        assert found == whole


def test_wrong_arrays_are_refused():
    metric = RayMetric(TWO, SMALL)
    good, origin = empty(), np.zeros((1, 3))
    with pytest.raises(ValueError, match="predicted labels are"):
        metric.update(good[1:], good, origin)
    with pytest.raises(ValueError, match=r"true labels hold an id outside 0\.\.2"):
        metric.update(good, good + 1, origin)
    with pytest.raises(ValueError, match="not finite"):
        metric.update(good, good, origin * np.nan)
    metric.update(good, np.full_like(good, 255), origin)
