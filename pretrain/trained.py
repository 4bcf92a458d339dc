"""Networks that are trained: opening a checkpoint, evaluating it, drawing what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from occstream.evaluation.evaluate import EvalResult, evaluate
from occstream.evaluation.panopticpictures import animate
from occstream.models import Batch
from occstream.pretrain import checkpoint
from occstream.pretrain.config import Config, merge, parse_config, parse_overrides
from occstream.pretrain.device import describe, pick_device
from occstream.pretrain.distributed import World
from occstream.pretrain.networks import accelerate, at_precision, create_model, settled
from occstream.pretrain.reading import cache
from occstream.pretrain.renamed import saved_settings
from occstream.pretrain.streams import EvalData, open_manifest
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.schema import Frame
from occstream.sharding.stream import ShardReader


def evaluate_on(model: nn.Module, frames: EvalData, drawer: Drawer | None = None) -> EvalResult:
    """Evaluates as the recipe's task scores (collective). Raises ValueError if there is nothing to evaluate on."""
    if frames.scoring is None:
        raise ValueError("there is nothing to evaluate on; set data.holdout or eval.url")
    return evaluate(model, frames, frames.scoring.metric(), expected=frames.total, watch=drawer)


def evaluate_checkpoint(
    path: str | Path, overrides: Sequence[str] = (), picture: Path | None = None, *, movie: bool = False
) -> EvalResult:
    """Evaluates a checkpoint in this process alone, by the recipe it was trained with.

    Args:
        path: a run's folder or one of its checkpoints.
        overrides: of the recipe, for example ``eval.url=…``.
        picture: folder for pictures of ``eval.pictures`` scenes, at least one.
        movie: draw every frame of these scenes, and an animation of each.

    Raises:
        ValueError: no complete checkpoint, data that does not fit, or nothing to evaluate on.
    """
    trained = load_trained(path, overrides)
    config, world = trained.config, trained.world
    frames = EvalData(config, world, trained.sensors)
    if not frames.total:
        raise ValueError("nothing to evaluate on: the recipe holds no scenes out; give --data or eval.scene_names=[…]")
    for note in frames.notes:
        print(note)
    # Asked for by name: at least one, whatever the recipe was trained with.
    drawer = None
    if picture:
        scenes = max(1, config.eval.pictures)
        drawer = Drawer(config, frames.sensors, scenes=scenes, folder=picture, step=trained.step, movie=movie)
        drawer.task.cameras_of = _CameraReader(config.eval.url or config.data.url).frame
    result = evaluate_on(trained.model, frames, drawer)
    for path in (*drawer.done, *drawer.animations()) if drawer else ():
        print(f"wrote {path}")
    return result


@dataclass
class Trained:
    """A network with the weights of a checkpoint, in this process alone, in evaluation mode.

    Attributes:
        config: the recipe it was trained with, plus overrides.
        model: on the device of ``world``.
        sensors: names that samples are made of, in order.
        path, step: of the checkpoint.
        digest: of its weights; names them in what is made by them.
        scenes: names of all that they were trained on; None: not known.
    """

    config: Config
    model: nn.Module
    world: World
    sensors: tuple[str, ...]
    path: Path
    step: int
    digest: str
    scenes: frozenset[str] | None = None


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
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one, wherever its tensors are
    saved = checkpoint.Checkpoint(path)
    config = parse_config(merge(saved_settings(saved.state), parse_overrides(overrides)))
    world = World(0, 1, device)
    config = settled(config, world)
    cfg = config.train
    model = create_model(config)
    checkpoint.load_declared(model, saved.weights(), model.state_dict(), origin=str(saved.path))
    accelerate(model.to(device), device, cfg.kernels, tf32=cfg.tf32)
    kind = "Triton" if device.type == "cuda" else "compiled CPU"
    used = f"{'with' if cfg.kernels else 'without'} {kind} kernels"
    print(f"computes in {cfg.precision}, {used} (train.precision, train.kernels)", flush=True)
    return Trained(
        config,
        at_precision(model, cfg.precision, device).eval(),
        world,
        tuple(checkpoint.sensors(saved.state)),
        saved.path,
        saved.state["step"],
        saved.digest,
        checkpoint.scenes(saved.state),
    )


class _CameraReader:
    """Frames with their cameras, for pictures: a network of LiDAR alone reads none."""

    def __init__(self, url: str) -> None:
        manifest = open_manifest(url)
        groups = tuple(group for group in ("cameras", "labels") if group in manifest.groups)
        self.reader = ShardReader(manifest, groups, cache(url)) if "cameras" in groups else None
        self.scenes = {scene.name: number for number, scene in enumerate(manifest.scenes)}

    def frame(self, key: str) -> Frame | None:
        """By its key; None where the data set has no cameras, or they cannot be read."""
        scene, _, index = key.rpartition("-")
        try:
            return self.reader.frame(self.scenes[scene], int(index)) if self.reader else None
        except (OSError, ValueError) as error:
            print(f"drawn without cameras: {error}")
            return None


class Drawer:
    """Draws the first frame of each of the first scenes of an evaluation; for a movie all their frames.

    Attributes:
        done: files written.
    """

    def __init__(
        self, config: Config, sensors: tuple[str, ...], *, scenes: int, folder: Path, step: int, movie: bool = False
    ) -> None:
        self.config, self.sensors, self.scenes, self.folder, self.step = config, sensors, scenes, folder, step
        self.task, self.movie = task_of(config), movie
        self.done: list[Path] = []
        self._seen: dict[str, list[Path]] = {}

    def __call__(self, batch: Batch, outputs: Any) -> None:
        """Draws the frames of a batch whose scenes are still to be drawn."""
        for index, key in enumerate(batch.keys):
            scene = key.rpartition("-")[0]
            if not key or (len(self._seen) == self.scenes if scene not in self._seen else not self.movie):
                continue
            path = self.folder / f"{key}-step-{self.step:08d}.png"
            title = f"{key}, {self.config.stage} step {self.step}"
            if self.task.draw(path, batch, outputs, index=index, sensors=self.sensors, title=title):
                self.done.append(path)
                self._seen.setdefault(scene, []).append(path.with_stem(f"{path.stem}{self.task.movie}"))

    def animations(self) -> list[Path]:
        """Writes those of scenes of which more than one frame was drawn."""
        written = []
        for scene, pictures in self._seen.items():
            if len(there := [picture for picture in sorted(pictures) if picture.exists()]) > 1:
                written.append(self.folder / f"{scene}-step-{self.step:08d}.gif")
                animate(written[-1], there)
        return written
