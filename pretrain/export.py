"""Weights of a run as files for others: with a model card, or in the layout of a detection framework."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from occstream.models import handoff
from occstream.models.spot import SpotConfig
from occstream.pretrain.checkpoint import Checkpoint, read_scores, sensors, sha256
from occstream.pretrain.config import parse_config
from occstream.pretrain.renamed import saved_settings
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding import storage

ABOUT = "occstream.json"
"""Beside files for detection frameworks: what each holds, by its name."""
# Names of point features that are short for others.
_SHORT = {"t": "time", "i": "intensity"}


def export(path: str | Path, out: str | Path) -> Path:
    """Plain weights of a checkpoint (averaged where there are any) with a model card.

    Args:
        path: a run's folder or one of its checkpoints.
        out: a ``.safetensors`` file; the card is ``<name>.json``.

    Raises:
        ValueError: nothing complete there, or ``out`` is not a .safetensors file.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: give a name that ends in .safetensors")
    saved = Checkpoint(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = {k: v.contiguous() for k, v in saved.weights().items()}
    # Beside its name and renamed: a kill leaves no half of it.
    partial = out.with_name(f".{out.name}.partial")
    save_file(
        weights, partial, metadata={"occstream": json.dumps({"digest": saved.digest, "step": saved.state["step"]})}
    )
    partial.chmod(storage.file_mode())
    partial.replace(out)
    scores = read_scores(saved.path.parent).get(str(saved.state["step"]), {})
    config = saved_settings({"config": {}, **saved.state})
    card = {
        "model": config.get("model_name"),
        "stage": config.get("stage"),
        "grid": config.get("grid"),
        "taxonomy": config.get("taxonomy"),
        "sensors": sensors(saved.state),
        "step": saved.state["step"],
        "samples": saved.state.get("samples"),
        "data_fingerprints": saved.state.get("fingerprints"),
        "mlflow_run_id": saved.state.get("mlflow_run_id"),
        "averaged": bool(saved.tensors("ema")),
        "parameters": sum(v.numel() for v in weights.values()),
        "sha256": sha256(out),
        "scores": scores,
        "config": config,
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=1))
    return out


def hand_off(
    path: str | Path,
    out: str | Path,
    framework: handoff.Framework,
    *,
    variant: str = "",
    in_features: Sequence[str] = (),
    intensity_scale: float = 1.0,
) -> tuple[Path, int]:
    """The LiDAR encoder of a run as a file that a detection framework loads whole (``models.handoff``).

    Args:
        path: a run's folder or one of its checkpoints.
        out: a ``.pth`` file; what it is, is added to ``occstream.json`` beside it.
        framework: whose layout.
        variant: plain or res; it must be that of the run. Empty: that of the run.
        in_features: of the consumer's points, ``i`` and ``t`` for short. Empty: those of the run.
        intensity_scale: how many times larger the consumer's intensities are than 0 to 1.

    Returns:
        The file, and how many tensors it holds.

    Raises:
        ValueError: the run has no such encoder, its widths or grid are none that detectors have, or a feature would be lost.
            No file is written then.
    """
    out = Path(out)
    if out.suffix != ".pth":
        raise ValueError(f"{out}: give a name that ends in .pth")
    saved = Checkpoint(path)
    config = parse_config(saved_settings({"config": {}, **saved.state}))
    model = getattr(config, "model", None)
    if not isinstance(model, SpotConfig):
        raise ValueError(f"{saved.path}: is of task {config.task}, which has no LiDAR encoder to hand on")
    if variant and variant != model.variant:
        raise ValueError(
            f"{saved.path}: its encoder is {model.variant!r}, not {variant!r}; leave --variant out, or train another"
        )
    published = SpotConfig()
    sizes = ("width", "bev_channels", "bev_layers", "bev_up")
    if wrong := [name for name in sizes if getattr(model, name) != getattr(published, name)]:
        values = [", ".join(f"{name} {getattr(of, name)}" for name in wrong) for of in (model, published)]
        raise ValueError(
            f"{saved.path}: no detector takes its encoder of {values[0]}; the published one has {values[1]}, as recipe spot has"
        )
    wanted = [_SHORT.get(name, name) for name in in_features or model.in_features]
    about = handoff.describe(model.variant, wanted, model.points_grid().shape, framework)
    encoder = {k.removeprefix("encoder."): v for k, v in saved.weights().items() if k.startswith("encoder.")}
    scales = {"intensity": intensity_scale} if intensity_scale != 1 else {}
    convert = handoff.to_openpcdet if framework == "openpcdet" else handoff.to_mmdet3d
    tensors = convert(encoder, model.variant, model.in_features, wanted, scales=scales)
    state, rest = (
        ("model_state", {"version": "occstream"}) if framework == "openpcdet" else ("state_dict", {"meta": {}})
    )
    _write(out, {state: tensors, **rest})
    about |= {
        "point_range": list(model.point_range),
        "voxel": list(model.voxel),
        "intensity_scale": intensity_scale,
        "taxonomy": config.taxonomy,
        "trained": task_of(config).title,
        "step": saved.state["step"],
        "digest": saved.digest,
        "data_fingerprints": saved.state.get("fingerprints"),
        "tensors": len(tensors),
        "sha256": sha256(out),
    }
    _add_to(out.with_name(ABOUT), out.name, about)
    return out, len(tensors)


def _write(out: Path, content: dict[str, object]) -> None:
    """Beside its name and renamed: a kill leaves no half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    torch.save(content, partial)
    partial.chmod(storage.file_mode())
    partial.replace(out)


def _add_to(path: Path, name: str, about: dict) -> None:
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise ValueError(f"{path}: is not JSON; move it away, so that a new one can be written") from None
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps({**known, name: about}, indent=1) + "\n")
    Path(file.name).chmod(storage.file_mode())
    Path(file.name).replace(path)
