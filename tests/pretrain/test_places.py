"""Paths and URLs mean the same wherever they are given."""

import pytest

from occstream.pretrain.config import load_config
from occstream.pretrain.reading import cache
from occstream.sharding import storage
from occstream.sharding.places import place
from occstream.sharding.sources import open_source
from tests.sharding import toy_nuscenes


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", ""),
        ("a/b", "a/b"),
        ("/a/b", "/a/b"),
        ("~", "HOME"),
        ("~/a", "HOME/a"),
        ("./~/a", "./~/a"),
        ("a~b", "a~b"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("file:///a/~/b::c", "/a/~/b::c"),
        ("a::b/new", "a::b/new"),
        ("local:x", "local:x"),
        ("a b?c#d%20", "a b?c#d%20"),
        ("s3://bucket/a::b", "s3://bucket/a::b"),
    ],
)
def test_one_form(home, written, meant):
    meant = meant.replace("HOME", str(home))
    assert place(written) == meant
    assert place(meant) == meant
    assert storage.is_local(written) == ("s3:" not in written)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("~nobody-here/x", "no home folder"),
        ("file://server/x", "names the machine 'server'"),
        ("file:x", "needs a full path"),
        ("simplecache::s3://b/x", "not a path, file:// or s3:// URL"),
        ("://x", "not a path"),
        ("a\nb", "of one line"),
        ("a\0b", "of one line"),
    ],
)
def test_what_cannot_be_meant_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        place(written)


@pytest.mark.parametrize("folder", ["a::b/new", "~/shards", "local:x", "file:HOME/y", "s p/ü", "-x", "a#b?c"])
def test_storage_writes_and_finds_what_it_was_told(home, folder):
    url = folder.replace("HOME", str(home))
    storage.publish(b"abc", storage.join(url, "sub", "x.bin"))
    assert storage.read_bytes(storage.join(url, "sub", "x.bin")) == b"abc"
    assert storage.read_bytes(storage.join(url, "sub", "x.bin"), 1, 1) == b"b"
    assert dict(storage.listing(storage.join(url, "sub"))) == {"x.bin": 3}
    assert storage.size(storage.join(url, "sub", "x.bin")) == 3
    assert not (home.parent / "work" / "~").exists()
    storage.remove(storage.join(url, "sub", "x.bin"))
    assert storage.listing(storage.join(url, "sub")) == {}


def test_settings_sources_and_cache_take_the_same_forms(home, monkeypatch):
    words = [
        "output=~/run",
        "data.url=file:///d",
        "eval.url=~/e",
        "replay.url=~/r",
        "train.init=~/i",
        "train.upload=~/u",
    ]
    config = load_config("demo", words)
    assert (config.output, config.data.url, config.eval.url) == (f"{home}/run", "/d", f"{home}/e")
    assert (config.replay.url, config.train.init, config.train.upload) == (f"{home}/r", f"{home}/i", f"{home}/u")
    with pytest.raises(ValueError, match="output is 's3://b/run': must be a local folder"):
        load_config("demo", ["output=s3://b/run"])
    monkeypatch.setenv("OCCSTREAM_CACHE", "~/shard cache")
    assert cache("s3://b/x").folder == home / "shard cache"
    toy_nuscenes.write(home / "toy")
    assert open_source("nuscenes", {"root": "~/toy"}).scene_names() == ["scene-0000"]
