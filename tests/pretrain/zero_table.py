"""The table of docs/operations.md: saved, resumed, resized and exported at every ZeRO stage, by the next losses.

    python -m tests.pretrain.zero_table FOLDER

Fine-tuning with replay, 20 steps on two gloo processes, saved at step 10. Prints the largest difference of any loss of steps
11 to 20 from the run that was not interrupted.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from occstream.pretrain.checkpoint import Checkpoint, read_weights
from occstream.pretrain.export import export
from tests.pretrain.small import RECIPE, losses, pack_small, run_jobs

STAGES = (0, 1, 2, 3)
HEAD = (
    "ZeRO",
    "two processes against one",
    "resumed on two",
    "resumed on one",
    "resumed as",
    "another stage",
    "exported",
)


def job(root: Path, name: str, stage: int) -> dict:
    words = [f"data.url={root}/data", f"replay.url={root}/data", f"output={root}/{name}", f"train.zero_stage={stage}"]
    words += ["optim.lr=2e-5", "optim.warmup=20", "train.save_every=10", "train.batch=1", "replay.batch=3"]
    words += ["data.scenes=2", "model.dropout=0.0"]
    return {"recipe": RECIPE, "stage": "finetune", "overrides": words}


def resumed(root: Path, stage: int, name: str, as_stage: int) -> dict:
    """A job that resumes from step 10 of the run at ``stage``."""
    shutil.copytree(root / f"two-{stage}/checkpoints/step-00000010", root / name / "checkpoints/step-00000010")
    return job(root, name, as_stage)


def worst(whole: Path, other: Path) -> str:
    a, b = losses(whole), losses(other)
    gap = max(abs(a[s]["train/loss"] - b[s]["train/loss"]) for s in b if s > 10)
    return "0" if gap == 0 else f"{gap:.0e}"


def main(root: Path) -> None:
    pack_small(str(root / "data"))
    run_jobs([job(root, "one", 0)], 1, root / "log-one")
    run_jobs([job(root, f"two-{s}", s) for s in STAGES], 2, root / "log-two")
    jobs = [resumed(root, s, f"again-{s}", s) for s in STAGES]
    jobs += [resumed(root, s, f"other-{s}", (s + 1) % 4) for s in STAGES]
    run_jobs(jobs, 2, root / "log-again")
    run_jobs([resumed(root, s, f"alone-{s}", s) for s in STAGES], 1, root / "log-alone")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for s in STAGES:
        whole = root / f"two-{s}"
        step = whole / "checkpoints/step-00000010"
        read, saved = read_weights(export(step, root / f"export-{s}.safetensors")), Checkpoint(step).weights()
        same = read.keys() == saved.keys() and all(bool((read[k] == v).all()) for k, v in saved.items())
        cells = [
            str(s),
            worst(root / "one", whole),
            worst(whole, root / f"again-{s}"),
            worst(whole, root / f"alone-{s}"),
        ]
        cells += [
            f"stage {(s + 1) % 4}",
            worst(whole, root / f"other-{s}"),
            f"{len(read)} tensors, {'same' if same else 'DIFFER'}",
        ]
        print("| " + " | ".join(cells) + " |")
    print(json.dumps({"steps": 20, "saved at": 10, "loss": losses(root / "one")[20]["train/loss"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
