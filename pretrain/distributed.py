"""The process group of a run: this process's place in it, joining it, and agreeing over it."""

from __future__ import annotations

import datetime
import functools
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from occstream.pretrain.device import pick_device
from occstream.pretrain.limits import check_limits


@dataclass(frozen=True)
class World:
    """This process's place. ``device`` is ``cuda:<local rank>`` or ``cpu`` (``pick_device``);
    ``launched``: a launcher started this process and watches over it; ``local``: the rank among those of its node."""

    rank: int
    size: int
    device: torch.device
    launched: bool = False
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and saves."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a line once, whatever the number of ranks."""
        if self.is_main:
            print(text, flush=True)

    def agree(self, error: Exception | None, flag: bool = False) -> bool:
        """Raises on every rank if any rank brings an error: nobody is left waiting in a collective.

        Returns:
            Whether any rank's flag is set.

        Raises:
            DataError: naming the first such rank and its error; the error itself on a single process.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return flag
        flags = torch.tensor([int(error is not None), int(flag)])
        dist.all_reduce(flags, group=control_group())
        bad, any_set = flags.tolist()
        if not bad:
            return bool(any_set)
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(
            said, None if error is None else f"{type(error).__name__}: {error}", group=control_group()
        )
        rank, text = next((r, t) for r, t in enumerate(said) if t)
        raise DataError(f"rank {rank}: {text}") from error


class DataError(ValueError):
    """Some rank could not get its data."""


_timeout = datetime.timedelta(minutes=10)


@functools.cache
def control_group() -> dist.ProcessGroup:
    """A gloo group for small agreements on the CPU, besides NCCL, with its time-out; all ranks must call it first at the same
    place."""
    own = dist.get_backend() == "gloo"
    group = dist.group.WORLD if own else dist.new_group(backend="gloo", timeout=_timeout)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError("the process group has not been joined")
    return group


def init_distributed(timeout_minutes: float = 10.0) -> World:
    """Joins the process group of the launcher; without a launcher (plain ``python``) a group of one process.

    Returns:
        rank, world size and device. CUDA uses NCCL, CPU uses gloo.

    Raises:
        ValueError: as ``pick_device``.
    """
    global _timeout
    _timeout = datetime.timedelta(minutes=timeout_minutes) if timeout_minutes else datetime.timedelta(days=365)
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
    os.environ["DS_ACCELERATOR"] = device.type  # or DeepSpeed looks for one itself, and warns
    import deepspeed
    import deepspeed.ops

    # DeepSpeed compiles this op with g++ at every first CPU start, only for inference all-reduce, which we never call.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched = "RANK" in os.environ
    if not launched:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in alone.items()})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        rank = int(os.environ["RANK"])
        if warning := check_limits(int(os.environ["WORLD_SIZE"]), rank):
            print(f"warning: {warning}", flush=True)
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=_timeout,
            verbose=False,
        )
    return World(dist.get_rank(), dist.get_world_size(), device, launched, int(os.environ.get("LOCAL_RANK", 0)))
