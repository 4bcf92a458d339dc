"""Packing to and streaming from a real S3 server."""

import fnmatch
import hashlib
import json
import random

import numpy as np
import pytest
import s3fs
from botocore.exceptions import ClientError

from occstream.launch import cli
from occstream.pretrain.events import read_events
from occstream.sharding import storage
from occstream.sharding.check import verify
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import merge, pack
from occstream.sharding.stream import ShardReader
from tests import objectstore
from tests.faultproxy import Faults
from tests.forked import Forked
from tests.pretrain.small import RECIPE, ROOT, environment, pack_small
from tests.sharding.test_job import COUNTS, kill_and_finish
from tests.sharding.test_shards import digests
from tests.sharding.toy import GRID, ToySource

pytestmark = pytest.mark.process


def objects(url: str) -> dict[str, str]:
    """SHA-256 by name of everything below a URL."""
    fs, path = storage._fs(url)
    fs.invalidate_cache()
    return {name[len(path) + 1 :]: hashlib.sha256(fs.cat_file(name)).hexdigest() for name in fs.find(path)}


@pytest.fixture
def whole(tmp_path) -> dict[str, str]:
    """What an undisturbed job writes."""
    pack(ToySource(COUNTS), str(tmp_path / "whole"), grid=GRID, scenes_per_shard=2)
    return digests(tmp_path / "whole")


def test_killed_parts_on_object_storage_equal_one_run(s3, whole, tmp_path):
    rng = random.Random(11)
    for i in (4, 2, 1, 3):
        kill_and_finish(tmp_path, f"{s3}/parts", [i, 4], rng, environment(), kills=1)
    merge(f"{s3}/parts")
    assert objects(f"{s3}/parts") == whole


@pytest.mark.parametrize(
    "faults",
    [Faults(errors=0.2, seed=1), Faults(truncate=0.2, reset=0.2, seed=2), Faults(stalls=1)],
    ids=["errors on 20 %", "truncated bodies", "a stall of 10 s"],
)
def test_job_finishes_through_faults(s3, through, whole, faults, request, monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    url = f"{s3}/{request.node.callspec.id.replace(' ', '-').replace('%', 'p')}"
    with through(faults):
        pack(ToySource(COUNTS), url, grid=GRID, scenes_per_shard=2)
        assert verify(url) == []
    assert faults.seen["requests"] > 40
    assert sum(faults.seen[k] for k in ("error", "truncate", "reset", "stall")) >= 1
    assert objects(url) == whole


def test_lost_credential_stops_the_job_without_a_manifest(s3, through, whole, capsys):
    url = f"{s3}/lost"
    command = ["shard", "synthetic", "scenes=4", "frames=1", "image_size=[32,88]", "--grid", "tiny", "--out", url]
    with through(Faults(forbid_after=12)):
        assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "access denied; check the credentials" in error
    assert error.count("\n") == 1
    assert objectstore.SECRET not in error
    there = objects(url)
    assert there
    assert "manifest.json" not in there
    assert cli.main(command) == 0
    assert verify(url) == []


def test_store_that_is_gone_is_one_clear_line(s3, monkeypatch, capsys):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("OCCSTREAM_STORAGE_MINUTES", "0.01")
    s3fs.S3FileSystem.clear_instance_cache()
    assert cli.main(["inspect", f"{s3}/gone"]) == 2
    error = capsys.readouterr().err
    assert "still failing after" in error
    assert f"{s3}/gone/manifest.json" in error
    assert error.count("\n") == 1


def test_large_objects_go_up_in_parts(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 5 << 20)
    data = np.random.default_rng(0).bytes(17 << 20)
    (tmp_path / "large").write_bytes(data)
    storage.publish(tmp_path / "large", f"{s3}/large/object")
    assert storage.read_bytes(f"{s3}/large/object") == data
    fs, path = storage._fs(f"{s3}/large/object")
    assert "-" in fs.info(path)["ETag"]  # the mark of a multipart upload


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
    command = [ROOT / "launch/pretrain.py", "--recipe", RECIPE]
    run = tmp_path / "run"
    command += [f"data.url={s3}/train", f"output={run}", "train.steps=2", f"track.uri=sqlite:///{tmp_path}/mlflow.db"]
    secrets = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "a-password-of-mlflow"}
    done = Forked(command, environment(**secrets), tmp_path / "log")
    said, _ = done.communicate(200)
    assert done.returncode == 0, said[-2000:]
    assert [e["step"] for e in read_events(run / "metrics.jsonl") if "train/loss" in e.get("metrics", {})] == [1, 2]
    files = [p for p in tmp_path.rglob("*") if p.is_file() and "cache" not in p.parts]
    assert {"log", "config.yaml", "metrics.jsonl", "state.json", "mlflow.db"} <= {p.name for p in files}
    written = b"".join(p.read_bytes() for p in files)
    for secret in (objectstore.KEY, f'"{objectstore.SECRET}"', *secrets.values()):
        assert secret.encode() not in written


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


RIGHTS = {
    "s3:ListBucket": {"ListObjectsV2", "HeadBucket"},
    "s3:GetObject": {"GetObject", "HeadObject"},
    "s3:PutObject": {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"},
    "s3:DeleteObject": {"DeleteObject", "DeleteObjects"},
    "s3:AbortMultipartUpload": {"AbortMultipartUpload"},
    "s3:ListMultipartUploadParts": {"ListParts"},
}


def allows(policy: dict, call: str, arguments: dict, bucket: str, prefix: str) -> bool:
    """Whether a policy of infra/iam, written for the prefix ``openscene`` of ``bucket``, allows a call for another prefix."""
    for statement in policy["Statement"]:
        if not any(call in RIGHTS[action] for action in statement["Action"]):
            continue
        names = statement.get("Condition", {}).get("StringLikeIfExists", {}).get("s3:prefix", [])
        names = [name.replace("openscene", prefix) for name in names]
        asked = arguments.get("Prefix")
        if names:
            return asked is None or any(fnmatch.fnmatchcase(asked, name) for name in names)
        return arguments["Bucket"] == bucket and str(arguments.get("Key", f"{prefix}/")).startswith(f"{prefix}/")
    return False


def test_packing_and_reading_work_with_the_least_rights(s3, monkeypatch):
    """What a policy does not allow is denied, as S3 would."""
    from aiobotocore.client import AioBaseClient

    storage.publish(b"", f"{s3}/first")  # creates the bucket, which no policy allows
    call, policies, denied = AioBaseClient._make_api_call, [], []

    async def guarded(self, name, arguments):
        if allows(policies[-1], name, arguments, *s3.removeprefix("s3://").split("/"), "rights"):
            return await call(self, name, arguments)
        denied.append((name, arguments.get("Key", arguments.get("Prefix"))))
        raise ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, name)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", guarded)
    url = f"{s3}/rights"
    policies += [json.loads((ROOT / f"infra/iam/{name}.json").read_text()) for name in ("reader", "writer")]
    pack(ToySource(COUNTS[:2]), url, grid=GRID, scenes_per_shard=2)
    storage.remove(f"{url}/manifest.json")  # as when shards are replaced
    pack(ToySource(COUNTS[:2]), url, grid=GRID, scenes_per_shard=2)
    # s3fs looks one level higher where a prefix is empty, and takes a refusal for "nothing there".
    assert set(denied) <= {("ListObjectsV2", "")}
    policies.pop()
    assert verify(url) == []
    assert storage.size(f"{url}/no-such-object") is None
    assert set(denied) <= {("ListObjectsV2", "")}
    with pytest.raises(PermissionError):
        storage.publish(b"", f"{url}/of-a-reader")
