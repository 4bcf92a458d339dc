"""Frames that vote on each other's voxels, against loops that are too slow to be wrong."""

import dataclasses

import numpy as np
import pytest

from occstream.evaluation.bayes import (
    LAMBDAS,
    Confusions,
    best_exponent,
    confusions_by_exponent,
    naive_bayes,
    scores_by_exponent,
)
from occstream.evaluation.propagate import evidence, overlapping, packed, pull, pull_maps
from occstream.evaluation.rules import ABSTAIN, LOG_UNIT
from occstream.evaluation.votes import VoteConfig, in_frustum, voting
from occstream.sharding.exactmath import log
from occstream.sharding.grid import GRIDS, VoxelGrid
from occstream.sharding.poses import apply, inverse
from occstream.sharding.schema import IGNORE, OCC3D, Camera, Taxonomy

TWO = Taxonomy("two", ("car", "truck"), frozenset({"car", "truck"}), ((0, 0, 0), (9, 9, 9)))
MIXED = Taxonomy("mixed", ("road", "car", "wall"), frozenset({"car"}), ((0, 0, 0),) * 3)
KITTI = GRIDS["semantickitti"]
SMALL = VoxelGrid("small", (-2, -1.5, -1), (3, 2, 2), (1.0, 0.5, 1.0))  # 5 x 7 x 3


def pose(x=0.0, y=0.0, z=0.0, degrees=0.0):
    turn = np.radians(degrees)
    out = np.eye(4)
    out[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    out[:3, 3] = x, y, z
    return out


def forward_camera(width=1241, height=376, focal=718.856):
    """KITTI's camera at the origin, looking along x: 81.60 by 29.31 degrees."""
    to_ego = np.eye(4)
    to_ego[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    intrinsics = np.array([[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]])
    return Camera(b"", width, height, intrinsics, to_ego, np.eye(4), 0)


def slow(rule, grid, poses, target, volumes, views, itself):
    """The same by loops over voxels, sources and classes."""
    out = volumes[itself].copy() if itself >= 0 else np.full(grid.shape, IGNORE, np.uint8)
    inverses = [inverse(p) for p in poses]
    for index in np.ndindex(*grid.shape):
        world = apply(target, grid.centers(np.array(index)))
        heard = []
        for s, back in enumerate(inverses):
            at = np.floor((apply(back, world) - grid.lower) / grid.voxel + 1e-6).astype(int)
            if (at >= 0).all() and (at < grid.shape).all() and volumes[s][tuple(at)] != IGNORE:
                flat = int(np.ravel_multi_index(at, grid.shape))
                heard.append((s, int(volumes[s][tuple(at)]), bool(views[s][tuple(at)]), flat))
        seen = sum(view for _, _, view, _ in heard)
        moving = rule.parked and 2 * sum(view and rule.things[o] for _, o, view, _ in heard) < seen
        if moving:
            heard = [h for h in heard if h[0] == itself or not rule.things[h[1]]]
        score = np.zeros(rule.num_classes + 1, np.int64) + (rule.prior if rule.bayes else 0)
        for _, o, view, flat in heard:
            if rule.bayes:
                score += rule.table[(rule.place[flat] * 2 + view) * (rule.num_classes + 1) + o]
            else:
                score[o] += int(rule.weights[int(view), flat]) * rule.shares[o]
        if not heard or (not rule.bayes and score.max() <= 0):
            continue
        best, own = int(score.argmax()), out[index]
        keep = moving and own < rule.num_classes and rule.things[own]
        if keep and itself >= 0 and len(rule.trusted):
            flat = int(np.ravel_multi_index(index, grid.shape))
            keep = rule.trusted[(rule.place[flat] * 2 + views[itself][index]) * (rule.num_classes + 1) + own]
        if not (keep and (rule.things[best] or best == rule.num_classes)):
            out[index] = best
    return out


def run(rule, grid, poses, target, volumes, views, itself=-1, **options):
    sources = np.stack([packed(v, w) for v, w in zip(volumes, views)])
    before = volumes[itself] if itself >= 0 else np.full(grid.shape, IGNORE, np.uint8)
    maps = pull_maps(grid, target, grid, np.stack(poses))
    return pull(rule, maps, sources, range(len(poses)), before=before, itself=itself, **options)


def some_confusions(rng, classes, exponent=1.0):
    return Confusions(rng.integers(0, 200, (9, 2, classes, classes)) + 300 * np.eye(classes, dtype=int), exponent)


def test_centers_land_where_they_should_in_a_turned_grid():
    maps = pull_maps(KITTI, pose(14, 3, degrees=90), KITTI, pose(10)[None])
    place = maps[0] @ [5, 128, 10, 1]
    np.testing.assert_allclose(place - 1e-6, (19.5, 148.5, 10.5), atol=1e-9)
    assert tuple(np.floor(place).astype(int)) == (19, 148, 10)
    back = pull_maps(KITTI, pose(10), KITTI, pose(14, 3, degrees=90)[None])
    assert tuple(np.floor(back[0] @ [19, 148, 10, 1]).astype(int)) == (5, 128, 10)
    np.testing.assert_allclose(KITTI.centers(np.array([5, 128, 10])), (1.1, 0.1, 0.1), atol=1e-12)


def test_weights_of_a_camera_and_of_a_lidar():
    points = np.array([(10, 0, 0), (30, 0, 0), (10, 12, 0), (10, 0, 4), (-5, 0, 0), (20, 13, 0)], float)
    # A grid of one voxel around each point asks whether a camera sees it.
    view = []
    for point in points:
        grid = VoxelGrid("one", tuple(point - 0.0625), tuple(point + 0.0625), (0.125, 0.125, 0.125))
        view.append(in_frustum(grid, np.eye(4), [forward_camera()]).item())
    weights = VoteConfig().weights(points, np.array(view), forward=True)
    np.testing.assert_allclose(weights, (1, 0.1, 0.01, 0.01, 0.01, 0.1), atol=1e-9)
    far = np.array([(0, 0, 0), (10, 0, 0), (0, 25.6, 0), (51.2, 0, 0), (90, 0, 0)], float)
    got = VoteConfig("lidar").weights(far, True, forward=True)
    np.testing.assert_allclose(got, (10, 8.06640625, 5.05, 0.1, 0.1), atol=1e-9)


def test_a_few_heavy_votes_beat_many_light_ones():
    grid = VoxelGrid("one", (0, 0, 0), (1, 1, 1), (1, 1, 1))
    rule = voting(VoteConfig("none"), grid, MIXED)
    total = 0
    for said, weight in ((0, 1), (0, 0.1), (0, 0.01), (1, 0.3), (1, 1)):
        volume, share = np.full((1, 1, 1), said, np.uint8), round(weight * 1e6)
        one = dataclasses.replace(rule, weights=np.full((2, 1), share, np.int32))
        total = total + np.eye(4, dtype=int)[said] * share * 1000
        assert run(one, grid, [np.eye(4)], np.eye(4), [volume], [volume < 9]).semantic.item() == said
    assert (total / 1e9).tolist() == [1.11, 1.3, 0, 0]


def test_posteriors_of_the_worked_example():
    said = np.array([[0.6, 0.2, 0.2], [0.3, 0.5, 0.2], [0.05, 0.05, 0.9]])
    # Counts large enough that half a voxel more does not matter, and a truth of 5, 1 and 94 %.
    counts = np.zeros((9, 2, 3, 3), np.int64)
    counts[0, 1] = np.rint(said * np.array([[5], [1], [94]]) * 1e11)
    grid = VoxelGrid("one", (0, 0, 0), (1, 1, 1), (1, 1, 1))
    rule = naive_bayes(Confusions(counts), grid, TWO)

    def posterior(words):
        volumes = [np.full((1, 1, 1), "ctf".index(word), np.uint8) for word in words]
        sources = np.stack([packed(v) for v in volumes])
        maps = pull_maps(grid, np.eye(4), grid, np.stack([np.eye(4)] * len(words)))
        score = evidence(rule, maps, sources, range(len(words)), index=np.zeros((1, 3), np.int64))[0] + rule.prior
        values = np.exp((score - score.max()) / LOG_UNIT)
        pulled = run(rule, grid, [np.eye(4)] * len(words), np.eye(4), volumes, [v < 9 for v in volumes], details=True)
        assert pulled.semantic.item() == score.argmax()
        assert abs(pulled.confidence.item() - 255 * values.max() / values.sum()) <= 0.501
        return values / values.sum()

    # Four digits are given; the integers behind hold five.
    assert posterior("cff") == pytest.approx([*posterior("cff")[:2], 0.9665], abs=6e-5)
    car, _, free = posterior("ccf")
    assert (car, free) == pytest.approx((0.6107, 0.3588), abs=6e-5)
    assert posterior("ccff")[2] == pytest.approx(0.7157, abs=6e-5)
    car, truck, _ = posterior("tct")
    assert (car, truck) == pytest.approx((0.5804, 0.3628), abs=6e-5)


def test_logarithms_are_those_of_the_library():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 999), np.linspace(0.5, 2, 999)])
    np.testing.assert_allclose(log(x), np.log(x), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_is_the_slow_loop(seed):
    rng = np.random.default_rng(seed)
    poses = [pose(*rng.uniform(-1.5, 1.5, 2), rng.uniform(-0.6, 0.6), rng.uniform(-70, 70)) for _ in range(5)]
    volumes = [rng.choice([0, 1, 2, 3, IGNORE], SMALL.shape).astype(np.uint8) for _ in poses]
    views = [rng.random(SMALL.shape) < 0.6 for _ in poses]
    votes = voting(VoteConfig(("camera", "lidar", "none")[seed % 3], box=1.0), SMALL, MIXED)
    bayes = naive_bayes(some_confusions(rng, 4, 0.7), SMALL, MIXED)
    for rule in (votes, bayes):
        for parked in (False, True):
            rule = dataclasses.replace(rule, parked=parked)
            for itself in (-1, 2):
                target = poses[2]
                want = slow(rule, SMALL, poses, target, volumes, views, itself)
                got = run(rule, SMALL, poses, target, volumes, views, itself)
                assert (got.semantic == want).all(), (rule.bayes, parked, itself)


def test_identity_and_a_single_frame_change_nothing():
    rng = np.random.default_rng(5)
    volume = rng.choice([0, 1, 2, 3, IGNORE], SMALL.shape).astype(np.uint8)
    view = rng.random(SMALL.shape) < 0.5
    far = pose(4.7e5, 5.4e6, 100, 33)
    rule = voting(VoteConfig(), SMALL, MIXED)
    assert (run(rule, SMALL, [far], far, [volume], [view], 0).semantic == volume).all()
    shifted = run(rule, SMALL, [far], far @ pose(1.0), [volume], [view])
    assert (shifted.semantic[:-1] == volume[1:]).all()
    assert (shifted.semantic[-1] == IGNORE).all(), "outside the source nobody says anything"


@pytest.mark.parametrize("place", [0.0, 1e6 / 3])
def test_half_a_voxel_goes_to_one_side_everywhere(place):
    grid = VoxelGrid("row", (0, 0, 0), (4, 1, 1), (0.2, 1, 1))
    volume = np.arange(20, dtype=np.uint8).reshape(20, 1, 1) % 17
    rule = voting(VoteConfig("none"), grid, OCC3D)
    pulled = run(rule, grid, [pose(place)], pose(place + 0.1), [volume], [volume < 99]).semantic
    assert (pulled[:-1] == volume[1:]).all()
    assert pulled[-1] == IGNORE, "its center lies on the upper face, which is outside"


def test_a_world_of_one_class_stays_as_it_is():
    rng = np.random.default_rng(2)
    poses = [pose(*rng.uniform(-9, 9, 3), rng.uniform(0, 360)) for _ in range(6)]
    volumes = [np.full(SMALL.shape, 2, np.uint8)] * 6
    for rule in (voting(VoteConfig(), SMALL, MIXED), naive_bayes(some_confusions(rng, 4), SMALL, MIXED)):
        only = dataclasses.replace(rule, prior=np.array([-9, -9, 0, -9]) * LOG_UNIT * 9) if rule.bayes else rule
        assert (run(only, SMALL, poses, poses[0], volumes, [v < 9 for v in volumes], 0).semantic == 2).all()


def test_ties_go_to_the_lowest_class_and_votes_without_weight_decide_nothing():
    grid = VoxelGrid("one", (0, 0, 0), (1, 1, 1), (1, 1, 1))
    volumes = [np.full((1, 1, 1), said, np.uint8) for said in (2, 0, 2, 0)]
    same, rule = [np.eye(4)] * 4, voting(VoteConfig("none"), grid, MIXED)
    assert run(rule, grid, same, np.eye(4), volumes, [v < 9 for v in volumes], 0).semantic.item() == 0
    silent = voting(VoteConfig("none", empty=0.0), grid, MIXED)
    free = [np.full((1, 1, 1), said, np.uint8) for said in (IGNORE, 3, 3)]
    assert run(silent, grid, same[:3], np.eye(4), free, [v < 9 for v in free], 0).semantic.item() == IGNORE
    assert run(rule, grid, same[:3], np.eye(4), free, [v < 9 for v in free], 0).semantic.item() == 3


def test_neither_the_order_of_sources_nor_threads_nor_parts_change_a_byte():
    rng = np.random.default_rng(8)
    poses = [pose(*rng.uniform(-1, 1, 3), rng.uniform(0, 360)) for _ in range(7)]
    volumes = [rng.choice([0, 1, 2, 3, IGNORE], SMALL.shape).astype(np.uint8) for _ in poses]
    views = [rng.random(SMALL.shape) < 0.5 for _ in poses]
    rules = voting(VoteConfig("lidar"), SMALL, MIXED), naive_bayes(some_confusions(rng, 4, 0.3), SMALL, MIXED)
    for rule in (dataclasses.replace(r, parked=True) for r in rules):
        whole = run(rule, SMALL, poses, poses[3], volumes, views, 3, details=True)
        order = rng.permutation(7)
        mixed = [[values[i] for i in order] for values in (poses, volumes, views)]
        numbers = order.astype(np.int32)
        other = run(rule, SMALL, mixed[0], poses[3], *mixed[1:], int(np.flatnonzero(order == 3)[0]), details=True,
                    threads=3, numbers=numbers)  # fmt: skip
        for name in ("semantic", "frames", "last", "confidence"):
            assert (getattr(whole, name) == getattr(other, name)).all(), name
        half = run(rule, SMALL, poses, poses[3], volumes, views, 3, begin=(2, 1, 1), end=(5, 6, 3)).semantic
        assert (half[2:5, 1:6, 1:3] == whole.semantic[2:5, 1:6, 1:3]).all()
        rest = np.ones(SMALL.shape, bool)
        rest[2:5, 1:6, 1:3] = False
        assert (half[rest] == volumes[3][rest]).all()


def test_a_parked_car_stays_and_one_that_drives_is_not_smeared():
    grid = VoxelGrid("row", (0, 0, 0), (4, 1, 1), (1, 1, 1))
    car, free = 1, 3
    volumes = [np.full((4, 1, 1), free, np.uint8) for _ in range(5)]
    for t, volume in enumerate(volumes):
        volume[0] = car if t != 1 else free  # parked, missed once
        volume[1 + t % 3] = car  # drives
    rule = dataclasses.replace(voting(VoteConfig("none", empty=1.0), grid, MIXED), parked=True)
    out = run(rule, grid, [np.eye(4)] * 5, np.eye(4), volumes, [v < 9 for v in volumes], 1).semantic.ravel()
    assert out.tolist() == [car, free, car, free]


def test_sources_that_cannot_reach_the_target_are_dropped_and_no_others():
    rng = np.random.default_rng(1)
    poses = np.stack([pose(*rng.uniform(-9, 9, 3), rng.uniform(0, 360)) for _ in range(300)])
    maps = pull_maps(SMALL, np.eye(4), SMALL, poses)
    near = overlapping(maps, (0, 0, 0), SMALL.shape, SMALL.shape)
    index = np.concatenate([np.indices(SMALL.shape).reshape(3, -1), np.ones((1, SMALL.size))])
    place = np.einsum("sij,jn->sin", maps, index)
    truly = ((place >= 0) & (place < np.array(SMALL.shape)[:, None])).all(1).any(1)
    assert not (truly & ~near).any()
    assert near.sum() < 300


def test_volumes_pack_into_a_byte():
    semantic = np.array([[[0, 3, IGNORE]]], np.uint8)
    assert packed(semantic, semantic == 3).ravel().tolist() == [0, 131, ABSTAIN]
    assert packed(semantic).ravel().tolist() == [128, 131, 255]


def test_lambda_is_the_one_of_the_highest_scores():
    rng = np.random.default_rng(3)
    truth, scores = rng.integers(0, 3, 500), rng.integers(-9, 9, (500, 3)) * LOG_UNIT
    prior = np.array([0, -2, 7]) * LOG_UNIT
    counts = confusions_by_exponent(scores, truth, prior)
    for exponent, found, (iou, miou) in zip(LAMBDAS, counts, scores_by_exponent(counts)):
        said = (prior + exponent * scores).argmax(1)
        assert found.sum() == 500
        each = [((said == k) & (truth == k)).sum() / ((said == k) | (truth == k)).sum() for k in (0, 1)]
        assert miou == pytest.approx(np.mean(each))
        assert iou == pytest.approx(((said < 2) & (truth < 2)).sum() / ((said < 2) | (truth < 2)).sum())
    best = np.zeros((len(LAMBDAS), 2))
    best[[4, 7]] = 0.5
    assert best_exponent(best) == LAMBDAS[4]
    assert scores_by_exponent(np.zeros((10, 3, 3), np.int64)).tolist() == [[0, 0]] * 10


def test_a_voxel_that_is_not_sure_shares_its_vote():
    """Two frames are half sure of a wall and a little less of a road; one is wholly sure of the road."""
    grid = VoxelGrid("one", (0, 0, 0), (1, 1, 1), (1, 1, 1))
    rule = voting(VoteConfig("none"), grid, MIXED)
    said = [np.full((1, 1, 1), c, np.uint8) for c in (2, 2, 0)]
    second = np.array([0, 0, IGNORE], np.uint8).reshape(3, 1, 1, 1)
    sure = np.array([150, 150, 255], np.uint8).reshape(3, 1, 1, 1)
    alike = [np.eye(4)] * 3, np.eye(4), said, [v < 9 for v in said]
    assert run(rule, grid, *alike).semantic.item() == 2
    got = run(rule, grid, *alike, doubts=(second, sure), details=True)
    assert got.semantic.item() == 0, "300 to 210 + 255 of 255ths"
    assert got.confidence.item() == round(255 * (210 + 255) / 765)
    assert got.frames.item() == 3
    certain = second, np.full_like(sure, 255)
    assert run(rule, grid, *alike, doubts=certain).semantic.item() == 2, "as without doubts"


def shared(rule, target, poses, said, views, doubts):
    """Scores of a target voxel's center by loops: of all, of other frames' things, and how many frames say what."""
    classes = rule.num_classes + 1
    score, of_things, counts = np.zeros(classes, np.int64), np.zeros(classes, np.int64), np.zeros(4, int)
    for s, place in enumerate(poses):
        at = np.floor((apply(inverse(place), target) - SMALL.lower) / SMALL.voxel + 1e-6).astype(int)
        if (at < 0).any() or (at >= SMALL.shape).any():
            continue
        first, view, flat = int(said[s][*at]), bool(views[s][*at]), int(np.ravel_multi_index(at, SMALL.shape))
        second, sure = (int(each[s][*at]) for each in doubts)
        thing = bool(rule.things[first])
        counts += 1, view, view and thing, thing and s > 0
        for of, part in [(first, sure), (second, 255 - sure)] if second < classes else [(first, 255)]:
            amount = np.eye(classes, dtype=np.int64)[of] * (
                0 if rule.bayes else int(rule.weights[int(view), flat]) * rule.shares[of]
            )
            if rule.bayes:
                amount = rule.table[(rule.place[flat] * 2 + view) * classes + of].astype(np.int64)
            score += amount * part // 255
            of_things += amount * part // 255 * bool(rule.things[of] and s > 0)
    return score, of_things, counts


@pytest.mark.parametrize("kind", ["votes", "bayes"])
@pytest.mark.parametrize("parked", [False, True])
def test_shared_votes_are_the_sum_of_their_parts(kind, parked):
    """By loops, on turned grids; and without second classes nothing changes."""
    rng = np.random.default_rng(7)
    rule = (
        naive_bayes(some_confusions(rng, 4), SMALL, MIXED)
        if kind == "bayes"
        else voting(VoteConfig("none"), SMALL, MIXED)
    )
    rule = dataclasses.replace(rule, parked=parked, trusted=np.zeros(0, bool))
    poses = [pose(), pose(0.7, 0.3, degrees=20), pose(-0.4, 0.2, 0.1, degrees=-35)]
    said = [rng.integers(0, 4, SMALL.shape).astype(np.uint8) for _ in poses]
    views = [rng.random(SMALL.shape) < 0.7 for _ in poses]
    second = np.stack([(v + rng.integers(1, 4, v.shape)).astype(np.uint8) % 4 for v in said])
    second[:, 0] = IGNORE
    doubts = second, rng.integers(128, 256, second.shape).astype(np.uint8)
    got = run(rule, SMALL, poses, poses[0], said, views, itself=0, doubts=doubts).semantic
    want = said[0].copy()
    for index in np.ndindex(*SMALL.shape):
        score, of_things, (votes, seen, things, apart) = shared(
            rule, apply(poses[0], SMALL.centers(np.array(index))), poses, said, views, doubts
        )
        moving = parked and 2 * things < seen
        score, votes = (score - of_things, votes - apart) if moving else (score, votes)
        if not votes or (not rule.bayes and score.max() <= 0):
            continue
        best, own = int((score + (rule.prior if rule.bayes else 0)).argmax()), want[index]
        if not (moving and rule.things[own] and (rule.things[best] or best == 3)):
            want[index] = best
    assert (got == want).all()
    hard = run(rule, SMALL, poses, poses[0], said, views, itself=0).semantic
    assert (got != hard).any()
    nowhere = np.full_like(second, IGNORE), doubts[1]
    assert (run(rule, SMALL, poses, poses[0], said, views, itself=0, doubts=nowhere).semantic == hard).all()


def test_free_voxels_in_doubt_are_other_words():
    """A table that knows them makes of two frames' doubts a wall, and of two frames' certainties nothing."""
    semantic, sure = np.array([3, 3, 3, 3, 2, IGNORE], np.uint8), np.array([15, 16, 64, 128, 128, 128], np.uint8)
    assert packed(semantic, np.zeros(6, bool), evidence=sure, free=3).tolist() == [3, 4, 5, 6, 2, ABSTAIN]
    assert packed(semantic, np.zeros(6, bool)).tolist() == [3, 3, 3, 3, 2, ABSTAIN]
    grid = VoxelGrid("row", (0, 0, 0), (2, 1, 1), (1, 1, 1))
    counts = np.zeros((9, 2, 4, 7), np.int64)
    counts[:, :, 3, 3:] = 1000, 100, 50, 10  # truly free
    counts[:, :, 2, 2:] = 50, 20, 5, 10, 40  # truly a wall
    rule = naive_bayes(Confusions(counts), grid, MIXED)
    assert Confusions(counts).evidence
    said = np.full((2, 1, 1), 3, np.uint8)
    one = packed(said, evidence=np.array([200, 0], np.uint8).reshape(2, 1, 1), free=3)
    sources, maps = np.stack([one] * 2), pull_maps(grid, np.eye(4), grid, np.stack([np.eye(4)] * 2))
    scores = evidence(rule, maps, sources, range(2), index=np.array([[0, 0, 0]]))[0]
    assert (scores == 2 * rule.table.reshape(9, 2, 7, 4)[0, 1, 6]).all()
    for parked in (False, True):
        rule = dataclasses.replace(rule, parked=parked)
        assert pull(rule, maps, sources, range(2), before=said, itself=0).semantic.ravel().tolist() == [2, 3]
