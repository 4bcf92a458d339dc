"""The ``occstream`` command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from occstream.launch import citymap, data, refine
from occstream.launch.progress import Bar
from occstream.launch.run import guarded, import_argument, imported
from occstream.sharding.places import place

_SETTING = re.compile(r"[a-z_][a-z_.]*=")  # what is no path among the words of a command
# Commands that may need a task, a model or a source that this package does not have.
_IMPORTING = ("shard", "label", "evaluate", "export", "submit", "predict", "sweep", "recipe", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a check failed, 2 wrong input, 3 training failed, 130 interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one place only; key=value may stand anywhere.
    takes = hasattr(args, "settings")
    if rest and (not takes or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings += rest
    return guarded(lambda: imported(getattr(args, "imports", ())) or args.work(_placed(args)))


def _placed(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with paths and URLs in one form. Raises ValueError."""
    for name in ("url", "out", "root", "checkpoint", "run", "picture", "json", "data", "labels", "table", "study"):
        if isinstance(value := getattr(args, name, None), str):
            setattr(args, name, place(value))
    return args


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from importlib.metadata import version

        print(f"occstream {version('occstream')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="occstream", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, work: Callable[[argparse.Namespace], int], help: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog)
        sub.set_defaults(work=work)
        if name in _IMPORTING:
            import_argument(sub)
        return sub

    _shard_command(command)
    _data_commands(command)
    _run_commands(command)
    _study_commands(command)
    _machine_commands(command)
    return parser


def _shard_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command(
        "shard",
        data.shard,
        "pack a raw data set into shards",
        "Give options of the source as key=value; --options lists them. Rerunning skips what is already published. "
        "Split the job across machines with --part 1/8 … 8/8, then run `occstream merge URL`.",
    )
    data.job_arguments(p)
    p.add_argument(
        "--labels",
        choices=("auto", "native", "lidar", "none"),
        default="auto",
        help="native: the labels that come with the source; lidar: made from sweeps, poses and boxes; "
        "auto: native where available, otherwise lidar",
    )
    p.add_argument("--groups", default="cameras,lidar,labels", help="comma-separated (default cameras,lidar,labels)")
    p.add_argument("--cameras", default="", help="comma-separated names of the cameras to keep (default all)")
    p.add_argument(
        "--short-side",
        type=data.at_least(0),
        default=0,
        help="shrink images to this many pixels on the short side (default 0: unchanged)",
    )
    p.add_argument(
        "--jpeg-quality", type=data.at_least(1), default=90, help="of shrunk or rectified images (default 90)"
    )
    p.add_argument(
        "--max-black", type=float, default=10, help="largest black share of a rectified image, in percent (default 10)"
    )
    p.add_argument(
        "--lidar-step",
        type=float,
        default=0.0,
        help="round points to multiples of this, in meters (default 0: lossless)",
    )


def _data_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command(
        "label",
        data.label,
        "make occupancy labels from LiDAR sweeps, poses and boxes",
        "Writes a data set with labels only; `occstream attach` adds them to one with images. --quality measures "
        "the labels against held-out sweeps instead.",
    )
    data.job_arguments(p)
    p.add_argument("--quality", action="store_true", help="write nothing; test the labels against held-out sweeps")
    p.add_argument(
        "--every", type=data.at_least(2), default=None, help="with --quality: hold out every N-th sweep (default 4)"
    )
    p.add_argument(
        "--scenes", type=data.at_least(1), default=None, help="with --quality: maximum number of scenes (default 10)"
    )

    p = command("merge", data.merge, "publish a data set packed in parts (`shard --part`)")
    p.add_argument("url")

    p = command("attach", data.attach, "add labels or pseudo-labels to a packed data set, alongside its images")
    p.add_argument("url", help="the data set")
    p.add_argument("labels", help="a data set with labels of the same scenes")
    p.add_argument("--name", required=True, help="of the new group: labels-… or pseudo-…; train with data.labels=NAME")

    p = command(
        "classes",
        data.classes,
        "note which classes each frame of a packed data set holds",
        "Reads the labels once and writes classes.<group>.json, which training needs to balance rare classes. Jobs that pack "
        "labels write it themselves; sets of earlier versions and sidecars have none.",
    )
    p.add_argument("url")
    p.add_argument("--group", default=None, help="of this sidecar group instead of the set's own labels")

    p = command("subset", data.subset, "write the names of a nested subset of scenes (2000 within 4000 within 8000)")
    p.add_argument("url")
    p.add_argument(
        "--scenes", type=data.at_least(1), default=None, help="number of scenes (default: all that are not held out)"
    )
    p.add_argument("--seed", type=data.at_least(0), default=0)
    p.add_argument("--holdout", type=data.at_least(0), default=0, help="scenes that belong to no subset")

    p = command("inspect", data.inspect, "show what a packed data set contains")
    p.add_argument("url")
    p.add_argument("--group", default=None, help="show the labels of this sidecar group")
    p.add_argument(
        "--frames", type=data.at_least(1), default=200, help="maximum number of frames to read (default 200)"
    )

    p = command("card", data.card, "show statistics of a packed data set: classes, occupancy, occlusion, label quality")
    p.add_argument("url")
    p.add_argument("--labels", default="", help="compare this sidecar group with the set's own labels")
    p.add_argument(
        "--frames", type=data.at_least(1), default=100, help="maximum number of frames to read (default 100)"
    )

    p = command("verify", data.verify, "check hashes, members, joins, labels and calibration, and decode every frame")
    p.add_argument("url")
    p.add_argument(
        "--sample", default="100%", help="share of the shards whose content is read, e.g. 1%% (default 100%%)"
    )
    p.add_argument("--seed", type=data.at_least(0), default=0, help="seed of the sample")
    p.add_argument("--group", default=None, help="check this sidecar group as well")

    p = command("preview", data.preview, "draw one frame: cameras with occupancy projected into them, LiDAR, labels")
    p.add_argument("url")
    p.add_argument("--scene", default="", help="name of the scene (default: the first)")
    p.add_argument("--frame", type=data.at_least(0), default=0)
    p.add_argument("--group", default=None, help="draw the labels of this sidecar group")
    p.add_argument("--out", default="preview.png")


def _run_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command("evaluate", _evaluate, "evaluate a checkpoint on a packed data set")
    p.add_argument("checkpoint", help="a run's folder or one of its step-… folders")
    p.add_argument("--data", default="", help="data set to evaluate on (default: the one used in training)")
    p.add_argument("--picture", default="", help="also write pictures to this folder (eval.pictures scenes)")
    p.add_argument("--movie", action="store_true", help="of every frame of these scenes, and a GIF of each")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe, e.g. eval.mask=camera")

    p = command(
        "export",
        _export,
        "write a checkpoint's weights to a file, with a model card, or its LiDAR encoder for a detection framework",
    )
    p.add_argument("checkpoint", help="a run's folder or one of its step-… folders")
    p.add_argument("out", help="a .safetensors file, which train.init= accepts; with --for a .pth file")
    p.add_argument(
        "--for",
        dest="framework",
        choices=("openpcdet", "mmdet3d"),
        help="only the encoder of a LiDAR run, in the layout that the framework's detectors load",
    )
    p.add_argument(
        "--variant", choices=("plain", "res"), default="", help="with --for: refuse another encoder than this"
    )
    p.add_argument(
        "--in-features",
        default="",
        help="with --for: features of the detector's points, such as x,y,z,intensity,t; those that were not trained get zero "
        "weights (default those of the run)",
    )
    p.add_argument(
        "--intensity-scale",
        type=float,
        default=1.0,
        help="with --for: largest intensity that the detector gets, such as 255 (default 1)",
    )

    _submit_command(command)
    p = command(
        "predict",
        _predict,
        "write a checkpoint's predictions alongside a data set's images, as training labels",
        "Rerunning skips what is done. Split the job across machines or GPUs with --part 1/8 … 8/8; the last part publishes.",
    )
    p.add_argument("checkpoint", help="a fine-tuned run's folder or one of its step-… folders")
    p.add_argument("url", help="the data set; with --folds after all runs")
    p.add_argument("--name", required=True, help="of the new group, pseudo-…; train with data.labels=NAME")
    p.add_argument(
        "--folds",
        action="store_true",
        help="predict crosswise: RUN1 RUN2 … URL, each scene by the first run that was not trained on it (for a refiner)",
    )
    p.add_argument(
        "--keep",
        choices=("top1", "top2", "logits", "evidence"),
        default="top1",
        help="the best class (default), the two best with their logits (train with data.soft=true), all logits, or top2 and "
        "how probably each voxel is occupied, free ones too (evidence)",
    )
    p.add_argument("--flips", action="store_true", help="average over mirror images of the scene (four forward passes)")
    p.add_argument(
        "--truth",
        type=data.at_least(0),
        default=0,
        help="number of scenes of the nested subset that keep their own labels",
    )
    p.add_argument("--holdout", type=data.at_least(0), default=0, help="with --truth: same as data.holdout")
    p.add_argument("--part", default="1/1", help="i/n: only every n-th shard, on the i-th GPU of this machine")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe, e.g. eval.batch=2")

    refine.add_command(command)
    citymap.add_command(command)


def _submit_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command(
        "submit",
        _submit,
        "write what a run finds in a packed nuScenes split as a submission to a benchmark",
        "Boxes are one JSON file; of points (lidarseg, panoptic) there is a file for each sweep, below a folder.",
    )
    p.add_argument("checkpoint", help="a run's folder or one of its step-… folders")
    p.add_argument("url", help="the data set, packed from nuScenes")
    p.add_argument("--out", required=True, help="the JSON file; for points the folder")
    p.add_argument("--kind", choices=("detection", "lidarseg", "panoptic"), default="detection", help="which benchmark")
    p.add_argument(
        "--split", choices=("train", "val", "test", "mini_train", "mini_val"), default="val", help="of points"
    )
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe, e.g. detect.most=300")


def _study_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command(
        "compare",
        _compare,
        "compare the runs of an MLflow experiment; for a study: curves, scaling laws and a report",
    )
    p.add_argument(
        "--uri",
        default="",
        help="MLflow tracking URI (default MLFLOW_TRACKING_URI, otherwise sqlite:///runs/mlflow.db)",
    )
    p.add_argument("--experiment", default="occstream")
    p.add_argument(
        "--by", default="", help="tag that names the rows of a plain table (default: arm, unless it is a study)"
    )
    p.add_argument("--partial", action="store_true", help="for a study: report even if cells are missing")
    p.add_argument("--out", default="", help="folder for tables and, for a study, pictures and report.html")

    p = command(
        "sweep",
        _sweep,
        "run a scaling study: scenes, strategies, seeds",
        "Rerunning runs only what is missing. key=value changes the study, for example seeds=[0,1].",
    )
    p.add_argument("study", help="name of a packaged study, or path of a .yaml file")
    p.add_argument(
        "--jobs", type=data.at_least(0), default=0, help="training runs at a time (default: one per core, at most 4)"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="make the data, check every cell and show the plan; train nothing"
    )
    p.add_argument(
        "--write", default="", metavar="KIND", help="write jobs instead of running them: slurm or kubernetes"
    )
    p.add_argument("settings", nargs="*", metavar="key=value")

    p = command("sync", _sync, "send a run's metrics that MLflow does not have yet")
    p.add_argument("run", help="the run's folder")
    p.add_argument("--uri", default="", help="MLflow tracking URI (default MLFLOW_TRACKING_URI)")
    p.add_argument(
        "--experiment", default="", help="experiment to create the run in if it is new there (default: the run's own)"
    )


def _machine_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    p = command("recipe", _recipe, "list the packaged recipes, or show the keys of one and their meanings")
    p.add_argument("name", nargs="?", default="", help="a packaged recipe, or the path of a .yaml file")
    p.add_argument("key", nargs="?", default="", help="one key or section, e.g. optim.lr or augment")

    p = command("doctor", _doctor, "show what this machine has and what to install")
    p.add_argument("--data", default="", help="URL of a packed data set to check access to")

    p = command("bench", _bench, "measure the speed against what this machine can do, as ratios within one run")
    p.add_argument(
        "what",
        choices=("pack", "stream", "step", "refine"),
        help="pack: against reading, JPEG work, zstd and hashing; stream: against the same "
        "decoding from memory, and other installed loaders (both need a checkout of the repository); step: a breakdown of a "
        "training step of --recipe; refine: CPU seconds of refining a frame, and memory",
    )
    p.add_argument("--recipe", default="r50", help="with step (default r50)")
    p.add_argument("--stage", default="", help="with step: of the task (default: the recipe's)")
    p.add_argument("--batch", type=data.at_least(1), default=1, help="with step: frames (default 1)")
    p.add_argument("settings", nargs="*", metavar="key=value", help="with step: settings of the recipe")
    p.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="'key=value …'",
        help="with step: peak memory and time of a step by the recipe and with these settings side by side, each in a "
        "process of its own, instead of the breakdown; may be repeated",
    )
    p.add_argument("--workers", type=data.at_least(1), default=2)
    p.add_argument("--repeats", type=data.at_least(1), default=3)
    p.add_argument(
        "--scenes",
        type=data.at_least(1),
        default=None,
        help="number of scenes (default 12 of 4 frames for pack, 30 of 10 for stream)",
    )
    p.add_argument(
        "--jpeg", type=Path, nargs="+", default=[], help="with stream: 900 x 1600 images to decode and shrink"
    )
    p.add_argument("--json", default="", help="also write the numbers here")

    p = command("demo", _demo, "run everything on synthetic scenes: shards, pre-training, fine-tuning, comparison")
    p.add_argument("--out", default="demo", help="folder (default demo)")
    p.add_argument("--seeds", type=data.at_least(1), default=2)


def _evaluate(args: argparse.Namespace) -> int:
    from occstream.pretrain.trained import evaluate_checkpoint

    overrides = [*args.settings, *([f"eval.url={args.data}"] if args.data else [])]
    if args.movie and not args.picture:
        raise ValueError("--movie writes to the folder of --picture; give one")
    picture = Path(args.picture) if args.picture else None
    result = evaluate_checkpoint(args.checkpoint, overrides, picture=picture, movie=args.movie)
    print(result.table())
    return 0


def _export(args: argparse.Namespace) -> int:
    from occstream.pretrain import export

    if not args.framework:
        if args.variant or args.in_features or args.intensity_scale != 1:
            raise ValueError("--variant, --in-features and --intensity-scale require --for")
        out = export.export(args.checkpoint, args.out)
        print(f"wrote {out} and {out.with_suffix('.json')}")
        return 0
    features = [name.strip() for name in args.in_features.split(",") if name.strip()]
    out, count = export.hand_off(
        args.checkpoint,
        args.out,
        args.framework,
        variant=args.variant,
        in_features=features,
        intensity_scale=args.intensity_scale,
    )
    print(
        f"wrote {out}: {count} of {count} tensors of the encoder for {args.framework}; see {out.with_name(export.ABOUT)}"
    )
    return 0


def _submit(args: argparse.Namespace) -> int:
    from occstream.launch.submit import submit

    samples, found = submit(args.checkpoint, args.url, args.out, tuple(args.settings), kind=args.kind, split=args.split)
    boxes = f"boxes of {samples:,} samples, attributes by class and speed"
    print(f"wrote {args.out}: {found:,} {boxes if args.kind == 'detection' else f'points of {samples:,} sweeps'}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    if args.holdout and not args.truth:
        raise ValueError("--holdout requires --truth; without it every scene is predicted")
    from occstream.launch.predict import predict_checkpoint

    runs, settings = [args.checkpoint, args.url], list(args.settings)
    if args.folds:
        runs += [word for word in settings if not _SETTING.match(word)]
        settings = [word for word in settings if _SETTING.match(word)]
        if len(runs) < 3:
            raise ValueError(
                "--folds needs two runs or more before the data set: occstream predict RUN1 RUN2 … URL --folds"
            )
    *runs, args.url = runs
    with Bar("predict") as bar:
        found = predict_checkpoint(
            runs[0],
            args.url,
            args.name,
            folds=runs[1:],
            keep=args.keep,
            flips=args.flips,
            truth=args.truth,
            holdout=args.holdout,
            part=data.parse_part(args.part),
            overrides=tuple(settings),
            progress=bar,
        )
    if found.frames:
        print(
            f"{args.name}: {found.frames} frames in {found.seconds:.0f} s, {found.voxels / found.frames:,.0f} voxels and "
            f"{found.bytes / found.frames / 1e3:.1f} kB per frame"
        )
    return data.say_published(args, found.skipped, found.manifest)


def _compare(args: argparse.Namespace) -> int:
    from occstream.launch.sweep import compared
    from occstream.pretrain.events import default_uri, describe_uri

    out, uri = Path(args.out) if args.out else None, args.uri or default_uri()
    print(f"MLflow: {describe_uri(uri)}, experiment {args.experiment}")
    print(compared(uri, args.experiment, by=args.by, out=out, partial=args.partial))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from occstream.launch.sweep import sweep
    from occstream.pretrain.config import parse_overrides

    overrides = parse_overrides(args.settings)
    return sweep(args.study, jobs=args.jobs, dry_run=args.dry_run, write=args.write, overrides=overrides)


def _sync(args: argparse.Namespace) -> int:
    from occstream.pretrain.sender import sync

    print(sync(Path(args.run), args.uri, args.experiment))
    return 0


def _recipe(args: argparse.Namespace) -> int:
    from occstream.launch.showrecipe import show_recipe

    print(show_recipe(args.name, args.key))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from occstream.launch.doctor import examine, report

    findings = examine(args.data)
    print(report(findings))
    return 1 if any(f.ok is False for f in findings) else 0


def _bench(args: argparse.Namespace) -> int:
    import json

    if args.what == "step":
        from occstream.launch.bench_step import bench_step, compare_settings

        many = {"batch": args.batch, "repeats": args.repeats}
        if args.against:
            settings = tuple(args.settings)
            found = compare_settings(args.recipe, settings, args.stage, against=args.against, **many)
        else:
            found = bench_step(args.recipe, tuple(args.settings), args.stage, **many)
    elif args.what == "pack":
        found = _from_checkout("pack").bench_pack(args.scenes or 12, workers=args.workers, repeats=args.repeats)
    elif args.what == "refine":
        found = _from_checkout("refine").bench_refine(repeats=args.repeats)
    else:
        found = _from_checkout("stream").bench_stream(args.scenes or 30, args.repeats, args.jpeg)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))
    return 0


def _from_checkout(name: str) -> ModuleType:
    """A module of ``infra/bench``, which is next to this package in a checkout. Raises ValueError elsewhere."""
    import importlib
    import sys

    root = Path(__file__).resolve().parents[1]
    if not (root / "infra" / "bench" / f"{name}.py").is_file():
        raise ValueError(
            f"bench {name} is in infra/bench/{name}.py of occstream's repository, which the installed package does not "
            "contain: install a checkout with `pip install -e .` and call it there"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module(f"infra.bench.{name}")


def _demo(args: argparse.Namespace) -> int:
    from occstream.launch.demo import demo

    return demo(Path(args.out), args.seeds)


if __name__ == "__main__":
    raise SystemExit(main())
