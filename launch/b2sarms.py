"""B2S's studies: head strategies against numbers of pre-training scenes, with controls of equal compute (Figs. 5, 6, 10)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from occstream.launch.grid import Grid, Study, Training, check_names

Control = Literal["longer", "more-s"]
LABELS = "labels"  # the control of cells of the label curve


@dataclass
class ScenesSpec:
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
class ArmStudy(Study):
    """Cells of family, strategy, pre-training scenes, fine-tuning scenes, control and seed. A file with ``strategies`` is one."""

    pretrain: ScenesSpec = field(default_factory=ScenesSpec)
    finetune: ScenesSpec = field(default_factory=ScenesSpec)
    replay: dict[str, Any] = field(default_factory=dict)
    """The recipe's ``replay`` section for strategies that replay; ``scenes`` follows the axis."""
    families: dict[str, dict[str, Any]] = field(default_factory=lambda: {"LS": {}})
    """Model families by name, with their settings."""
    strategies: dict[str, ArmSpec] = field(default_factory=dict)
    """By name, in the order of the tables."""
    controls: tuple[Control, ...] = ()
    """Equal-compute controls. longer: a cell without pre-training trains for as many frames as the largest pre-training
    and its fine-tuning together. more-s: a cell with replay gets S frames in place of its B frames."""
    reference: str = ""
    """Strategy of the control ``longer`` and of the label curve. Empty: the first."""
    label_curve: tuple[int, ...] = ()
    """Further numbers of labeled scenes for the reference without pre-training, at the steps of ``finetune.scenes[0]``:
    what pre-training is worth in labeled scenes is read off this curve."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in ("pretrain", "finetune"):
            spec = getattr(self, stage)
            if not spec.recipe or not spec.scenes:
                raise ValueError(f"{stage}: give a recipe and a list of scenes")
        if min(self.finetune.scenes) < 1 or min(self.pretrain.scenes) < 0:
            raise ValueError("finetune.scenes must be at least 1, pretrain.scenes at least 0")
        if not self.strategies:
            raise ValueError("strategies must not be empty")
        check_names([*self.strategies, *self.families])
        moved = [name for name, arm in self.strategies.items() if "subset_seed" in arm.source]
        if moved:
            raise ValueError(f"strategies.{moved[0]}.source.subset_seed would change the evaluation set; remove it")
        self.reference = self.reference or next(iter(self.strategies))
        if self.reference not in self.strategies:
            raise ValueError(f"reference is {self.reference!r}, must be one of {', '.join(self.strategies)}")

    def fill(self, grid: Grid) -> None:
        builder = _Cells(self, grid)
        axes = (self.families, self.finetune.scenes, self.strategies, self.pretrain.scenes)
        # The first seed of every cell comes before the second of any: something to look at early.
        for seed in self.seeds:
            for family, labelled, strategy, scenes in itertools.product(*axes):
                builder.cell(family, strategy, scenes, labelled, seed=seed)
            most = max(self.pretrain.scenes)
            for family, labelled in itertools.product(self.families, self.finetune.scenes):
                if "longer" in self.controls and most:
                    builder.cell(family, self.reference, 0, labelled, seed=seed, control="longer")
                for strategy, arm in self.strategies.items():
                    if "more-s" in self.controls and arm.replay and most:
                        builder.cell(family, strategy, most, labelled, seed=seed, control="more-s")
            for family, labelled in itertools.product(self.families, self.label_curve):
                builder.cell(family, self.reference, 0, labelled, seed=seed, control=LABELS)

    def describe(self, training: Training) -> tuple[dict[str, str], dict[str, float]]:
        if not training.cells:
            scenes = training.config.data.scenes
            return {"arm": "pretrain", "pretrain_scenes": str(scenes)}, {"pretrain_scenes": float(scenes or 0)}
        tags = training.joined()
        tags["arm"] = f"{tags['family']} {tags['strategy']} {tags['pretrain_scenes']}/{tags['finetune_scenes']}"
        tags["arm"] += f" {tags['control']}" if tags["control"] else ""
        return tags, {key: float(training.cells[0][key]) for key in ("pretrain_scenes", "finetune_scenes")}


@dataclass(frozen=True)
class _Cells:
    """Adds cells to a grid."""

    study: ArmStudy
    grid: Grid

    def cell(self, family: str, strategy: str, scenes: int, labelled: int, *, seed: int, control: str = "") -> None:
        study, arm = self.study, self.study.strategies[strategy]
        place = {
            "family": family,
            "strategy": strategy,
            "pretrain_scenes": scenes,
            "finetune_scenes": labelled,
            "control": control,
            "seed": seed,
        }
        before = self._pretrain(family, strategy, scenes, seed) if scenes else None
        settings = [study.set, study.families[family] or {}, study.finetune.set, arm.finetune]
        settings.append({"data": {"scenes": labelled}, "train": {"seed": seed}})
        if arm.replay and scenes and control != "more-s":
            settings.append({"replay": {**study.replay, **arm.source, "scenes": scenes}})
        elif arm.replay:
            settings.append(arm.without_replay)
        if control:
            settings.append(self._equal_compute(control, settings, place))
        name = f"{family}-{strategy}-{scenes}-{labelled}{f'-{control}' if control else ''}-s{seed}"
        self.grid.add(name, "finetune", study.finetune.recipe, settings, parent=before).cells.append(place)

    def _pretrain(self, family: str, strategy: str, scenes: int, seed: int) -> Training:
        study, arm = self.study, self.study.strategies[strategy]
        settings = [study.set, study.families[family] or {}, study.pretrain.set, arm.pretrain]
        if arm.source:
            own = self.grid.config("pretrain", study.pretrain.recipe, settings)
            settings.append(
                {"eval": {"url": own.eval.url or own.data.url, "holdout": own.data.holdout}, "data": arm.source}
            )
        settings.append({"data": {"scenes": scenes}, "train": {"seed": seed}})
        return self.grid.add(f"pre-{family}-{strategy}-{scenes}-s{seed}", "pretrain", study.pretrain.recipe, settings)

    def _equal_compute(self, control: str, settings: list[dict[str, Any]], place: Mapping[str, Any]) -> dict:
        """Steps or batch that make a control, at a place in the grid, as expensive as what it is compared with."""
        study = self.study
        if control == LABELS:
            first = [*settings, {"data": {"scenes": study.finetune.scenes[0]}}]
            return {"train": {"steps": self.grid.size(self.grid.config("finetune", study.finetune.recipe, first))[0]}}
        config = self.grid.config("finetune", study.finetune.recipe, settings)
        steps, _ = self.grid.size(config)
        if control == "longer":
            most = self._pretrain(place["family"], place["strategy"], max(study.pretrain.scenes), place["seed"])
            return {"train": {"steps": steps + math.ceil(most.frames / config.train.batch)}}
        replayed = study.replay.get("batch")
        extra = config.train.batch if replayed is None else replayed
        return {"train": {"steps": steps, "batch": config.train.batch + extra}}
