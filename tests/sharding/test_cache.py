"""The node-local cache and streaming from an object store: kills, two sets, damage, eviction, prefetch, bytes fetched."""

import hashlib
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from occstream.sharding import storage
from occstream.sharding.manifest import Manifest
from occstream.sharding.order import Order, training_batches
from occstream.sharding.pack import pack
from occstream.sharding.storage import ShardCache
from occstream.sharding.stream import Field, ShardReader, Stream
from tests.faultproxy import Faults
from tests.forked import Forked
from tests.pretrain.small import environment
from tests.sharding.toy import GRID, ToySource

COUNTS = (3, 5, 2, 4, 6, 1, 2)


def frames_of(manifest, cache, groups=("labels",), skip=None, count=20, lost=0, world=1, rank=0, threads=2, **more):
    """Keys of a rank's part of the next ``count`` batches of eight, and the position after them; then it reads ``lost`` batches
    that nobody gets to know of."""
    scenes = range(len(manifest.scenes))
    shards = [s.shard for s in manifest.scenes]
    order = Order("f", scenes, [s.frames for s in manifest.scenes], 3, shards=shards, lanes=8)

    def fill(frame, epoch, views):
        views["time"][...] = frame.timestamp

    batches = training_batches(order, 8, rank, world, **(skip or {}))
    reader = ShardReader(manifest, groups, cache)
    keys, state = [], skip
    with Stream(reader, batches, {"time": Field((), "int64")}, fill, capacity=8, threads=threads, **more) as stream:
        for got in itertools.islice(stream, count):
            keys.append(got.keys)
            state = got.state
        for _ in range(lost):
            next(stream)
    return keys, state


def whole(files: Path) -> list[str]:
    return sorted(p.suffix for p in files.iterdir() if not p.name.startswith("."))


def test_two_sets_with_equal_names_never_mix(s3, tmp_path):
    a, b = (pack(ToySource(c), f"{s3}/{n}", grid=GRID) for n, c in (("mix-a", (2, 2)), ("mix-b", (3, 1))))
    cache = ShardCache(tmp_path / "c")
    for _ in range(2):
        for manifest in (a, b):
            frame = ShardReader(manifest, ("labels",), cache).frame(0, 1)
            np.testing.assert_array_equal(
                frame.labels.semantic, ToySource((3, 3)).load("toy-0").frames[1].labels.semantic
            )
    assert whole(tmp_path / "c") == [".tar", ".tar"]


def test_damage_in_the_cache_is_healed_after_a_restart(s3, tmp_path):
    manifest = pack(ToySource((2,)), f"{s3}/heal", grid=GRID)
    ShardReader(manifest, ("labels",), ShardCache(tmp_path / "c")).frame(0, 0)
    [file] = (tmp_path / "c").glob("*.tar")
    good = file.read_bytes()
    for harm in (good[:-600], good[:700] + b"\xff" + good[701:], b""):
        file.write_bytes(harm)
        assert ShardReader(manifest, ("labels",), ShardCache(tmp_path / "c")).frame(0, 1).labels is not None
        assert file.read_bytes() == good


def test_the_limit_holds_and_the_least_used_goes(s3, tmp_path):
    manifest = pack(ToySource(COUNTS), f"{s3}/limit", grid=GRID)
    sizes = [s.size for s in manifest.shards if s.group == "labels"]
    cache = ShardCache(tmp_path / "c", limit=3 * max(sizes))
    reader = ShardReader(manifest, ("labels",), cache, keep_open=2)
    for scene in (0, 1, 2, 0, 3, 4, 5, 6, 0, 1):
        assert reader.frame(scene, 0).scene == f"toy-{scene}"
        assert sum(p.stat().st_size for p in (tmp_path / "c").glob("*.tar")) <= cache.limit
        assert len(os.listdir("/proc/self/fd")) < 200


FETCH = """
import json, sys
from occstream.sharding.manifest import Manifest
from occstream.sharding.storage import ShardCache
from occstream.sharding.stream import ShardReader
url, folder = json.loads(sys.argv[1])
ShardReader(Manifest.load(url), ("labels",), ShardCache(folder)).frame(0, 0)
"""


@pytest.mark.process
def test_killed_in_the_middle_of_a_fetch(s3, through, tmp_path):
    """The next start works at once; what the killed one left goes away by itself."""
    manifest = pack(ToySource((2, 3)), f"{s3}/killed", grid=GRID)
    folder = tmp_path / "c"
    with through(Faults(pace=5.0)):
        script = tmp_path / "fetch.py"
        script.write_text(FETCH)
        child = Forked([script, json.dumps([manifest.url, str(folder)])], environment(), tmp_path / "log")
        for _ in range(200):
            if list(folder.glob("*.part")) and next(folder.glob("*.part")).stat().st_size:
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert whole(folder) == [".part"]
    began = time.monotonic()
    ShardReader(manifest, ("labels",), ShardCache(folder)).frame(1, 0)  # another shard: it sweeps as well
    assert time.monotonic() - began < 3
    assert whole(folder) == [".tar"]
    ShardReader(manifest, ("labels",), ShardCache(folder)).frame(0, 0)
    assert whole(folder) == [".tar", ".tar"]


def test_ranks_of_a_node_fetch_each_shard_once(s3, through, tmp_path):
    manifest = pack(ToySource(COUNTS), f"{s3}/node", grid=GRID)
    with through(Faults()) as faults:
        text = FETCH.replace(".frame(0, 0)", "; [r.frame(s, 0) for s in range(7)]").replace(
            "ShardReader(", "r = ShardReader("
        )
        (script := tmp_path / "fetch.py").write_text(text)
        command = [script, json.dumps([manifest.url, str(tmp_path / "c")])]
        children = [Forked(command, environment(), tmp_path / f"log-{n}") for n in range(3)]
        assert [c.wait(60) for c in children] == [0, 0, 0]
    for shard in manifest.shards:
        path = "/" + storage.join(manifest.url, shard.path).removeprefix("s3://")
        assert faults.sent[path] == (shard.size if shard.group == "labels" else 0)


@pytest.mark.parametrize(
    "faults", [Faults(errors=0.15, seed=4), Faults(truncate=0.15, seed=5), Faults(stalls=1, stall=2.0, seed=6)]
)
def test_the_same_samples_through_faults_kills_and_world_sizes(s3, through, tmp_path, monkeypatch, faults):
    """A job that is killed again and again, some batches after its last save, and resumes with other ranks and threads."""
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    local = pack(ToySource(COUNTS), str(tmp_path / "local"), grid=GRID)
    remote = pack(ToySource(COUNTS), f"{s3}/same", grid=GRID)
    want, _ = frames_of(local, None, count=24)
    draw, got, state = np.random.default_rng(faults.seed), [], None
    with through(faults):
        manifest = Manifest.load(remote.url)
        for world in draw.permutation([1, 2, 3, 4, 6, 8]).tolist():
            saved, lost, threads = (int(n) for n in draw.integers([3, 0, 0], [5, 3, 5]))
            cache = ShardCache(tmp_path / f"c{draw.integers(2)}")  # warm or cold
            options = {"skip": state, "count": saved, "lost": lost, "world": world, "threads": threads}
            parts = [frames_of(manifest, cache, rank=r, **options) for r in range(world)]
            got += [[k for part in batch for k in part] for batch in zip(*(p[0] for p in parts))]
            state = parts[0][1]
    assert len(got) >= 18
    assert got == want[: len(got)]
    assert faults.seen["requests"] > 20


def test_a_hanging_peer_is_asked_a_second_time(s3, through, tmp_path, monkeypatch):
    manifest = pack(ToySource((2,)), f"{s3}/hedge", grid=GRID)
    shard = manifest.shard("labels", 0)
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    url = storage.join(manifest.url, shard.path)
    with through(Faults(stalls=1, stall=8.0)) as faults:
        began = time.monotonic()
        path = ShardCache(tmp_path / "c").fetch(url, shard.size, shard.sha256)
        assert time.monotonic() - began < 6
        assert path.stat().st_size == shard.size
        assert faults.seen["stall"] == 1
    assert whole(tmp_path / "c") == [".tar"]


def test_hedging_gives_the_first_success_and_the_last_error():
    def work(number):
        time.sleep([0.3, 0.0][number])
        if number == 1:
            raise ValueError("second")
        return "first"

    assert storage.hedged(work, 0.1) == "first"
    assert storage.hedged(lambda n: n, 5.0) == 0
    with pytest.raises(ValueError, match="both"):
        storage.hedged(lambda n: (_ for _ in ()).throw(ValueError("both")), 0.0)


def test_only_the_groups_asked_for_are_fetched(s3, through, tmp_path):
    manifest = pack(ToySource(COUNTS), f"{s3}/groups", grid=GRID)
    with through(Faults()) as faults:
        frames_of(manifest, ShardCache(tmp_path / "c"), ("cameras", "labels"))
    by_group = {g: sum(n for path, n in faults.sent.items() if f"/{g}/" in path) for g in manifest.groups}
    assert by_group["cameras"] > 0
    assert by_group["labels"] > 0
    assert by_group["lidar"] == 0


def test_shards_are_fetched_ahead_of_need(s3, through, tmp_path):
    """The first batch is enough for the whole epoch to come in; afterwards nothing waits for the store."""
    manifest = pack(ToySource(COUNTS), f"{s3}/ahead", grid=GRID)
    order = Order("f", range(7), COUNTS, 3, shards=range(7), lanes=4)
    with through(Faults()) as faults:
        reader = ShardReader(manifest, ("labels",), ShardCache(tmp_path / "c"))
        batches = training_batches(order, 4, 0, 1)
        fields = {"x": Field((), "int64")}
        with Stream(reader, batches, fields, lambda *_: None, capacity=4, threads=1, lookahead=8) as stream:
            next(stream)
            for _ in range(100):
                if len(list((tmp_path / "c").glob("*.tar"))) == 7:
                    break
                time.sleep(0.05)
            assert len(list((tmp_path / "c").glob("*.tar"))) == 7
            before = sum(n for path, n in faults.sent.items() if path.endswith(".tar"))
            for _ in range(5):
                next(stream)
            assert sum(n for path, n in faults.sent.items() if path.endswith(".tar")) == before


def test_a_window_has_the_frames_that_the_scene_has(tmp_path):
    manifest = pack(ToySource((6, 2)), str(tmp_path), grid=GRID)
    reader = ShardReader(manifest, ("labels",))
    for index, offsets, there in (
        (5, (-1, -2), (-1, -2)),
        (3, (-2, 2), (-2, 2)),
        (1, (-3, -1, 1), (-1, 1)),
        (0, (), ()),
    ):
        frame = reader.window(0, index, offsets)
        assert frame.index == index
        assert {o: f.index for o, f in frame.window.items()} == {o: index + o for o in there}, "absent stays absent"
    last = reader.manifest.scenes[1].frames - 1
    near = reader.window(1, last, (1, -1)).window
    assert {f.scene for f in near.values()} == {"toy-1"}
    assert list(near) == [-1]


def _shards(folder: Path, count: int) -> list[tuple[str, int, str]]:
    found = []
    folder.mkdir(exist_ok=True)
    for i in range(count):
        data = bytes([i]) * 1000
        (folder / f"{i}.tar").write_bytes(data)
        found.append((f"local://{folder / f'{i}.tar'}", 1000, hashlib.sha256(data).hexdigest()))
    return found


def test_a_shard_that_another_process_removes_is_fetched_again(tmp_path, monkeypatch):
    [shard] = _shards(tmp_path / "store", 1)
    cache = ShardCache(tmp_path / "c")
    path = cache.fetch(*shard)
    real = os.open

    def late(name, *args, **more):
        if Path(name) == path:
            path.unlink(missing_ok=True)  # between the knowledge that it is there and its use
        return real(name, *args, **more)

    monkeypatch.setattr(storage.os, "open", late)
    file = cache.open(*shard)
    assert os.pread(file, 2000, 0) == bytes(1000)
    os.close(file)


@pytest.mark.process
def test_eviction_under_readers_costs_no_sample(tmp_path):
    """A cache with room for two of six shards, used by threads that each have a cache object, as processes do."""
    shards, errors = _shards(tmp_path / "store", 6), []

    def read(seed):
        cache, draw = ShardCache(tmp_path / "c", limit=2000), np.random.default_rng(seed)
        for i in draw.integers(6, size=60).tolist():
            try:
                file = cache.open(*shards[i])
                data = os.pread(file, 2000, 0)
                os.close(file)
                assert data == bytes([i]) * 1000
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
