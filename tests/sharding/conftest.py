"""A real object store, and a faulty way to it."""

import contextlib

import pytest
import s3fs

from tests import faultproxy, objectstore


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


@pytest.fixture
def through(endpoint, s3, monkeypatch):
    """Sends everything through a faulty proxy: ``with through(Faults(…)) as faults``."""

    @contextlib.contextmanager
    def switch(faults):
        with faultproxy.before(endpoint, faults) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
            s3fs.S3FileSystem.clear_instance_cache()
            try:
                yield faults
            finally:
                monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
                s3fs.S3FileSystem.clear_instance_cache()

    return switch
