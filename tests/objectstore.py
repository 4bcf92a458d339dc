"""A real S3 server for tests: OpenStack Swift with its S3 interface (from PyPI), on free ports of the loopback."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KINDS = ("account", "container", "object", "proxy")
KEY, SECRET = "test:tester", "testing"
_PIPELINE = "catch_errors proxy-logging cache listing_formats bulk s3api tempauth slo dlo proxy-logging proxy-server"
_FILTERS = {
    "catch_errors": "catch_errors",
    "proxy-logging": "proxy_logging",
    "cache": "memcache",
    "listing_formats": "listing_formats",
    "bulk": "bulk",
    "s3api": "s3api",
    "tempauth": "tempauth",
    "slo": "slo",
    "dlo": "dlo",
}
_SETTINGS = {
    "s3api": "s3_acl = false\ncheck_bucket_owner = false\nlocation = us-east-1\n",
    "tempauth": "user_test_tester = testing .admin\n",
}


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """Starts the server in a folder; yields its endpoint URL. Raises RuntimeError with the log if it does not start."""
    ports = dict(zip(KINDS, _free_ports(4)))
    etc, devices = folder / "etc", folder / "srv"
    etc.mkdir(parents=True)
    (devices / "d1").mkdir(parents=True)
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
        "[storage-policy:0]\nname = Policy-0\ndefault = yes\n"
    )
    for kind, port in ports.items():
        text = f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\n"
        text += f"user = {getpass.getuser()}\nswift_dir = {etc}\n"
        if kind == "proxy":
            text += f"[pipeline:main]\npipeline = {_PIPELINE}\n"
            text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
            for name, egg in _FILTERS.items():
                text += f"[filter:{name}]\nuse = egg:swift#{egg}\n{_SETTINGS.get(name, '')}"
        else:
            text += f"devices = {devices}\nmount_check = false\ndisable_fallocate = true\n"
            text += f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        (etc / f"{kind}-server.conf").write_text(text)
    with (folder / "servers.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, folder, *(f"{kind}={port}" for kind, port in ports.items())],
            env={**os.environ, "SWIFT_DIR": str(etc)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{ports['proxy']}", folder)
        yield f"http://127.0.0.1:{ports['proxy']}"
    finally:
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _serve(folder: Path, ports: dict[str, int]) -> None:
    """Makes the rings and serves in processes that are forked from this one, until whoever started it closes its input."""
    from swift.account import server as account
    from swift.common.ring import RingBuilder
    from swift.container import server as container
    from swift.obj import server as object_server
    from swift.proxy import server as proxy

    mains = {"account": account.main, "container": container.main, "object": object_server.main, "proxy": proxy.main}
    for kind in KINDS[:3]:
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
        where = {"ip": "127.0.0.1", "port": ports[kind]}
        where |= {f"replication_{name}": value for name, value in where.items()}
        builder.add_dev({"region": 1, "zone": 1, "device": "d1", "weight": 1, "meta": "", **where})
        builder.rebalance()
        builder.get_ring().save(folder / f"etc/{kind}.ring.gz")
    started = []
    for kind, main in mains.items():
        started.append(os.fork())
        if not started[-1]:
            sys.argv = [f"swift-{kind}-server", str(folder / f"etc/{kind}-server.conf")]
            log = os.open(folder / f"{kind}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.exit(main())
    sys.stdin.read()
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(endpoint: str, folder: Path) -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            return
        except urllib.error.HTTPError:
            return  # it answers: nobody is logged in
        except OSError:
            time.sleep(0.25)
    logs = "\n".join(p.read_text()[-1000:] for p in folder.glob("*.log"))
    raise RuntimeError(f"Swift did not start:\n{logs}")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), {kind: int(port) for kind, _, port in (word.partition("=") for word in sys.argv[2:])})
