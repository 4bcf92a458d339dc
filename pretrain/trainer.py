"""The training loop: steps 6 to 12 of the walk (README), readable from top to bottom in ``_Training``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.evaluation.charts import NOTE
from occstream.evaluation.compare import headline_tag
from occstream.evaluation.evaluate import EvalResult
from occstream.models import Batch
from occstream.pretrain import checkpoint
from occstream.pretrain.checkpoint import Checkpoint
from occstream.pretrain.config import Config
from occstream.pretrain.distributed import World
from occstream.pretrain.ema import Ema
from occstream.pretrain.engine import build_engine
from occstream.pretrain.events import EVENTS, describe_uri
from occstream.pretrain.guards import FiniteGuard, RunLock, Stopper, Watchdog
from occstream.pretrain.manager import CheckpointManager
from occstream.pretrain.meter import Meter
from occstream.pretrain.networks import accelerate, create_model, settled
from occstream.pretrain.optim import Schedule
from occstream.pretrain.optimstate import load_optimizer_state
from occstream.pretrain.partition import float_state, to_local
from occstream.pretrain.profile import Profile
from occstream.pretrain.provenance import code_version, datasets, description, source_tags
from occstream.pretrain.resume import check_same_run
from occstream.pretrain.runconfig import write_config
from occstream.pretrain.seeds import seed_everything
from occstream.pretrain.streams import EvalData, TrainData
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.terms import combine, joint_counts
from occstream.pretrain.tracking import Tracker
from occstream.pretrain.trained import Drawer, evaluate_on
from occstream.sharding.order import BY_CONTENT


@dataclass
class Result:
    """What a run ended with. ``stopped`` says who asked it to end early; it is saved and can be resumed."""

    steps: int
    samples: int
    loss: float
    samples_per_s: float
    evaluation: EvalResult | None
    checkpoint: Path | None
    terms: dict[str, float] = field(default_factory=dict)
    stopped: str = ""


def train(config: Config, world: World) -> Result:
    """Pre-trains or fine-tunes by the recipe, resuming from the newest complete checkpoint of ``config.output``.

    Raises:
        ValueError: recipe, data, checkpoint or initial weights do not fit each other, or another job trains there.
        FloatingPointError: loss or gradients are not finite (the step is not taken).
    """
    lock = RunLock(Path(config.output), world)
    try:
        return _Training(settled(config, world), world).run()
    finally:
        lock.close()


class _Training:
    """One run on one rank: opened by ``__init__``, trained by ``run``.

    Attributes:
        step, total: steps done and in all.
        rate: learning rate of the step.
        last: metrics that were logged last.
        path: newest checkpoint.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.folder = config, world, Path(config.output)
        self.task = task_of(config)
        self.data = TrainData(config, world)
        self.held_out = EvalData(config, world, self.data.sensors)
        if config.train.keep_best and not self.held_out.total:
            raise ValueError(
                f"train.keep_best={config.train.keep_best}, but there is nothing to evaluate on; set data.holdout or eval.url"
            )
        for note in (*self.data.notes, *self.held_out.notes):
            world.say(note)
        self.step, self.total, self.rate = 0, self.data.steps, 0.0
        self.last: dict[str, float] = {}
        self.manager = CheckpointManager(config, world)
        saved = self.manager.newest()
        self.path = saved.path if saved else None
        model = self._model(saved)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = build_engine(model, config, world)
        batch = config.train.batch
        self.schedule = Schedule(config.optim, batch, self.total * batch, self.data.epoch_samples)
        self.ema = Ema(self.engine.module, config.train) if config.train.ema else None
        if saved:
            self._restore(saved)
        self.tracker = self._tracker(saved.state if saved else {})
        if world.is_main:
            write_config(self.folder, config, world.size, saved=saved, tracker=self.tracker)

    def _model(self, saved: Checkpoint | None) -> nn.Module:
        """The network with the weights to resume or start from."""
        config, cfg = self.config, self.config.train
        model = create_model(config)
        self.task.check(model)
        if saved:
            check_same_run(config, self.data.fingerprints, saved)
            self.manager.earlier = checkpoint.scenes(saved.state)
            checkpoint.load_declared(model, saved.tensors("model"), model.state_dict(), origin=str(saved.path))
        elif cfg.init:
            weights = self.task.adopt(checkpoint.read_weights(cfg.init))
            self.manager.earlier = checkpoint.scenes_of(cfg.init)
            declared = self.task.transfer(model)
            fresh = checkpoint.load_declared(
                model, weights, declared.expected, origin=cfg.init, dropped=declared.dropped
            )
            left = len(weights) - len(declared.expected)
            self.world.say(
                f"started from {cfg.init}: all {len(declared.expected)} declared tensors loaded, {len(fresh)} new"
                f"{f', {left} left behind' if left else ''}"
            )
        accelerate(
            model, self.world.device, cfg.kernels, tf32=cfg.tf32, compiled=self.task.compile if cfg.compile else None
        )
        return model

    def _restore(self, saved: Checkpoint) -> None:
        """Optimizer, averages and positions as they were saved; the model has its weights already."""
        state, world = saved.state, self.world
        self.step = state["step"]
        load_optimizer_state(self.engine, saved.tensors("optimizer"), state["groups"], world)
        if self.ema:
            self.ema.updates = state["ema_updates"]
            averaged = saved.tensors("ema")
            for name, tensor in float_state(self.engine.module):
                self.ema.values[name].copy_(to_local(tensor, averaged[name], world))
        # Checkpoints of earlier versions name no rule: their order hung on the content of the data.
        self.data.load_state_dict(state["data"], state.get("order", BY_CONTENT))
        if self.data.rule == BY_CONTENT:
            world.say(
                "continues in the order by content that the checkpoint was trained with; new runs are ordered by scenes"
            )
        world.say(f"resumed from {saved.path} at step {self.step}")

    def _tracker(self, state: Mapping[str, Any]) -> Tracker:
        """
        Args:
            state: of the checkpoint that the run resumes from, or empty.
        """
        config, data, task = self.config, self.data, self.task
        readings, code = [*data.readings, *self.held_out.readings], code_version()
        sizes = {"steps": self.total, "processes": self.world.size, "parameters": self.parameters}
        note = description(task, readings, **sizes)
        about = {
            "task": config.task,
            "stage": config.stage,
            "seed": str(config.train.seed),
            "data_fingerprint": data.fingerprint,
        }
        tracker = Tracker(
            self.folder,
            uri=config.track.uri,
            experiment=config.track.experiment,
            name=self.folder.name,
            tags={**about, **source_tags(code), NOTE: note, **headline_tag(task.headline), **config.track.tags},
            params={
                **config.to_dict(),
                **{f"{name}_fingerprint": value for name, value in data.fingerprints.items()},
                "world_size": self.world.size,
                "parameters": self.parameters,
                **{f"unknown_share.{key}": share for key, share in data.unknown.items()},
                "code": code,
            },
            datasets=datasets(readings),
            terms=task.terms,
            active=self.world.is_main,
            key=state.get("run_key") or "",
            run_id=state.get("mlflow_run_id") or "",
        )
        self.world.say(f"metrics go to {self.folder / EVENTS} and to MLflow: {describe_uri(config.track.uri)}")
        return tracker

    def run(self) -> Result:
        """Trains to the end, or until the run is asked to stop; saved either way."""
        cfg, world, data = self.config.train, self.world, self.data
        self.guard = FiniteGuard(self.engine, self.config, self.folder, world, heard=data.heard)
        self.watchdog = Watchdog(self.folder, world, cfg.timeout_minutes)
        self.meter = Meter(self.step, self.total, data, world, bf16=cfg.precision == "bf16", count=not cfg.compile)
        status, evaluation = "FAILED", None
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(Stopper(self.folder, world))
            stack.callback(lambda: self.tracker.close(status))
            stack.callback(self.watchdog.close)
            stack.callback(data.close)
            profile = stack.enter_context(Profile(self.folder, world, self.tracker, cfg.profile))
            keys = None
            if cfg.log_keys:
                keys = stack.enter_context((self.folder / f"keys-rank-{world.rank}.txt").open("a"))
            if self._evaluates() and self.step and self.manager.unscored(self.step):
                self._evaluate()  # the run was stopped between the checkpoint and its evaluation
            while self.step < self.total and not data.stopping:
                self.watchdog.alive()
                terms, taken = self._take_step(stop.wanted(), keys)
                self.meter.step()
                profile.step()
                self._after_step(terms, taken)
            if self.step < self.total:
                status = "KILLED"  # MLflow's word for a run that was told to stop; it is RUNNING again when it resumes
                stop.done()
            else:
                evaluation = self._evaluate(self.config.eval.pictures)
                status = "FINISHED"
            self.manager.close()
        return Result(
            steps=self.step,
            samples=self.step * cfg.batch,
            loss=self.last.get("train/loss", float("nan")),
            samples_per_s=self.meter.samples_per_s,
            evaluation=evaluation,
            checkpoint=self.path,
            terms={k: v for k, v in self.last.items() if k.startswith("train/")},
            stopped="" if status == "FINISHED" else stop.reason or "another rank",
        )

    def _take_step(self, stop: bool, keys: TextIO | None) -> tuple[dict[str, Tensor], bool]:
        """One optimizer step of all its micro-batches.

        Args:
            stop: this rank is asked to stop.
            keys: file that gets the frame keys.

        Returns:
            Loss and its terms, means over micro-batches; and whether the step was taken.
        """
        cfg, data = self.config.train, self.data
        # Dropout is a function of the step too, so a resumed run draws what an uninterrupted one would.
        seed_everything(cfg.seed, self.step, self.world.rank, 1)
        self.rate = self.schedule.apply(self.engine.optimizer, self.step * cfg.batch)
        terms: dict[str, Tensor] = {}
        self.guard.begin(self.step)
        self.task.progress = self.step / self.total
        counts, batches, taken = None, data.micro_batches(cfg.accumulate, stop), True
        if self.task.teaches:
            batches = self._taught(batches)
        for batch in batches:
            with self.meter.counting():
                with self.meter.forward():
                    outputs = self.engine(batch)
                if counts is None:
                    counts = joint_counts([self.task.counts(outputs, b) for b in batches], data.flags)
                loss, values = combine(self.task.sums(outputs, batch), counts, self.task.weights)
                self.guard.backward(loss, batch.keys, data.flags)
            if keys:
                print(self.step, *batch.keys, file=keys, flush=True)
            for name, value in {"loss": loss.detach(), **values}.items():
                terms[name] = terms.get(name, 0.0) + value / cfg.accumulate
            taken = self.guard.step()
        if self.ema and taken:
            self.ema.update()
        self.step += 1
        return terms, taken

    def _taught(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches with what the average of the weights says of them (mean teacher)."""
        module = self.engine.module
        if self.ema is None:
            raise ValueError(
                "a teacher is the average of the weights: set train.ema=true, or the teacher's weight to 0"
            )
        with self.ema.applied(module), torch.no_grad():
            module.eval()
            found = [self.task.taught(batch, self.engine(batch)) for batch in batches]
            module.train()
        return found

    def _after_step(self, terms: Mapping[str, Tensor], taken: bool) -> None:
        """Logs, saves and evaluates where it is time to."""
        cfg, step = self.config.train, self.step
        log = taken and (step % cfg.log_every == 0 or step == self.total)
        evaluate = self._evaluates()
        save = bool(cfg.save_every and step % cfg.save_every == 0) or step == self.total
        save |= evaluate and bool(cfg.keep_best)  # the best can only be kept of what is saved
        if log or save or evaluate or self.data.stopping:
            self.guard.settle()
        if log:
            self._log(terms)
        if save or self.data.stopping:
            with self.meter.paused(), self.watchdog.off():
                self.path = self.manager.save(self.data, self.engine, self.ema, step=step, tracker=self.tracker)
        if evaluate and not self.data.stopping:
            self._evaluate()

    def _log(self, terms: Mapping[str, Tensor]) -> None:
        last = {f"train/{name}": value for name, value in _mean_over_ranks(terms, self.world).items()}
        last["opt/lr"] = self.rate
        last["opt/grad_norm"] = float(self.guard.norm)
        last |= self.meter.metrics()
        if self.config.train.skip_nonfinite:
            last["train/left_out"] = float(self.guard.skipped)
        self.last = last
        self.tracker.log(self.step, last)
        if self.world.is_main:
            self.meter.show(self.step, last, self.task.terms)

    def _evaluates(self) -> bool:
        """Whether an evaluation is due before the end; there is always one at the end."""
        every = self.config.eval.every
        return bool(every) and self.step % every == 0 and self.step < self.total

    def _evaluate(self, pictures: int = 0) -> EvalResult | None:
        """Scores of the weights as they are now, averaged where there is an average; None if nothing is held out."""
        config, frames, step, world = self.config, self.held_out, self.step, self.world
        if not frames.total:
            return None
        module = self.engine.module
        with self.meter.paused(), self.watchdog.off():
            with self.ema.applied(module) if self.ema else contextlib.nullcontext():
                folder = self.folder / "pictures"
                drawer = Drawer(
                    config, frames.sensors, scenes=pictures if world.is_main else 0, folder=folder, step=step
                )
                result = evaluate_on(self.engine, frames, drawer)
            self.tracker.log_result(step, result.metrics())
            for picture in drawer.done:
                self.tracker.artifact(picture)
            world.say(f"step {step}: evaluated {result.frames} frames: {result.summary()}")
            self.manager.scored(step, result)
        return result


def _mean_over_ranks(terms: Mapping[str, Tensor], world: World) -> dict[str, float]:
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in terms.values()])
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return dict(zip(terms, values.tolist()))
