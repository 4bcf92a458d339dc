"""The head that classifies points."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from occstream.models.segmentor import PointSegmentor, SegmentorConfig
from occstream.models.voxelbackbones import VoxelFeatures
from occstream.models.voxels import voxelize
from occstream.sharding.grid import VoxelGrid

GRID = VoxelGrid("points", (-12.8, -9.6, -2), (12.8, 9.6, 4), (0.4, 0.4, 0.15))  # 64 x 48 x 40; 6 x 8 cells
WIDTH, MAP, CLASSES = 4, 10, 5


def segmentor(seed: int = 0, channels=(12, 6)) -> PointSegmentor:
    torch.manual_seed(seed)
    return PointSegmentor(WIDTH, MAP, GRID, CLASSES, config=SegmentorConfig(channels))


def cloud(count: int = 300, seed: int = 0, frames: int = 2):
    """Points, some of them outside, with features of voxels and map that are random."""
    g = torch.Generator().manual_seed(seed)
    xyz = (torch.rand(count, 3, generator=g) - 0.5) * torch.tensor([30.0, 22, 7])
    frame = torch.randint(0, frames, (count,), generator=g).sort().values
    rows = voxelize(xyz, frame, GRID).rows
    voxels = torch.randn(int(rows.max()) + 1, WIDTH, generator=g)
    return VoxelFeatures(torch.randn(frames, MAP, 6, 8, generator=g), voxels), xyz, frame, rows


def test_each_point_has_its_voxel_its_place_on_the_map_and_in_its_voxel():
    """Against the first layer on everything joined, with torch's own interpolation."""
    net, (features, xyz, frame, rows) = segmentor(), cloud()
    with torch.no_grad():
        found = net(features, xyz, frame, rows)
        span = torch.tensor([25.6, 19.2])
        sampled = torch.zeros(len(xyz), MAP)
        for b in range(2):
            mine = frame == b
            where = (2 * xyz[mine, :2] / span)[None, :, None]
            sampled[mine] = F.grid_sample(features.bev[b : b + 1], where, padding_mode="border", align_corners=False)[
                0, :, :, 0
            ].t()
        at = (xyz.double() - torch.tensor(GRID.lower)) / torch.tensor(GRID.voxel)
        inside = (rows >= 0)[:, None]
        assert 0.3 < inside.float().mean() < 0.9
        own = torch.where(inside, features.points[rows.clamp_min(0)], 0)
        offset = torch.where(inside, at - at.floor() - 0.5, 0).float()
        height = ((xyz[:, 2:] - 1) / 3).clamp(-2, 2)
        weight = torch.cat([net.of_map.weight.flatten(1), net.of_point.weight], 1)
        expected = net.classify(F.linear(torch.cat([sampled, own, height, offset], 1), weight, net.of_point.bias))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_every_parameter_learns_and_features_get_gradients():
    net, (features, xyz, frame, rows) = segmentor(), cloud()
    features = VoxelFeatures(*(f.requires_grad_() for f in features))
    labels = torch.randint(0, CLASSES, (len(xyz),), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(net(features, xyz, frame, rows), labels).backward()
    assert all(p.grad.abs().max() > 0 for p in (*net.parameters(), *features))


def test_a_point_does_not_depend_on_others():
    net, (features, xyz, frame, rows) = segmentor(), cloud()
    with torch.no_grad():
        torch.testing.assert_close(
            net(features, xyz[5:9], frame[5:9], rows[5:9]), net(features, xyz, frame, rows)[5:9], rtol=0, atol=1e-6
        )


def test_strange_points_have_answers():
    net, (features, xyz, frame, rows) = segmentor(), cloud(8)
    xyz[0, 0], xyz[1, 2], xyz[2], rows[:4] = torch.nan, torch.inf, 1e6, -1
    with torch.no_grad():
        found = net(features, xyz, frame, rows)
        assert found.isfinite().all()
        none = VoxelFeatures(features.bev, features.points[:0])  # no voxel at all
        assert net(none, xyz[:4], frame[:4], rows[:4]).isfinite().all()


@pytest.mark.parametrize("count", [0, 1])
def test_few_or_no_points(count):
    net = segmentor()
    features = VoxelFeatures(torch.randn(2, MAP, 6, 8), torch.randn(count, WIDTH))
    xyz, frame = torch.zeros(count, 3), torch.zeros(count, dtype=torch.int64)
    found = net(features, xyz, frame, torch.zeros(count, dtype=torch.int64))
    assert found.shape == (count, CLASSES)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_wrong_widths_are_named():
    for channels in ((), (0,)):
        with pytest.raises(ValueError, match="channels are"):
            SegmentorConfig(channels)
