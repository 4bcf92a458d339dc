"""A task of somebody else: LiDAR points -> a class for each, without cameras and without voxels in the network.

It is all that a system needs on modalities that are there: a model, a sample, losses, scores. ``--import`` of this file makes it
known; nothing else in the repository knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.evaluation.evaluate import EvalResult
from occstream.evaluation.metrics import ConfusionMatrix, sum_over_ranks
from occstream.models.batch import Batch, PointLabels, Points
from occstream.pretrain.config import Config
from occstream.pretrain.tasks.base import Scoring, Task, Transfer
from occstream.pretrain.tasks.registry import register
from occstream.sharding.order import generator
from occstream.sharding.schema import IGNORE, Frame, Labels
from occstream.sharding.stream import Field


@dataclass
class ToyModel:
    """Sizes of the network."""

    width: int = 16
    """Channels."""


@dataclass
class ToyLoss:
    """Weights of the losses."""

    ground: float = 1.0
    """Weight of the binary cross-entropy: is a point on something?"""
    classes: float = 1.0
    """Weight of the cross-entropy of classes."""


@dataclass
class ToyRecipe(Config):
    """A recipe of the toy."""

    model: ToyModel = field(default_factory=ToyModel)
    loss: ToyLoss = field(default_factory=ToyLoss)
    shift: float = 0.5
    """Largest shift of a training frame along x and y, meters."""


class ToyNet(nn.Module):
    """Each point alone: its height and reach to whether it is above the ground, and then to a class.

    Args:
        classes: K; 0: without the second head (pre-training).
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.above = nn.Linear(width, 1)
        self.classes = nn.Linear(width, classes) if classes else None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(N,) logits of all points; (n, K) logits of those of labeled frames, None in pre-training."""
        xyz = batch.points.xyz
        x = self.encoder(torch.cat([xyz / 10, xyz[:, :2].norm(dim=1, keepdim=True) / 10], 1))
        logits = self.above(x).squeeze(1).float()
        if self.classes is None:
            return logits, None
        # A rank without labeled frames runs the second head all the same, on one point cut off from the graph.
        known = x[: len(batch.point_labels.classes)] if batch.labeled else x[:1].detach()
        return logits, self.classes(known).float()


class ToySample:
    """Points of the key sweep in the ego frame; in the main stream of fine-tuning with their classes."""

    window = ()

    def __init__(self, labeled: bool, seed: int, shift: float):
        self.labeled, self.seed, self.shift = labeled, seed, shift
        self.groups = ("lidar",)

    def fields(self) -> Mapping[str, Field]:
        found = {"scene_aug": Field((3, 3), "float32"), "points.xyz": Field((3,), "float32", ragged=True)}
        return found | ({"point_labels.classes": Field((), "uint8", ragged=True)} if self.labeled else {})

    def __call__(self, frame: Frame, epoch: int, views: dict[str, Any]) -> None:
        if frame.lidar is None or frame.lidar.classes is None:
            raise ValueError(
                f"frame {frame.key} has no LiDAR points with classes; pack lidar of a source that has them"
            )
        to_ego = frame.lidar.sensor_to_ego
        xyz = frame.lidar.xyz @ to_ego[:3, :3].T.astype(np.float32) + to_ego[:3, 3].astype(np.float32)
        if self.shift:
            xyz[:, :2] += generator(self.seed, epoch, frame.key).uniform(-self.shift, self.shift, 2).astype(np.float32)
        views["scene_aug"][...] = np.eye(3)
        views["points.xyz"] = xyz[::4]
        if self.labeled:
            views["point_labels.classes"] = frame.lidar.classes[::4]

    def finish(self, device: torch.device, threads: int) -> None:
        return None

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        if self.labeled:
            ends = np.cumsum(arrays["point_labels.counts"])
            arrays["point_labels.classes"][ends[index] - arrays["point_labels.counts"][index] : ends[index]] = IGNORE
        ends = np.cumsum(arrays["points.counts"])
        arrays["points.xyz"][ends[index] - arrays["points.counts"][index] : ends[index]] = np.nan


@dataclass
class ToyResult(EvalResult):
    """Accuracies in percent."""

    above: float = 0.0
    accuracy: float | None = None
    headline: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "above": "above ground"}

    def scores(self) -> dict[str, float]:
        return {"above": self.above} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


class ToyMetric:
    """Shares of points that are right."""

    nothing = "without a point: there is no score"

    def __init__(self, classes: int):
        self.above, self.matrix, self.named = ConfusionMatrix(1), ConfusionMatrix(classes), False

    def update(self, outputs: Any, batch: Batch) -> int:
        logits, classes = outputs
        valid = ~batch.points.xyz.isnan().any(1)
        self.above.update((logits <= 0).long(), (batch.points.xyz[:, 2] <= 0.3).long(), valid)
        if classes is not None and batch.labeled:
            self.named = True
            self.matrix.update(classes.argmax(1), batch.point_labels.classes.long())
        return int(valid.sum())

    def all_reduce(self, device: torch.device) -> None:
        for matrix in (self.above, self.matrix):
            matrix.counts = sum_over_ranks(matrix.counts, device)
        self.named = bool(sum_over_ranks(torch.tensor([int(self.named)]), device).item())

    def result(self) -> ToyResult:
        share = lambda m: float(100 * m.counts.diagonal().sum() / m.counts.sum())  # noqa: E731
        return ToyResult(0, above=share(self.above), accuracy=share(self.matrix) if self.named else None)


@register
class Toy(Task):
    """Stage pretrain learns what is above the ground, finetune adds classes."""

    name = "toy"
    stages = {"pretrain": "Learns what is above the ground.", "finetune": "Learns classes."}  # noqa: RUF012
    Config = ToyRecipe
    terms = ("ground", "classes")
    headline = {"eval/accuracy": "accuracy", "eval/above": "above ground"}  # noqa: RUF012
    config: ToyRecipe

    def __init__(self, config: ToyRecipe):
        super().__init__(config)
        self.labeled = self.replays = config.stage == "finetune"

    def model(self) -> nn.Module:
        return ToyNet(self.config.model.width, self.config.classes.num_classes if self.labeled else 0)

    def transfer(self, model: nn.Module) -> Transfer:
        return Transfer([key for key in model.state_dict() if not key.startswith("classes.")])

    def sample(self, role: str, source: Any, sensors: Sequence[str], labeled: bool = True) -> ToySample:
        train = role in ("main", "replay")
        return ToySample(
            self.labeled and role in ("main", "eval"), self.config.train.seed, self.config.shift if train else 0.0
        )

    def counts(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        found = {"ground": torch.tensor(len(batch.points.xyz), device=batch.device)}
        if outputs[1] is not None:
            known = batch.point_labels.classes != IGNORE if batch.labeled else batch.scene_aug.new_zeros(1)
            found["classes"] = known.sum()
        return found

    def sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        logits, classes = outputs
        above = (batch.points.xyz[:, 2] > 0.3).float()
        found = {"ground": F.binary_cross_entropy_with_logits(logits, above, reduction="sum")}
        if classes is not None:
            truth = batch.point_labels.classes.long() if batch.labeled else torch.full((len(classes),), IGNORE)
            found["classes"] = F.cross_entropy(classes, truth.to(classes.device), ignore_index=IGNORE, reduction="sum")
        return found

    @property
    def weights(self) -> Mapping[str, float]:
        return {"ground": self.config.loss.ground, "classes": self.config.loss.classes}

    def scoring(self, manifest: Any, unknown: float | None) -> Scoring:
        return Scoring(lambda: ToyMetric(self.config.classes.num_classes))

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: str, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        """Points' classes in the voxels that they are in, on the recipe's grid."""
        grid, free = self.config.voxel_grid, self.config.classes.free_id
        for batch in batches:
            frames = dict.fromkeys(batch.keys)
            whole = Batch(
                batch.scene_aug,
                batch.size,
                batch.keys,
                points=batch.points,
                point_labels=PointLabels(torch.zeros(len(batch.points.xyz), dtype=torch.uint8), batch.points.counts),
            )
            with torch.no_grad():
                classes = model(whole)[1].argmax(1).split(batch.points.counts.tolist())
            for key, xyz, said in zip(frames, batch.points.xyz.split(batch.points.counts.tolist()), classes):
                semantic = np.full(grid.shape, free, np.uint8)
                index, inside = grid.to_index(xyz.numpy())
                semantic[tuple(index[inside].T)] = said.numpy()[inside]
                yield key, Labels(binary=semantic != free, semantic=semantic)

    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        g, size = torch.Generator().manual_seed(0), labeled + other
        classes = torch.randint(0, self.config.classes.num_classes, (100 * labeled,), generator=g, dtype=torch.uint8)
        counts = torch.full((size,), 100)
        return Batch(
            torch.eye(3).repeat(size, 1, 1),
            labeled,
            [f"toy-{i}" for i in range(size)],
            points=Points(torch.randn(100 * size, 3, generator=g), counts),
            point_labels=PointLabels(classes, counts[:labeled]) if self.labeled else None,
        )
