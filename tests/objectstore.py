"""A real S3 server for tests: OpenStack Swift with its S3 interface (from PyPI), on free ports of the loopback."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

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
    bin = Path(sys.executable).parent
    ports = dict(zip(("account", "container", "object", "proxy"), _free_ports(4)))
    etc, devices = folder / "etc", folder / "srv"
    etc.mkdir(parents=True)
    (devices / "d1").mkdir(parents=True)
    env = {**os.environ, "SWIFT_DIR": str(etc), "PATH": f"{bin}:{os.environ['PATH']}"}
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
        "[storage-policy:0]\nname = Policy-0\ndefault = yes\n"
    )
    for kind, port in ports.items():
        common = f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\n"
        common += f"user = {getpass.getuser()}\nswift_dir = {etc}\n"
        if kind == "proxy":
            text = f"[pipeline:main]\npipeline = {_PIPELINE}\n"
            text += "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
            for name, egg in _FILTERS.items():
                text += f"[filter:{name}]\nuse = egg:swift#{egg}\n{_SETTINGS.get(name, '')}"
        else:
            common += f"devices = {devices}\nmount_check = false\ndisable_fallocate = true\n"
            text = f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
            for step in (["create", "4", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
                ring = [bin / "swift-ring-builder", etc / f"{kind}.builder", *step]
                subprocess.run(ring, env=env, check=True, capture_output=True)
        (etc / f"{kind}-server.conf").write_text(common + text)
    processes = []
    try:
        for kind in ports:
            log = (folder / f"{kind}.log").open("w")
            command = [bin / f"swift-{kind}-server", etc / f"{kind}-server.conf"]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        _wait(f"http://127.0.0.1:{ports['proxy']}", folder)
        yield f"http://127.0.0.1:{ports['proxy']}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


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
