"""Batches of parts: what moves, is cut, joined and mirrored is declared by each field."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from occstream.models.batch import PARTS, Batch, Boxes, Occupancy, PointLabels, Points, Volumes, concat
from tests.models.helpers import make_batch


def ragged(counts: list[int], labeled: int, seed: int = 0) -> Batch:
    """Frames with so many points each; the first ones are labeled."""
    g = torch.Generator().manual_seed(seed)
    total, known = sum(counts), sum(counts[:labeled])
    classes = torch.randint(0, 9, (known,), generator=g, dtype=torch.uint8)
    numbers = torch.arange(labeled) % 3  # of boxes; the first frame has none
    n = int(numbers.sum())
    boxes = Boxes(
        torch.cat([torch.randn(n, 6, generator=g), (torch.rand(n, 1, generator=g) * 2 - 1) * math.pi], 1),
        torch.randint(0, 9, (n,), generator=g, dtype=torch.uint8),
        torch.randn(n, 2, generator=g),
        torch.arange(n, dtype=torch.int32),
        numbers,
    )
    return Batch(
        scene_aug=torch.eye(3).repeat(len(counts), 1, 1),
        labeled=labeled,
        keys=[f"f{seed}-{i}" for i in range(len(counts))],
        points=Points(torch.randn(total, 3, generator=g), torch.tensor(counts), torch.rand(total, 2, generator=g)),
        point_labels=PointLabels(classes, torch.tensor(counts[:labeled], dtype=torch.int64)),
        boxes=boxes,
    )


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    found = {f"{name}.{f.name}": value for name, part in batch.parts() for f, value in part.present()}
    return {"scene_aug": batch.scene_aug, **found}


def assert_equal(a: Batch, b: Batch) -> None:
    assert (a.keys, a.labeled, tensors(a).keys()) == (b.keys, b.labeled, tensors(b).keys())
    assert all(torch.equal(value, tensors(b)[name]) for name, value in tensors(a).items())


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (1, 3), (2, 4), (3, 4), (0, 4), (4, 4)])
def test_ragged_rows_follow_their_frames(first, last):
    counts = [3, 0, 5, 2]
    batch = ragged(counts, labeled=3)
    part, ends = batch.select(slice(first, last)), [0, 3, 3, 8, 10]
    assert part.keys == batch.keys[first:last]
    assert part.labeled == max(0, min(3, last) - min(3, first))
    assert part.points.counts.tolist() == counts[first:last]
    assert torch.equal(part.points.xyz, batch.points.xyz[ends[first] : ends[last]])
    assert torch.equal(part.point_labels.classes, batch.point_labels.classes[ends[min(first, 3)] : ends[min(last, 3)]])
    assert len(part.point_labels.counts) == part.labeled
    ends = [0, 0, 1, 3, 3]  # 0, 1 and 2 boxes
    assert torch.equal(part.boxes.boxes, batch.boxes.boxes[ends[first] : ends[last]])
    assert torch.equal(part.boxes.points, batch.boxes.points[ends[first] : ends[last]])
    assert torch.equal(part.boxes.owners(), batch.boxes.owners()[ends[first] : ends[last]] - first)


def test_rows_know_their_frame_also_where_none_has_any():
    batch = ragged([3, 0, 5, 2], labeled=3)
    assert batch.points.owners().tolist() == [0] * 3 + [2] * 5 + [3] * 2
    assert batch.boxes.owners().tolist() == [1, 2, 2]
    for empty in (ragged([0, 0], labeled=1), ragged([1, 1], labeled=1).unlabeled()):
        assert empty.boxes.boxes.shape == (0, 7)
        assert (len(empty.boxes.owners()), len(empty.boxes.counts)) == (0, empty.labeled)
        assert empty.mirrored(True, True).boxes.boxes.shape == (0, 7)


@pytest.mark.parametrize(
    "make", [lambda s, seed: make_batch(3, s, seed=seed), lambda s, seed: ragged([2, 0, 4], s, seed)]
)
def test_joining_puts_labeled_frames_first_and_selecting_takes_them_apart_again(make):
    labeled, other = make(2, 1).select(slice(0, 2)), make(1, 2)
    both = concat(labeled, other)
    assert (both.size, both.labeled, both.keys) == (5, 2, labeled.keys + other.keys)
    assert_equal(both.select(slice(0, 2)), labeled)
    assert_equal(both.select(slice(2, 5)), other.unlabeled())
    assert_equal(concat(labeled, None), labeled)


def test_streams_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"only one of both streams has (cameras|points)"):
        concat(make_batch(1, 1), ragged([3], 0))
    with pytest.raises(ValueError, match="images of the semantic stream"):
        concat(make_batch(1, 1, views=3), make_batch(1, 0, views=2))


def test_mirroring_twice_is_nothing_and_once_turns_points_and_voxels():
    batch = make_batch(2, 1, augment=False)
    batch.points, batch.point_labels = ragged([4, 1], 1).points, ragged([4, 1], 1).point_labels
    turned = batch.mirrored(True, False)
    assert torch.equal(turned.points.xyz, batch.points.xyz * torch.tensor([-1.0, 1, 1]))
    assert torch.equal(turned.occupancy.semantic, batch.occupancy.semantic.flip(1))
    assert torch.equal(turned.cameras.images, batch.cameras.images), "the network learns of it by scene_aug"
    assert turned.scene_aug[0].diag().tolist() == [-1, 1, 1]
    assert_equal(turned.mirrored(True, False), batch)
    assert_equal(batch.mirrored(True, True), batch.mirrored(False, True).mirrored(True, False))


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(n, 4, 2) of the base, from the front left on."""
    signs = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    along = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], 1)[:, None] * boxes[:, None, 3:4] * signs[:, :1]
    across = torch.stack([-boxes[:, 6].sin(), boxes[:, 6].cos()], 1)[:, None] * boxes[:, None, 4:5] * signs[:, 1:]
    return boxes[:, None, :2] + along + across


@pytest.mark.parametrize(("x", "y"), [(True, False), (False, True), (True, True)])
def test_mirrored_boxes_are_the_boxes_of_the_mirrored_scene(x, y):
    batch = ragged([1] * 30, labeled=30)
    boxes, turned = batch.boxes, batch.mirrored(x, y).boxes
    signs = torch.tensor([-1.0 if x else 1.0, -1.0 if y else 1.0])
    order = [3, 2, 1, 0] if x != y else [0, 1, 2, 3]  # left becomes right, front stays front
    torch.testing.assert_close(corners(turned.boxes), corners(boxes.boxes)[:, order] * signs, rtol=0, atol=2e-6)
    assert torch.equal(turned.boxes[:, 2:6], boxes.boxes[:, 2:6])
    assert torch.equal(turned.velocity, boxes.velocity * signs)
    assert turned.boxes[:, 6].abs().max() <= math.pi + 1e-6
    torch.testing.assert_close(batch.mirrored(x, y).mirrored(x, y).boxes.boxes, boxes.boxes, rtol=0, atol=1e-6)


def window(batch: int = 2, frames: int = 3, shape: tuple[int, int, int] = (6, 5, 2)) -> Batch:
    """Volumes of random classes, seen from turned and shifted places."""
    g = torch.Generator().manual_seed(0)
    angle, poses = torch.rand(batch, frames, generator=g), torch.eye(4).repeat(batch, frames, 1, 1)
    poses[..., 0, 0], poses[..., 0, 1] = angle.cos(), -angle.sin()
    poses[..., 1, 0], poses[..., 1, 1] = angle.sin(), angle.cos()
    poses[..., :3, 3] = torch.randn(batch, frames, 3, generator=g)
    classes = torch.randint(0, 5, (batch, frames, *shape), generator=g, dtype=torch.uint8)
    volumes = Volumes(classes, poses, torch.ones(batch, frames, dtype=torch.bool), classes.flip(2), classes)
    return Batch(torch.eye(3).repeat(batch, 1, 1), keys=[f"w-{i}" for i in range(batch)], volumes=volumes)


@pytest.mark.parametrize(("x", "y"), [(True, False), (False, True), (True, True)])
def test_mirrored_windows_show_the_mirrored_world_on_any_grid(x, y):
    """A voxel and the place where its pose puts it mirror to a voxel and the mirrored place. The grid is of odd size along y
    and may lie anywhere: meters count from its middle."""
    batch = window()
    volumes, turned = batch.volumes, batch.mirrored(x, y).volumes
    assert torch.equal(turned.exists, volumes.exists)
    size = torch.tensor(volumes.classes.shape[-3:])
    signs = torch.tensor([-1.0 if x else 1.0, -1.0 if y else 1.0, 1.0])
    for i, j, k in [(0, 0, 0), (4, 1, 1), (2, 3, 0)]:
        index = torch.tensor([i, j, k])
        other = torch.where(signs < 0, size - 1 - index, index)
        for name in ("classes", "second", "confidence"):
            assert torch.equal(getattr(turned, name)[..., *other], getattr(volumes, name)[..., *index])
        center, mirrored = ((place + 0.5 - size / 2) * 0.4 for place in (index, other))
        moved = volumes.to_pivot[..., :3, :3] @ center + volumes.to_pivot[..., :3, 3]
        torch.testing.assert_close(turned.to_pivot[..., :3, :3] @ mirrored + turned.to_pivot[..., :3, 3], moved * signs)
    assert_equal(batch.mirrored(x, y).mirrored(x, y), batch)


def test_windows_are_cut_and_joined_by_frames():
    batch = window()
    assert_equal(concat(batch.select(slice(0, 1)), batch.select(slice(1, 2))), batch)
    with pytest.raises(ValueError, match="classes of the semantic stream are"):
        concat(batch, window(frames=4))


def test_names_make_a_batch_and_a_copy_shares_nothing():
    batch = ragged([3, 1], 2)
    made = Batch.of(tensors(batch), batch.keys)
    assert_equal(made, batch)
    copy = made.clone()
    for value in tensors(copy).values():
        value.zero_()
    assert_equal(made, batch)
    assert batch.nbytes == sum(v.nbytes for v in tensors(batch).values())
    assert batch.to("meta").device.type == batch.to("meta").points.xyz.device.type == "meta"


def test_every_tensor_of_a_part_declares_its_axis():
    fields = [f for part in PARTS.values() for f in dataclasses.fields(part)]
    assert {f.metadata["axis"] for f in fields} == {"frame", "labeled", "row", "labeled row"}


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("points.xyx", "no field points.xyx; points has xyz, counts, features"),
        ("radar.xyz", "no field radar.xyz; parts are"),
    ],
)
def test_fields_that_no_part_has_are_named(field, said):
    with pytest.raises(ValueError, match=said):
        Batch.of({"scene_aug": torch.eye(3)[None], field: torch.zeros(1, 3)})


def test_a_part_that_the_task_did_not_ask_for_is_named():
    batch = ragged([3, 1], 2)
    assert batch.part(Points) is batch.points
    with pytest.raises(ValueError, match="the batch has no occupancy"):
        batch.part(Occupancy)
    volumes = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="the batch has no semantic labels"):
        Occupancy(volumes, volumes).classes()
