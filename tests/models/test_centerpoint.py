"""The detection head: what it learns from boxes, its losses, and the boxes that it finds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from occstream.models.batch import Batch, Boxes
from occstream.models.centerpoint import (
    NUSCENES_TASKS,
    CenterPointConfig,
    CenterPointHead,
    gaussian_radius,
)
from occstream.pretrain.config import build_section
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.grid import VoxelGrid

CLASSES = ("car", "pedestrian", "bicycle", "tram")
POINTS = VoxelGrid("points", (-12.8, -9.6, -2), (12.8, 9.6, 4), (0.1, 0.1, 0.15))  # cells of 0.8 m: 24 x 32
SIZES = {"car": (4.6, 1.9, 1.7), "pedestrian": (0.7, 0.7, 1.8), "bicycle": (1.8, 0.6, 1.4), "tram": (20.0, 2.6, 3.5)}


def head(seed: int = 0, classes=CLASSES, **changes) -> CenterPointHead:
    torch.manual_seed(seed)
    return CenterPointHead(6, POINTS, classes, CenterPointConfig(**{"channels": 8, **changes}))


def boxes(counts: list[int], seed: int = 0, known: bool = True) -> Boxes:
    """Within the grid, in cells of their own."""
    g, n = torch.Generator().manual_seed(seed), sum(counts)
    cell = torch.cat([torch.randperm(24 * 32, generator=g)[:k] for k in (*counts, 0)])
    classes = torch.randint(0, len(CLASSES), (n,), generator=g)
    x, y = cell % 32, cell // 32
    at = (torch.stack([x, y], 1) + torch.rand(n, 2, generator=g) * 0.98 + 0.01) * 0.8 - torch.tensor([12.8, 9.6])
    size = torch.tensor(list(SIZES.values()))[classes] * (0.9 + 0.2 * torch.rand(n, 3, generator=g))
    yaw = (torch.rand(n, 1, generator=g) * 2 - 1) * math.pi
    velocity = torch.randn(n, 2, generator=g)
    if not known:
        velocity[::3] = math.nan
    rows = torch.cat([at, torch.rand(n, 1, generator=g), size, yaw], 1)
    points = torch.full((n,), 5, dtype=torch.int32)
    return Boxes(rows, classes.to(torch.uint8), velocity, points, torch.tensor(counts, dtype=torch.int64))


def maps(net: CenterPointHead, frames: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    found = net(torch.randn(frames, 6, *net.shape, generator=g))
    return [{name: value.detach().requires_grad_() for name, value in task.items()} for task in found]


def perfect(net: CenterPointHead, truth: Boxes) -> list[dict[str, torch.Tensor]]:
    """Outputs that say exactly the targets."""
    goal, frames, first = net.targets(truth), len(truth.counts), 0
    outputs = []
    for task in net.tasks:
        heat = goal.heat[:, first : first + len(task)]
        code = torch.zeros(frames, 10, *net.shape)
        mine = (goal.channel >= first) & (goal.channel < first + len(task))
        code[goal.frame[mine], :, goal.y[mine], goal.x[mine]] = goal.code[mine]
        found = dict(zip(("center", "center_z", "dim", "rot", "vel"), code.split([2, 1, 3, 2, 2], 1)))
        outputs.append({"hm": torch.where(heat == 1, 4.0, -9.0)} | found)
        first += len(task)
    return outputs


def test_classes_are_grouped_and_unknown_ones_have_a_task_of_their_own():
    nuscenes = [name for task in NUSCENES_TASKS for name in task]
    assert CenterPointConfig().groups(sorted(nuscenes)) == NUSCENES_TASKS
    assert CenterPointConfig().groups(CLASSES) == (("car",), ("bicycle",), ("pedestrian",), ("tram",))
    asked = CenterPointConfig(tasks=(("car", "tram"), ("bicycle", "pedestrian")))
    assert asked.groups(CLASSES) == asked.tasks
    for wrong in ((("car",),), (CLASSES, ("car",)), (CLASSES, ())):
        with pytest.raises(ValueError, match="must name each of car, pedestrian, bicycle, tram once"):
            CenterPointConfig(tasks=wrong).groups(CLASSES)
    with pytest.raises(ValueError, match="no class to detect"):
        CenterPointHead(6, POINTS, (), CenterPointConfig())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": 0}, "channels is 0, must be at least 1"),
        ({"nms_iou": 1.0}, "nms_iou is 1.0, must be within 0..1"),
        ({"box_weight": -1.0}, "box_weight is -1.0, must not be negative"),
        ({"code_weights": [1.0] * 9}, "code_weights"),
        ({"code_order": "mmdet3d"}, "code_order"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        build_section(CenterPointConfig, settings, "model.head", [])


def test_settings_come_from_plain_values():
    read = build_section(CenterPointConfig, {"tasks": [["car", "tram"], ["bicycle", "pedestrian"]]}, "", [])
    assert read.tasks == (("car", "tram"), ("bicycle", "pedestrian"))


def test_weights_of_the_code_fall_on_velocity_or_on_the_heading():
    assert head().code_weights == (1, 1, 1, 1, 1, 1, 1, 1, 0.2, 0.2)
    assert head(code_order="openpcdet").code_weights == (1, 1, 1, 1, 1, 1, 0.2, 0.2, 1, 1)


def test_radii_of_a_worked_example():
    # overlap .1, 1 x 1: 1.427, 2.632 and .432
    assert float(gaussian_radius(torch.ones(1), torch.ones(1), 0.1)) == pytest.approx((math.sqrt(1.6) - 0.4) / 2)
    # overlap .7, 10 x 4: shifted, the equation r^2 - 14 r + 40 (.3 / 1.7) = 0 has the larger root 13.477
    found = float(gaussian_radius(torch.tensor([10.0]), torch.tensor([4.0]), 0.7))
    b = 2 * 0.7 * 14
    assert found == pytest.approx((-b + math.sqrt(b * b + 4 * 4 * 0.7 * 0.3 * 40)) / 2, rel=1e-5)


def test_heat_maps_are_those_of_a_loop():
    net, truth = head(), boxes([9, 0, 25])
    goal = net.targets(truth)
    expected = torch.zeros(3, len(CLASSES), *net.shape)
    for i, frame in enumerate([0] * 9 + [2] * 25):
        name = CLASSES[int(truth.classes[i])]
        channel = [n for task in net.tasks for n in task].index(name)
        x, y = (float(v) for v in (truth.boxes[i, :2] + torch.tensor([12.8, 9.6])) / 0.8)
        radius = max(2, int(gaussian_radius(*(truth.boxes[i, 3:5, None] / 0.8), 0.1)))
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                row, column = int(y) + dy, int(x) + dx
                if 0 <= row < 24 and 0 <= column < 32:
                    value = math.exp(-(dx * dx + dy * dy) / (2 * ((2 * radius + 1) / 6) ** 2))
                    expected[frame, channel, row, column] = max(expected[frame, channel, row, column], value)
    torch.testing.assert_close(goal.heat, expected, rtol=0, atol=1e-6)
    assert int((goal.heat == 1).sum()) == 34
    assert not goal.heat[1].any()


def test_boxes_that_cannot_be_learned_are_left_out_and_none_by_number():
    truth = boxes([300, 400])
    truth.boxes[0, 0], truth.boxes[1, 1], truth.boxes[2, 0] = 12.8, -9.61, -12.8  # outside, outside, on the lower face
    truth.classes[3], truth.points[4] = 255, 0
    net = head()
    assert len(net.targets(truth).code) == 700 - 4
    assert sum(int(v) for name, v in net.counts(truth).items() if name.startswith("box")) == 700 - 4
    assert len(head(min_points=0).targets(truth).code) == 700 - 3


def test_losses_are_the_published_ones():
    """Those of a dense sum for each task, divided by its number of centers and of boxes."""
    net, truth = head(tasks=(("car", "tram"), ("bicycle", "pedestrian"))), boxes([4, 0, 9])
    outputs = maps(net, 3)
    counts = joint_counts([net.counts(truth)])
    loss, parts = combine(net.sums(outputs, truth), counts, net.config.weights())
    goal, expected, first = net.targets(truth), 0.0, 0
    weights = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0.2, 0.2])
    for task, found in zip(net.tasks, outputs):
        p = found["hm"].sigmoid()
        heat = goal.heat[:, first : first + len(task)]
        center = heat == 1
        focal = -(p.log() * (1 - p) ** 2)[center].sum() - ((1 - p).log() * p**2 * (1 - heat) ** 4)[~center].sum()
        code = torch.cat([found[n] for n in ("center", "center_z", "dim", "rot", "vel")], 1)
        mine = [i for i, c in enumerate(goal.channel.tolist()) if first <= c < first + len(task)]
        errors = [(code[goal.frame[i], :, goal.y[i], goal.x[i]] - goal.code[i]).abs() * weights for i in mine]
        expected = expected + focal / int(center.sum()) + 0.25 * torch.stack(errors).sum() / len(mine)
        first += len(task)
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"heatmap", "box", "velocity"}
    loss.backward()
    assert all(v.grad.abs().sum() > 0 for task in outputs for v in task.values())


def test_two_boxes_in_one_cell_are_one_center():
    truth = boxes([1, 1])
    twice = Boxes(
        *(torch.cat([v, v]) for v in (truth.boxes, truth.classes, truth.velocity, truth.points)), truth.counts
    )
    twice.boxes, twice.classes, twice.counts = twice.boxes[[0, 0, 1]], truth.classes[[0, 0, 1]], torch.tensor([2, 1])
    twice.velocity, twice.points = truth.velocity[[0, 0, 1]], truth.points[[0, 0, 1]]
    totals = {}
    for name, value in head().counts(twice).items():
        totals[name.partition("@")[0]] = totals.get(name.partition("@")[0], 0) + int(value)
    assert totals == {"heatmap": 2, "box": 3, "velocity": 3}


def test_unknown_velocities_are_left_out_by_themselves():
    net, truth = head(), boxes([7, 5], known=False)
    outputs, counts = maps(net, 2), net.counts(truth)
    assert sum(int(v) for name, v in counts.items() if name.startswith("velocity")) == 8
    sums = net.sums(outputs, truth)
    sum(sums.values()).backward()
    assert all(v.isfinite() for v in sums.values())
    assert all(v.grad.isfinite().all() for task in outputs for v in task.values())
    known = dataclasses.replace(truth, velocity=torch.nan_to_num(truth.velocity))
    sums = {name: value.detach() for name, value in sums.items()}
    for name, value in net.sums(maps(net, 2), known).items():
        if not name.startswith("velocity"):
            torch.testing.assert_close(value.detach(), sums[name])
    still = head(velocity=False)
    assert not any(name.startswith("velocity") for name in (*still.counts(truth), *still.sums(maps(still, 2), truth)))


def test_sums_and_counts_do_not_depend_on_how_frames_are_spread():
    net, truth = head(), boxes([3, 0, 6, 2], known=False)
    outputs = maps(net, 4)
    batch = Batch(torch.eye(3).repeat(4, 1, 1), 4, list("abcd"), boxes=truth)
    parts = [batch.select(slice(0, 1)), batch.select(slice(1, 2)), batch.select(slice(2, 4))]
    places = [slice(0, 1), slice(1, 2), slice(2, 4)]
    for name, value in net.sums(outputs, truth).items():
        split = [
            net.sums([{n: v[place] for n, v in task.items()} for task in outputs], part.boxes)[name]
            for part, place in zip(parts, places)
        ]
        torch.testing.assert_close(sum(split), value)
        assert sum(int(net.counts(part.boxes)[name]) for part in parts) == int(net.counts(truth)[name])


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_without_boxes_or_labeled_frames_every_parameter_takes_part(counts):
    net = head()
    outputs = net(torch.randn(2, 6, *net.shape))
    truth = boxes(counts)
    sums = net.sums(outputs, truth)
    assert sums.keys() == net.counts(truth).keys()
    assert all(int(v) == 0 for v in net.counts(truth).values())
    sum(sums.values()).backward()
    assert all(p.grad is not None for p in net.parameters())
    if not counts:
        assert not any(v.detach() for v in sums.values())
        assert not any(p.grad.any() for p in net.parameters())


def test_what_says_the_targets_finds_the_boxes():
    net, truth = head(nms_iou=0.9), boxes([12, 0, 1])
    found = net.decode(perfect(net, truth))
    assert [len(f.boxes) for f in found] == [12, 0, 1]
    ends = [0, 12, 12, 13]
    for f, first, last in zip(found, ends, ends[1:]):
        rows = np.concatenate([truth.boxes[first:last], truth.velocity[first:last]], 1)
        order = np.lexsort(rows.T[:2])
        mine = np.concatenate([f.boxes, f.velocity], 1)
        place = np.lexsort(mine.T[:2])
        np.testing.assert_allclose(mine[place], rows[order], rtol=0, atol=1e-5)
        assert f.classes[place].tolist() == truth.classes[first:last].numpy()[order].tolist()
        np.testing.assert_allclose(f.scores, 1 / (1 + math.exp(-4)), rtol=1e-6)
    assert head(velocity=False).decode(maps(head(velocity=False), 1))[0].velocity is None


def test_boxes_of_a_frame_are_few_and_in_order():
    net = head(score_threshold=0.0, most=40, post_nms=15, pre_nms=30, nms_iou=0.3)
    outputs = maps(net, 2, seed=3)
    found = net.decode(outputs)
    for f in found:
        assert len(f.boxes) == 40, "of four times 15"
        assert (np.diff(f.scores) <= 0).all()
        assert max(np.bincount(f.classes)) <= 15
    again = net.decode(outputs)
    assert all(np.array_equal(a, b) for f, g in zip(found, again) for a, b in zip(f, g))
    flat = [{**{n: v.detach() for n, v in task.items()}, "hm": torch.zeros_like(task["hm"])} for task in outputs]
    first = net.decode(flat)[0]
    assert (first.scores == 0.5).all(), "all scores are equal"
    assert first.classes.tolist() == sorted(first.classes.tolist(), key=net.order.index)
    flat[0]["dim"][:], flat[1]["center_z"][:] = 1000, math.nan
    broken = net.decode(flat)[0]
    assert np.isfinite(broken.boxes).all()
    assert not np.isin(broken.classes, net.order[1]).any()


def test_names_of_parameters_are_openpcdets():
    names = set(head().state_dict())
    assert {"shared_conv.0.bias", "shared_conv.1.running_mean"} <= names
    branches = ("hm", "center", "center_z", "dim", "rot", "vel")
    layers = ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.running_var", "1.weight", "1.bias")
    assert {f"heads_list.{t}.{b}.{layer}" for t in range(4) for b in branches for layer in layers} <= names
    assert float(head().heads_list[0].hm[1].bias.detach()[0]) == pytest.approx(-2.19)
