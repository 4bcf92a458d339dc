"""``occstream submit``: boxes that a checkpoint finds in every frame of a packed nuScenes split, as the benchmark takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from occstream.evaluation.detection import BoxSet
from occstream.evaluation.submission import Inputs, global_boxes, write_detection
from occstream.pretrain.reading import cache, device_batches, open_stream
from occstream.pretrain.streams import check_manifest
from occstream.pretrain.tasks.base import without_replaced
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.trained import Trained, load_trained
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import evaluation_batches
from occstream.sharding.schema import frame_key
from occstream.sharding.stream import ShardReader


def submit(checkpoint: str | Path, url: str, out: str, overrides: tuple[str, ...] = ()) -> tuple[int, int]:
    """Writes a detection submission of all frames of a data set, complete or not at all.

    Args:
        checkpoint: a run's folder or one of its checkpoints.
        url: the data set, packed from nuScenes: its frames have the tokens of samples.
        out: the JSON file or URL.
        overrides: of the recipe, such as ``detect.score_threshold=0.05``.

    Returns:
        Numbers of samples and of boxes.

    Raises:
        ValueError: the run finds no boxes or has other classes than the benchmark, or a frame cannot be read.
    """
    trained, manifest = load_trained(checkpoint, overrides), Manifest.load(url)
    if trained.config.taxonomy != "occ3d":
        raise ValueError(
            f"{trained.path}: has taxonomy {trained.config.taxonomy!r}; the benchmark has the classes of occ3d"
        )
    if not task_of(trained.config).detects:
        raise ValueError(
            f"{trained.path}: is of stage {trained.config.stage}, which finds no boxes; give one of a detector"
        )
    if trained.config.voxel_grid.frame != "ego":
        raise ValueError(f"{trained.path}: finds boxes in the LiDAR's frame; submissions need a grid in the ego frame")
    places = {
        frame_key(scene.name, index): (number, index)
        for number, scene in enumerate(manifest.scenes)
        for index in range(scene.frames)
    }
    records = {}
    reader = ShardReader(manifest, ("lidar",), cache(manifest.url))
    try:
        for key, found in _found(trained, manifest):
            frame = reader.frame(*places[key])
            if frame.ego_to_global is None:
                raise ValueError(f"{url}: frame {key} has no ego pose; pack it from nuScenes")
            if frame.token in records:
                raise ValueError(f"{url}: frames have the same token {frame.token!r}; pack them from nuScenes")
            records[frame.token] = global_boxes(frame.token, found, frame.ego_to_global)
    finally:
        reader.close()
    if missing := len(places) - len(records):
        raise ValueError(
            f"{url}: {missing} of {len(places)} frames cannot be read (named above); pack their scenes again"
        )
    write_detection(out, records, Inputs(lidar=True))
    return len(records), sum(map(len, records.values()))


@torch.no_grad()
def _found(trained: Trained, manifest: Manifest) -> Iterator[tuple[str, BoxSet]]:
    """Key and boxes, in the frame's ego axes, of every frame that can be read."""
    config, task = trained.config, task_of(trained.config)
    sample = task.sample("predict", config.data, trained.sensors)
    read = check_manifest(manifest, sample, config)
    scenes, frames = range(len(read.scenes)), [scene.frames for scene in read.scenes]
    plan = evaluation_batches(list(scenes), frames, config.eval.batch, rank=0, world=1)
    with open_stream(read, plan, sample, capacity=config.eval.batch, config=config, world=trained.world) as stream:
        for batch in device_batches(without_replaced(stream, read, sample), trained.world.device):
            for key, found in zip(batch.keys, task.detections(trained.model(batch), batch)):
                if key:
                    yield key, found
