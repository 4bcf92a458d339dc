"""Parameters as ZeRO leaves them: this rank's values, and whole ones from them and back.

It leans on ``ds_tensor``, an attribute of DeepSpeed (pinned exactly in pyproject.toml).
``tests/pretrain/test_distributed.py`` proves it by the next losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from occstream.pretrain.distributed import World

if TYPE_CHECKING:

    class Slice(Tensor):
        """One rank's values of a ZeRO-3 parameter, zero-padded: ``ds_numel`` of them."""

        ds_numel: int

    class Partitioned(Tensor):
        """A ZeRO-3 parameter; ``ds_numel`` and ``ds_shape`` are those of the whole one."""

        ds_tensor: Slice
        ds_numel: int
        ds_shape: torch.Size

        def partition(self) -> None:
            """Frees a gathered copy."""


def is_partitioned(param: Tensor) -> TypeGuard[Partitioned]:
    """True for a ZeRO-3 parameter, whose values live in ``ds_tensor``, 1/world of them on each rank, zero-padded."""
    return hasattr(param, "ds_tensor")


def local_values(tensor: Tensor) -> Tensor:
    """The values this rank holds: the whole tensor, or its ZeRO-3 slice (1-D)."""
    return tensor.ds_tensor.data if is_partitioned(tensor) else tensor.data


def to_local(tensor: Tensor, full: Tensor, world: World) -> Tensor:
    """This rank's part of a full value, in the layout of ``local_values(tensor)``."""
    if not is_partitioned(tensor):
        return full
    length = tensor.ds_tensor.ds_numel
    padded = torch.zeros(length * world.size, dtype=full.dtype)
    padded[: full.numel()] = full.reshape(-1).cpu()
    return padded[world.rank * length : (world.rank + 1) * length]


def to_full(tensor: Tensor, local: Tensor, world: World) -> Tensor | None:
    """Inverse of ``to_local`` (collective for ZeRO-3), for the rank that saves: on its CPU; None on others, which copy
    nothing."""
    if is_partitioned(tensor):
        whole = local.new_empty(world.size * local.numel())
        dist.all_gather_single(whole, local.detach().contiguous())
        local = whole[: tensor.ds_numel].reshape(tensor.ds_shape)
    return local.detach().to("cpu", copy=True) if world.is_main else None


def full_state(module: nn.Module, values: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """``to_full`` of every parameter and floating buffer (collective); {} on ranks that do not save."""
    return _kept((name, to_full(t, values[name], world)) for name, t in float_state(module))


def float_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and floating buffers of the state dict by name (what an EMA averages)."""
    kept = module.state_dict(keep_vars=True)
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and name in kept:
            yield name, buffer


def module_state(module: nn.Module, world: World) -> dict[str, Tensor]:
    """Full parameters and buffers on the CPU, by name (collective); {} on ranks that do not save. fp32 masters: we never
    train in lower precision."""
    state = _kept((name, to_full(p, local_values(p), world)) for name, p in module.named_parameters())
    if not world.is_main:
        return {}
    state.update({name: b.detach().to("cpu", copy=True) for name, b in module.named_buffers()})
    persistent = set(module.state_dict().keys())
    return {name: value for name, value in state.items() if name in persistent}


def _kept(values: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    return {name: value for name, value in values if value is not None}
