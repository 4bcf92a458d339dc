"""What the operating system lets a rank open, against what a job of this size needs."""

from __future__ import annotations

import resource
from pathlib import Path

ROOT = Path("/")
OTHER = 1024  # files of a rank besides its connections to other ranks: shards of several groups and streams, libraries, logs


def check_limits(ranks: int, rank: int) -> str:
    """Raises this process's own limit of open files as far as it may and needs.

    Args:
        ranks: of the job. Gloo connects each with every other one.
        rank: of this process; rank 0 is also the one where all begin.

    Returns:
        A warning; empty if there is none.

    Raises:
        ValueError: too few files may be open.
    """
    need = ranks + OTHER
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < need:
        if hard != unlimited and hard < need:
            raise ValueError(
                f"a process may open {hard} files here, but a rank of {ranks} needs {need} (a connection to every other rank, "
                f"shards): raise the limit (ulimit -n {need}; LimitNOFILE of the service; nofile of the container)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    try:
        queue = int((ROOT / "proc/sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return ""
    if rank == 0 and queue < ranks:
        return (
            f"{ranks} ranks connect to this machine at once, and net.core.somaxconn lets {queue} wait: if the start fails, "
            f"sysctl -w net.core.somaxconn={ranks}"
        )
    return ""
