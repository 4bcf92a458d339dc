"""Grids of training runs: cells at the crossings of axes, each training once, parents before what starts from them.

A *cell* is one point of a study, a dict of its axes' values and its seed. A *training* is one run: cells that need the same
one share it, in particular the earlier stages whose weights their last one starts from.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from occstream.pretrain.config import Config, merge, parse_config, read_recipe
from occstream.pretrain.distributed import World
from occstream.pretrain.events import default_uri
from occstream.pretrain.streams import EvalData, TrainData
from occstream.sharding.codec import canonical_json
from occstream.sharding.places import place


@dataclass
class Training:
    """One run.

    Attributes:
        name: folder below the study's.
        config: complete.
        needs: name of the training whose weights it starts from, or "".
        frames: that it trains on, of all streams.
        cell_id: 16 hex digits of everything that it depends on.
        cells: that it is the last stage of. Empty for one that others start from.
    """

    name: str
    config: Config
    needs: str
    frames: int
    cell_id: str
    cells: list[dict[str, Any]] = field(default_factory=list)

    def joined(self) -> dict[str, str]:
        """Values of its cells by axis, "|" between several; without the seed."""
        keys = [key for key in self.cells[0] if key != "seed"] if self.cells else []
        return {key: "|".join(dict.fromkeys(str(cell[key]) for cell in self.cells)) for key in keys}


class Grid:
    """Collects trainings, each once, and checks each as it will start.

    Args:
        output: the study's folder.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._trainings: dict[str, Training] = {}  # by cell_id
        self._sizes: dict[bytes, tuple[int, int]] = {}

    @property
    def trainings(self) -> list[Training]:
        """In an order that works."""
        return list(self._trainings.values())

    def add(
        self, name: str, stage: str, recipe: str, settings: Sequence[Mapping], *, parent: Training | None = None
    ) -> Training:
        """The training with these settings, new or one that is there.

        Args:
            name: of its folder, if it is new; what folders cannot hold is replaced.
            stage: of the recipe.
            recipe: a path or the name of a packaged one.
            settings: in sections as in a recipe; later ones win.
            parent: whose weights it starts from.

        Raises:
            ValueError: it could not start; named, with the reason.
        """
        if parent:
            settings = [*settings, {"train": {"init": str(Path(self.output) / parent.name)}}]
        try:
            config = self.config(stage, recipe, settings)
            _, frames = self.size(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        content = config.to_dict()
        for key in ("output", "track"):
            content.pop(key)
        cell_id = hashlib.blake2b(canonical_json(content), digest_size=8).hexdigest()
        if cell_id not in self._trainings:
            slug = re.sub(r"[^A-Za-z0-9-]+", "_", name.replace("+", "p").replace("*", "x"))
            self._trainings[cell_id] = Training(slug, config, parent.name if parent else "", frames, cell_id)
        return self._trainings[cell_id]

    def config(self, stage: str, recipe: str, settings: Sequence[Mapping]) -> Config:
        """The recipe with settings. Raises ValueError."""
        data = read_recipe(recipe)
        for more in settings:
            data = merge(data, more)
        return parse_config({**data, "stage": stage})

    def size(self, config: Config) -> tuple[int, int]:
        """Steps of a training and the frames that it trains on; checks its data. Raises ValueError."""
        content = config.to_dict()
        content["train"].pop("seed")
        content["train"].pop("init")
        key = canonical_json(content)
        if key not in self._sizes:
            world = World(0, 1, torch.device("cpu"))
            data = TrainData(config, world)
            held_out = EvalData(config, world, data.sensors)
            shared = data.scenes & held_out.scenes
            if shared:
                raise ValueError(
                    f"{len(shared)} scenes are used for both training and evaluation ({min(shared)}, …): hold them out "
                    "(data.holdout, replay.holdout) or give another eval.url"
                )
            steps = data.steps
            self._sizes[key] = steps, steps * data.frames_per_step
        return self._sizes[key]


@dataclass
class Study:
    """What every study has; a kind of study adds its axes and fills a grid.

    Raises:
        ValueError: names the key.
    """

    name: str = ""
    """MLflow experiment and tag."""
    output: str = ""
    """Folder of its runs."""
    uri: str = ""
    """MLflow tracking URI. Empty: MLFLOW_TRACKING_URI of the environment, else a SQLite file in ``output``."""
    prepare: tuple[str, ...] = ()
    """``occstream`` command lines that make the data; they run before anything else, and skip what is there."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rate: float = 0.0
    """Frames per second of one run, for the estimate; 0: as finished runs of the study say."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", self.name):
            raise ValueError(f"name is {self.name!r}: use letters, digits, '-' and '_'")
        if not self.seeds:
            raise ValueError("seeds must not be empty")
        if not self.output.isprintable():
            raise ValueError(
                f"output is {self.output!r}: must be a one-line folder name, because it is written into job files"
            )
        self.output = place(self.output) or f"runs/{self.name}"
        self.uri = self.uri or default_uri(f"sqlite:///{self.output}/mlflow.db")

    def fill(self, grid: Grid) -> None:
        """Adds every cell's trainings. Raises ValueError as ``Grid.add``."""
        raise NotImplementedError

    def describe(self, training: Training) -> tuple[dict[str, str], dict[str, float]]:
        """Tags of a training, with ``arm`` for the rows of a plain table, and the numbers that it is charted against."""
        tags = training.joined()
        numbers = {k: float(v) for k, v in (training.cells or [{}])[0].items() if k != "seed" and _is_number(v)}
        arm = " ".join(tags.values()) or re.sub(r"-s\d+$", "", training.name)
        return {**tags, "arm": arm}, numbers


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that folders, tags or tables could not hold."""
    wrong = [n for n in names if not re.fullmatch(r"[A-Za-z0-9+*. _-]{1,40}", n)]
    if wrong:
        raise ValueError(f"name {wrong[0]!r}: use letters, digits, spaces and + * . _ -")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and value.isdecimal())


@dataclass
class StageSpec:
    """A stage of every cell."""

    stage: str = ""
    """Of the recipe: "pretrain" or "finetune"."""
    recipe: str = ""
    """Recipe of its runs."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of its runs, in sections as in a recipe."""


@dataclass
class AxesStudy(Study):
    """A study of any axes: every combination of their values is a cell.

    A file with ``axes`` is one. Each value of an axis has overrides by stage; null in place of a stage's overrides means that
    cells with this value do not have the stage.
    """

    stages: tuple[StageSpec, ...] = ()
    """In order; each starts from the weights of the one before."""
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """axis -> value -> stage -> settings, for example {lr: {low: {pretrain: {optim: {lr: 1e-4}}}}}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [s.stage for s in self.stages]
        if not names or not all(names) or len(set(names)) < len(names) or not all(s.recipe for s in self.stages):
            raise ValueError("stages: give a list of different stages, each with a recipe")
        if taken := self.axes.keys() & {"seed", "arm", "stage", "study", "cell_id"}:
            raise ValueError(f"axes.{min(taken)}: the name is taken; give the axis another")
        check_names([*self.axes, *(value for values in self.axes.values() for value in values)])
        for axis, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{axis} has no values")
            for value, overrides in values.items():
                if wrong := overrides.keys() - set(names):
                    raise ValueError(f"axes.{axis}.{value}.{min(wrong)}: no such stage; stages are {', '.join(names)}")

    def fill(self, grid: Grid) -> None:
        # The first seed of every cell comes before the second of any: something to look at early.
        for seed, values in itertools.product(self.seeds, itertools.product(*self.axes.values())):
            cell = dict(zip(self.axes, values))
            chosen = [self.axes[axis][value] for axis, value in cell.items()]
            last = None
            for spec in self.stages:
                overrides = [c.get(spec.stage, {}) for c in chosen]
                if None in overrides:
                    continue
                settings = [self.set, spec.set, *overrides, {"train": {"seed": seed}}]
                name = "-".join([spec.stage, *cell.values(), f"s{seed}"])
                last = grid.add(name, spec.stage, spec.recipe, settings, parent=last)
            if last is None:
                raise ValueError(f"the cell {cell} has no stage")
            last.cells.append({**cell, "seed": seed})


def plan(study: Study) -> list[Training]:
    """All trainings of a study in an order that works: every parent before what starts from it.

    Each is checked as it will start: settings, data, batch arithmetic, scenes that overlap those of the evaluation.

    Raises:
        ValueError: a run could not start; named, with the reason.
    """
    grid = Grid(study.output)
    study.fill(grid)
    return grid.trainings


def finish(trainings: Sequence[Training], study: Study) -> None:
    """Writes output, tags and axes into the configs of a plan, and each config as a recipe below the study's folder."""
    folder = Path(study.output) / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    for training in trainings:
        config = training.config
        config.output = str(Path(study.output) / training.name)
        config.track.uri, config.track.experiment = study.uri, study.name
        tags, axes = study.describe(training)
        if training.needs:
            tags["pretrain_run"] = training.needs
        config.track.axes = {**axes, "train_frames": float(training.frames)}
        config.track.tags = {**config.track.tags, "study": study.name, "cell_id": training.cell_id, **tags}
        (folder / f"{training.name}.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
