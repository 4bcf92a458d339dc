"""Where shards live: local files and ``s3://`` through fsspec, with retries, atomic publishing and a node-local cache."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import hashlib
import math
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec

from occstream.sharding import threads
from occstream.sharding.places import place
from occstream.sharding.secrets import redact, refuse_secrets
from occstream.sharding.storeerrors import ANONYMOUS, explain, transient

T = TypeVar("T")
MINUTES = (
    5.0  # that a store may be away before it is an error; the environment's OCCSTREAM_STORAGE_MINUTES takes precedence
)
PAUSE, LONGEST = 0.2, 15.0  # seconds before the second try, doubled with each, and the most
BLOCK = 8 << 20
PATIENCE, SLOW = 10.0, 2 << 20  # seconds, bytes a second: a download slower than this is asked for a second time
PUBLIC = {  # buckets that anybody may read, and their regions
    "argoverse": "us-east-1",
    "motional-nuscenes": "ap-northeast-1",
    "motional-nuplan": "ap-northeast-1",
    "man-truckscenes": "eu-central-1",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
PART = 32 << 20  # objects beyond twice this are uploaded in parts of it


def join(url: str, *names: str) -> str:
    """URL below a URL. (pathlib would turn ``s3://`` into ``s3:/``.)"""
    return "/".join([url.rstrip("/"), *names])


def is_local(url: str) -> bool:
    return "://" not in place(url)


def local_path(url: str) -> Path:
    return Path(place(url))


def _fs(url: str) -> tuple[Any, str]:
    if not is_local(url):
        refuse_secrets(url, "the URL")
    if is_local(url):
        # Not by fsspec's own rules, by which "::" chains, "~" is the home folder and "local:" a protocol.
        return fsspec.filesystem("file"), os.path.abspath(local_path(url))
    if not url.startswith("s3://"):
        return fsspec.core.url_to_fs(url)
    # Three layers would each retry, and a dead store would take minutes to notice: ``retry`` is the one that waits.
    timeouts = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
    fs, path = fsspec.core.url_to_fs(url, config_kwargs=timeouts, **_access(url))
    fs.retries = 2
    return fs, path


def _access(url: str) -> dict[str, Any]:
    """How a bucket is asked: without credentials where the environment says so, or where it is known to be public and there
    are none; in its own region where that is known and no other store is set."""
    bucket, said = url.removeprefix("s3://").split("/", 1)[0], os.environ.get(ANONYMOUS, "")
    found: dict[str, Any] = {}
    if bucket in PUBLIC and not any(os.environ.get(name) for name in _ENDPOINTS):
        found["client_kwargs"] = {"region_name": PUBLIC[bucket]}
    if said == "1" or bucket in said.split(","):
        found["anon"] = True
    elif bucket in PUBLIC and not _has_credentials():
        found["anon"] = True
        _say_once(f"s3://{bucket} is a public bucket: it is read without credentials")
    return found


def _has_credentials() -> bool:
    """Whether the environment or a file gives some. (A role of the machine is no reason not to read what is public without.)"""
    if any(os.environ.get(name) for name in _CREDENTIALS):
        return True
    files = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    return any(os.path.exists(os.path.expanduser(os.environ.get(name) or path)) for name, path in files.items())


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_counts: collections.Counter[str] = collections.Counter()
_counting = threading.Lock()


def _count(what: str) -> None:
    with _counting:
        _counts[what] += 1


def counts() -> collections.Counter[str]:
    """Of this process: ``retries`` of requests, and ``hits`` and ``misses`` of shards asked of the cache."""
    with _counting:
        return collections.Counter(_counts)


def forget() -> None:
    """Drops open connections and what the environment said when they were made."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def minutes() -> float:
    """How long a store may be away. Raises ValueError if the environment says nonsense."""
    return from_environment("OCCSTREAM_STORAGE_MINUTES", MINUTES, "minutes from 0, such as 30")


def from_environment(name: str, otherwise: float, what: str) -> float:
    """A number from 0 that a variable of the environment gives. Raises ValueError, which says what it should be."""
    given = os.environ.get(name, "")
    try:
        value = float(given or otherwise)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {given!r}: give {what}")
    return value


def retry(work: Callable[[], T], what: str) -> T:
    """Calls ``work`` until it succeeds; exponential back-off with jitter between transient failures, for ``minutes()``.

    Raises:
        The last error when it is not transient; ConnectionError that names ``what`` when the time is over.
    """
    attempt, began = 0, time.monotonic()
    patience = minutes() * 60
    while True:
        try:
            return work()
        except Exception as error:
            if not transient(error, is_local(what)):
                raise
            pause = min(LONGEST, PAUSE * 2 ** min(attempt, 20)) * random.uniform(0.5, 1.5)
            waited = time.monotonic() - began
            said = redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:220]
            if waited + pause > patience:
                raise ConnectionError(
                    f"{what}: still failing after {attempt + 1} tries in {waited:.0f} s ({said}); check that the store is "
                    "up and AWS_ENDPOINT_URL_S3 is correct; OCCSTREAM_STORAGE_MINUTES sets how long to wait"
                ) from error
            attempt += 1
            _count("retries")
            if waited + pause > NOTICE:
                _notice(f"{what}: does not answer ({said}); retrying for {minutes():g} minutes")
            time.sleep(pause)


NOTICE = 3.0  # seconds of failing after which it is said
_noticed = -math.inf


def _notice(text: str) -> None:
    """Prints a line, at most one a minute from all threads."""
    global _noticed
    with _counting:
        if time.monotonic() - _noticed < 60:
            return
        _noticed = time.monotonic()
    print(text, file=sys.stderr, flush=True)


def _ask(url: str, work: Callable[[Any, str], T]) -> T:
    """What ``work`` gives for the file system and the path of a URL, with ``retry``.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, OSError, ValueError: of one line, naming the URL.
    """
    try:
        fs, path = _fs(url)
        return retry(lambda: work(fs, path), url)
    except Exception as error:
        raise explain(error, url) from error


def hedged(work: Callable[[int], T], after: float) -> T:
    """What ``work(0)`` gives; if that takes longer than ``after`` seconds, what it or ``work(1)`` gives first.

    A request that hangs on one bad peer is cheaper to repeat than to wait for. The slower one runs to its end, ignored.

    Raises:
        The error of the last one, if none succeeded.
    """
    came: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def start(number: int) -> None:  # a daemon: a request that hangs must not keep the process from ending
        threads.start(f"hedge-{number}", lambda: came.put((work(number), None)), lambda error: came.put((None, error)))

    start(0)
    asked = 1
    try:
        result, error = came.get(timeout=after)
    except queue.Empty:
        start(1)
        asked = 2
        result, error = came.get()
    if error is not None and asked == 2:
        result, error = came.get()
    if error is not None:
        raise error
    return cast(T, result)


def read_bytes(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """A whole object, or a range of it. Raises as ``_ask``."""
    end = None if length is None else offset + length
    return _ask(url, lambda fs, path: fs.cat_file(path, start=offset or None, end=end))


def fetch(url: str, path: Path) -> None:
    """Copies an object to a local file. Raises as ``_ask``."""
    _ask(url, lambda fs, remote: fs.get_file(remote, str(path)))


def size(url: str) -> int | None:
    """Bytes of an object, None if there is none."""

    def look(fs: Any, path: str) -> int:
        fs.invalidate_cache()
        return fs.info(path)["size"]

    try:
        return _ask(url, look)
    except FileNotFoundError:
        return None


def _entries(url: str) -> list[dict]:
    """What lies directly below a URL, as the store has it now; empty if there is nothing."""

    def look(fs: Any, path: str) -> list[dict]:
        fs.invalidate_cache()
        return fs.ls(path, detail=True)

    try:
        return _ask(url, look)
    except FileNotFoundError:
        return []


def listing(url: str) -> dict[str, int]:
    """Bytes by name of the objects directly below a URL; empty if there is nothing."""
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in _entries(url) if entry["type"] == "file"}


def folders(url: str) -> list[str]:
    """Names of what has objects below it, directly below a URL; empty if there is nothing."""
    return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in _entries(url) if entry["type"] == "directory"]


def names(url: str) -> dict[str, bool]:
    """What lies directly below a URL by name, and whether it is a folder; empty if there is nothing."""
    found = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] == "directory" for entry in _entries(url)}
    return {name: folder for name, folder in found.items() if name}


def remove(url: str) -> None:
    """Removes an object; nothing happens if there is none."""
    with contextlib.suppress(FileNotFoundError):
        _ask(url, lambda fs, path: fs.rm_file(path))


def file_mode() -> int:
    """Mode of a new file by this process's umask (some libraries make theirs readable for the owner alone)."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    mask = os.umask(0o022)  # elsewhere than on Linux it can only be read by changing it
    os.umask(mask)
    return 0o666 & ~mask


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk, so that a rename survives a loss of power. Some file systems cannot."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def publish(source: Path | bytes, url: str) -> None:
    """Makes an object appear under its name complete or not at all (rename on disk; an object store does it itself).

    Raises:
        PermissionError, ConnectionError, OSError: naming the URL; nothing is there, or what was there before.
    """
    if is_local(url):
        target = local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                if isinstance(source, bytes):
                    out.write(source)
                else:
                    with source.open("rb") as data:
                        shutil.copyfileobj(data, out, BLOCK)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(partial, file_mode())
            os.replace(partial, target)
            sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise
        return

    def send(fs: Any, path: str) -> None:
        if isinstance(source, bytes):
            fs.pipe_file(path, source)
        else:
            fs.put_file(str(source), path, chunksize=PART)

    def put(fs: Any, path: str) -> None:
        try:
            send(fs, path)
        except FileNotFoundError:
            if not isinstance(source, bytes) and not source.exists():
                raise ValueError(f"{source}: is gone, so it was not copied to {url}") from None
            with contextlib.suppress(FileExistsError):  # there is no such bucket yet
                fs.mkdir(path.split("/", 1)[0])
            send(fs, path)
        fs.invalidate_cache()
        want = len(source) if isinstance(source, bytes) else source.stat().st_size
        if (got := fs.info(path)["size"]) != want:
            raise ConnectionError(f"{got} of {want} bytes arrived")

    _ask(url, put)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _digest(file: int) -> str:
    with os.fdopen(os.dup(file), "rb") as data:
        data.seek(0)
        return hashlib.file_digest(data, "sha256").hexdigest()


class ShardCache:
    """Node-local copies of remote shards, shared by the processes of a node through files and locks alone.

    Keyed by the full URL and the digest of the content, so that equal names of two data sets never mix. Size and
    SHA-256 are checked when a shard arrives, and once more when a process first uses one that was there.

    Args:
        folder: created if needed.
        limit: bytes; the least recently used shards go when a new one needs room.
    """

    def __init__(self, folder: str | Path, limit: int = 64 << 30) -> None:
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checked: set[str] = set()

    def open(self, url: str, length: int, sha256: str) -> int:
        """An open descriptor of a shard, downloaded if it is not there yet. It stays readable when another process removes
        the file to make room. The caller closes it.

        Raises:
            ValueError: what arrived twice in a row is not what the manifest says.
        """
        path = self.path(url, sha256)
        name = path.stem
        if name in self._checked and (file := _open(path)) is not None:
            os.utime(file)
            _count("hits")
            return file
        with self._lock(name):
            file = _open(path)
            _count("misses" if file is None else "hits")
            for _ in range(2):
                if file is None:
                    file = self._download(url, path, length)
                if os.fstat(file).st_size == length and _digest(file) == sha256:
                    self._checked.add(name)
                    os.utime(file)
                    return file
                os.close(file)
                file = None
                path.unlink(missing_ok=True)
        raise ValueError(
            f"{url}: size or SHA-256 differ from the manifest, even after fetching it again; pack it again"
        )

    def path(self, url: str, sha256: str) -> Path:
        """Where a shard is, if it is here; another process may remove it at any time."""
        name = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:40]
        return self.folder / f"{name}.tar"

    def fetch(self, url: str, length: int, sha256: str) -> Path:
        """As ``open``, for whoever only wants it to be here. Returns ``path``."""
        os.close(self.open(url, length, sha256))
        return self.path(url, sha256)

    def _download(self, url: str, path: Path, length: int) -> int:
        """With the shard's lock held, so that its partial file, left by a process that was killed, is ours to replace.
        Returns a descriptor, opened before anybody else can see (and remove) the file."""
        self._make_room(length)
        partials = [path.with_suffix(".part"), path.with_suffix(".part2")]

        def get(number: int) -> Path:
            fetch(url, partials[number])
            return partials[number]

        try:
            partial = hedged(get, PATIENCE + length / SLOW)
            file = os.open(partial, os.O_RDONLY)
            os.replace(partial, path)
            return file
        except FileNotFoundError:
            raise FileNotFoundError(f"{url}: shard is missing") from None
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)

    def _make_room(self, need: int) -> None:
        """Removes the least recently used shards, and what killed processes left."""
        for partial in self.folder.glob("*.part*"):
            with contextlib.suppress(OSError), self._lock(partial.stem, wait=False):
                partial.unlink()
        kept = {}
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                kept[path] = path.stat()
        total = sum(s.st_size for s in kept.values())
        for old in sorted(kept, key=lambda p: kept[p].st_mtime):
            if total + need <= self.limit:
                break
            total -= kept[old].st_size
            old.unlink(missing_ok=True)  # readers keep it through their open file

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Holds a shard's lock, which the kernel takes back from a killed process. Raises BlockingIOError if not to wait."""
        with (self.folder / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
