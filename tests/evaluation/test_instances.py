"""Instances of voxels and points from boxes: worked claims, order, what stays, and perfect ones."""

import math

import numpy as np
import pytest

from occstream.evaluation.detection import score_at_precision
from occstream.evaluation.instances import (
    FoundBoxes,
    RefineConfig,
    in_box,
    labels_at,
    panoptic_labels,
    refine_points,
    refine_voxels,
    true_point_instances,
    true_voxel_instances,
    unknown_things,
)
from occstream.evaluation.panoptic import split_labels, voxel_panoptic
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE, OCC3D
from occstream.sharding.sources import synthetic

LINE = VoxelGrid("line", (0, 0, 0), (32, 1, 1), (1, 1, 1))
CAR, BUS, ROAD, FREE = OCC3D.id("car"), OCC3D.id("bus"), OCC3D.id("driveable_surface"), OCC3D.free_id
THINGS = {OCC3D.id(name) for name in OCC3D.things}


def span(first: int, last: int, *, z: float = 0.5, high: float = 1.0) -> list[float]:
    """A box around the centers of voxels first..last of a line, not of their neighbors."""
    return [(first + last + 1) / 2, 0.5, z, last - first + 0.5, 0.5, high, 0.0]


def boxes(*rows: tuple[list[float], int, float]) -> FoundBoxes:
    return FoundBoxes(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 7),
        np.array([r[1] for r in rows], np.int64),
        np.array([r[2] for r in rows], np.float32),
    )


def line(*runs: tuple[int, int, int], grid: VoxelGrid = LINE) -> np.ndarray:
    semantic = np.full(grid.shape, FREE, np.uint8)
    for first, last, kind in runs:
        semantic[first : last + 1] = kind
    return semantic


def refined(semantic, found, grid=LINE, occupied=None, **settings):
    return refine_voxels(
        semantic, found, grid, taxonomy=OCC3D, things=THINGS, config=RefineConfig(**settings), occupied=occupied
    )


@pytest.mark.parametrize(
    ("second", "ids"),
    [
        ((6, 12), {1: range(1, 11), 2: range(20, 22)}),  # 5 of 7 are taken: 0.714 is more than half
        ((8, 14), {1: range(1, 11), 2: range(11, 15), 3: range(20, 22)}),  # 3 of 7: 0.43
    ],
)
def test_surer_boxes_claim_first_worked(second, ids):
    found = boxes((span(1, 10), CAR, 0.95), (span(*second), CAR, 0.9), (span(20, 21), CAR, 0.85))
    semantic = line((1, 14, CAR), (20, 21, CAR))
    segments = refined(semantic, found, leftover="one")
    for number, places in ids.items():
        assert np.flatnonzero(segments.instances[:, 0, 0] == number).tolist() == list(places)
    assert segments.instances.max() == len(ids)
    assert segments.kept.tolist() == ([0, 2] if len(ids) == 2 else [0, 1, 2])
    assert (segments.classes == semantic).all()


def test_order_is_by_score_and_equal_ones_are_in_their_own():
    semantic = line((0, 9, CAR))
    rising = boxes((span(0, 5), CAR, 0.9), (span(4, 9), CAR, 0.95))
    assert refined(semantic, rising).instances[:10, 0, 0].tolist() == [2] * 4 + [1] * 6
    equal = boxes((span(0, 5), CAR, 0.9), (span(4, 9), CAR, 0.9))
    assert refined(semantic, equal).instances[:10, 0, 0].tolist() == [1] * 6 + [2] * 4


def test_only_scores_above_the_threshold_claim():
    found = boxes((span(0, 3), CAR, 0.8), (span(6, 9), CAR, 0.81))
    segments = refined(line((0, 9, CAR)), found, leftover="one")
    assert segments.instances[:10, 0, 0].tolist() == [0] * 6 + [1] * 4


def test_a_box_gives_its_class_to_things_and_leaves_stuff_and_free_space():
    semantic = line((0, 1, CAR), (2, 3, BUS), (4, 4, ROAD))
    found = boxes((span(0, 6), BUS, 0.9))
    segments = refined(semantic, found)
    assert segments.classes[:7, 0, 0].tolist() == [BUS] * 4 + [ROAD, FREE, FREE]
    assert segments.instances[:7, 0, 0].tolist() == [1] * 4 + [0] * 3
    both = boxes((span(0, 6), BUS, 0.9), (span(1, 1), CAR, 0.85))  # a car where one is predicted stays one
    assert refined(semantic, both).classes[:4, 0, 0].tolist() == [BUS, CAR, BUS, BUS]
    assert refined(semantic, both).instances[:4, 0, 0].tolist() == [1, 2, 1, 1]
    own = refined(semantic, found, claims="class", leftover="one")
    assert own.classes[:4, 0, 0].tolist() == [CAR, CAR, BUS, BUS]
    assert own.instances[:4, 0, 0].tolist() == [0, 0, 1, 1]


def test_occupied_voxels_without_a_class_are_claimed_above_the_lowest_layer():
    grid = VoxelGrid("column", (0, 0, 0), (1, 1, 4), (1, 1, 1))
    semantic = np.full(grid.shape, FREE, np.uint8)
    semantic[0, 0, 0] = ROAD
    occupied = np.ones(grid.shape, bool)
    occupied[0, 0, 3] = False
    box = [0.5, 0.5, 2.0, 0.5, 0.5, 4.0, 0.0]
    segments = refined(semantic, boxes((box, CAR, 0.9)), grid, occupied)
    assert segments.classes[0, 0].tolist() == [ROAD, CAR, CAR, FREE]
    semantic[0, 0, 0] = CAR  # things are claimed down to the ground
    segments = refined(semantic, boxes((box, CAR, 0.9)), grid, occupied)
    assert segments.instances[0, 0].tolist() == [1, 1, 1, 0]
    semantic[0, 0, 0] = FREE
    assert refined(semantic, boxes((box, CAR, 0.9)), grid, occupied).classes[0, 0, 0] == FREE
    assert refined(semantic, boxes((box, CAR, 0.1)), grid, occupied).classes.tolist() == semantic.tolist()


def test_what_no_box_claims():
    semantic = line((0, 9, CAR), (12, 13, CAR), (16, 20, BUS), (25, 25, CAR))
    found = boxes((span(0, 3), CAR, 0.9))
    ids = {
        name: refined(semantic, found, leftover=name).instances[:, 0, 0] for name in ("one", "components", "nearest")
    }
    assert ids["one"].tolist() == [1] * 4 + [0] * 28
    expected = [1] * 4 + [2] * 6 + [0] * 2 + [4] * 2 + [0] * 2 + [3] * 5 + [0] * 4 + [5] + [0] * 6
    assert ids["components"].tolist() == expected  # the larger first
    assert ids["nearest"].tolist() == [1] * 4 + [0] * 28
    far = refined(semantic, found, leftover="nearest", reach=4.0).instances[:, 0, 0]
    assert far.tolist() == [1] * 6 + [0] * 26  # the center is at 2
    assert not refined(line((0, 9, CAR)), boxes(), leftover="nearest").instances.any()


def test_components_touch_at_corners_and_not_across_classes():
    grid = VoxelGrid("cube", (0, 0, 0), (4, 4, 4), (1, 1, 1))
    semantic = np.full(grid.shape, FREE, np.uint8)
    semantic[0, 0, 0] = semantic[1, 1, 1] = CAR
    semantic[2, 2, 2] = BUS
    semantic[3, 3, 0] = CAR
    segments = refined(semantic, boxes(), grid)
    ids = segments.instances
    assert ids[0, 0, 0] == ids[1, 1, 1] == 1
    assert sorted([ids[2, 2, 2], ids[3, 3, 0]]) == [2, 3]


def test_ids_stay_below_1000():
    grid = VoxelGrid("long", (0, 0, 0), (2400, 1, 1), (1, 1, 1))
    semantic = np.full(grid.shape, FREE, np.uint8)
    semantic[::2] = CAR
    ids = refined(semantic, boxes(), grid).instances
    assert ids.max() == 999
    assert np.unique(ids).size == 1000
    many = boxes(*((span(2 * i, 2 * i), CAR, 0.9) for i in range(1100)))
    ids = refined(semantic, many, grid).instances
    assert ids.max() == 999
    panoptic = panoptic_labels(semantic, ids, THINGS)
    assert panoptic.dtype == np.uint16
    assert all(a.tolist() == b.tolist() for a, b in zip(split_labels(panoptic), (semantic, ids)))


def test_nothing_gives_nothing():
    segments = refined(line(), boxes())
    assert not segments.instances.any()
    assert len(segments.kept) == 0
    segments = refined(line((0, 3, ROAD)), boxes((span(0, 3), CAR, 0.9)))
    assert not segments.instances.any()
    assert len(segments.kept) == 0


def test_boxes_are_turned():
    box = np.array([1.0, 2.0, 0.0, 4.0, 1.0, 2.0, math.radians(60)])
    along, across = np.array([0.5, math.sqrt(0.75), 0]), np.array([-math.sqrt(0.75), 0.5, 0])
    at = np.array([1.0, 2.0, 0.0])
    points = np.array([at + 1.9 * along, at + 2.1 * along, at + 0.4 * across, at + 0.6 * across, at + [0, 0, 1.1]])
    assert in_box(points, box).tolist() == [True, False, True, False, False]
    assert in_box(points, box, 0.2).tolist() == [True] * 5


def test_voxels_that_touch_a_turned_box_are_beside_it():
    """A square voxel of 0.8 m reaches 0.4 * (cos 30 + sin 30) = 0.546 m toward a box at 30 degrees, a small one counts as 0.2."""
    box = np.array([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, math.radians(30)])
    along = np.array([math.cos(math.radians(30)), math.sin(math.radians(30)), 0])
    points = np.array([1.54 * along, 1.55 * along, 1.19 * along, 1.21 * along, [0, 0, 1.39], [0, 0, 1.41]])
    assert in_box(points, box, (0.8, 0.8, 0.8)).tolist() == [True, False, True, True, True, False]
    assert in_box(points, box, (0.1, 0.1, 0.1)).tolist() == [False, False, True, False, False, False]


def test_points_are_claimed_as_voxels_are():
    xyz = np.array([[x, 0.5, 0.5] for x in (0.1, 1.0, 2.0, 9.0, 9.3, 15.0, 3.0)])
    classes = np.array([CAR, BUS, CAR, CAR, CAR, CAR, ROAD])
    found = boxes(([1.5, 0.5, 0.5, 4.0, 1.0, 1.0, 0.0], CAR, 0.9))
    segments = refine_points(xyz, classes, found, things=THINGS, config=RefineConfig())
    assert segments.classes.tolist() == [CAR] * 6 + [ROAD]
    assert segments.instances.tolist() == [1, 1, 1, 2, 2, 3, 0]


def test_points_take_the_label_of_their_voxel():
    semantic, outside = line((3, 4, CAR)), np.array([[3.5, 0.5, 0.5], [4.999, 0, 0.999], [5.0, 0.5, 0.5], [-0.1, 0, 0]])
    assert labels_at(semantic, outside, LINE, IGNORE).tolist() == [CAR, CAR, FREE, IGNORE]
    centers = LINE.centers().reshape(-1, 3)
    assert labels_at(semantic, centers, LINE, IGNORE).tolist() == semantic.reshape(-1).tolist()


def test_true_instances_are_of_the_first_box_of_a_class_exact_before_grown():
    semantic = line((0, 5, CAR), (6, 7, BUS), (8, 8, ROAD))
    rows = boxes((span(0, 2), CAR, 1), (span(2, 4), CAR, 1), (span(5, 7), BUS, 1), (span(3, 8), BUS, 1))
    ids = true_voxel_instances(semantic, rows.boxes, rows.classes, LINE, things=THINGS)[:, 0, 0]
    assert ids[:9].tolist() == [1, 1, 1, 2, 2, 0, 3, 3, 0]
    known = unknown_things(semantic, ids[:, None, None], THINGS)[:, 0, 0]
    assert known[:9].tolist() == [CAR] * 5 + [IGNORE, BUS, BUS, ROAD]
    # 0.2 beyond its face, where an other box holds it exactly
    near = boxes(([1.0, 0.5, 0.5, 1.2, 1, 1, 0], CAR, 1), ([2.0, 0.5, 0.5, 1.2, 1, 1, 0], CAR, 1))
    ids = true_voxel_instances(line((1, 1, CAR)), near.boxes, near.classes, LINE, things=THINGS)
    assert ids[1, 0, 0] == 1
    near.boxes[0, 0] = 0.7
    assert true_voxel_instances(line((1, 1, CAR)), near.boxes, near.classes, LINE, things=THINGS)[1, 0, 0] == 2


def test_points_in_two_boxes_are_nobodys():
    xyz = np.array([[x, 0.0, 0.0] for x in (0.0, 1.0, 2.0, 2.85, 3.0, 9.0, 1.0)])
    classes = np.array([CAR] * 6 + [BUS])
    rows = boxes(
        ([0.5, 0, 0, 1.2, 1, 1, 0], CAR, 1), ([1.8, 0, 0, 1.8, 1, 1, 0], CAR, 1), ([1, 0, 0, 1, 1, 1, 0], BUS, 1)
    )
    ids, twice = true_point_instances(xyz, classes, rows.boxes, rows.classes, things=THINGS)
    assert ids.tolist() == [1, 0, 2, 2, 0, 0, 3]
    assert twice.tolist() == [False, True, False, False, False, False, False]


@pytest.fixture(scope="module")
def street():
    source = synthetic.open_source(scenes=3, frames=1, grid="tiny", cameras=False, beams=2, style="urban", seed=4)
    return [source.load(name).frames[0] for name in source.scene_names()], source.grid


def test_perfect_voxels_and_boxes_have_a_quality_of_one(street):
    """Each box of a synthetic scene is found with the same score; nothing countable is left without an instance."""
    frames, grid = street
    metric, seen = voxel_panoptic(OCC3D), 0
    for frame in frames:
        semantic, rows = frame.labels.semantic, frame.boxes.boxes
        ids = np.array([OCC3D.id(name) for name in frame.boxes.names])
        truth = true_voxel_instances(semantic, rows, ids, grid, things=THINGS)
        boom = OCC3D.id("construction_vehicle")  # it reaches out of its box
        assert (truth[np.isin(semantic, list(THINGS - {boom}))] > 0).all()
        found = FoundBoxes(rows, ids, np.ones(len(rows), np.float32))
        segments = refine_voxels(semantic, found, grid, taxonomy=OCC3D, things=THINGS, config=RefineConfig())
        assert (segments.classes == semantic).mean() > 0.999
        classes = unknown_things(semantic, truth, THINGS)
        metric.update(segments.classes, segments.instances, classes, truth)
        seen += len(np.unique(truth)) - 1
    scores = metric.result()
    assert seen > 10
    assert scores["voxel-PQ_present"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("scores", "right", "threshold"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], [1, 1, 1, 1, 0], 0.25),  # all five: 0.8
        ([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0], 0.75),
        ([0.9, 0.8, 0.8], [1, 1, 0], 0.85),  # equal scores go together
        ([0.9], [0], 1.0),
        ([], [], 1.0),
    ],
)
def test_the_threshold_of_a_precision(scores, right, threshold):
    order = np.random.default_rng(0).permutation(len(scores))
    found = score_at_precision(np.array(scores)[order], np.array(right, bool)[order])
    assert found == pytest.approx(threshold)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"threshold": 1.1}, "threshold is 1.1"), ({"reach": 0.0}, "reach is 0.0")]
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        RefineConfig(**wrong)
