"""The commands of ``occstream`` that make and look at packed data sets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from occstream.launch.progress import Bar

if TYPE_CHECKING:
    from occstream.sharding.labelconfig import LabelConfig
    from occstream.sharding.manifest import Manifest
    from occstream.sharding.pack import Progress, Settings
    from occstream.sharding.schema import Source


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``low`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        return value

    return number


def job_arguments(p: argparse.ArgumentParser) -> None:
    from occstream.sharding.labelconfig import LabelConfig

    p.add_argument("source", help="name of a source, e.g. nuscenes; an unknown name lists all")
    p.add_argument("settings", nargs="*", metavar="key=value", help="options of the source")
    p.add_argument(
        "--options", action="store_true", dest="list_options", help="list the options of the source and exit"
    )
    p.add_argument("--root", help="folder of the raw data set")
    p.add_argument("--out", help="where to publish: a folder, file:// or s3://")
    p.add_argument("--grid", help="voxel grid of the labels: a preset or x,y,z low, x,y,z high, voxel (default occ3d)")
    p.add_argument("--taxonomy", default="occ3d", help="classes of the labels, where the source offers a choice")
    p.add_argument("--scenes-per-shard", type=at_least(1), default=1)
    p.add_argument("--workers", type=at_least(1), default=1, help="processes")
    p.add_argument("--part", default="1/1", help="i/n: pack only every n-th shard, for n machines")
    p.add_argument(
        "--max-failures", type=at_least(0), default=0, help="number of scenes that may fail and be skipped (default 0)"
    )
    p.add_argument("--recheck", action="store_true", help="hash what is published before skipping it")
    p.add_argument(
        "--zstd-level",
        type=at_least(1),
        default=19,
        help="compression level of labels (default 19: small and fast to read)",
    )
    p.add_argument("--dry-run", action="store_true", help="try a few scenes and estimate the job; write nothing")
    made = p.add_argument_group("labels from LiDAR")
    for name, default in (
        ("min_points", 1),
        ("dilation", 0),
        ("max_range", 0.0),
        ("ray_frames", 10),
        ("max_rays", 400_000),
    ):
        text = next(line for line in (LabelConfig.__doc__ or "").splitlines() if line.strip().startswith(f"{name}:"))
        flag = f"--{name.replace('_', '-')}"
        kind = at_least(0) if isinstance(default, int) else float
        made.add_argument(flag, type=kind, default=default, help=f"{text.split(':', 1)[1].strip()} ({default})")
    made.add_argument("--no-level", action="store_true", help="trust the height and tilt of the poses")
    made.add_argument(
        "--flat-rays",
        action="store_true",
        help="mark everything that rays pass through as free, even just above the ground",
    )


def _opened(args: argparse.Namespace) -> Source | None:
    """Source and its options from the command line; None where these were only to be listed."""
    from occstream.pretrain.config import parse_overrides
    from occstream.sharding.sources import open_source, source_options

    args.source = args.source.replace("-", "_")
    known = source_options(args.source)
    if args.list_options:
        for name, parameter in known.items():
            print(f"{name:<18} {'required' if parameter.default is parameter.empty else parameter.default}")
        return None
    options = parse_overrides(args.settings)
    given = {"root": args.root, "grid": args.grid or "occ3d", "taxonomy": args.taxonomy}
    options |= {k: v for k, v in given.items() if k in known and v is not None and k not in options}
    return open_source(args.source, options)


def _leave_labels(args: argparse.Namespace) -> None:
    """Tells a source that can bring labels not to: what it would leave out for want of them then stays."""
    from occstream.sharding.sources import source_options

    option = source_options(args.source.replace("-", "_")).get("labels")
    if option is not None and option.default is True and not any(s.startswith("labels=") for s in args.settings):
        args.settings = [*args.settings, "labels=false"]


def _label_config(args: argparse.Namespace) -> LabelConfig:
    from occstream.sharding.labelconfig import LabelConfig

    names = ("min_points", "dilation", "max_range", "ray_frames", "max_rays")
    return LabelConfig(
        **{name: getattr(args, name) for name in names}, level=not args.no_level, supported=not args.flat_rays
    )


def shard(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from occstream.sharding.codec import Coding
    from occstream.sharding.grid import get_grid
    from occstream.sharding.labels import Labeler
    from occstream.sharding.prepare import Images
    from occstream.sharding.summary import choose_labels

    if args.labels in ("lidar", "none"):
        _leave_labels(args)
    source = _opened(args)
    if source is None:
        return 0
    groups = tuple(g for g in args.groups.split(",") if g and not (args.labels == "none" and g == "labels"))
    grid = get_grid(args.grid) if args.grid else None
    mode, reason, label = "none", "", None
    if "labels" in groups:
        mode, reason = choose_labels(source, args.labels, grid)
    config = _label_config(args)
    if mode == "lidar":
        grid = grid or get_grid("occ3d")
        label = Labeler(grid, source.taxonomy.name, config)
    elif changed := [f.name for f in fields(config) if getattr(config, f.name) != f.default]:
        flag = {"level": "no-level", "supported": "flat-rays"}.get(changed[0], changed[0].replace("_", "-"))
        raise ValueError(
            f"--{flag} is given, but no labels are made from LiDAR here; use --labels lidar or drop --{flag}"
        )
    cameras = tuple(c for c in args.cameras.split(",") if c)
    images = Images(args.short_side, args.jpeg_quality, cameras, args.max_black / 100)
    coding = Coding(args.zstd_level, args.lidar_step)
    settings: Settings = {"groups": groups, "grid": grid, "label": label, "images": images, "coding": coding}
    return _run_job(args, source, reason, settings)


def label(args: argparse.Namespace) -> int:
    from occstream.sharding.codec import Coding
    from occstream.sharding.grid import get_grid
    from occstream.sharding.labels import Labeler
    from occstream.sharding.summary import choose_labels

    source = _opened(args)
    if source is None:
        return 0
    grid, config = get_grid(args.grid or "occ3d"), _label_config(args)
    if not args.quality and (args.every is not None or args.scenes is not None):
        raise ValueError("--every and --scenes require --quality; without it all scenes are labeled")
    if args.quality:
        from occstream.sharding.labelquality import Quality, measure

        total = Quality()
        for name in source.scene_names()[: 10 if args.scenes is None else args.scenes]:
            scene = source.load(name)
            if len(scene.frames) < 2:
                print(f"{name}: only one frame, nothing to hold out")
                continue
            total.add(measure(scene, grid, source.taxonomy, config, every=4 if args.every is None else args.every))
        print(total.table())
        return 0
    label = Labeler(grid, source.taxonomy.name, config)
    _, reason = choose_labels(source, "lidar", grid)
    coding = Coding(args.zstd_level)
    return _run_job(args, source, reason, {"groups": ("labels",), "grid": grid, "label": label, "coding": coding})


def _run_job(args: argparse.Namespace, source: Source, reason: str, settings: Settings) -> int:
    """Packs, or estimates what that would take.

    Args:
        reason: where the labels come from, for people.
        settings: of the job.
    """
    from occstream.sharding.pack import Job, estimate, pack
    from occstream.sharding.summary import after, before, plural

    if not args.out:
        raise ValueError("no target: give --out FOLDER, file://… or s3://…")
    part = parse_part(args.part)
    settings["scenes_per_shard"] = args.scenes_per_shard
    print("\n".join(before(source, reason, settings.get("grid") or source.grid)), flush=True)
    if args.dry_run:
        found = estimate(Job(source, args.out, **settings))
        print(f"{source.name} -> {args.out}: {plural(found.scenes, 'scene')}, {plural(found.shards, 'shard')} a group")
        if found.failed:
            name, reason = next(iter(found.failed.items()))
            print(
                f"{len(found.failed)} of {plural(found.tried + len(found.failed), 'scene')} tried cannot be packed, such as "
                f"{name}: {reason}\n--max-failures N skips such scenes"
            )
        share = f"the about {found.packable:.0f} that can be packed" if found.failed else "all"
        print(f"estimated from {plural(found.tried, 'scene')} for {share}:")
        print(f"  frames   {found.frames:,.0f}")
        for group, size in found.bytes.items():
            print(f"  {group:<8} {size / 1e9:,.3f} GB, {size / max(1, found.frames) / 1e3:.1f} kB per frame")
        hours = found.seconds / 3600 / args.workers / part[1]
        rate = found.frames / found.seconds
        print(
            f"  time     {hours:,.2f} h with {part[1]} x {args.workers} workers ({rate:.2f} frames/s each; reading included)"
        )
        return 0
    with Bar("label" if settings.get("groups") == ("labels",) else "shard") as bar:
        show = _Show(bar)
        manifest = pack(
            source,
            args.out,
            workers=args.workers,
            part=part,
            max_failures=args.max_failures,
            recheck=args.recheck,
            progress=show,
            **settings,
        )
    for reason in show.failed.values():
        print(f"left out: {reason}", file=sys.stderr)
    if show.skipped:
        print(
            f"kept {plural(show.skipped, 'shard')} packed earlier, without comparing the raw data with them: if it has changed, "
            f"pack it to another place, or remove these shards below {args.out} first"
        )
    if manifest is None:
        print(f"part {args.part} is done; when all are: occstream merge {args.out}")
    else:
        print(_published(manifest))
        print("\n".join(after(manifest)))
    return 0


def say_published(args: argparse.Namespace, skipped: int, manifest: Manifest | None) -> int:
    """Says what has become of a group of labels, ``args.name`` of ``args.url``. Returns 0.

    Args:
        skipped: shards that were there.
        manifest: with the group; None while other parts are missing.
    """
    if skipped:
        print(f"{skipped} shards already existed")
    if manifest is None:
        print(f"part {args.part} is done; the part that finishes last publishes {args.name}")
    else:
        print(
            f"published {args.name} at {args.url}; train with data.labels={args.name}, fingerprint {manifest.fingerprint}"
        )
    return 0


def parse_part(text: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8). Raises ValueError."""
    try:
        number, count = (int(v) for v in text.split("/"))
    except ValueError:
        raise ValueError(f"--part {text}: needs i/n, like 1/8") from None
    return number, count


def _published(manifest: Manifest) -> str:
    from occstream.sharding.contract import DROPPED
    from occstream.sharding.summary import plural

    left = f" ({len(manifest.left_out)} left out)" if manifest.left_out else ""
    dropped = sum(scene.attributes.get(DROPPED, 0) for scene in manifest.scenes)
    if dropped:
        left += f" without {dropped} LiDAR returns whose coordinates are not finite"
    return (
        f"published {plural(len(manifest.scenes), 'scene')}{left}, {plural(manifest.num_frames, 'frame')} at {manifest.url}, "
        f"fingerprint {manifest.fingerprint}"
    )


class _Show:
    """Shows how far a job is; keeps which scenes failed and how many shards were packed earlier."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.failed, self.skipped = bar, {}, 0

    def __call__(self, state: Progress) -> None:
        from occstream.sharding.summary import plural

        self.failed, self.skipped = state.failed, state.skipped
        notes = [plural(state.frames, "frame")]
        if state.made:
            notes.append(f"{state.made / state.seconds:.1f} frames/s")
        if state.skipped:
            notes.append(f"{state.skipped} packed earlier")
        if state.failed:
            notes.append(f"{plural(len(state.failed), 'scene')} failed")
        self.bar(state.done, state.total, notes)


def merge(args: argparse.Namespace) -> int:
    from occstream.sharding.pack import merge
    from occstream.sharding.summary import after

    manifest = merge(args.url)
    print(_published(manifest))
    print("\n".join(after(manifest)))
    return 0


def attach(args: argparse.Namespace) -> int:
    from occstream.sharding.attach import attach

    manifest = attach(args.url, args.labels, args.name)
    grid = manifest.grid.name if manifest.grid else "?"
    print(
        f"attached {args.name} to {args.url}: {manifest.num_frames} frames on grid {grid}, labels "
        f"{manifest.labels}; train with data.labels={args.name}, fingerprint {manifest.fingerprint}"
    )
    return 0


def classes(args: argparse.Namespace) -> int:
    from occstream.sharding.frameclasses import collect, table_name
    from occstream.sharding.manifest import Manifest

    table, frames = collect(args.url, args.group), Manifest.load(args.url).num_frames
    for name, count in sorted(table.counts().items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"{name:<24} {count:>8} frames, {100 * count / frames:.1f} %")
    print(f"{args.url}: wrote {table_name(args.group or 'labels')}: {len(table.classes)} classes in {frames} frames")
    return 0


def subset(args: argparse.Namespace) -> int:
    from occstream.sharding.manifest import Manifest

    manifest = Manifest.load(args.url)
    print("\n".join(manifest.scenes.names(manifest.subset(args.scenes, args.seed, args.holdout))))
    return 0


def inspect(args: argparse.Namespace) -> int:
    from occstream.sharding.check import inspect

    print(inspect(args.url, args.frames, args.group))
    return 0


def card(args: argparse.Namespace) -> int:
    from occstream.sharding.datacard import data_card, text
    from occstream.sharding.manifest import Manifest

    print(text(data_card(Manifest.load(args.url), args.labels, args.frames)))
    return 0


def verify(args: argparse.Namespace) -> int:
    from occstream.sharding.check import verify
    from occstream.sharding.datacard import lacking_line
    from occstream.sharding.manifest import Manifest

    text = args.sample.strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"--sample {args.sample}: needs a share like 1% or 0.01") from None
    problems = verify(args.url, share, args.seed, args.group)
    if line := lacking_line(Manifest.load(args.url).scenes):
        print(f"{args.url}: {line}")
    for problem in problems:
        print(problem)
    scope = "" if share == 1 else f" (content of {text} of the shards read)"
    print(f"{args.url}: {f'{len(problems)} problems' if problems else 'intact'}{scope}")
    return 1 if problems else 0


def preview(args: argparse.Namespace) -> int:
    from occstream.evaluation.report import frame_picture
    from occstream.sharding.manifest import Manifest
    from occstream.sharding.stream import ShardReader

    manifest = Manifest.load(args.url)
    if args.group:
        manifest = manifest.with_sidecar(args.group)
    number = manifest.named([args.scene])[0] if args.scene else 0
    frames = manifest.scenes[number].frames
    if not 0 <= args.frame < frames:
        raise ValueError(f"scene {manifest.scenes[number].name} has frames 0 to {frames - 1}, not {args.frame}")
    reader = ShardReader(manifest, manifest.groups)
    frame_picture(Path(args.out), reader.frame(number, args.frame), manifest)
    reader.close()
    print(f"wrote {args.out}")
    return 0
