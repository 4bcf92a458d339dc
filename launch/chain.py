"""Studies of several steps: trainings and ``occstream`` commands, each of which may read what earlier ones wrote, for every
seed; then label groups are scored against the truth, paired by scene."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from occstream.launch.grid import Grid, Study, Training, check_names, finish
from occstream.pretrain.config import merge, parse_config, read_recipe
from occstream.sharding.codec import canonical_json
from occstream.sharding.manifest import Manifest

SEED = "{seed}"


@dataclass
class StepSpec:
    """A training (``recipe``) or a command (``run``). In all its words ``{seed}`` and ``{output}`` stand for the seed and for the
    study's folder."""

    recipe: str = ""
    """Recipe of a training; its folder is the step's name below the study's."""
    stage: str = ""
    """Of the recipe. Empty: the stage that the recipe names."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings of the training, in sections as in a recipe."""
    run: str = ""
    """An ``occstream`` command line, such as predict or refine. Called at every start of the study: these skip what is there."""

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.run):
            raise ValueError("a step has either a recipe or run")


@dataclass
class ScoreSpec:
    """What is compared in the end."""

    url: str = ""
    """Data set with the truth and the label groups."""
    holdout: int = 0
    """Only the scenes that training on it with this ``data.holdout`` holds out; 0: all."""
    subset_seed: int = 0
    """Same as ``data.subset_seed``."""
    truth: str = "labels"
    """Label group of the truth."""
    mask: Literal["auto", "camera"] = "auto"
    """Voxels that count: all that the truth knows, or those in its camera mask."""
    rows: dict[str, str] = field(default_factory=dict)
    """Label group of each row of the table, by the row's words. The first row is what the others are compared with."""


@dataclass
class Command:
    """A step that is no training.

    Attributes:
        name: folder of its log below the study's.
        needs: name of the step before it, or "".
        line: of ``occstream``.
    """

    name: str
    needs: str
    line: str


@dataclass
class ChainStudy(Study):
    """Steps in order, for every seed. A file with ``steps`` is one.

    Steps whose names do not contain ``{seed}`` come first and are made once.
    """

    steps: dict[str, StepSpec] = field(default_factory=dict)
    """By name."""
    score: ScoreSpec = field(default_factory=ScoreSpec)
    """What is compared in the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names([name.replace(SEED, "0") for name in self.steps])
        of_seeds = [SEED in name for name in self.steps]
        if not of_seeds or of_seeds != sorted(of_seeds):
            raise ValueError("steps: give at least one; those without {seed} in their name come before those with it")
        for name, step in self.steps.items():
            if SEED not in name and SEED in repr(step):
                raise ValueError(f"steps.{name}: names {SEED}, and its own name does not; every seed has its own")
        if not self.score.url or not self.score.rows:
            raise ValueError("score: give a url and rows")

    def fill(self, grid: Grid) -> None:
        raise ValueError(f"study {self.name} is a chain of steps, not a grid of trainings")

    def plan(self) -> list[Training | Command]:
        """Every step in an order that works. Raises ValueError: names a training whose settings are wrong."""
        found: dict[str, Training | Command] = {}
        for seed in self.seeds:
            before = ""
            for key, spec in self.steps.items():
                name = self.fitted(key, seed)
                if name not in found:
                    found[name] = self._training(name, spec, before, seed) if spec.recipe else self._command(
                        name, spec, before, seed
                    )  # fmt: skip
                before = name
        trainings = [step for step in found.values() if isinstance(step, Training)]
        finish(trainings, self)
        return list(found.values())

    def fitted(self, words: Any, seed: int) -> Any:
        """Words, also those within lists and sections, with what stands for ``{seed}`` and ``{output}``."""
        if isinstance(words, str):
            return words.replace(SEED, str(seed)).replace("{output}", self.output)
        if isinstance(words, Mapping):
            return {key: self.fitted(value, seed) for key, value in words.items()}
        return [self.fitted(value, seed) for value in words] if isinstance(words, (list, tuple)) else words

    def _command(self, name: str, spec: StepSpec, before: str, seed: int) -> Command:
        return Command(name, before, self.fitted(spec.run, seed))

    def _training(self, name: str, spec: StepSpec, before: str, seed: int) -> Training:
        data = read_recipe(self.fitted(spec.recipe, seed))
        for more in (self.set, spec.set, {"train": {"seed": seed}}):
            data = merge(data, self.fitted(more, seed))
        try:
            config = parse_config({**data, **({"stage": spec.stage} if spec.stage else {})})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        content = config.to_dict()
        for key in ("output", "track"):
            content.pop(key)
        cell_id = hashlib.blake2b(canonical_json(content), digest_size=8).hexdigest()
        return Training(name, config, before, 0, cell_id, [{"step": name.removesuffix(f"-s{seed}"), "seed": seed}])

    def report(self) -> str:
        """Scores the groups, writes ``scores.json`` and ``scores.md`` and returns the table. Raises ValueError."""
        from occstream.evaluation.labelscores import score_groups, table

        score = self.score
        url = self.fitted(score.url, self.seeds[0])
        base = Manifest.load(url)
        scenes = base.held_out(score.holdout, score.subset_seed) if score.holdout else list(range(len(base.scenes)))
        rows = {
            words: list(dict.fromkeys(self.fitted(group, seed) for seed in self.seeds))
            for words, group in score.rows.items()
        }
        groups = list(dict.fromkeys(group for made in rows.values() for group in made))
        counts = score_groups(url, groups, scenes, truth=score.truth, camera=score.mask == "camera")
        said = table({words: [counts[group] for group in made] for words, made in rows.items()})
        said += f"\n\n{len(scenes)} scenes; the mean of mIoU is over the classes that the truth has. ± beside a score: sample"
        said += " standard deviation over seeds; beside a gain: half of Student's interval over scenes."
        names = [base.scenes[scene].name for scene in scenes]
        content = {"scenes": names, "rows": rows, "counts": {group: each.tolist() for group, each in counts.items()}}
        (Path(self.output) / "scores.json").write_text(json.dumps(content))
        (Path(self.output) / "scores.md").write_text(said + "\n")
        return said


def words_of(step: Training | Command) -> str:
    """A step as a line of a plan."""
    if isinstance(step, Command):
        return f"occstream {shlex.join(shlex.split(step.line))}"
    return f"{step.config.task} {step.config.stage}"
