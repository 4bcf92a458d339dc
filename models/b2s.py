"""B2S: binary first, semantic second (Noguchi and Yamamoto), in both families and with every head strategy.

Images -> features -> compact volume B (Lift-Splat, or learned voxel queries) -> dense transformer layers -> binary decoder
-> B'. Then, by strategy (the paper's Fig. 4):

* intermediate (ours): binary logits of B' (all frames) -> voxels that they say are occupied -> sparse transformer -> back
  into B' -> up-sampled B'' -> semantic logits (semantic frames only).
* replacing: B' -> B''; its binary head is thrown away after pre-training, a semantic one takes its place.
* multi: as replacing, but the binary head stays alongside the semantic one.
* offboard: as intermediate, but the labels say what is occupied; there is no binary head and no pre-training.

Shape legend: see ``batch``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.backbones import PIXEL_MEAN, PIXEL_STD, CameraEmbedding, ImageEncoder
from occstream.models.batch import Batch, Cameras, OccOutputs, Occupancy, pool_binary
from occstream.models.layers import Pointwise3d, SyncBatchNorm, VolumeEncoder, checkpointed, conv_bn, row
from occstream.models.lift import LiftSplat
from occstream.models.registry import register
from occstream.models.transformer import DenseTransformer, TransformerLayer, VoxelTokens
from occstream.sharding.grid import VoxelGrid

Strategy = Literal["intermediate", "replacing", "multi", "offboard"]
Selection = Literal["predicted", "gt", "union"]
_MAY_BE_ZERO = ("dense_layers", "head_rows", "dropout", "depth_blocks")


@dataclass
class B2SConfig:
    """Sizes and open points of both families. Defaults are the paper's onboard LS model, or ours where the paper is
    silent."""

    strategy: Strategy = "intermediate"
    """Head strategy of the paper's Fig. 4 and section 3.4; see the module."""
    backbone: str = "resnet50"
    """Image backbone: resnet18, 34, 50 or 101, or efficientnet_lite0."""
    backbone_width: int = 64
    """Channels of its stem; 64 is the published network. A multiple of 16."""
    backbone_weights: str = ""
    """Initial weights: a path or a hub id (ImageNet's, for example; the paper names none)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: backbone, volumes, dense layers, heads."""
    feature_channels: int = 256
    """Channels of the image features."""
    feature_stride: int = 16
    """Stride of the image features: 8, 16 or 32."""
    compact_channels: int = 256
    """C of the compact volume B."""
    compact_factor: int = 4
    """Grid voxels per voxel of B in x and y (50x50x16 of 200x200x16)."""
    binary_channels: int = 128
    """C' of B'. Not stated; the paper calls 32 too few (App. A.1)."""
    binary_factor: int = 2
    """Grid voxels per voxel of B' in x and y. Equal to ``compact_factor``: no up-sampling (offboard)."""
    semantic_channels: int = 64
    """C'' of B''. Not stated."""
    attention_channels: int = 256
    """Width of the transformer."""
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
    dense_layers: int = 0
    """Transformer layers over all of B (the paper: LS ours 0, LS baselines 1, BEVFormer ours 2, its baselines 3)."""
    sparse_layers: int = 1
    """Sparse transformer layers (intermediate and offboard)."""
    query: Literal["sparse", "dense"] = "sparse"
    """What the deformable self-attention samples: B' (sparse), or B' set to zero outside the selection (dense): the two
    readings of the paper (Sec. 3.2, App. A.2)."""
    selection: Selection = "predicted"
    """Which voxels the sparse transformer refines: predicted occupied, occupied in the pooled labels, or both while
    training. Offboard always takes the labels."""
    threshold: float = 0.5
    """Probability from which a voxel counts as occupied."""
    floor: int = 1024
    """Minimum number of refined voxels (the most probable ones), so that there are always some. Not where labels choose."""
    cap: int = 30_000
    """Maximum number, to bound memory. Where labels choose more, it is an error."""
    head_rows: int = 0
    """Rows of B' (along x) that the full-resolution heads take at a time; their activations are computed again in the
    backward pass. 0: all at once."""
    depth: tuple[float, float, float] = (1.0, 45.0, 0.5)
    """Lift-Splat: depth bins: first, end, step, in meters (88 bins; OpenScene 1, 60, 0.5)."""
    depth_blocks: int = 3
    """Lift-Splat: residual blocks of the depth net."""
    depth_aspp: bool = True
    """Lift-Splat: depth net with the atrous pyramid."""
    lift_channels: int = 32
    """Lift-Splat: channels that are lifted into the volume."""
    volume_block: bool = True
    """Lift-Splat: a residual block on the full-resolution volume before it is reduced."""
    encoder_channels: tuple[int, ...] = (32, 64, 128)
    """Lift-Splat: volume encoder: channels of its levels."""
    encoder_blocks: tuple[int, ...] = (1, 2, 4)
    """Lift-Splat: volume encoder: residual blocks of its levels."""
    encoder_strides: tuple[int, ...] = (1, 2, 2)
    """Lift-Splat: volume encoder: strides of its levels."""
    encoder_out: int = 32
    """Lift-Splat: channels the levels are merged to."""
    cameras: int = 8
    """BEVFormer: cameras that there is an embedding for; a rig may have fewer."""
    pixel_mean: tuple[float, float, float] = field(default=PIXEL_MEAN)
    """RGB mean of the input."""
    pixel_std: tuple[float, float, float] = field(default=PIXEL_STD)
    """RGB standard deviation of the input."""

    def __post_init__(self) -> None:
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
        if self.sparse_layers < 1 or self.dense_layers < 0:
            raise ValueError(
                f"sparse_layers is {self.sparse_layers} and dense_layers {self.dense_layers}; need at least 1 and 0"
            )
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
            if f.name not in _MAY_BE_ZERO and any(v <= 0 and not isinstance(v, bool) for v in numbers):
                raise ValueError(f"{f.name} is {value}, must be positive")
        first, end, step = self.depth
        if first + step > end:
            raise ValueError(f"depth is {self.depth}: no bin of {step} m fits between {first} and {end} m")
        levels = [len(self.encoder_channels), len(self.encoder_blocks), len(self.encoder_strides)]
        if min(levels) < max(levels) or not levels[0]:
            raise ValueError(
                f"encoder_channels, encoder_blocks and encoder_strides have {levels} values; need one each a level"
            )


class LiftVolume(nn.Module):
    """Image features -> compact volume by predicted depth."""

    def __init__(self, c: B2SConfig, grid: VoxelGrid, compact: VoxelGrid, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.checkpointing = compact.shape, c.checkpointing
        self.splat = LiftSplat(
            c.feature_channels,
            c.lift_channels,
            c.depth,
            grid,
            image_size=image_size,
            blocks=c.depth_blocks,
            aspp=c.depth_aspp,
        )
        block = VolumeEncoder(c.lift_channels, (c.lift_channels,), (1,), (1,), outputs=c.lift_channels)
        self.raw = block if c.volume_block else None
        self.encoder = VolumeEncoder(
            c.lift_channels, c.encoder_channels, c.encoder_blocks, c.encoder_strides, outputs=c.encoder_out
        )
        self.compact = Pointwise3d(c.encoder_out, c.compact_channels)

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, V, C_f, h, w) -> B (B, C, Xc, Yc, Zc), depth (B, V, D, h, w) summing to 1 over D."""
        volume, depth = self.splat(features, batch)
        if self.raw is not None:
            volume = checkpointed(self.raw, volume, volume.shape[2:], when=self.checkpointing)
        encoded = checkpointed(self.encoder, volume, self.shape, when=self.checkpointing)
        return self.compact(encoded), depth


class QueryVolume(nn.Module):
    """Learned voxel queries in place of a lift; the dense layers fill them."""

    def __init__(self, c: B2SConfig, grid: VoxelGrid, compact: VoxelGrid, image_size: tuple[int, int]) -> None:
        super().__init__()
        if not c.dense_layers:
            raise ValueError("dense_layers is 0: voxel queries see the images through dense layers; set 1 or more")
        self.queries = nn.Parameter(0.02 * torch.randn(c.compact_channels, *compact.shape))

    def forward(self, features: Tensor, batch: Batch) -> tuple[Tensor, None]:
        """Features (B, V, C_f, h, w) -> B (B, C, Xc, Yc, Zc) before the layers; no depth."""
        return self.queries.expand(len(features), -1, -1, -1, -1), None


class FullHead(nn.Module):
    """Tokens of B' -> B'' -> logits on the full grid: a network of each voxel alone, so it can be run in parts.

    No batch norm: a rank may hold no semantic frame.

    Args:
        inputs: channels of the tokens.
        hidden: C''.
        shape: (Xb, Yb, Zb) of B'.
        factor: grid voxels per voxel of B' in x and y.
        outputs: heads by name, with their channels.
        rows: rows of B' at a time, 0: all.
    """

    def __init__(
        self, inputs: int, hidden: int, shape: tuple[int, int, int], factor: int, *, outputs: dict[str, int], rows: int
    ) -> None:
        super().__init__()
        self.shape, self.factor, self.rows = shape, factor, rows or shape[0]
        self.up = nn.Linear(inputs, factor * factor * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.heads = nn.ModuleDict()
        for name, channels in outputs.items():
            last = nn.Linear(hidden, channels)
            if name == "semantic":
                nn.init.constant_(last.bias, -4.595)  # prior probability 0.01 (as RetinaNet)
            self.heads[name] = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), last)

    def forward(self, tokens: Tensor, name: str) -> Tensor:
        """tokens (B, N, inputs) -> (B, channels, X, Y, Z) float32, channels last in memory."""
        x, y, z = self.shape
        parts = tokens.unflatten(1, (x, y * z)).split(self.rows, 1)
        several = len(parts) > 1
        found = [checkpointed(self._part, p, name, when=several) for p in parts]
        return torch.cat(found, 1).movedim(-1, 1) if several else found[0].movedim(-1, 1)

    def _part(self, tokens: Tensor, name: str) -> Tensor:
        """(B, x, Yb Zb, inputs) -> (B, x factor, Y, Z, channels)."""
        b, x = tokens.shape[:2]
        y, f = self.shape[1], self.factor
        up = self.up(tokens).view(b, x, y, -1, f, f, self.norm.normalized_shape[0]).permute(0, 1, 4, 2, 5, 3, 6)
        up = up.reshape(b, x * f, y * f, -1, up.shape[-1])
        return self.heads[name](F.relu(self.norm(up))).float()


class SparsePart(nn.Module):
    """Everything after the binary decoder of the intermediate head: selection, sparse transformer, B'', semantic head.

    Args:
        c: settings.
        binary: grid of B'.
        num_classes: K.
        image_size: (H, W) of the network's input.
    """

    def __init__(self, c: B2SConfig, binary: VoxelGrid, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.c, self.shape = c, binary.shape
        self.into = nn.Linear(c.binary_channels, c.attention_channels)
        self.volume = Pointwise3d(c.binary_channels, c.attention_channels)
        self.tokens = VoxelTokens(binary, c.attention_channels, image_size, c.feature_stride)
        self.layers = nn.ModuleList(TransformerLayer(c) for _ in range(c.sparse_layers))
        self.out = nn.Linear(c.attention_channels, c.binary_channels)
        self.full = FullHead(
            2 * c.binary_channels,
            c.semantic_channels,
            binary.shape,
            c.binary_factor,
            outputs={"semantic": num_classes},
            rows=c.head_rows,
        )

    def select(self, scores: Tensor, by: Selection = "predicted") -> list[Tensor]:
        """Voxels to refine: those above the threshold, best first, at least ``floor`` and at most ``cap``. Voxels that the
        labels choose are taken as they are: none is dropped, and where they alone choose, none is added.

        Args:
            scores: (S, N) in 0..1; 2: the labels choose it.
            by: who chooses: predictions, labels (gt) or both (union).

        Returns:
            Flat voxel index (M,) of each frame, with an M of its own.

        Raises:
            ValueError: the labels choose more than ``cap``.
        """
        total = scores.shape[1]
        floor, cap = min(self.c.floor, total), min(self.c.cap, total)
        # Read back together: the host waits once.
        counts, chosen = torch.stack([(scores > self.c.threshold).sum(1), (scores > 1).sum(1)]).tolist()
        if by != "predicted" and (given := max(chosen)) > cap:
            raise ValueError(
                f"the labels of a frame call {given} voxels of B' occupied, model.cap allows {cap}: set model.cap={total} "
                "(memory grows with the voxels there are, not with the limit), or a coarser model.binary_factor"
            )
        if by != "gt":
            counts = [min(max(count, floor), cap) for count in counts]
        index = scores.topk(max(counts), dim=1).indices
        return [i[:count] for i, count in zip(index, counts)]

    def forward(self, volume: Tensor, logits: Tensor | None, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Refines.

        Args:
            volume: (S, C', Xb, Yb, Zb), B' of the semantic frames.
            logits: (S, Xb, Yb, Zb) binary logits; None: the labels say what is occupied.
            features: (S, V, C_f, h, w).
            batch: the S frames' geometry and labels.

        Returns:
            semantic logits (S, K, X, Y, Z) fp32, and the number of refined voxels (S,).
        """
        tokens = self.tokens.at(self.select(*self.scores(logits, batch)), batch)
        flat = volume.flatten(2).mT  # (S, N, C')
        x = self.into(flat.flatten(0, 1)[tokens.place])
        sampled = volume
        if self.c.query == "dense":
            mask = volume.new_zeros(flat.shape[:2].numel()).index_fill(0, tokens.place, 1)
            sampled = volume * mask.view(len(volume), 1, *self.shape)
        sampled = self.volume(sampled)
        for layer in self.layers:
            x = layer(x, tokens, sampled, features)
        refined = self.out(x)
        dense = refined.new_zeros(flat.flatten(0, 1).shape).index_copy(0, tokens.place, refined).view(flat.shape)
        selected = row(tokens.place, tokens.counts)
        return self.full(torch.cat([dense, flat.to(dense.dtype)], -1), "semantic"), selected

    def scores(self, logits: Tensor | None, batch: Batch) -> tuple[Tensor, Selection]:
        """(S, N): how much each voxel is to be refined; and who says so."""
        selection: Selection = "gt"
        predicted = None
        if logits is not None:
            selection, predicted = self.c.selection, logits.detach().float().sigmoid().flatten(1)
            if selection == "predicted" or (selection == "union" and not self.training):
                return predicted, "predicted"
        labels = batch.part(Occupancy)
        truth, _ = pool_binary(labels.binary, labels.binary_valid, self.shape)
        truth = truth.flatten(1).float() * 2
        return (truth if predicted is None or selection == "gt" else torch.maximum(predicted, truth)), selection


class B2S(nn.Module):
    """B2S with one family's way to the compact volume and one head strategy.

    Args:
        c: settings.
        grid: full-resolution output grid, in the frame that the batch's ``camera_to_ego`` leads to.
        num_classes: K without free.
        image_size: (H, W) of the input.
        semantic: False leaves out everything after the binary head (pre-training).
        family: ``LiftVolume`` or ``QueryVolume``.

    Raises:
        ValueError: the grid does not divide, or offboard is to be pre-trained.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        c: B2SConfig,
        grid: VoxelGrid,
        num_classes: int,
        image_size: tuple[int, int],
        *,
        semantic: bool,
        family: type[LiftVolume | QueryVolume],
    ) -> None:
        super().__init__()
        if any(n % c.compact_factor for n in grid.shape[:2]):
            raise ValueError(
                f"grid {grid.name!r} {grid.shape} does not divide by compact_factor {c.compact_factor} in x and y"
            )
        if c.strategy == "offboard" and not semantic:
            raise ValueError("strategy offboard has no binary head, so there is nothing to pre-train; fine-tune it")
        self.c, self.semantic_stage = c, semantic
        compact = grid.coarsen((c.compact_factor, c.compact_factor, 1))
        binary = grid.coarsen((c.binary_factor, c.binary_factor, 1))
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std).view(3, 1, 1), persistent=False)
        self.images = ImageEncoder(
            c.backbone,
            c.backbone_width,
            c.feature_channels,
            c.feature_stride,
            weights=c.backbone_weights,
            checkpointing=c.checkpointing,
        )
        self.views = CameraEmbedding(c.cameras, c.feature_channels) if family is QueryVolume else None
        self.lift = family(c, grid, compact, image_size)
        self.dense = DenseTransformer(c, compact, image_size, c.dense_layers) if c.dense_layers else None
        if c.compact_factor == c.binary_factor:
            first = conv_bn(3, c.compact_channels, c.binary_channels)
        else:
            up = nn.ConvTranspose3d(c.compact_channels, c.binary_channels, (2, 2, 1), (2, 2, 1), bias=False)
            first = nn.Sequential(up, SyncBatchNorm(c.binary_channels), nn.ReLU(inplace=True))
        self.decoder = nn.Sequential(first, conv_bn(3, c.binary_channels, c.binary_channels))
        sparse = c.strategy in ("intermediate", "offboard")
        self.binary_head = Pointwise3d(c.binary_channels, 1) if c.strategy == "intermediate" else None
        self.semantic = SparsePart(c, binary, num_classes, image_size) if sparse and semantic else None
        outputs = {"binary": 1} if not semantic or c.strategy == "multi" else {}
        outputs |= {"semantic": num_classes} if semantic else {}
        full = (c.binary_channels, c.semantic_channels, binary.shape, c.binary_factor)
        self.full = None if sparse else FullHead(*full, outputs=outputs, rows=c.head_rows)

    @property
    def predicts_binary(self) -> bool:
        """Whether there is a binary head to train and evaluate."""
        return self.binary_head is not None or (self.full is not None and "binary" in self.full.heads)

    def transfer_keys(self) -> list[str]:
        """Keys of ``state_dict()`` that must come from a pre-training checkpoint: all up to its binary head, which the
        multi and the intermediate head keep."""
        return [k for k in self.state_dict() if not k.startswith(("semantic.", "full.heads.semantic."))]

    def dropped_keys(self) -> tuple[str, ...]:
        """Prefixes of a pre-training checkpoint's keys that this strategy throws away."""
        return () if self.predicts_binary else ("full.heads.binary.", "binary_head.")

    def forward(self, batch: Batch) -> OccOutputs:
        """Predicts from images (B, V, 3, H, W) what the strategy has heads for; see ``OccOutputs`` for the shapes."""
        images = batch.part(Cameras).images
        b, v = images.shape[:2]
        pixels = (images.flatten(0, 1).float() - self.pixel_mean) / self.pixel_std
        features = self.images(pixels.contiguous(memory_format=torch.channels_last)).unflatten(0, (b, v))
        if self.views is not None:
            features = self.views(features)
        # No module passes features on in addition to its outputs: ZeRO-3 follows the outputs of modules, and where features are
        # cut off below it would count differently on each rank.
        compact, depth = self.lift(features, batch)
        if self.dense is not None:
            compact = self.dense(compact, features, batch)
        binary = checkpointed(self.decoder, compact, when=self.c.checkpointing)
        logits = None
        if self.binary_head is not None:
            logits = self.binary_head(binary).squeeze(1).float()
        elif self.full is not None and "binary" in self.full.heads:
            logits = self.full(binary.flatten(2).mT, "binary").squeeze(1)
        bins = self.lift.splat.depths if isinstance(self.lift, LiftVolume) else None
        outputs = OccOutputs(logits, depth=depth, depth_bins=bins)
        if not self.semantic_stage:
            return outputs
        # B frames stop here. A rank without S frames runs the semantic part on one frame, cut off from the graph, so
        # that every parameter takes part on every rank, which ZeRO relies on; the loss gives it weight 0.
        s = batch.labeled
        frames = slice(0, max(s, 1))
        whole = binary[frames] if s else binary[frames].detach()
        if self.full is not None:
            outputs.semantic_logits = self.full(whole.flatten(2).mT, "semantic")
            return outputs
        assert self.semantic is not None, "a strategy without a head on the full grid has a sparse part"
        parts = (
            logits[frames].detach() if logits is not None else None,
            features[frames] if s else features[frames].detach(),
        )
        outputs.semantic_logits, selected = self.semantic(whole, *parts, batch.select(frames))
        outputs.selected = selected[:s]
        return outputs


@register(B2SConfig)
def b2s_ls(
    config: B2SConfig, *, grid: VoxelGrid, num_classes: int, image_size: tuple[int, int], semantic: bool
) -> nn.Module:
    """LS-based B2S (Sec. 3.2, Fig. 3 a)."""
    return B2S(config, grid, num_classes, image_size, semantic=semantic, family=LiftVolume)


@register(B2SConfig)
def b2s_bevformer(
    config: B2SConfig, *, grid: VoxelGrid, num_classes: int, image_size: tuple[int, int], semantic: bool
) -> nn.Module:
    """BEVFormer-based B2S (Sec. 3.2, Fig. 3 b)."""
    return B2S(config, grid, num_classes, image_size, semantic=semantic, family=QueryVolume)
