"""Label groups of a data set against its truth, scene by scene, and a table of them that is paired by scene."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats

from occstream.evaluation.drive import label_manifest
from occstream.evaluation.metrics import ConfusionMatrix
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import IGNORE
from occstream.sharding.stream import ShardReader

LEVEL = 0.95
SCORES = ("IoU", "mIoU")


def score_groups(
    url: str, groups: Sequence[str], scenes: Sequence[int], *, truth: str = "labels", camera: bool = False
) -> dict[str, np.ndarray]:
    """Voxels by truth and by what a group says.

    Args:
        url: the data set.
        groups: of labels with classes.
        scenes: numbers.
        truth: group to compare with; what its ``mask_lidar`` does not know is not counted.
        camera: count only what its ``mask_camera`` knows.

    Returns:
        By group (scenes, K + 1, K + 1) int64, rows truth, the last class free.

    Raises:
        ValueError: a group is not there, has other classes or another grid, or says nothing where the truth does.
    """
    base = Manifest.load(url)
    true = label_manifest(base, truth)
    classes = len(true.classes)
    out = {}
    for group in groups:
        manifest = label_manifest(base, group)
        if not manifest.label_grid.same_voxels(true.label_grid) or manifest.classes != true.classes:
            raise ValueError(f"{url}: {group} has another grid or other classes than {truth}, so it cannot be scored")
        readers = ShardReader(true, (truth,)), ShardReader(manifest, (group,))
        counts = np.zeros((len(scenes), classes + 1, classes + 1), np.int64)
        for number, scene in enumerate(scenes):
            matrix = ConfusionMatrix(classes)
            for index in range(base.scenes[scene].frames):
                frames = [reader.frame(scene, index) for reader in readers]
                matrix.update(*(torch.from_numpy(each) for each in _pair(frames, group, url, camera)))
            counts[number] = matrix.counts.numpy()
        for reader in readers:
            reader.close()
        out[group] = counts
    return out


def _pair(frames: Sequence, group: str, url: str, camera: bool) -> tuple[np.ndarray, np.ndarray]:
    """What is said, and the truth, IGNORE where it does not count."""
    true, said = (frame.labels for frame in frames)
    where = f"{url}: frame {frames[0].key}"
    if true is None or true.semantic is None or said is None or said.semantic is None:
        raise ValueError(f"{where} has no classes to score {group} by")
    known = true.known() if not camera else true.mask_camera
    if known is None:
        raise ValueError(f"{where} has no mask_camera; score without mask camera")
    truth = np.where(known, true.semantic, IGNORE)
    if ((said.semantic == IGNORE) & (truth != IGNORE)).any():
        raise ValueError(f"{where} of {group} says nothing at voxels that the truth knows")
    return np.where(truth == IGNORE, 0, said.semantic), truth


def scores_of(counts: np.ndarray) -> tuple[float, float]:
    """IoU and mIoU in percent of (K + 1, K + 1) counts; the mean is over the classes that the truth has, so it is over the same
    ones whatever is said. NaN where nothing is occupied."""
    hit, true = counts.diagonal(), counts.sum(1)
    union = counts.sum(0) + true - hit
    there = true[:-1] > 0
    if not there.any():
        return math.nan, math.nan
    solid = counts[:-1, :-1].sum() / (counts.sum() - hit[-1])
    return 100 * float(solid), 100 * float((hit[:-1][there] / union[:-1][there]).mean())


def paired(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """Gain of a row over another and half of its 95 % interval (Student's t over scenes), for each of SCORES.

    A scene's gain is that of the mean over the seeds of each row. NaN as half an interval: there is one scene.

    Args:
        first, other: one (scenes, K + 1, K + 1) of each seed, of the same scenes.
    """
    per_scene = [np.mean([[scores_of(c) for c in counts] for counts in row], axis=0) for row in (first, other)]
    found = []
    for gain in (per_scene[1] - per_scene[0]).T:
        gain, n = gain[~np.isnan(gain)], int((~np.isnan(gain)).sum())
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * gain.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        found.append((float(gain.mean()) if n else math.nan, float(half)))
    return found


def table(rows: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Markdown: every row's IoU and mIoU over all scenes (mean and sample standard deviation over seeds), and its gain by scene
    over the first row.

    Args:
        rows: by words, as ``paired`` takes them.
    """
    first = next(iter(rows))
    head = [
        "", "seeds", *(f"{name}, %" for name in SCORES), *(f"{name} by scene against {first}, 95 %" for name in SCORES),
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for words, seeds in rows.items():
        each = np.array([scores_of(counts.sum(0)) for counts in seeds])
        cells = [_spread(each[:, n]) for n in range(len(SCORES))]
        gains = paired(rows[first], seeds) if words != first else []
        cells += [f"{gain:+.2f} ± {half:.2f}" for gain, half in gains] or ["–"] * len(SCORES)
        lines.append("| " + " | ".join([words, str(len(seeds)), *cells]) + " |")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")
