"""Lift-Splat: image features to a voxel volume by predicted depth (B2S, Sec. 3.2; after BEVDet and BEVDepth)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from occstream.models import kernels
from occstream.models.autograd import Context
from occstream.models.batch import Batch, Cameras
from occstream.models.layers import ResidualBlock, SyncBatchNorm, conv_bn, full_precision, row
from occstream.sharding.grid import VoxelGrid

CHUNK = 1 << 18  # points at a time: bounds the memory of pooling


def frustum(image_size: tuple[int, int], feature_size: tuple[int, int], depths: Tensor) -> Tensor:
    """Pixels and depths of the lifted points: (D, h, w, 3) of (u, v, depth), pixels of the network's input.

    Pixels are spread over the feature map from 0 to W-1 and 0 to H-1, ends included (as BEVDet).
    """
    (height, width), (h, w) = image_size, feature_size
    rows = torch.linspace(0, height - 1, h, device=depths.device)
    columns = torch.linspace(0, width - 1, w, device=depths.device)
    d, v, u = torch.meshgrid(depths, rows, columns, indexing="ij")
    return torch.stack([u, v, d], -1)


def unproject(points: Tensor, batch: Batch) -> Tensor:
    """Augmented pixels with depth -> augmented ego frame, in fp32 also under autocast: in bf16 a quarter of the
    points would fall into another voxel.

    Args:
        points: (…, 3) of (u, v, depth), the same for all cameras, fp32.

    Returns:
        (B, V, …, 3) meters, fp32.
    """
    cameras = batch.part(Cameras)
    _fp32(points, batch.scene_aug, *_geometry(cameras))
    with full_precision(points.device):
        p = points.reshape(-1, 3) - cameras.post_tran.unsqueeze(2)
        p = p @ inverse(cameras.post_rot).mT
        rays = torch.cat([p[..., :2] * p[..., 2:], p[..., 2:]], -1)
        aug, to_ego = batch.scene_aug.unsqueeze(1), cameras.camera_to_ego
        matrix = aug @ to_ego[..., :3, :3] @ inverse(cameras.intrinsics)
        found = rays @ matrix.mT + (aug @ to_ego[..., :3, 3:]).mT
    return found.view(*found.shape[:2], *points.shape)


def project(points: Iterable[Tensor], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Augmented ego frame -> augmented pixels, inverse of ``unproject``; in fp32 also under autocast.

    Args:
        points: (N, 3) meters of each frame, fp32, each with an N of its own.

    Returns:
        For each frame pixels (V, N, 2) of (u, v), and depth (V, N), meters along the camera's axis: pixels mean something
        only where it is positive.
    """
    cameras = batch.part(Cameras)
    _fp32(batch.scene_aug, *_geometry(cameras))
    found = []
    with full_precision(batch.scene_aug.device):
        undo, turn = inverse(batch.scene_aug).mT, inverse(cameras.camera_to_ego[..., :3, :3]).mT
        origin = cameras.camera_to_ego[..., :3, 3].unsqueeze(2)
        for i, mine in enumerate(points):
            _fp32(mine)
            camera = (mine @ undo[i] - origin[i]) @ turn[i]
            image = camera @ cameras.intrinsics[i].mT
            depth = image[..., 2]
            pixel = torch.cat([image[..., :2] / depth.clamp_min(1e-5).unsqueeze(-1), depth.unsqueeze(-1)], -1)
            pixel = pixel @ cameras.post_rot[i].mT + cameras.post_tran[i].unsqueeze(1)
            found.append((pixel[..., :2], depth))
    return found


def inverse(matrix: Tensor) -> Tensor:
    """Inverse of (…, 3, 3) by cross products, computed in fp64: LAPACK's checks whether there is one, for which the host would
    wait."""
    first, second, third = matrix.double().unbind(-2)
    columns = [torch.linalg.cross(second, third), torch.linalg.cross(third, first), torch.linalg.cross(first, second)]
    determinant = (first * columns[0]).sum(-1)
    return (torch.stack(columns, -1) / determinant[..., None, None]).to(matrix.dtype)


def _geometry(cameras: Cameras) -> tuple[Tensor, ...]:
    return cameras.post_tran, cameras.post_rot, cameras.camera_to_ego, cameras.intrinsics


def _fp32(*tensors: Tensor) -> None:
    """Geometry in less than fp32 is a programming error: meters would be off by voxels, pixels by several."""
    for tensor in tensors:
        assert tensor.dtype == torch.float32, f"geometry is {tensor.dtype}, must be float32"


class _Pool(torch.autograd.Function):
    """out[voxel[p]] += weight[p] * context[pixel[p]] without keeping the products."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Context, weight: Tensor, context: Tensor, pixel: Tensor, voxel: Tensor, size: int
    ) -> Tensor:
        out = context.new_zeros(size, context.shape[1])
        for part in _chunks(len(pixel)):
            out.index_add_(0, voxel[part], context[pixel[part]] * weight[part].unsqueeze(1))
        ctx.save_for_backward(weight, context, pixel, voxel)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, context, pixel, voxel = ctx.saved_tensors
        to_weight, to_context = torch.empty_like(weight), torch.zeros_like(context)
        for part in _chunks(len(pixel)):
            g = grad[voxel[part]]
            to_weight[part] = (g * context[pixel[part]]).sum(1)
            to_context.index_add_(0, pixel[part], g * weight[part].unsqueeze(1))
        return to_weight, to_context, None, None, None


def _chunks(count: int) -> list[slice]:
    return [slice(i, i + CHUNK) for i in range(0, count, CHUNK)]


def voxel_pool(depth: Tensor, context: Tensor, points: Tensor, grid: VoxelGrid) -> Tensor:
    """Weighted sum of context features per voxel; points outside the grid are dropped.

    Args:
        depth: (B, V, D, h, w) weights.
        context: (B, V, C, h, w).
        points: (B, V, D, h, w, 3) meters in the grid's frame, fp32.

    Returns:
        (B, C, X, Y, Z) fp32.
    """
    _fp32(points)
    batch, views, bins, h, w = depth.shape
    x, y, z = grid.shape
    if compiled := kernels.compiled_for(depth):
        rows = context.float().permute(0, 1, 3, 4, 2).reshape(batch * views * h * w, -1)
        places = compiled.places(points, grid).view(batch * views, bins, h * w)
        out = compiled.pool(depth.float().reshape(batch * views, bins, h * w), rows, places, batch * x * y * z)
        return out.view(batch, x, y, z, -1).permute(0, 4, 1, 2, 3)
    index = ((points - row(points, grid.lower)) / row(points, grid.voxel)).floor().long()
    inside = ((index >= 0) & (index < row(index, grid.shape))).all(-1)
    voxel = (index[..., 0] * y + index[..., 1]) * z + index[..., 2]
    voxel = voxel + torch.arange(batch, device=voxel.device).view(-1, 1, 1, 1, 1) * (x * y * z)
    if kernels.wanted_for(depth):
        rows = context.permute(0, 1, 3, 4, 2).reshape(batch * views * h * w, -1)
        places = voxel.masked_fill(~inside, -1).reshape(batch * views, bins, h * w)
        out = kernels.pool(depth.reshape(batch * views, bins, h * w), rows, places, batch * x * y * z)
        return out.view(batch, x, y, z, -1).permute(0, 4, 1, 2, 3)
    keep = inside.reshape(-1).nonzero().squeeze(1)
    # Number of the image feature behind each point: (b, v, h, w), whatever its depth bin.
    cell = torch.arange(batch * views * h * w, device=voxel.device).view(batch, views, 1, h, w)
    pixel = cell.expand(batch, views, bins, h, w).reshape(-1)[keep]
    features = context.float().permute(0, 1, 3, 4, 2).reshape(batch * views * h * w, -1)
    out = _Pool.apply(depth.float().reshape(-1)[keep], features, pixel, voxel.reshape(-1)[keep], batch * x * y * z)
    return out.view(batch, x, y, z, -1).permute(0, 4, 1, 2, 3)


def camera_vector(batch: Batch) -> Tensor:
    """(B, V, 27) numbers that tell the depth net how the camera sits (as BEVDepth)."""
    cameras = batch.part(Cameras)
    k, rot, tran = cameras.intrinsics, cameras.post_rot, cameras.post_tran
    aug = batch.scene_aug.unsqueeze(1).expand(-1, k.shape[1], 3, 3)
    parts = [
        k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2],
        rot[..., 0, 0], rot[..., 0, 1], tran[..., 0], rot[..., 1, 0], rot[..., 1, 1], tran[..., 1],
        aug[..., 0, 0], aug[..., 0, 1], aug[..., 1, 0], aug[..., 1, 1], aug[..., 2, 2],
    ]  # fmt: skip
    return torch.cat([torch.stack(parts, -1), cameras.camera_to_ego[..., :3, :].flatten(-2)], -1).float()


class _Gate(nn.Module):
    """Squeeze and excitation by the camera vector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(27, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.gate = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.Sigmoid())

    def forward(self, features: Tensor, cameras: Tensor) -> Tensor:
        return features * self.gate(self.mlp(cameras))[..., None, None]


class _Aspp(nn.Module):
    """Atrous spatial pyramid: dilations 1, 6, 12, 18 and a global branch."""

    def __init__(self, channels: int, mid: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(2, channels, mid, 1 if d == 1 else 3, dilation=d) for d in (1, 6, 12, 18))
        # One value per image and channel: batch norm works over the batch alone here.
        self.overall = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(2, channels, mid, 1))
        self.merge = nn.Sequential(*conv_bn(2, 5 * mid, channels, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        overall = self.overall(x).expand(-1, -1, *x.shape[-2:])
        return self.merge(torch.cat([*(branch(x) for branch in self.branches), overall], 1))


class DepthNet(nn.Module):
    """Camera-aware depth distribution and context (as BEVDepth).

    Args:
        channels: of the image features.
        context: channels to lift.
        bins: depth bins.
        blocks: residual blocks of the depth branch (3 in the paper's base).
        aspp: with the pyramid (96 channels a branch).
    """

    def __init__(self, channels: int, context: int, bins: int, blocks: int = 3, *, aspp: bool = True) -> None:
        super().__init__()
        self.reduce = conv_bn(2, channels, channels)
        self.standardise = SyncBatchNorm(27)
        self.context_gate, self.depth_gate = _Gate(channels), _Gate(channels)
        self.context = nn.Conv2d(channels, context, 1)
        layers: list[nn.Module] = [ResidualBlock(2, channels, channels) for _ in range(blocks)]
        if aspp:
            layers.append(_Aspp(channels, 96))
        self.depth = nn.Sequential(*layers, nn.Conv2d(channels, bins, 1))

    def forward(self, features: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C, h, w) and camera vectors (N, 27) -> depth (N, D, h, w) summing to 1 over D, context (N, c, h, w)."""
        x = self.reduce(features)
        cameras = self.standardise(cameras)
        context = self.context(self.context_gate(x, cameras))
        depth = self.depth(self.depth_gate(x, cameras))
        return depth.float().softmax(1), context


class LiftSplat(nn.Module):
    """Image features -> full-resolution volume, and the depth it was lifted by.

    Args:
        channels: of the image features.
        context: channels to lift.
        depth: (first, end, step) in meters; bin i is at first + i * step.
        grid: of the volume, ego frame.
        image_size: (H, W) of the network's input.
        blocks, aspp: see ``DepthNet``.
    """

    depths: Tensor

    def __init__(
        self,
        channels: int,
        context: int,
        depth: tuple[float, float, float],
        grid: VoxelGrid,
        *,
        image_size: tuple[int, int],
        blocks: int,
        aspp: bool,
    ) -> None:
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.register_buffer("depths", torch.arange(*depth), persistent=False)
        if len(self.depths) < 2:
            raise ValueError(f"depth {depth}: first, end and step give fewer than two bins")
        self.net = DepthNet(channels, context, len(self.depths), blocks, aspp=aspp)

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, V, C, h, w) -> volume (B, context, X, Y, Z), depth (B, V, D, h, w) summing to 1 over D; fp32."""
        b, v, _, h, w = features.shape
        depth, context = self.net(features.flatten(0, 1), camera_vector(batch).flatten(0, 1))
        depth = depth.unflatten(0, (b, v))
        points = unproject(frustum(self.image_size, (h, w), self.depths), batch)
        return voxel_pool(depth, context.unflatten(0, (b, v)), points, self.grid), depth
