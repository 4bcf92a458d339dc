"""Keeps a second writer away from a target for as long as the first lives; a kill leaves nothing that stays in the way.

On a file system the kernel's lock tells. On an object store an object that is renewed all the time does: whoever finds it
watches whether it is renewed. No clock is compared with another."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from occstream.sharding import storage, threads

RENEWED, EXPIRED = 10.0, 45.0  # seconds between renewals; without one for so long, the holder is dead


@contextlib.contextmanager
def only_writer(url: str, name: str, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Holds the lease of a part (i of n) of a target while the context is open.

    Raises:
        ValueError: another process holds it, or that of a part of another number of parts; names the process.
    """
    pattern = re.compile(rf"\.{name}-\d+-of-(\d+)\.lease")
    others = [n for n in storage.listing(url) if (m := pattern.fullmatch(n)) and int(m[1]) != part[1]]
    name = f"{name}-{part[0]}-of-{part[1]}"
    holder = {"process": os.getpid(), "host": socket.gethostname(), "run": uuid.uuid4().hex}
    local = storage.is_local(url)
    for other in others:
        if local:
            with _local(url, other, holder):
                pass  # nobody held it
        else:
            _wait_until_free(url, storage.join(url, other), holder)
            storage.remove(storage.join(url, other))
    with (_local if local else _remote)(url, f".{name}.lease", holder):
        yield


def _refuse(url: str, holder: dict) -> ValueError:
    who = f"process {holder.get('process')} on {holder.get('host')}"
    return ValueError(
        f"{url}: another packer is writing there ({who}); wait for it to finish, or give each its own --part i/n"
    )


@contextlib.contextmanager
def _local(url: str, name: str, holder: dict) -> Iterator[None]:
    folder = storage.local_path(url)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    try:
        with _locked(url, path) as file:
            file.truncate(0)
            file.write(json.dumps(holder))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _locked(url: str, path: Path) -> TextIO:
    """The file at a path, open and locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise _refuse(url, _parsed(file.read().encode())) from None
        except OSError:
            return file  # a file system without locks: the user's care
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder removed it between opening and locking: the lock would keep nobody out


@contextlib.contextmanager
def _remote(url: str, name: str, holder: dict) -> Iterator[None]:
    place = storage.join(url, name)
    _wait_until_free(url, place, holder)
    storage.publish(json.dumps(holder).encode(), place)
    if _read(place).get("run") != holder["run"]:
        raise _refuse(url, _read(place))  # both came at the same moment
    over = threading.Event()

    def renew() -> None:
        count = 0
        while not over.wait(RENEWED):
            count += 1
            with contextlib.suppress(Exception):  # a store that is away: nobody else can write there either
                storage.publish(json.dumps({**holder, "renewed": count}).encode(), place)

    thread = threads.start("lease", renew, lambda error: None)  # unrenewed, the lease expires
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):  # left, it expires
            storage.remove(place)


def _wait_until_free(url: str, place: str, mine: dict) -> None:
    seen, since, told = _read(place), time.monotonic(), False
    while seen:
        same_host = seen.get("host") == mine["host"]
        if same_host and (seen.get("process") == mine["process"] or not Path(f"/proc/{seen.get('process')}").exists()):
            return  # the holder was killed
        if time.monotonic() - since > EXPIRED:
            return
        if not told:
            print(
                f"{url}: process {seen.get('process')} on {seen.get('host')} has packed there; checking whether it still "
                f"runs (at most {EXPIRED:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(min(1.0, RENEWED / 4))
        now = _read(place)
        if now and now != seen:
            raise _refuse(url, now)
        seen = now


def _read(place: str) -> dict:
    try:
        return _parsed(storage.read_bytes(place))
    except FileNotFoundError:
        return {}


def _parsed(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {"host": "?"}
    return value if isinstance(value, dict) else {"host": "?"}
