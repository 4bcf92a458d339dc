"""Keeps passwords and tokens that stand in URIs out of everything that is written or printed."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"://[^/@\s]*@")
_TOKEN = re.compile(
    r"([?&;][^=&;\s]*(?:token|sig|secret|passw|pwd|key|credential|auth)[^=&;\s]*=)[^&;#\s\"')]+", re.IGNORECASE
)
_INSTEAD = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "http": "for an MLflow server, set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for "
    "data, give its s3:// URL and AWS credentials",
    "postgresql": "use PGPASSWORD or ~/.pgpass, or an MLflow server in front of the database",
    "mysql": "use ~/.my.cnf, or an MLflow server in front of the database",
}


def redact(text: str) -> str:
    """A text whose URIs have neither user and password nor tokens in their query."""
    return _TOKEN.sub(r"\1***", _USER.sub("://***@", text))


def redacted(value: Any) -> Any:
    """Plain nested values with ``redact`` on every string, such as a config that somebody else has written."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: redacted(v) for k, v in value.items()}
    return [redacted(v) for v in value] if isinstance(value, (list, tuple)) else value


def refuse_secrets(uri: str, where: str) -> str:
    """The URI, if there is no user, password or token in it.

    Args:
        where: setting or option that it comes from.

    Raises:
        ValueError: there is; says how to give it instead.
    """
    shown = redact(uri)
    if shown != uri:
        scheme = uri.partition("://")[0].partition("+")[0].removesuffix("s") if "://" in uri else ""
        instead = _INSTEAD.get(scheme, "set it in the environment or in a file of the client library")
        raise ValueError(
            f"{where} ({shown}) contains a password or token, which would be written into config.yaml, checkpoints and "
            f"MLflow: remove it there and {instead}"
        )
    return uri
