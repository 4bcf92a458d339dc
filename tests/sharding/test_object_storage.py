"""Packing to and streaming from a real S3 server."""

import subprocess
import sys

import numpy as np
import pytest
import s3fs

from occstream.launch import cli
from occstream.pretrain.tracking import read_events
from occstream.sharding import storage
from occstream.sharding.check import verify
from occstream.sharding.manifest import Manifest
from occstream.sharding.stream import ShardReader
from tests import objectstore
from tests.pretrain.small import RECIPE, ROOT, environment, pack_small


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with objectstore.running(tmp_path_factory.mktemp("swift") / "run") as url:
        yield url


@pytest.fixture
def s3(endpoint, monkeypatch, tmp_path):
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": objectstore.KEY,
        "AWS_SECRET_ACCESS_KEY": objectstore.SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "OCCSTREAM_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://shards"
    s3fs.S3FileSystem.clear_instance_cache()


def test_same_data_set_on_disk_and_on_object_storage(s3, tmp_path):
    local, remote = str(tmp_path / "local"), f"{s3}/small"
    pack_small(local, scenes=3)
    pack_small(remote, scenes=3)
    here, there = Manifest.load(local), Manifest.load(remote)
    assert here.fingerprint == there.fingerprint
    assert verify(remote) == []
    cache = storage.ShardCache(tmp_path / "cache")
    a, b = ShardReader(here, ("cameras", "labels")), ShardReader(there, ("cameras", "labels"), cache)
    for scene in range(3):
        x, y = a.frame(scene, 1), b.frame(scene, 1)
        assert [c.jpeg for c in x.cameras.values()] == [c.jpeg for c in y.cameras.values()]
        np.testing.assert_array_equal(x.labels.semantic, y.labels.semantic)


def test_training_streams_from_object_storage(s3, tmp_path):
    """In a process of its own, with credentials from the environment, and none of them in what it writes."""
    pack_small(f"{s3}/train", scenes=3)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--recipe", RECIPE]
    run = tmp_path / "run"
    command += [f"data.url={s3}/train", f"output={run}", "train.steps=2", f"track.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [e["step"] for e in read_events(run / "metrics.jsonl") if "train/loss" in e.get("metrics", {})] == [1, 2]
    written = done.stdout + done.stderr + "".join(p.read_text(errors="ignore") for p in run.rglob("*.json*"))
    assert objectstore.KEY not in written
    assert f'"{objectstore.SECRET}"' not in written


def test_wrong_credentials_and_missing_bucket_are_one_line(s3, monkeypatch, capsys):
    assert cli.main(["inspect", "s3://nowhere/data"]) == 2
    assert "s3://nowhere/data/manifest.json: no manifest there" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    assert cli.main(["inspect", f"{s3}/small"]) == 2
    error = capsys.readouterr().err
    assert "access denied" in error
    assert "wrong-secret" not in error
    assert error.count("\n") == 1
