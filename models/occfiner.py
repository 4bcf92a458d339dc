"""The local propagation network of OccFiner (Sec. III-B), and a plainer one beside it: a window of predictions -> a better one.

A refiner gets no images, only what a network predicted for some key-frames and the poses between them, and gives logits of the
pivot. It starts as the identity: its logits are those of the input plus what a head adds whose last layer is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.batch import Batch, OccOutputs, Volumes
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import IGNORE

PATCH, STRIDE, PAD = 7, 3, 3  # of the soft split
UNIT = 25.6  # meters that coordinates are divided by (ours)
START = 3.0  # logit of what the input says, at first (ours)


@dataclass
class OccFinerConfig:
    """The network. The paper gives widths, heads and the sum of parameters; what it leaves open is chosen to add up to 4.51 M."""

    kind: Literal["dualflow", "explicit"] = "dualflow"
    """dualflow: frames are matched by attention that knows their coordinates (OccFiner). explicit: the others are pulled into the
    pivot's grid by their poses, voxel to nearest voxel, and stacked as channels of a 2-D U-Net."""
    embedding: int = 19
    """Channels of a voxel before its column becomes one feature."""
    widths: tuple[int, ...] = (32, 48, 64, 80)
    """Channels of the encoder's blocks; all but the last end with a pooling by 2."""
    dim: int = 256
    """Channels of a token."""
    blocks: int = 2
    """DualFlow4D blocks. 0: none, frames do not see each other (OccFiner, Table VII)."""
    heads: int = 8
    """Heads of the attention over the map and time."""
    pillar: bool = True
    """Attention along height as well."""
    pillar_slices: int = 32
    """Pieces of a token that stand for heights."""
    hidden: int = 600
    """Channels of the feed-forward layer of a block. 0: none."""
    coordinates: bool = True
    """Tell where in the pivot's frame every voxel is."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths is {list(self.widths)}, must be two positive numbers or more")
        for name in ("embedding", "dim", "heads", "pillar_slices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("heads", "pillar_slices"):
            if self.dim % getattr(self, name):
                raise ValueError(f"dim {self.dim} does not divide by {name} {getattr(self, name)}")


class ClassEmbedding(nn.Module):
    """What is said of a voxel -> features: a linear map of its class, one of K + 1, and a norm. 255 is no class.

    Args:
        classes: K + 1, with free.
        width: of the features.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(classes, width), nn.LayerNorm(width)

    def forward(self, said: Tensor, second: Tensor | None = None, confidence: Tensor | None = None) -> Tensor:
        """(N, X, Y, Z) uint8 -> (N, Z * width, X, Y); of two classes the mean by how sure the first is, uint8."""
        classes = self.linear.in_features
        one_of = torch.cat([torch.eye(classes), torch.zeros(1, classes)]).to(self.linear.weight)
        table = self.norm(self.linear(one_of))
        found = F.embedding(_rows(said, classes), table)
        if second is not None and confidence is not None:
            share = torch.where(second == IGNORE, 1.0, confidence.float() / 255)[..., None].to(found.dtype)
            found = share * found + (1 - share) * F.embedding(_rows(second, classes), table)
        return folded(found)


class PlaceEmbedding(nn.Module):
    """Where a voxel is in the pivot's frame -> features. Coordinates are affine in the index, so none are stored.

    Args:
        grid: of the volumes.
        width: of the features.
    """

    def __init__(self, grid: VoxelGrid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.linear, self.norm = nn.Linear(3, width), nn.LayerNorm(width)

    def forward(self, to_pivot: Tensor) -> Tensor:
        """(N, 4, 4) poses between middles of grids -> (N, Z * width, X, Y)."""
        return folded(self.norm(self.linear(coordinates(self.grid, to_pivot) / UNIT)))


def coordinates(grid: VoxelGrid, to_pivot: Tensor) -> Tensor:
    """Centers of the voxels of frames, in the pivot's frame.

    Args:
        to_pivot: (N, 4, 4) float32, meters from the middle of the grid's box, as ``Volumes`` has them.

    Returns:
        (N, X, Y, Z, 3) float32 meters, in the coordinates of the grid.
    """
    steps = [_steps(grid, axis, to_pivot.device) for axis in range(3)]
    places = to_pivot.new_tensor([(low + high) / 2 for low, high in zip(grid.lower, grid.upper)]) + to_pivot[:, :3, 3]
    found = places[:, None, None, None]
    for axis, step in enumerate(steps):
        column = step[:, None] * to_pivot[:, None, :3, axis]  # (N, n, 3)
        found = found + column.reshape(len(column), *(len(step) if a == axis else 1 for a in range(3)), 3)
    return found


def _steps(grid: VoxelGrid, axis: int, device: torch.device) -> Tensor:
    """(n,) float32 centers along an axis, meters from the middle."""
    count = grid.shape[axis]
    return (torch.arange(count, device=device) - (count - 1) / 2) * grid.voxel[axis]


def folded(features: Tensor) -> Tensor:
    """(N, X, Y, Z, C) -> (N, Z * C, X, Y)."""
    n, x, y, z, c = features.shape
    return features.reshape(n, x, y, z * c).permute(0, 3, 1, 2)


def _rows(said: Tensor, classes: int) -> Tensor:
    """Row of each class in a table that ends with nothing said."""
    return said.int().clamp_max(classes)


class Encoder(nn.Module):
    """Blocks of two convolutions; all but the last are pooled.

    Args:
        channels: of the input.
        widths: of the blocks.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for before, width in zip((channels, *widths), widths):
            first, second = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            self.blocks.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, X, Y) -> maps of all blocks, the finest first."""
        found: list[Tensor] = []
        for block in self.blocks:
            x = block(F.max_pool2d(x, 2) if found else x)
            found.append(x)
        return found


class Head(nn.Module):
    """Maps of all sizes -> what is added to the input's logits; zero at first.

    Args:
        widths: of the maps, the finest first.
        outputs: channels.
    """

    def __init__(self, widths: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))  # coarse, fine
        self.merge = nn.ModuleList(nn.Conv2d(coarse + fine, fine, 1) for coarse, fine in pairs)
        self.smooth = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        self.last = nn.Conv2d(widths[0], outputs, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarsest: Tensor, finer: list[Tensor]) -> Tensor:
        """(N, C, x, y) and the maps of the encoder that are finer, the finest first -> (N, outputs, X, Y)."""
        x = coarsest
        for merge, skip in zip(self.merge, reversed(finer)):
            up = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.relu(merge(torch.cat([up, skip], 1)))
        return self.last(F.relu(self.smooth(x)))


def split(maps: Tensor) -> Tensor:
    """(N, C, x, y) -> (N, P, 49 * C) overlapping patches of 7 x 7 every 3 cells."""
    return F.unfold(maps, PATCH, padding=PAD, stride=STRIDE).transpose(1, 2)


def compose(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, P, 49 * C) -> (N, C, x, y): mean of the patches at each cell, the inverse of ``split``."""
    total = F.fold(patches.transpose(1, 2), size, PATCH, padding=PAD, stride=STRIDE)
    ones = patches.new_ones(1, PATCH * PATCH, patches.shape[1])
    return total / F.fold(ones, size, PATCH, padding=PAD, stride=STRIDE)


def tokens(size: tuple[int, int]) -> int:
    """P: patches of a map."""
    x, y = ((n + 2 * PAD - PATCH) // STRIDE + 1 for n in size)
    return x * y


class DualFlow4D(nn.Module):
    """Attention over the map and time, and along height in each place's pillar; the sum of both (OccFiner, eq. 4 to 6).

    The paper's focal windows save nothing at 11 x 11 tokens a frame: every token sees all frames of its window. Height is
    folded into channels before this block, so pieces of a token stand for heights.
    """

    def __init__(self, config: OccFinerConfig) -> None:
        super().__init__()
        dim, self.heads, self.slices = config.dim, config.heads, config.pillar_slices
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.pillar_qkv = nn.Linear(dim, 3 * dim) if config.pillar else None
        self.pillar_out = nn.Linear(dim, dim) if config.pillar else None
        self.feed = None
        if config.hidden:
            layers = nn.LayerNorm(dim), nn.Linear(dim, config.hidden), nn.GELU(), nn.Linear(config.hidden, dim)
            self.feed = nn.Sequential(*layers)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """(B, T, P, dim) tokens and (B, T) bool whether their frame is there -> the same shape. What is absent is not seen."""
        b, t, p, dim = x.shape
        normed = self.norm(x)
        seen = exists[:, :, None].expand(b, t, p).reshape(b, 1, 1, t * p)
        q, k, v = (part.reshape(b, t * p, self.heads, -1).transpose(1, 2) for part in self.qkv(normed).chunk(3, dim=-1))
        flow = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out = x + self.out(flow.transpose(1, 2).reshape(b, t, p, dim))
        if self.pillar_qkv is not None and self.pillar_out is not None:
            seen = exists[:, None, :, None].expand(b, p, t, self.slices).reshape(b * p, 1, t * self.slices)
            q, k, v = (
                part.transpose(1, 2).reshape(b * p, t * self.slices, -1)
                for part in self.pillar_qkv(normed).chunk(3, dim=-1)
            )
            flow = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            out = out + self.pillar_out(flow.reshape(b, p, t, dim).transpose(1, 2))
        return out if self.feed is None else out + self.feed(out)


class DualFlow(nn.Module):
    """Encoders of classes and coordinates, attention between all frames, and a head for the pivot.

    Args:
        config: sizes.
        grid: of the volumes.
        classes: K + 1, with free.
    """

    def __init__(self, config: OccFinerConfig, grid: VoxelGrid, classes: int) -> None:
        super().__init__()
        widths, height = config.widths, grid.shape[2]
        self.classes = ClassEmbedding(classes, config.embedding)
        self.encoder = Encoder(height * config.embedding, widths)
        self.places = PlaceEmbedding(grid, config.embedding) if config.coordinates else None
        self.place_encoder = Encoder(height * config.embedding, widths) if config.coordinates else None
        patch = PATCH * PATCH * widths[-1]
        self.split = nn.Linear(patch, config.dim) if config.blocks else None
        self.compose = nn.Linear(config.dim, patch) if config.blocks else None
        self.blocks = nn.ModuleList(DualFlow4D(config) for _ in range(config.blocks))
        self.head = Head(widths, classes * height)

    def forward(self, volumes: Volumes) -> Tensor:
        """(B, (K + 1) * Z, X, Y) for the pivot."""
        b, t = volumes.exists.shape
        each = lambda value: None if value is None else value.flatten(0, 1)  # noqa: E731
        maps = self.encoder(self.classes(volumes.classes.flatten(0, 1), each(volumes.second), each(volumes.confidence)))
        coarse = maps[-1]
        if self.places is not None and self.place_encoder is not None:
            coarse = coarse + self.place_encoder(self.places(volumes.to_pivot.flatten(0, 1)))[-1]
        size = (coarse.shape[-2], coarse.shape[-1])
        pivot = lambda value: value.unflatten(0, (b, t))[:, 0]  # noqa: E731
        found = pivot(coarse)
        if self.split is not None and self.compose is not None:
            x = self.split(split(coarse)).unflatten(0, (b, t))
            for block in self.blocks:
                x = block(x, volumes.exists)
            found = found + compose(self.compose(x[:, 0]), size)
        return self.head(found, [pivot(value) for value in maps[:-1]])


def pulled(said: Tensor, to_pivot: Tensor, grid: VoxelGrid) -> Tensor:
    """Volumes of a window in the pivot's grid: each voxel has what its frame says at the voxel that its center falls into.

    Args:
        said: (B, T, X, Y, Z) uint8.
        to_pivot: (B, T, 4, 4) float32, rigid, meters from the middle of the grid's box.

    Returns:
        (B, T, X, Y, Z) uint8, 255 where that is outside.
    """
    b, t, *shape = said.shape
    turn = to_pivot[..., :3, :3].transpose(-1, -2)
    back = torch.eye(4, device=said.device).repeat(b * t, 1, 1)
    back[:, :3, :3] = turn.flatten(0, 1)
    back[:, :3, 3] = -(turn * to_pivot[..., None, :3, 3]).sum(-1).flatten(0, 1)
    places = coordinates(grid, back)
    index, inside = [], torch.ones((b * t, *shape), dtype=torch.bool, device=said.device)
    for axis, count in enumerate(shape):
        number = ((places[..., axis] - grid.lower[axis]) / grid.voxel[axis]).floor().long()
        inside &= (number >= 0) & (number < count)
        index.append(number.clamp(0, count - 1))
    flat = (index[0] * shape[1] + index[1]) * shape[2] + index[2]
    found = said.flatten(0, 1).flatten(1).gather(1, flat.flatten(1)).view(b * t, *shape)
    return torch.where(inside, found, IGNORE).to(torch.uint8).view(b, t, *shape)


class Explicit(nn.Module):
    """Neighbors pulled into the pivot's grid and stacked as channels of a 2-D U-Net.

    Args:
        config: ``embedding`` and ``widths`` matter.
        grid: of the volumes.
        classes: K + 1, with free.
        frames: T.
    """

    def __init__(self, config: OccFinerConfig, grid: VoxelGrid, classes: int, frames: int) -> None:
        super().__init__()
        self.grid, height = grid, grid.shape[2]
        self.classes = ClassEmbedding(classes, config.embedding)
        self.encoder = Encoder(frames * height * config.embedding, config.widths)
        self.head = Head(config.widths, classes * height)

    def forward(self, volumes: Volumes) -> Tensor:
        """(B, (K + 1) * Z, X, Y) for the pivot."""
        b, t = volumes.exists.shape
        said, second, confidence = (
            None if value is None else pulled(value, volumes.to_pivot, self.grid).flatten(0, 1)
            for value in (volumes.classes, volumes.second, volumes.confidence)
        )
        found = self.classes(said, second, confidence)
        maps = self.encoder(found.reshape(b, t * found.shape[1], *found.shape[2:]))
        return self.head(maps[-1], maps[:-1])


class OccFiner(nn.Module):
    """A window of predicted volumes -> the pivot's logits: those of what was predicted for it, plus what the network adds.

    Args:
        config: of the network.
        grid: of the volumes.
        num_classes: K.
        frames: T, of a window.
    """

    def __init__(self, config: OccFinerConfig, grid: VoxelGrid, num_classes: int, frames: int) -> None:
        super().__init__()
        self.num_classes, self.shape, self.frames = num_classes, grid.shape, frames
        classes = num_classes + 1
        coarsest = [n >> (len(config.widths) - 1) for n in grid.shape[:2]]
        if min(coarsest) < 1:
            raise ValueError(
                f"grid {grid.name!r} of {grid.shape[0]} x {grid.shape[1]} columns is too small for {len(config.widths)} blocks; "
                "give model.widths fewer"
            )
        self.net: DualFlow | Explicit
        if config.kind == "explicit":
            self.net = Explicit(config, grid, classes, frames)
        else:
            self.net = DualFlow(config, grid, classes)
        self.trust = nn.Parameter(torch.tensor([START]))  # DeepSpeed takes no scalars

    def forward(self, batch: Batch) -> OccOutputs:
        """Needs ``batch.volumes`` alone."""
        volumes = batch.part(Volumes)
        (x, y, z), classes = self.shape, self.num_classes + 1
        added = self.net(volumes).float().view(batch.size, classes, z, x, y).permute(0, 1, 3, 4, 2)
        logits = added + self.trust * self._input(volumes)
        logits = logits[:, :-1] - logits[:, -1:]  # against free, as of other networks: a softmax of both is the same
        return OccOutputs(None, logits[: max(batch.labeled, 1)])

    def _input(self, volumes: Volumes) -> Tensor:
        """(B, K + 1, X, Y, Z) float32: how far the pivot's prediction is of each class."""
        said, classes = volumes.classes[:, 0], self.num_classes + 1
        share = torch.ones(said.shape, device=said.device)
        out = share.new_zeros(len(said), classes + 1, *self.shape)
        if volumes.second is not None and volumes.confidence is not None:
            second = volumes.second[:, 0]
            share = torch.where(second == IGNORE, share, volumes.confidence[:, 0].float() / 255)
            out.scatter_(1, _rows(second, classes).long()[:, None], (1 - share)[:, None])
        return out.scatter_add_(1, _rows(said, classes).long()[:, None], share[:, None])[:, :classes]
