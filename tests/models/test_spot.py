"""SPOT's pre-training network."""

from __future__ import annotations

import pytest
import torch

from occstream.models.batch import Batch, Points
from occstream.models.lidarnet import LidarNet
from occstream.models.spot import MapToLabels, SpotConfig, column_classes, halvings, interpolation
from occstream.sharding.grid import VoxelGrid

POINTS = {"point_range": (-12.8, -9.6, -2.0, 12.8, 9.6, 4.0), "voxel": (0.4, 0.4, 0.15)}  # 64 x 48 x 40; cells of 3.2 m
SIZES = {"width": 4, "bev_channels": (16, 32), "bev_layers": (1, 1), "bev_up": 16, "decoder_channels": (16, 16, 16)}
LABELS = VoxelGrid("labels", (-12.8, -6.4, -1), (6.4, 6.4, 2.2), (0.8, 0.8, 0.8))  # 24 x 16 x 4


def config(**changes):
    return SpotConfig(**{**POINTS, **SIZES, "sparse": "torch", **changes})


def spot(labels=LABELS, classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    return LidarNet(config(**changes), labels.frame, occupancy=(labels, classes))


def clouds(count=800, frames=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    points = (torch.rand(count, 4, generator=g) - 0.5) * torch.tensor([30.0, 20, 6, 1])
    counts = torch.tensor([count // frames] * (frames - 1) + [count - count // frames * (frames - 1)])
    cloud = Points(points[:, :3].contiguous(), counts, points[:, 3:].contiguous())
    return Batch(torch.eye(3).repeat(frames, 1, 1), frames, points=cloud)


def grid(lower, upper, voxel, name="g"):
    return VoxelGrid(name, lower, upper, voxel)


def test_defaults_are_the_grid_of_the_paper():
    assert SpotConfig().points_grid().shape == (1504, 1504, 40)


@pytest.mark.parametrize(("variant", "target"), [("plain", "volume"), ("res", "bev")])
def test_predicts_each_label_voxel_and_reaches_every_parameter(variant, target):
    net = spot(variant=variant, target=target)
    logits = net(clouds()).semantic_logits
    assert logits.shape == (2, 3, 24, 16, 4 if target == "volume" else 1)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, logits.shape[:1] + logits.shape[2:], generator=g)
    wide = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
    torch.nn.functional.cross_entropy(wide, labels).backward()
    for name, parameter in net.named_parameters():
        zero = ".conv1.bias" in name or ".conv2.bias" in name  # before a batch norm
        assert zero or parameter.grad.abs().max() > 0, name


def test_logits_are_in_the_order_of_the_labels():
    decoder = spot().occupancy.decoder.eval()  # a map (y, x) of 4 x 6 cells, 4 label voxels each
    cells = torch.zeros(1, 32, 4, 6)
    with torch.no_grad():
        before = decoder(cells)
        cells[0, :, 3, 1] = 5
        change = (decoder(cells) - before).abs().sum((0, 1, 4))
        x, y = divmod(int(change.argmax()), change.shape[1])
        assert change.shape == (24, 16)
        assert abs(x - 5.5) < 4
        assert abs(y - 13.5) < 4
        decoder.head.weight.zero_()
        decoder.head.bias.copy_(torch.arange(16))
        assert torch.equal(decoder(cells)[0, :, 2, 3], torch.arange(16.0).view(4, 4))


def test_a_sweep_may_be_empty():
    net = spot()
    for count in (0, 1):
        logits = net(clouds(count)).semantic_logits
        assert logits.shape == (2, 3, 24, 16, 4)
        assert logits.isfinite().all()


def test_autocast():
    net = spot()
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(clouds()).semantic_logits
        cast.float().square().mean().backward()
    plain = spot()(clouds()).semantic_logits
    assert (cast.float() - plain).abs().max() < 0.1 * plain.abs().max()
    assert all(p.grad.isfinite().all() for p in net.parameters())


WAYMO = SpotConfig().points_grid()


@pytest.mark.parametrize(
    ("points", "labels", "doublings", "cut"),
    [
        (WAYMO, grid((-75.2, -75.2, -1), (75.2, 75.2, 5.4), (0.4, 0.4, 0.4)), 1, ((0, 188), (0, 188))),
        (WAYMO, grid((-40, -40, -1), (40, 40, 5.4), (0.4, 0.4, 0.4)), 1, ((44, 100), (44, 100))),
        (WAYMO, grid((-75.2, -75.2, -2), (75.2, 75.2, 4), (0.1, 0.1, 0.15)), 3, ((0, 188), (0, 188))),
        (
            grid((-54, -54, -5), (54, 54, 3), (0.075, 0.075, 0.2)),  # cells of 0.6 m
            grid((-40, -40, -1), (40, 40, 5.4), (0.4, 0.4, 0.4)),
            0,
            None,
        ),
        (WAYMO, grid((-50, -50, -5), (50, 50, 3), (0.5, 0.5, 0.5)), 0, None),
        (WAYMO, grid((-40, -40, -1), (40.8, 40, 5.4), (0.8, 0.8, 0.8)), 0, ((44, 100), (44, 101))),
        (WAYMO, grid((-40, -40, -1), (40.4, 40, 5.4), (0.4, 0.4, 0.4)), 0, None),  # 201 voxels cannot be doubled
    ],
)
def test_from_cells_to_label_voxels(points, labels, doublings, cut):
    assert halvings(points, labels) == doublings
    coarse = labels.coarsen((2**doublings, 2**doublings, 1))
    assert MapToLabels(points, coarse).cut == cut


def test_interpolates_at_the_centers_of_label_voxels():
    """A map that is linear in x and y stays so, except within half a cell of the border, where it is constant."""
    points = grid((-54, -54, -5), (54, 54, 3), (0.075, 0.075, 0.2))
    labels = grid((-54, -40, -1), (40, 40, 5.4), (0.4, 0.4, 0.4))
    cells = points.coarsen((8, 8, 1))
    x, y = torch.tensor(cells.centers()[:, :, 0, :2]).float().unbind(-1)
    found = MapToLabels(points, labels)((3 * x + 10 * y).t()[None, None])[0, 0].t()
    x, y = torch.tensor(labels.centers()[:, :, 0, :2]).float().unbind(-1)
    torch.testing.assert_close(found, 3 * x.clamp_min(-53.7) + 10 * y, rtol=0, atol=1e-3)
    for axis in (0, 1):
        weights = interpolation(points, labels, axis)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


def test_every_label_of_an_uneven_grid_is_predicted():
    labels = grid((-9.5, -7.5, -1), (9.5, 7.5, 2), (0.5, 0.5, 0.5))
    net = spot(labels)
    assert net(clouds()).semantic_logits.shape == (2, 3, 38, 30, 6)
    assert net.occupancy.to_labels.cut is None


def test_binary_occupancy_is_the_logit_of_occupied_against_free():
    net = spot(classes=1).eval()
    net.occupancy.decoder.head.weight.data.zero_()
    net.occupancy.decoder.head.bias.data.copy_(torch.arange(8) ** 2)  # 4 layers of occupied, then of free
    with torch.no_grad():
        found = net(clouds())
    assert found.semantic_logits is None
    assert found.binary_logits.shape == (2, 24, 16, 4)
    assert found.binary_logits[1, 5, 7].tolist() == [-16.0, -24.0, -32.0, -40.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"voxel": (0.4, 0.4, 0.1)}, "60 voxels in z, of which the encoder makes 3 layers, but detectors read 2"),
        ({"voxel": (0.8, 0.8, 0.15)}, "24 voxels in y, must be a multiple of 16"),
        ({"voxel": (0.7, 0.7, 0.15)}, "not a whole number"),
        ({"in_features": ("intensity", "x", "y", "z")}, "must begin with x, y, z"),
        ({"in_features": ("x", "y", "z", "x")}, "name each once"),
        ({"width": 0}, "width is 0, must be positive"),
        ({"decoder_channels": (16, -1, 16)}, "must be positive"),
        ({"variant": "dense"}, "must be plain or res"),
        ({"target": "points"}, "volume or bev"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_labels_beyond_the_points_are_refused():
    with pytest.raises(ValueError, match=r"reach from -16 to 16 m in x, points from -12.8 to 12.8 m"):
        spot(grid((-16, -8, -1), (16, 8, 1), (0.5, 0.5, 0.5)))


def test_column_classes():
    """Foreground before other before free; of two the first; unknown voxels say nothing."""
    priority = torch.tensor([2, 1, 2, 0])  # pedestrian, road, car, free
    columns = [[3, 1, 3, 3], [1, 3, 2, 0], [3, 3, 255, 3], [255, 255, 255, 255], [255, 1, 3, 2]]
    found = column_classes(torch.tensor(columns, dtype=torch.uint8)[None, None], priority)
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[1, 0, 3, 255, 2]]]
