"""PanoOcc: one camera network for semantic voxels and boxes, from learned voxel queries of several key-frames (Wang et al.).

Images of each key-frame -> a pyramid of features -> voxel queries on a coarse grid -> those of earlier key-frames moved to where
they are now, fused with the current ones -> features on a fine grid -> occupied or not (all frames), thing or not, a class of
each voxel of the labels' grid, and boxes of what is seen from above (semantic frames only).

Shape legend: see ``batch``; ``F`` key-frames, ``X' Y' Z'`` voxels of the fine grid, ``D`` its channels, ``N`` its active voxels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.backbones import PIXEL_MEAN, PIXEL_STD, ImageEncoder
from occstream.models.batch import Batch, Cameras, History, OccOutputs
from occstream.models.decoding import Decoded, DenseDecoder, Level, Shape
from occstream.models.detr import DetrHead, Queried
from occstream.models.layers import checkpointed, row
from occstream.models.sparse import choose_backend
from occstream.models.sparsedecoder import KeepBy, Selection, SparseDecoder, check_keep
from occstream.models.temporal import TemporalFusion
from occstream.models.voxelqueries import ViewEncoder
from occstream.sharding.grid import VoxelGrid

EMPTY = -10.0  # logit of every class where a voxel was pruned, against 0 for free
_MAY_BE_ZERO = ("head_rows", "dropout", "keep")


@dataclass
class PanoOccConfig:
    """Sizes and open points. Defaults are the paper's small network with time (Sec. 4.2), or ours where it is silent."""

    backbone: str = "resnet50"
    """Image backbone: resnet18, 34, 50 or 101, or efficientnet_lite0."""
    backbone_width: int = 64
    """Channels of its stem; 64 is the published network. A multiple of 16."""
    backbone_weights: str = ""
    """Initial weights: a path or a hub id (the paper: ImageNet's for small, a detector's for base)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: backbone, layers of the view encoder, decoder."""
    feature_channels: int = 256
    """Channels of the image features."""
    feature_stride: int = 8
    """Stride of their finest level: 8, 16 or 32."""
    feature_levels: int = 4
    """Levels, each half as fine as the one before (8, 16, 32, 64)."""
    cameras: int = 8
    """Cameras that there is an embedding for; a rig may have fewer."""
    queries: tuple[int, int, int] = (50, 50, 16)
    """Voxel queries along x, y and z, over the box of the labels' grid (Table 4)."""
    channels: int = 256
    """Width of queries, view encoder and temporal encoder."""
    layers: int = 3
    """Layers of the view encoder."""
    self_attentions: int = 2
    """Self-attentions of a layer, at each height by itself. The text has one, the chosen row of Table 7 two."""
    heads: int = 8
    """Attention heads."""
    self_points: int = 4
    """Sampling points of the self-attention."""
    cross_points: int = 8
    """Sampling points of the cross-attention in each level, around each projected reference point."""
    references: int = 1
    """Reference points over a voxel's height that are projected into the images. The paper has 4 with one sample each, its
    code 8 samples around one."""
    ffn_channels: int = 512
    """Hidden width of the feed-forward part."""
    dropout: float = 0.1
    """Dropout in the view encoder."""
    frames: int = 4
    """Key-frames, with the current one (Table 8)."""
    past_gradient: bool = False
    """Learn through the features of earlier key-frames as well. False: they are computed as in an evaluation, without dropout
    and by running statistics, and memory hardly grows with their number."""
    temporal_blocks: int = 1
    """Residual blocks that fuse the key-frames (Table 8: more do not help)."""
    decoder: Literal["dense", "sparse"] = "dense"
    """How the coarse features become fine: dense deconvolutions, or with empty voxels pruned at each level (Sec. 3.5, occupancy
    sparsify)."""
    keep: tuple[float, ...] = (0.2, 0.5, 0.5)
    """What each level of the sparse decoder keeps: a share of the voxels that it makes (the paper's, of the surfaces of
    nuScenes; solid labels need more, see what is printed), or by ``keep_by``."""
    keep_by: KeepBy = "share"
    """share: the most probable ones, a share of each frame's; threshold: those that are at least so probable."""
    selection: Selection = "union"
    """Who chooses what is kept in training: the scores (predicted), or also the labels, whose voxels come first."""
    submanifold: bool = False
    """A residual sparse 3 x 3 x 3 convolution among the voxels that each level keeps."""
    sparse: Literal["auto", "torch", "spconv"] = "auto"
    """What computes it; auto: spconv on a GPU where it is installed."""
    upsample: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 2, 1), (2, 2, 2))
    """By how much each level of the decoder is finer in x, y and z. With ``queries`` they give the fine grid, 200 x 200 x 32; the
    labels' grid must be that, or whole times as fine: then features are interpolated for the classes (Table 11)."""
    upsample_channels: tuple[int, ...] = (256, 128, 64)
    """Channels of these levels; only the last, 64, is stated."""
    head_channels: int = 128
    """Hidden width of the network that classifies each voxel."""
    head_rows: int = 0
    """Rows of the labels' grid (along x) that are classified at a time; their activations are computed again in the backward
    pass. 0: all at once."""
    pixel_mean: tuple[float, float, float] = PIXEL_MEAN
    """RGB mean of the input."""
    pixel_std: tuple[float, float, float] = PIXEL_STD
    """RGB standard deviation of the input."""

    def __post_init__(self) -> None:
        if self.backbone_width % 16 or self.backbone_width < 16:
            # oneDNN's gradient of a strided 1x1 convolution writes out of bounds at 8 channels, see ``B2SConfig``.
            raise ValueError(f"backbone_width is {self.backbone_width}, must be a multiple of 16")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            parts = value if isinstance(value, tuple) else (value,)
            numbers = [n for part in parts for n in (part if isinstance(part, tuple) else (part,))]
            if f.name not in _MAY_BE_ZERO and any(
                isinstance(n, (int, float)) and n is not False and n <= 0 for n in numbers
            ):
                raise ValueError(f"{f.name} is {value}, must be positive")
        if not self.upsample or len(self.upsample) != len(self.upsample_channels):
            raise ValueError(
                f"upsample has {len(self.upsample)} levels and upsample_channels {len(self.upsample_channels)}; need one or "
                "more, as many of each"
            )
        if self.decoder == "sparse":
            check_keep(self.keep, len(self.upsample), self.keep_by)

    @property
    def grids(self) -> list[Shape]:
        """(X, Y, Z) of each level of the decoder."""
        found = [self.queries]
        for factor in self.upsample:
            x, y, z = (n * f for n, f in zip(found[-1], factor))
            found.append((x, y, z))
        return found[1:]

    @property
    def fine(self) -> Shape:
        """(X', Y', Z')."""
        return self.grids[-1]


@dataclass
class PanoOutputs(OccOutputs):
    """What PanoOcc says beside ``OccOutputs``; ``binary_logits`` are on the fine grid.

    Attributes:
        levels: what the decoder took for occupied, of all frames; empty for a dense one.
        decoded: features on the fine grid, of the first max(S, 1) frames; None before fine-tuning. With S = 0 they are cut off
            from the graph.
        things: (N,) float32 logits of its active voxels (``decoded.rows``), > 0 = of a thing class.
        detection: boxes of the first max(S, 1) frames, as ``detr.DetrHead`` says them; None without a detector.
        point_logits: (n, K) float32 of the points of labeled frames, each classified at its own place; None in training, without
            points, and after a decoder that prunes.
    """

    levels: tuple[Level, ...] = ()
    decoded: Decoded | None = None
    things: Tensor | None = None
    detection: Queried | None = None
    point_logits: Tensor | None = None


class VoxelHead(nn.Module):
    """Features -> classes of the voxels of a grid that is as fine or whole times finer: a network of each place alone.

    Args:
        inputs: D.
        hidden: of both hidden layers.
        classes: K. Free has the fixed logit 0.
        rows: of the grid at a time, 0: all.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, rows: int = 0) -> None:
        super().__init__()
        self.rows, last = rows, nn.Linear(hidden, classes)
        nn.init.constant_(last.bias, -4.595)  # prior probability 0.01 (as RetinaNet)
        first = (nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, hidden), nn.Softplus())
        self.net = nn.Sequential(*first, last)

    def forward(self, decoded: Decoded, shape: tuple[int, int, int]) -> Tensor:
        """-> (B, K, *shape) float32, channels last in memory. Where voxels were pruned, the nearest one counts."""
        if decoded.indices is not None:
            found = decoded.volume(self.net(decoded.rows()).float(), EMPTY)
            for axis, (fine, coarse) in enumerate(zip(shape, decoded.shape)):
                found = found if fine == coarse else found.repeat_interleave(fine // coarse, 2 + axis)
            return found
        features, coarse, times = decoded.features, decoded.shape[0], shape[0] // decoded.shape[0]
        step = max(1, self.rows // times) if self.rows else coarse
        found = []
        for start in range(0, coarse, step):
            end = min(start + step, coarse)
            first = max(start - 1, 0)  # interpolation reaches into the neighboring rows
            part = features[:, :, first : end + 1]
            kept = slice(times * (start - first), times * (end - first))
            found.append(checkpointed(self._part, part, shape[1:], times, kept, when=step < coarse))
        return (torch.cat(found, 1) if len(found) > 1 else found[0]).movedim(-1, 1)

    def at(self, features: Tensor, places: Tensor, counts: Sequence[int]) -> Tensor:
        """Classes of places, of features that are interpolated there.

        Args:
            features: (B, D, X, Y, Z).
            places: (T, 3) as (x, y, z) in 0..1 over the volume, frame after frame; beyond it the nearest border counts.
            counts: of each of the first frames.

        Returns:
            (T, K) float32.
        """
        found = [features.new_zeros(0, features.shape[1], dtype=torch.float32)]
        for volume, mine in zip(features, places.split(list(counts))):
            where = (2 * mine - 1).flip(-1)[None, None, None]  # the last axis of the tensor first
            # Places in fp32: bf16 knows 256 in 0..1.
            sampled = F.grid_sample(volume[None].float(), where, padding_mode="border", align_corners=False)
            found.append(sampled[0, :, 0, 0].mT)
        return self.net(torch.cat(found)).float()

    def _part(self, features: Tensor, size: tuple[int, int], times: int, kept: slice) -> Tensor:
        """Some rows of features (B, D, x, Y', Z') -> (B, rows kept, *size, K)."""
        whole = (times * features.shape[2], *size)
        if features.shape[2:] != whole:
            features = F.interpolate(features, whole, mode="trilinear", align_corners=False)
        return self.net(features[:, :, kept].movedim(1, -1)).float()


class PanoOcc(nn.Module):
    """The network.

    Args:
        c: settings.
        grid: of the labels, in the frame that the batch's ``camera_to_ego`` leads to.
        num_classes: K without free.
        image_size: (H, W) of the input.
        semantic: False leaves out what only semantic frames teach (pre-training).
        voxels: False leaves out the classes of voxels: boxes are all that semantic frames teach.
        detector: makes the head of boxes for a number of channels of the map; None: without.

    Raises:
        ValueError: the labels' grid is not whole times as fine as the decoder's.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    SEMANTIC = ("thing_head.", "voxel_head.", "detector.")
    """Prefixes of what pre-training does not have."""

    def __init__(
        self,
        c: PanoOccConfig,
        grid: VoxelGrid,
        num_classes: int,
        image_size: tuple[int, int],
        *,
        semantic: bool,
        voxels: bool = True,
        detector: Callable[[int], DetrHead] | None = None,
    ) -> None:
        super().__init__()
        if any(n % fine for n, fine in zip(grid.shape, c.fine)):
            raise ValueError(
                f"grid {grid.name!r} {grid.shape} is not whole times as fine as the decoder's {c.fine}, which is "
                f"model.queries {c.queries} times model.upsample"
            )
        self.c, self.grid, self.shape = c, grid, grid.shape
        coarse = dataclasses.replace(
            grid,
            name=f"{grid.name}/queries",
            voxel=tuple((b - a) / n for a, b, n in zip(grid.lower, grid.upper, c.queries)),
        )
        self.register_buffer("pixel_mean", torch.tensor(c.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(c.pixel_std).view(3, 1, 1), persistent=False)
        self.images = ImageEncoder(
            c.backbone,
            c.backbone_width,
            c.feature_channels,
            c.feature_stride,
            emitted=c.feature_levels,
            weights=c.backbone_weights,
            checkpointing=c.checkpointing,
        )
        self.views = ViewEncoder(c, coarse, image_size)
        self.temporal = TemporalFusion(c.channels, c.frames, coarse, c.temporal_blocks)
        levels = (c.channels, c.upsample_channels, c.upsample)
        if c.decoder == "sparse":
            self.decoder = SparseDecoder(
                *levels,
                keep=c.keep,
                by=c.keep_by,
                selection=c.selection,
                submanifold=c.submanifold,
                backend=choose_backend(c.sparse),
                checkpointing=c.checkpointing,
            )
        else:
            self.decoder = DenseDecoder(*levels, checkpointing=c.checkpointing)
        width = c.upsample_channels[-1]
        self.binary_head = nn.Linear(width, 1)
        self.thing_head = nn.Linear(width, 1) if semantic else None
        self.voxel_head = VoxelHead(width, c.head_channels, num_classes, c.head_rows) if semantic and voxels else None
        self.detector = detector(width) if semantic and detector else None
        if self.thing_head is not None:
            nn.init.constant_(self.thing_head.bias, -4.595)

    def forward(self, batch: Batch) -> PanoOutputs:
        """Predicts from images (B, F V, 3, H, W) and ``History``; see ``PanoOutputs``.

        Raises:
            ValueError: the batch has another number of key-frames than the settings.
        """
        history = batch.part(History)
        if history.exists.shape[1] != self.c.frames:
            raise ValueError(
                f"the batch has {history.exists.shape[1]} key-frames of each sample, the network {self.c.frames} "
                "(model.frames)"
            )
        current, past = self._encoded(batch, history)
        fused = self.temporal(current, past, history.past_to_current[:, 1:], history.exists[:, 1:])
        labels = batch.occupancy
        truth = labels.binary & labels.binary_valid if self.training and labels is not None else None
        decoded: Decoded = self.decoder(fused, truth)
        binary = decoded.volume(self.binary_head(decoded.rows()).float(), EMPTY).squeeze(1)
        outputs = PanoOutputs(binary, levels=decoded.levels)
        if self.thing_head is None:
            return outputs
        # Frames without semantic labels stop here. A rank that has no others runs the rest on one frame, cut off from the
        # graph, so that every parameter takes part on every rank, which ZeRO relies on; the loss gives it weight 0.
        outputs.decoded = shown = decoded.first(max(batch.labeled, 1), detached=not batch.labeled)
        outputs.things = things = self.thing_head(shown.rows()).squeeze(1).float()
        if self.voxel_head is not None:
            outputs.semantic_logits = self.voxel_head(shown, self.shape)
            if batch.points is not None and batch.labeled and shown.indices is None and not self.training:
                counts = batch.points.counts[: batch.labeled].tolist()
                xyz = batch.points.xyz[: sum(counts)]
                lower, upper = (row(xyz, corner) for corner in (self.grid.lower, self.grid.upper))
                outputs.point_logits = self.voxel_head.at(shown.features, (xyz - lower) / (upper - lower), counts)
        if self.detector is not None:
            # Foreground alone, averaged over height (Sec. 3.6).
            outputs.detection = self.detector(shown.bev(things.sigmoid()[:, None] * shown.rows()))
        return outputs

    def _encoded(self, batch: Batch, history: History) -> tuple[Tensor, Tensor | None]:
        """Voxel features of the current key-frames (B, C, X, Y, Z) and of the earlier ones (B, F - 1, C, X, Y, Z), each in the
        grid of its own time; of those that are absent anything."""
        b, f = history.exists.shape
        cameras = batch.part(Cameras).each(lambda _, value: value.unflatten(1, (f, -1)).flatten(0, 1))
        scene_aug = batch.scene_aug.repeat_interleave(f, 0)

        def encode(rows: Tensor) -> Tensor:
            return self._one(Batch(scene_aug[rows], cameras=cameras.each(lambda _, value: value[rows])))

        rows = torch.arange(b * f, device=batch.device).view(b, f)
        now, before = rows[:, 0], rows[:, 1:]
        if f == 1:
            return encode(now), None
        if not self.c.past_gradient:
            # Absent ones too: nothing is counted, the shapes are always the same, and all ranks run the same modules.
            with _as_evaluated(self.images, self.views):
                past = encode(before.flatten()).unflatten(0, (b, f - 1))
            return encode(now), past
        there = before[history.exists[:, 1:]]  # what is absent must not enter the batch norms
        current, found = encode(torch.cat([now, there])).split([b, len(there)])
        past = found.new_zeros(b * f, *found.shape[1:]).index_copy(0, there, found)
        return current, past.unflatten(0, (b, f))[:, 1:]

    def _one(self, batch: Batch) -> Tensor:
        """Frames with V cameras each -> (B, C, X, Y, Z)."""
        images = batch.part(Cameras).images
        pixels = (images.flatten(0, 1).float() - self.pixel_mean) / self.pixel_std
        pyramid = self.images.pyramid(pixels.contiguous(memory_format=torch.channels_last))
        return self.views([level.unflatten(0, images.shape[:2]) for level in pyramid], batch)


@contextlib.contextmanager
def _as_evaluated(*modules: nn.Module) -> Iterator[None]:
    """Modules compute without gradients, as in an evaluation; afterwards they go on as they were."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training
