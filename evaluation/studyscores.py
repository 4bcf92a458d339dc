"""The scores of a scaling study's cells: reads MLflow only, so that runs of other tools can join by tags.

A run joins with the tags ``strategy``, ``family``, ``pretrain_scenes``, ``finetune_scenes``, ``seed``, and ``control`` for
equal-compute controls; ``|`` between values where one run serves several cells. Pre-training runs have ``stage=pretrain``
and are found by the tag ``pretrain_run`` of the runs that start from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from occstream.evaluation.compare import DATA_CARD, all_runs, run_name

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

METRICS = {"eval/miou": "mIoU", "eval/iou": "IoU", "eval/binary_iou": "binary IoU"}
Seeds = dict[str, dict[str, float]]  # seed -> metrics


@dataclass(frozen=True)
class Arm:
    """One line of a plot."""

    family: str
    strategy: str
    finetune_scenes: int

    def label(self, study: StudyScores) -> str:
        """As short as the study allows."""
        parts = [self.family] if len({a.family for a in study.arms}) > 1 else []
        parts.append(self.strategy)
        several = len({a.finetune_scenes for a in study.arms}) > 1
        return " ".join([*parts, *([f"{self.finetune_scenes} labeled"] if several else [])])


@dataclass
class StudyScores:
    """Cells of a study with what each seed scored.

    Attributes:
        name: experiment.
        cells: arm -> pre-training scenes -> seed -> metrics, without controls.
        controls: (control, arm, pre-training scenes) -> seed -> metrics.
        before: arm -> pre-training scenes -> binary IoU of the pre-training runs that it starts from.
        card: metrics of the data card.
        unfinished: runs that count for nothing, with their status.
        begun: their cells: arm, pre-training scenes, seed.
    """

    name: str
    cells: dict[Arm, dict[int, Seeds]] = field(default_factory=dict)
    controls: dict[tuple[str, Arm, int], Seeds] = field(default_factory=dict)
    before: dict[Arm, dict[int, list[float]]] = field(default_factory=dict)
    card: dict[str, float] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)
    begun: set[tuple[Arm, int, str]] = field(default_factory=set)

    @property
    def arms(self) -> list[Arm]:
        return list(self.cells)

    def points(self, arm: Arm, metric: str) -> dict[int, list[float]]:
        """Scores by pre-training scenes, smallest first."""
        found = {
            n: [m[metric] for m in seeds.values() if not math.isnan(m.get(metric, math.nan))]
            for n, seeds in sorted(self.cells[arm].items())
        }
        return {n: v for n, v in found.items() if v}

    def all_cells(self) -> Iterator[tuple[tuple[Arm, int, str], Seeds]]:
        """(arm, pre-training scenes, control or "") and the metrics of its seeds; controls last."""
        for arm, cells in self.cells.items():
            for n, seeds in sorted(cells.items()):
                yield (arm, n, ""), seeds
        for (control, arm, n), seeds in self.controls.items():
            yield (arm, n, control), seeds

    def missing(self) -> list[str]:
        """Cells that the axes call for and no finished run fills, by name."""
        sizes = sorted({n for cells in self.cells.values() for n in cells})
        seeds = sorted({s for cells in self.cells.values() for c in cells.values() for s in c})
        wanted = dict.fromkeys(itertools.product(self.cells, sizes, seeds))
        wanted |= dict.fromkeys(sorted(self.begun, key=str))
        return [
            f"{arm.family} {arm.strategy} pretrain_scenes={n} finetune_scenes={arm.finetune_scenes} seed={seed}"
            for arm, n, seed in wanted
            if seed not in self.cells.get(arm, {}).get(n, {})
        ]


def read_study(client: MlflowClient, experiment: str) -> StudyScores | None:
    """A study from MLflow; None if the experiment's runs have no axes of a study. Raises ValueError without experiment."""
    runs = all_runs(client, experiment)
    study = StudyScores(experiment)
    binary = {
        run_name(r): r.data.metrics.get("eval/binary_iou")
        for r in runs
        if r.data.tags.get("stage") == "pretrain" and r.info.status == "FINISHED"
    }
    for run in runs:
        tags = run.data.tags
        if tags.get("kind") == DATA_CARD:
            study.card = dict(run.data.metrics)
        if not {"strategy", "pretrain_scenes", "finetune_scenes", "seed"} <= tags.keys():
            continue
        if run.info.status != "FINISHED":
            study.unfinished[run_name(run)] = run.info.status
            if not tags.get("control"):
                study.begun |= {(arm, n, tags["seed"]) for arm, n in _places(tags)}
            continue
        _add(study, tags, dict(run.data.metrics), binary.get(tags.get("pretrain_run", "")))
    return study if study.cells else None


def _places(tags: Mapping[str, str]) -> list[tuple[Arm, int]]:
    """Arms and pre-training scenes that a run stands for."""
    split = lambda key: tags.get(key, "").split("|")  # noqa: E731
    axes = (split("family"), split("strategy"), split("pretrain_scenes"), split("finetune_scenes"))
    return [(Arm(family or "-", s, int(labelled)), int(n)) for family, s, n, labelled in itertools.product(*axes)]


def _add(study: StudyScores, tags: Mapping[str, str], metrics: dict[str, float], before: float | None) -> None:
    control = tags.get("control", "")
    for arm, n in _places(tags):
        if control:
            study.controls.setdefault((control, arm, n), {})[tags["seed"]] = metrics
            continue
        study.cells.setdefault(arm, {}).setdefault(n, {})[tags["seed"]] = metrics
        if before is not None:
            study.before.setdefault(arm, {}).setdefault(n, []).append(before)
