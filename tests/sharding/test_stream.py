"""Order and stream: the same samples whatever the world size, threads and restarts."""

from __future__ import annotations

import json
import threading
import time
import weakref
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occstream.sharding import stream as stream_module
from occstream.sharding.codec import CorruptSample, IncompleteSample
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import (
    Order,
    Quotas,
    Sample,
    by_content,
    by_scenes,
    evaluation_batches,
    share,
    training_batches,
)
from occstream.sharding.pack import pack
from occstream.sharding.storage import ShardCache
from occstream.sharding.stream import Field, ShardReader, Stream
from tests.sharding.toy import GRID, ToySource

FRAMES = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def make_order(frames, seed=0, draw=None, identity="f"):
    return Order(identity, range(100, 100 + len(frames)), frames, seed, draw=draw)


@given(frames=FRAMES, seed=st.integers(0, 99), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_holds_every_frame_once(frames, seed, epoch):
    plan = make_order(frames, seed).epoch(epoch)
    drawn = [plan.sample(i) for i in range(plan.size)]
    assert sorted((s.scene, s.frame) for s in drawn) == [(100 + i, f) for i, n in enumerate(frames) for f in range(n)]
    assert {s.epoch for s in drawn} == {epoch}


@given(frames=FRAMES, world=st.integers(1, 8), batch=st.integers(1, 9), skip=st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_world_size_and_restarts_do_not_change_the_sequence(frames, world, batch, skip):
    order = make_order(frames)
    want = list(islice(order.samples(0, 0), batch * 10))
    state = {"epoch": 0, "offset": 0, "batches": 0}
    for _, state in islice(training_batches(make_order(frames), batch, 0, 1), skip):  # noqa: B007
        pass
    ranks = [training_batches(make_order(frames), batch, r, world, **state) for r in range(world)]
    got = []
    for _ in range(10 - skip):
        parts = [next(r) for r in ranks]
        assert len({tuple(p[1].items()) for p in parts}) == 1
        got += [s for part in parts for s in part[0]]
    assert got == want[skip * batch :]


def test_seed_epoch_and_data_change_the_order():
    frames = [10] * 20
    base = list(islice(make_order(frames).samples(0, 0), 200))
    for other in (make_order(frames, seed=1), make_order(frames, identity="g")):
        assert list(islice(other.samples(0, 0), 200)) != base
    next_epoch = list(islice(make_order(frames).samples(1, 0), 200))
    assert [(s.scene, s.frame) for s in next_epoch] != [(s.scene, s.frame) for s in base]


def test_the_order_is_frozen():
    """Changing it silently would break every resume: bump the format if this has to change."""

    def first(identity):
        return [(s.scene, s.frame) for s in islice(make_order([4, 4, 4], 7, None, identity).samples(0, 0), 8)]

    assert first(by_scenes("abc", [4, 4, 4])) == [
        (102, 2),
        (101, 0),
        (100, 0),
        (102, 3),
        (101, 3),
        (100, 2),
        (102, 0),
        (101, 1),
    ]
    before = [(100, 1), (101, 0), (102, 1), (100, 3), (101, 1), (102, 2), (100, 0), (101, 3)]
    assert first(by_content("f", range(100, 103))) == before


def test_an_order_by_scenes_hangs_on_their_names_and_lengths_alone():
    base = by_scenes(["a", "b"], [4, 4])
    assert base == by_scenes(["a", "b"], np.array([4, 4]))
    others = [by_scenes(["a", "c"], [4, 4]), by_scenes(["b", "a"], [4, 4]), by_scenes(["a", "b"], [4, 5])]
    assert len({base, *others}) == 4


@given(pool=st.integers(4, 40), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=30)
def test_replay_draws_distinct_scenes_anew_each_epoch(pool, seed):
    draw = pool // 2
    order = make_order([3] * pool, seed, draw)
    sets = [frozenset(order.epoch_scenes(e).tolist()) for e in range(6)]
    assert all(len(s) == draw for s in sets)
    assert len(set(sets)) > 1
    for epoch, scenes in enumerate(sets):
        plan = order.epoch(epoch)
        assert {plan.sample(i).scene for i in range(plan.size)} == scenes


def test_a_lane_walks_through_few_scenes_at_a_time():
    order = make_order([40] * 1000)
    plan = order.epoch(0)
    for lane in (0, 17, 63):
        first_block = {plan.sample(lane + i * plan.lanes).scene for i in range(256)}
        assert len(first_block) <= 256 // 40 + 12


def test_cost_of_forty_million_frames():
    order = Order("f", np.arange(1_000_000), np.full(1_000_000, 40), 0)
    began = time.process_time()
    batches = training_batches(order, 4096, 0, 4096, epoch=3, offset=39_999_000)
    seen = [next(batches)[0][0] for _ in range(50)]
    assert {s.epoch for s in seen} == {3, 4}  # straddles the epochs
    assert time.process_time() - began < 60  # no speed claim: only that nothing is listed frame by frame


@pytest.mark.slow
@given(
    frames=FRAMES,
    per_shard=st.integers(1, 4),
    lanes=st.integers(1, 20),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=5),
    takes=st.lists(st.integers(0, 6), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=80)
def test_resuming_again_and_again_on_other_world_sizes_loses_and_repeats_nothing(
    frames, per_shard, lanes, worlds, takes
):
    """Save, resume, save, resume, each time with another number of ranks, from a state that is integers only."""
    batch = 24

    def fresh():
        shards = [i // per_shard for i in range(len(frames))]
        return Order("f", range(len(frames)), frames, 5, shards=shards, lanes=lanes)

    state, got = {"epoch": 0, "offset": 0, "batches": 0}, []
    for world, count in zip(worlds, takes):
        ranks = [training_batches(fresh(), batch, r, world, **json.loads(json.dumps(state))) for r in range(world)]
        for _ in range(count):
            parts = [next(r) for r in ranks]
            state = parts[-1][1]
            got += [s for part in parts for s in part[0]]
    assert got == list(islice(fresh().samples(0, 0), len(got)))
    plan = fresh().epoch(0)
    assert len({(s.scene, s.frame) for s in got[: plan.size]}) == min(plan.size, len(got))


@pytest.mark.parametrize("nodes", [8, 64])
def test_every_node_fetches_only_its_share(nodes):
    """Shards fetched in an epoch, summed over the nodes, are hardly more than there are; their scenes stay together."""
    scenes, per_shard, batch = 8000, 10, 256
    shards = np.arange(scenes) // per_shard
    order = Order("f", np.arange(scenes), np.full(scenes, 40), 3, shards=shards, lanes=batch)
    plan = order.epoch(1)
    fetched = 0
    for node in range(nodes):
        low, high = share(batch, node, nodes)
        lanes = range(low, high)
        # A lane is a piece of the sequence: its ends tell which shards it touches.
        base, longer = divmod(plan.size, plan.lanes)
        touched = set()
        for lane in lanes:
            start = lane * base + min(lane, longer)
            stop = start + base + (lane < longer)
            first, last = np.searchsorted(plan.ends, [start, stop - 1], side="right")
            touched |= set(shards[plan.scenes[first : last + 1]].tolist())
        for i in range(3):  # and the samples themselves are from these
            assert all(shards[plan.sample(i * batch + lane).scene] in touched for lane in lanes)
        fetched += len(touched)
    assert fetched <= 1.1 * scenes / per_shard


@given(
    weights=st.lists(st.integers(1, 12), min_size=1, max_size=5), batch=st.integers(0, 20), start=st.integers(0, 10**9)
)
@settings(deadline=None)
def test_quotas_are_exact_in_every_period_and_add_up(weights, batch, start):
    quotas = Quotas(weights, batch)
    parts = [[quotas.of(k, start + b) for k in range(len(weights))] for b in range(quotas.period)]
    assert all(sum(p) == batch for p in parts)
    assert all(n >= 0 for p in parts for n in p)
    total = np.array(parts).sum(0)
    np.testing.assert_allclose(total / max(1, total.sum()), np.array(weights) / sum(weights) * (batch > 0), atol=1e-12)
    for k in range(len(weights)):
        assert quotas.most(k) >= max(p[k] for p in parts)
        # At no time does a source lag by more than a place or so.
        assert abs(quotas.taken(k, start) - start * batch * weights[k] / sum(weights)) < len(weights)


@given(total=st.integers(0, 50), world=st.integers(1, 9))
def test_shares_cover_exactly(total, world):
    parts = [share(total, r, world) for r in range(world)]
    assert parts[0][0] == 0
    assert parts[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


@given(frames=FRAMES, world=st.integers(1, 6), batch=st.integers(1, 5))
@settings(deadline=None)
def test_evaluation_sees_every_frame_once(frames, world, batch):
    seen = []
    for rank in range(world):
        for samples, _ in evaluation_batches(range(len(frames)), frames, batch, rank=rank, world=world):
            assert 1 <= len(samples) <= batch
            seen += samples
    assert sorted((s.scene, s.frame) for s in seen) == [(i, f) for i, n in enumerate(frames) for f in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Manifest:
    return pack(ToySource(), str(tmp_path_factory.mktemp("toy")), grid=GRID)


FIELDS = {"semantic": Field(GRID.shape, "uint8"), "time": Field((), "int64")}


def fill(frame, epoch, views):
    views["semantic"][...] = frame.labels.semantic
    views["time"][...] = frame.timestamp


def make_stream(data, fill=fill, batch=4, rank=0, world=1, threads=3, ring=3, state=None, **more):
    order = Order(data.fingerprint, range(4), [s.frames for s in data.scenes], seed=1)
    batches = training_batches(order, batch, rank, world, **(state or {}))
    return Stream(
        ShardReader(data, ("labels",)), batches, FIELDS, fill, capacity=batch, threads=threads, ring=ring, **more
    )


def test_content_matches_the_order_with_any_number_of_threads(data):
    source = ToySource()
    for threads in (0, 1, 2, 4):
        with make_stream(data, threads=threads) as stream:
            for batch in islice(stream, 9):
                for i, sample in enumerate(batch.samples):
                    frame = source.load(f"toy-{sample.scene}").frames[sample.frame]
                    assert batch.keys[i] == frame.key
                    assert np.array_equal(batch.arrays["semantic"][i], frame.labels.semantic)


def test_resume_from_the_state_of_a_batch(data):
    with make_stream(data) as stream:
        batches = [(b.samples, b.state) for b in islice(stream, 8)]
    for cut in (0, 3, 6):
        with make_stream(data, state=batches[cut][1]) as stream:
            assert [b.samples for b in islice(stream, 7 - cut)] == [b[0] for b in batches[cut + 1 :]]


def test_a_rank_may_have_an_empty_share(data):
    with make_stream(data, batch=1, rank=0, world=3) as stream:
        assert [len(b.samples) for b in islice(stream, 5)] == [0] * 5


def test_the_consumers_buffers_are_never_overwritten(data):
    def slow(frame, epoch, views):
        time.sleep(0.001 * (frame.index % 3))
        fill(frame, epoch, views)

    with make_stream(data, slow, threads=5, ring=2) as stream:
        for batch in islice(stream, 12):
            before = batch.arrays["semantic"].copy()
            time.sleep(0.01)  # readers run ahead as far as the ring lets them
            assert np.array_equal(before, batch.arrays["semantic"])


def test_corrupt_samples_are_replaced_counted_and_named(data):
    def picky(frame, epoch, views):
        if frame.key == "toy-1-0002":
            raise CorruptSample(f"{frame.key}: bad JPEG")
        fill(frame, epoch, views)

    said = []
    with make_stream(data, picky, batch=14, warn=said.append) as stream:
        batch = next(stream)
        replaced = batch.samples.index(Sample(0, 1, 2))
        assert batch.keys[replaced] == "toy-1-0003"
        assert batch.keys.count("toy-1-0003") == 2
    assert "toy-1-0002" in said[0]
    assert set(stream.skipped) == {"toy-1-0002: bad JPEG"}
    with (
        make_stream(data, picky, max_skipped=1, warn=said.append) as stream,
        pytest.raises(ValueError, match=r"more than 1.*toy-1-0002"),
    ):
        list(islice(stream, 100))


def test_incomplete_samples_are_replaced_in_every_epoch_and_named_once(data):
    """A frame without one of the cameras is met again and again in a long run: no sign of damage, so no end of it."""

    def picky(frame, epoch, views):
        if frame.key in ("toy-1-0002", "toy-2-0000"):
            raise IncompleteSample(f"{frame.key}: camera CAM_BACK is missing")
        fill(frame, epoch, views)

    said = []
    with make_stream(data, picky, batch=14, max_skipped=0, warn=said.append) as stream:
        keys = [key for batch in islice(stream, 5) for key in batch.keys]
    assert len(keys) == 70
    assert not {"toy-1-0002", "toy-2-0000"} & set(keys)
    assert len(stream.skipped) >= 10
    assert sorted(said) == [
        f"replaced incomplete sample: {key}: camera CAM_BACK is missing" for key in ("toy-1-0002", "toy-2-0000")
    ]


def test_errors_in_threads_reach_the_consumer_and_threads_end(data):
    def broken(frame, epoch, views):
        raise RuntimeError("no space on device")

    before = threading.active_count()
    with make_stream(data, broken) as stream:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no space"):
                next(stream)
    assert threading.active_count() == before
    with make_stream(data) as stream:
        next(stream)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 2])
def test_an_error_of_the_plan_reaches_the_consumer_at_once(data, threads, after):
    def plan():
        order = Order(data.fingerprint, range(4), [s.frames for s in data.scenes], seed=1)
        yield from islice(training_batches(order, 2, 0, 1), after)
        raise KeyError("a plan that cannot be made")

    with Stream(
        ShardReader(data, ("labels",)), plan(), FIELDS, fill, capacity=2, threads=threads, deadline=60
    ) as stream:
        with pytest.raises(KeyError, match="cannot be made"):
            list(islice(stream, after + 1))
        with pytest.raises(KeyError, match="cannot be made"):  # not the end of the data either
            next(stream)


def test_an_error_of_a_thread_that_fetches_ahead_reaches_the_consumer(data, tmp_path, monkeypatch):
    def broken(self, number):
        raise KeyError("a client library")

    monkeypatch.setattr(ShardReader, "prefetch", broken)
    monkeypatch.setattr(ShardReader, "frame", lambda *_: time.sleep(0.2))
    reader = ShardReader(data, ("labels",), ShardCache(tmp_path, 2**30))
    plan = evaluation_batches(range(4), [s.frames for s in data.scenes], 4, rank=0, world=1)
    with (
        Stream(reader, plan, FIELDS, fill, capacity=4, deadline=60) as stream,
        pytest.raises(KeyError, match="a client library"),
    ):
        next(stream)


def test_an_error_without_reader_threads_is_the_same_error_again(data):
    def broken(frame, epoch, views):
        raise RuntimeError("no space on device")

    with make_stream(data, broken, threads=0, deadline=60) as stream:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no space"):
                next(stream)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"threads": -1}, {"ring": 1}])
def test_settings_under_which_nothing_would_come_are_refused(data, bad):
    with pytest.raises(ValueError, match="needs at least"):
        make_stream(data, **bad)


def test_closing_does_not_wait_for_a_read_that_hangs(data, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(stream_module, "PATIENCE", 0.1)
    monkeypatch.setattr(ShardReader, "frame", lambda *_: release.wait(60))
    began = time.monotonic()
    with make_stream(data, 2, deadline=0.1) as stream, pytest.raises(TimeoutError):
        next(stream)
    release.set()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_completed_in_order_and_beside_the_consumer(data, threads):
    made = []

    def finish(batch):
        made.append(threading.current_thread() is threading.main_thread())
        batch.arrays["sum"] = batch.arrays["time"].copy() + len(made)

    with make_stream(data, threads=threads, finish=finish) as stream, make_stream(data) as plain:
        for number, (batch, other) in enumerate(zip(islice(stream, 8), plain), 1):
            assert batch.keys == other.keys
            assert np.array_equal(batch.arrays["sum"], other.arrays["time"] + number)
            if number == 4 and threads:
                stream._change.acquire()
                stream._change.wait_for(stream._there, 30)
                stream._change.release()
                assert len(made) > number, "the next one is completed before it is asked for"
    assert set(made) == {threads == 0}


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_completing_reaches_the_consumer(data, threads):
    def finish(batch):
        raise ValueError("a JPEG that no decoder reads")

    with (
        make_stream(data, threads=threads, finish=finish, deadline=60) as stream,
        pytest.raises(ValueError, match="no decoder"),
    ):
        next(stream)


def test_a_batch_that_does_not_come_is_an_error_that_names_its_shard(data, monkeypatch):
    monkeypatch.setattr(ShardReader, "frame", lambda *_: time.sleep(1))
    with (
        make_stream(data, 2, deadline=0.3) as stream,
        pytest.raises(TimeoutError, match=r"frames .* of shards labels/labels-0"),
    ):
        next(stream)


def test_a_finite_plan_ends(data):
    counts = [s.frames for s in data.scenes]
    plan = evaluation_batches(range(4), counts, 4, rank=0, world=1)
    with Stream(ShardReader(data, ("labels",)), plan, FIELDS, fill, capacity=4) as stream:
        assert [len(b.keys) for b in stream] == [4, 4, 4, 2]
        assert next(stream, None) is None


def ragged_fill(frame, epoch, views):
    """Frame i has i rows."""
    n = frame.index
    views["points.xyz"] = np.full((n, 3), 10 * n + int(frame.scene[-1]), np.float32)
    views["points.features"] = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    views["scene_aug"][...] = np.eye(3)


RAGGED = {
    "scene_aug": Field((3, 3), "float32"),
    "points.xyz": Field((3,), "float32", ragged=True),
    "points.features": Field((2,), "float32", ragged=True),
}


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_ragged_rows_are_laid_end_to_end_with_their_counts(tmp_path, threads):
    manifest = pack(ToySource((4, 5)), str(tmp_path), grid=GRID)
    reader, plan = ShardReader(manifest, ("labels",)), evaluation_batches([0, 1], [4, 5], 2, rank=0, world=1)
    seen = []
    with Stream(reader, plan, RAGGED, ragged_fill, capacity=2, threads=threads) as stream:
        for got in stream:
            counts = got.arrays["points.counts"]
            assert counts.tolist() == [sample.frame for sample in got.samples]
            want = np.repeat([10.0 * s.frame + s.scene for s in got.samples], counts)
            assert (got.arrays["points.xyz"][:, 0] == want).all()
            assert got.arrays["points.features"].shape == (counts.sum(), 2)
            seen += got.keys
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda views: views.pop("points.xyz"), "has nothing for the ragged field points.xyz"),
        (lambda views: views.update({"points.xyz": np.zeros((1, 2), np.float32)}), r"\(1, 2\) float32 for the ragged"),
        (
            lambda views: views.update({"points.features": np.zeros((9, 2), np.float32)}),
            "9 rows, others of points have 0",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, change, said):
    manifest = pack(ToySource((2,)), str(tmp_path), grid=GRID)

    def fill(frame, epoch, views):
        ragged_fill(frame, epoch, views)
        change(views)

    plan = evaluation_batches([0], [2], 2, rank=0, world=1)
    with (
        Stream(ShardReader(manifest, ("labels",)), plan, RAGGED, fill, capacity=2, threads=0) as stream,
        pytest.raises(ValueError, match=said),
    ):
        next(stream)


@pytest.mark.parametrize("threads", [0, 2])
def test_ragged_rows_live_as_long_as_the_rings_buffers(tmp_path, threads):
    """A copy to a device may read them until the next batch is asked for, whether or not somebody holds the batch."""
    manifest = pack(ToySource((6,)), str(tmp_path), grid=GRID)
    plan = evaluation_batches([0], [6], 2, rank=0, world=1)
    with Stream(
        ShardReader(manifest, ("labels",)), plan, RAGGED, ragged_fill, capacity=2, threads=threads, ring=2
    ) as stream:
        held = weakref.ref(next(stream).arrays["points.xyz"])
        assert held() is not None
        for _ in range(2):
            next(stream)
        assert held() is None
