"""The shard job: parts, kills, reruns, failures, estimates, options; attach."""

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from occstream.launch import cli
from occstream.sharding import storage
from occstream.sharding.attach import attach
from occstream.sharding.check import inspect, verify
from occstream.sharding.codec import Coding, decode, encode
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import Job, estimate, merge, pack
from occstream.sharding.prepare import Images, shrink
from occstream.sharding.schema import Camera, Scene
from occstream.sharding.stream import ShardReader
from tests.forked import Forked
from tests.pretrain.small import ROOT, environment
from tests.sharding.test_shards import digests
from tests.sharding.toy import GRID, ToySource, toy_frame

COUNTS = (3, 2, 1, 4, 2, 3, 1, 2, 3)
HERE = Path(__file__).parent


def run_part(folder: Path, url: str, part: list[int], kill_at: int, env=None) -> int:
    """Exit code of one that is killed at a step; its log is in a folder."""
    job = json.dumps({"url": url, "part": part, "kill_at": kill_at})
    return Forked([HERE / "killed.py", job], env or environment(), folder / "part.log").wait(120)


def kill_and_finish(folder: Path, url: str, part: list[int], rng: random.Random, env=None, kills: int = 2) -> None:
    """Runs a part, killed at random steps, until it is done."""
    for _ in range(kills):
        assert run_part(folder, url, part, rng.randrange(1, 30), env) in (0, -9), (folder / "part.log").read_text()
    assert run_part(folder, url, part, 0, env) == 0, (folder / "part.log").read_text()


@pytest.mark.process
def test_killed_parts_merged_equal_one_run(tmp_path):
    whole = tmp_path / "whole"
    pack(ToySource(COUNTS), str(whole), grid=GRID, scenes_per_shard=2)
    parts, rng = tmp_path / "parts", random.Random(7)
    for i in (3, 1, 4):
        kill_and_finish(tmp_path, str(parts), [i, 4], rng)
    with pytest.raises(ValueError, match="part 2/4 is not finished"):
        merge(str(parts))
    assert not (parts / "manifest.json").exists()
    kill_and_finish(tmp_path, str(parts), [2, 4], rng)
    merge(str(parts))
    left = {
        name: digest for name, digest in digests(parts).items() if "/." not in name
    }  # a killed copy's temporary file
    assert left == digests(whole)
    assert verify(str(parts)) == []


@pytest.mark.process
def test_more_parts_than_shards(tmp_path):
    """The last machines have nothing to do, and the whole is complete all the same."""
    whole = pack(ToySource((2, 1)), str(tmp_path / "whole"), grid=GRID)
    for i in (1, 2, 3):
        assert pack(ToySource((2, 1)), str(tmp_path / "parts"), grid=GRID, part=(i, 3), workers=2) is None
    assert merge(str(tmp_path / "parts")).fingerprint == whole.fingerprint


def test_parts_of_different_jobs_do_not_merge(tmp_path):
    pack(ToySource(), str(tmp_path), grid=GRID, part=(1, 2))
    pack(ToySource((3, 5, 2, 4, 1)), str(tmp_path), grid=GRID, part=(2, 2))
    with pytest.raises(ValueError, match="parts of different jobs"):
        merge(str(tmp_path))
    with pytest.raises(ValueError, match="no finished parts there"):
        merge(str(tmp_path / "nothing"))


@dataclass(frozen=True)
class Fragile(ToySource):
    """Fails on some scenes, after two frames of one were written."""

    bad: tuple[str, ...] = ()

    def load(self, name: str) -> Scene:
        scene = super().load(name)
        if name in self.bad:
            scene.frames[1].cameras["CAM_A"].jpeg = b"broken"
        return scene

    def __repr__(self) -> str:
        return f"Fragile({self.counts})"  # what is broken in its files is not a setting


def test_failures_are_collected_and_left_out_and_retried(tmp_path):
    broken, repaired = Fragile(bad=("toy-1", "toy-2")), Fragile()
    with pytest.raises(ValueError, match=r"scene toy-1 of toy: frame toy-1-0001, CAM_A: not a JPEG"):
        pack(broken, str(tmp_path / "a"), grid=GRID, scenes_per_shard=2)
    with pytest.raises(ValueError, match=r"toy-2.*\(2 failures, 1 allowed\)"):
        pack(broken, str(tmp_path / "a"), grid=GRID, scenes_per_shard=2, max_failures=1)
    assert not (tmp_path / "a/manifest.json").exists()
    manifest = pack(broken, str(tmp_path / "a"), grid=GRID, scenes_per_shard=2, max_failures=2)
    assert manifest.left_out == ("toy-1", "toy-2")
    assert [s.name for s in manifest.scenes] == ["toy-0", "toy-3"]
    assert verify(str(tmp_path / "a")) == []
    assert "left out     2 scenes that failed: toy-1, toy-2" in inspect(str(tmp_path / "a"))
    # The files are repaired: what failed is made again, and the set is as if nothing had ever been wrong.
    pack(repaired, str(tmp_path / "a"), grid=GRID, scenes_per_shard=2)
    pack(repaired, str(tmp_path / "b"), grid=GRID, scenes_per_shard=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.process
def test_no_manifest_while_shards_are_replaced(tmp_path, tmp_path_factory):
    """Other settings over a published set: a kill in the middle must not leave the old manifest over new shards."""
    pack(ToySource(COUNTS), str(tmp_path), grid=GRID, scenes_per_shard=2, coding=Coding(level=3))
    assert (tmp_path / "manifest.json").exists()
    assert run_part(tmp_path_factory.mktemp("log"), str(tmp_path), [1, 1], 25) == -9
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.process
def test_full_disk_is_one_clear_error_and_a_rerun_finishes(tmp_path):
    url, script, error = tmp_path / "set", tmp_path / "full.py", tmp_path / "error"
    script.write_text(
        "import resource, sys\nfrom occstream.launch.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\nsys.exit(main())"
    )
    command = ["shard", "synthetic", "scenes=3", "frames=2", "image_size=[32, 88]", "--grid", "tiny", "--out", url]
    assert Forked([script, *command], environment(), tmp_path / "full.log", errors=error).wait(120) == 2
    said = error.read_text()
    assert said.count("\n") == 1
    assert "File too large" in said
    assert "set TMPDIR to a larger disk" in said
    assert not (url / "manifest.json").exists()
    again = Forked([ROOT / "launch/cli.py", *command], environment(), tmp_path / "again.log")
    assert again.wait(120) == 0, again.log.read_text()
    assert verify(str(url)) == []


def test_estimate_is_near_what_the_job_writes(tmp_path, capsys):
    source = ToySource(counts=(4,) * 12)
    found = estimate(Job(source, str(tmp_path / "set"), grid=GRID))
    assert not (tmp_path / "set").exists()
    manifest = pack(source, str(tmp_path / "set"), grid=GRID)
    assert (found.scenes, found.shards, found.frames) == (12, 12, manifest.num_frames)
    for group in manifest.groups:
        real = sum(s.size for s in manifest.shards if s.group == group)
        assert found.bytes[group] == pytest.approx(real, rel=0.5)
    command = ["shard", "synthetic", "scenes=5", "frames=1", "image_size=[32,88]", "--grid", "tiny", "--dry-run"]
    assert cli.main([*command, "--out", str(tmp_path / "dry"), "--workers", "2", "--part", "1/4"]) == 0
    text = capsys.readouterr().out
    assert "5 scenes, 5 shards a group" in text
    assert "4 x 2 workers" in text
    assert not (tmp_path / "dry").exists()


def test_lidar_steps_are_declared_and_within_half_a_step():
    frame = toy_frame("s", 1)
    frame.lidar.xyz = (np.random.default_rng(0).normal(size=(5000, 3)) * 20).astype(np.float32)
    frame.lidar.intensity = frame.lidar.ring = None
    lossless, lossy = (encode(frame, "lidar", Coding(lidar_step=step)) for step in (0.0, 0.002))
    assert sum(len(d) for _, d in lossy) < 0.7 * sum(len(d) for _, d in lossless)
    head = json.loads(lossy[0][1])["arrays"]["xyz"]
    assert (head["coding"], head["step"], head["stored"]) == ("steps", 0.002, "<i4")
    got = decode([{n[len(frame.key) + 1 :]: d for n, d in lossy}]).lidar.xyz
    assert got.dtype == np.float32
    assert np.abs(got - frame.lidar.xyz).max() <= 0.001 + 1e-5
    frame.lidar.xyz = frame.lidar.xyz.clip(-60, 60)
    assert json.loads(encode(frame, "lidar", Coding(lidar_step=0.002))[0][1])["arrays"]["xyz"]["stored"] == "<i2"


@pytest.mark.parametrize("size", [(900, 1600), (450, 731), (256, 704)])
def test_shrunk_images_keep_projecting_to_the_same_place(size):
    """A bright dot is found where the new intrinsics project its point to."""
    height, width = size
    intrinsics = np.array([[0.8 * width, 0, width / 2 - 3.2], [0, 0.8 * width, height / 2 + 2.7], [0, 0, 1]])
    point = np.array([0.21, -0.13, 1.0])
    u, v, _ = intrinsics @ point
    image = np.zeros((height, width, 3), np.uint8)
    cv2.circle(image, (round(u * 16), round(v * 16)), 12 * 16, (255, 255, 255), -1, cv2.LINE_AA, 4)
    jpeg = simplejpeg.encode_jpeg(image, 95, "BGR")
    small = shrink(Camera(jpeg, width, height, intrinsics, np.eye(4), np.eye(4), 0), 256, 95)
    assert min(small.width, small.height) == 256
    got = simplejpeg.decode_jpeg(small.jpeg, "GRAY")[..., 0].astype(float)
    assert got.shape == (small.height, small.width)
    rows, columns = np.mgrid[: small.height, : small.width]
    center = np.array([(columns * got).sum(), (rows * got).sum()]) / got.sum()
    np.testing.assert_allclose(center, (small.intrinsics @ point)[:2], atol=0.12)


def test_image_options_by_command(tmp_path, capsys):
    command = ["shard", "synthetic", "scenes=2", "frames=1", "image_size=[64,176]", "lidar=false", "--grid", "tiny"]
    command += ["--groups", "cameras,labels", "--short-side", "32", "--jpeg-quality", "80", "--zstd-level", "3"]
    url = str(tmp_path / "set")
    assert cli.main([*command, "--cameras", "CAM_FRONT,CAM_BACK", "--out", url]) == 0
    frame = ShardReader(Manifest.load(url), ("cameras",)).frame(1, 0)
    assert sorted(frame.cameras) == ["CAM_BACK", "CAM_FRONT"]
    assert (frame.cameras["CAM_FRONT"].width, frame.cameras["CAM_FRONT"].height) == (88, 32)
    assert cli.main([*command, "--cameras", "CAM_TOP", "--out", str(tmp_path / "other")]) == 2
    assert "has no camera 'CAM_TOP', only CAM_FRONT" in capsys.readouterr().err


class TestAttach:
    @pytest.fixture
    def base(self, tmp_path):
        return pack(ToySource(), str(tmp_path / "base"), groups=("cameras", "labels"), grid=GRID, scenes_per_shard=2)

    def test_labels_join_by_frame_and_touch_nothing(self, base, tmp_path):
        before = digests(Path(base.url))
        other = pack(Inverted(), str(tmp_path / "labels"), groups=("labels",), grid=GRID, scenes_per_shard=3)
        joined = attach(base.url, other.url, "pseudo-a")
        after = digests(Path(base.url))
        assert {k: v for k, v in after.items() if k in before} == before
        assert Manifest.load(base.url).sidecars() == ["pseudo-a"]
        assert joined.groups == ("cameras", "pseudo-a")
        assert joined.fingerprint == Manifest.load(base.url).with_sidecar("pseudo-a").fingerprint != base.fingerprint
        plain, swapped = ShardReader(base, base.groups), ShardReader(joined, joined.groups)
        for scene, entry in enumerate(base.scenes):
            for index in range(entry.frames):
                a, b = plain.frame(scene, index), swapped.frame(scene, index)
                assert a.cameras["CAM_A"].jpeg == b.cameras["CAM_A"].jpeg
                np.testing.assert_array_equal(a.labels.binary, ~b.labels.binary)
        assert verify(base.url, group="pseudo-a") == []
        assert attach(base.url, other.url, "pseudo-a").fingerprint == joined.fingerprint
        assert digests(Path(base.url)) == after

    def test_what_does_not_fit_is_named(self, base, tmp_path):
        fewer = pack(ToySource((3, 5, 2)), str(tmp_path / "fewer"), groups=("labels",), grid=GRID)
        shorter = pack(ToySource((3, 5, 2, 1)), str(tmp_path / "shorter"), groups=("labels",), grid=GRID)
        with pytest.raises(ValueError, match="has no labels of scene toy-3"):
            attach(base.url, fewer.url, "pseudo-a")
        with pytest.raises(ValueError, match=r"has 1 frames of scene toy-3, .* has 4"):
            attach(base.url, shorter.url, "pseudo-a")
        with pytest.raises(ValueError, match="call it labels-… or pseudo-…"):
            attach(base.url, base.url, "cameras")
        with pytest.raises(ValueError, match="has no sidecar group 'pseudo-b'; there are: none"):
            base.with_sidecar("pseudo-b")

    def test_a_sidecar_of_another_version_is_refused(self, base, tmp_path):
        attach(base.url, base.url, "labels-old")
        pack(ToySource((3, 5, 2, 4, 1)), base.url, groups=("cameras", "labels"), grid=GRID, scenes_per_shard=2)
        with pytest.raises(ValueError, match="was attached to a data set with fingerprint"):
            Manifest.load(base.url).with_sidecar("labels-old")

    def test_frames_of_another_drive_are_found_by_verify(self, base, tmp_path):
        other = pack(Elsewhere(), str(tmp_path / "labels"), groups=("labels",), grid=GRID)
        attach(base.url, other.url, "labels-x")
        problems = verify(base.url, group="labels-x")
        assert "groups cameras, labels-x differ in ego_to_global: they do not belong together" in problems[0]


@dataclass(frozen=True)
class Inverted(ToySource):
    """The toy scenes with the opposite labels."""

    def load(self, name: str) -> Scene:
        scene = super().load(name)
        for frame in scene.frames:
            solid = ~frame.labels.binary
            frame.labels = dataclasses.replace(
                frame.labels, binary=solid, semantic=np.where(solid, 4, 17).astype(np.uint8)
            )
        return scene


@dataclass(frozen=True)
class Elsewhere(ToySource):
    def load(self, name: str) -> Scene:
        scene = super().load(name)
        for frame in scene.frames:
            frame.ego_to_global = frame.ego_to_global + 1e-3 * np.eye(4, k=3)
        return scene


@pytest.mark.slow
def test_label_attach_and_subset_by_command(tmp_path, capsys):
    """Labels from LiDAR alongside the synthetic truth, and training on them."""
    options = ["scenes=4", "frames=2", "image_size=[32,88]", "--grid", "tiny"]
    base, made = str(tmp_path / "base"), str(tmp_path / "made")
    assert cli.main(["shard", "synthetic", *options, "--out", base]) == 0
    assert cli.main(["label", "synthetic", *options, "--min-points", "2", "--out", made]) == 0
    assert Manifest.load(made).labels.startswith("lidar-")
    assert cli.main(["attach", base, made, "--name", "labels-lidar"]) == 0
    assert "train with data.labels=labels-lidar" in capsys.readouterr().out
    assert cli.main(["verify", base, "--group", "labels-lidar", "--sample", "50%"]) == 0
    picture = tmp_path / "picture.png"
    assert cli.main(["preview", base, "--frame", "1", "--group", "labels-lidar", "--out", str(picture)]) == 0
    assert cv2.imread(str(picture)).shape[1] > 1000
    capsys.readouterr()
    lists = []
    for count in ("2", "3"):
        assert cli.main(["subset", base, "--scenes", count, "--seed", "3"]) == 0
        lists.append(capsys.readouterr().out.split())
    assert lists[1][:2] == lists[0]
    assert len(set(lists[1])) == 3
    assert cli.main(["label", "synthetic", *options, "--quality", "--every", "2"]) == 0
    text = capsys.readouterr().out
    assert "8 sweeps left out" in text
    assert "IoU with exact truth" in text


def test_own_grids_and_names_that_are_none(tmp_path):
    grid = get_grid("-10,-10,-1,10,10,3,0.5,lidar")
    assert (grid.shape, grid.frame) == ((40, 40, 8), "lidar")
    assert get_grid("-10,-10,-1,10,10,3,0.5,0.5,1").shape == (40, 40, 4)
    for name in ("tinny", "1,2,3", "-10,-10,-1,10,10,3,0.3"):
        with pytest.raises(ValueError, match=r"unknown grid|is not a whole number"):
            get_grid(name)
    with pytest.raises(ValueError, match="needs i/n"):
        pack(ToySource(), str(tmp_path), grid=GRID, part=(3, 2))
    assert Images(cameras=("CAM_A",))(toy_frame("s", 0)).cameras.keys() == {"CAM_A"}
    assert storage.listing(str(tmp_path / "none")) == {}
