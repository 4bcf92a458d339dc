"""Optimizer settings, learning rates by samples, and groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

WARM = 0.001  # of the learning rate, with which a warm-up begins


@dataclass
class OptimConfig:
    """Optimizer (B2S, Sec. 4.1), learning rate and groups of parameters. Rates depend on the samples trained on, so that a
    run that resumes on another number of GPUs continues the same curve."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """adamw: weight decay apart from the gradient (with one-cycle, what OpenPCDet calls adam_onecycle). adam: weight decay is
    added to the gradient."""
    lr: float = 2e-4
    """Learning rate for ``train.batch`` as given; it is not rescaled. The highest that the schedule reaches."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the averages of gradients and of their squares; ``onecycle`` changes the first (``moms``)."""
    eps: float = 1e-8
    """Added to the root of the averaged squares."""
    weight_decay: float = 0.01
    """Of all parameters (without exceptions, as in COTR); see ``decay_vectors`` and ``decay_groups``."""
    decay_vectors: bool = True
    """False: norms, biases and other parameters of one dimension have no weight decay."""
    groups: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate by module, for example ``optim.groups.images=0.1``; of nested modules the innermost
    counts. 0 keeps weights as they are."""
    decay_groups: dict[str, float] = field(default_factory=dict)
    """Factors of the weight decay by module, like ``groups``."""
    clip: float = 5.0
    """Gradient norm limit (L2 over all parameters). 0: none."""
    schedule: Literal["constant", "cosine", "onecycle", "multistep", "exponential"] = "constant"
    """After warm-up: constant (COTR's effective schedule); cosine to ``min_lr_ratio``; multistep, by ``milestone_factor`` at each
    of ``milestones``; exponential, by ``epoch_factor`` after each epoch; or onecycle, which rises and falls by itself."""
    warmup: int = 200
    """Steps of linear warm-up from 0.001 of ``lr``; onecycle has none but its own rise."""
    min_lr_ratio: float = 1e-3
    """Final value of the cosine schedule, as a fraction of ``lr``."""
    milestones: tuple[float, ...] = ()
    """Epochs (passes over ``data``, from the start of the run) after which the multistep schedule goes down."""
    milestone_factor: float = 0.1
    """Factor at each milestone."""
    epoch_factor: float = 0.98
    """Factor after each epoch of the exponential schedule."""
    pct_start: float = 0.4
    """Share of the run in which onecycle rises (this and the next three as in OpenPCDet)."""
    div_factor: float = 10.0
    """Onecycle begins with ``lr`` divided by this."""
    final_div_factor: float = 1e4
    """Onecycle ends with its first value divided by this."""
    moms: tuple[float, float] = (0.95, 0.85)
    """First of ``betas`` at the beginning and end of onecycle, and at its highest learning rate."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "milestone_factor", "epoch_factor"):
            _need(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, must be positive")
        for name in ("betas", "moms"):
            value = getattr(self, name)
            _need(all(0 <= v < 1 for v in value), f"{name} is {list(value)}, must be at least 0 and below 1")
        for name in ("milestone_factor", "epoch_factor"):
            _need(getattr(self, name) <= 1, f"{name} is {getattr(self, name)}, must be at most 1")
        for name in ("div_factor", "final_div_factor"):
            _need(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, must be at least 1")
        _need(0 < self.pct_start < 1, f"pct_start is {self.pct_start}, must be between 0 and 1")
        rising = all(a < b for a, b in zip((0.0, *self.milestones), self.milestones))
        _need(rising, f"milestones is {list(self.milestones)}, must be positive and rise")
        stepped = self.schedule != "multistep" or bool(self.milestones)
        _need(stepped, "schedule multistep needs epochs to go down after, for example milestones=[20, 23]")
        for name in ("groups", "decay_groups"):
            for module, factor in getattr(self, name).items():
                _need(factor >= 0, f"{name}.{module} is {factor}, must not be negative")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


# --- learning rate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Learning rate and first beta as functions of the samples trained on.

    Attributes:
        batch: samples of a step, over all ranks.
        total: samples of the whole run.
        epoch: samples of one pass over the data.
    """

    config: OptimConfig
    batch: int
    total: int
    epoch: int

    def lr(self, samples: int) -> float:
        """Learning rate, before the factors of groups, of the step that begins after so much."""
        c = self.config
        if c.schedule == "onecycle":
            low = c.lr / c.div_factor
            return self._cycle(samples, low, c.lr, low / c.final_div_factor)
        warm = c.warmup * self.batch
        if samples < warm:
            return c.lr * (WARM + (1 - WARM) * samples / warm)
        if c.schedule == "cosine":
            done = min(1.0, (samples - warm) / max(1, self.total - warm))
            return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
        if c.schedule == "multistep":
            return c.lr * c.milestone_factor ** sum(samples >= m * self.epoch for m in c.milestones)
        if c.schedule == "exponential":
            return c.lr * c.epoch_factor ** (samples // self.epoch)
        return c.lr

    def betas(self, samples: int) -> tuple[float, float]:
        """Of the same step."""
        first, second = self.config.betas
        if self.config.schedule == "onecycle":
            high, low = self.config.moms
            first = self._cycle(samples, high, low, high)
        return first, second

    def apply(self, optimizer: torch.optim.Optimizer, samples: int) -> float:
        """Sets an optimizer of ``parameter_groups`` for its next step, also one inside DeepSpeed; returns ``lr(samples)``."""
        rate, betas = self.lr(samples), self.betas(samples)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = rate * group["lr_factor"], betas
        return rate

    def _cycle(self, samples: int, first: float, middle: float, last: float) -> float:
        """From the first value to the middle one and on to the last, each on half a cosine."""
        top = self.config.pct_start * self.total
        if samples < top:
            return _half_cosine(first, middle, samples / top)
        return _half_cosine(middle, last, min(1.0, (samples - top) / (self.total - top)))


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


# --- parameters ------------------------------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """Over all parameters that learn, in the groups of ``parameter_groups``. Raises as it does."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters that learn, with their factor of the learning rate and their weight decay.

    Returns:
        Groups of a torch optimizer, with ``name`` and ``lr_factor``, in the order of their first parameters.

    Raises:
        ValueError: a setting names no module of the model or changes no parameter, or one tensor has two places in the model
            that belong to different groups.
    """
    rules = {"groups": config.groups, "decay_groups": config.decay_groups}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for setting, factors in rules.items():
        for prefix in factors:
            if not any(_inside(name, prefix) for name in names):
                raise ValueError(f"optim.{setting} names {prefix!r}, {_modules(model, prefix)}")
    groups: dict[tuple[str, str, bool], list[Tensor]] = {}
    seen: dict[int, tuple[str, tuple[str, str, bool]]] = {}  # by identity
    for name, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad:
            continue
        plain = not config.decay_vectors and p.ndim <= 1
        key = (_innermost(name, config.groups), _innermost(name, config.decay_groups), plain)
        if id(p) not in seen:
            seen[id(p)] = name, key
            groups.setdefault(key, []).append(p)
        elif seen[id(p)][1] != key:
            raise ValueError(
                f"optim: {name} and {seen[id(p)][0]} are one tensor, but belong to different groups; give both the same factors"
            )
    for position, (setting, factors) in enumerate(rules.items()):
        if empty := set(factors) - {key[position] for key in groups}:
            raise ValueError(
                f"optim.{setting}.{min(empty)} changes nothing: no parameter there learns, or modules inside it have factors "
                "of their own for all of them; remove it"
            )
    return [
        {
            "params": params,
            "name": _title(*key),
            "lr_factor": config.groups.get(key[0], 1.0),
            "weight_decay": 0.0 if key[2] else config.weight_decay * config.decay_groups.get(key[1], 1.0),
        }
        for key, params in groups.items()
    ]


def describe_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """One line of what each group is."""
    return "; ".join(
        f"{g['name']}: {sum(p.numel() for p in g['params']):,} parameters, lr x {g['lr_factor']:g}, "
        f"weight decay {g['weight_decay']:g}"
        for g in groups
    )


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _innermost(name: str, factors: Mapping[str, float]) -> str:
    """The longest of the prefixes that a parameter is in; "": none."""
    return max((prefix for prefix in factors if _inside(name, prefix)), key=len, default="")


def _title(rate: str, decay: str, plain: bool) -> str:
    """Name of a group, which its state in a checkpoint has too."""
    parts = [rate or "rest", *([f"decay of {decay}"] if decay else []), *(["without decay"] if plain else [])]
    return ", ".join(parts)


def _modules(model: nn.Module, prefix: str) -> str:
    """Why a prefix is none, and what there is instead."""
    above, inside = "", model
    for part in prefix.split(".")[:-1]:
        if part not in dict(inside.named_children()):
            break
        inside, above = getattr(inside, part), f"{above}{part}."
    there = dict.fromkeys(name.partition(".")[0] for name, _ in inside.named_parameters())
    every = [name for name, _ in model.named_modules()]
    near = get_close_matches(prefix, every, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    where = f"{above[:-1]} has" if above else "it has"
    return f"which is no module with parameters of this model; {where} {', '.join(there)}{hint}"
