"""Frames of rare classes occur more often: factors, an order with copies, and the table of classes beside a manifest."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occstream.launch import cli
from occstream.sharding.attach import attach
from occstream.sharding.check import verify
from occstream.sharding.frameclasses import FrameClasses, classes_of, collect, table_name
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Copies, Order, Sample, balance, training_batches
from occstream.sharding.pack import merge, pack
from occstream.sharding.schema import IGNORE, OCC3D, Boxes, Frame, Labels
from occstream.sharding.stream import ShardReader, Stream
from tests.sharding.toy import GRID, ToySource

FRAMES = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def test_worked_numbers():
    holds = np.zeros((1100, 3), bool)
    holds[:600, 0] = holds[500:800, 1] = holds[550:600, 2] = holds[800:850, 2] = True
    assert holds.sum(0).tolist() == [600, 300, 100]
    factors = balance(holds)
    weights = [0.745356, 1.054093, 1.825742]
    np.testing.assert_allclose(factors[0], 1, atol=1e-6)  # {0}
    np.testing.assert_allclose(factors[500], weights[1], atol=1e-6)  # {0, 1}
    np.testing.assert_allclose(factors[[550, 800]], weights[2], atol=1e-6)  # {0, 1, 2} and {2}
    np.testing.assert_allclose(factors[[700, 1000]], [weights[1], 1], atol=1e-6)  # {1} and {}
    assert sorted(set(factors.round(6).tolist())) == [1.0, *weights[1:]]


def test_a_class_that_no_frame_holds_changes_nothing():
    holds = np.random.default_rng(0).random((40, 3)) < [0.9, 0.3, 0.1]
    wider = np.concatenate([holds[:, :1], np.zeros((40, 1), bool), holds[:, 1:]], 1)
    np.testing.assert_array_equal(balance(holds), balance(wider))
    np.testing.assert_array_equal(balance(np.zeros((5, 2), bool)), np.ones(5))
    assert balance(np.zeros((0, 2), bool)).shape == (0,)


def order_of(frames, seed=0, factors=None, *, draw=None, per_shard=2, lanes=5, names=None):
    names = names or [f"s{i}" for i in range(len(frames))]
    copies = None if factors is None else Copies(names, frames, np.asarray(factors, float))
    shards = [i // per_shard for i in range(len(frames))]
    numbers = range(100, 100 + len(frames))
    return Order("f", numbers, frames, seed, draw=draw, shards=shards, lanes=lanes, copies=copies)


@given(frames=FRAMES, seed=st.integers(0, 50), lanes=st.integers(1, 9), epoch=st.integers(0, 2), halved=st.booleans())
@settings(deadline=None, max_examples=60)
def test_factors_of_one_are_the_order_without_copies(frames, seed, lanes, epoch, halved):
    draw = max(1, len(frames) // 2) if halved else None
    plain = order_of(frames, seed, draw=draw, lanes=lanes)
    ones = order_of(frames, seed, np.ones(sum(frames)), draw=draw, lanes=lanes)
    count = 2 * sum(frames)
    assert list(islice(plain.samples(epoch, 0), count)) == list(islice(ones.samples(epoch, 0), count))


@given(frames=FRAMES, seed=st.integers(0, 50), lanes=st.integers(1, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_every_frame_as_often_as_its_factor_says(frames, seed, lanes, data):
    factors = data.draw(st.lists(st.floats(1, 4), min_size=sum(frames), max_size=sum(frames)))
    order = order_of(frames, seed, factors, lanes=lanes)
    ends = np.cumsum(frames)
    for epoch in range(2):
        plan = order.epoch(epoch)
        drawn = [plan.sample(i) for i in range(plan.size)]
        assert len(set(drawn)) == plan.size
        counts = Counter((s.scene, s.frame) for s in drawn)
        for scene, length in enumerate(frames):
            for frame in range(length):
                factor, count = factors[ends[scene] - length + frame], counts[100 + scene, frame]
                assert np.floor(factor) <= count <= np.floor(factor) + (factor > np.floor(factor))
                copies = {s.copy for s in drawn if (s.scene, s.frame) == (100 + scene, frame)}
                assert copies == set(range(count))


def test_copies_are_drawn_by_seed_epoch_and_frame_alone():
    frames, factors = [400, 300], np.concatenate([np.full(400, 1.75), np.full(300, 2.25)])
    both = Copies(["a", "b"], frames, factors)
    first = both.counts(np.array([0, 1]), 7, 3)
    np.testing.assert_array_equal(first[400:], Copies(["b"], [300], factors[400:]).counts(np.array([0]), 7, 3))
    np.testing.assert_array_equal(first, both.counts(np.array([1, 0]), 7, 3)[np.r_[300:700, 0:300]])
    assert abs(first[:400].mean() - 1.75) < 0.07
    assert abs(first[400:].mean() - 2.25) < 0.08
    for seed, epoch in ((8, 3), (7, 4)):
        assert (both.counts(np.array([0, 1]), seed, epoch) != first).any()


@given(frames=FRAMES, world=st.integers(1, 6), batch=st.integers(1, 9), skip=st.integers(0, 7))
@settings(deadline=None, max_examples=40)
def test_copies_know_nothing_of_ranks_and_restarts(frames, world, batch, skip):
    factors = np.random.default_rng(len(frames)).uniform(1, 3, sum(frames))
    want = list(islice(order_of(frames, 1, factors).samples(0, 0), batch * 10))
    state = {"epoch": 0, "offset": 0, "batches": 0}
    for _, state in islice(training_batches(order_of(frames, 1, factors), batch, 0, 1), skip):  # noqa: B007
        pass
    state = json.loads(json.dumps(state))
    assert all(type(value) is int for value in state.values())
    ranks = [training_batches(order_of(frames, 1, factors), batch, r, world, **state) for r in range(world)]
    got = [s for _ in range(10 - skip) for r in ranks for s in next(r)[0]]
    assert got == want[skip * batch :]


def test_factors_must_fit():
    for factors in ([1.0], [1.0, 0.5], [1.0, float("nan")], [1.0, 2000.0]):
        with pytest.raises(ValueError, match="need one each"):
            Copies(["a"], [2], np.array(factors))


def test_each_copy_has_random_choices_of_its_own(tmp_path):
    pack(ToySource((2,)), str(tmp_path), grid=GRID)
    manifest, seen = Manifest.load(str(tmp_path)), []
    plan = iter([([Sample(5, 0, 1, copy) for copy in (0, 1)], {})])
    reader = ShardReader(manifest, ("labels",))
    work = lambda frame, epoch, views: seen.append((frame.key, epoch))  # noqa: E731
    with Stream(reader, plan, {}, work, capacity=2, threads=0) as stream:
        next(stream)
    assert seen == [("toy-0-0001", 5), ("toy-0-0001", 5 + (1 << 32))]


def test_a_frame_holds_the_classes_of_its_boxes_and_of_known_occupied_voxels():
    semantic = np.full(GRID.shape, OCC3D.free_id, np.uint8)
    semantic[0, 0, 0], semantic[1, 0, 0], semantic[2, 0, 0] = OCC3D.id("bus"), OCC3D.id("truck"), IGNORE
    known = np.ones(GRID.shape, bool)
    known[1, 0, 0] = False
    boxes = Boxes(np.zeros((2, 7), np.float32), ["pedestrian", "Tram"], ["1", "2"])
    frame = Frame("s", 0, "", 0, np.eye(4), boxes=boxes, labels=Labels(semantic != 17, semantic, known))
    assert classes_of(frame, OCC3D) == ["Tram", "bus", "pedestrian"]
    frame.labels.mask_lidar = None
    assert classes_of(frame, OCC3D) == ["Tram", "bus", "pedestrian", "truck"]
    frame.labels.semantic, frame.boxes = None, None
    assert classes_of(frame, OCC3D) == []


@dataclass(frozen=True)
class Sparse(ToySource):
    """Scenes whose frames differ in what they hold."""

    def load(self, name):
        scene = super().load(name)
        for frame in scene.frames:
            frame.labels.semantic[...] = OCC3D.free_id
            frame.labels.semantic[0, 0, 0] = frame.index
            frame.labels.binary[...] = frame.labels.semantic != OCC3D.free_id
            frame.labels.mask_lidar[...] = True
            frame.boxes.names[:] = ["car", "bus"] if frame.index % 2 else ["car", "car"]
        return scene


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("sparse"))
    pack(Sparse(), url, grid=GRID, scenes_per_shard=2)
    return url


def test_packing_notes_what_frames_hold_outside_the_fingerprint(packed, tmp_path):
    manifest = Manifest.load(packed)
    table = FrameClasses.load(manifest)
    for number, scene in enumerate(manifest.scenes):
        for i in range(scene.frames):
            assert table.names(number, i) == sorted({OCC3D.classes[i], "car", *(["bus"] if i % 2 else [])})
    holds = table.holds([1, 0], ["bus", "train", OCC3D.classes[0]])
    assert holds.tolist() == [[i % 2 == 1, False, i == 0] for i in (*range(5), *range(3))]
    url = str(tmp_path / "parts")
    for part in ((1, 2), (2, 2)):
        pack(Sparse(), url, grid=GRID, scenes_per_shard=2, part=part)
    assert merge(url).fingerprint == manifest.fingerprint
    name = table_name("labels")
    assert (tmp_path / "parts" / name).read_bytes() == (Path(packed) / name).read_bytes()
    again = str(tmp_path / "again")
    pack(Sparse(), again, grid=GRID, scenes_per_shard=2)
    (tmp_path / "again" / name).unlink()
    assert Manifest.load(again).fingerprint == manifest.fingerprint
    pack(Sparse(), again, grid=GRID, scenes_per_shard=2)  # everything is there: records know the classes
    assert (tmp_path / "again" / name).read_bytes() == (Path(packed) / name).read_bytes()


def test_sets_of_earlier_versions_and_sidecars_get_a_table_by_command(packed, tmp_path, capsys):
    url = str(tmp_path)
    manifest = pack(Sparse(), url, grid=GRID, scenes_per_shard=2)
    name = table_name("labels")
    wanted = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    for path in (tmp_path / "labels").glob("*.json"):  # as an earlier version left them
        record = json.loads(path.read_bytes())
        del record["classes"]
        path.write_text(json.dumps(record))
    assert pack(Sparse(), url, grid=GRID, scenes_per_shard=2).fingerprint == manifest.fingerprint
    with pytest.raises(ValueError, match=rf"no table of the classes.*run `occstream classes {url}`$"):
        FrameClasses.load(manifest)
    assert verify(url) == []
    assert cli.main(["classes", url]) == 0
    assert (tmp_path / name).read_bytes() == wanted
    assert "wrote classes.labels.json: 5 classes in 14 frames" in capsys.readouterr().out
    attach(url, packed, "pseudo-a")
    sidecar = manifest.with_sidecar("pseudo-a")
    with pytest.raises(ValueError, match=rf"run `occstream classes {url} --group pseudo-a`$"):
        FrameClasses.load(sidecar)
    assert collect(url, "pseudo-a") == FrameClasses.load(sidecar) == FrameClasses.load(manifest)
    assert verify(url, group="pseudo-a") == []
    pack(Sparse(), str(tmp_path / "points"), groups=("lidar",))
    assert not (tmp_path / "points" / name).exists()
    assert cli.main(["classes", str(tmp_path / "points")]) == 2
    assert "has no labels to take classes from, only lidar" in capsys.readouterr().err


def damaged(url, **changes):
    path = Path(url) / table_name("labels")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "0" * 32}, "is of other labels than those that are there now; run `occstream classes"),
        ({"group": "pseudo-a"}, "another group"),
        ({"classes": ["b", "a"]}, "not sorted"),
        ({"scenes": []}, "not a list of 4"),
        ({"scenes": ["1 1 1", "1 1 1 1 1", "1 1", "1 1 1"]}, "scene toy-3 does not have 4 numbers of 5 bits"),
        ({"scenes": ["1 1 1", "1 1 1 1 1", "1 1", "1 1 1 20"]}, "scene toy-3 does not have 4 numbers of 5 bits"),
        ({"scenes": ["1 1 1", "1 1 1 1 1", "1 1", "1 1 1 -1"]}, "scenes, entry 3"),
        ({"scenes": ["1 1 1", "1 1 1 1 1", "1 1", ["1"]]}, "scenes, entry 3"),
    ],
)
def test_a_damaged_table_is_named(packed, tmp_path, changes, said):
    url = str(tmp_path)
    manifest = pack(Sparse(), url, grid=GRID)
    damaged(url, **changes)
    with pytest.raises(ValueError, match=said) as error:
        FrameClasses.load(manifest)
    assert "\n" not in str(error.value)
    assert len(verify(url)) == 1


def test_verify_compares_the_table_with_the_labels(tmp_path):
    url = str(tmp_path)
    table = FrameClasses.load(pack(Sparse(), url, grid=GRID))
    damaged(url, scenes=[*table.scenes[:2], "18 18", *table.scenes[3:]])
    assert verify(url) == [
        "frame toy-2-0001: holds classes barrier, bus, car, but classes.labels.json says car, others"
    ]
