"""Image encoders: transformers' ResNets and EfficientNet-Lite0 by name, with our FPN (B2S, App. A.2)."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from occstream.models import efficientnet
from occstream.models.layers import checkpointed, use_sync_batch_norm

_DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}
STRIDES = (4, 8, 16, 32)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class ImageEncoder(nn.Module):
    """ResNet + FPN: all levels from ``stride`` to 32 are merged top-down; the first of them are emitted, one by default.

    Args:
        name: resnet18, resnet34, resnet50, resnet101 or efficientnet_lite0.
        width: channels of a ResNet's stem; 64 is the published network, less is a narrow one for the CPU. EfficientNet has one
            width, and 64 stands for it.
        channels: of the emitted levels.
        stride: of the first emitted level: 8, 16 (the paper's) or 32.
        emitted: levels, each half as fine as the one before; beyond stride 32 by strided convolutions (as FPN).
        weights: "" for random, a path (``.safetensors``, or ``.pt`` with plain tensors), or a hub id such as
            ``microsoft/resnet-50``. All backbone tensors must be there, by the names of transformers or of torchvision,
            the latter below any prefix (a detector's). Of EfficientNet: ``imagenet``, from the extra ``efficientnet``, or a
            file with the names of that.
        checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: unknown name or stride, no level or more than up to stride 64, or weights that lack a tensor.
    """

    def __init__(
        self,
        name: str,
        width: int = 64,
        channels: int = 256,
        stride: int = 16,
        *,
        emitted: int = 1,
        weights: str = "",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if name not in (*_DEPTHS, efficientnet.NAME):
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(_DEPTHS)}, {efficientnet.NAME}")
        if stride not in STRIDES[1:]:
            raise ValueError(f"feature stride is {stride}, must be 8, 16 or 32")
        if emitted < 1 or stride * 2 ** (emitted - 1) > 64:
            raise ValueError(
                f"{emitted} levels of image features from stride {stride} on; need 1 or more, up to stride 64"
            )
        if name == efficientnet.NAME:
            if width != 64:
                raise ValueError(f"backbone_width is {width}, but {name} has one width: leave it at 64")
            self.body: nn.Module = efficientnet.EfficientNetLite0(stride)
            widths = [channels for at, channels in efficientnet.WIDTHS.items() if at >= stride]
            load = efficientnet.load_published
        else:
            self.body, widths = _resnet(name, width, stride)
            load = _load
        if weights:
            load(self.body, weights)
        self.checkpointing = checkpointing
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in widths)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        inside = min(emitted, len(self.lateral)) - 1
        self.coarser = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(inside))
        beyond = emitted - 1 - inside
        self.beyond = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, padding=1) for _ in range(beyond))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalized -> (N, channels, ceil(H / stride), ceil(W / stride)), of the first level."""
        return self.pyramid(images)[0]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalized -> every emitted level, the finest first, like ``forward``."""
        levels = checkpointed(self.levels, images, when=self.checkpointing)
        merged: list[Tensor] = []  # the coarsest first
        for conv, level in zip(reversed(self.lateral), reversed(levels)):
            own = conv(level)
            merged.append(own + F.interpolate(merged[-1], own.shape[-2:], mode="nearest") if merged else own)
        found = [conv(level) for conv, level in zip((self.smooth, *self.coarser), reversed(merged))]
        for conv in self.beyond:
            found.append(conv(found[-1]))
        return found

    def levels(self, images: Tensor) -> tuple[Tensor, ...]:
        """The backbone's feature maps, from the emitted stride to 32."""
        found = self.body(images)
        return found if isinstance(found, tuple) else found.feature_maps


class CameraEmbedding(nn.Module):
    """Tells features which camera they are of; a level needs no telling, as there is one."""

    def __init__(self, cameras: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(cameras, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, V, C, h, w). Raises ValueError for more cameras than there are embeddings."""
        views = features.shape[1]
        if views > len(self.table):
            raise ValueError(f"{views} cameras, but the model has embeddings for {len(self.table)}: set model.cameras")
        return features + self.table[:views, :, None, None]


def _resnet(name: str, width: int, stride: int) -> tuple[nn.Module, list[int]]:
    """The network, and the channels of its maps from ``stride`` to 32."""
    from transformers import ResNetBackbone, ResNetConfig  # takes seconds, and settings alone do not need it

    kind, depths = _DEPTHS[name]
    expand = 4 if kind == "bottleneck" else 1
    first = STRIDES.index(stride) + 1
    widths = [width * expand * 2**i for i in range(4)]
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=widths,
        depths=list(depths),
        layer_type=kind,
        out_features=[f"stage{i}" for i in range(first, 5)],  # pyright: ignore[reportCallIssue] (a property there)
    )
    return use_sync_batch_norm(ResNetBackbone(config)), widths[first - 1 :]


def _load(body: nn.Module, weights: str) -> None:
    path = Path(weights)
    if not path.exists() and not path.suffix and weights.count("/") == 1:
        path = _from_hub(weights)
    if not path.is_file():
        raise ValueError(f"backbone weights {weights!r}: no such file, and not a Hub ID such as microsoft/resnet-50")
    loaded: dict[str, Any] = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    own = body.state_dict()
    values = _by_our_names(loaded.get("state_dict", loaded), own)
    missing = [k for k in own if k not in values or values[k].shape != own[k].shape]
    if missing:
        raise ValueError(
            f"backbone weights {weights!r}: {len(missing)} of {len(own)} tensors are missing or have another shape "
            f"({', '.join(missing[:4])}…); they belong to another backbone or width"
        )
    body.load_state_dict({k: values[k] for k in own})


def _from_hub(name: str) -> Path:
    """A model's weights in the hub's cache. Of all processes of a machine one asks the hub, and only for what is not there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".occstream.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Path(huggingface_hub.hf_hub_download(name, "model.safetensors", local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(huggingface_hub.hf_hub_download(name, "model.safetensors"))


def _by_our_names(values: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a classifier or a detector under the names that the backbone has.

    Known are transformers' names, alone or below ``resnet.``, and torchvision's, alone or below any prefix (mmdetection and
    its kin have ``img_backbone.`` or ``backbone.``).
    """
    values = {k.removeprefix("resnet."): v for k, v in values.items()}
    mark = "layer1.0.conv1.weight"
    prefix = next((k.removesuffix(mark) for k in values if k.endswith(mark)), None)
    if prefix is None:
        return values
    return {ours: values[theirs] for ours in own if (theirs := prefix + _torchvision_name(ours)) in values}


def _torchvision_name(key: str) -> str:
    """``encoder.stages.1.layers.0.layer.2.convolution.weight`` -> ``layer2.0.conv3.weight``."""
    key = key.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    found = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", key)
    if not found:
        return key
    stage, layer, rest = int(found[1]) + 1, found[2], found[3]
    rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    inner = re.fullmatch(r"layer\.(\d)\.(convolution|normalization)\.(.*)", rest)
    if inner:
        rest = f"{'conv' if inner[2] == 'convolution' else 'bn'}{int(inner[1]) + 1}.{inner[3]}"
    return f"layer{stage}.{layer}.{rest}"
