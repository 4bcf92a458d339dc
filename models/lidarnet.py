"""One network for LiDAR: the encoder of a voxel detector and the heads of a stage: occupancy, detection, segmentation.

SPOT (Yan et al.) pre-trains the encoder by occupancy and carries it to detectors and segmentors (Fig. 2). Keys of the encoder
are the same in all stages: ``encoder.…``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from occstream.models.batch import Batch, OccOutputs
from occstream.models.layers import SyncBatchNorm
from occstream.models.sparse import choose_backend
from occstream.models.spot import OccupancyHead, SpotConfig
from occstream.models.voxelbackbones import LidarEncoder
from occstream.models.voxels import voxelize
from occstream.sharding.grid import VoxelGrid

MakeHead = Callable[[LidarEncoder, VoxelGrid], nn.Module]


@dataclass
class LidarOutputs(OccOutputs):
    """What the network says about a batch: occupancy as other networks do, and of other heads what they give.

    Attributes:
        all_logits: (B, K, X, Y, Z) float32 of classes against free, of labeled and other frames; K is 1 for binary occupancy.
        detection: of ``CenterPointHead``; None without one.
        point_logits: (N, K) float32 of all points of the batch; None without a segmentor.
    """

    all_logits: Tensor | None = None
    detection: Any = None
    point_logits: Tensor | None = None


class LidarNet(nn.Module):
    """Sweeps -> voxels -> map -> heads.

    Args:
        config: of the encoder.
        frame: of the points, ``ego`` or ``lidar``.
        occupancy: grid of the labels and number of classes (1: binary); None: without this head.
        detector, segmentor: make other heads of the encoder that they get and the grid of the points.

    Raises:
        ValueError: a head does not fit the encoder, or a back end is missing.
    """

    def __init__(
        self,
        config: SpotConfig,
        frame: str,
        *,
        occupancy: tuple[VoxelGrid, int] | None = None,
        detector: MakeHead | None = None,
        segmentor: MakeHead | None = None,
    ) -> None:
        super().__init__()
        points = self.points = config.points_grid(frame)
        self.binary = occupancy is not None and occupancy[1] == 1
        self.encoder = LidarEncoder(
            config.variant,
            len(config.in_features),
            points.shape,
            backend=choose_backend(config.sparse),
            width=config.width,
            bev_channels=config.bev_channels,
            bev_layers=config.bev_layers,
            bev_up=config.bev_up,
        )
        for layer in self.encoder.modules():
            if isinstance(layer, SyncBatchNorm):
                layer.momentum = config.norm_momentum
        self.occupancy = OccupancyHead(config, self.encoder.outputs, *occupancy) if occupancy else None
        self.detector = detector(self.encoder, points) if detector else None
        self.segmentor = segmentor(self.encoder, points) if segmentor else None

    def forward(self, batch: Batch) -> LidarOutputs:
        """Needs ``batch.points`` alone."""
        cloud = batch.points
        if cloud is None:
            raise ValueError("the batch has no points")
        wide = cloud.xyz if cloud.features is None else torch.cat([cloud.xyz, cloud.features], 1)
        frames = torch.arange(batch.size, device=wide.device)
        sweep = torch.repeat_interleave(frames, cloud.counts, output_size=len(wide))
        if self.training and cloud.kept is not None:
            wide, sweep = wide[cloud.kept], sweep[cloud.kept]
        voxels = voxelize(wide, sweep, self.points)
        found = self.encoder(voxels.features, voxels.indices, batch.size)
        outputs = LidarOutputs(None)
        if self.occupancy is not None:
            self._occupancy(self.occupancy(found.bev).float(), batch, outputs)
        if self.detector is not None:
            outputs.detection = self.detector(found.bev)
        if self.segmentor is not None:
            outputs.point_logits = self.segmentor(found, wide[:, :3], sweep, voxels.rows)
        return outputs

    def _occupancy(self, logits: Tensor, batch: Batch, outputs: LidarOutputs) -> None:
        """Logits of classes against that of free, as other networks have them: a softmax of both is the same."""
        outputs.all_logits = logits = logits[:, :-1] - logits[:, -1:]
        if self.binary:
            outputs.binary_logits = logits[:, 0]
        else:
            outputs.semantic_logits = logits[: max(batch.labeled, 1)]


def from_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an encoder alone -> by the names that they have in ``LidarNet``."""
    return {f"encoder.{name}": tensor for name, tensor in state.items()}
