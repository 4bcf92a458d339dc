"""The optimizer's state by parameter name, the same at every ZeRO stage and world size.

It leans on private attributes of DeepSpeed (pinned exactly in pyproject.toml): ``single_partition_of_fp32_groups`` and
``fp32_partitioned_groups_flat``. ``tests/pretrain/test_distributed.py`` proves each by the next losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occstream.pretrain.distributed import World
from occstream.pretrain.partition import is_partitioned, to_full, to_local

if TYPE_CHECKING:
    from occstream.pretrain.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
GROUP = ("name", "lr_factor", "weight_decay")  # what a group is; rates are the schedule's


def optimizer_state(engine: Engine, world: World) -> tuple[dict[str, Tensor], list[dict]]:
    """Adam's full moments by ``<moment>/<parameter>`` plus ``step`` (collective; {} on ranks that do not save), and what each
    group is (``GROUP``)."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    base = optimizer if stage == 0 else optimizer.optimizer
    if stage in (1, 2):
        # DeepSpeed links the states once, after the first group's first step: other groups would be missed.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    tensors: dict[str, Tensor] = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        for moment in MOMENTS:
            if stage == 0:
                value = base.state[p][moment]
            elif stage == 3:
                value = to_full(p, safe_get_local_optimizer_state(p, moment).reshape(-1), world)
            else:
                value = safe_get_full_optimizer_state(p, moment)
            if world.is_main and value is not None:
                tensors[f"{moment}/{name}"] = value.detach().reshape(_shape(p)).to("cpu", copy=True)
    steps = {float(s["step"]) for s in base.state.values() if "step" in s}
    if world.is_main:
        tensors["step"] = torch.tensor(max(steps, default=0.0))
    return tensors, [{k: g[k] for k in GROUP} for g in base.param_groups]


def load_optimizer_state(engine: Engine, tensors: dict[str, Tensor], groups: list[dict], world: World) -> None:
    """Puts back what ``optimizer_state`` gave, at any stage and world size. Parameters must be loaded already.

    Raises:
        ValueError: the parameters that learn, or their groups, are others than those that were saved.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    base = optimizer if stage == 0 else optimizer.optimizer
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    _check_fits([name for name, _ in named], base.param_groups, tensors, groups)
    # A fused optimizer counts on the device.
    count = tensors["step"].to(world.device if base.param_groups[0].get("fused") else "cpu")
    if stage == 0:
        for name, p in named:
            moments = {m: tensors[f"{m}/{name}"].to(p.device, copy=True) for m in MOMENTS}
            base.state[p] = {"step": count.clone(), **moments}
        return
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        base.state[flat] = {"step": count.clone(), **{m: torch.zeros_like(flat) for m in MOMENTS}}
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in named:
        for moment in MOMENTS:
            full = tensors[f"{moment}/{name}"]
            if stage == 3:
                safe_set_local_optimizer_state(p, to_local(p, full, world).to(world.device), moment)
            else:
                safe_set_full_optimizer_state(p, full.to(world.device), moment)


def _check_fits(names: list[str], groups: list[dict], tensors: Mapping[str, Tensor], saved: list[dict]) -> None:
    """Raises ValueError if a state belongs to other parameters or groups. Versions that knew no groups saved one without a
    name."""
    expected = {"step", *(f"{moment}/{name}" for moment in MOMENTS for name in names)}
    other = sorted({key.partition("/")[2] or key for key in expected ^ tensors.keys()})
    if other:
        raise ValueError(
            f"the checkpoint's optimizer state does not fit: {len(other)} parameters learn only then or only now"
            f" ({', '.join(other[:4])}); resume with the settings it was trained with, or start a new run from its weights"
        )
    then, now = ([tuple(g.get(key) for key in GROUP) for g in found] for found in (saved, groups))
    unnamed = len(then) == len(now) == 1 and then[0][0] is None
    if then != now and not unnamed:
        said = [", ".join(f"{n} (lr x {f}, weight decay {d})" for n, f, d in found) for found in (then, now)]
        raise ValueError(
            f"the checkpoint's groups of parameters were {said[0]}, and are {said[1]} now; resume with the optim.groups, "
            "decay_groups, decay_vectors and weight_decay that it was trained with"
        )


def _shape(param: Tensor) -> torch.Size:
    return param.ds_shape if is_partitioned(param) else param.shape
