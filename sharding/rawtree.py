"""Raw data where it lies: folders of a store (``s3://``, ``gs://``, ``hf://``, ``memory://``, …) and of zip archives, local or in
one, as objects with the methods of ``pathlib.Path`` that sources use.

Nothing is downloaded as a whole: a folder is listed when somebody asks for its names, once in a process; of an archive the table
of contents is read, then single members by range. ``ahead`` fetches files together, so that their latencies overlap.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import posixpath
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from occstream.sharding import storage

AT_ONCE = 16  # requests that ``ahead`` has under way
MOST_AHEAD = 1024  # files that wait to be read
LARGEST_MEMBER = 4 << 30  # bytes of an archive's member when decompressed
_TAIL = 1 << 20  # bytes of an archive that are read at a time for its table of contents
_SLACK = 1 << 10  # the header of a member may be longer than the table of contents says
_ZIP = ".zip"


@dataclass(frozen=True, order=True)
class Tree:
    """A file or folder below a URL, or in an archive. Hashable, and cheap to pickle: it holds names alone.

    Attributes:
        base: URL of a folder; or URL or path of a zip archive, where ``archive`` says so.
        path: below it, with "/" between parts; "" is ``base`` itself.
    """

    base: str
    path: str = ""
    archive: bool = False

    def __truediv__(self, name: str) -> Tree:
        parts = [*self.path.split("/"), *str(name).replace("\\", "/").split("/")]
        if ".." in parts:
            raise ValueError(f"{self}: {name!r} leads out of it")
        return Tree(self.base, "/".join(p for p in parts if p not in ("", ".")), self.archive)

    def __str__(self) -> str:
        return f"{self.base}/{self.path}" if self.path else self.base

    @property
    def name(self) -> str:
        """Of an archive itself, without ``.zip``: it stands for the folder that it holds."""
        return posixpath.basename(self.path or self.base.removesuffix(_ZIP))

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Tree:
        return Tree(self.base, posixpath.dirname(self.path), self.archive)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")) if self.path else ()

    def relative_to(self, other: Tree) -> Tree:
        """What leads from ``other`` here, as ``parts``. Raises ValueError if it is not below."""
        if self.base != other.base or self.parts[: len(other.parts)] != other.parts:
            raise ValueError(f"{self} is not below {other}")
        return Tree("", "/".join(self.parts[len(other.parts) :]))

    def is_dir(self) -> bool:
        if not self.path:
            return bool(_names(self))
        return _names(self.parent).get(self.name, False)

    def is_file(self) -> bool:
        return bool(self.path) and not _names(self.parent).get(self.name, True)

    def exists(self) -> bool:
        return self.is_dir() if not self.path else self.name in _names(self.parent)

    def iterdir(self) -> Iterator[Tree]:
        return (self / name for name in _names(self))

    def glob(self, pattern: str) -> Iterator[Tree]:
        """What matches, in the order of the names; ``**`` stands for any folders."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            yield from self.glob(rest)
            for name, folder in _names(self).items():
                if folder:
                    yield from (self / name).glob(pattern)
            return
        if not set(first) & set("*?["):  # no need to list what lies beside it
            found = [first] if (self / first).exists() else []
        else:
            found = [name for name in _names(self) if fnmatch.fnmatchcase(name, first)]
        for name in found:
            if rest:
                yield from (self / name).glob(rest)
            else:
                yield self / name

    def read_bytes(self) -> bytes:
        """The whole file; where ``ahead`` has fetched it already, without another request.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, OSError, ValueError: of one line, naming the URL.
        """
        with _lock:
            coming = _coming.pop(self, None)
        return coming.result() if coming else _read(self)


Place = Path | Tree  # of a raw file or folder


def raw_place(root: str) -> Place:
    """A path or URL as somebody gave it. ``…/x.zip`` and ``…/x.zip/folder`` are inside an archive."""
    remote = not storage.is_local(root)
    head, found, inside = root.partition(_ZIP + "/")
    archive = head + _ZIP if found else root.rstrip("/")
    if archive.endswith(_ZIP) and (remote or Path(archive).is_file()):
        return Tree(archive, "", archive=True) / inside
    return Tree(root.rstrip("/")) if remote else Path(root)


def inside(archive: Place) -> Tree:
    """What a zip archive holds."""
    return Tree(str(archive), "", archive=True)


_lock = threading.Lock()
_coming: dict[Tree, Future[bytes]] = {}


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "raw")


def ahead(places: Iterable[Place]) -> None:
    """Begins to fetch files of stores, for whoever reads them next. A file that nobody reads is kept until 1,024 others came
    after it; an error is raised where the file is read."""
    with _lock:
        for place in places:
            if isinstance(place, Tree) and place not in _coming:
                _coming[place] = _pool().submit(_read, place)
        while len(_coming) > MOST_AHEAD:
            _coming.pop(next(iter(_coming))).cancel()


def forget() -> None:
    """Drops what this process knows of folders, archives and files: they may have changed."""
    with _lock:
        _coming.clear()
    for known in (_names, _contents):
        known.cache_clear()


@functools.lru_cache(1 << 14)
def _names(folder: Tree) -> dict[str, bool]:
    """Names in a folder, sorted, and whether each is a folder; empty if there is none."""
    if folder.archive:
        return _contents(folder.base).folders.get(folder.path, {})
    return dict(sorted(storage.names(str(folder)).items()))


def _read(file: Tree) -> bytes:
    return _contents(file.base).read(file.path) if file.archive else storage.read_bytes(str(file))


class _Archive:
    """Table of contents of a zip archive.

    Raises:
        ValueError: it is no zip archive, or damaged.
    """

    def __init__(self, url: str) -> None:
        place = raw_place(url)
        # One in another archive is small enough to be held, or it would not be there.
        self._held = place.read_bytes() if isinstance(place, Tree) and place.path else None
        size = storage.size(url) if self._held is None else len(self._held)
        if size is None:
            raise FileNotFoundError(f"{url}: no such object")
        self.url, self.size = url, size
        try:
            with zipfile.ZipFile(io.BufferedReader(_Ranges(self._range, size), _TAIL)) as archive:
                self.members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError) as error:
            raise ValueError(f"{url}: not readable as a zip archive ({error}); download it again") from None
        self.folders: dict[str, dict[str, bool]] = {}
        for name in sorted(self.members):
            child, folder = name, False
            while child:
                parent = posixpath.dirname(child)
                if posixpath.basename(child) in self.folders.setdefault(parent, {}):
                    break
                self.folders[parent][posixpath.basename(child)] = folder
                child, folder = parent, True

    def _range(self, offset: int, length: int) -> bytes:
        if self._held is not None:
            return self._held[offset : offset + length]
        return storage.read_bytes(self.url, offset, length)

    def read(self, name: str) -> bytes:
        """One member, by range. Raises FileNotFoundError, or ValueError if it is damaged, encrypted or too large."""
        where, info = f"{self.url}/{name}", self.members.get(name)
        if info is None:
            raise FileNotFoundError(f"{where}: no such member of the archive")
        if info.flag_bits & 1 or info.file_size > LARGEST_MEMBER:
            raise ValueError(f"{where}: is encrypted, or larger than {LARGEST_MEMBER} bytes")
        length = 30 + len(info.filename.encode()) + len(info.extra) + info.compress_size
        data = self._range(info.header_offset, min(length + _SLACK, self.size - info.header_offset))
        if data[:4] != b"PK\x03\x04" or len(data) < 30:
            raise ValueError(f"{where}: its header is damaged; download the archive again")
        start = 30 + sum(struct.unpack("<HH", data[26:30]))
        packed = data[start : start + info.compress_size]
        if len(packed) < info.compress_size:
            packed = self._range(info.header_offset + start, info.compress_size)
        try:
            raw = _unpacked(packed, info)
        except (zlib.error, ValueError) as error:
            raise ValueError(f"{where}: damaged ({error}); download the archive again") from None
        return raw


def _unpacked(packed: bytes, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type == zipfile.ZIP_STORED:
        raw = packed
    elif info.compress_type == zipfile.ZIP_DEFLATED:
        raw = zlib.decompressobj(-15).decompress(packed, info.file_size + 1)
    else:
        raise ValueError(f"compression method {info.compress_type} is not supported")
    if len(raw) != info.file_size or zlib.crc32(raw) != info.CRC:
        raise ValueError("size or checksum differs")
    return raw


@functools.lru_cache(64)
def _contents(url: str) -> _Archive:
    return _Archive(url)


class _Ranges(io.RawIOBase):
    """An object as a file that is read by ranges."""

    def __init__(self, ranges: Callable[[int, int], bytes], size: int) -> None:
        self._range, self._size, self._at = ranges, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + {0: 0, 1: self._at, 2: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        data = self._range(self._at, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
