"""What a packing job took and left out, in the same few lines for every source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from occstream.sharding.datacard import black_shares, lacking_line
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.rawfiles import listed
from occstream.sharding.schema import Findings, Source
from occstream.sharding.stream import ShardReader

LabelMode = Literal["native", "lidar", "none"]


def findings(source: Source) -> Findings:
    """What a source found; nothing for one that does not say."""
    return getattr(source, "findings", None) or Findings()


def choose_labels(source: Source, wanted: str, grid: VoxelGrid | None) -> tuple[LabelMode, str]:
    """Which labels a job packs, and why.

    Args:
        source: opened.
        wanted: auto (the source's own, else made from LiDAR), or one of them by name.
        grid: that was asked for; None: the labels' own.

    Raises:
        ValueError: labels that the source does not have are asked for; they would be of two kinds; or, without being asked,
            ground truth would not be used.
    """
    found, native = findings(source), source.grid
    if wanted == "none":
        return "none", "none, as asked"
    if wanted == "native" and native is None:
        raise ValueError(f"source {source.name!r} has no labels of its own; use --labels lidar")
    if wanted == "lidar" or native is None:
        if wanted != "lidar" and found.unused:
            raise ValueError(f"{found.unused}; or say --labels lidar to make them from LiDAR all the same")
        if found.mixture:
            raise ValueError(found.mixture)
        why = ", as asked" if wanted == "lidar" else f": {found.labels or 'the source brings none'}"
        return "lidar", f"made from LiDAR{why}"
    if grid is not None and not native.same_voxels(grid):
        raise ValueError(
            f"source {source.name!r} brings labels on grid {native.name!r}, not {grid.name!r}: leave --grid out to take "
            "them, or say --labels lidar to make labels on that grid"
        )
    return "native", f"native: {found.labels or 'the source brings them'}"


def before(source: Source, reason: str, grid: VoxelGrid | None) -> list[str]:
    """What is known before a job begins: label source and why, grid, what was left out when the source was opened.

    Args:
        reason: of ``choose_labels``; "": no labels are packed.
        grid: of the labels.
    """
    scenes = len(source.scene_names())
    same = f"the same for all {scenes} scenes" if scenes != 1 else "for the one scene"
    lines = [f"labels     {reason or 'none'}; {same}"]
    if reason.startswith("made from LiDAR"):
        points = findings(source).points
        lines.append(f"points     classes from {points}" if points else "points     without classes: labels are binary")
    lines.append(f"grid       {_grid(grid) if grid and reason else 'none'}")
    return [*lines, *(f"left out   {line}" for line in findings(source).left_out or ("nothing",))]


def after(manifest: Manifest, frames: int = 8) -> list[str]:
    """What only the packed frames tell: whether labels have classes, share of unknown voxels, views, what rectifying left
    black, scenes that failed.

    Args:
        frames: at most this many are read, evenly spread.
    """
    groups = tuple(g for g in manifest.groups if g in ("cameras", manifest.label_group))
    chosen = manifest.spread(frames)
    views, known, voxels, labeled, semantic, masked = Counter(), 0, 0, 0, 0, 0
    if groups:
        reader = ShardReader(manifest, groups)
        try:
            for place in chosen:
                frame = reader.frame(*place)
                views.update(list(frame.cameras))
                if frame.labels is not None:
                    labeled += 1
                    masked += frame.labels.mask_lidar is not None
                    semantic += frame.labels.semantic is not None
                    known += int(frame.labels.known().sum())
                    voxels += frame.labels.binary.size
        finally:
            reader.close()
    share = f"{100 * (1 - known / voxels):.1f} % of the voxels of {plural(labeled, 'frame')}" if voxels else "no labels"
    if voxels and not masked:
        share = "0.0 %, as these labels have no mask: every voxel counts as known"
    classes = f"semantic in {semantic} of {plural(labeled, 'frame')}" if semantic else "none: labels are binary"
    lines = [f"classes    {classes}"] if labeled else []
    lines += [f"unknown    {share}", f"views      {_views(views, len(chosen)) if views else 'none'}"]
    if black := black_shares(manifest.scenes):
        some = [f"{name} {100 * share:.1f} %" for name, share in black.items() if share >= 0.0005]
        lines.append(
            f"rectified  {plural(len(black), 'view')} to pinholes; black at most: {', '.join(some) or 'nothing'}"
        )
    if line := lacking_line(manifest.scenes):
        lines.append(f"cameras    {line}")
    if manifest.left_out:
        lines.append(f"left out   {listed('scene', manifest.left_out)} that failed")
    return lines


def plural(count: int, what: str) -> str:
    """As in 1 scene, 2 scenes."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _grid(grid: VoxelGrid) -> str:
    sizes = "x".join(map(str, grid.shape))
    edges = sorted(set(grid.voxel))
    return f"{grid.name}, {sizes} voxels of {' x '.join(f'{e:g}' for e in edges)} m, {grid.frame} frame"


def _views(views: Mapping[str, int], frames: int) -> str:
    rare = [f"{name} in {count} of {frames} frames" for name, count in views.items() if count < frames]
    return f"{len(views)}: {', '.join(views)}" + (f" ({', '.join(rare)})" if rare else "")
