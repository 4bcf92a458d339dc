"""``occstream map``: one map of whole drives from the labels of their frames."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from occstream.launch.data import at_least, parse_part
from occstream.launch.progress import Bar


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    p = command(
        "map",
        run,
        "make one map of whole drives from the labels of their frames, tile by tile",
        "Rerunning skips what is done. Split the job with --part 1/8 … 8/8, in one folder or in several that are copied "
        "together; the last part completes the map and writes the files. Needs the extra: pip install 'occstream[maps]'.",
    )
    p.add_argument("url", help="the data set")
    p.add_argument("--labels", required=True, help="label group: pseudo-… of `occstream refine`, or labels")
    p.add_argument("--out", required=True, help="folder of the map")
    p.add_argument(
        "--scenes",
        default="",
        help="comma-separated names of the drives, which must share one global frame, or all (needed unless there is one)",
    )
    p.add_argument("--things", action="store_true", help="keep what may move; by default it does not enter the map")
    p.add_argument(
        "--sensor",
        choices=("camera", "lidar", "none"),
        default="camera",
        help="weights of the frames' votes, as for refine (default camera)",
    )
    p.add_argument("--empty", type=float, default=1.0, help="what free weighs against the occupied (default 1)")
    p.add_argument("--laz", action="store_true", help="also write map.laz, for CloudCompare, QGIS or PDAL")
    p.add_argument("--ply", action="store_true", help="also write map.ply, for MeshLab or Open3D")
    p.add_argument(
        "--bev", action="store_true", help="also write map.png and map.pgw, a georeferenced picture from above"
    )
    p.add_argument("--part", default="1/1", help="i/n: only every n-th shard of the map")
    p.add_argument("--workers", type=at_least(1), default=1, help="threads on the CPU (default 1)")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what counts votes: a GPU with Triton where there is one (auto, default); the result is the same",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from occstream.evaluation.citymap import CityMap, extra, make_map
    from occstream.evaluation.mapfiles import write_bev, write_laz, write_ply
    from occstream.evaluation.propagate import on_gpu
    from occstream.evaluation.votes import VoteConfig

    for package in ("zarr", *(("laspy", "lazrs") if args.laz else ())):
        extra(package)  # before hours of work
    if on_gpu(args.device):
        print("votes are counted on the GPU")
    with Bar("map") as bar:
        made = make_map(
            args.url,
            args.labels,
            args.out,
            scenes=_scenes(args.url, args.scenes),
            config=VoteConfig(args.sensor, empty=args.empty),
            things=args.things,
            part=parse_part(args.part),
            threads=args.workers,
            device=args.device,
            progress=bar,
        )
    if made.shards:
        print(f"in view: {made.view_from}")
    print(
        f"{args.out}: {made.tiles} tiles in {made.shards} of {made.total} shards made, {made.skipped} already existed"
    )
    if made.thinned:
        print(f"{made.thinned} tiles were seen by more frames than are counted; evenly spaced ones took part")
    if not made.complete:
        print(f"part {args.part} is done; the part that finishes last completes the map")
        return 0
    city, out = CityMap.open(args.out), Path(args.out)
    print(
        f"complete: {len(city.frames)} frames, origin {', '.join(f'{v:.1f}' for v in city.origin)} m in the global frame"
    )
    if args.laz:
        print(f"map.laz: {write_laz(city, out / 'map.laz'):,} points")
    if args.ply:
        print(f"map.ply: {write_ply(city, out / 'map.ply'):,} points")
    if args.bev:
        print("map.png: {} x {} pixels".format(*write_bev(city, out / "map.png")))
    return 0


def _scenes(url: str, names: str) -> list[int]:
    from occstream.sharding.manifest import Manifest

    base = Manifest.load(url)
    if names == "all":
        return list(range(len(base.scenes)))
    if names:
        return base.named(names.split(","))
    if len(base.scenes) > 1:
        raise ValueError(
            f"{url} has {len(base.scenes)} scenes, and only drives that share one global frame make one map: name them with "
            "--scenes a,b or --scenes all"
        )
    return [0]
