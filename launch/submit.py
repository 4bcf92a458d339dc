"""``occstream submit``: what a checkpoint finds in every frame of a packed nuScenes split, as the benchmarks take it: boxes,
classes of points, or panoptic points."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from occstream.evaluation.detection import BoxSet
from occstream.evaluation.instances import Segments
from occstream.evaluation.panopticscores import point_things
from occstream.evaluation.submission import (
    Inputs,
    Split,
    global_boxes,
    write_detection,
    write_lidarseg,
    write_meta,
    write_panoptic,
)
from occstream.pretrain.config import merge, parse_config, parse_overrides
from occstream.pretrain.reading import cache, device_batches, open_stream
from occstream.pretrain.streams import check_manifest
from occstream.pretrain.tasks.base import Task, without_replaced
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.trained import Trained, load_trained
from occstream.sharding.contract import DROPPED
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import evaluation_batches
from occstream.sharding.poses import compose
from occstream.sharding.schema import OCC3D, Frame, frame_key, sweep_to_key_ego, swept
from occstream.sharding.stream import ShardReader

Kind = Literal["detection", "lidarseg", "panoptic"]


def submit(
    checkpoint: str | Path,
    url: str,
    out: str,
    overrides: tuple[str, ...] = (),
    *,
    kind: Kind = "detection",
    split: Split = "val",
) -> tuple[int, int]:
    """Writes a submission of all frames of a data set. That of boxes is complete or not at all; those of points have
    ``submission.json`` last.

    Args:
        checkpoint: a run's folder or one of its checkpoints.
        url: the data set, packed from nuScenes: its frames and sweeps have the tokens of nuScenes.
        out: the JSON file or URL; of points the folder.
        overrides: of the recipe, such as ``detect.score_threshold=0.05``.
        kind: boxes, classes of points, or panoptic points.
        split: for the names of files of points.

    Returns:
        Numbers of samples, and of boxes or points.

    Raises:
        ValueError: the run does not find that or has other classes than the benchmark, or a frame cannot be read.
    """
    trained, manifest = load_trained(checkpoint, overrides), Manifest.load(url)
    task = task_of(trained.config)
    _check(trained, task, kind, manifest)
    inputs, total = Inputs(**dict.fromkeys(task.inputs, True)), 0
    records: dict[str, Any] = {}
    for frame, found in _of_frames(trained, manifest, kind):
        if isinstance(found, BoxSet):
            if frame.token in records:
                raise ValueError(f"{url}: frames have the same token {frame.token!r}; pack them from nuScenes")
            records[frame.token] = global_boxes(frame.token, found, _to_global(trained, frame))
            total += len(records[frame.token])
            continue
        token = _sweep_token(url, frame, found)
        if token in records:
            raise ValueError(f"{url}: sweeps have the same token {token!r}; pack them from nuScenes")
        records[token] = None
        if kind == "lidarseg":
            write_lidarseg(out, split, token, found.classes)
        else:
            ids = np.where(np.isin(found.classes, list(point_things(OCC3D))), found.instances, 0)
            write_panoptic(out, split, token, found.classes, instances=ids)
        total += len(found.classes)
    if missing := sum(scene.frames for scene in manifest.scenes) - len(records):
        frames = len(records) + missing
        raise ValueError(f"{url}: {missing} of {frames} frames cannot be read (named above); pack their scenes again")
    if kind == "detection":
        write_detection(out, records, inputs)
    else:
        write_meta(out, split, inputs, "segmentation" if kind == "panoptic" else None)
    return len(records), total


def _check(trained: Trained, task: Task, kind: Kind, manifest: Manifest) -> None:
    """Raises ValueError unless the run finds what the benchmark asks for, and the data set has its points."""
    if trained.config.taxonomy != "occ3d":
        raise ValueError(
            f"{trained.path}: has taxonomy {trained.config.taxonomy!r}; the benchmark has the classes of occ3d"
        )
    if kind != "lidarseg" and not task.detects:
        raise ValueError(
            f"{trained.path}: is of stage {trained.config.stage}, which finds no boxes; give one of a detector"
        )
    if kind == "detection":
        return
    if not task.segments:
        raise ValueError(
            f"{trained.path}: is of stage {trained.config.stage}, which gives points no classes; give one of a segmentor"
        )
    if dropped := [scene.name for scene in manifest.scenes if scene.attributes.get(DROPPED)]:
        raise ValueError(
            f"{manifest.url}: points of {len(dropped)} scenes without finite coordinates were dropped when packed (such as of "
            f"{dropped[0]}), and the benchmark counts them"
        )


def _to_global(trained: Trained, frame: Frame) -> np.ndarray:
    """(4, 4): frame of the boxes -> global."""
    if frame.ego_to_global is None:
        raise ValueError(f"frame {frame.key} has no ego pose; pack its set from nuScenes")
    if trained.config.voxel_grid.frame == "ego":
        return frame.ego_to_global
    return compose(frame.ego_to_global, sweep_to_key_ego(frame, swept(frame)))


def _sweep_token(url: str, frame: Frame, found: Segments) -> str:
    token = swept(frame).token
    if token is None:
        raise ValueError(
            f"{url}: frame {frame.key} does not know the token of its sweep; pack the set again from nuScenes"
        )
    if len(found.classes) != len(swept(frame).xyz):
        raise ValueError(f"frame {frame.key}: {len(found.classes)} labels for {len(swept(frame).xyz)} points")
    return token


def _of_frames(trained: Trained, manifest: Manifest, kind: Kind) -> Iterator[tuple[Frame, BoxSet | Segments]]:
    """Frames, with their sweeps, and what is found in them; those that can be read."""
    places = {frame_key(s.name, i): (number, i) for number, s in enumerate(manifest.scenes) for i in range(s.frames)}
    reader = ShardReader(manifest, ("lidar",), cache(manifest.url))
    try:
        for key, found in _found(trained, manifest, kind):
            yield reader.frame(*places[key]), found
    finally:
        reader.close()


@torch.no_grad()
def _found(trained: Trained, manifest: Manifest, kind: Kind = "detection") -> Iterator[tuple[str, BoxSet | Segments]]:
    """Key, and boxes in the frame of the labels or segments of points, of every frame that can be read."""
    config, task = trained.config, task_of(trained.config)
    if kind != "detection" and (settings := task.point_settings()):
        config = parse_config(merge(config.to_dict(), parse_overrides(settings)))
        task = task_of(config)
    sample = task.sample("predict", config.data, trained.sensors)
    read = check_manifest(manifest, sample, config)
    scenes, frames = range(len(read.scenes)), [scene.frames for scene in read.scenes]
    plan = evaluation_batches(list(scenes), frames, config.eval.batch, rank=0, world=1)
    with open_stream(read, plan, sample, capacity=config.eval.batch, config=config, world=trained.world) as stream:
        for batch in device_batches(without_replaced(stream, read, sample), trained.world.device):
            # All of it, as if its frames were labeled.
            batch = dataclasses.replace(batch.unlabeled(), labeled=batch.size)
            outputs = trained.model(batch)
            find = task.detections if kind == "detection" else task.point_segments
            for key, found in zip(batch.keys, find(outputs, batch)):
                if key:
                    yield key, found
