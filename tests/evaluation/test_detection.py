"""Detection scores: worked numbers, a slow reference, ties, empty frames, and ranks."""

import math
import warnings

import numpy as np
import pytest

from occstream.evaluation.detection import (
    ATTRIBUTES,
    NO_ATTRIBUTE,
    NUSCENES,
    BoxSet,
    DetectionMetric,
    default_attributes,
    in_reach,
    rules_of,
    without_attributes,
)
from occstream.sharding.schema import OCC3D, OPENSCENE, Boxes
from tests.evaluation.ranks import run_ranks

CAR = NUSCENES.classes.index("car")


def cars(*rows):
    """Boxes from (x, y, score, yaw, vx, vy); what a row does not say is 0."""
    table = np.zeros((len(rows), 6))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    boxes = np.zeros((len(rows), 7))
    boxes[:, :2], boxes[:, 3:6], boxes[:, 6] = table[:, :2], (4, 2, 1.5), table[:, 3]
    parked = np.full(len(rows), ATTRIBUTES.index("vehicle.parked"))
    return BoxSet(boxes, np.full(len(rows), CAR), table[:, 4:6], parked, table[:, 2])


TRUTH = cars((10, 0), (20, 0), (30, 0), (40, 0))


def scores(*frames, rules=NUSCENES):
    metric = DetectionMetric(rules)
    for i, (predicted, truth) in enumerate(frames):
        metric.update(f"frame-{i:03d}", predicted, truth)
    return metric.result()


def of_car(found):
    return [found[f"{name}/car"] for name in ("AP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")]


def test_the_worked_example():
    predicted = cars((10.3, 0, 0.9, 0.1, 0.5), (21.5, 0, 0.8), (30, 0.8, 0.7, 0, 0, 1), (70, 0, 0.6), (10.1, 0, 0.5))
    # A prediction beyond the range would be dropped: the example is of the curve alone.
    rules = rules_without_range()
    found = scores((predicted, TRUTH), rules=rules)
    by_distance = [found[f"AP/car/{d}"] for d in ("0.5", "1", "2", "4")]
    assert by_distance == pytest.approx([0.15679012, 0.30740741, 0.71728395, 0.71728395], abs=1e-8)
    assert of_car(found) == pytest.approx([0.47469136, 0.64410256, 0, 0.06743590, 0.40384615, 0], abs=1e-8)
    nds = (5 * found["AP/car"] + sum(1 - e for e in of_car(found)[1:])) / 10
    assert nds == pytest.approx(0.62580, abs=1e-5)
    assert found["NDS_present"] == pytest.approx(nds)
    assert found["mAP_present"] == found["AP/car"]
    # Nine classes without truth are in the official means: AP 0, errors 1.
    assert found["mAP"] == pytest.approx(0.047469136)
    assert found["mATE"] == pytest.approx((0.64410256 + 9) / 10)
    assert found["mAOE"] == pytest.approx((0.06743590 + 8) / 9)  # without cones
    assert found["mAVE"] == pytest.approx((0.40384615 + 7) / 8)  # without cones and barriers


def rules_without_range():
    return type(NUSCENES)(**{**vars(NUSCENES), "reach": (1e3,) * 10})


@pytest.mark.parametrize(("found", "ap"), [(4, 1.0), (2, 0.44444444), (1, 0.16666667), (0, 0.0)])
def test_some_of_four_cars_exactly(found, ap):
    exact = cars(*[(10 * (i + 1), 0, 0.9 - 0.1 * i) for i in range(found)])
    result = scores((exact, TRUTH))
    assert result["AP/car"] == pytest.approx(ap, abs=1e-8)
    assert of_car(result)[1:] == ([0] * 5 if found else [1] * 5)


def perfect(classes):
    rng = np.random.default_rng(1)
    n = len(classes)
    boxes = np.concatenate([rng.uniform(-20, 20, (n, 3)), rng.uniform(1, 4, (n, 3)), rng.uniform(-3, 3, (n, 1))], 1)
    velocity = rng.uniform(-5, 5, (n, 2))
    kinds = np.array(classes)
    return BoxSet(boxes, kinds, velocity, default_attributes(kinds, velocity), rng.random(n), np.full(n, 3))


def test_perfect_predictions_score_one():
    frame = perfect([c for c in range(10) for _ in range(5)])
    result = scores((frame, frame), (frame, frame))
    assert [result[n] for n in ("mAP", "NDS", "NDS_present")] == pytest.approx([1, 1, 1], abs=1e-12)
    assert [result[name] for name in ("mATE", "mASE", "mAOE", "mAVE", "mAAE")] == [0] * 5
    assert math.isnan(result["mAOE/traffic_cone"])
    assert math.isnan(result["mAVE/barrier"])
    assert result["mAOE/barrier"] == 0


def test_errors_of_boxes_whose_score_is_zero_are_not_known():
    assert of_car(scores((TRUTH, TRUTH))) == pytest.approx([1, 1, 1, 1, 1, 1])


def test_a_match_is_strictly_nearer_than_the_threshold():
    result = scores((cars((10.5, 0, 0.9)), cars((10, 0))))
    assert [result[f"AP/car/{d}"] for d in ("0.5", "1")] == pytest.approx([0, 1])
    # Nor the next nearest, where the nearest is taken.
    second = scores((cars((10, 0, 0.9), (10, 0, 0.8)), cars((10, 0), (10.5, 0))))
    assert second["AP/car/1"] == pytest.approx(1)
    assert second["AP/car/0.5"] < 0.5


def test_a_barrier_may_point_the_other_way_and_a_car_may_not():
    truth = perfect([CAR, NUSCENES.classes.index("barrier")])
    turned = truth.where(np.arange(2))
    turned.boxes[:, 6] += math.pi
    found = scores((turned, truth))
    assert [found["mAOE/car"], found["mAOE/barrier"]] == pytest.approx([math.pi, 0])


def test_of_equal_scores_the_later_comes_first():
    near, far = (10.1, 0, 0.5), (60, 0, 0.5)
    rules = rules_without_range()
    first = scores((cars(near, far), cars((10, 0))), rules=rules)["AP/car"]
    later = scores((cars(far, near), cars((10, 0))), rules=rules)["AP/car"]
    assert later == pytest.approx((89 * 0.9 + 0.4) / 90 / 0.9)  # precision 1, but 0.5 at the last recall
    assert first == pytest.approx(sum(max(r / 200 - 0.1, 0) for r in range(11, 101)) / 90 / 0.9)  # rises from 0 to 0.5
    # Also between frames, by their keys, in whatever order they come.
    frames = {"a": (cars((60, 0, 0.5)), cars()), "b": (cars((10, 0, 0.5)), cars((10, 0)))}
    for order in ("ab", "ba"):
        metric = DetectionMetric(rules)
        for key in order:
            metric.update(key, *frames[key])
        assert metric.result()["AP/car"] == later


def test_what_does_not_count():
    kinds = [NUSCENES.classes.index(n) for n in ("car", "pedestrian", "bicycle", "bicycle", "traffic_cone", "car")]
    boxes = np.tile([0, 0, 0, 1, 1, 1, 0.0], (6, 1))
    boxes[:, 0] = [49.9, 40, 10, 14, 30.1, 5]
    found = BoxSet(boxes, np.array(kinds), points=np.array([1, 1, 1, 1, 1, 0]))
    rack = np.array([[10, 0, 0, 4, 2, 2, 0.3]])
    assert in_reach(found, NUSCENES).boxes[:, 0].tolist() == [49.9, 10, 14]
    assert in_reach(found, NUSCENES, rack).boxes[:, 0].tolist() == [49.9, 14]


def test_nothing_predicted_nothing_there_and_no_frame_at_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = scores((cars(), TRUTH))
        assert nothing["mAP"] == nothing["NDS"] == nothing["NDS_present"] == 0
        assert nothing["mATE"] == 1
        no_truth = scores((TRUTH, cars()))
        assert no_truth["mAP"] == 0
        assert math.isnan(no_truth["mAP_present"])
        assert math.isnan(scores()["mAP"])
        assert "0 frames: NDS nan" in DetectionMetric().table()


def test_values_that_no_box_can_have_are_refused():
    good = cars((10, 0, 0.9))
    for field, value, word in (
        ("boxes", np.full((1, 7), np.nan), "not finite"),
        ("boxes", np.zeros((1, 7)), "size that is not positive"),
        ("classes", np.array([10]), "class outside 0..9"),
        ("classes", np.array([-1]), "class outside"),
        ("scores", np.array([np.nan]), "score that is not finite"),
        ("scores", None, "no scores"),
        ("scores", np.zeros(2), "2 scores for 1 predicted boxes"),
        ("velocity", np.full((1, 2), np.nan), "velocity that is not finite"),
        ("attributes", np.array([8]), "unknown attribute"),
    ):
        with pytest.raises(ValueError, match=f"frame k: .*{word}"):
            DetectionMetric().update("k", BoxSet(**{**vars(good), field: value}), TRUTH)
    with pytest.raises(ValueError, match="501 predicted boxes, at most 500"):
        DetectionMetric().update("k", good.where(np.zeros(501, int)), TRUTH)
    metric = DetectionMetric()
    metric.update("k", good, TRUTH)
    metric.update("k", good, TRUTH)
    with pytest.raises(ValueError, match="frame k was evaluated twice"):
        metric.result()


def test_rules_for_other_taxonomies_have_no_attributes():
    assert rules_of(OCC3D) is NUSCENES
    rules = rules_of(OPENSCENE)
    assert rules.classes == ("vehicle", "bicycle", "pedestrian")
    assert rules.reach == (50, 40, 40)
    boxes = Boxes(np.tile([5, 0, 0, 4, 2, 1, 0.0], (2, 1)), ["barrier", "vehicle"], ["a", "b"], np.zeros((2, 2)))
    truth = BoxSet.of(boxes, rules)
    assert truth.classes.tolist() == [0]
    found = scores((BoxSet.of(boxes, rules, scores=np.ones(2)), truth), rules=rules)
    assert math.isnan(found["mAAE"])
    assert found["NDS_present"] == pytest.approx(1, abs=1e-12)


def test_attributes_that_nobody_knows():
    truth = BoxSet(**{**vars(TRUTH), "attributes": None})
    found = BoxSet(**{**vars(truth), "scores": np.array([0.9, 0.8, 0.7, 0.6])})
    assert scores((found, truth))["mAAE/car"] == 1
    without = scores((found, truth), rules=without_attributes(NUSCENES))
    assert math.isnan(without["mAAE"])
    assert without["NDS_present"] == pytest.approx(1)
    assert without["NDS"] == pytest.approx((5 * 0.1 + (0.1 + 0.1 + 1 / 9 + 1 / 8)) / 9)


def test_default_attributes_go_by_class_and_speed():
    kinds = np.array(
        [NUSCENES.classes.index(n) for n in ("car", "bus", "pedestrian", "bicycle", "barrier", "traffic_cone")]
    )
    for speed, names in (
        (0.2, ["vehicle.parked", "vehicle.parked", "pedestrian.standing", "cycle.without_rider"]),
        (0.3, ["vehicle.moving", "vehicle.moving", "pedestrian.moving", "cycle.with_rider"]),
    ):
        found = default_attributes(kinds, np.array([[0, speed]] * 6))
        assert [ATTRIBUTES[a] for a in found[:4]] == names
        assert found[4:].tolist() == [NO_ATTRIBUTE] * 2


# The procedure of the paper, one box after the other.


def slow_class(frames, name, distance):
    """(average precision, five errors) from lists of dicts; frames are (predicted, truth) of ``random_frames``."""
    c = NUSCENES.classes.index(name)
    predictions, truths, order = [], 0, 0
    for f, (predicted, truth) in enumerate(frames):
        truths += int((truth.classes == c).sum())
        for i in range(len(predicted.boxes)):
            if predicted.classes[i] == c:
                predictions.append((predicted.scores[i], order, f, i))
                order += 1
    if not truths:
        return 0.0, [1.0] * 5
    predictions.sort(reverse=True)
    taken, recall, precision, matched = set(), [], [], []
    for n, (score, _, f, i) in enumerate(predictions, 1):
        predicted, truth = frames[f]
        best, best_at = math.inf, None
        for j in range(len(truth.boxes)):
            if truth.classes[j] == c and (f, j) not in taken:
                d = math.dist(predicted.boxes[i, :2], truth.boxes[j, :2])
                if d < best:
                    best, best_at = d, j
        if best < distance:
            taken.add((f, best_at))
            matched.append((score, slow_errors(predicted, i, truth, best_at, best, name)))
        recall.append(len(taken) / truths)
        precision.append(len(taken) / n)
    if not matched:
        return 0.0, [1.0] * 5
    grid = [0.01 * r for r in range(101)]
    curve = [slow_interp(r, recall, precision) for r in grid]
    confidence = [slow_interp(r, recall, [p[0] for p in predictions]) for r in grid]
    ap = sum(max(p - 0.1, 0) for p in curve[11:]) / 90 / 0.9
    last = max((r for r in range(101) if confidence[r]), default=0)
    if last < 11:
        return ap, [1.0] * 5
    errors = []
    for e in range(5):
        values, running, total, known = [m[1][e] for m in matched], [], 0.0, 0
        for v in values:
            total, known = (total, known) if math.isnan(v) else (total + v, known + 1)
            running.append(total / known if known else 0.0)
        if not known:
            errors.append(1.0)
            continue
        x, y = [m[0] for m in matched][::-1], running[::-1]
        read = [slow_interp(confidence[r], x, y, y[-1]) for r in range(11, last + 1)]
        errors.append(sum(read) / len(read))
    return ap, errors


def slow_interp(at, x, y, beyond=0.0):
    """Linear; of equal x the last counts, before the first its y, after the last ``beyond``."""
    if at > x[-1]:
        return beyond
    if at < x[0]:
        return y[0]
    j = max(k for k in range(len(x)) if x[k] <= at)
    if j == len(x) - 1:
        return y[j]
    return y[j] + (at - x[j]) / (x[j + 1] - x[j]) * (y[j + 1] - y[j])


def slow_errors(predicted, i, truth, j, distance, name):
    a, b = predicted.boxes[i], truth.boxes[j]
    both = math.prod(min(p, q) for p, q in zip(a[3:6], b[3:6]))
    scale = 1 - both / (math.prod(a[3:6]) + math.prod(b[3:6]) - both)
    period = math.pi if name == "barrier" else 2 * math.pi
    turn = abs(a[6] - b[6]) % period
    attribute = math.nan if truth.attributes[j] < 0 else float(truth.attributes[j] != predicted.attributes[i])
    speed = math.dist(predicted.velocity[i], truth.velocity[j])
    return [distance, scale, min(turn, period - turn), speed, attribute]


def random_frames(seed, count=6):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        n, m = rng.integers(0, 12), rng.integers(0, 14)
        truth, predicted = (
            BoxSet(
                np.concatenate([rng.uniform(-4, 4, (k, 3)), rng.uniform(1, 3, (k, 3)), rng.uniform(-3, 3, (k, 1))], 1),
                rng.choice([0, 5, 9], k),
                rng.uniform(-2, 2, (k, 2)),
                rng.integers(-1, 3, k),
                rng.integers(0, 6, k) / 5,  # many ties
            )
            for k in (n, m)
        )
        truth.velocity[rng.random(n) < 0.3] = np.nan
        frames.append((predicted, truth))
    return frames


@pytest.mark.parametrize("seed", range(4))
def test_random_frames_equal_the_slow_reference(seed):
    frames = random_frames(seed)
    found = scores(*frames)
    for name in ("car", "pedestrian", "barrier", "bus"):
        for d in NUSCENES.distances:
            assert found[f"AP/{name}/{d:g}"] == pytest.approx(slow_class(frames, name, d)[0], abs=1e-9)
        errors = [found[f"{m}/{name}"] for m in ("mATE", "mASE", "mAOE", "mAVE", "mAAE")]
        expected = slow_class(frames, name, 2.0)[1]
        for e, (ours, slow) in enumerate(zip(errors, expected)):
            if not NUSCENES.scored(name)[e]:
                assert math.isnan(ours)
            else:
                assert ours == pytest.approx(slow, abs=1e-9), (name, e)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_changes_nothing(ranks, monkeypatch):
    frames = random_frames(7, 14)
    for predicted, _ in frames:
        predicted.scores[:] = 0.5  # only the order of frames and boxes decides
    whole = scores(*frames)

    def work(rank):
        metric = DetectionMetric()
        for i in reversed(range(rank, len(frames), 2)):  # of three ranks the last has no frame
            if rank < 2:
                metric.update(f"frame-{i:03d}", *frames[i])
        metric.all_reduce()
        return metric.result()

    for found in run_ranks(ranks, work, monkeypatch):
        assert found == pytest.approx(whole, rel=0, abs=0, nan_ok=True)


def test_a_frame_on_two_ranks_is_refused(monkeypatch):
    def work(rank):
        metric = DetectionMetric()
        metric.update("same", TRUTH, TRUTH)
        metric.all_reduce()
        with pytest.raises(ValueError, match="frame same was evaluated twice"):
            metric.result()

    run_ranks(2, work, monkeypatch)


def test_the_order_of_boxes_without_ties_changes_nothing():
    rng = np.random.default_rng(3)
    frames = random_frames(9)
    for predicted, _ in frames:
        predicted.scores[:] = rng.permutation(len(predicted.scores)) / 20 + rng.random() / 1e3
    shuffled = [tuple(s.where(rng.permutation(len(s.boxes))) for s in frame) for frame in frames]
    assert scores(*shuffled) == pytest.approx(scores(*frames), abs=1e-12, nan_ok=True)
