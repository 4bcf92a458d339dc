"""Whether a packed data set is what it says (``verify``), and what it holds (``inspect``)."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from occstream.sharding import storage
from occstream.sharding.codec import FORMAT_VERSION, CorruptSample, decode
from occstream.sharding.contract import is_rigid
from occstream.sharding.entries import ShardEntry
from occstream.sharding.frameclasses import FrameClasses, classes_of, table_name
from occstream.sharding.manifest import Manifest
from occstream.sharding.received import load_json
from occstream.sharding.schema import IGNORE, Camera, Frame, Labels, LidarSweep, frame_key, get_taxonomy
from occstream.sharding.shardfile import HEADER
from occstream.sharding.stream import ShardReader, tar_members

# Where older versions left the origin of the ego frame.
OFF_THE_ROAD = {
    "openscene": "in the rear axle, 0.325 m above it",
    "semantickitti": "in the LiDAR, 1.73 m above it",
    "sscbench": "in the LiDAR, 1.73 m above it",
}


def verify(url: str, share: float = 1.0, seed: int = 0, group: str | None = None) -> list[str]:
    """Checks a data set: every shard's presence and size; and of a share of the shard numbers hash, index, members,
    headers, decoding of every frame (images too), joins across groups, label ranges, calibration and table of classes.

    Args:
        url: of the data set.
        share: 0..1 of the shard numbers whose content is read, chosen by ``seed``; at least one.
        group: a sidecar group to check along with the rest.

    Returns:
        One line for each problem, naming shard or frame; empty if nothing is wrong.

    Raises:
        ValueError: there is no readable manifest, or the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must be above 0 and at most 1 (100 %)")
    manifest = Manifest.load(url)
    if group:
        manifest = manifest.with_sidecar(group)
    problems: list[str] = []
    names = Counter(manifest.scenes.names())
    problems += [f"{url}: scene {name} is listed {n} times" for name, n in names.items() if n > 1]
    problems += _ego_frame(manifest)
    there = {g: storage.listing(storage.join(url, g)) for g in manifest.groups}
    bad: set[int] = set()
    for shard in manifest.shards:
        have = there[shard.group].get(shard.path.rsplit("/", 1)[-1])
        if have != shard.size:
            what = "missing" if have is None else f"{have} bytes, the manifest says {shard.size}"
            problems.append(f"{storage.join(url, shard.path)}: {what}")
            bad.add(shard.number)
    by_number: dict[int, list[int]] = {}
    for i, number in enumerate(manifest.scenes.shards.tolist()):
        by_number.setdefault(number, []).append(i)
    numbers = np.unique(manifest.shards.number).tolist()
    if share < 1:
        count = max(1, round(share * len(numbers)))
        numbers = sorted(np.random.default_rng(seed).choice(numbers, count, replace=False).tolist())
    table, found = _table(manifest)
    problems += found
    for number in numbers:
        if number not in bad:
            problems += _check_number(manifest, number, by_number.get(number, []), table)
    return problems


def _table(manifest: Manifest) -> tuple[FrameClasses | None, list[str]]:
    """The table of classes, where there is one, and what is wrong with it."""
    if table_name(manifest.label_group) not in storage.listing(manifest.url):
        return None, []
    try:
        return FrameClasses.load(manifest), []
    except ValueError as error:
        return None, [str(error)]


def _ego_frame(manifest: Manifest) -> Iterator[str]:
    """Sets from before the ego frame's origin was put on the road, of the sources that had it elsewhere."""
    old = [s.name for s in manifest.scenes if "ego_height" not in s.attributes]
    if old and manifest.source in OFF_THE_ROAD:
        yield (
            f"{manifest.url}: the ego frame is not on the road in {len(old)} scenes ({old[0]}, …) but "
            f"{OFF_THE_ROAD[manifest.source]}: they do not match current sets and networks; pack the data set again"
        )


def _check_number(manifest: Manifest, number: int, scenes: list[int], table: FrameClasses | None) -> Iterator[str]:
    """Problems of one shard number, all groups. ``scenes``: their numbers in the manifest."""
    groups: dict[str, dict[str, bytes]] = {}
    for group in manifest.groups:
        entry = manifest.shard(group, number)
        where = storage.join(manifest.url, entry.path)
        data = storage.read_bytes(where)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            yield f"{where}: content differs from the manifest's SHA-256"
            return
        ranges, found = _ranges(manifest, entry, data, where)
        yield from found
        groups[group] = ranges
    inside = [(n, manifest.scenes[n]) for n in scenes]
    places = {frame_key(s.name, i): (n, i) for n, s in inside for i in range(s.frames)}
    wanted = list(places)
    for group, ranges in groups.items():
        path = manifest.shard(group, number).path
        yield from (f"{path}: has no frame {key}, though the manifest says so" for key in wanted if key not in ranges)
        yield from (
            f"{path}: holds frame {key}, which the manifest does not name" for key in ranges if key not in wanted
        )
    heads: dict[str, dict] = {}
    for key in wanted:
        if not all(key in ranges for ranges in groups.values()):
            continue
        try:
            members = [tar_members(ranges[key], key) for ranges in groups.values()]
            frame = decode(members)
            heads = {group: json.loads(found["frame.json"]) for group, found in zip(groups, members)}
        except (CorruptSample, ValueError) as error:
            yield f"{manifest.url}: shard {number:06d}: {error}"
            continue
        for field_name in ("scene", "index", "token", "timestamp", "ego_to_global"):
            if len({json.dumps(head[field_name]) for head in heads.values()}) > 1:
                yield f"frame {key}: groups {', '.join(heads)} differ in {field_name}: they do not belong together"
        if frame_key(frame.scene, frame.index) != key:
            yield f"frame {key}: holds frame {frame.key}"
        yield from (f"frame {key}: {problem}" for problem in _check_frame(frame, manifest))
        yield from _check_held(frame, table.names(*places[key]) if table else None, manifest)


def _check_held(frame: Frame, said: list[str] | None, manifest: Manifest) -> Iterator[str]:
    """Whether a frame holds the classes that the table says, where there is one."""
    if said is not None and said != (held := classes_of(frame, get_taxonomy(manifest.taxonomy))):
        file = table_name(manifest.label_group)
        yield f"frame {frame.key}: holds classes {', '.join(held)}, but {file} says {', '.join(said)}"


def _ranges(manifest: Manifest, entry: ShardEntry, data: bytes, where: str) -> tuple[dict[str, bytes], list[str]]:
    """Bytes of each frame by key, as the tar itself has them, and what is wrong with tar, header or index."""
    try:
        header, members = _open_tar(data)
    except (tarfile.TarError, ValueError, OSError, OverflowError) as error:
        return {}, [f"{where}: not a readable tar ({error})"]
    if header is None:
        return {}, [f"{where}: has no header member"]
    problems = [f"{where}: {problem}" for problem in _check_header(manifest, entry, header)]
    doubles = [name for name, n in Counter(m.name for m in members).items() if n > 1]
    problems += [f"{where}: member {name} appears twice" for name in doubles]
    places: dict[str, tuple[int, int]] = {}
    last = ""
    for member in members[1:]:
        key = member.name.split(".", 1)[0]
        if key != last and key in places:
            problems.append(f"{where}: frame {key} appears twice")
        start, _ = places.get(key, (member.offset, 0))
        places[key] = start, member.offset_data + -(-member.size // 512) * 512
        last = key
    problems += _check_index(where[:-4] + ".json", places)
    return {key: data[start:end] for key, (start, end) in places.items()}, problems


def _open_tar(data: bytes) -> tuple[dict | None, list[tarfile.TarInfo]]:
    """Header, if the first member is one, and all members. Raises what ``tarfile`` and ``load_json`` do."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:  # never decompressed
        members = tar.getmembers()
        first = tar.extractfile(members[0]) if members and members[0].name == HEADER and members[0].isreg() else None
        return load_json(first.read(), HEADER, "pack it again") if first else None, members


def _check_header(manifest: Manifest, entry: ShardEntry, header: dict) -> Iterator[str]:
    expected: dict[str, object] = {"format": FORMAT_VERSION, "group": entry.group, "source": manifest.source}
    if entry.group == manifest.label_group:
        expected |= {"grid": manifest.label_grid.to_dict(), "labels": manifest.labels}
    if manifest.label_group in ("labels", entry.group):  # a sidecar's classes are its own
        expected |= {"taxonomy": manifest.taxonomy, "classes": list(manifest.classes)}
    for name, value in expected.items():
        if header.get(name) != value:
            yield f"its header says {name} {header.get(name)!r}, the manifest {value!r}"


def _check_index(where: str, places: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Whether a tar's index has its frames where they are: start and end by key."""
    try:
        record = json.loads(storage.read_bytes(where))
        index = {key: (offset, length) for key, offset, length in record["frames"]}
        if len(index) != len(record["frames"]):
            yield f"{where}: lists a frame twice"
        if index != {key: (start, end - start) for key, (start, end) in places.items()}:
            yield f"{where}: its index does not fit the tar"
    except FileNotFoundError:
        yield f"{where}: index is missing"
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        yield f"{where}: damaged ({type(error).__name__}: {error})"


def _check_frame(frame: Frame, manifest: Manifest) -> Iterator[str]:
    for name, camera in frame.cameras.items():
        yield from (f"{name}: {problem}" for problem in (*_check_image(camera), *_check_camera(camera)))
    poses = [("ego_to_global", frame.ego_to_global)]
    if frame.lidar is not None:
        poses += [
            ("LiDAR sensor_to_ego", frame.lidar.sensor_to_ego),
            ("LiDAR ego_to_global", frame.lidar.ego_to_global),
        ]
        yield from _check_points(frame.lidar, manifest)
    if frame.labels is not None:
        poses.append(("ego_to_global of the labels", frame.labels.ego_to_global))
    yield from (f"{name} is not a rigid pose" for name, pose in poses if pose is not None and not is_rigid(pose))
    if frame.labels is not None:
        yield from _check_labels(frame.labels, manifest)


def _check_image(camera: Camera) -> Iterator[str]:
    try:
        image = simplejpeg.decode_jpeg(camera.jpeg, "GRAY", strict=True)
    except ValueError as error:
        yield f"image cannot be decoded ({error})"
        return
    if image.shape[:2] != (camera.height, camera.width):
        size = f"{image.shape[1]}x{image.shape[0]}"
        yield f"image has {size} pixels, its metadata says {camera.width}x{camera.height}"


def _check_points(sweep: LidarSweep, manifest: Manifest) -> Iterator[str]:
    if not np.isfinite(sweep.xyz).all():
        yield "LiDAR: points are not finite"
    for name in ("intensity", "ring", "time_lag", "classes", "moving", "instances"):
        value = getattr(sweep, name)
        if value is not None and len(value) != len(sweep.xyz):
            yield f"LiDAR: {len(value)} values of {name} for {len(sweep.xyz)} points"
    if sweep.classes is not None and manifest.label_group == "labels":
        yield from _check_classes("LiDAR classes", sweep.classes, get_taxonomy(manifest.taxonomy).num_classes - 1)


def _check_labels(labels: Labels, manifest: Manifest) -> Iterator[str]:
    taxonomy, shape = get_taxonomy(manifest.taxonomy), manifest.label_grid.shape
    for name in ("binary", "semantic", "mask_lidar", "mask_camera", "evidence"):
        value = getattr(labels, name)
        if value is not None and value.shape != shape:
            yield f"labels: {name} has shape {value.shape}, the grid {shape}"
            return
    if labels.semantic is not None:
        yield from _check_classes("labels", labels.semantic, taxonomy.free_id)
        known = (labels.semantic != IGNORE) & labels.known()
        wrong = labels.binary[known] != (labels.semantic[known] != taxonomy.free_id)
        if manifest.label_group.startswith("pseudo-"):
            wrong &= ~labels.binary[known]  # a prediction may call free what is known to be occupied
        if wrong.any():
            yield "labels: binary and semantic disagree on what is occupied"
    for name in ("flow", "logits", "ranked"):
        value = getattr(labels, name)
        if value is not None and len(value) != int(labels.binary.sum()):
            yield f"labels: {name} has shape {value.shape} for {int(labels.binary.sum())} occupied voxels"


def _check_classes(what: str, values: np.ndarray, highest: int) -> Iterator[str]:
    wrong = values[(values > highest) & (values != IGNORE)]
    if wrong.size:
        yield f"{what}: class {int(wrong[0])} is out of range 0..{highest}"


def _check_camera(camera: Camera) -> Iterator[str]:
    if camera.distortion is not None and any(camera.distortion):
        yield (
            f"image is distorted (coefficients {', '.join(f'{v:g}' for v in camera.distortion)}), which no model undoes: pack "
            "the data set again, images are rectified now"
        )
    k = camera.intrinsics
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    if k.shape != (3, 3) or not np.isfinite(k).all() or not np.allclose(k[2], [0, 0, 1]) or abs(k[1, 0]) > 1e-6:
        yield "intrinsics are not those of a camera"
    # From a fisheye's 150 degrees to a telephoto's 3, pixels nearly square, principal point on the image.
    elif not (0.1 < fx / camera.width < 20 and 0.5 < fx / fy < 2):
        yield f"intrinsics are implausible: focal lengths {fx:.1f}, {fy:.1f} for {camera.width}x{camera.height} pixels"
    elif not (0 <= cx <= camera.width and 0 <= cy <= camera.height):
        yield f"intrinsics are implausible: principal point ({cx:.1f}, {cy:.1f}) is outside {camera.width}x{camera.height} pixels"
    if not is_rigid(camera.sensor_to_ego):
        yield "sensor_to_ego is not a rigid pose"
    elif np.linalg.norm(camera.sensor_to_ego[:3, 3]) > 20:
        yield f"stands {np.linalg.norm(camera.sensor_to_ego[:3, 3]):.0f} m from the vehicle"
    if not is_rigid(camera.ego_to_global):
        yield "ego_to_global is not a rigid pose"


@dataclass
class Content:
    """What ``inspect`` counted over the frames it looked at."""

    frames: int = 0
    cameras: Counter = field(default_factory=Counter)
    points: int = 0
    missing: Counter = field(default_factory=Counter)
    classes: np.ndarray | None = None
    occupied: int = 0
    observed: int = 0
    voxels: int = 0


def inspect(url: str, frames: int = 200, group: str | None = None) -> str:
    """What a data set holds, as text for the terminal.

    Args:
        url: of the data set.
        frames: at most this many frames, evenly spread, are read for shares, classes and missing fields.
        group: a sidecar group whose labels to show instead of the set's own.
    """
    manifest = Manifest.load(url)
    sidecars = manifest.sidecars()
    if group:
        manifest = manifest.with_sidecar(group)
    total = manifest.num_frames
    grid = manifest.grid
    lines = [
        f"data set     {url}",
        f"fingerprint  {manifest.fingerprint}",
        f"source       {manifest.source}; labels {manifest.labels or 'none'}, taxonomy {manifest.taxonomy} "
        f"({len(manifest.classes)} classes)",
        f"grid         {grid.name} {'x'.join(map(str, grid.shape))} voxels of {grid.voxel} m from {grid.lower}, "
        f"{grid.frame} frame"
        if grid
        else "grid         none",
        f"scenes       {len(manifest.scenes)} with {total} frames",
    ]
    if license_said := manifest.scenes[0].attributes.get("license") if len(manifest.scenes) else None:
        lines.append(f"license      {license_said}")
    if sidecars:
        lines.append(f"sidecars     {', '.join(sidecars)}")
    if manifest.left_out:
        names = ", ".join(manifest.left_out[:5]) + (", …" if len(manifest.left_out) > 5 else "")
        lines.append(f"left out     {len(manifest.left_out)} scenes that failed: {names}")
    lines += ["", f"{'group':<16} {'shards':>6} {'MB':>10} {'kB/frame':>9}"]
    for name in manifest.groups:
        sizes = manifest.shards.only(name).size
        lines.append(f"{name:<16} {len(sizes):>6} {sizes.sum() / 1e6:>10.2f} {sizes.sum() / 1e3 / max(1, total):>9.1f}")
    reader = ShardReader(manifest, manifest.groups)
    content, firsts = Content(), {}
    for scene, index in manifest.places(np.arange(0, total, max(1, -(-total // frames)))):
        frame = reader.frame(scene, index)
        _count(content, frame, manifest)
        if index == 0:
            firsts[scene] = frame
    lines += ["", *_summary(content, manifest)]
    lines += ["", f"{'scene':<44} {'frames':>6} {'shard':>6}  cameras  points  occupied"]
    for number, scene in enumerate(manifest.scenes[:20]):
        first = firsts.get(number) or reader.frame(number, 0)
        cameras = str(len(first.cameras)) if "cameras" in manifest.groups else "-"
        points = str(len(first.lidar.xyz)) if first.lidar else "-"
        classes = "+classes" if first.lidar and first.lidar.classes is not None else ""
        occupied = str(int(first.labels.binary.sum())) if first.labels else "-"
        lines.append(
            f"{scene.name:<44} {scene.frames:>6} {scene.shard:>6}  {cameras:>7}  {points}{classes}  {occupied}"
        )
    reader.close()
    if len(manifest.scenes) > 20:
        lines.append(f"… and {len(manifest.scenes) - 20} more scenes (columns on the right: first frame of each)")
    return "\n".join(lines)


def _count(content: Content, frame: Frame, manifest: Manifest) -> None:
    content.frames += 1
    content.cameras.update(list(frame.cameras))
    if "cameras" in manifest.groups and not frame.cameras:
        content.missing["cameras"] += 1
    if "lidar" in manifest.groups:
        if frame.lidar is None:
            content.missing["lidar"] += 1
        else:
            content.points += len(frame.lidar.xyz)
            for name in ("intensity", "ring", "classes"):
                content.missing[f"lidar.{name}"] += getattr(frame.lidar, name) is None
    labels = frame.labels
    if labels is None:
        return
    content.missing["boxes"] += frame.boxes is None
    for name in ("semantic", "mask_lidar", "mask_camera"):
        content.missing[f"labels.{name}"] += getattr(labels, name) is None
    seen = labels.known()
    content.voxels += seen.size
    content.observed += int(seen.sum())
    content.occupied += int((labels.binary & seen).sum())
    if labels.semantic is not None:
        counts = np.bincount(labels.semantic[seen], minlength=256)
        content.classes = counts if content.classes is None else content.classes + counts


def _summary(content: Content, manifest: Manifest) -> list[str]:
    n = max(1, content.frames)
    lines = [f"in {content.frames} frames, evenly spread:"]
    if content.cameras:
        lines.append(f"  cameras    {', '.join(f'{name} {count}' for name, count in sorted(content.cameras.items()))}")
    if content.points:
        lines.append(f"  points     {content.points / n:.0f} a frame")
    if content.voxels:
        lines.append(
            f"  voxels     {100 * content.observed / content.voxels:.1f} % observed, of these "
            f"{100 * content.occupied / max(1, content.observed):.2f} % occupied"
        )
    absent = [f"{name} in {count}" for name, count in sorted(content.missing.items()) if count]
    lines.append(f"  missing    {', '.join(absent) or 'nothing'}")
    if content.classes is not None:
        counts = content.classes
        lines.append("  classes    of the occupied observed voxels:")
        known = max(1, counts[: len(manifest.classes)].sum())
        for i in np.argsort(-counts[: len(manifest.classes)], kind="stable"):
            lines.append(f"    {manifest.classes[i]:<22} {100 * counts[i] / known:>6.2f} %")
        if counts[IGNORE]:
            lines.append(f"    {'(class unknown)':<22} {int(counts[IGNORE])} voxels")
    return lines
