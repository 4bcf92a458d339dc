"""Labels whose poses were leveled lie over each other by those poses, wherever frames of a drive meet."""

import dataclasses

import numpy as np
import pytest

from occstream.evaluation.drive import DriveReader, Volumes
from occstream.evaluation.labelnoise import NoiseConfig, attach_corrupted
from occstream.evaluation.propagate import pull, pull_maps
from occstream.evaluation.refinement import RefineConfig, SceneRefiner, make_rule, refine
from occstream.pretrain.volumes import VolumeFiller, WindowConfig
from occstream.sharding.check import verify
from occstream.sharding.codec import decode, encode
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import Labeler, label_scene, labels_to_global
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.poses import inverse
from occstream.sharding.schema import IGNORE, OCC3D, Frame, Labels
from occstream.sharding.sources import open_source
from occstream.sharding.stream import ShardReader
from tests.evaluation.drives import GRID, Street
from tests.sharding.test_labels import road_scene


@dataclasses.dataclass(frozen=True)
class Sinking(Street):
    """The street with poses that sink by 0.4 m a frame, and labels that know better."""

    def frame(self, name: str, number: int, t: int) -> Frame:
        found = super().frame(name, number, t)
        found.labels.ego_to_global = found.ego_to_global.copy()
        found.ego_to_global[2, 3] -= 0.4 * t
        return found


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """One drive by right poses and one by wrong ones with right poses of labels."""
    root = tmp_path_factory.mktemp("leveled")
    for name, source in (("right", Street(scenes=1, frames=4)), ("sinking", Sinking(scenes=1, frames=4))):
        pack(source, str(root / name), groups=("labels",), grid=GRID)
    return root


def test_labels_from_lidar_say_how_they_lie_and_frames_keep_their_poses():
    scene, grid = road_scene(6, 0.25, 0.0), VoxelGrid("small", (-12, -12, -1), (12, 12, 3), (0.5, 0.5, 0.5))
    leveled = label_scene(scene, grid, OCC3D)
    for raw, frame in zip(scene.frames, leveled.frames):
        assert (frame.ego_to_global == raw.ego_to_global).all()
        height = frame.labels.ego_to_global[2, 3]
        assert abs(height) < 0.05 < 0.06 + abs(raw.ego_to_global[2, 3]), "all roads lie on the first"
        assert (labels_to_global(frame, frame.labels, grid) == frame.labels.ego_to_global).all()
    assert max(abs(frame.ego_to_global[2, 3]) for frame in leveled.frames) > 0.2
    plain = label_scene(scene, grid, OCC3D, LabelConfig(level=False))
    assert all(frame.labels.ego_to_global is None for frame in plain.frames)


def test_the_pose_is_stored_and_a_bent_one_is_found(tmp_path):
    frame = Sinking(scenes=1, frames=2).frame("street-0", 0, 1)
    names = [(name.split(".", 1)[1], data) for name, data in encode(frame, "labels")]
    assert (decode([dict(names)]).labels.ego_to_global == frame.labels.ego_to_global).all()
    bent = dataclasses.replace(frame.labels, ego_to_global=np.diag([2.0, 1, 1, 1]))
    source = Street(scenes=1, frames=1)
    object.__setattr__(source, "frame", lambda *_: dataclasses.replace(frame, index=0, labels=bent))
    pack(source, str(tmp_path / "bent"), groups=("labels",), grid=GRID)
    assert "ego_to_global of the labels is not a rigid pose" in " ".join(verify(str(tmp_path / "bent")))


def test_refining_and_a_refiners_window_take_the_labels_poses(street):
    made = []
    for name in ("right", "sinking"):
        url = str(street / name)
        manifest = refine(url, "labels", "pseudo-r", RefineConfig(window=3)).manifest
        reader = ShardReader(manifest, ("pseudo-r",))
        frames = [reader.frame(0, i) for i in range(4)]
        made.append([frame.labels.semantic for frame in frames])
        reader.close()
    assert all((a == b).all() for a, b in zip(*made)), "as if the poses were right"
    assert frames[2].labels.ego_to_global[2, 3] == 70.0, "handed on"
    grid_filler = VolumeFiller(WindowConfig(references=0), "pseudo-r", grid=GRID, taxonomy=OCC3D, truth=False)
    frame = frames[1]
    frame.label_sets = {"pseudo-r": frame.labels}
    frame.window = {1: dataclasses.replace(frames[2], label_sets={"pseudo-r": frames[2].labels})}
    views = {name: np.zeros(f.shape, f.dtype) for name, f in grid_filler.fields().items()}
    grid_filler(frame, 0, views)
    assert abs(views["volumes.to_pivot"][views["volumes.exists"]][:, 2, 3]).max() < 1e-4


def test_grids_in_the_lidar_frame_move_along():
    frame = Street(scenes=1, frames=2, rig=True).frame("street-0", 0, 1)
    lidar = dataclasses.replace(GRID, frame="lidar")
    up = frame.ego_to_global.copy()
    up[2, 3] += 1
    plain = labels_to_global(frame, Labels(np.zeros(GRID.shape, bool)), lidar)
    moved = labels_to_global(frame, Labels(np.zeros(GRID.shape, bool), ego_to_global=up), lidar)
    np.testing.assert_allclose(moved @ inverse(plain), up @ inverse(frame.ego_to_global), atol=1e-6)


@pytest.mark.slow
def test_a_real_drive_with_leveled_labels_is_refined(shared_data, tmp_path):
    """scene-9001, a fifth of the cubes of 2 m in a wrong class: right where five key-frames or more speak."""
    grid = VoxelGrid("near", (-24, -24, -1), (24, 24, 5.4), (0.4, 0.4, 0.4))
    url = str(tmp_path / "9001")
    source = open_source("nuscenes", {"root": str(shared_data / "nuscenes"), "scenes": ["scene-9001"]})
    labeler = Labeler(grid, "occ3d", LabelConfig(max_rays=20_000, ray_frames=3))
    pack(source, url, groups=("labels",), grid=grid, label=labeler)
    noise = NoiseConfig(lost=0, wrong=0.2, swollen=0, far=1, out_of_view=1, cube=2.0)
    attach_corrupted(url, "pseudo-a", noise)
    config, base = RefineConfig(), Manifest.load(url)
    reader = DriveReader(base, "pseudo-a", "known")
    truth = ShardReader(base, ("labels",))
    refiner = SceneRefiner(reader, make_rule(config, base), config, device="cpu")
    frames = list(refiner.frames(0))
    poses = np.stack([source.pose for source, _ in frames])
    volumes = Volumes.of(reader, 0, len(frames), [])
    slots = [volumes.slot(i) for i in range(len(frames))]
    right = before = seen = 0
    for index, (said, refined) in enumerate(frames):
        maps = pull_maps(grid, said.pose, grid, poses)
        nothing = np.full(grid.shape, IGNORE, np.uint8)
        spoke = pull(refiner.rule, maps, volumes.packed, slots, before=nothing, details=True, device="cpu").frames
        true = truth.frame(0, index).labels.semantic
        asked = (true < OCC3D.num_classes) & (spoke >= 5)
        seen += asked.sum()
        before, right = before + (said.semantic == true)[asked].sum(), right + (refined == true)[asked].sum()

    assert seen > 10_000
    assert before / seen < 0.85
    assert right / seen >= 0.95
