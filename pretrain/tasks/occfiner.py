"""OccFiner: a network that corrects what another one predicted, from its predictions for neighboring key-frames (Sec. III-B)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from occstream.evaluation.occupancy import HEADLINE
from occstream.evaluation.predictions import Keep, predict
from occstream.evaluation.report import prediction_picture
from occstream.models.batch import Batch, OccOutputs, Occupancy, Volumes
from occstream.models.occfiner import OccFiner, OccFinerConfig
from occstream.pretrain.config import Config
from occstream.pretrain.lovasz import draw_of, lovasz_counts, lovasz_softmax, weighted_count, weighted_cross_entropy
from occstream.pretrain.tasks.base import Facts, Role, Scoring, Task
from occstream.pretrain.tasks.occupancy import (
    MaskedData,
    MaskedEval,
    check_class_weights,
    eval_boxes,
    mask_facts,
    occupancy_scoring,
)
from occstream.pretrain.tasks.registry import register
from occstream.pretrain.volumes import VolumeFiller, WindowConfig
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import IGNORE, Labels


@dataclass
class RefinerData(MaskedData):
    """The stream this stage trains on; ``labels`` is the truth."""

    input: str = ""
    """Label group of the predictions to refine, such as pseudo-a of ``occstream predict``."""


@dataclass
class RefinerEval(MaskedEval):
    """Evaluation at the end of training (and every ``every`` steps)."""

    input: str = ""
    """Same as ``data.input``, on the data set that is evaluated. Empty: a group of that name."""


@dataclass
class RefinerLoss:
    """Weights of the losses (OccFiner, eq. 13: both 1). Only the pivot is scored: in an epoch every frame is the pivot once."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy, divided by the sum of the class weights of all known voxels."""
    lovasz_weight: float = 1.0
    """Weight of the Lovász loss, the mean of frames' own over the classes that a frame has, with free."""
    lovasz_sample: int = 0
    """Known voxels of a frame that the Lovász loss looks at; 0: all. The draw is a function of the frame's key."""
    class_weights: dict[str, float] = field(default_factory=dict)
    """Weights of classes in the cross-entropy, for example ``loss.class_weights.free=0.5``; 1 where nothing is said (the paper
    names none)."""

    def __post_init__(self) -> None:
        if not self.ce_weight and not self.lovasz_weight:
            raise ValueError("ce_weight and lovasz_weight are both 0: there is nothing to learn")


@dataclass
class OccFinerRecipe(Config):
    """A recipe of OccFiner's local propagation."""

    data: RefinerData = field(default_factory=RefinerData)
    eval: RefinerEval = field(default_factory=RefinerEval)
    window: WindowConfig = field(default_factory=WindowConfig)
    model: OccFinerConfig = field(default_factory=OccFinerConfig)
    loss: RefinerLoss = field(default_factory=RefinerLoss)
    trust: bool = False
    """Train also on predictions of scenes that the predicting network was trained on, or may have been. They are far better than
    its predictions of other scenes, and a refiner learns from them to change nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_weights(self.loss.class_weights, self)


@register
class OccFinerTask(Task):
    """One stage. What is refined was predicted before, and is read as a label group beside the truth."""

    name = "occfiner"
    stages: ClassVar[Mapping[str, str]] = {"train": "Trains a refiner of another network's predictions."}
    Config = OccFinerRecipe
    terms = ("ce", "lovasz")
    headline: ClassVar[Mapping[str, str]] = {f"eval/{name}": HEADLINE[name] for name in ("miou", "iou", "binary_iou")}
    labeled = True
    config: OccFinerRecipe
    learned: tuple[str, ...] = ()
    """The network whose errors the refiner has learned, where there is one."""

    @property
    def title(self) -> str:
        return f"occfiner {self.config.model.kind}"

    # Network

    def model(self) -> nn.Module:
        config = self.config
        return OccFiner(config.model, config.voxel_grid, config.classes.num_classes, config.window.frames)

    def timed(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return dict(model.get_submodule("net").named_children())

    # Data

    def sample(self, role: Role, source: Any, sensors: Sequence[str], labeled: bool = True) -> VolumeFiller:
        config = self.config
        return VolumeFiller(
            config.window,
            self.input(source),
            grid=config.voxel_grid,
            taxonomy=config.classes,
            seed=config.train.seed if role == "main" else None,
            mask=source.mask,
            truth=role != "predict",
            annotations=eval_boxes(config, role, classes=True),
        )

    def input(self, source: Any) -> str:
        """Group of the predictions. Raises ValueError if none is named, or if it is the truth."""
        group = source.input or self.config.data.input
        if not group:
            raise ValueError(
                "data.input is not set: name the label group of the predictions to refine, as `occstream predict … --name` "
                "called it"
            )
        if group in ("labels", getattr(source, "labels", "labels")):
            raise ValueError(f"data.input={group} is the truth itself; name a group of predictions")
        return group

    def sensors(self, manifest: Manifest, scene: int, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """The network whose predictions are read: a refiner's one sensor."""
        self.learned = tuple(wanted)
        return self.learned or (_name(manifest, self.input(self.config.data)),)

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        found = mask_facts(key, source.mask, manifest, scenes)
        if key == "data":
            found.notes += self._honest(manifest, [manifest.scenes[i].name for i in scenes])
        return found

    def _honest(self, manifest: Manifest, scenes: Sequence[str]) -> list[str]:
        """Raises ValueError unless the predicting network has not seen the scenes, or the recipe trusts it; then a line."""
        group = self.input(self.config.data)
        author, problem = manifest.author(group), ""
        where = f"{manifest.url}: {group}"
        if author.trained_on is None:
            problem = f"{where} does not say which scenes its network was trained on"
        elif seen := [name for name in scenes if name in author.trained_on]:
            problem = f"{where} is of a network that was trained on {len(seen)} of these {len(scenes)} scenes, such as "
            problem += ", ".join(seen[:3])
        if problem and not self.config.trust:
            raise ValueError(
                f"{problem}; a refiner learns nothing from predictions that are too good: predict crosswise (occstream predict "
                "RUN1 RUN2 … URL --folds), choose other scenes (data.scene_names), or set trust=true"
            )
        return [f"trust=true: {problem}"] if problem else []

    def remarks(self, manifest: Manifest, source: Any) -> list[str]:
        """Says that a data set's predictions are of another network than the refiner has learned from."""
        name = _name(manifest, group := self.input(source))
        if not self.learned or self.learned == (name,):
            return []
        return [
            f"{group} is of {name}; this refiner has learned the errors of {self.learned[0]}, others may be beyond it"
        ]

    # Learning

    def counts(self, outputs: OccOutputs, batch: Batch) -> dict[str, Tensor]:
        labels = self._truth(batch)
        nothing, weights = torch.zeros((), device=batch.device), self._class_weights()
        found = {"ce": nothing + weighted_count(labels, len(weights), weights)}
        if self.config.loss.lovasz_weight:
            found["lovasz"] = sum((lovasz_counts(frame, range(len(weights))) for frame in labels), nothing)
        return found

    def sums(self, outputs: OccOutputs, batch: Batch) -> dict[str, Tensor]:
        if outputs.semantic_logits is None:
            raise ValueError("the network has no classes")
        logits, labels = outputs.semantic_logits, self._truth(batch)
        if not len(labels):  # every parameter takes part, and nothing is known
            labels = labels.new_full((1, *logits.shape[2:]), IGNORE)
        loss, found = self.config.loss, {}
        for index, (frame, truth) in enumerate(zip(logits, labels)):
            known = (truth != IGNORE).flatten().nonzero().squeeze(1)
            wide = frame.flatten(1)[:, known].t()
            wide, truth = torch.cat([wide, wide.new_zeros(len(wide), 1)], 1), truth.flatten()[known]
            values = {"ce": weighted_cross_entropy(wide, truth, self._class_weights())}
            if loss.lovasz_weight:
                values["lovasz"] = lovasz_softmax(
                    wide.softmax(1),
                    truth,
                    sample=loss.lovasz_sample,
                    generator=draw_of(batch.keys[index] if batch.keys else ""),
                )
            found = {name: found.get(name, 0.0) + value for name, value in values.items()}
        return found

    @property
    def weights(self) -> Mapping[str, float | None]:
        return {"ce": self.config.loss.ce_weight, "lovasz": self.config.loss.lovasz_weight}

    def _truth(self, batch: Batch) -> Tensor:
        """(S, X, Y, Z) uint8 class, free last, or 255."""
        labels = batch.part(Occupancy)
        return labels.classes() if batch.labeled else labels.binary[:0].to(torch.uint8)

    def _class_weights(self) -> tuple[float, ...]:
        """Of the classes, free last."""
        return tuple(self.config.loss.class_weights.get(name, 1.0) for name in (*self.config.classes.classes, "free"))

    # Evaluation and prediction

    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        return occupancy_scoring(self.config, manifest, unknown, kind="softmax_focal", grid=self.config.voxel_grid)

    def draw(
        self, path: Path, batch: Batch, outputs: OccOutputs, *, index: int, sensors: Sequence[str], title: str
    ) -> bool:
        prediction_picture(
            path,
            batch,
            outputs,
            index=index,
            grid=self.config.voxel_grid,
            taxonomy=self.config.classes,
            cameras=(),
            kind="softmax_focal",
            title=title,
        )
        return True

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: Keep, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        return predict(model, batches, keep=keep, kind="softmax_focal", flips=flips)

    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        """A world of patches of 4 x 4, a twentieth of them occupied, that moves by 2 m a frame; a tenth of its patches wrong."""
        g, config = torch.Generator().manual_seed(0), self.config
        size, frames, shape, free = (
            labeled + other,
            config.window.frames,
            config.voxel_grid.shape,
            config.classes.free_id,
        )
        patches = (size, frames, -(-shape[0] // 4), -(-shape[1] // 4), shape[2])
        truth = torch.randint(0, free * 20, patches, generator=g).clamp_max(free)
        wrong = torch.rand(patches, generator=g) < 0.1
        said = torch.where(wrong, torch.randint(0, free + 1, patches, generator=g), truth)
        fine = [
            value.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, : shape[0], : shape[1]].to(torch.uint8)
            for value in (truth, said)
        ]
        poses = torch.eye(4).repeat(size, frames, 1, 1)
        poses[..., 0, 3] = 2.0 * torch.arange(frames)
        second = sure = None
        if config.window.soft:
            second, sure = fine[1].flip(2), torch.full_like(fine[1], 200)
        labels = fine[0][:, 0]
        return Batch(
            scene_aug=torch.eye(3).repeat(size, 1, 1),
            labeled=labeled,
            keys=[f"synthetic-{i}" for i in range(size)],
            volumes=Volumes(fine[1], poses, torch.ones(size, frames, dtype=torch.bool), second, sure),
            occupancy=Occupancy(labels != free, torch.ones(labels.shape, dtype=torch.bool), semantic=labels[:labeled]),
        )


def _name(manifest: Manifest, group: str) -> str:
    """Of the network that a label group is of."""
    network = manifest.author(group).network
    return f"network {network}" if network else f"labels {manifest.with_sidecar(group).labels!r}"
