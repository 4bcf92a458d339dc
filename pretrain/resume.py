"""Which checkpoint a run goes on from: the same on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from occstream.pretrain import checkpoint
from occstream.pretrain.checkpoint import Checkpoint, Damaged
from occstream.pretrain.engine import World, control_group


def newest(root: Path, url: str, world: World) -> tuple[Checkpoint | None, int]:
    """The newest checkpoint that is whole, here or uploaded (collective). One that is damaged is named aloud and renamed to
    ``damaged-…``, and its uploaded copy or the one before is taken.

    Args:
        root: folder of the run's checkpoints.
        url: below which they are uploaded; "": nowhere.

    Returns:
        It, or None if there is none at all; and the step of the newest uploaded one, -1 if there is none.

    Raises:
        ValueError: none is whole, or one has another format; nothing is renamed then.
        OSError: a rank has no access to it.
    """
    here, there = _steps(root, url, world)
    if not here and not there:
        return None, -1
    aside: list[Path] = []
    error: Exception | None = None
    for step in sorted({*here, *there}, reverse=True):
        path = root / checkpoint.folder_name(step)
        for _ in range(2 if step in here and step in there else 1):
            saved, error = _read(path, step, url if step in there else "")
            world.agree(None if isinstance(error, Damaged) else error)
            if not world.agree(None, isinstance(error, Damaged)):
                return saved, max(there, default=-1)
            if error is not None:
                print(f"WARNING: {error}", file=sys.stderr, flush=True)
                if world.is_main and path.exists():
                    aside.append(checkpoint.set_aside(path))
            world.agree(None)  # nobody looks at it again before it is renamed
    for path in aside:
        path.rename(path.with_name(path.name.removeprefix(checkpoint.ASIDE)))
    world.agree(error)
    raise ValueError(f"{root}: no checkpoint there is whole")


def _steps(root: Path, url: str, world: World) -> tuple[list[int], list[int]]:
    """Steps of checkpoints in the folder and below the URL, as the main rank sees them."""
    found: list[list[int]] = [[], []]
    error = None
    if world.is_main:
        try:
            found[0] = [checkpoint.step_of(p) for p in checkpoint.complete_steps(root)]
            found[1] = checkpoint.remote_steps(url) if url else []
        except Exception as problem:
            error = problem
    world.agree(error)
    if world.size > 1:
        dist.broadcast_object_list(found, 0, group=control_group())
    return found[0], found[1]


def _read(path: Path, step: int, url: str) -> tuple[Checkpoint | None, Exception | None]:
    try:
        if url:
            # Ranks of one node may each fetch it; the first that is done wins.
            path = checkpoint.download(url, step, path.parent)
        return Checkpoint(path, strict=True), None
    except Exception as problem:
        return None, problem
