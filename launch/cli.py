"""The ``occstream`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from occstream.launch.run import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 wrong input, 3 training failed, 130 interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one place only; key=value may stand anywhere.
    words = getattr(args, "settings", None)
    if rest and (words is None or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        words += rest
    return guarded(lambda: args.work(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="occstream", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, work, help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog)
        sub.set_defaults(work=work)
        return sub

    p = command(
        "shard",
        _shard,
        "pack a raw data set into shards",
        "Options of the source are given as key=value; see them with --options. Rerunning skips what is published.",
    )
    p.add_argument("source", help="name of a source: synthetic, nuscenes")
    p.add_argument("settings", nargs="*", metavar="key=value", help="options of the source")
    p.add_argument(
        "--options", action="store_true", dest="list_options", help="list the options of the source and stop"
    )
    p.add_argument("--root", help="folder of the raw data set")
    p.add_argument("--out", help="where to publish: a folder, file:// or s3://")
    p.add_argument("--grid", default="occ3d", help="voxel grid of the labels (default occ3d)")
    p.add_argument("--taxonomy", default="occ3d", help="classes of the labels (default occ3d)")
    p.add_argument(
        "--labels",
        choices=("auto", "native", "lidar", "none"),
        default="auto",
        help="native: the labels that the source brings; lidar: made from sweeps, poses and boxes; "
        "auto: native where there are any, else lidar",
    )
    p.add_argument("--groups", default="cameras,lidar,labels", help="comma-separated (default cameras,lidar,labels)")
    p.add_argument("--scenes-per-shard", type=int, default=1)
    p.add_argument("--workers", type=int, default=1, help="processes")
    p.add_argument("--dry-run", action="store_true", help="say what would be packed and stop")

    p = command("inspect", _inspect, "show what a packed data set holds")
    p.add_argument("url")

    p = command("verify", _verify, "check hashes and members of every shard, and decode every frame")
    p.add_argument("url")

    p = command("evaluate", _evaluate, "evaluate a checkpoint on a packed data set")
    p.add_argument("checkpoint", help="a run's folder or one of its step-… folders")
    p.add_argument("--data", default="", help="data set to evaluate on (default: as in training)")
    p.add_argument("--picture", default="", help="also write a picture of the first frame here")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe, e.g. eval.mask=camera")

    p = command("compare", _compare, "compare the runs of an MLflow experiment in one table")
    p.add_argument("--uri", default="sqlite:///runs/mlflow.db", help="MLflow tracking URI")
    p.add_argument("--experiment", default="occstream")
    p.add_argument("--by", default="arm", help="tag that names the rows (default arm)")
    p.add_argument("--out", default="", help="folder for comparison.csv and comparison.md")

    p = command("sync", _sync, "send the numbers of a run that MLflow has not got yet")
    p.add_argument("run", help="the run's folder")

    p = command("doctor", _doctor, "say what this machine has and what to install")
    p.add_argument("--data", default="", help="URL of a packed data set whose access is to be checked")

    p = command("demo", _demo, "the whole path on synthetic scenes: shards, pre-training, fine-tuning, comparison")
    p.add_argument("--out", default="demo", help="folder (default demo)")
    p.add_argument("--seeds", type=int, default=2)
    return parser


def _shard(args) -> int:
    from occstream.pretrain.config import parse_overrides
    from occstream.sharding.grid import get_grid
    from occstream.sharding.labels import Labeler
    from occstream.sharding.pack import pack
    from occstream.sharding.sources import open_source, source_options

    known = source_options(args.source)
    if args.list_options:
        for name, parameter in known.items():
            print(f"{name:<14} {'required' if parameter.default is parameter.empty else parameter.default}")
        return 0
    if not args.out:
        raise ValueError("where to? give --out FOLDER, file://… or s3://…")
    options = parse_overrides(args.settings)
    given = {"root": args.root, "grid": args.grid, "taxonomy": args.taxonomy}
    options |= {k: v for k, v in given.items() if k in known and v is not None and k not in options}
    source = open_source(args.source, options)
    grid = get_grid(args.grid)
    mode = args.labels if args.labels != "auto" else ("native" if source.grid else "lidar")
    if mode == "native" and not source.grid:
        raise ValueError(f"source {args.source!r} brings no labels of its own; use --labels lidar")
    groups = [g for g in args.groups.split(",") if g and not (mode == "none" and g == "labels")]
    label = Labeler(grid, args.taxonomy) if mode == "lidar" else None
    if args.dry_run:
        print(
            f"{len(source.scene_names())} scenes of {source.name} -> {args.out}: groups {', '.join(groups)}, labels {mode}"
        )
        return 0
    manifest = pack(
        source,
        args.out,
        groups=groups,
        grid=grid,
        label=label,
        scenes_per_shard=args.scenes_per_shard,
        workers=args.workers,
        progress=_progress(),
    )
    frames = sum(s.frames for s in manifest.scenes)
    print(f"published {len(manifest.scenes)} scenes, {frames} frames at {args.out}, fingerprint {manifest.fingerprint}")
    return 0


def _progress():
    terminal = sys.stdout.isatty()

    def show(done: int, total: int, text: str) -> None:
        if terminal:
            print(f"\r\033[K{done}/{total} {text}", end="\n" if done == total else "", flush=True)
        elif done == total or done % max(1, total // 10) == 0:
            print(f"{done}/{total} {text}", flush=True)

    return show


def _inspect(args) -> int:
    from occstream.sharding.pack import inspect

    print(inspect(args.url))
    return 0


def _verify(args) -> int:
    from occstream.sharding.pack import verify

    problems = verify(args.url)
    for problem in problems:
        print(problem)
    print(f"{args.url}: {f'{len(problems)} problems' if problems else 'intact'}")
    return 1 if problems else 0


def _evaluate(args) -> int:
    from occstream.pretrain.trainer import evaluate_checkpoint

    overrides = [*args.settings, *([f"eval.url={args.data}"] if args.data else [])]
    result = evaluate_checkpoint(args.checkpoint, overrides, picture=Path(args.picture) if args.picture else None)
    print(result.table())
    return 0


def _compare(args) -> int:
    from occstream.evaluation.compare import compare

    print(compare(args.uri, args.experiment, by=args.by, out=Path(args.out) if args.out else None))
    return 0


def _sync(args) -> int:
    from occstream.pretrain.tracking import STATE, Sender, redact

    if not (Path(args.run) / STATE).exists():
        raise ValueError(f"{args.run}: not a run that was tracked with MLflow (no {STATE})")
    sender = Sender(Path(args.run))
    try:
        sender.send()
    except Exception as error:  # whatever MLflow raises: the numbers stay where they are
        reason = redact(" ".join(str(error).split()))[:200]
        raise ConnectionError(f"MLflow at {redact(sender.uri)} does not answer ({reason}); try again later") from error
    print(f"{args.run}: everything is at {redact(sender.uri)}, run {sender.run_id}")
    return 0


def _doctor(args) -> int:
    from occstream.launch.doctor import examine, report

    findings = examine(args.data)
    print(report(findings))
    return 1 if any(f.ok is False for f in findings) else 0


def _demo(args) -> int:
    from occstream.launch.demo import demo

    return demo(Path(args.out), args.seeds)


if __name__ == "__main__":
    raise SystemExit(main())
