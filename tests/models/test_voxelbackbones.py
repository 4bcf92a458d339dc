"""LiDAR encoders: what OpenPCDet's detectors expect of them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from occstream.models.sparse import SparseTensor, choose_backend
from occstream.models.voxelbackbones import (
    BEVBackbone,
    LidarEncoder,
    VoxelBackBone8x,
    VoxelResBackBone8x,
    check_points_grid,
    encoded_shape,
)

SMALL = (64, 48, 40)
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name):
    return [f"{name}.{part}" for part in NORM]


def unit(name):
    return [f"{name}.0.weight", *norm(f"{name}.1")]


def block(name):
    return [key for i in "12" for key in (f"{name}.conv{i}.weight", f"{name}.conv{i}.bias", *norm(f"{name}.bn{i}"))]


def small_encoder(variant="plain", backend="torch", seed=0, inputs=4):
    torch.manual_seed(seed)
    return LidarEncoder(variant, inputs, SMALL, backend, width=4, bev_channels=(16, 32), bev_layers=(1, 1), bev_up=16)


def sweep(count=600, batch=2, shape=SMALL, seed=0):
    """Random voxels in ascending order."""
    g = torch.Generator().manual_seed(seed)
    x, y, z = shape
    keys = torch.randperm(batch * z * y * x, generator=g)[:count].sort().values
    indices = torch.stack([keys // (x * y * z), keys // (x * y) % z, keys // x % y, keys % x], 1).int()
    return torch.randn(count, 4, generator=g), indices, batch


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1504, 1504, 40), (2, 188, 188)),  # Waymo, ONCE
        ((1024, 1024, 40), (2, 128, 128)),  # nuScenes
        ((1440, 1440, 40), (2, 180, 180)),  # nuScenes, 0.075 m
        ((1408, 1600, 40), (2, 200, 176)),  # KITTI
        ((800, 800, 40), (2, 100, 100)),
        ((800, 800, 64), (3, 100, 100)),
        ((800, 800, 32), (1, 100, 100)),
    ],
)
def test_shapes_of_published_grids(shape, expected):
    assert encoded_shape(shape) == expected
    if expected[0] == 2:
        check_points_grid(shape)
    else:
        with pytest.raises(
            ValueError, match=f"has {shape[2]} voxels in z, of which the encoder makes {expected[0]} layers"
        ):
            check_points_grid(shape)


def test_grids_that_no_detector_takes_are_refused():
    accepted = [z for z in range(1, 80) if encoded_shape((64, 64, z))[0] == 2]
    assert accepted == list(range(40, 56))
    with pytest.raises(ValueError, match="makes 0 layers"):
        check_points_grid((64, 64, 2))
    with pytest.raises(ValueError, match="1000 voxels in x, must be a multiple of 16"):
        check_points_grid((1000, 1600, 40))
    with pytest.raises(ValueError, match="in y"):
        LidarEncoder("plain", 4, (64, 40, 40))


def test_plain_backbone_has_the_published_parameters():
    state = VoxelBackBone8x(4, (1408, 1600, 40)).state_dict()
    stages = [f"conv{i}.{j}" for i in (2, 3, 4) for j in range(3)]
    names = ["conv_input", "conv1.0", *stages, "conv_out"]
    assert sorted(state) == sorted(key for name in names for key in unit(name))
    assert len(state) == 72
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num_" not in k) == 711_872
    assert state["conv_input.0.weight"].shape == (16, 3, 3, 3, 4)
    assert state["conv4.0.0.weight"].shape == (64, 3, 3, 3, 64)
    assert state["conv_out.0.weight"].shape == (128, 3, 1, 1, 64)


def test_residual_backbone_has_the_published_parameters():
    state = VoxelResBackBone8x(5, (1504, 1504, 40)).state_dict()
    expected = [key for name in ("conv_input", "conv2.0", "conv3.0", "conv4.0", "conv_out") for key in unit(name)]
    for name in ("conv1.0", "conv1.1", *(f"conv{i}.{j}" for i in (2, 3, 4) for j in (1, 2))):
        expected += block(name)
    assert sorted(state) == sorted(expected)
    assert len(state) == 142
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num_" not in k) == 2_695_312
    assert state["conv4.0.0.weight"].shape == (128, 3, 3, 3, 64)
    assert state["conv_out.0.weight"].shape == (128, 3, 1, 1, 128)


def test_bev_backbone_has_the_published_parameters():
    state = BEVBackbone(256).state_dict()
    expected = []
    for i in range(2):
        for j in (1, 4, 7, 10, 13, 16):
            expected += [f"blocks.{i}.{j}.weight", *norm(f"blocks.{i}.{j + 1}")]
        expected += unit(f"deblocks.{i}")
    assert sorted(state) == sorted(expected)
    assert len(state) == 84
    assert sum(v.numel() for k, v in state.items() if "running" not in k and "num_" not in k) == 4_576_768
    assert state["deblocks.0.0.weight"].shape == (128, 256, 1, 1)
    assert state["deblocks.1.0.weight"].shape == (256, 256, 2, 2)


def test_norms_are_those_of_the_detectors():
    for variant in ("plain", "res"):
        norms = [m for m in LidarEncoder(variant, 4, SMALL).modules() if hasattr(m, "running_mean")]
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize("variant", ["plain", "res"])
def test_encodes_and_reaches_every_parameter(variant):
    net = small_encoder(variant)
    features, indices, batch = sweep()
    found = net(features, indices, batch)
    assert found.bev.shape == (2, 32, 6, 8)
    assert found.points.shape == (600, 4)
    (found.bev.square().mean() + found.points.square().mean()).backward()
    for name, parameter in net.named_parameters():
        # A bias before a batch norm has no gradient but for rounding.
        zero = ".conv1.bias" in name or ".conv2.bias" in name
        assert zero or parameter.grad.abs().max() > 0, name


def test_stages_halve_the_resolution_and_keep_the_rows():
    features, indices, batch = sweep()
    for variant, last in (("plain", 16), ("res", 32)):
        stages = small_encoder(variant).backbone_3d.stages(features, indices, batch)
        shapes = [stages[name].shape for name in ("conv1", "conv2", "conv3", "conv4", "out")]
        assert shapes == [(41, 48, 64), (21, 24, 32), (11, 12, 16), (5, 6, 8), (2, 6, 8)]
        assert [x.features.shape[1] for x in stages.values()] == [4, 8, 16, last, 32]
        assert torch.equal(stages["conv1"].indices, indices)
        # A submanifold layer of each stage shares the rulebook of the others: 4 of them, and 4 of strided layers.
        assert len(stages["conv4"].rulebooks | stages["out"].rulebooks) == 8


def test_map_folds_layers_into_channels():
    net = small_encoder().backbone_3d
    features, indices, batch = sweep()
    with torch.no_grad():
        net.eval()
        out, bev = net.stages(features, indices, batch)["out"], net(features, indices, batch).bev
    row = 5
    b, z, y, x = out.indices[row].tolist()
    assert torch.equal(bev[b, z::2, y, x], out.features[row])


def test_autocast_keeps_the_sparse_part_in_fp32():
    net = small_encoder("res")
    features, indices, batch = sweep()
    with torch.autocast("cpu", torch.bfloat16):
        cast = net(features, indices, batch)
        cast.bev.float().square().mean().backward()
    plain = small_encoder("res")(features, indices, batch)
    assert torch.equal(cast.points, plain.points)
    assert cast.bev.dtype == torch.bfloat16
    assert (cast.bev.float() - plain.bev).abs().max() < 0.1 * plain.bev.abs().max()
    assert all(p.grad.isfinite().all() for p in net.backbone_3d.conv_input.parameters())


@pytest.mark.parametrize("variant", ["plain", "res"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_voxel_and_one(variant, count):
    net = small_encoder(variant)
    features, indices, batch = sweep(count)
    for training in (True, False):
        found = net.train(training)(features, indices, batch)
        assert found.bev.shape == (2, 32, 6, 8)
        assert found.bev.isfinite().all()
    net.train()(features, indices, batch).bev.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is not installed")
@pytest.mark.parametrize("variant", ["plain", "res"])
@pytest.mark.parametrize("training", [True, False])
def test_back_ends_agree(variant, training):
    found = []
    for backend in ("torch", choose_backend("spconv")):
        net = small_encoder(variant, backend).backbone_3d.train(training)
        out = net(*sweep())
        (out.bev.square().mean() + out.points.square().mean()).backward()
        found.append({"bev": out.bev, **{name: p.grad for name, p in net.named_parameters()}})
    for name, value in found[0].items():
        largest = value.detach().abs().max().item()
        if training and name.endswith(("conv1.bias", "conv2.bias")):
            largest = 1  # before a batch norm: no gradient but for rounding
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4 * largest)


def test_equals_the_dense_network():
    """The plain backbone as dense convolutions whose outputs are set to zero where no voxel is active."""
    torch.manual_seed(0)
    net = VoxelBackBone8x(4, (16, 16, 40), width=4).double().eval()
    for module in net.modules():
        if hasattr(module, "running_mean"):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    features, indices, batch = sweep(200, shape=(16, 16, 40))
    features = features.double()
    dense = SparseTensor.of(features, indices, net.sparse_shape, batch).dense()
    active = (dense != 0).any(1, keepdim=True).double()
    conv = torch.nn.functional.conv3d
    for name in ("conv_input", "conv1.0", *(f"conv{i}.{j}" for i in (2, 3, 4) for j in range(3)), "conv_out"):
        layer = net.get_submodule(name)
        (kernel, stride, padding), weight = layer[0].setting, layer[0].weight.permute(0, 4, 1, 2, 3)
        if stride != (1, 1, 1):
            active = (conv(active, torch.ones(1, 1, *kernel).double(), None, stride, padding) > 0).double()
        dense = conv(dense, weight, None, stride, padding)
        shape = (1, -1, 1, 1, 1)
        n = layer[1]
        scale = n.weight / (n.running_var + n.eps).sqrt()
        dense = (dense - n.running_mean.view(shape)) * scale.view(shape) + n.bias.view(shape)
        dense = dense.relu() * active
    torch.testing.assert_close(net(features, indices, batch).bev, dense.flatten(1, 2), rtol=1e-9, atol=1e-12)
