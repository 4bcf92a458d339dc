"""B2S: binary first, semantic second (seed paper 001; SPEC section A).

Images -> features -> compact volume B -> binary decoder -> B' and binary logits (all frames) -> voxels that B' says are
occupied -> sparse transformer -> back into B' -> up-sampled B'' -> semantic logits (semantic frames only).
Shape legend: see ``batch``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.attention import ImageAttention, VolumeAttention
from occstream.models.backbones import ImageEncoder
from occstream.models.batch import OccBatch, OccOutputs, pool_binary
from occstream.models.layers import AxialEmbedding, SyncBatchNorm, VolumeEncoder, conv_bn
from occstream.models.lift import LiftSplat, project
from occstream.models.registry import register
from occstream.sharding.grid import VoxelGrid

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass
class B2SConfig:
    """Sizes and open points of B2S. Defaults are the paper's onboard LS model, or SPEC's where the paper is silent."""

    backbone: str = "resnet50"
    """Image backbone: resnet18, 34, 50 or 101."""
    backbone_width: int = 64
    """Channels of its stem; 64 is the published network. A multiple of 16."""
    backbone_weights: str = ""
    """Initial weights: a path or a hub id (SPEC A.3: ImageNet; the paper gives none)."""
    checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass."""
    feature_channels: int = 256
    """Channels of the image features."""
    feature_stride: int = 16
    """Stride of the image features: 8, 16 or 32."""
    depth: tuple[float, float, float] = (1.0, 45.0, 0.5)
    """Depth bins: first, end, step, in metres (SPEC A.4: 88 bins; OpenScene 1, 60, 0.5)."""
    depth_blocks: int = 3
    """Residual blocks of the depth net."""
    depth_aspp: bool = True
    """Depth net with the atrous pyramid."""
    lift_channels: int = 32
    """Channels that are lifted into the volume."""
    volume_block: bool = True
    """A residual block on the full-resolution volume before it is reduced (SPEC A.4)."""
    encoder_channels: tuple[int, ...] = (32, 64, 128)
    """Volume encoder: channels of its levels."""
    encoder_blocks: tuple[int, ...] = (1, 2, 4)
    """Volume encoder: residual blocks of its levels."""
    encoder_strides: tuple[int, ...] = (1, 2, 2)
    """Volume encoder: strides of its levels."""
    encoder_out: int = 32
    """Channels the levels are merged to."""
    compact_channels: int = 256
    """C of the compact volume B."""
    compact_factor: int = 4
    """Grid voxels per voxel of B in x and y (50x50x16 of 200x200x16)."""
    binary_channels: int = 128
    """C' of B'. Not stated; the paper calls 32 too few (SPEC A.2)."""
    binary_factor: int = 2
    """Grid voxels per voxel of B' in x and y. Equal to ``compact_factor``: no up-sampling (offboard)."""
    semantic_channels: int = 64
    """C'' of B''. Not stated."""
    attention_channels: int = 256
    """Width of the sparse transformer."""
    heads: int = 8
    """Attention heads."""
    self_points: int = 4
    """Sampling points of the self-attention."""
    cross_points: int = 8
    """Sampling points of the image cross-attention."""
    ffn_channels: int = 512
    """Hidden width of the transformer's feed-forward part."""
    dropout: float = 0.1
    """Dropout in the transformer."""
    sparse_layers: int = 1
    """Sparse transformer layers."""
    query: Literal["sparse", "dense"] = "sparse"
    """What the deformable self-attention samples: B' (sparse), or B' set to zero outside the selection (dense): the two
    readings of the paper's section 3.2 and appendix A.2 (SPEC A.8)."""
    selection: Literal["predicted", "gt", "union"] = "predicted"
    """Which voxels the sparse transformer refines: predicted occupied, occupied in the pooled labels, or both while
    training (SPEC A.7)."""
    threshold: float = 0.5
    """Probability from which a voxel counts as occupied."""
    floor: int = 1024
    """At least so many voxels are refined (the most probable ones), so that there are always some."""
    cap: int = 30_000
    """At most so many, to bound memory."""
    strategy: Literal["intermediate"] = "intermediate"
    """Head strategy of the paper's Fig. 4."""
    pixel_mean: tuple[float, float, float] = field(default=PIXEL_MEAN)
    """RGB mean of the input."""
    pixel_std: tuple[float, float, float] = field(default=PIXEL_STD)
    """RGB standard deviation of the input."""

    def __post_init__(self):
        if self.backbone_width % 16 or self.backbone_width < 16:
            # Not a matter of taste: oneDNN's gradient of a strided 1x1 convolution writes out of bounds at 8 channels
            # (torch 2.13, CPU with AVX-512; found as a crash of the test recipe).
            raise ValueError(f"backbone_width is {self.backbone_width}, must be a multiple of 16")
        if not 1 <= self.floor <= self.cap:
            raise ValueError(f"floor is {self.floor} and cap {self.cap}; need 1 <= floor <= cap")
        if self.compact_factor not in (self.binary_factor, 2 * self.binary_factor):
            raise ValueError(
                f"compact_factor is {self.compact_factor}, must be {self.binary_factor} or {2 * self.binary_factor} "
                f"(binary_factor or twice it)"
            )
        if self.binary_factor not in (1, 2):
            raise ValueError(f"binary_factor is {self.binary_factor}, must be 1 or 2")


class SparseLayer(nn.Module):
    """Self-attention to B', image cross-attention, feed-forward; post-norm (SPEC A.8)."""

    def __init__(self, c: B2SConfig):
        super().__init__()
        width = c.attention_channels
        self.volume = VolumeAttention(width, c.heads, c.self_points, c.dropout)
        self.images = ImageAttention(width, c.feature_channels, c.heads, c.cross_points, c.dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, c.ffn_channels),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.Linear(c.ffn_channels, width),
            nn.Dropout(c.dropout),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, references, volume, pixels, visible, features) -> Tensor:
        x = self.norms[0](x + self.volume(x + position, references, volume))
        x = self.norms[1](x + self.images(x + position, pixels, visible, features))
        return self.norms[2](x + self.ffn(x))


class SemanticPart(nn.Module):
    """Everything after the binary decoder: selection, sparse transformer, B'', semantic head.

    No batch norm: a rank may hold no semantic frame. Args: ``grid`` is the full output grid.
    """

    def __init__(self, c: B2SConfig, grid: VoxelGrid, num_classes: int, image_size: tuple[int, int]):
        super().__init__()
        self.c, self.image_size = c, image_size
        coarse = grid.coarsen((c.binary_factor, c.binary_factor, 1))
        self.shape = coarse.shape
        self.register_buffer(
            "centers", torch.tensor(coarse.centers().reshape(-1, 3), dtype=torch.float32), persistent=False
        )
        self.into = nn.Linear(c.binary_channels, c.attention_channels)
        self.volume = nn.Conv3d(c.binary_channels, c.attention_channels, 1)
        self.position = AxialEmbedding(coarse.shape, c.attention_channels)
        self.layers = nn.ModuleList(SparseLayer(c) for _ in range(c.sparse_layers))
        self.out = nn.Linear(c.attention_channels, c.binary_channels)
        up = (c.binary_factor, c.binary_factor, 1)
        self.up = nn.ConvTranspose3d(2 * c.binary_channels, c.semantic_channels, up, up)
        self.norm = nn.GroupNorm(8 if c.semantic_channels % 8 == 0 else 1, c.semantic_channels)
        self.head = nn.Sequential(
            nn.Conv3d(c.semantic_channels, c.semantic_channels, 1),
            nn.ReLU(),
            nn.Conv3d(c.semantic_channels, num_classes, 1),
        )
        nn.init.constant_(self.head[-1].bias, -4.595)  # prior probability 0.01 (SPEC A.9)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels to refine: those above the threshold, best first, at least ``floor`` and at most ``cap``.

        Args:
            scores: (S, N) in 0..1 (2 forces a voxel in).

        Returns:
            index: (S, M) flat voxel index; M is the largest number any frame needs.
            used: (S, M) bool, False for padding.
        """
        total = scores.shape[1]
        floor, cap = min(self.c.floor, total), min(self.c.cap, total)
        count = (scores > self.c.threshold).sum(1).clamp(floor, cap)
        index = scores.topk(int(count.max()), dim=1).indices
        return index, torch.arange(index.shape[1], device=index.device) < count.unsqueeze(1)

    def forward(self, volume: Tensor, logits: Tensor, features: Tensor, batch: OccBatch) -> tuple[Tensor, Tensor]:
        """Refines.

        Args:
            volume: (S, C', Xb, Yb, Zb), B' of the semantic frames.
            logits: (S, Xb, Yb, Zb) binary logits.
            features: (S, V, C_f, h, w).
            batch: the S frames' geometry and labels.

        Returns:
            semantic logits (S, K, X, Y, Z) fp32, and the number of refined voxels (S,).
        """
        s = volume.shape[0]
        index, used = self.select(self._scores(logits, batch))
        flat = volume.flatten(2).mT  # (S, N, C')
        tokens = flat.gather(1, index.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        steps = torch.stack(torch.unravel_index(index, self.shape), -1)
        references = (steps + 0.5) / steps.new_tensor(self.shape)
        position = self.position(steps)
        pixels, depth = project(self.centers[index], batch)
        height, width = self.image_size
        pixels = pixels / pixels.new_tensor([width, height])
        visible = (depth > 1e-5) & ((pixels > 0) & (pixels < 1)).all(-1) & used.unsqueeze(1)
        pixels = torch.where(visible.unsqueeze(-1), pixels, pixels.new_zeros(()))
        sampled = volume
        if self.c.query == "dense":
            mask = volume.new_zeros(s, flat.shape[1]).scatter(1, index, used.to(volume.dtype))
            sampled = volume * mask.view(s, 1, *self.shape)
        sampled = self.volume(sampled)
        x = self.into(tokens)
        for layer in self.layers:
            x = layer(x, position, references, sampled, pixels, visible, features)
        refined = self.out(x) * used.unsqueeze(-1)
        # Scatter by addition: padding repeats no voxel (top-k indices differ) and adds zero.
        dense = refined.new_zeros(flat.shape).scatter_add(1, index.unsqueeze(-1).expand_as(refined), refined)
        dense = dense.mT.unflatten(2, self.shape)
        up = F.relu(self.norm(self.up(torch.cat([dense, volume.to(dense.dtype)], 1))))
        return self.head(up).float(), used.sum(1)

    def _scores(self, logits: Tensor, batch: OccBatch) -> Tensor:
        scores = logits.detach().float().sigmoid().flatten(1)
        if self.c.selection == "predicted" or (self.c.selection == "union" and not self.training):
            return scores
        truth, _ = pool_binary(batch.binary[: len(logits)], batch.binary_valid[: len(logits)], self.shape)
        truth = truth.flatten(1).float() * 2
        return truth if self.c.selection == "gt" else torch.maximum(scores, truth)


class B2S(nn.Module):
    """LS-based B2S with the intermediate head.

    Args:
        c: settings.
        grid: full-resolution output grid, ego frame.
        num_classes: K without free.
        image_size: (H, W) of the input.
        semantic: False leaves out everything after the binary decoder (pre-training).
    """

    def __init__(self, c: B2SConfig, grid: VoxelGrid, num_classes: int, image_size: tuple[int, int], semantic: bool):
        super().__init__()
        x, y, z = grid.shape
        if x % c.compact_factor or y % c.compact_factor:
            raise ValueError(
                f"grid {grid.name!r} {grid.shape} does not divide by compact_factor {c.compact_factor} in x and y"
            )
        if grid.frame != "ego":
            raise ValueError(
                f"grid {grid.name!r} is in the {grid.frame} frame; camera models need labels in the ego frame"
            )
        self.compact_shape = (x // c.compact_factor, y // c.compact_factor, z)
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std).view(3, 1, 1), persistent=False)
        self.images = ImageEncoder(
            c.backbone, c.backbone_width, c.feature_channels, c.feature_stride, c.backbone_weights, c.checkpointing
        )
        self.lift = LiftSplat(
            c.feature_channels, c.lift_channels, c.depth, grid, image_size, c.depth_blocks, c.depth_aspp
        )
        block = VolumeEncoder(c.lift_channels, (c.lift_channels,), (1,), (1,), c.lift_channels)
        self.raw = block if c.volume_block else None
        self.encoder = VolumeEncoder(
            c.lift_channels, c.encoder_channels, c.encoder_blocks, c.encoder_strides, c.encoder_out
        )
        self.compact = nn.Conv3d(c.encoder_out, c.compact_channels, 1)
        if c.compact_factor == c.binary_factor:
            first = conv_bn(3, c.compact_channels, c.binary_channels)
        else:
            up = nn.ConvTranspose3d(c.compact_channels, c.binary_channels, (2, 2, 1), (2, 2, 1), bias=False)
            first = nn.Sequential(up, SyncBatchNorm(c.binary_channels), nn.ReLU(inplace=True))
        self.decoder = nn.Sequential(first, conv_bn(3, c.binary_channels, c.binary_channels))
        self.binary_head = nn.Conv3d(c.binary_channels, 1, 1)
        self.semantic = SemanticPart(c, grid, num_classes, image_size) if semantic else None

    def transfer_keys(self) -> list[str]:
        """Keys of ``state_dict()`` that must come from a pre-training checkpoint: all up to the binary head."""
        return [k for k in self.state_dict() if not k.startswith("semantic.")]

    def forward(self, batch: OccBatch) -> OccOutputs:
        b, v = batch.images.shape[:2]
        pixels = (batch.images.flatten(0, 1).float() - self.pixel_mean) / self.pixel_std
        features = self.images(pixels.contiguous(memory_format=torch.channels_last)).unflatten(0, (b, v))
        volume = self.lift(features, batch)
        if self.raw is not None:
            volume = self.raw(volume, volume.shape[2:])
        compact = self.compact(self.encoder(volume, self.compact_shape))
        binary = self.decoder(compact)
        logits = self.binary_head(binary).squeeze(1).float()
        if self.semantic is None:
            return OccOutputs(logits)
        # B frames stop here. A rank without S frames runs the semantic part on one frame, cut off from the graph, so
        # that every parameter takes part on every rank (OPERATIONS 7); the loss gives it weight 0.
        s = batch.num_semantic
        frames = slice(0, max(s, 1))
        parts = (binary[frames], logits[frames], features[frames])
        parts = parts if s else tuple(p.detach() for p in parts)
        classes, selected = self.semantic(*parts, _first(batch, frames))
        return OccOutputs(logits, classes, selected[:s])


def _first(batch: OccBatch, frames: slice) -> OccBatch:
    """Geometry and labels of the first frames (images are not needed again)."""
    names = ("images", "intrinsics", "camera_to_ego", "post_rot", "post_tran", "bda", "binary", "binary_valid")
    return OccBatch(
        **{n: getattr(batch, n)[frames] for n in names}, semantic=batch.semantic, num_semantic=batch.num_semantic
    )


@register(B2SConfig)
def b2s_ls(
    config: B2SConfig, *, grid: VoxelGrid, num_classes: int, image_size: tuple[int, int], semantic: bool
) -> nn.Module:
    """LS-based B2S (SPEC A.4)."""
    return B2S(config, grid, num_classes, image_size, semantic)
