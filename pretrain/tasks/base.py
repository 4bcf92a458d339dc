"""What the training loop, evaluation, prediction, dry run, bench and sweep know of a system: ``Task`` and ``Sample``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from occstream.evaluation.detection import BoxSet
from occstream.evaluation.evaluate import Metric
from occstream.evaluation.instances import Segments
from occstream.evaluation.predictions import Keep
from occstream.models.batch import Batch
from occstream.pretrain.config import Config
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import Frame, Labels, frame_key
from occstream.sharding.stream import Field, StreamBatch, Window

Role = Literal["main", "replay", "eval", "predict"]


class Sample(Protocol):
    """How frames of one stream become samples of a batch. Stateless: several threads call it.

    Attributes:
        groups: of the shards that are read, "labels" for those of the manifest in use; sidecar groups beside it are in
            ``frame.label_sets``.
        window: offsets of the key-frames around each one that it finds in ``frame.window``, where the scene has them; or what
            chooses them for each.
    """

    groups: tuple[str, ...]
    window: tuple[int, ...] | Window

    def fields(self) -> Mapping[str, Field]:
        """Arrays of one sample, by ``part.field`` of ``Batch``, and ``scene_aug`` (3, 3) float32."""
        ...

    def __call__(self, frame: Frame, epoch: int, views: dict[str, np.ndarray]) -> Any:
        """Fills a sample; a ragged field is set, ``views[name] = array``.

        Raises:
            CorruptSample: the frame cannot be used: the next one of its scene is taken instead.
            ValueError: the data set does not have what is asked for.
        """
        ...

    def finish(self, device: torch.device, threads: int) -> Callable[[StreamBatch], None] | None:
        """What completes each batch of the stream, such as by arrays that a GPU makes (``made``); None: nothing."""
        ...

    def invalidate(self, arrays: dict[str, np.ndarray], index: int) -> None:
        """Makes a sample of a batch count for nothing: in an evaluation it stands for one that cannot be read."""
        ...


@dataclass
class Facts:
    """What was found out about a stream before it is read.

    Attributes:
        numbers: to be recorded with the run, by setting.
        notes: lines to print.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Scoring:
    """How an evaluation scores: ``metric`` makes a counter that knows nothing yet; ``notes`` are to be printed."""

    metric: Callable[[], Metric]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Transfer:
    """What a network takes from a checkpoint of an earlier stage.

    Attributes:
        expected: keys of its state dict that must be there, in the same shapes.
        dropped: prefixes of keys of the checkpoint that are left behind. Any other key is an error.
    """

    expected: list[str]
    dropped: tuple[str, ...] = ()


class Task(ABC):
    """One system, made of its recipe.

    Class attributes:
        name: in recipes (``task:``).
        stages: what each one does, by name; the first is the default.
        Config: type of its recipes.
        terms: names of the losses that are shown, in order.
        headline: names of the scores that are compared (``eval/…``) and how people call them; the first decides.
        knobs: settings that save memory, for messages.
        free: settings of its own that a resumed run may change (prefixes).
    """

    name: ClassVar[str]
    stages: ClassVar[Mapping[str, str]]
    Config: ClassVar[type[Config]] = Config
    terms: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[Mapping[str, str]] = {}
    knobs: ClassVar[tuple[str, ...]] = ("train.accumulate (more micro-steps)", "train.zero_stage", "more processes")
    free: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        self.config: Any = config

    @classmethod
    def settings_then(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of an earlier version, with those that did not exist then as the code was."""
        return settings

    @property
    def title(self) -> str:
        """What is trained, for people."""
        return self.name

    # Network

    @abstractmethod
    def model(self) -> nn.Module:
        """The network of the recipe's stage, called with a ``Batch``; the caller has seeded."""

    def check(self, model: nn.Module) -> None:  # noqa: B027 (nothing to check is the default)
        """Raises ValueError if the recipe asks for what this network cannot do."""

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of ``train.init`` by the names of this task's networks, where another program wrote the file."""
        return weights

    def transfer(self, model: nn.Module) -> Transfer:
        """What is taken from ``train.init``: by default everything."""
        return Transfer(list(model.state_dict()))

    def compile(self, model: nn.Module, backend: str) -> None:  # noqa: B027
        """Compiles in place what gains from it: by default nothing."""

    def timed(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Parts whose time ``bench step`` tells apart."""
        return dict(model.named_children())

    # Data

    def sensors(self, manifest: Manifest, scene: int, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """Names of sensors, in order, that samples are made of and a checkpoint remembers.

        Args:
            wanted: of the recipe, or of the checkpoint.
        """
        return tuple(wanted)

    @abstractmethod
    def sample(self, role: Role, source: Any, sensors: Sequence[str], labeled: bool = True) -> Sample:
        """How a stream's frames become samples.

        Args:
            role: what the stream is for. Only "main" carries semantic labels in training.
            source: its section of the recipe: ``data``, ``replay`` or one of ``replay.more``, ``eval``.
            labeled: whether the data set has labels (only a role "predict" may be without).
        """

    labeled: bool = False
    """Whether frames of the main stream carry semantic labels in this stage."""
    replays: bool = False
    """Whether this stage takes frames of the recipe's ``replay`` as well."""

    def facts(self, key: str, source: Any, manifest: Manifest, scenes: Sequence[int]) -> Facts:
        """What to print and to record of a stream.

        Args:
            key: of its section in the recipe.
            scenes: numbers of those that it takes frames from.
        """
        return Facts()

    def remarks(self, manifest: Manifest, source: Any) -> list[str]:
        """Lines to print before a data set is evaluated or predicted, after ``sensors``."""
        return []

    def balance(self, source: Any) -> tuple[str, ...] | None:
        """Foreground classes, of boxes or labels, whose rare ones a stream of training shows more often (``order.balance``);
        None: every frame occurs once a pass. What it says is to follow from the recipe.

        Args:
            source: section of the stream, as of ``sample``.
        """
        return None

    # Learning

    @abstractmethod
    def counts(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """What each sum is divided by, from the labels alone: scalars, summed over ranks and micro-batches by the caller.
        The same names on every rank.

        Args:
            outputs: of any micro-batch of the step: only what heads there are, and their shapes, may matter.
        """

    @abstractmethod
    def sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums of losses over valid elements, by the names of ``counts``. What follows an "@" tells roles apart: ``a@main``
        and ``a@replay`` are both reported as ``a``."""

    teaches: bool = False
    """Whether the average of the weights (``train.ema``) says something about each batch before the network learns from it."""
    progress: float = 0.0
    """Share of the run that is done before the step; the training loop sets it."""

    def taught(self, batch: Batch, outputs: Any) -> Batch:
        """The batch with what the teacher says of it, as labels.

        Args:
            outputs: of the averaged network for this batch, in evaluation mode and without gradients.
        """
        return batch

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float | None]:
        """Weights of the sums by name, without roles; None: only reported."""

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch alone and its terms (collective)."""
        counts = joint_counts([self.counts(outputs, batch)])
        return combine(self.sums(outputs, batch), counts, self.weights)

    # Evaluation and prediction

    @abstractmethod
    def scoring(self, manifest: Manifest, unknown: float | None) -> Scoring:
        """How the recipe scores on a data set.

        Args:
            unknown: the number that ``facts`` gave for it, or None.
        """

    cameras_of: Callable[[str], Frame | None] = staticmethod(lambda key: None)
    """Frame of a key with its cameras and boxes, for ``draw``; None where there are none, or nobody asked for them. ``occstream
    evaluate --picture`` sets it."""
    movie: str = ""
    """End of the name of those of a frame's pictures that an animation over time is made of."""

    def draw(self, path: Path, batch: Batch, outputs: Any, *, index: int, sensors: Sequence[str], title: str) -> bool:
        """Draws a frame of a batch and what is predicted of it; False: this task draws nothing."""
        return False

    needs_labels: bool = False
    """Whether predictions are made of the labels that a data set has."""

    def check_prediction(self) -> None:  # noqa: B027
        """Raises ValueError if the recipe's network predicts nothing that shards can hold."""

    def predict(
        self, model: nn.Module, batches: Iterable[Batch], keep: Keep, flips: bool
    ) -> Iterator[tuple[str, Labels]]:
        """Key and labels of each frame, in the order of the batches.

        Args:
            keep: "top1", "top2", "logits" or "evidence".
            flips: mean over mirrored scenes.
        """
        raise ValueError(f"task {self.name} predicts nothing that can be written as labels")

    detects: bool = False
    """Whether the network of this stage finds boxes."""

    def detections(self, outputs: Any, batch: Batch) -> list[BoxSet]:
        """Boxes found in each frame of a batch, in the frame of the labels."""
        raise ValueError(f"task {self.name} finds no boxes")

    inputs: ClassVar[tuple[str, ...]] = ()
    """What its networks look at, as benchmarks ask: of camera, lidar, radar, map, external."""
    segments: bool = False
    """Whether the network of this stage gives classes to LiDAR points."""

    def point_settings(self) -> tuple[str, ...]:
        """Overrides of the recipe with which samples of a role "predict" have points."""
        return ()

    def point_segments(self, outputs: Any, batch: Batch) -> list[Segments]:
        """Classes and instances of the points of each labeled frame of a batch, in the order of its sweep."""
        raise ValueError(f"task {self.name} gives points no classes")

    @abstractmethod
    def synthetic_batch(self, labeled: int, other: int) -> Batch:
        """Frames of plausible content on the CPU, for the dry run, the bench and tests.

        Args:
            labeled, other: frames with and without semantic labels.
        """


def without_replaced(stream: Iterable[StreamBatch], manifest: Manifest, sample: Sample) -> Iterator[StreamBatch]:
    """Batches in which a frame that stands in for one that cannot be read has no key and counts for nothing: it counts once,
    at its own place."""
    for got in stream:
        for i, drawn in enumerate(got.samples):
            if got.keys[i] != frame_key(manifest.scenes[drawn.scene].name, drawn.frame):
                got.keys[i] = ""
                sample.invalidate(got.arrays, i)
        yield got
