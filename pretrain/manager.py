"""The checkpoints of a run: what is saved, found, uploaded, scored and removed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from occstream.evaluation.evaluate import EvalResult
from occstream.pretrain import checkpoint, resume
from occstream.pretrain.config import Config
from occstream.pretrain.distributed import World
from occstream.pretrain.ema import Ema
from occstream.pretrain.optimstate import optimizer_state
from occstream.pretrain.partition import full_state, module_state
from occstream.pretrain.streams import TrainData
from occstream.pretrain.tracking import Tracker
from occstream.sharding import storage

if TYPE_CHECKING:
    from occstream.pretrain.engine import Engine


class CheckpointManager:
    """Saves, finds, uploads and removes the checkpoints of a run; methods are collective.

    Attributes:
        earlier: names of scenes that the weights were trained on before this start; None: not known.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.earlier: frozenset[str] | None = frozenset()
        self.root = Path(config.output) / "checkpoints"
        self.uploader = checkpoint.Uploader(config.train.upload) if config.train.upload and world.is_main else None

    def newest(self) -> checkpoint.Checkpoint | None:
        """What to resume from, the same on every rank; see ``resume.newest``."""
        saved, uploaded = resume.newest(self.root, self.config.train.upload, self.world)
        if self.uploader:
            for path in checkpoint.complete_steps(self.root):
                if checkpoint.step_of(path) > uploaded:
                    self.uploader.add(path)  # what an earlier start did not get to
        return saved

    def save(self, data: TrainData, engine: Engine, ema: Ema | None, *, step: int, tracker: Tracker) -> Path:
        """Returns on all ranks once the checkpoint is complete. Raises on all if it cannot be written."""
        began = time.perf_counter()
        config, world = self.config, self.world
        tensors = {"model": module_state(engine.module, world)}
        tensors["optimizer"], groups = optimizer_state(engine, world)
        if ema:
            tensors["ema"] = full_state(engine.module, ema.values, world)
        path, error = self.root / f"step-{step:08d}", None
        if world.is_main:
            state = {
                "step": step,
                "samples": step * config.train.batch,
                "data": data.state_dict(),
                "groups": groups,
                "ema_updates": ema.updates if ema else 0,
                "config": config.to_dict(),
                "fingerprints": data.fingerprints,
                "order": data.rule,
                "unknown_share": data.unknown,
                "sensors": list(data.sensors),
                **({} if self.earlier is None else {"scenes": sorted(self.earlier | data.scenes)}),
                "world_size": world.size,
                "mlflow_run_id": tracker.run_id,
                "run_key": tracker.key,
            }
            try:
                checkpoint.save(self.root, step, tensors, state)
            except (OSError, FloatingPointError) as problem:
                error = problem
            else:
                if self.uploader:
                    self.uploader.add(path)
                self.prune()
        world.agree(error)
        numbers = {"ckpt/save_s": time.perf_counter() - began}
        if self.uploader and self.uploader.seconds:
            numbers["ckpt/upload_s"] = self.uploader.seconds
        tracker.log_result(step, numbers)
        return path

    def scored(self, step: int, result: EvalResult | None) -> None:
        """Remembers an evaluation, by which the best checkpoint is kept.

        Raises:
            ValueError: on every rank, if it has not the metric that ``train.keep_best`` names.
        """
        best = self.config.train.keep_best
        if result is not None and best:
            known = result.metrics()
            if best not in known:
                raise ValueError(f"train.keep_best={best}: evaluations of this run give {', '.join(known)}; choose one")
            if math.isnan(known[best]):
                self.world.say(f"step {step}: {best} is not a number here, so this checkpoint cannot be the best")
        if self.world.is_main and result is not None and (self.root / f"step-{step:08d}").exists():
            checkpoint.add_scores(self.root, step, result.metrics())
            self.prune()

    def unscored(self, step: int) -> bool:
        """Whether the checkpoint of a step waits for its evaluation."""
        return self.world.agree(None, self.world.is_main and str(step) not in checkpoint.read_scores(self.root))

    def prune(self) -> None:
        """Removes what the recipe does not keep (``train.keep`` and so on), apart from what waits for its upload."""
        train = self.config.train
        busy = list(self.uploader.busy) if self.uploader else []
        checkpoint.prune(self.root, train.keep, every=train.keep_every, best=train.keep_best, busy=busy)

    def close(self) -> None:
        """Waits for uploads, as long as a store may be away."""
        if self.uploader and not self.uploader.close(60 * max(5.0, storage.minutes())):
            self.world.say(
                f"not everything is at {self.config.train.upload}; rerun the command to upload what is left",
            )
