"""Manifest + order -> decoded frames for this rank, by threads, straight into a ring of preallocated batch buffers."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from occstream.sharding import storage
from occstream.sharding import threads as guarded
from occstream.sharding.codec import CorruptSample, IncompleteSample, decode
from occstream.sharding.entries import shard_path
from occstream.sharding.manifest import Manifest, is_labels
from occstream.sharding.order import Sample
from occstream.sharding.received import load_json, read_index
from occstream.sharding.schema import Frame, frame_key

Fill = Callable[[Frame, int, dict[str, np.ndarray]], object]
PATIENCE = 10.0  # seconds that closing waits for threads that are in the middle of a read


class Field(NamedTuple):
    """One array of a sample: a batch holds (batch, *shape) of ``dtype``. Where it is ragged, a sample has rows of that shape, as
    many as it likes, and a batch holds those of all samples, one sample after the other; how many each has is in
    ``<part>.counts`` (batch,) int64, the same for all ragged fields of a part."""

    shape: tuple[int, ...]
    dtype: str
    ragged: bool = False


@dataclass(frozen=True)
class Window:
    """Which key-frames around each one are read with it, where that depends on the frame.

    Attributes:
        offsets: of (key, index, number of frames of its scene, epoch); those that the scene lacks are left out.
        groups: that are read of them; empty: the same as of the frame itself.
    """

    offsets: Callable[[str, int, int, int], Iterable[int]]
    groups: tuple[str, ...] = ()


@dataclass
class _Shard:
    """An open shard: file (None: ranges are read from the store), byte range by frame key, readers at work on it."""

    file: int | None
    index: dict[str, tuple[int, int]]
    users: int = 0


class ShardReader:
    """Random access to the frames of a data set: one read per frame and group. Thread-safe.

    Args:
        manifest: of the data set.
        groups: which groups to read; others are never touched.
        cache: for remote data; None reads ranges straight from the store.
        keep_open: shards kept open with their index; the least recently used go.
    """

    def __init__(
        self,
        manifest: Manifest,
        groups: tuple[str, ...],
        cache: storage.ShardCache | None = None,
        keep_open: int = 128,
    ) -> None:
        self.manifest, self.groups, self.cache = manifest, groups, cache
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._keep = keep_open
        self._open: OrderedDict[tuple[str, int], _Shard] = OrderedDict()
        for group in groups:
            if group not in manifest.groups:
                raise ValueError(f"{manifest.url}: has no group {group!r}, only {', '.join(manifest.groups)}")

    def frame(self, scene: int, index: int, groups: tuple[str, ...] = ()) -> Frame:
        """One frame with the chosen groups. Of several groups of labels, ``frame.labels`` has the manifest's own, or else the
        first, and ``frame.label_sets`` all.

        Args:
            groups: some of those of this reader; empty: all.

        Raises:
            CorruptSample: this frame cannot be decoded.
            FileNotFoundError, ValueError: its shard is missing or not what the manifest says.
        """
        entry = self.manifest.scenes[scene]
        key = frame_key(entry.name, index)
        members = {}
        labels = [group for group in groups or self.groups if is_labels(group)]
        own = self.manifest.label_group if self.manifest.label_group in labels else next(iter(labels), "")
        further = [group for group in labels if group != own]
        for group in groups or self.groups:
            data = self._read(group, entry.shard, key)
            try:
                members[group] = tar_members(data, key)
            except CorruptSample as error:
                raise CorruptSample(f"{shard_path(group, entry.shard)}: {error}") from None
        try:
            frame = decode([found for group, found in members.items() if group not in further])
            if frame.labels is not None and own:
                frame.label_sets[own] = frame.labels
            for group in further:
                if (labels := decode([members[group]]).labels) is not None:
                    frame.label_sets[group] = labels
        except CorruptSample as error:
            raise CorruptSample(f"shard {entry.shard:06d}: {error}") from None
        return frame

    def window(self, scene: int, index: int, window: Iterable[int] | Window, epoch: int = 0) -> Frame:
        """A frame with those around it in ``frame.window``: by offset, those that the scene has. Raises as ``frame``."""
        frame, groups = self.frame(scene, index), ()
        count = self.manifest.scenes[scene].frames
        if isinstance(window, Window):
            window, groups = window.offsets(frame.key, index, count, epoch), window.groups
        for offset in window:
            if 0 <= index + offset < count:
                frame.window[offset] = self.frame(scene, index + offset, groups)
        return frame

    def raw(self, group: str, scene: int, index: int) -> bytes:
        """The bytes of a frame's members in the tar of a group, headers included. Raises as ``frame``."""
        entry = self.manifest.scenes[scene]
        return self._read(group, entry.shard, frame_key(entry.name, index))

    def prefetch(self, number: int) -> None:
        """Brings the shards of a number into the cache; nothing without one. Errors are left to whoever needs them."""
        if self.cache is None:
            return
        for group in self.groups:
            entry = self.manifest.shard(group, number)
            with contextlib.suppress(OSError, ValueError):
                self.cache.fetch(storage.join(self.manifest.url, entry.path), entry.size, entry.sha256)

    def close(self) -> None:
        """Closes all files that nobody reads from; safe to call twice."""
        with self._lock:
            self._evict(0)

    def _read(self, group: str, number: int, key: str) -> bytes:
        url = storage.join(self.manifest.url, shard_path(group, number))
        shard = self._acquire(group, number, url)
        try:
            if key not in shard.index:
                raise ValueError(f"{url}: its index has no frame {key}, though the manifest says so; verify it")
            offset, length = shard.index[key]
            if shard.file is not None:
                data = os.pread(shard.file, length, offset)
            else:
                data = storage.read_bytes(url, offset, length)
        finally:
            with self._lock:
                shard.users -= 1
        if len(data) != length:
            raise ValueError(f"{url}: truncated ({len(data)} of {length} bytes of frame {key}); pack it again")
        with self._lock:
            self.bytes_read += length
        return data

    def _acquire(self, group: str, number: int, url: str) -> _Shard:
        """The open shard, with one user more."""
        place = group, number
        with self._lock:
            if found := self._open.get(place):
                found.users += 1
                self._open.move_to_end(place)
                return found
        file = self._open_file(group, number, url)
        try:
            index = self._load_index(group, number, url)
        except BaseException:
            if file is not None:
                os.close(file)
            raise
        with self._lock:
            if found := self._open.get(place):  # another thread was faster
                if file is not None:
                    os.close(file)
            else:
                found = self._open[place] = _Shard(file, index)
            found.users += 1
            self._evict(self._keep)
            return found

    def _evict(self, keep: int) -> None:
        """With the lock held: closes what was not used for longest and is not in use."""
        for place in [p for p, s in self._open.items() if not s.users][: max(0, len(self._open) - keep)]:
            file = self._open.pop(place).file
            if file is not None:
                os.close(file)

    def _load_index(self, group: str, number: int, url: str) -> dict[str, tuple[int, int]]:
        where = url[:-4] + ".json"
        try:
            found = storage.read_bytes(where)
        except FileNotFoundError:
            raise FileNotFoundError(f"{where}: index of a shard is missing; run `occstream verify`") from None
        record = load_json(found, where, "pack its shard again")
        want = self.manifest.shard(group, number)
        if (record.get("size"), record.get("sha256")) != (want.size, want.sha256):
            raise ValueError(f"{where}: belongs to another version of the shard than the manifest names; pack it again")
        return read_index(record, where, want.size)

    def _open_file(self, group: str, number: int, url: str) -> int | None:
        entry = self.manifest.shard(group, number)
        if storage.is_local(url):
            try:
                file = os.open(storage.local_path(url), os.O_RDONLY)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{url}: shard is missing; pack it again or repair the data set's folder"
                ) from None
        elif self.cache is None:
            return None
        else:
            file = self.cache.open(url, entry.size, entry.sha256)
        size = os.fstat(file).st_size
        if size != entry.size:
            os.close(file)
            raise ValueError(f"{url}: {size} bytes, the manifest says {entry.size}; pack it again")
        return file


def tar_members(data: bytes, key: str) -> dict[str, bytes]:
    """Members of one frame in a range of a tar, by name without ``<key>.``."""
    members, at = {}, 0
    while at + 512 <= len(data):
        header = data[at : at + 512]
        try:
            name = header[:100].rstrip(b"\0").decode()
            length = int(header[124:136].rstrip(b"\0 "), 8)
            total = int(header[148:156].rstrip(b"\0 "), 8)
        except ValueError:
            raise CorruptSample(f"frame {key}: damaged tar header") from None
        if sum(header) - sum(header[148:156]) + 8 * 32 != total or not name.startswith(f"{key}."):
            raise CorruptSample(f"frame {key}: damaged tar header")
        if not 0 <= length <= len(data) - at - 512:
            raise CorruptSample(f"frame {key}: member {name} of {length} bytes reaches beyond the frame")
        members[name[len(key) + 1 :]] = data[at + 512 : at + 512 + length]
        at += 512 + (length + 511) // 512 * 512
    return members


@dataclass
class StreamBatch:
    """What the stream hands out. The arrays belong to the consumer until it asks for the next batch.

    Attributes:
        arrays: by field name, (n, *shape); views of the ring's buffers.
        keys: n frame keys.
        samples: the n draws.
        state: position after this batch, for a checkpoint.
        returned: what ``fill`` returned for each of the n.
        made: what ``finish`` adds by field name, arrays of whatever library.
    """

    arrays: dict[str, np.ndarray]
    keys: list[str]
    samples: list[Sample]
    state: dict[str, int]
    returned: list
    made: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Slot:
    buffers: dict[str, np.ndarray]
    missing: int = 0
    samples: list[Sample] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    returned: list = field(default_factory=list)
    rows: dict[str, list] = field(default_factory=dict)  # of each sample, by ragged field
    state: dict[str, int] = field(default_factory=dict)
    batch: StreamBatch | None = None  # complete


class Stream:
    """Iterator over batches; also a context manager that ends its threads.

    Batches come in the order of ``batches`` whatever the threads do. Asking for a batch gives the previous one's
    buffers back to the readers: copy what must live longer.

    Args:
        reader: where frames come from.
        batches: samples of each batch of this rank and the position after it (``order.training_batches``).
        fields: arrays of one sample.
        fill: writes one sample into its views (``fill(frame, epoch, views)``), called from several threads; raises
            ValueError for a sample that cannot be used. What it returns is in the batch's ``returned``.
        capacity: most samples in a batch.
        threads: reader threads; 0: the consumer itself reads, when it asks for a batch.
        ring: batches in flight, including the consumer's.
        allocate: makes a buffer of a shape and dtype (for pinned memory); default numpy.
        max_skipped: a corrupt sample is replaced by the next frame of its scene (the same on every rank and in every
            replay), counted and named, up to this many; then it is an error. Incomplete ones are, too, but do not count
            toward the limit, and each is named once.
        warn: gets one line for each skipped sample.
        lookahead: batches beyond those in the ring whose shards are fetched into the cache ahead of need.
        deadline: seconds that the consumer waits for a batch before it is an error that names what is not there.
        finish: completes each batch, in order, in a thread of its own (without reader threads: in the consumer's), such as by
            arrays that a GPU makes.
        window: key-frames around each one that ``fill`` finds in ``frame.window``, where the scene has them: offsets, or what
            chooses them for each.
    """

    def __init__(
        self,
        reader: ShardReader,
        batches: Iterator[tuple[list[Sample], dict[str, int]]],
        fields: Mapping[str, Field],
        fill: Fill,
        *,
        capacity: int,
        threads: int = 2,
        ring: int = 3,
        allocate: Callable[[tuple[int, ...], str], np.ndarray] | None = None,
        max_skipped: int = 100,
        warn: Callable[[str], None] = print,
        lookahead: int = 64,
        deadline: float = 600.0,
        window: tuple[int, ...] | Window = (),
        finish: Callable[[StreamBatch], None] | None = None,
    ) -> None:
        if ring < 2:
            raise ValueError(f"ring is {ring}, needs at least 2: one for the consumer, one to fill")
        if capacity < 1 or threads < 0:
            raise ValueError(f"capacity is {capacity}, needs at least 1; threads is {threads}, must not be negative")
        allocate = allocate or (lambda shape, dtype: np.zeros(shape, dtype))
        self._reader, self._fill, self._warn, self._finish = reader, fill, warn, finish
        self._batches, self._max_skipped, self._deadline = iter(batches), max_skipped, deadline
        self._free: deque[_Slot] = deque(
            _Slot({name: allocate((capacity, *f.shape), f.dtype) for name, f in fields.items() if not f.ragged})
            for _ in range(ring)
        )
        self._ragged = {name: f for name, f in fields.items() if f.ragged}
        self._allocate = allocate
        self._filling: deque[_Slot] = deque()  # in batch order
        self._tasks: deque[tuple[_Slot, int]] = deque()
        self._lent: _Slot | None = None
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._change = threading.Condition()  # its lock is reentrant
        self.waited = 0.0
        self.skipped: list[str] = []
        self._corrupt = 0
        self._planned: deque[tuple[list[Sample], dict[str, int]]] = deque()
        self._lookahead, self._window = lookahead if reader.cache else 0, window
        self._wanted: deque[int] = deque()  # shard numbers to prefetch, in order of need
        self._known: set[int] = set()
        self._decoders = threads
        work = [self._work] * threads + [self._fetch] * (2 if self._lookahead else 0)
        work += [self._complete] if threads and finish else []
        self._threads = [guarded.start(f"stream-{i}", w, self._fail) for i, w in enumerate(work)]

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamBatch:
        began = time.perf_counter()
        with self._change:
            if self._closed:
                raise ValueError("this stream is closed")
            if self._lent is not None:
                self._free.append(self._lent)
                self._lent = None
                self._change.notify_all()
            if not self._decoders:
                self._work_until_ready()
            ready = self._change.wait_for(lambda: self._error or self._there() or self._idle(), self._deadline)
            self.waited += time.perf_counter() - began
            if not ready:
                raise TimeoutError(self._late())
            if self._error:
                raise self._error
            if not self._filling:
                raise StopIteration
            slot = self._lent = self._filling.popleft()
        # The slot keeps the batch, and with it arrays that are not the ring's, until it is given back: a copy to a device may
        # still read them.
        slot.batch = slot.batch or self._made(slot)
        return slot.batch

    def ready(self) -> bool:
        """Whether the next batch is there, so that asking for it does not wait."""
        with self._change:
            return self._there() and not self._error

    def _there(self) -> bool:
        """With the lock held: whether the next batch is complete, but for what the consumer does itself."""
        if not self._filling or self._filling[0].missing:
            return False
        return self._filling[0].batch is not None or not (self._finish and self._decoders)

    def _made(self, slot: _Slot) -> StreamBatch:
        count = len(slot.samples)
        arrays = {k: v[:count] for k, v in slot.buffers.items()}
        for name, rows in slot.rows.items():
            counts = np.array([len(found) for found in rows], np.int64)
            arrays[f"{name.rpartition('.')[0]}.counts"] = counts
            joined = self._allocate((int(counts.sum()), *self._ragged[name].shape), self._ragged[name].dtype)
            arrays[name] = np.concatenate(rows, out=joined) if rows else joined
        batch = StreamBatch(arrays, slot.keys, slot.samples, slot.state, slot.returned)
        if self._finish:
            self._finish(batch)
        return batch

    def _complete(self) -> None:
        while True:
            with self._change:
                while (slot := self._read()) is None and not self._closed and not self._error:
                    self._change.wait()
                if slot is None or self._closed or self._error:
                    return
            batch = self._made(slot)
            with self._change:
                slot.batch = batch
                self._change.notify_all()

    def _read(self) -> _Slot | None:
        """With the lock held: the first batch that is not complete, if all its frames are there."""
        slot = next((slot for slot in self._filling if slot.batch is None), None)
        return slot if slot and not slot.missing else None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and closes files; safe to call twice. A thread that a store keeps waiting is left behind."""
        with self._change:
            self._closed = True
            self._tasks.clear()
            self._change.notify_all()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._reader.close()

    def _fail(self, error: BaseException) -> None:
        """The consumer gets the first error of any thread, whatever it waits for."""
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def _work_until_ready(self) -> None:
        """With the lock held: reads the next batch in the consumer's own thread."""
        while not (self._filling and not self._filling[0].missing) and (self._tasks or self._plan()):
            while self._tasks:
                slot, i = self._tasks.popleft()
                try:
                    self._load(slot, i)
                except BaseException as error:
                    return self._fail(error)
                slot.missing -= 1

    def _late(self) -> str:
        """With the lock held: what the next batch is waiting for."""
        manifest, slot = self._reader.manifest, self._filling[0] if self._filling else _Slot({})
        missing = [s for s, key in zip(slot.samples, slot.keys) if not key]
        shards = sorted({manifest.scenes[s.scene].shard for s in missing})
        listed = ", ".join(f"{shard_path(g, n)}" for n in shards[:3] for g in self._reader.groups)
        return (
            f"{manifest.url}: {len(missing)} frames of the next batch did not arrive within {self._deadline:.0f} s, of shards "
            f"{listed}; check that the store answers, or raise train.data_timeout"
        )

    def _idle(self) -> bool:
        return self._ended and not self._filling

    def _plan(self) -> bool:
        """With the lock held: opens the next batch if a buffer is free. True if that gave tasks."""
        if self._ended or self._error or not self._free:
            return False
        try:
            while len(self._planned) <= self._lookahead and (batch := next(self._batches, None)):
                self._planned.append(batch)
                if self._lookahead:
                    self._want(batch[0])
        except BaseException as error:
            # Before the lock is given up: a generator that has raised looks like one that has ended.
            self._fail(error)
            return False
        if not self._planned:
            self._ended = True
            self._change.notify_all()
            return False
        samples, state = self._planned.popleft()
        slot = self._free.popleft()
        slot.samples, slot.state, slot.missing, slot.batch = samples, state, len(samples), None
        slot.keys, slot.returned = [""] * len(samples), [None] * len(samples)
        slot.rows = {name: [None] * len(samples) for name in self._ragged}
        self._filling.append(slot)
        self._tasks.extend((slot, i) for i in range(len(samples)))
        if not samples:
            self._change.notify_all()
        return True

    def _want(self, samples: list[Sample]) -> None:
        """With the lock held: shards that a planned batch needs go to the prefetching threads."""
        for number in dict.fromkeys(self._reader.manifest.scenes[s.scene].shard for s in samples):
            if number not in self._known:
                self._known.add(number)
                self._wanted.append(number)
                self._change.notify_all()
        if len(self._known) > 4096:  # by now the first of them may have been evicted
            self._known = {self._reader.manifest.scenes[s.scene].shard for batch, _ in self._planned for s in batch}

    def _fetch(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._wanted or self._closed or self._error)
                if self._closed or self._error:
                    return
                number = self._wanted.popleft()
            self._reader.prefetch(number)

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._tasks and not self._closed and not self._error:
                    if not self._plan() and not self._error:
                        self._change.wait()
                if self._closed or self._error:
                    return
                slot, i = self._tasks.popleft()
            self._load(slot, i)
            with self._change:
                slot.missing -= 1
                if not slot.missing:
                    self._change.notify_all()

    def _load(self, slot: _Slot, i: int) -> None:
        sample = slot.samples[i]
        scene = self._reader.manifest.scenes[sample.scene]
        views = {name: buffer[i, ...] for name, buffer in slot.buffers.items()}
        for shift in range(scene.frames):
            index = (sample.frame + shift) % scene.frames
            try:
                frame = self._reader.window(sample.scene, index, self._window, sample.draw)
                slot.returned[i] = self._fill(frame, sample.draw, views)
                self._take_rows(slot, i, views, frame.key)
            except CorruptSample as error:
                self._skip(error)
                continue
            slot.keys[i] = frame.key
            return
        raise ValueError(f"scene {scene.name}: none of its {scene.frames} frames can be read; {self.skipped[-1]}")

    def _take_rows(self, slot: _Slot, i: int, views: dict[str, np.ndarray], key: str) -> None:
        """Keeps what ``fill`` has set of ragged fields. Raises ValueError if it does not fit them."""
        counts: dict[str, int] = {}
        for name, f in self._ragged.items():
            rows = views.pop(name, None)
            if rows is None or rows.shape[1:] != f.shape or rows.dtype != f.dtype:
                have = "nothing" if rows is None else f"{rows.shape} {rows.dtype}"
                raise ValueError(
                    f"frame {key}: sample has {have} for the ragged field {name} of rows {f.shape} {f.dtype}"
                )
            slot.rows[name][i] = rows
            part = name.rpartition(".")[0]
            if counts.setdefault(part, len(rows)) != len(rows):
                raise ValueError(f"frame {key}: {name} has {len(rows)} rows, others of {part} have {counts[part]}")

    def _skip(self, error: CorruptSample) -> None:
        with self._change:
            again = isinstance(error, IncompleteSample) and str(error) in self.skipped
            self.skipped.append(str(error))
            self._corrupt += not isinstance(error, IncompleteSample)
            count = self._corrupt
        if isinstance(error, IncompleteSample):
            if not again:
                self._warn(f"replaced incomplete sample: {error}")
            return
        self._warn(f"skipped corrupt sample {count}: {error}")
        if count > self._max_skipped:
            raise ValueError(
                f"{count} corrupt samples, more than {self._max_skipped}: the data set is damaged; {error}"
            )
