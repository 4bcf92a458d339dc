"""Errors of stores and of their client libraries: which ones asking again can help, and what each means in one line."""

from __future__ import annotations

import errno
import re

from occstream.sharding.secrets import redact

CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role of the machine"
ANONYMOUS = "OCCSTREAM_S3_ANONYMOUS"  # 1, or names of buckets with commas between: read and written without credentials

# What the code of an S3 error means, and what helps. Code of a HEAD request: the HTTP status, as it has no body.
_MEANING = {
    ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"): (
        "the credentials have expired; renew them (aws sso login, or another AWS_SESSION_TOKEN) and run this again"
    ),
    ("RequestTimeTooSkewed",): "this machine's clock is wrong, so the store refuses it; set the clock",
    (
        "PermanentRedirect",
        "TemporaryRedirect",
        "Redirect",
        "301",
        "307",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "InvalidLocationConstraint",
    ): "the bucket is in another region or at another endpoint; set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL_S3",
    ("NoSuchBucket",): "the bucket does not exist; check its name and AWS_ENDPOINT_URL_S3",
    ("InvalidBucketName",): "not a valid bucket name (3 to 63 lower-case letters, digits, dots and hyphens)",
    ("QuotaExceeded", "XMinioStorageFull", "StorageFull", "507"): "the store is full; make room there",
    (
        "NotImplemented",
        "501",
        "MethodNotAllowed",
        "405",
    ): "the store cannot do this; is it an S3 store, with this path?",
}
_TRY_AGAIN = (errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ESTALE, errno.EINTR, errno.EAGAIN)
_WORDS = re.compile(
    r"SlowDown|IncompleteBody|BadDigest|Unavailable|Timeout|timed out|Connect|reset|Server|ClientPayload|ClientOSError"
    r"|50[0234]|InternalError|RequestLimitExceeded|Throttl|TooManyRequests"
)
# By name: the libraries are imported with the first URL of their kind. A token that a server on the machine gives out may
# come a moment later.
_CREDENTIALS = re.compile(r"Credential|ProfileNotFound|SSO|TokenRetrieval|NoAuthToken|ConfigNotFound|ConfigParse")
_SETTINGS = re.compile(r"NoRegion|InvalidRegion|ParamValidation|InvalidEndpoint|UnknownService|InvalidURL")


def transient(error: BaseException, local: bool = False) -> bool:
    """Whether asking again can help: throttling, 5xx, resets and time-outs, but not what is missing, forbidden or wrong.

    Args:
        local: it came from a file system of this machine, where an error of input or output stays.
    """
    name, text = type(error).__name__, str(error)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)):
        return False
    if _CREDENTIALS.search(name):
        return bool(re.search(r"iam-role|container-role", text))
    if _SETTINGS.search(name) or "CERTIFICATE_VERIFY_FAILED" in text:
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and (error.errno in _TRY_AGAIN or (error.errno == errno.EIO and not local)):
        # What s3fs makes of SlowDown and InternalError, and of codes that it does not know.
        return not _meaning(error)
    status = getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    elif isinstance(code := getattr(response, "status_code", None), int):  # of libraries that speak HTTP themselves
        status = code
    if isinstance(status, int) and status:
        return status >= 500 or status in (408, 425, 429)
    return not local and bool(_WORDS.search(f"{name} {text}"))


def explain(error: BaseException, url: str) -> Exception:
    """What a user is told: a FileNotFoundError, PermissionError, ConnectionError, OSError or ValueError of one line with
    the URL and what helps. Secrets in the URL or in the library's words are not in it."""
    url = redact(url)
    name, said = type(error).__name__, redact(" ".join(str(error).split()))[:200]
    if isinstance(error, ConnectionError) and said.startswith(url):
        return error
    if isinstance(error, ValueError) and "contains a password or token" in said:
        return error
    meaning = _meaning(error)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: {meaning or 'no such object'}")
    if _CREDENTIALS.search(name):
        return PermissionError(
            f"{url}: no working credentials found ({said}): {CREDENTIALS}; for a public bucket, set {ANONYMOUS}=1"
        )
    if url.startswith("hf://") and getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        return PermissionError(
            f"{url}: access denied; agree to its terms on the hub and log in with `hf auth login` ({said})"
        )
    if isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403):
        return _denied(error, url, said, meaning)
    if meaning:
        return OSError(f"{url}: {meaning} ({said})")
    return _explain_by_type(error, url, said)


def _denied(error: BaseException, url: str, said: str, meaning: str) -> PermissionError:
    if meaning:
        return PermissionError(f"{url}: {meaning} ({said})")
    if getattr(error, "filename", None):
        return PermissionError(f"{url}: {said}; check the permissions of the file and its folder")
    return PermissionError(
        f"{url}: access denied; check the credentials and their permissions ({said}): {CREDENTIALS}; a public bucket needs "
        f"none with {ANONYMOUS}=1"
    )


def _explain_by_type(error: BaseException, url: str, said: str) -> Exception:
    """What is told of an error that carries no code of the store that means something."""
    name = type(error).__name__
    if isinstance(error, ImportError):
        return ValueError(f"{url}: needs a package that is not installed ({said})")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return OSError(f"{url}: the store's certificate is not trusted; set AWS_CA_BUNDLE to its authority's ({said})")
    if _SETTINGS.search(name):
        return ValueError(f"{url}: {said}; check the URL, AWS_ENDPOINT_URL_S3 and AWS_DEFAULT_REGION")
    if not isinstance(error, (ValueError, OSError)):
        return OSError(f"{url}: {name}: {said}")
    kind = type(error) if type(error) in (ValueError, OSError, ConnectionError, TimeoutError) else OSError
    told = kind(said if url in said else f"{url}: {said}")
    if isinstance(error, OSError) and isinstance(told, OSError):
        told.errno = error.errno
    return told


def _meaning(error: BaseException) -> str:
    """Of the code that the store gave; "" if it adds nothing to the error's type."""
    seen = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            return next((text for codes, text in _MEANING.items() if code in codes), "")
        seen = seen.__cause__
    return ""
