"""B2S: binary pre-training, then semantic fine-tuning with replay of pre-training frames (Noguchi and Yamamoto)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn

from occstream.evaluation.occupancy import HEADLINE
from occstream.evaluation.predictions import Keep, predict
from occstream.evaluation.report import prediction_picture
from occstream.models import build_model, model_entry
from occstream.models.batch import Batch, OccOutputs
from occstream.pretrain import losses
from occstream.pretrain.config import merge
from occstream.pretrain.samples import FrameFiller
from occstream.pretrain.tasks.base import Facts, Role, Scoring, Transfer
from occstream.pretrain.tasks.occupancy import (
    CameraTask,
    OccupancyConfig,
    camera_frames,
    camera_sample,
    eval_boxes,
    mask_facts,
    occupancy_scoring,
)
from occstream.pretrain.tasks.registry import register
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import Labels

if TYPE_CHECKING:

    class Network(nn.Module):
        """What a model gives that B2S trains, beside its forward."""

        predicts_binary: bool

        def transfer_keys(self) -> list[str]: ...
        def dropped_keys(self) -> tuple[str, ...]: ...


def _network(model: nn.Module) -> Network:
    return cast("Network", model)


@dataclass
class B2SRecipe(OccupancyConfig):
    """A recipe of B2S: any model of the registry that is trained by occupancy."""

    model_name: str = "b2s_ls"
    """Key of the model registry."""
    model: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            self.model = model_entry(self.model_name).config()

    @classmethod
    def open_sections(cls, data: Mapping[str, Any]) -> dict[str, type]:
        return {"model": model_entry(data.get("model_name", cls.model_name)).config}


@register
class B2STask(CameraTask):
    """Stage pretrain ends at the binary decoder; finetune has the whole network, and binary frames of the replay stop at the
    binary decoder (Sec. 3.3)."""

    name = "b2s"
    stages = {"pretrain": "Pre-trains on binary occupancy.", "finetune": "Fine-tunes semantic occupancy."}  # noqa: RUF012
    Config = B2SRecipe
    parts: ClassVar[Mapping[str, str]] = {
        "image encoder": "images",
        "lift": "lift",
        "dense layers": "dense",
        "binary decoder": "decoder",
        "sparse part": "semantic",
        "full head": "full",
    }
    terms = ("binary", "semantic", "depth")
    headline = {f"eval/{name}": HEADLINE[name] for name in ("miou", "iou", "binary_iou")}  # noqa: RUF012
    knobs = (
        "train.accumulate (more micro-steps)",
        "model.checkpointing=true",
        "model.head_rows=16",
        "train.zero_stage",
        "more processes",
    )
    config: B2SRecipe

    def __init__(self, config: B2SRecipe) -> None:
        super().__init__(config)
        self.semantic = self.labeled = self.replays = config.stage == "finetune"
        self.offboard = self.needs_labels = config.model.strategy == "offboard"
        # Labels choose the voxels of an offboard model: there the limit changes nothing that is learned.
        self.free = ("model.cap",) if self.offboard else ()

    @classmethod
    def settings_then(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if "resize_relative" not in settings.get("augment", {}):
            settings = merge(settings, {"augment": {"resize_relative": True}})
        if settings.get("replay", {}).get("url") and "replay_normalizer" not in settings.get("loss", {}):
            settings = merge(settings, {"loss": {"replay_normalizer": "joint"}})
        return settings

    @property
    def title(self) -> str:
        return f"{self.config.model_name} {self.config.model.strategy}"

    def model(self) -> nn.Module:
        config = self.config
        return build_model(
            config.model_name,
            config.model,
            grid=config.voxel_grid,
            num_classes=config.classes.num_classes,
            image_size=config.augment.image_size,
            semantic=self.semantic,
        )

    def check(self, model: nn.Module) -> None:
        config = self.config
        if config.replay.url and self.semantic and not _network(model).predicts_binary:
            raise ValueError(
                f"strategy {config.model.strategy} has no binary head, so replayed binary frames teach nothing: set "
                "replay.url= (empty), or model.strategy to intermediate or multi"
            )
        if self.offboard and config.train.init:
            raise ValueError("strategy offboard has no pre-training stage: set train.init= (empty)")

    def transfer(self, model: nn.Module) -> Transfer:
        network = _network(model)
        return Transfer(network.transfer_keys(), network.dropped_keys())

    def sample(self, role: Role, source: Any, sensors: Sequence[str], labeled: bool = True) -> FrameFiller:
        data, train = self.config.data, role in ("main", "replay")
        return camera_sample(
            self.config,
            sensors,
            train=train,
            semantic=self.semantic and role in ("main", "eval"),
            depth_cell=self._depth_cell if train else 0,
            mask=source.mask,
            binary_from=data.binary_from if role != "replay" else "labels",
            soft=data.soft and role == "main",
            labels=labeled,
            annotations=eval_boxes(self.config, role, classes=self.semantic),
        )

    @property
    def _depth_cell(self) -> int:
        return self.config.model.feature_stride if self.config.loss.depth_weight else 0

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        replayed = key.startswith("replay")
        binary_from = "labels" if replayed else self.config.data.binary_from
        return mask_facts(key, source.mask, manifest, scenes, binary_from=binary_from)

    def counts(self, outputs: OccOutputs, batch: Batch) -> dict[str, Tensor]:
        return losses.counts(outputs, batch, self.config.loss)

    def sums(self, outputs: OccOutputs, batch: Batch) -> dict[str, Tensor]:
        return losses.sums(outputs, batch, self.config.loss)

    @property
    def weights(self) -> Mapping[str, float | None]:
        return losses.weights(self.config.loss)

    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        config = self.config
        return occupancy_scoring(
            config,
            manifest,
            unknown,
            grid=config.voxel_grid,
            kind=config.loss.kind,
            threshold=config.eval.threshold,
            classes=self.semantic,
        )

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
            cameras=tuple(sensors),
            kind=self.config.loss.kind,
            threshold=self.config.eval.threshold,
            title=title,
        )
        return True

    def check_prediction(self) -> None:
        if not self.semantic:
            raise ValueError("is of a pre-training run, which predicts no classes; give a fine-tuned one")

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: Keep, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        return predict(
            model,
            batches,
            keep=keep,
            kind=self.config.loss.kind,
            threshold=self.config.eval.threshold,
            flips=flips,
            occupied="labels" if self.offboard else "predicted",
        )

    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        history = self.config.data.history
        return camera_frames(self.config, labeled, other, depth_cell=self._depth_cell, history=history)
