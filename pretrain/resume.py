"""Which checkpoint a run resumes from, the same on every rank, and whether it belongs to the same run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from occstream.pretrain import checkpoint
from occstream.pretrain.checkpoint import Checkpoint, Damaged
from occstream.pretrain.config import Config, parse_config
from occstream.pretrain.distributed import World, control_group
from occstream.pretrain.events import flatten, redact
from occstream.pretrain.renamed import saved_settings
from occstream.pretrain.tasks.registry import get_task, task_of

# Settings that a resumed run may change: none of them changes what the same step learns. Data is compared by
# fingerprint, so it may move.
_FREE = (
    "output",
    "track.",
    "eval.",
    "data.url",
    "replay.url",
    "train.init",
    "train.steps",
    "train.epochs",
    "train.zero_stage",
    "train.save_every",
    "train.keep",  # and keep_every, keep_best
    "train.upload",
    "train.log_",
    "train.threads",
    "train.data_timeout",
    "train.timeout_minutes",
    "train.profile",
    "train.skip_nonfinite",
    "train.kernels",
    "train.compile",
)


def newest(root: Path, url: str, world: World) -> tuple[Checkpoint | None, int]:
    """The newest checkpoint that is whole and that all ranks have, here or uploaded (collective). On nodes with disks of their
    own, one that only the main rank's node has is uploaded first, if there is a place. One that is damaged is named aloud and
    renamed to ``damaged-…``, and its uploaded copy or the one before is taken.

    Args:
        root: folder of the run's checkpoints.
        url: below which they are uploaded; "": nowhere.

    Returns:
        It, or None if there is none at all; and the step of the newest uploaded one, -1 if there is none.

    Raises:
        ValueError: none is whole, or one has another format; nothing is renamed then. Or there are some, but none that all
            ranks have.
        OSError: a rank has no access to it.
    """
    here, there = _steps(root, url, world)
    if not here and not there:
        return None, -1
    here, there = _everywhere(root, url, world, here=here, there=there)
    aside: list[Path] = []
    error: Exception | None = None
    for step in sorted({*here, *there}, reverse=True):
        path = root / checkpoint.folder_name(step)
        for _ in range(2 if step in here and step in there else 1):
            # One rank of each node fetches and hashes it.
            saved, error = _read(path, step, url if step in there else "") if world.local == 0 else (None, None)
            world.agree(None if isinstance(error, Damaged) else error)
            if not world.agree(None, isinstance(error, Damaged)):
                if world.local:
                    saved, error = _read(path, step, "", hashed=False)
                world.agree(error)
                return saved, max(there, default=-1)
            if error is not None:
                print(f"WARNING: {error}", file=sys.stderr, flush=True)
                if world.is_main and path.exists():
                    aside.append(checkpoint.set_aside(path))
            world.agree(None)  # nobody looks at it again before it is renamed
    for path in aside:
        path.rename(path.with_name(path.name.removeprefix(checkpoint.ASIDE)))
    world.agree(error)
    raise ValueError(f"{root}: no checkpoint there is complete")


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


def _everywhere(
    root: Path, url: str, world: World, *, here: list[int], there: list[int]
) -> tuple[list[int], list[int]]:
    """Those of the main rank's checkpoints that every rank's disk has, and the uploaded ones."""
    if world.size == 1 or not here:
        return here, there
    has = torch.tensor(
        [(root / checkpoint.folder_name(s) / checkpoint.COMPLETE).is_file() for s in here], dtype=torch.int
    )
    dist.all_reduce(has, op=dist.ReduceOp.MIN, group=control_group())
    common = [step for step, everywhere in zip(here, has.tolist()) if everywhere]
    newest, error = max(here), None
    if newest in common or newest in there:
        return common, there
    path = root / checkpoint.folder_name(newest)
    if url and newest > max(there, default=-1):
        if world.is_main:
            print(f"{path} is not on every node's disk: uploading it to {redact(url)} first", flush=True)
            try:
                checkpoint.upload(path, url)
            except Exception as problem:
                error = problem
        world.agree(error)
        return common, [*there, newest]
    if not common and not there:
        raise ValueError(
            f"{path} is only on the main rank's disk, so other ranks cannot resume from it: give an output= that all nodes "
            "share, or train.upload=, or start on the nodes that have it"
        )
    if world.is_main:
        print(
            f"WARNING: {path} is not on every node's disk; resuming from step {max([*common, *there])}, which all have",
            file=sys.stderr,
            flush=True,
        )
    return common, there


def _read(path: Path, step: int, url: str, hashed: bool = True) -> tuple[Checkpoint | None, Exception | None]:
    try:
        if url:
            path = checkpoint.download(url, step, path.parent)
        return Checkpoint(path, strict=True, hashed=hashed), None
    except Exception as problem:
        return None, problem


def check_same_run(config: Config, fingerprints: dict[str, str], saved: Checkpoint) -> None:
    """Raises ValueError if the folder holds another run than the one that is asked for."""
    old, new = settings_then(saved, config), flatten(config.to_dict())
    free = (*_FREE, *task_of(config).free)
    changed = [k for k in {**new, **old} if old.get(k) != new.get(k) and not k.startswith(free)]
    if changed:
        first = changed[0]
        raise ValueError(
            f"{saved.path} was trained with {first}={old.get(first)}, this run has {first}={new.get(first)}"
            f"{f' (and {len(changed) - 1} more differ)' if changed[1:] else ''}; "
            "choose another output= for a new run, or restore the old settings to resume"
        )
    if saved.state["fingerprints"] != fingerprints:
        raise ValueError(
            f"{saved.path} was trained on other data ({saved.state['fingerprints']}, now {fingerprints}); "
            "choose another output= for a new run"
        )


def settings_then(saved: Checkpoint, now: Config) -> dict[str, object]:
    """What a checkpoint was trained with, by dotted key: settings that did not exist then are as the code was."""
    config = saved_settings(saved.state)
    return flatten(parse_config(get_task(now.task).settings_then(config)).to_dict())
