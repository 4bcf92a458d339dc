"""Every error of a store is one line with its URL and what helps; only temporary failures are retried."""

import errno

import botocore.exceptions as boto
import pytest
from s3fs.errors import translate_boto_error

from occstream.launch import cli
from occstream.sharding import storage
from occstream.sharding.storeerrors import explain, transient

URL = "s3://bucket/data/manifest.json"


def answered(code, status=400, message="said by the store"):
    """What s3fs makes of an answer of the store."""
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(response, "GetObject"))


def named(name, text="", **more):
    """An error of a client library, which are told by their names."""
    return type(name, (Exception,), more)(text)


@pytest.mark.parametrize(
    ("error", "again", "kind", "words"),
    [
        (boto.NoCredentialsError(), False, PermissionError, "no working credentials found"),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), False, PermissionError, "AWS_SECRET_ACCESS_KEY"),
        (boto.ProfileNotFound(profile="p"), False, PermissionError, "AWS_PROFILE"),
        (boto.UnauthorizedSSOTokenError(), False, PermissionError, "AWS_PROFILE"),
        (
            boto.CredentialRetrievalError(provider="iam-role", error_msg="x"),
            True,
            PermissionError,
            "no working credentials",
        ),
        (
            boto.CredentialRetrievalError(provider="process", error_msg="x"),
            False,
            PermissionError,
            "no working credentials",
        ),
        (boto.NoRegionError(), False, ValueError, "AWS_DEFAULT_REGION"),
        (boto.ParamValidationError(report="Invalid bucket name"), False, ValueError, "check the URL"),
        (boto.EndpointConnectionError(endpoint_url="http://x"), True, OSError, "EndpointConnectionError"),
        (boto.ReadTimeoutError(endpoint_url="http://x"), True, OSError, "Read timeout"),
        (answered("ExpiredToken"), False, PermissionError, "credentials have expired; renew them"),
        (answered("InvalidToken"), False, OSError, "credentials have expired; renew them"),
        (answered("InvalidAccessKeyId", 403), False, PermissionError, "access denied; check the credentials"),
        (answered("403", 403, "Forbidden"), False, PermissionError, "OCCSTREAM_S3_ANONYMOUS=1"),
        (answered("RequestTimeTooSkewed", 403), False, PermissionError, "clock"),
        (answered("NoSuchBucket", 404), False, FileNotFoundError, "bucket does not exist"),
        (answered("NoSuchKey", 404), False, FileNotFoundError, "no such object"),
        (answered("PermanentRedirect", 301), False, OSError, "another region"),
        (answered("AuthorizationHeaderMalformed"), False, OSError, "AWS_DEFAULT_REGION"),
        (answered("InvalidBucketName"), False, OSError, "not a valid bucket name"),
        (answered("QuotaExceeded", 507), False, OSError, "the store is full"),
        (answered("SlowDown", 503), True, OSError, "said by the store"),
        (answered("InternalError", 500), True, OSError, "said by the store"),
        (named("ClientConnectorError", "cannot connect"), True, OSError, "cannot connect"),
        (named("ServerDisconnectedError"), True, OSError, "ServerDisconnectedError"),
        (
            named("ClientResponseError", "401, message=Unauthorized", status=401),
            False,
            PermissionError,
            "access denied",
        ),
        (named("ClientResponseError", "429", status=429), True, OSError, "429"),
        (named("SSLError", "CERTIFICATE_VERIFY_FAILED Connection"), False, OSError, "AWS_CA_BUNDLE"),
        (ImportError("Please install gcsfs"), False, ValueError, "gcsfs"),
        (OSError(errno.ENOSPC, "No space left on device"), False, OSError, "No space left"),
        (ConnectionResetError("reset"), True, OSError, "reset"),
    ],
)
def test_each_error_is_a_line_with_its_url_and_a_remedy(error, again, kind, words):
    assert transient(error) is again
    told = explain(error, URL)
    assert isinstance(told, kind)
    assert str(told).startswith(f"{URL}: ")
    assert words in str(told)
    assert "\n" not in str(told)


def test_an_error_of_a_local_disk_is_not_waited_for():
    assert transient(OSError(errno.EIO, "x"))
    assert not transient(OSError(errno.EIO, "x"), local=True)
    assert transient(OSError(errno.ESTALE, "x"), local=True)


def test_missing_credentials_are_one_line(monkeypatch, tmp_path, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    storage.forget()
    assert cli.main(["inspect", "s3://no-credentials/data"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: s3://no-credentials/data/manifest.json: no working credentials found")
    assert "OCCSTREAM_S3_ANONYMOUS=1" in said
    assert said.count("\n") == 1


def test_public_buckets_are_read_without_credentials_where_asked_for(monkeypatch):
    storage.forget()
    for given, first, second in (("1", True, True), ("open-one,other", True, False), ("", False, False)):
        monkeypatch.setenv("OCCSTREAM_S3_ANONYMOUS", given)
        assert storage._fs("s3://open-one/k")[0].anon is first
        assert storage._fs("s3://private/k")[0].anon is second
