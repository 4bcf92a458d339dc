"""Moving average of the weights, for evaluation and export."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from occstream.pretrain.config import TrainConfig
from occstream.pretrain.partition import float_state, is_partitioned, local_values

Warmup = Literal["exponential", "mean"]


def ema_decay(updates: int, highest: float, warmup: Warmup) -> float:
    """Decay of the n-th update; see ``train.ema_warmup``."""
    if warmup == "mean":
        return min(1 - 1 / updates, highest)
    return highest * (1 - math.exp(-updates / 2000))


class Ema:
    """Exponential moving average of parameters and floating buffers, in fp32, on each rank's own slices."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.decay, self.updates = config.ema_decay, config.ema_start
        self.warmup: Warmup = config.ema_warmup
        self.values = {name: local_values(t).detach().float().clone() for name, t in float_state(module)}
        # Parameters stay the same objects at every stage, whatever holds their values. A layer may assign a new buffer.
        self._parameters = [(self.values[name], p) for name, p in module.named_parameters()]
        owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_buffers()}
        self._buffers = [
            (self.values[n], owner, n.rpartition(".")[2]) for n, owner in owners.items() if n in self.values
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Call once after each optimizer step."""
        self.updates += 1
        decay = ema_decay(self.updates, self.decay, self.warmup)
        state = [(old, local_values(p).float()) for old, p in self._parameters]
        state += [(old, getattr(owner, leaf).float()) for old, owner, leaf in self._buffers]
        # One call for all of them; torch exports no public name of it.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [old for old, _ in state], [new for _, new in state], 1 - decay
        )

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module computes with the averaged values."""
        kept = {name: local_values(t).clone() for name, t in float_state(module)}
        self._write(module, self.values)
        try:
            yield
        finally:
            self._write(module, kept)

    @staticmethod
    @torch.no_grad()
    def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, tensor in float_state(module):
            if is_partitioned(tensor):
                tensor.partition()  # a gathered copy that a forward left behind would hide the new values
            local_values(tensor).copy_(values[name])
