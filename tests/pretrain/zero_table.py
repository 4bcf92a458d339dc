"""The tables of docs/operations.md: saved, resumed, resized and exported at every ZeRO stage, by the next losses.

    python -m tests.pretrain.zero_table FOLDER [b2s | spot | panoocc]

Each stage of the task, on two gloo processes, saved in the middle: 20 steps of fine-tuning with replay (b2s), or 10 of it
(panoocc), or 10 steps each of pre-training, detection and segmentation (spot). Prints the largest difference of any loss of the
second half from the run that was not interrupted, as a share of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from occstream.pretrain.checkpoint import Checkpoint, read_weights
from occstream.pretrain.export import export
from tests.pretrain.small import HERE, RECIPE, losses, pack_small, pack_sweeps, run_jobs

STAGES = (0, 1, 2, 3)
HEAD = (
    "stage",
    "ZeRO",
    "two processes against one",
    "resumed on two",
    "resumed on one",
    "resumed as",
    "another stage",
    "exported",
)


class Kind(NamedTuple):
    """A run: its folder, recipe, stage, half of its steps, and settings."""

    root: Path
    recipe: str
    stage: str
    half: int
    words: tuple[str, ...]

    def job(self, name: str, zero: int) -> dict:
        words = [f"data.url={self.root.parent}/data", f"output={self.root}/{name}", f"train.zero_stage={zero}"]
        words += [f"train.save_every={self.half}", f"train.steps={2 * self.half}", *self.words]
        return {"recipe": self.recipe, "stage": self.stage, "overrides": words}

    def resumed(self, zero: int, name: str, as_zero: int) -> dict:
        """A job that resumes from the middle of the run at stage ``zero``."""
        step = f"checkpoints/step-{self.half:08d}"
        shutil.copytree(self.root / f"two-{zero}" / step, self.root / name / step)
        return self.job(name, as_zero)

    def run(self) -> None:
        run_jobs([self.job("one", 0)], 1, self.root / "log-one")
        run_jobs([self.job(f"two-{z}", z) for z in STAGES], 2, self.root / "log-two")
        run_jobs([self.resumed(z, f"again-{z}", z) for z in STAGES], 2, self.root / "log-again")
        run_jobs([self.resumed(z, f"other-{z}", (z + 1) % 4) for z in STAGES], 2, self.root / "log-other")
        run_jobs([self.resumed(z, f"alone-{z}", z) for z in STAGES], 1, self.root / "log-alone")

    def worst(self, whole: str, other: str) -> str:
        a, b = losses(self.root / whole), losses(self.root / other)
        gap = max(abs(b[s]["train/loss"] / a[s]["train/loss"] - 1) for s in b if s > self.half)
        return "0" if gap == 0 else f"{gap:.0e}"

    def cells(self, zero: int) -> list[str]:
        step = self.root / f"two-{zero}/checkpoints/step-{self.half:08d}"
        read, saved = read_weights(export(step, self.root / f"export-{zero}.safetensors")), Checkpoint(step).weights()
        same = read.keys() == saved.keys() and all(bool((read[k] == v).all()) for k, v in saved.items())
        found = [self.worst(a, f"{b}-{zero}") for a, b in (("one", "two"), (f"two-{zero}", "again"))]
        found += [self.worst(f"two-{zero}", f"alone-{zero}"), f"stage {(zero + 1) % 4}"]
        found += [self.worst(f"two-{zero}", f"other-{zero}"), f"{len(read)} tensors, {'same' if same else 'DIFFER'}"]
        return [self.stage, str(zero), *found]


def b2s(root: Path) -> list[Kind]:
    pack_small(str(root / "data"))
    words = (f"replay.url={root}/data", "optim.lr=2e-5", "optim.warmup=20", "train.batch=1", "replay.batch=3")
    return [Kind(root / "finetune", RECIPE, "finetune", 10, (*words, "data.scenes=2", "model.dropout=0.0"))]


def spot(root: Path) -> list[Kind]:
    pack_sweeps(str(root / "data"), 4, 3)
    recipe, words = str(HERE / "small-spot.yaml"), ("optim.lr=1e-4", "train.batch=2")
    return [Kind(root / stage, recipe, stage, 5, words) for stage in ("pretrain", "detect", "segment")]


def panoocc(root: Path) -> list[Kind]:
    pack_small(str(root / "data"))
    words = (
        f"replay.url={root}/data",
        "optim.lr=1e-4",
        "train.batch=1",
        "replay.batch=3",
        "data.scenes=2",
        "heads=voxels",
    )
    return [Kind(root / "finetune", str(HERE / "small-panoocc.yaml"), "finetune", 5, words)]


def main(root: Path, task: str = "b2s") -> None:
    kinds = {"b2s": b2s, "spot": spot, "panoocc": panoocc}[task](root)
    for kind in kinds:
        kind.run()
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for kind in kinds:
        for z in STAGES:
            print("| " + " | ".join(kind.cells(z)) + " |")
        last = losses(kind.root / "one")[2 * kind.half]["train/loss"]
        print(json.dumps({"stage": kind.stage, "steps": 2 * kind.half, "saved at": kind.half, "loss": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
