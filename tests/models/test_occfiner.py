"""Refiners: sizes of the paper, the identity at first, and who can see what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from occstream.models.batch import Batch, Volumes
from occstream.models.occfiner import (
    DualFlow4D,
    OccFiner,
    OccFinerConfig,
    PlaceEmbedding,
    compose,
    coordinates,
    pulled,
    split,
    tokens,
)
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.poses import apply
from occstream.sharding.schema import IGNORE

GRID = VoxelGrid("ahead", (0, -6, -1), (10, 6, 1), (0.5, 0.5, 0.5))
SMALL = {"embedding": 3, "widths": (4, 6), "dim": 16, "heads": 2, "pillar_slices": 4, "hidden": 12}
CLASSES = 5


def model(frames: int = 3, **changes) -> OccFiner:
    torch.manual_seed(0)
    return OccFiner(OccFinerConfig(**{**SMALL, **changes}), GRID, CLASSES, frames).eval()


def drive(frames: int = 3, size: int = 2, seed: int = 0, soft: bool = False) -> Batch:
    """Windows of random volumes from places a few meters and degrees apart."""
    g = torch.Generator().manual_seed(seed)
    said = torch.randint(0, CLASSES + 1, (size, frames, *GRID.shape), generator=g, dtype=torch.uint8)
    angle = torch.linspace(0, 0.3, frames)
    poses = torch.eye(4).repeat(size, frames, 1, 1)
    poses[..., 0, 0], poses[..., 0, 1] = angle.cos(), -angle.sin()
    poses[..., 1, 0], poses[..., 1, 1] = angle.sin(), angle.cos()
    poses[..., 0, 3] = torch.arange(frames) * 1.3
    second = (said + 1) % (CLASSES + 1) if soft else None
    sure = torch.randint(128, 256, said.shape, generator=g, dtype=torch.uint8) if soft else None
    volumes = Volumes(said, poses, torch.ones(size, frames, dtype=torch.bool), second, sure)
    return Batch(torch.eye(3).repeat(size, 1, 1), labeled=size, volumes=volumes)


def stirred(made: OccFiner) -> OccFiner:
    """With a last layer that is not zero."""
    torch.manual_seed(1)
    for p in made.net.head.last.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def classes_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).argmax(1)


def count(**changes) -> int:
    with torch.device("meta"):
        made = OccFiner(OccFinerConfig(**changes), get_grid("semantickitti"), 19, 6)
    return sum(p.numel() for p in made.parameters())


def test_it_has_as_many_parameters_as_the_paper_says():
    full, still = count(), count(blocks=0)
    assert full == pytest.approx(4.51e6, rel=0.01)
    assert still == pytest.approx(0.83e6, rel=0.01), "without transformer"
    assert full - count(coordinates=False) == pytest.approx(0.39e6, rel=0.01), "without coordinates"


def test_a_frame_of_the_paper_has_121_tokens_and_a_window_726():
    assert tokens((32, 32)) == 121
    assert 6 * tokens((32, 32)) == 726
    assert split(torch.zeros(6, 80, 32, 32)).shape == (6, 121, 3920)
    assert tokens((16, 16)) == 36


@pytest.mark.parametrize("size", [(32, 32), (25, 25), (6, 6), (7, 4), (1, 1)])
def test_composing_what_was_split_is_nothing(size):
    maps = torch.randn(2, 3, *size)
    torch.testing.assert_close(compose(split(maps), size), maps)


@pytest.mark.parametrize("kind", ["dualflow", "explicit"])
@pytest.mark.parametrize("soft", [False, True])
def test_an_untrained_refiner_is_the_identity(kind, soft):
    batch = drive(soft=soft)
    batch.volumes.exists[1, 1:] = False
    batch.volumes.classes[1, 1:] = IGNORE
    logits = model(kind=kind)(batch).semantic_logits
    assert torch.equal(classes_of(logits), batch.volumes.classes[:, 0].long())
    if not soft:
        wide = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
        values = wide.sort(1, descending=True).values
        assert (values[:, 0] - values[:, 1] == 3.0).all()


def test_where_the_pivot_says_nothing_no_class_is_preferred():
    batch = drive()
    batch.volumes.classes[0, 0, 3] = IGNORE
    assert (model()(batch).semantic_logits[0, :, 3] == 0).all()


def test_coordinates_are_those_of_the_grid_in_the_pivots_frame():
    pose = drive(frames=2, size=1).volumes.to_pivot[0]
    found = coordinates(GRID, pose)
    np.testing.assert_allclose(found[0].numpy(), GRID.centers(), atol=1e-6)
    middle = (np.asarray(GRID.lower) + GRID.upper) / 2
    want = apply(pose[1].double().numpy(), GRID.centers() - middle) + middle
    np.testing.assert_allclose(found[1].numpy(), want, atol=1e-5)


def test_a_worked_place_of_semantickitti():
    """Voxel (5, 128, 10) of a frame at (14, 3) that is turned left by 90 degrees, seen from (10, 0)."""
    grid = get_grid("semantickitti")
    middle = torch.tensor([(a + b) / 2 for a, b in zip(grid.lower, grid.upper)])
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, torch.tensor([4.0, 3, 0]) + turn @ middle - middle
    center = torch.tensor(grid.centers(np.array([5, 128, 10]))).float()
    torch.testing.assert_close(center, torch.tensor([1.1, 0.1, 0.1]))
    torch.testing.assert_close(pose[:3, :3] @ (center - middle) + pose[:3, 3] + middle, torch.tensor([3.9, 4.1, 0.1]))
    said = torch.zeros(1, 2, *grid.shape, dtype=torch.uint8)
    said[0, 1, 5, 128, 10] = 7
    found = pulled(said, torch.stack([torch.eye(4), pose])[None], grid)
    assert torch.equal(found[0, 0], said[0, 0])
    assert (found[0, 1] == 7).nonzero().tolist() == [[19, 148, 10]]


def test_pulling_looks_each_center_up_in_the_other_frame():
    """As by float64 matrices, voxel by voxel."""
    batch = drive(frames=3, size=1)
    volumes = batch.volumes
    found = pulled(volumes.classes, volumes.to_pivot, GRID)[0]
    middle = (np.asarray(GRID.lower) + GRID.upper) / 2
    for place in range(3):
        pose = volumes.to_pivot[0, place].double().numpy()
        back = np.linalg.inv(pose)
        index, inside = GRID.to_index(apply(back, GRID.centers() - middle) + middle)
        want = np.where(inside, volumes.classes[0, place].numpy()[tuple(np.moveaxis(index, -1, 0))], IGNORE)
        assert (found[place].numpy() != want).mean() < 1e-3, "float32 on a face at most"
    assert torch.equal(found[0], volumes.classes[0, 0])


@pytest.mark.parametrize("kind", ["dualflow", "explicit"])
def test_neighbors_matter_and_absent_ones_do_not(kind):
    made, batch = stirred(model(kind=kind)), drive()
    before = made(batch).semantic_logits
    other = drive()
    other.volumes.classes[:, 1] = 0
    assert not torch.allclose(made(other).semantic_logits, before)
    gone = [drive(), drive()]
    for number, each in enumerate(gone):
        each.volumes.exists[:, 1], each.volumes.classes[:, 1] = False, IGNORE
        each.volumes.to_pivot[:, 1] = torch.eye(4) + number  # nobody looks at it
    if kind == "dualflow":
        torch.testing.assert_close(made(gone[0]).semantic_logits, made(gone[1]).semantic_logits)
        single = drive()
        single.volumes = single.volumes.each(lambda f, value: value[:, [0, 2]])
        torch.testing.assert_close(made(gone[0]).semantic_logits, made(single).semantic_logits, rtol=1e-4, atol=1e-5)


def test_the_pillar_attention_is_a_switch_and_sees_all_frames():
    x, exists = torch.randn(1, 3, 4, 16), torch.ones(1, 3, dtype=torch.bool)
    torch.manual_seed(0)
    block = DualFlow4D(OccFinerConfig(**SMALL)).eval()
    torch.nn.init.zeros_(block.out.weight)  # the pillar's alone
    block.feed = None
    other = x.clone()
    other[:, 2, 1] = torch.randn(16)
    moved = (block(x, exists) - block(other, exists))[:, 0].abs().amax(-1)[0]
    assert moved[1] > 1e-5
    assert (moved[[0, 2, 3]] == 0).all(), "of other places on the map it knows nothing"
    assert DualFlow4D(OccFinerConfig(**SMALL, pillar=False)).pillar_qkv is None


def test_places_are_known_to_the_network():
    made, batch = stirred(model()), drive()
    other = drive()
    other.volumes.to_pivot[:, 1, 0, 3] += 2.0
    assert not torch.allclose(made(batch).semantic_logits, made(other).semantic_logits)
    blind = stirred(model(coordinates=False))
    torch.testing.assert_close(blind(batch).semantic_logits, blind(other).semantic_logits)
    assert PlaceEmbedding(GRID, 3)(batch.volumes.to_pivot[0]).shape == (3, 3 * GRID.shape[2], *GRID.shape[:2])


def test_a_neighbor_out_of_sight_is_as_one_that_is_absent_to_the_explicit_arm():
    made = stirred(model(kind="explicit"))
    batch = drive()
    shifted = drive()
    shifted.volumes.to_pivot[:, 1, 0, 3] += GRID.voxel[0] * 40  # out of sight
    gone = drive()
    gone.volumes.exists[:, 1], gone.volumes.classes[:, 1] = False, IGNORE
    torch.testing.assert_close(made(shifted).semantic_logits, made(gone).semantic_logits)
    assert not torch.allclose(made(batch).semantic_logits, made(gone).semantic_logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 30}, "dim 30 does not divide by pillar_slices 4"),
        ({"widths": (4,)}, "must be two positive numbers or more"),
        ({"embedding": 0}, "embedding is 0, must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        OccFinerConfig(**{**SMALL, **changes})


def test_a_grid_that_cannot_be_pooled_so_often_is_refused():
    with pytest.raises(ValueError, match="too small for 6 blocks"):
        model(widths=(2,) * 6)
