"""The numbers of a data card, against counting by hand."""

import dataclasses

import numpy as np
import pytest

from occstream.sharding.attach import attach
from occstream.sharding.datacard import data_card
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import Labels, Scene
from tests.sharding.toy import ToySource


@dataclasses.dataclass(frozen=True)
class Worse(ToySource):
    """The same scenes with labels that miss every other occupied voxel and invent none."""

    def load(self, name):
        scene = super().load(name)
        for frame in scene.frames:
            half = frame.labels.binary & (np.indices(frame.labels.binary.shape).sum(0) % 2 == 0)
            frame.labels = Labels(half, None, np.ones_like(half))
        return Scene(scene.name, scene.frames, scene.attributes)


def test_card(tmp_path):
    pack(ToySource(), str(tmp_path / "data"))
    pack(Worse(), str(tmp_path / "worse"), groups=("labels",))
    attach(str(tmp_path / "data"), str(tmp_path / "worse"), "labels-worse")
    card = data_card(Manifest.load(str(tmp_path / "data")), "labels-worse")
    source = ToySource()
    frames = [f.labels for name in source.scene_names() for f in source.load(name).frames]
    binary = np.stack([f.binary for f in frames])
    assert card["frames"] == len(frames)
    known = np.stack([f.mask_lidar for f in frames])
    binary &= known
    assert card["occupied_share"] == pytest.approx(100 * binary.sum() / known.sum()), "unknown voxels are not free ones"
    assert card["observed_share"] == pytest.approx(100 * np.mean([f.mask_lidar for f in frames]))
    semantic = np.stack([f.semantic for f in frames])
    assert card["class/car"] == pytest.approx(100 * (known & (semantic == 4)).sum() / (known & (semantic < 17)).sum())
    even = np.indices(binary.shape[1:]).sum(0) % 2 == 0
    assert card["labels/precision"] == 100
    assert card["labels/recall"] == pytest.approx(100 * (binary & even).sum() / binary.sum())
    assert card["labels/known_share"] == pytest.approx(100 * known.mean()), "where both know"
