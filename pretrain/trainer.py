"""The training loop: steps 6 to 12 of the walk (README), readable from top to bottom in ``_train``."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.evaluation.evaluate import EvalResult, evaluate
from occstream.evaluation.report import prediction_picture
from occstream.models import OccBatch, OccOutputs, build_model, kernels
from occstream.pretrain import checkpoint, resume
from occstream.pretrain.config import Config, merge, parse_config, parse_overrides
from occstream.pretrain.device import describe, pick_device
from occstream.pretrain.engine import (
    Ema,
    World,
    build_engine,
    float_state,
    full_state,
    learning_rate,
    load_optimizer_state,
    module_state,
    optimizer_state,
    seed_everything,
    to_local,
)
from occstream.pretrain.events import EVENTS, describe_uri, flatten
from occstream.pretrain.guards import FiniteGuard, RunLock, Stopper, Watchdog
from occstream.pretrain.losses import joint_counts, occupancy_loss
from occstream.pretrain.meter import Meter
from occstream.pretrain.profile import Profile
from occstream.pretrain.replay import EvalData, TrainData
from occstream.pretrain.runconfig import write_config
from occstream.pretrain.tracking import Tracker
from occstream.sharding import storage
from occstream.sharding.order import BY_CONTENT
from occstream.sharding.secrets import redacted

# Settings that a resumed run may change: none of them changes what the same step learns. Data is compared by
# fingerprint, so it may move.
_FREE = (
    "output",
    "track.",
    "eval.",
    "data.url",
    "replay.url",
    "train.init",
    "train.steps",
    "train.epochs",
    "train.zero_stage",
    "train.save_every",
    "train.keep",  # and keep_every, keep_best
    "train.upload",
    "train.log_",
    "train.threads",
    "train.data_timeout",
    "train.timeout_minutes",
    "train.profile",
    "train.skip_nonfinite",
    "train.kernels",
    "train.compile",
)


@dataclass
class Result:
    """What a run ended with. ``stopped`` says who asked it to end early; it is saved and can go on."""

    steps: int
    samples: int
    loss: float
    samples_per_s: float
    evaluation: EvalResult | None
    checkpoint: Path | None
    parts: dict[str, float] = field(default_factory=dict)
    stopped: str = ""


def create_model(config: Config) -> nn.Module:
    """The network of a recipe; its initial weights depend only on ``train.seed``."""
    seed_everything(config.train.seed)
    return build_model(
        config.model_name,
        config.model,
        grid=config.voxel_grid,
        num_classes=config.classes.num_classes,
        image_size=tuple(config.augment.image_size),
        semantic=config.stage == "finetune",
    )


def accelerate(model: nn.Module, device: torch.device, with_kernels: bool, compiled: bool, tf32: bool = False) -> None:
    """Turns on what makes steps faster on CUDA; nothing changes on the CPU, and no name of a parameter anywhere. Torch itself
    lets convolutions take TF32 where nobody says otherwise: here they do what ``tf32`` says, as matrix products do.

    Raises:
        ImportError: kernels are wanted and Triton is missing.
    """
    kernels.use(with_kernels and device.type == "cuda")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if compiled and device.type == "cuda":
        compile_encoder(model)


def compile_encoder(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the backbone alone: it is most of the FLOPs, and its shapes do not change. Activation checkpointing stays
    outside: it runs the compiled function again."""
    model.images.levels = torch.compile(model.images.levels, dynamic=False, backend=backend)


def at_precision(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """The same network, whose forward computes in the recipe's precision as the engine's does in training."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    return model


def train(config: Config, world: World) -> Result:
    """Pre-trains or fine-tunes by the recipe, resuming from the newest complete checkpoint of ``config.output``.

    Raises:
        ValueError: recipe, data, checkpoint or initial weights do not fit each other, or another job trains there.
        FloatingPointError: loss or gradients are not finite (the step is not taken).
    """
    run = Path(config.output)
    lock = RunLock(run, world)
    try:
        return _train(config, world, run)
    finally:
        lock.close()


def _train(config: Config, world: World, run: Path) -> Result:
    cfg = config.train
    data = TrainData(config, world)
    held_out = EvalData(config, world, data.cameras)
    if cfg.keep_best and not held_out.total:
        raise ValueError(
            f"train.keep_best={cfg.keep_best}, but there is nothing to evaluate on; set data.holdout or eval.url"
        )
    total = data.steps
    for note in (*data.notes, *held_out.notes):
        _say(world, note)

    model = create_model(config)
    _check_strategy(config, model)
    keeper = Keeper(config, world)
    saved = keeper.newest()
    if saved:
        _check_same_run(config, data, saved)
        checkpoint.load_declared(model, saved.tensors("model"), model.state_dict(), str(saved.path))
    elif cfg.init:
        weights, expected = checkpoint.read_weights(cfg.init), model.transfer_keys()
        fresh = checkpoint.load_declared(model, weights, expected, cfg.init, model.dropped_keys())
        left = len(weights) - len(expected)
        _say(
            world,
            f"started from {cfg.init}: all {len(expected)} declared tensors loaded, {len(fresh)} new"
            f"{f', {left} left behind' if left else ''}",
        )

    parameters = sum(p.numel() for p in model.parameters())
    accelerate(model, world.device, cfg.kernels, cfg.compile, cfg.tf32)
    engine = build_engine(model, cfg, world)
    ema = Ema(engine.module, cfg) if cfg.ema else None
    step, run_state = 0, {}
    if saved:
        run_state = saved.state
        step = run_state["step"]
        load_optimizer_state(engine, saved.tensors("optimizer"), run_state["groups"], world)
        if ema:
            ema.updates = run_state["ema_updates"]
            averaged = saved.tensors("ema")
            for name, tensor in float_state(engine.module):
                ema.values[name].copy_(to_local(tensor, averaged[name], world))
        # Checkpoints of earlier versions name no rule: their order hung on the content of the data.
        data.load_state_dict(run_state["data"], run_state.get("order", BY_CONTENT))
        if data.rule == BY_CONTENT:
            _say(
                world, "goes on in the order by content, as the checkpoint was trained; new runs are ordered by scenes"
            )
        _say(world, f"resumed from {saved.path} at step {step}")

    tracker = Tracker(
        run,
        config.track.uri,
        config.track.experiment,
        name=run.name,
        tags={"stage": config.stage, "seed": str(cfg.seed), "data_fingerprint": data.fingerprint, **config.track.tags},
        params={
            **config.to_dict(),
            **{f"{name}_fingerprint": value for name, value in data.fingerprints.items()},
            "world_size": world.size,
            "parameters": parameters,
            **{f"unknown_share.{key}": share for key, share in data.unknown.items()},
            "code": _code_version(),
        },
        active=world.is_main,
        key=run_state.get("run_key") or "",
        run_id=run_state.get("mlflow_run_id") or "",
    )
    _say(world, f"numbers go to {run / EVENTS} and to MLflow: {describe_uri(config.track.uri)}")
    if world.is_main:
        write_config(run, config, world.size, saved, tracker)
    guard = FiniteGuard(engine, cfg, run, world, data.heard)
    watchdog = Watchdog(run, world, cfg.timeout_minutes)
    meter = Meter(step, total, data, world, cfg.precision == "bf16", not cfg.compile)
    status, last, evaluation, path = "FAILED", {}, None, saved.path if saved else None
    keys = (run / f"keys-rank-{world.rank}.txt").open("a") if cfg.log_keys else None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stopper(run, world))
        stack.callback(lambda: tracker.close(status))
        stack.callback(watchdog.close)
        stack.callback(data.close)
        profile = stack.enter_context(Profile(run, world, tracker, cfg.profile))
        if config.eval.every and 0 < step < total and step % config.eval.every == 0 and keeper.unscored(step):
            # The run was stopped between the checkpoint and its evaluation.
            keeper.scored(step, _evaluate(config, engine, ema, held_out, tracker, step, world))
        while step < total and not data.wished:
            watchdog.alive()
            # Dropout is a function of the step too, so a resumed run draws what an uninterrupted one would.
            seed_everything(cfg.seed, step, world.rank, 1)
            rate = learning_rate(step * cfg.batch, total * cfg.batch, cfg)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            log_now = (step + 1) % cfg.log_every == 0 or step + 1 == total
            parts: dict[str, Tensor | float] = {}
            guard.begin(step)
            counts, batches = None, data.micro_batches(cfg.accumulate, stop.wanted())
            for batch in batches:
                with meter.counting():
                    with meter.forward():
                        outputs = engine(batch)
                    counts = joint_counts(outputs, batches, config.loss, data.flags) if counts is None else counts
                    loss, values = occupancy_loss(outputs, batch, config.loss, counts)
                    guard.backward(loss, batch.keys, data.flags)
                if keys:
                    print(step, *batch.keys, file=keys, flush=True)
                for name, value in {"loss": loss.detach(), **values}.items():
                    parts[name] = parts.get(name, 0.0) + value / cfg.accumulate
                taken = guard.step()
            if ema and taken:
                ema.update()
            step += 1
            meter.step()
            profile.step()
            log_now &= taken
            evaluate_now = config.eval.every and step % config.eval.every == 0 and step < total
            save_now = bool(cfg.save_every and step % cfg.save_every == 0) or step == total
            save_now |= bool(evaluate_now and cfg.keep_best)  # the best can only be kept of what is saved
            if log_now or save_now or evaluate_now or data.wished:
                guard.settle()
            save_now |= data.wished

            if log_now:
                last = {f"train/{name}": value for name, value in _mean_over_ranks(parts, world).items()}
                last["opt/lr"] = rate
                last["opt/grad_norm"] = float(guard.norm)
                last |= meter.metrics()
                if cfg.skip_nonfinite:
                    last["train/left_out"] = float(guard.skipped)
                tracker.log(step, last)
                if world.is_main:
                    meter.show(step, last)
            if save_now:
                with meter.paused(), watchdog.off():
                    path = keeper.save(data, engine, ema, step, tracker)
            if evaluate_now and not data.wished:
                with meter.paused(), watchdog.off():
                    keeper.scored(step, _evaluate(config, engine, ema, held_out, tracker, step, world))
        if step < total:
            status = "KILLED"  # MLflow's word for a run that was told to stop; it is RUNNING again when it goes on
            stop.honoured()
        else:
            with watchdog.off():
                evaluation = _evaluate(config, engine, ema, held_out, tracker, step, world, config.eval.pictures)
                keeper.scored(step, evaluation)
            status = "FINISHED"
        keeper.close()
    return Result(
        steps=step,
        samples=step * cfg.batch,
        loss=last.get("train/loss", float("nan")),
        samples_per_s=meter.samples_per_s,
        evaluation=evaluation,
        checkpoint=path,
        parts={k: v for k, v in last.items() if k.startswith("train/")},
        stopped="" if status == "FINISHED" else stop.reason or "another rank",
    )


def _evaluate(config, engine, ema, frames: EvalData, tracker, step, world, pictures: int = 0) -> EvalResult | None:
    if not frames.total:
        return None
    with ema.applied(engine.module) if ema else contextlib.nullcontext():
        drawer = Drawer(
            config, frames.cameras, pictures if world.is_main else 0, Path(config.output) / "pictures", step
        )
        result = evaluate_on(config, engine, frames, drawer)
    tracker.log_result(step, result.metrics())
    for picture in drawer.done:
        tracker.artifact(picture)
    _say(world, f"step {step}: evaluated {result.frames} frames: {result.summary()}")
    return result


def evaluate_on(config: Config, model: nn.Module, frames: EvalData, drawer: Drawer | None = None) -> EvalResult:
    """Evaluates by the recipe's conventions (collective)."""
    return evaluate(
        model,
        frames,
        taxonomy=config.classes,
        grid=config.voxel_grid,
        convention=frames.convention,
        mask=config.eval.mask,
        unknown=frames.unknown,
        kind=config.loss.kind,
        threshold=config.eval.threshold,
        expected=frames.total,
        watch=drawer,
    )


def evaluate_checkpoint(path: str | Path, overrides: Sequence[str] = (), picture: Path | None = None) -> EvalResult:
    """Evaluates a checkpoint in this process alone, by the recipe it was trained with.

    Args:
        path: a run's folder or one of its checkpoints.
        overrides: of the recipe, for example ``eval.url=…``.
        picture: folder for pictures of ``eval.pictures`` scenes, at least one.

    Raises:
        ValueError: no complete checkpoint, data that does not fit, or nothing to evaluate on.
    """
    trained = load_trained(path, overrides)
    config, world = trained.config, trained.world
    frames = EvalData(config, world, trained.cameras)
    if not frames.total:
        raise ValueError("nothing to evaluate on: the recipe holds no scenes out; give --data or eval.scene_names=[…]")
    for note in frames.notes:
        print(note)
    # Asked for by name: at least one, whatever the recipe was trained with.
    drawer = Drawer(config, frames.cameras, max(1, config.eval.pictures), picture, trained.step) if picture else None
    result = evaluate_on(config, trained.model, frames, drawer)
    for path in drawer.done if drawer else ():
        print(f"wrote {path}")
    return result


@dataclass
class Trained:
    """A network with the weights of a checkpoint, in this process alone, in evaluation mode.

    Attributes:
        config: the recipe it was trained with, plus overrides.
        model: on the device of ``world``.
        cameras: names in order.
        path, step: of the checkpoint.
        digest: of its weights; names them in what is made by them.
    """

    config: Config
    model: nn.Module
    world: World
    cameras: tuple[str, ...]
    path: Path
    step: int
    digest: str


def load_trained(path: str | Path, overrides: Sequence[str] = (), number: int = 0) -> Trained:
    """Opens a run's folder or one of its checkpoints; averaged weights where there are any. It computes as in training, by
    the recipe's precision and kernels, but is not compiled; prints on which device and how.

    Args:
        number: of this process, among several that share a machine's GPUs.

    Raises:
        ValueError: no complete checkpoint there, an override does not fit, or a GPU that cannot be used.
    """
    device = pick_device(number, share=True)
    print(f"device: {describe(device)}", flush=True)
    saved = checkpoint.Checkpoint(path)
    config = parse_config(merge(redacted(saved.state["config"]), parse_overrides(overrides)))
    world, cfg = World(0, 1, device), config.train
    model = create_model(config)
    checkpoint.load_declared(model, saved.weights(), model.state_dict(), str(saved.path))
    accelerate(model.to(device), device, cfg.kernels, False, cfg.tf32)
    used = "with Triton kernels" if cfg.kernels and device.type == "cuda" else "without Triton kernels"
    print(f"computes in {cfg.precision}, {used} (train.precision, train.kernels)", flush=True)
    return Trained(
        config,
        at_precision(model, cfg.precision, device).eval(),
        world,
        tuple(saved.state["cameras"]),
        saved.path,
        saved.state["step"],
        saved.digest,
    )


class Drawer:
    """Draws the first frame of each of the first scenes of an evaluation.

    Attributes:
        done: files written.
    """

    def __init__(self, config: Config, cameras: tuple[str, ...], scenes: int, folder: Path, step: int):
        self.config, self.cameras, self.scenes, self.folder, self.step = config, cameras, scenes, folder, step
        self.done: list[Path] = []
        self._seen: set[str] = set()

    def __call__(self, batch: OccBatch, outputs: OccOutputs) -> None:
        for index, key in enumerate(batch.keys):
            scene = key.rpartition("-")[0]
            if not key or len(self.done) == self.scenes or scene in self._seen:
                continue
            self._seen.add(scene)
            path = self.folder / f"{key}-step-{self.step:08d}.png"
            prediction_picture(
                path,
                batch,
                outputs,
                index=index,
                grid=self.config.voxel_grid,
                taxonomy=self.config.classes,
                cameras=self.cameras,
                kind=self.config.loss.kind,
                threshold=self.config.eval.threshold,
                title=f"{key}, {self.config.stage} step {self.step}",
            )
            self.done.append(path)


def _mean_over_ranks(parts: Mapping[str, Tensor], world: World) -> dict[str, float]:
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in parts.values()])
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return dict(zip(parts, values.tolist()))


def _check_strategy(config: Config, model: nn.Module) -> None:
    """Raises ValueError if the recipe asks for what the model's head strategy cannot learn."""
    strategy = config.model.strategy
    if config.replay.url and config.stage == "finetune" and not model.predicts_binary:
        raise ValueError(
            f"strategy {strategy} has no binary head, so replayed binary frames teach nothing: set replay.url= (empty), "
            "or model.strategy to intermediate or multi"
        )
    if strategy == "offboard" and config.train.init:
        raise ValueError("strategy offboard has no pre-training stage: set train.init= (empty)")


def _check_same_run(config: Config, data: TrainData, saved: checkpoint.Checkpoint) -> None:
    """Raises ValueError if the folder holds another run than the one that is asked for."""
    # Parsed: settings that did not exist then had their defaults.
    was = redacted(_as_meant(saved.state["config"]))
    old, new = flatten(parse_config(was).to_dict()), flatten(config.to_dict())
    if config.replay.url and "replay_normaliser" not in saved.state["config"].get("loss", {}):
        old["loss.replay_normaliser"] = "joint"  # what was done before there was a choice
    # Labels choose the voxels of an offboard model: there the limit changes nothing that is learned.
    free = (*_FREE, "model.cap") if config.model.strategy == "offboard" else _FREE
    changed = [k for k in new if old.get(k) != new[k] and not k.startswith(free)]
    if changed:
        first = changed[0]
        raise ValueError(
            f"{saved.path} was trained with {first}={old.get(first)}, this run has {first}={new[first]}"
            f"{f' (and {len(changed) - 1} more differ)' if changed[1:] else ''}; "
            "choose another output= for a new run, or the old settings to resume"
        )
    if saved.state["fingerprints"] != data.fingerprints:
        raise ValueError(
            f"{saved.path} was trained on other data ({saved.state['fingerprints']}, now {data.fingerprints}); "
            "choose another output= for a new run"
        )


def _as_meant(config: dict) -> dict:
    """A checkpoint's settings, with what those of earlier versions, which have fewer, meant."""
    if "resize_relative" not in config.get("augment", {}):
        return merge(config, {"augment": {"resize_relative": True}})
    return config


def _code_version() -> str:
    """Commit of the checkout this runs from ("+" if it has changes), else ``OCCSTREAM_COMMIT`` (set in the image, which
    has no .git), else the version of the installed package."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("OCCSTREAM_COMMIT") or metadata.version("occstream")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


class Keeper:
    """Saves, finds, uploads and removes the checkpoints of a run; methods are collective."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.root = Path(config.output) / "checkpoints"
        self.uploader = checkpoint.Uploader(config.train.upload) if config.train.upload and world.is_main else None

    def newest(self) -> checkpoint.Checkpoint | None:
        """What to go on from, the same on every rank; see ``resume.newest``."""
        saved, uploaded = resume.newest(self.root, self.config.train.upload, self.world)
        for path in checkpoint.complete_steps(self.root) if self.uploader else ():
            if checkpoint.step_of(path) > uploaded:
                self.uploader.add(path)  # what an earlier start did not get to
        return saved

    def save(self, data: TrainData, engine, ema, step: int, tracker: Tracker) -> Path:
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
                "cameras": list(data.cameras),
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
                _say(self.world, f"step {step}: {best} is not a number here, so this checkpoint cannot be the best")
        if self.world.is_main and result is not None and (self.root / f"step-{step:08d}").exists():
            checkpoint.add_scores(self.root, step, result.metrics())
            self.prune()

    def unscored(self, step: int) -> bool:
        """Whether the checkpoint of a step waits for its evaluation."""
        return self.world.agree(None, self.world.is_main and str(step) not in checkpoint.read_scores(self.root))

    def prune(self) -> None:
        train = self.config.train
        busy = list(self.uploader.busy) if self.uploader else []
        checkpoint.prune(self.root, train.keep, train.keep_every, train.keep_best, busy)

    def close(self) -> None:
        """Waits for uploads, as long as a store may be away."""
        if self.uploader and not self.uploader.close(60 * max(5.0, storage.minutes())):
            _say(
                self.world,
                f"not everything is at {self.config.train.upload}; start the run again to upload what is left",
            )
