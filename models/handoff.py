"""Pre-trained LiDAR encoders in the layouts of OpenPCDet and mmdet3d, and back.

Both frameworks skip tensors whose names or shapes do not fit, so a wrong file trains a detector from scratch and says nothing.
Hence all is checked here: a state dict becomes a file that holds every tensor of the consumer's backbones, or an error.

OpenPCDet names are ours; its sparse weights are (out, kz, ky, kx, in), as ours. mmdet3d groups the same operators otherwise,
has no convolution biases, and its weights must be (kz, ky, kx, in, out): its loader permutes those of files without
metadata, such as these. Numbers are kept: the function of the encoder is the same to the last digits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from occstream.models.sparse import Triple
from occstream.models.voxelbackbones import LidarEncoder, Variant, encoded_shape

Framework = Literal["openpcdet", "mmdet3d"]
State = dict[str, Tensor]
_FIRST = "backbone_3d.conv_input.0.weight"
_SHAPE = (16, 16, 40)  # any grid that detectors take has the same parameters


def expected_shapes(variant: Variant, in_features: int) -> dict[str, torch.Size]:
    """Names and shapes of the published encoder: 156 tensors (plain) or 226 (res)."""
    with torch.device("meta"):
        encoder = LidarEncoder(variant, in_features, _SHAPE)
    return {name: value.shape for name, value in encoder.state_dict().items()}


def check_state(state: Mapping[str, Tensor], variant: Variant, in_features: int) -> None:
    """Whether a state dict is the published encoder of this variant, whole.

    Raises:
        ValueError: it lacks tensors, has others, or a shape differs.
    """
    wanted = expected_shapes(variant, in_features)
    missing, other = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or other:
        raise ValueError(
            f"not the {variant} encoder of {len(wanted)} tensors: {len(missing)} are missing{_first(missing)}, "
            f"{len(other)} unknown{_first(other)}; choose the variant that was trained"
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)}, must be {tuple(shape)}: detectors take only the published widths, "
                f"a grid of 40 to 55 voxels in z and {in_features} input features"
            )


def _first(names: Sequence[str]) -> str:
    return f" ({names[0]}, …)" if names else ""


def match_features(
    weight: Tensor, trained: Sequence[str], wanted: Sequence[str], scales: Mapping[str, float] | None = None
) -> Tensor:
    """First convolution for another list of input features; the function stays the same.

    Args:
        weight: (out, kz, ky, kx, len(trained)).
        trained, wanted: feature names. A wanted one that was not trained gets zero weights; a trained one that is not wanted
            may be dropped only if its weights are zero.
        scales: how many times larger the consumer's values are than those of training (intensity: 255 for 0..255).

    Raises:
        ValueError: a feature would be lost, or is named twice.
    """
    if len(set(wanted)) < len(wanted) or weight.shape[-1] != len(trained):
        raise ValueError(f"features {', '.join(wanted)} must be named once each; trained are {', '.join(trained)}")
    lost = [name for i, name in enumerate(trained) if name not in wanted and weight[..., i].any()]
    if lost:
        raise ValueError(
            f"the encoder was trained with {', '.join(lost)}, which is not among {', '.join(wanted)}: add it, or train without"
        )
    unknown = sorted((scales or {}).keys() - set(wanted))
    if unknown:
        raise ValueError(f"scale of {', '.join(unknown)}, which is not among {', '.join(wanted)}")
    columns = [
        weight[..., trained.index(name)] if name in trained else torch.zeros_like(weight[..., 0]) for name in wanted
    ]
    return torch.stack([column / (scales or {}).get(name, 1.0) for name, column in zip(wanted, columns)], -1)


def to_openpcdet(
    state: Mapping[str, Tensor],
    variant: Variant,
    trained: Sequence[str],
    wanted: Sequence[str],
    *,
    scales: Mapping[str, float] | None = None,
) -> State:
    """Encoder's state dict (keys ``backbone_3d.…``, ``backbone_2d.…``) -> the consumer's; see ``match_features``.

    Raises:
        ValueError: not a whole published encoder of this variant, or a feature would be lost.
    """
    check_state(state, variant, len(trained))
    out = {name: value.detach().cpu() for name, value in state.items()}
    out[_FIRST] = match_features(out[_FIRST], list(trained), list(wanted), scales)
    return {name: value.contiguous() for name, value in out.items()}


def from_openpcdet(state: Mapping[str, Tensor], variant: Variant, in_features: int) -> State:
    """A detector's state dict -> the encoder's. Weights may be (out, kz, ky, kx, in) or, from spconv 1, (kz, ky, kx, in, out);
    tensors of heads are left aside, ``global_step`` too.

    Raises:
        ValueError: it does not hold the whole encoder of this variant.
    """
    wanted = expected_shapes(variant, in_features)
    found = {k: v for k, v in state.items() if k.startswith(("backbone_3d.", "backbone_2d."))}
    for name, value in found.items():
        if value.ndim == 5 and name in wanted and value.shape != wanted[name]:
            found[name] = value.permute(4, 0, 1, 2, 3)
    check_state(found, variant, in_features)
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in found.items()}


# --- mmdet3d -----------------------------------------------------------------------------------------------------------


def _sparse_names(variant: Variant) -> dict[str, str]:
    """Our module names below ``backbone_3d`` -> those below the middle encoder."""
    names = {"conv_input": "conv_input", "conv_out": "conv_out"}
    if variant == "plain":
        names["conv1.0"] = "encoder_layers.encoder_layer1.0"
        names |= {f"conv{i}.{j}": f"encoder_layers.encoder_layer{i}.{j}" for i in (2, 3, 4) for j in range(3)}
        return names
    # Its stages end with the strided layer that begins ours.
    names |= {f"conv{i + 1}.0": f"encoder_layers.encoder_layer{i}.2" for i in (1, 2, 3)}
    names |= {f"conv1.{j}": f"encoder_layers.encoder_layer1.{j}" for j in (0, 1)}
    names |= {f"conv{i}.{j + 1}": f"encoder_layers.encoder_layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)}
    return names


def _mmdet3d_name(name: str, variant: Variant, prefix: str) -> str:
    part, rest = name.split(".", 1)
    if part == "backbone_3d":
        module = next(m for m in _sparse_names(variant) if rest.startswith(f"{m}."))
        return f"{prefix}middle_encoder.{_sparse_names(variant)[module]}{rest[len(module) :]}"
    kind, level, index, value = rest.split(".", 3)
    if kind == "blocks":  # it pads in the convolution
        return f"{prefix}backbone.blocks.{level}.{int(index) - 1}.{value}"
    return f"{prefix}neck.deblocks.{level}.{index}.{value}"


def _biases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Convolution biases by name -> the running mean of the norm that follows."""
    names = [k for k in state if k.startswith("backbone_3d.") and k.endswith((".conv1.bias", ".conv2.bias"))]
    return {name: f"{name[: -len('conv1.bias')]}bn{name[-len('1.bias')]}.running_mean" for name in names}


def to_mmdet3d(
    state: Mapping[str, Tensor],
    variant: Variant,
    trained: Sequence[str],
    wanted: Sequence[str],
    *,
    scales: Mapping[str, float] | None = None,
    prefix: str = "pts_",
    conv_for_no_stride: bool | None = None,
) -> State:
    """As ``to_openpcdet``, for mmdet3d: 156 tensors (plain) or 210 (res: it has no convolution biases).

    Args:
        prefix: ``pts_`` of the multi-modal detectors (CenterPoint), or empty (VoxelNet).
        conv_for_no_stride: the setting ``use_conv_for_no_stride`` of its neck; None: as its CenterPoint has it for res, and
            its SECOND for plain.
    """
    ours = to_openpcdet(state, variant, trained, wanted, scales=scales)
    for bias, mean in _biases(ours).items():
        # y = conv + bias, normalized by mean + bias, is conv normalized by mean.
        ours[mean] = ours[mean] - ours.pop(bias)
    as_conv = variant == "res" if conv_for_no_stride is None else conv_for_no_stride
    out = {}
    for name, value in ours.items():
        if name.startswith("backbone_3d.") and value.ndim == 5:
            value = value.permute(1, 2, 3, 4, 0)
        elif name == "backbone_2d.deblocks.0.0.weight" and as_conv:
            value = value.transpose(0, 1)
        out[_mmdet3d_name(name, variant, prefix)] = value.contiguous()
    return out


def from_mmdet3d(
    state: Mapping[str, Tensor],
    variant: Variant,
    in_features: int,
    *,
    prefix: str = "pts_",
    conv_for_no_stride: bool | None = None,
) -> State:
    """The inverse of ``to_mmdet3d``: a detector's state dict -> the encoder's, biases zero; heads are left aside.

    Raises:
        ValueError: it does not hold the whole encoder of this variant.
    """
    as_conv = variant == "res" if conv_for_no_stride is None else conv_for_no_stride
    wanted = expected_shapes(variant, in_features)
    biases, found = _biases(dict.fromkeys(wanted, torch.empty(0))), {}
    for name, shape in wanted.items():
        value = torch.zeros(shape) if name in biases else state.get(_mmdet3d_name(name, variant, prefix))
        if value is None:
            continue
        if name.startswith("backbone_3d.") and value.ndim == 5:
            value = value.permute(4, 0, 1, 2, 3)
        elif name == "backbone_2d.deblocks.0.0.weight" and as_conv:
            value = value.transpose(0, 1)
        found[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    check_state(found, variant, in_features)
    return found


# --- files -------------------------------------------------------------------------------------------------------------


def describe(variant: Variant, wanted: Sequence[str], shape: Triple, framework: Framework) -> dict:
    """What the consumer must set alike; written beside the file.

    Raises:
        ValueError: the grid of points (X, Y, Z) has other layers than detectors read.
    """
    layers = encoded_shape(shape)[0]
    if layers != 2:
        raise ValueError(f"a grid of {shape[2]} voxels in z ends in {layers} layers, but detectors read 2")
    return {
        "framework": framework,
        "variant": variant,
        "in_features": list(wanted),
        "grid": list(shape),
        "layers": layers,
    }


def write(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: dict) -> None:
    """Writes tensors as safetensors, and ``<name>.json`` with ``about`` and the file's sha256 beside it. Neither is ever
    seen half-written."""
    path = Path(path)
    data = save(dict(tensors), metadata={"format": "pt"})
    text = json.dumps({**about, "tensors": len(tensors), "sha256": hashlib.sha256(data).hexdigest()}, indent=1) + "\n"
    for target, content in ((path, data), (path.with_suffix(".json"), text.encode())):
        part = target.with_name(target.name + ".part")
        part.write_bytes(content)
        part.replace(target)
