"""``occstream predict``: predictions of a checkpoint over a packed data set, as a label group beside its images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occstream.evaluation.predict import Keep, predict
from occstream.pretrain.augment import FrameFiller
from occstream.pretrain.replay import camera_names, device_batches, open_stream, unknown_line, unknown_share
from occstream.pretrain.trained import load_trained
from occstream.sharding.attach import Sidecar
from occstream.sharding.codec import Coding, encode
from occstream.sharding.manifest import Manifest, SceneEntry
from occstream.sharding.order import evaluation_batches
from occstream.sharding.schema import Frame
from occstream.sharding.shardfile import ShardWriter
from occstream.sharding.stream import ShardReader


@dataclass
class Predicted:
    """What a call did.

    Attributes:
        manifest: with the predictions as labels; None while other parts are missing.
        frames, voxels, bytes, seconds: made by this call; ``voxels`` have a class.
        skipped: tars that were there.
    """

    manifest: Manifest | None
    frames: int = 0
    voxels: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: int = 0


def predict_checkpoint(
    checkpoint: str | Path,
    url: str,
    name: str,
    *,
    keep: Keep = "top1",
    flips: bool = False,
    truth: int = 0,
    holdout: int = 0,
    part: tuple[int, int] = (1, 1),
    overrides: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Predicted:
    """Predicts all frames of a data set in this process, shard by shard; a rerun goes on where it was.

    Offboard models label the voxels that the set's labels call occupied, other models those that they predict to be.

    Args:
        checkpoint: a run's folder or one of its checkpoints.
        url: the data set.
        name: of the new group, ``pseudo-…``.
        keep, flips: of ``evaluation.predict``.
        truth: the first so many scenes of the nested subset (seed ``data.subset_seed``, ``holdout``) keep the set's own
            labels: training on ground truth and pseudo-labels is then training on this group.
        part: (i, n): only every n-th shard, on the machine's GPU number i - 1 (counted round). The call that finds all parts
            done publishes the manifest.
        overrides: of the recipe, such as ``model.cap=60000``.
        progress: gets shards done and shards in all.

    Raises:
        ValueError: checkpoint, data set and name do not fit each other.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part {part[0]}/{part[1]}: needs i/n with 1 <= i <= n")
    trained = load_trained(checkpoint, overrides, part[0] - 1)
    config = trained.config
    if config.stage != "finetune":
        raise ValueError(f"{trained.path}: is of a pre-training run, which predicts no classes; give a fine-tuned one")
    offboard = config.model.strategy == "offboard"
    base = Manifest.load(url)
    labelled = "labels" in base.groups
    if labelled:
        base.check(config.voxel_grid, config.taxonomy, ("cameras", "labels"))
    elif offboard or truth:
        raise ValueError(f"{url}: has no labels; an offboard model and --truth need them")
    config.data.url, config.loss.depth_weight = url, 0.0
    kept = {base.scenes[i].name for i in base.subset(truth, config.data.subset_seed, holdout)} if truth else set()
    cameras = camera_names(base, 0, trained.cameras)
    if offboard and (share := unknown_share(base, range(len(base.scenes)), config.data.mask, config.data.binary_from)):
        print(unknown_line("data.mask", config.data.mask, share))
    filler = FrameFiller(
        config.augment,
        cameras,
        config.voxel_grid,
        config.classes,
        0,
        False,
        config.data.mask,
        False,
        config.data.binary_from,
        labels=labelled,
        history=config.data.history,
        decode=config.train.decoder == "cpu",
    )
    origin = {
        "checkpoint": trained.digest,
        "keep": keep,
        "flips": flips,
        "truth": sorted(kept),
        "overrides": list(overrides),
    }
    about = f"{keep} of {config.model_name} {config.model.strategy} {trained.digest}"
    about += f", truth for {len(kept)} scenes" if kept else ""
    sidecar = Sidecar(
        base, name, config.voxel_grid, config.taxonomy, config.classes.classes, about, origin, base.convention
    )
    numbers = {scene.name: number for number, scene in enumerate(base.scenes)}
    reader = ShardReader(base, ("labels",) if labelled else ("cameras",))
    done, began = Predicted(None), time.perf_counter()

    def write(writer: ShardWriter, scenes: list[SceneEntry]) -> None:
        made = {}
        chosen = [s for s in scenes if s.name not in kept]
        if chosen:
            plan = evaluation_batches(
                [numbers[s.name] for s in chosen], [s.frames for s in chosen], config.eval.batch, 0, 1
            )
            with open_stream(base, plan, filler, config.eval.batch, config, trained.world) as stream:
                batches = device_batches(stream, trained.world.device)
                made = dict(
                    predict(
                        trained.model,
                        batches,
                        keep=keep,
                        kind=config.loss.kind,
                        threshold=config.eval.threshold,
                        flips=flips,
                        occupied="labels" if offboard else "predicted",
                    )
                )
        for scene in scenes:
            for index in range(scene.frames):
                frame = reader.frame(numbers[scene.name], index)
                labels = made.get(frame.key)
                if labels is None and scene.name not in kept:
                    raise ValueError(
                        f"{base.url}: frame {frame.key} cannot be predicted: an image is missing or damaged (named above); pack "
                        "its scene again, or predict on a set without it"
                    )
                if labels is not None:
                    own = frame.labels if labelled else None
                    labels.mask_lidar = own.mask_lidar if own else None
                    labels.mask_camera = own.mask_camera if own else None
                    frame = Frame(
                        frame.scene, frame.index, frame.token, frame.timestamp, frame.ego_to_global, labels=labels
                    )
                    done.voxels += int(np.count_nonzero(labels.binary))
                members = encode(frame, "labels", Coding())
                writer.add(frame.key, members)
                done.frames += 1
                done.bytes += sum(len(data) for _, data in members)

    try:
        mine = sorted(sidecar.scenes)[part[0] - 1 :: part[1]]
        for count, number in enumerate(mine, 1):
            done.skipped += sidecar.published(number) is not None
            sidecar.write(number, write)
            if progress:
                progress(count, len(mine))
    finally:
        reader.close()
    done.seconds, done.manifest = time.perf_counter() - began, sidecar.publish()
    return done
