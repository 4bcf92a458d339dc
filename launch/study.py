"""Studies: a YAML file with axes -> cells -> training runs, deduplicated and in order.

A *cell* is one point of the study: family, strategy, pre-training scenes, fine-tuning scenes, control, seed. A *run* is one
training; cells share pre-training runs, and two cells whose fine-tuning is the same share that too.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from occstream.pretrain.config import Config, build_section, dotted_keys, merge, parse_config, read_recipe
from occstream.pretrain.distributed import World
from occstream.pretrain.events import default_uri
from occstream.pretrain.replay import EvalData, TrainData
from occstream.sharding.codec import canonical_json
from occstream.sharding.places import place

Control = Literal["longer", "more-s"]
LABELS = "labels"  # the control of cells of the label curve


@dataclass
class StageSpec:
    """One of the two stages."""

    recipe: str = ""
    """Recipe of its runs."""
    scenes: tuple[int, ...] = ()
    """The axis: numbers of scenes, nested subsets. Pre-training: 0 is a cell without it."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of its runs, in sections as in a recipe."""


@dataclass
class ArmSpec:
    """A strategy: what it changes in the two stages."""

    pretrain: dict[str, Any] = field(default_factory=dict)
    """Settings of its pre-training runs; strategies that agree in all settings share these runs."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """Settings of its fine-tuning runs."""
    replay: bool = False
    """Replay pre-training frames while fine-tuning (S+B), from the same scenes; without pre-training scenes there is
    nothing to replay, and ``without_replay`` applies instead."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where its B scenes come from, if not from the study's own set: ``url`` and other keys of ``data``, for pre-training and
    for replay. A domain shift between B and S is two strategies that differ in this. Evaluation stays where it is."""
    without_replay: dict[str, Any] = field(default_factory=dict)
    """Settings of the cell with 0 pre-training scenes of a strategy that replays."""


@dataclass
class Study:
    """A scaling study."""

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
    pretrain: StageSpec = field(default_factory=StageSpec)
    finetune: StageSpec = field(default_factory=StageSpec)
    replay: dict[str, Any] = field(default_factory=dict)
    """The recipe's ``replay`` section for strategies that replay; ``scenes`` follows the axis."""
    families: dict[str, dict[str, Any]] = field(default_factory=lambda: {"LS": {}})
    """Model families by name, with their settings."""
    strategies: dict[str, ArmSpec] = field(default_factory=dict)
    """By name, in the order of the tables."""
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[Control, ...] = ()
    """Equal-compute controls. longer: a cell without pre-training trains for as many frames as the largest pre-training
    and its fine-tuning together. more-s: a cell with replay gets S frames in place of its B frames."""
    reference: str = ""
    """Strategy of the control ``longer`` and of the label curve. Empty: the first."""
    label_curve: tuple[int, ...] = ()
    """Further numbers of labeled scenes for the reference without pre-training, at the steps of ``finetune.scenes[0]``:
    what pre-training is worth in labeled scenes is read off this curve."""
    rate: float = 0.0
    """Frames per second of one run, for the estimate; 0: as finished runs of the study say."""

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", self.name):
            raise ValueError(f"name is {self.name!r}: use letters, digits, '-' and '_'")
        for stage in ("pretrain", "finetune"):
            spec = getattr(self, stage)
            if not spec.recipe or not spec.scenes:
                raise ValueError(f"{stage}: give a recipe and a list of scenes")
        if min(self.finetune.scenes) < 1 or min(self.pretrain.scenes) < 0:
            raise ValueError("finetune.scenes must be at least 1, pretrain.scenes at least 0")
        if not self.strategies or not self.seeds:
            raise ValueError("strategies and seeds must not be empty")
        names = [n for n in (*self.strategies, *self.families) if not re.fullmatch(r"[A-Za-z0-9+*. _-]{1,40}", n)]
        if names:
            raise ValueError(f"name {names[0]!r}: use letters, digits, spaces and + * . _ -")
        moved = [name for name, arm in self.strategies.items() if "subset_seed" in arm.source]
        if moved:
            raise ValueError(f"strategies.{moved[0]}.source.subset_seed would change the evaluation set; remove it")
        self.reference = self.reference or next(iter(self.strategies))
        if self.reference not in self.strategies:
            raise ValueError(f"reference is {self.reference!r}, must be one of {', '.join(self.strategies)}")
        if not self.output.isprintable():
            raise ValueError(
                f"output is {self.output!r}: must be a one-line folder name, because it is written into job files"
            )
        self.output = place(self.output) or f"runs/{self.name}"
        self.uri = self.uri or default_uri(f"sqlite:///{self.output}/mlflow.db")


@dataclass
class Run:
    """One training.

    Attributes:
        name: folder below the study's.
        config: complete.
        cells: that it serves: tuples of ``CELL`` values. Empty for pre-training.
        needs: name of the run whose weights it starts from, or "".
        frames: S and B frames that it trains on.
        cell_id: 16 hex digits of everything that it depends on.
    """

    name: str
    config: Config
    needs: str
    frames: int
    cell_id: str
    cells: list[dict[str, Any]] = field(default_factory=list)


def load_study(path: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study; a path or the name of a packaged recipe. A strategy that is null leaves out that of ``base``.

    Raises:
        ValueError: that names the key.
    """
    data = merge(read_recipe(path), overrides or {})
    strategies = data.get("strategies")
    if isinstance(strategies, Mapping):
        data["strategies"] = {name: arm for name, arm in strategies.items() if arm is not None}
    known = [*dotted_keys(Study), *dotted_keys(ArmSpec, "strategies.NAME.")]
    return build_section(Study, data, "", known)


def plan(study: Study) -> list[Run]:
    """All runs of a study in an order that works: every pre-training before what starts from it.

    Every run is checked as it will start: settings, data, batch arithmetic, scenes that overlap those of the evaluation.

    Raises:
        ValueError: a run could not start; named, with the reason.
    """
    builder = _Builder(study)
    axes = (study.families, study.finetune.scenes, study.strategies, study.pretrain.scenes)
    # The first seed of every cell comes before the second of any: something to look at early.
    for seed in study.seeds:
        for family, labelled, strategy, scenes in itertools.product(*axes):
            builder.cell(family, strategy, scenes, labelled, seed, "")
        most = max(study.pretrain.scenes)
        for family, labelled in itertools.product(study.families, study.finetune.scenes):
            if "longer" in study.controls and most:
                builder.cell(family, study.reference, 0, labelled, seed, "longer")
            for strategy, arm in study.strategies.items():
                if "more-s" in study.controls and arm.replay and most:
                    builder.cell(family, strategy, most, labelled, seed, "more-s")
        for family, labelled in itertools.product(study.families, study.label_curve):
            builder.cell(family, study.reference, 0, labelled, seed, LABELS)
    return list(builder.runs.values())


class _Builder:
    """Collects runs, each once."""

    def __init__(self, study: Study):
        self.study = study
        self.runs: dict[str, Run] = {}  # by cell_id
        self._sizes: dict[bytes, tuple[int, int]] = {}

    def cell(self, family: str, strategy: str, scenes: int, labelled: int, seed: int, control: str) -> None:
        study, arm = self.study, self.study.strategies[strategy]
        place = {
            "family": family,
            "strategy": strategy,
            "pretrain_scenes": scenes,
            "finetune_scenes": labelled,
            "control": control,
            "seed": seed,
        }
        before = self._pretrain(family, arm, scenes, seed, strategy) if scenes else None
        settings = [study.set, study.families[family] or {}, study.finetune.set, arm.finetune]
        settings.append({"data": {"scenes": labelled}, "train": {"seed": seed}})
        if arm.replay and scenes and control != "more-s":
            settings.append({"replay": {**study.replay, **arm.source, "scenes": scenes}})
        elif arm.replay:
            settings.append(arm.without_replay)
        if before:
            settings.append({"train": {"init": str(Path(study.output) / before.name)}})
        if control:
            settings.append(self._equal_compute(control, settings, family, arm, seed, strategy))
        name = f"{family}-{strategy}-{scenes}-{labelled}{f'-{control}' if control else ''}-s{seed}"
        run = self._run("finetune", study.finetune.recipe, settings, name, before.name if before else "")
        run.cells.append(place)

    def _pretrain(self, family: str, arm: ArmSpec, scenes: int, seed: int, strategy: str) -> Run:
        study = self.study
        settings = [study.set, study.families[family] or {}, study.pretrain.set, arm.pretrain]
        if arm.source:
            own = self._config("pretrain", study.pretrain.recipe, settings)
            settings.append(
                {"eval": {"url": own.eval.url or own.data.url, "holdout": own.data.holdout}, "data": arm.source}
            )
        settings.append({"data": {"scenes": scenes}, "train": {"seed": seed}})
        return self._run("pretrain", study.pretrain.recipe, settings, f"pre-{family}-{strategy}-{scenes}-s{seed}", "")

    def _equal_compute(self, control: str, settings, family: str, arm: ArmSpec, seed: int, strategy: str) -> dict:
        """Steps or batch that make a control as expensive as what it is compared with."""
        study = self.study
        if control == LABELS:
            first = [*settings, {"data": {"scenes": study.finetune.scenes[0]}}]
            return {"train": {"steps": self._size(self._config("finetune", study.finetune.recipe, first))[0]}}
        config = self._config("finetune", study.finetune.recipe, settings)
        steps, _ = self._size(config)
        if control == "longer":
            most = self._pretrain(family, arm, max(study.pretrain.scenes), seed, strategy)
            return {"train": {"steps": steps + math.ceil(most.frames / config.train.batch)}}
        replayed = study.replay.get("batch")
        extra = config.train.batch if replayed is None else replayed
        return {"train": {"steps": steps, "batch": config.train.batch + extra}}

    def _run(self, stage: str, recipe: str, settings: Sequence[Mapping], name: str, needs: str) -> Run:
        try:
            config = self._config(stage, recipe, settings)
            _, frames = self._size(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        content = config.to_dict()
        for key in ("output", "track"):
            content.pop(key)
        cell_id = hashlib.blake2b(canonical_json(content), digest_size=8).hexdigest()
        if cell_id not in self.runs:
            slug = re.sub(r"[^A-Za-z0-9-]+", "_", name.replace("+", "p").replace("*", "x"))
            self.runs[cell_id] = Run(slug, config, needs, frames, cell_id)
        return self.runs[cell_id]

    def _config(self, stage: str, recipe: str, settings: Sequence[Mapping]) -> Config:
        data = read_recipe(recipe)
        for more in settings:
            data = merge(data, more)
        return parse_config({**data, "stage": stage})

    def _size(self, config: Config) -> tuple[int, int]:
        """Steps of a run and the frames that it trains on; checks its data."""
        content = config.to_dict()
        content["train"].pop("seed")
        content["train"].pop("init")
        key = canonical_json(content)
        if key not in self._sizes:
            world = World(0, 1, torch.device("cpu"))
            data = TrainData(config, world)
            held_out = EvalData(config, world, data.cameras)
            shared = data.scenes & held_out.scenes
            if shared:
                raise ValueError(
                    f"{len(shared)} scenes are used for both training and evaluation ({min(shared)}, …): hold them out "
                    "(data.holdout, replay.holdout) or give another eval.url"
                )
            steps = data.steps
            self._sizes[key] = steps, steps * data.frames_per_step
        return self._sizes[key]


def finish(runs: Sequence[Run], study: Study) -> None:
    """Writes output, tags and axes into the configs of a plan, and each config as a recipe below the study's folder."""
    folder = Path(study.output) / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        config = run.config
        config.output = str(Path(study.output) / run.name)
        config.track.uri, config.track.experiment = study.uri, study.name
        tags = {"study": study.name, "cell_id": run.cell_id}
        if run.cells:
            for key in ("family", "strategy", "pretrain_scenes", "finetune_scenes", "control"):
                # A run may serve several cells: "|" between their values.
                values = list(dict.fromkeys(str(cell[key]) for cell in run.cells))
                tags[key] = "|".join(values)
            tags["arm"] = f"{tags['family']} {tags['strategy']} {tags['pretrain_scenes']}/{tags['finetune_scenes']}"
            tags["arm"] += f" {tags['control']}" if tags["control"] else ""
            config.track.axes = {key: float(run.cells[0][key]) for key in ("pretrain_scenes", "finetune_scenes")}
        else:
            tags |= {"arm": "pretrain", "pretrain_scenes": str(config.data.scenes)}
            config.track.axes = {"pretrain_scenes": float(config.data.scenes)}
        if run.needs:
            tags["pretrain_run"] = run.needs
        config.track.axes["train_frames"] = float(run.frames)
        config.track.tags = {**config.track.tags, **tags}
        (folder / f"{run.name}.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
