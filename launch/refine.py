"""``occstream refine``: labels of a packed data set, refined by the votes of each drive's other frames."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from occstream.launch.data import at_least, parse_part, say_published
from occstream.launch.progress import Bar

if TYPE_CHECKING:
    from occstream.evaluation.bayes import Confusions
    from occstream.evaluation.refinement import RefineConfig


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    p = command(
        "refine",
        run,
        "refine predictions by the votes of each drive's other frames, as a label group alongside the images",
        "Rerunning skips what is done. Split the job across machines with --part 1/8 … 8/8; the last part publishes.",
    )
    p.add_argument("url", help="the data set")
    p.add_argument("--input", required=True, help="label group that votes: pseudo-… of `occstream predict`, or labels")
    p.add_argument("--name", required=True, help="of the new group, pseudo-…; train with data.labels=NAME")
    p.add_argument(
        "--rule",
        choices=("votes", "bayes"),
        default="votes",
        help="votes weighted by the sensor (default), or naive Bayes by a table of the network's confusions",
    )
    p.add_argument("--window", type=at_least(0), default=25, help="key-frames to each side that vote (default 25)")
    p.add_argument(
        "--movers",
        choices=("parked", "tracks", "none"),
        default="parked",
        help="parked (default): other frames' things count where half of the frames that see the place call it a thing; "
        "tracks: what lies in a tracked box of the set's own labels votes in the box's frame; none: everything stands",
    )
    p.add_argument(
        "--sensor",
        choices=("camera", "lidar", "none"),
        default="camera",
        help="votes: by view and nearness (camera, default), by distance (lidar), or all alike",
    )
    p.add_argument(
        "--empty", type=float, default=0.3, help="votes: what free weighs against the occupied (default 0.3)"
    )
    p.add_argument(
        "--voxels",
        choices=("all", "known"),
        default="all",
        help="voxels of a frame that vote: all (default), or those that mask_lidar of the labels knows",
    )
    _table_arguments(p)
    p.add_argument(
        "--soft",
        action="store_true",
        help="a voxel's vote is shared by its two best classes, as the logits of `occstream predict --keep top2` or logits say",
    )
    p.add_argument(
        "--evidence",
        action="store_true",
        help="bayes: free voxels say how much they are in doubt, as `occstream predict --keep evidence` stored it",
    )
    p.add_argument(
        "--local",
        default="",
        metavar="RUN",
        help="first correct the input by a trained refiner (task occfiner), as a label group NAME-local whose logits then vote: "
        "implies --soft",
    )
    _machine_arguments(p)


def _machine_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--part", default="1/1", help="i/n: only every n-th shard")
    p.add_argument("--workers", type=at_least(1), default=1, help="threads on the CPU (default 1)")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what counts votes: a GPU with Triton where there is one (auto, default); the result is the same",
    )


def _table_arguments(p: argparse.ArgumentParser) -> None:
    """Which scenes are held out, which keep the truth, and the table that is measured on the former."""
    p.add_argument(
        "--holdout",
        type=at_least(0),
        default=0,
        help="bayes: measure the table on this many held-out scenes, of which training saw none (as data.holdout)",
    )
    p.add_argument(
        "--keep-truth",
        type=at_least(0),
        default=0,
        help="number of scenes of the nested subset (with --holdout, --subset-seed) that keep their own labels, as for predict",
    )
    p.add_argument("--subset-seed", type=at_least(0), default=0, help="bayes: same as data.subset_seed (default 0)")
    p.add_argument(
        "--truth", default="labels", help="bayes: group of labels that the table is measured by (default labels)"
    )
    p.add_argument(
        "--table", default="", help="bayes: a .json file; used if it is there, otherwise written by --holdout"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from occstream.evaluation.propagate import on_gpu
    from occstream.evaluation.refinement import RefineConfig, refine
    from occstream.evaluation.votes import VoteConfig

    votes = VoteConfig(args.sensor, empty=args.empty)
    config = RefineConfig(
        args.rule, args.window, args.movers, votes, args.voxels, args.soft or bool(args.local), args.evidence
    )
    if args.rule == "votes" and ((args.holdout and not args.keep_truth) or args.table):
        raise ValueError("--holdout and --table belong to --rule bayes; votes need no table")
    kept = []
    if args.keep_truth:
        from occstream.sharding.manifest import Manifest

        kept = Manifest.load(args.url).subset(args.keep_truth, args.subset_seed, args.holdout)
        print(f"{len(kept)} scenes keep the set's own labels")
    part = parse_part(args.part)
    if on_gpu(args.device):
        print("votes are counted on the GPU")
    if args.local and not _locally(args, part):
        return 0
    table = _table(args, config) if args.rule == "bayes" else None
    with Bar("refine") as bar:
        found = refine(
            args.url,
            args.input,
            args.name,
            config,
            table=table,
            part=part,
            threads=args.workers,
            device=args.device,
            kept=kept,
            progress=bar,
        )
    if found.frames:
        each = [f"{getattr(found, name) / found.frames:.2f}" for name in ("reading", "voting", "writing")]
        print(f"in view: {found.view_from}")
        print(
            f"{args.name}: {found.frames} frames in {found.seconds:.0f} s; CPU seconds per frame: {each[0]} reading, {each[1]} "
            f"voting, {each[2]} writing; {found.changed / found.frames:,.0f} voxels changed and "
            f"{found.bytes / found.frames / 1e3:.1f} kB per frame"
        )
    return say_published(args, found.skipped, found.manifest)


def _locally(args: argparse.Namespace, part: tuple[int, int]) -> bool:
    """Puts the input as a refiner corrects it in its place; False while other parts of that are missing."""
    from occstream.launch.predict import predict_checkpoint

    group, overrides = f"{args.name}-local", (f"data.input={args.input}",)
    with Bar(f"predict {group}") as bar:
        found = predict_checkpoint(
            args.local, args.url, group, keep="top2", part=part, overrides=overrides, progress=bar
        )
    if found.manifest is None:
        print(f"part {args.part} of {group} is done; when all parts are, run the same commands again for {args.name}")
        return False
    print(f"{group}: {args.input} as {args.local} corrects it, {found.frames} frames made, {found.skipped} shards kept")
    args.input = group
    return True


def _table(args: argparse.Namespace, config: RefineConfig) -> Confusions:
    """The table of confusions, read or measured."""
    from occstream.evaluation.bayes import LAMBDAS, Confusions
    from occstream.evaluation.refinement import measure
    from occstream.sharding.manifest import Manifest
    from occstream.sharding.received import load_json

    path = Path(args.table) if args.table else None
    if path and path.exists():
        data = load_json(path.read_bytes(), str(path), "measure it again with --holdout")
        table = Confusions.from_dict(data, str(path))
        names = scenes if isinstance(scenes := data.get("scenes"), list) else []
        print(f"table {table.digest} of {path}: measured on {len(names)} scenes of {data.get('input', 'unknown labels')!s:.60}, "
              f"λ {table.exponent:g}")  # fmt: skip
        return table
    if not args.holdout:
        raise ValueError(
            f"rule bayes needs a table of the network's confusions: {f'{path} is not there; ' if path else ''}give "
            "--holdout N to measure it on N scenes that training never saw (as data.holdout), or --table FILE of such a run"
        )
    base = Manifest.load(args.url)
    if args.holdout > len(base.scenes):
        raise ValueError(f"--holdout {args.holdout}: {args.url} has {len(base.scenes)} scenes")
    scenes = base.held_out(args.holdout, args.subset_seed)
    table, scores = measure(args.url, args.input, scenes, dataclasses.replace(config), truth=args.truth)
    said = ", ".join(f"{exponent:g}: {100 * a:.1f} / {100 * b:.1f}" for exponent, (a, b) in zip(LAMBDAS, scores))
    print(f"table {table.digest}: measured on {len(scenes)} held-out scenes; IoU / mIoU of a sample by λ: {said}")
    print(f"λ {table.exponent:g}; scores on these scenes flatter the rule, evaluate it on others")
    if path:
        names = [base.scenes[i].name for i in scenes]
        about = {"input": f"{args.input} of {base.source}", "scenes": names, "classes": list(base.classes)}
        path.write_text(json.dumps({**table.to_dict(), **about}))
        print(f"wrote {path}")
    return table
