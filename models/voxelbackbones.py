"""LiDAR encoders of voxel detectors: a sparse 3-D backbone at an eighth of the resolution and a bird's-eye-view backbone.

Operators, their order and the names of their parameters are those that OpenPCDet gives to ``VoxelBackBone8x`` (SECOND,
PV-RCNN), ``VoxelResBackBone8x`` (CenterPoint) and ``BaseBEVBackbone``: a state dict goes from one to the other. Grids of
points are (X, Y, Z) as everywhere; the sparse grid has one more layer in z and is (Z + 1, Y, X).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.layers import SyncBatchNorm
from occstream.models.sparse import (
    Backend,
    Setting,
    SparseBatchNorm,
    SparseConv3d,
    SparseModule,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
    Triple,
    strided_shape,
)

Variant = Literal["plain", "res"]
STRIDE = 8  # input voxels per cell of the bird's-eye view
_NORM = {"eps": 1e-3, "momentum": 0.01}
# Kernel, stride and padding of the strided layers, in (z, y, x).
_HALF = ((3, 3, 3), (2, 2, 2), (1, 1, 1))
_HALF_FLAT = ((3, 3, 3), (2, 2, 2), (0, 1, 1))
_FLATTEN = ((3, 1, 1), (2, 1, 1), (0, 0, 0))


def encoded_shape(shape: Triple) -> Triple:
    """(D, H, W) of the encoder's last sparse grid for points on a grid of ``shape`` (X, Y, Z)."""
    x, y, z = shape
    found = (z + 1, y, x)
    for setting in (_HALF, _HALF, _HALF_FLAT, _FLATTEN):
        found = strided_shape(found, *setting)
    return found


def _unit(conv: SubMConv3d | SparseConv3d) -> SparseSequential:
    return SparseSequential(conv, SparseBatchNorm(conv.outputs, **_NORM), nn.ReLU())


def _down(inputs: int, outputs: int, setting: Setting, *, key: str, backend: Backend) -> SparseSequential:
    kernel, stride, padding = setting
    return _unit(SparseConv3d(inputs, outputs, kernel, stride, padding=padding, indice_key=key, backend=backend))


class SparseBasicBlock(SparseModule):
    """Two submanifold convolutions and a shortcut."""

    def __init__(self, channels: int, indice_key: str, backend: Backend) -> None:
        super().__init__()
        options = {"bias": True, "indice_key": indice_key, "backend": backend}
        self.conv1, self.bn1 = SubMConv3d(channels, channels, **options), SparseBatchNorm(channels, **_NORM)
        self.conv2, self.bn2 = SubMConv3d(channels, channels, **options), SparseBatchNorm(channels, **_NORM)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features (N, channels) -> (N, channels) at the same voxels."""
        out = self.conv1(x)
        out = self.conv2(out.replace(F.relu(self.bn1(out.features))))
        return out.replace(F.relu(self.bn2(out.features) + x.features))


class VoxelFeatures(NamedTuple):
    """Of a sparse backbone.

    bev: (B, C * D, H, W) float32, the last grid with its layers folded into channels (channel * D + layer).
    points: (N, width) float32, features of the input voxels at full resolution, in their order.
    """

    bev: Tensor
    points: Tensor


class _VoxelBackBone(nn.Module):
    """What both variants share.

    Args:
        in_features: channels of a voxel.
        shape: (X, Y, Z) of the grid of points.
        backend: from ``sparse.choose_backend``.
        width: channels of the first stage; 16 is the published network.
    """

    conv_input: SparseSequential
    conv_out: SparseSequential

    gathered_whole = True  # ZeRO-3 finds no tensors in what its layers pass on; in and out of it they are plain

    def __init__(self, in_features: int, shape: Triple, backend: Backend = "torch", width: int = 16) -> None:
        super().__init__()
        x, y, z = shape
        self.sparse_shape = (z + 1, y, x)
        self._build(in_features, width, backend)

    def _build(self, in_features: int, width: int, backend: Backend) -> None:
        raise NotImplementedError

    def stages(self, features: Tensor, indices: Tensor, batch_size: int) -> dict[str, SparseTensor]:
        """Sparse tensors after each stage: conv1 to conv4 (1, 1/2, 1/4 and 1/8 of the resolution) and out.

        Args:
            features: (N, in_features).
            indices: (N, 4) integers: batch, z, y, x. Rows of all stages are in ascending order.

        Raises:
            ValueError: voxels outside of the grid or given twice.
        """
        x = self.conv_input(SparseTensor.of(features, indices, self.sparse_shape, batch_size))
        found = {}
        for name in ("conv1", "conv2", "conv3", "conv4"):
            x = found[name] = getattr(self, name)(x)
        found["out"] = self.conv_out(x)
        return found

    def forward(self, features: Tensor, indices: Tensor, batch_size: int) -> VoxelFeatures:
        """As ``stages``. ``points`` are in the order of ``indices`` if that is ascending, as it is from ``voxelize``."""
        found = self.stages(features, indices, batch_size)
        return VoxelFeatures(found["out"].dense().flatten(1, 2), found["conv1"].features)


class VoxelBackBone8x(_VoxelBackBone):
    """The plain variant: 12 convolutions."""

    def _build(self, in_features: int, width: int, backend: Backend) -> None:
        def same(inputs: int, outputs: int, stage: int) -> SparseSequential:
            return _unit(SubMConv3d(inputs, outputs, indice_key=f"subm{stage}", backend=backend))

        def down(inputs: int, outputs: int, setting: Setting, key: str) -> SparseSequential:
            return _down(inputs, outputs, setting, key=key, backend=backend)

        def stage(inputs: int, outputs: int, setting: Setting, number: int) -> SparseSequential:
            layers = [down(inputs, outputs, setting, f"spconv{number}")]
            return SparseSequential(*layers, same(outputs, outputs, number), same(outputs, outputs, number))

        self.conv_input = same(in_features, width, 1)
        self.conv1 = SparseSequential(same(width, width, 1))
        self.conv2 = stage(width, 2 * width, _HALF, 2)
        self.conv3 = stage(2 * width, 4 * width, _HALF, 3)
        self.conv4 = stage(4 * width, 4 * width, _HALF_FLAT, 4)
        self.conv_out = down(4 * width, 8 * width, _FLATTEN, "spconv_down2")


class VoxelResBackBone8x(_VoxelBackBone):
    """The residual variant: two blocks in each stage, twice the channels in the last."""

    def _build(self, in_features: int, width: int, backend: Backend) -> None:
        def blocks(channels: int, stage: int) -> list[SparseBasicBlock]:
            return [SparseBasicBlock(channels, f"subm{stage}", backend) for _ in range(2)]

        def down(inputs: int, outputs: int, setting: Setting, key: str) -> SparseSequential:
            return _down(inputs, outputs, setting, key=key, backend=backend)

        def stage(inputs: int, setting: Setting, number: int) -> SparseSequential:
            first = down(inputs, 2 * inputs, setting, f"spconv{number}")
            return SparseSequential(first, *blocks(2 * inputs, number))

        self.conv_input = _unit(SubMConv3d(in_features, width, indice_key="subm1", backend=backend))
        self.conv1 = SparseSequential(*blocks(width, 1))
        self.conv2 = stage(width, _HALF, 2)
        self.conv3 = stage(2 * width, _HALF, 3)
        self.conv4 = stage(4 * width, _HALF_FLAT, 4)
        self.conv_out = down(8 * width, 8 * width, _FLATTEN, "spconv_down2")


VARIANTS: dict[Variant, type[_VoxelBackBone]] = {"plain": VoxelBackBone8x, "res": VoxelResBackBone8x}


class BEVBackbone(nn.Module):
    """2-D backbone of two levels, the second at half the resolution, both brought to the first's and concatenated.

    Args:
        inputs: channels of the map (C * D).
        channels: of the two levels; the published networks have (128, 256).
        layers: convolutions of each level after its first; (5, 5).
        up: channels to which each level is brought; 256.
    """

    def __init__(
        self,
        inputs: int,
        channels: tuple[int, int] = (128, 256),
        layers: tuple[int, int] = (5, 5),
        up: int = 256,
    ) -> None:
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        for stride, width, count in zip((1, 2), channels, layers, strict=True):
            level: list[nn.Module] = [nn.ZeroPad2d(1), nn.Conv2d(inputs, width, 3, stride, bias=False)]
            level += [SyncBatchNorm(width, **_NORM), nn.ReLU()]
            for _ in range(count):
                level += [nn.Conv2d(width, width, 3, padding=1, bias=False), SyncBatchNorm(width, **_NORM), nn.ReLU()]
            self.blocks.append(nn.Sequential(*level))
            raised = nn.ConvTranspose2d(width, up, stride, stride, bias=False)
            self.deblocks.append(nn.Sequential(raised, SyncBatchNorm(up, **_NORM), nn.ReLU()))
            inputs = width
        self.outputs = 2 * up

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W), both even -> (B, 2 * up, H, W)."""
        found = []
        for block, deblock in zip(self.blocks, self.deblocks):
            x = block(x)
            found.append(deblock(x))
        return torch.cat(found, 1)


class LidarEncoder(nn.Module):
    """Voxels -> bird's-eye view of cells of 8 voxels, in the layout of OpenPCDet's detectors.

    Args:
        variant: ``plain`` or ``res``.
        in_features, shape, backend, width: see the sparse backbone.
        bev_channels, bev_layers, bev_up: see ``BEVBackbone``.

    Raises:
        ValueError: the grid is one that ``check_points_grid`` refuses.
    """

    def __init__(
        self,
        variant: Variant,
        in_features: int,
        shape: Triple,
        backend: Backend = "torch",
        *,
        width: int = 16,
        bev_channels: tuple[int, int] = (128, 256),
        bev_layers: tuple[int, int] = (5, 5),
        bev_up: int = 256,
    ) -> None:
        super().__init__()
        check_points_grid(shape)
        self.backbone_3d = VARIANTS[variant](in_features, shape, backend, width)
        self.backbone_2d = BEVBackbone(encoded_shape(shape)[0] * 8 * width, bev_channels, bev_layers, bev_up)
        self.outputs = self.backbone_2d.outputs

    def forward(self, features: Tensor, indices: Tensor, batch_size: int) -> VoxelFeatures:
        """Voxels as ``voxelize`` gives them -> map (B, outputs, Y / 8, X / 8) and features of the voxels."""
        found = self.backbone_3d(features, indices, batch_size)
        return VoxelFeatures(self.backbone_2d(found.bev), found.points)


def check_points_grid(shape: Triple) -> None:
    """Whether detectors can take over an encoder that is trained on a grid of ``shape`` (X, Y, Z): their 2-D backbones read
    two layers of the last sparse grid, and its levels meet only in maps of even size.

    Raises:
        ValueError: they cannot.
    """
    x, y, z = shape
    for name, size in (("x", x), ("y", y)):
        if size % (2 * STRIDE):
            raise ValueError(
                f"the grid of points has {size} voxels in {name}, must be a multiple of {2 * STRIDE}: "
                f"change point_range or voxel"
            )
    layers = max(0, encoded_shape((x, y, z))[0])
    if layers != 2:
        raise ValueError(
            f"the grid of points has {z} voxels in z, of which the encoder makes {layers} layers, but detectors read 2 "
            f"(from 40 to 55 voxels; published ones have 40): change point_range or voxel, z extent / 40 for example"
        )
