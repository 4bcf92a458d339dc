"""Raw data from stores and archives: every source gives the same from there as from a folder."""

import json
import pickle
import zipfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from occstream.launch import cli
from occstream.sharding import rawtree, storage
from occstream.sharding.rawfiles import choose, entries, existing_folder, read_file
from occstream.sharding.rawtree import Tree, ahead, inside, raw_place
from occstream.sharding.sources import open_source
from occstream.sharding.storeerrors import explain, transient
from tests import objectstore
from tests.faultproxy import Faults
from tests.sharding import layouts
from tests.sharding.test_argoverse2 import ours, raw
from tests.sharding.test_shards import same

CASES = [(name, i) for name, writers in layouts.LAYOUTS.items() for i in range(len(writers)) if name != "synthetic"]


class FailingFileSystem(MemoryFileSystem):
    """Every third request fails as networks do."""

    protocol = "failing"
    asked = failed = 0

    def _ask(self):
        type(self).asked += 1
        if self.asked % 3 == 0:
            type(self).failed += 1
            raise ConnectionResetError("connection reset by peer")

    def ls(self, path, detail=True, **kwargs):
        self._ask()
        return super().ls(path, detail, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._ask()
        return super().cat_file(path, start, end, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("failing://", "memory://"))


fsspec.register_implementation("failing", FailingFileSystem)


def to_memory(folder: Path, name: str) -> str:
    """Copies a folder; returns its path in memory."""
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return name


def to_zip(folder: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(archive, "w", method) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder))
    return str(archive)


@pytest.fixture
def memory():
    rawtree.forget()
    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()
    rawtree.forget()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_source_is_the_same_from_a_folder_a_store_an_archive_and_a_store_that_fails(
    name, number, tmp_path, memory, monkeypatch
):
    monkeypatch.setattr(storage, "PAUSE", 1e-4)
    folder = tmp_path / "raw"
    folder.mkdir()
    options = layouts.LAYOUTS[name][number](folder)
    local = open_source(name, options)
    scenes = {scene: local.load(scene) for scene in local.scene_names()}
    to_memory(folder, "raw")
    memory.pipe_file("/raw.zip", Path(to_zip(folder, tmp_path / "raw.zip")).read_bytes())
    for root in ("memory://raw", "memory://raw.zip", str(tmp_path / "raw.zip"), "failing://raw"):
        moved = json.loads(json.dumps(options).replace(str(folder), root))
        failed = FailingFileSystem.failed
        source = pickle.loads(pickle.dumps(open_source(name, moved)))
        assert repr(source) == repr(local), "what repr says goes into digests"
        assert source.scene_names() == local.scene_names()
        for scene, expected in scenes.items():
            assert same(source.load(scene), expected), root
        assert root != "failing://raw" or FailingFileSystem.failed > failed


def test_a_missing_file_and_folder_are_one_clear_error(tmp_path, memory):
    for name in layouts.LAYOUTS:
        if name != "synthetic":
            with pytest.raises(ValueError, match=r"memory://nowhere: no such folder; give the one that holds"):
                open_source(name, {"root": "memory://nowhere"})
    layouts.argoverse2(tmp_path)
    name = "sensor/val/log-a/calibration/intrinsics.feather"
    (tmp_path / name).unlink()
    to_memory(tmp_path, "raw")
    with pytest.raises(
        ValueError, match=rf"memory://raw/{name}: is missing \(the calibration\); complete the download"
    ):
        open_source("argoverse2", {"root": "memory://raw"}).load("log-a")


def test_names_and_patterns(memory):
    for name in ("a/1.txt", "a/2.bin", "a/b/3.txt", "a/.hidden", "c/d/4.txt"):
        memory.pipe_file(f"/top/{name}", name.encode())
    top = raw_place("memory://top/")
    assert top == existing_folder("memory://top", "files") == Tree("memory://top")
    assert [p.name for p in entries(top / "a")] == ["1.txt", "2.bin", "b"]
    assert [str(p) for p in top.glob("*/*.txt")] == ["memory://top/a/1.txt"]
    assert [p.path for p in top.glob("**/*.txt")] == ["a/1.txt", "a/b/3.txt", "c/d/4.txt"]
    assert [p.path for p in top.glob("a/b/3.txt")] == ["a/b/3.txt"]
    leaf = top / "a" / "b/3.txt"
    assert (leaf.name, leaf.stem, leaf.suffix, leaf.parent, leaf.parts) == (
        "3.txt", "3", ".txt", top / "a" / "b", ("a", "b", "3.txt"),
    )  # fmt: skip
    assert (leaf.is_file(), leaf.is_dir(), leaf.exists()) == (True, False, True)
    assert (leaf.parent.is_file(), leaf.parent.is_dir(), (top / "no").exists()) == (False, True, False)
    assert leaf.read_bytes() == b"a/b/3.txt"
    with pytest.raises(ValueError, match="leads out of it"):
        top / "../x"
    assert raw_place("/data/x.zipped") == Path("/data/x.zipped")


def test_a_folder_is_listed_once_and_files_are_fetched_together(memory, monkeypatch):
    for i in range(30):
        memory.pipe_file(f"/top/{i}", str(i).encode())
    top, asked = raw_place("memory://top"), []
    listed, read = storage.names, storage.read_bytes
    monkeypatch.setattr(storage, "names", lambda url: asked.append(url) or listed(url))
    monkeypatch.setattr(storage, "read_bytes", lambda url, *a: asked.append(url) or read(url, *a))
    assert all((top / str(i)).is_file() for i in range(30))
    assert asked == ["memory://top"]
    ahead([top / str(i) for i in range(30)] + [top / "missing", Path("/local")])
    assert [read_file(top / str(i)) for i in range(30)] == [str(i).encode() for i in range(30)]
    assert len(asked) <= 32, "each file once"
    with pytest.raises(ValueError, match="memory://top/missing: is missing"):
        read_file(top / "missing")
    monkeypatch.setattr(rawtree, "MOST_AHEAD", 5)
    ahead([top / str(i) for i in range(30)])
    assert len(rawtree._coming) == 5
    assert read_file(top / "0") == b"0"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_an_archive_are_read_by_range(tmp_path, memory, monkeypatch, method):
    folder = tmp_path / "raw"
    (folder / "a").mkdir(parents=True)
    for i in range(4):
        (folder / "a" / f"{i}.bin").write_bytes(bytes([i]) * (3 << 20) + str(i).encode())
    data = Path(to_zip(folder, tmp_path / "x.zip", zipfile.ZIP_STORED)).read_bytes()
    memory.pipe_file("/x.zip", data)
    bytes_read, read = [], storage.read_bytes

    def counted(url, offset=0, length=None):
        found = read(url, offset, length)
        bytes_read.append(len(found))
        return found

    monkeypatch.setattr(storage, "read_bytes", counted)
    member = raw_place("memory://x.zip/a") / "2.bin"
    assert member.read_bytes() == bytes([2]) * (3 << 20) + b"2"
    assert sum(bytes_read) < (3 << 20) + (2 << 20), "of 12 MB: the end, and one member"
    nested = inside(tmp_path / "x.zip")
    assert [p.name for p in (nested / "a").iterdir()] == ["0.bin", "1.bin", "2.bin", "3.bin"]


def test_a_damaged_archive_is_named(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"hello " * 100)
    archive = Path(to_zip(folder, tmp_path / "x.zip"))
    data = bytearray(archive.read_bytes())
    data[45] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{archive}/a.txt: damaged"):
        read_file(raw_place(str(archive)) / "a.txt")
    with pytest.raises(ValueError, match=rf"{archive}/b.txt: is missing"):
        read_file(raw_place(str(archive)) / "b.txt")
    broken = tmp_path / "y.zip"
    broken.write_bytes(data[:80])
    with pytest.raises(ValueError, match=r"y\.zip: not readable as a zip archive"):
        existing_folder(str(broken), "files")


def test_the_first_scenes():
    assert choose(2, ["a", "b", "c"], "x") == ["a", "b"]
    for wanted in (0, 4):
        with pytest.raises(ValueError, match=f"x: {wanted} scenes are wanted, there are 3"):
            choose(wanted, ["a", "b", "c"], "x")


def test_public_buckets_are_read_without_credentials_unless_there_are_some(monkeypatch, tmp_path, capsys):
    for name in (*storage._CREDENTIALS, *storage._ENDPOINTS, storage.ANONYMOUS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    storage._say_once.cache_clear()
    public = {"client_kwargs": {"region_name": "us-east-1"}, "anon": True}
    assert storage._access("s3://argoverse/datasets") == public == storage._access("s3://argoverse/x")
    assert capsys.readouterr().err == "s3://argoverse is a public bucket: it is read without credentials\n"
    assert storage._access("s3://mine/x") == {}
    monkeypatch.setenv(storage.ANONYMOUS, "mine")
    assert storage._access("s3://mine/x") == {"anon": True}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert storage._access("s3://argoverse/x") == {"anon": True}
    (tmp_path / "credentials").touch()
    assert storage._access("s3://argoverse/x") == {}


def test_a_hub_that_asks_to_wait_is_asked_again():
    class Response:
        status_code = 429

    class HubError(OSError):
        response = Response()

    assert transient(HubError("429 Client Error"))
    for Response.status_code in (403, 404):
        assert not transient(HubError("Client Error"))
    Response.status_code = 403
    told = explain(HubError("gated"), "hf://datasets/a/b@c/features.csv")
    assert isinstance(told, PermissionError)
    assert "agree to its terms on the hub and log in with `hf auth login` (gated)" in str(told)


def test_argoverse_from_a_public_bucket(s3, through, shared_data, repo_root, tmp_path, monkeypatch, capsys):
    """The page for somebody without data, against a store of this machine that holds the real log."""
    folder = shared_data / "argoverse2" / "sensor"
    if not folder.is_dir():
        pytest.skip("no Argoverse 2 log")
    where = "s3://argoverse/datasets/av2/sensor"
    for path in folder.rglob("*"):
        if path.is_file():
            storage.publish(path, f"{where}/{path.relative_to(folder)}")
    [log] = [path.name for path in (folder / "val").iterdir()]
    faults = Faults(public=(objectstore.KEY, objectstore.SECRET))
    with through(faults):
        for name in storage._CREDENTIALS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
        storage._say_once.cache_clear()
        rawtree.forget()
        monkeypatch.chdir(tmp_path)
        page = (repo_root / "docs" / "first-data.md").read_text()
        block = page.split("```")[1]
        commands = [line.split()[1:] for line in block.splitlines() if line.startswith("occstream ")]
        assert len(block.strip().splitlines()) == 6
        assert [command[0] for command in commands] == ["shard", "verify", "inspect", "preview"]
        for command in commands:
            assert cli.main(command) == 0, command
        out, err = capsys.readouterr()
        assert "s3://argoverse is a public bucket" in err
        assert "published 1 scene, 1 frame" in out
        assert "made from LiDAR" in out
        assert "shards/av2: intact" in out
        assert (tmp_path / "av2.png").stat().st_size > 10_000
        source = open_source("argoverse2", {"root": f"{where}/val", "scenes": 1, "stride": 1})
        table = raw(folder / "val" / log, "annotations")
        for frame in source.load(log).frames:
            rows = table[table["timestamp_ns"] // 1000 == frame.timestamp]
            assert ours(frame) == rows["num_interior_pts"].tolist()
            assert len(frame.boxes.names) == 81
        local = open_source("argoverse2", {"root": str(folder), "stride": 1})
        assert same(source.load(log), local.load(log))
    assert faults.seen["requests"] < 60
