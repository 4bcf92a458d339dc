"""Random but geometrically sound batches."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch

from occstream.models import syncnorm
from occstream.models.batch import Batch, Cameras, Occupancy
from occstream.pretrain import losses
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.grid import VoxelGrid

SMALL = VoxelGrid("small", (-8, -8, -1), (8, 8, 3), (1, 1, 1))


def _two() -> int:
    return 2


@contextlib.contextmanager
def two_equal_ranks():
    """Batch norms take the way of several ranks, as if another one held the same frames: their results are those of one
    process (but for the unbiased variance, by 1 / 2n)."""
    with (
        mock.patch("occstream.models.layers.world_size", _two),
        mock.patch.object(syncnorm, "world_size", _two),
        mock.patch.object(syncnorm, "gather", lambda row: torch.stack([row, row])),
        mock.patch.object(syncnorm, "add_up", lambda values: 2 * values),
    ):
        yield


def make_batch(size=2, semantic=1, views=3, image_size=(32, 64), grid=SMALL, classes=17, seed=0, augment=True) -> Batch:
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    height, width = image_size
    intrinsics = torch.zeros(size, views, 3, 3)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = width * 0.6
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1
    to_ego = torch.eye(4).repeat(size, views, 1, 1)
    base = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # camera looking along ego x
    for b in range(size):
        for v in range(views):
            a = 2 * math.pi * v / views + 0.1 * float(rand(1))
            turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
            to_ego[b, v, :3, :3] = turn @ base
            to_ego[b, v, :3, 3] = torch.tensor([math.cos(a), math.sin(a), 1.5]) + 0.1 * rand(3)
    post_rot, post_tran = torch.eye(3).repeat(size, views, 1, 1), torch.zeros(size, views, 3)
    aug = torch.eye(3).repeat(size, 1, 1)
    if augment:
        a = (rand(size, views) - 0.5) * 0.2
        scale = 0.9 + 0.2 * rand(size, views)
        post_rot[..., 0, 0], post_rot[..., 0, 1] = scale * a.cos(), -scale * a.sin()
        post_rot[..., 1, 0], post_rot[..., 1, 1] = scale * a.sin(), scale * a.cos()
        post_tran[..., :2] = (rand(size, views, 2) - 0.5) * 10
        aug[:, 0, 0], aug[:, 1, 1] = (rand(size) > 0.5) * 2.0 - 1, (rand(size) > 0.5) * 2.0 - 1
    labels = torch.where(rand(size, *grid.shape) < 0.2, (rand(size, *grid.shape) * classes).long(), classes)
    return Batch(
        scene_aug=aug,
        labeled=semantic,
        keys=[f"k{i}" for i in range(size)],
        cameras=Cameras(
            images=(rand(size, views, 3, *image_size) * 255).to(torch.uint8),
            intrinsics=intrinsics,
            camera_to_ego=to_ego,
            post_rot=post_rot,
            post_tran=post_tran,
        ),
        occupancy=Occupancy(
            binary=labels != classes,
            binary_valid=rand(size, *grid.shape) > 0.1,
            semantic=labels[:semantic].to(torch.uint8),
        ),
    )


def occupancy_loss(outputs, batch, config: losses.LossConfig, counts=None):
    """Loss of a micro-batch and its parts, by the counts of a step or its own."""
    counts = counts or joint_counts([losses.counts(outputs, batch, config)])
    return combine(losses.sums(outputs, batch, config), counts, losses.weights(config))
