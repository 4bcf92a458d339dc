"""One shard: a tar written so that its bytes depend on its members alone, published whole, with its record after it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from occstream.sharding import storage
from occstream.sharding.codec import canonical_json

HEADER = "__header__/header.json"  # webdataset skips members below a folder named __…__


def read_record(url: str) -> dict | None:
    """Record of the shard at a URL; None if there is none that can be used."""
    try:
        record = json.loads(storage.read_bytes(url[:-4] + ".json"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if _usable(record) else None


def _usable(record: object) -> bool:
    kinds = {"digest": str, "size": int, "sha256": str, "scenes": list, "failed": dict, "group": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(
        isinstance(s, dict)
        and {"name", "frames"} <= s.keys()
        and isinstance(s["name"], str)
        and type(s["frames"]) is int
        for s in record["scenes"]
    )


class ShardWriter:
    """Writes one tar; the bytes depend on the members alone."""

    def __init__(self, path: Path, header: dict) -> None:
        self.path, self.index = path, []
        self._file = path.open("w+b")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._write(HEADER, canonical_json(header))

    def add(self, key: str, members: list[tuple[str, bytes]]) -> None:
        """Adds the members of one frame."""
        start = self._file.tell()
        for name, data in members:
            self._write(name, data)
        self.index.append([key, start, self._file.tell() - start])

    def add_raw(self, key: str, data: bytes) -> None:
        """Adds the members of one frame as another tar has them."""
        self.index.append([key, self._file.tell(), len(data)])
        self._file.write(data)
        self._tar.offset = self._file.tell()

    def mark(self) -> tuple[int, int]:
        """A place to go back to."""
        return self._file.tell(), len(self.index)

    def back_to(self, mark: tuple[int, int]) -> None:
        """Forgets what was added since."""
        self._file.seek(mark[0])
        self._file.truncate()
        self._tar.offset = mark[0]
        del self.index[mark[1] :]

    def close(self) -> tuple[Path, list]:
        """Path and index (key, offset, length of each frame) of the finished tar."""
        self._tar.close()
        self._file.close()
        return self.path, self.index

    def _write(self, name: str, data: bytes) -> None:
        if len(name) > 100:
            raise ValueError(
                f"member name {name!r} is longer than 100 characters; shorten the scene's or camera's name"
            )
        info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid 0, mode 0644
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it remembers every member


def publish_shard(
    url: str,
    path: Path,
    *,
    group: str,
    digest: str,
    scenes: list,
    failed: dict,
    frames: list,
    replace: bool,
    classes: dict | None = None,
) -> dict:
    """Publishes a tar, then its record, and returns that. ``classes``: a record of the ``FrameClasses`` of a tar of labels."""
    record = {
        "group": group,
        "digest": digest,
        "size": path.stat().st_size,
        "sha256": storage.sha256_file(path),
        "scenes": scenes,
        "failed": failed,
        "frames": frames,
        **({} if classes is None else {"classes": classes}),
    }
    if replace:
        storage.remove(url[:-4] + ".json")  # or, after a kill between the two, it would describe the wrong tar
    storage.publish(path, url)
    storage.publish(canonical_json(record), url[:-4] + ".json")
    return record
