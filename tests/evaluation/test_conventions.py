"""Each benchmark's own way to average, against its procedure written out slowly, and scores by range."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from occstream.evaluation.metrics import CONVENTIONS, ConfusionMatrix, RangedCounts, ranges_of
from occstream.pretrain.tasks.occupancy import OccupancyEval
from occstream.sharding.attach import attach
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import CONVENTIONS as NAMES
from occstream.sharding.schema import Labels
from occstream.sharding.sources import open_source
from tests.sharding import layouts


def test_label_sets_and_metrics_know_the_same_conventions():
    assert set(CONVENTIONS) == set(NAMES)
    choices = OccupancyEval.__dataclass_fields__["convention"].type
    assert all(repr(name)[1:-1] in choices for name in (*NAMES, "auto"))


def matrix_of(rows, convention: str) -> ConfusionMatrix:
    """From the histogram of a script whose class 0 is free; our free comes last."""
    theirs = torch.tensor(rows)
    order = [*range(1, len(theirs)), 0]
    matrix = ConfusionMatrix(len(theirs) - 1, CONVENTIONS[convention])
    matrix.counts = theirs[order][:, order]
    return matrix


def test_golden_numbers_of_semantickitti():
    absent = [[5, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert matrix_of(absent, "semantickitti").miou() == pytest.approx(0.25, abs=1e-9)
    assert matrix_of(absent, "occ3d").miou() == pytest.approx(0.5, abs=1e-9)
    whole = matrix_of([[5, 1, 0], [1, 2, 0], [0, 1, 3]], "semantickitti")
    assert whole.iou() == pytest.approx(0.75)
    assert whole.class_iou()[:2].tolist() == pytest.approx([0.4, 0.75])
    assert whole.miou() == pytest.approx(0.575, abs=1e-9)


def test_nothing_there_is_zero_in_openscene_and_nan_elsewhere():
    for name in NAMES:
        matrix = ConfusionMatrix(3, CONVENTIONS[name])
        matrix.counts[3, 3] = 7  # all free, and found so
        zero_iou, zero_miou = name == "openscene", name in ("openscene", "semantickitti")
        assert matrix.iou() == 0 if zero_iou else math.isnan(matrix.iou())
        assert matrix.miou() == 0 if zero_miou else math.isnan(matrix.miou())


# The procedures of the benchmarks, voxel by voxel. Classes 0..k-1, free k, truth 255 is ignored.


def slow_counts(truth, found, k):
    tp, fp, fn = np.zeros(k + 1), np.zeros(k + 1), np.zeros(k + 1)
    for t, f in zip(truth, found):
        if t == 255:
            continue
        if t == f:
            tp[t] += 1
        else:
            fp[f] += 1
            fn[t] += 1
    return tp, fp, fn


def slow_occ3d(truth, found, k):
    tp, fp, fn = slow_counts(truth, found, k)
    scores = [tp[c] / (tp[c] + fp[c] + fn[c]) for c in range(k) if tp[c] + fp[c] + fn[c]]
    return sum(scores) / len(scores)


def slow_openscene(truth, found, k):
    tp, fp, fn = slow_counts(truth, found, k)
    return sum(tp[c] / (tp[c] + fp[c] + fn[c] + 1e-5) for c in range(k)) / k


def slow_semantickitti(truth, found, k):
    tp, fp, fn = slow_counts(truth, found, k)
    return sum(tp[c] / (tp[c] + fp[c] + fn[c] + 1e-15) for c in range(k)) / k


def slow_openoccupancy(truth, found, k):
    """The mean over 1..16 of its 17 classes; what is noise in the truth is ignored by whoever reads the labels."""
    tp, fp, fn = slow_counts(truth, found, k)
    scores = [tp[c] / (tp[c] + fp[c] + fn[c]) for c in range(1, k) if tp[c] + fp[c] + fn[c]]
    return sum(scores) / len(scores)


def slow_lidarseg(truth, found, k):
    """Points of class 0 are dropped by their truth; the mean is over the classes after it that occur."""
    return slow_openoccupancy([255 if t == 0 else t for t in truth], found, k)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("missing", [(), (5,), (2, 5)])
def test_every_convention_equals_its_procedure(name, missing):
    rng = np.random.default_rng(len(missing))
    k = 7
    truth, found = rng.integers(0, k + 1, 400), rng.integers(0, k + 1, 400)
    found = np.where(rng.random(400) < 0.5, truth, found)
    for c in missing:
        truth[truth == c], found[found == c] = k, k
    truth[rng.random(400) < 0.1] = 255
    matrix = ConfusionMatrix(k, CONVENTIONS[name])
    matrix.update(torch.from_numpy(found), torch.from_numpy(truth))
    slow = {
        "occ3d": slow_occ3d,
        "openscene": slow_openscene,
        "openoccupancy": slow_openoccupancy,
        "semantickitti": slow_semantickitti,
        "lidarseg": slow_lidarseg,
    }[name]
    assert matrix.miou() == pytest.approx(slow(truth, found, k), abs=1e-9)
    known = truth != 255
    if name == "lidarseg":
        known &= truth != 0
    hit, either = known & (truth < k) & (found < k), known & ((truth < k) | (found < k))
    assert matrix.iou() == pytest.approx(hit.sum() / either.sum(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "number", "convention"),
    [
        ("nuscenes", 1, "occ3d"),
        ("nuscenes", 2, "openoccupancy"),
        ("nuscenes", 3, "openoccupancy"),
        ("occ3d", 0, "occ3d"),
        ("openscene", 0, "openscene"),
        ("semantickitti", 0, "semantickitti"),
        ("sscbench", 0, "semantickitti"),
        ("waymo_occ3d", 0, "occ3d"),
    ],
)
def test_the_labels_say_which_convention_is_theirs(name, number, convention, tmp_path):
    source = open_source(name, layouts.LAYOUTS[name][number](tmp_path))
    assert source.convention == convention
    # Sets that were packed before say nothing: the same is found from their classes and grid.
    old = Manifest("", name, source.grid, source.taxonomy.name, source.taxonomy.classes, "native", ("labels",), (), ())
    found, how = old.metric_convention()
    assert found == convention
    assert how.startswith("inferred from ")


class Relabel:
    """Labels that somebody made: everything occupied."""

    version = "all-1"

    def __call__(self, scene):
        for frame in scene.frames:
            frame.labels = Labels(np.ones(get_grid("openscene").shape, bool))
        return scene


def test_the_convention_travels_with_the_manifest(tmp_path):
    source = open_source("openscene", layouts.openscene(tmp_path / "in"))
    url = str(tmp_path / "out")
    pack(source, url, groups=("labels",))
    manifest = Manifest.load(url)
    assert manifest.metric_convention() == ("openscene", "declared by the labels")
    assert Manifest.from_content(url, manifest.content()).fingerprint == manifest.fingerprint
    attach(url, url, "labels-again")
    assert Manifest.load(url).with_sidecar("labels-again").convention == "openscene"
    # Labels of another kind do not inherit it.
    pack(
        dataclasses.replace(source, grid=None),
        str(tmp_path / "lidar"),
        groups=("labels",),
        grid=source.grid,
        label=Relabel(),
    )
    attach(url, str(tmp_path / "lidar"), "labels-lidar")
    assert Manifest.load(url).with_sidecar("labels-lidar").convention == ""


def test_ranges_of_semantickitti_are_the_published_columns():
    grid = get_grid("semantickitti")
    ranges = ranges_of(grid)
    assert list(ranges.named) == ["12.8 m", "25.6 m", "51.2 m"]
    inside = {name: torch.isin(ranges.shell, torch.tensor(parts)) for name, parts in ranges.named.items()}
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[:64, 96:160] = True
    assert torch.equal(inside["12.8 m"], expected)
    expected[:128, 64:192] = True
    assert torch.equal(inside["25.6 m"], expected)
    assert inside["51.2 m"].all()


def test_near_and_far_of_symmetric_grids():
    grid = get_grid("openscene")
    ranges = ranges_of(grid)
    assert list(ranges.named) == ["near 25 m", "far 25 m"]
    near = ranges.shell == 0
    assert near.sum() == 100 * 100
    assert near[50:150, 50:150].all()
    assert ranges_of(get_grid("tiny")).named == {}, "all of it is near"
    coarse = ranges_of(grid, (100, 100, 16))
    assert torch.equal(coarse.shell, ranges.shell[::2, ::2])


def test_one_pass_gives_the_histogram_of_every_range():
    grid = VoxelGrid("forward", (0, -25.6, -2), (51.2, 25.6, 4.4), (3.2, 3.2, 3.2))
    ranges, rule = ranges_of(grid), CONVENTIONS["semantickitti"]
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (2, *grid.shape), generator=g)
    found = torch.randint(0, 4, truth.shape, generator=g)
    truth[torch.rand(truth.shape, generator=g) < 0.1] = 255
    counts = RangedCounts(3, rule, ranges)
    for i in range(2):
        counts.update(found[i : i + 1], truth[i : i + 1])
    for name, limit in (("12.8 m", 12.8), ("25.6 m", 25.6), ("51.2 m", 51.2)):
        centers = grid.centers()
        keep = torch.from_numpy((centers[..., 0] < limit) & (np.abs(centers[..., 1]) < limit / 2))
        alone = ConfusionMatrix(3, rule)
        alone.update(found, truth, keep.expand(truth.shape))
        assert torch.equal(counts.matrix(name).counts, alone.counts)
    whole = ConfusionMatrix(3, rule)
    whole.update(found, truth)
    assert torch.equal(counts.matrix().counts, whole.counts)
