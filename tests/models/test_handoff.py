"""Encoders in other frameworks' layouts. Their names and shapes are written here a second time, and their loading rules."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from occstream.models import handoff
from occstream.models.voxelbackbones import LidarEncoder

FEATURES = ("x", "y", "z", "intensity")
SHAPE = (16, 16, 40)


def norm(name, channels):
    parts = {f"{name}.{p}": (channels,) for p in ("weight", "bias", "running_mean", "running_var")}
    return {**parts, f"{name}.num_batches_tracked": ()}


def unit(name, outputs, inputs, kernel=(3, 3, 3)):
    return {f"{name}.0.weight": (outputs, *kernel, inputs), **norm(f"{name}.1", outputs)}


def block(name, channels):
    out = {}
    for i in "12":
        out |= {f"{name}.conv{i}.weight": (channels, 3, 3, 3, channels), f"{name}.conv{i}.bias": (channels,)}
        out |= norm(f"{name}.bn{i}", channels)
    return out


def map_backbone():
    out = {}
    for i, (inputs, channels) in enumerate([(256, 128), (128, 256)]):
        for j in (1, 4, 7, 10, 13, 16):
            out[f"backbone_2d.blocks.{i}.{j}.weight"] = (channels, inputs if j == 1 else channels, 3, 3)
            out |= norm(f"backbone_2d.blocks.{i}.{j + 1}", channels)
        out[f"backbone_2d.deblocks.{i}.0.weight"] = (channels, 256, i + 1, i + 1)
        out |= norm(f"backbone_2d.deblocks.{i}.1", 256)
    return out


def second_kitti():
    out = unit("conv_input", 16, 4) | unit("conv1.0", 16, 16)
    for i, inputs, channels in ((2, 16, 32), (3, 32, 64), (4, 64, 64)):
        out |= unit(f"conv{i}.0", channels, inputs) | unit(f"conv{i}.1", channels, channels)
        out |= unit(f"conv{i}.2", channels, channels)
    out |= unit("conv_out", 128, 64, (3, 1, 1))
    return {f"backbone_3d.{k}": v for k, v in out.items()} | map_backbone()


def centerpoint():
    """Waymo (elongation) and nuScenes (time lag): five features."""
    out = unit("conv_input", 16, 5) | block("conv1.0", 16) | block("conv1.1", 16)
    for i, channels in ((2, 32), (3, 64), (4, 128)):
        out |= (
            unit(f"conv{i}.0", channels, channels // 2) | block(f"conv{i}.1", channels) | block(f"conv{i}.2", channels)
        )
    out |= unit("conv_out", 128, 128, (3, 1, 1))
    return {f"backbone_3d.{k}": v for k, v in out.items()} | map_backbone()


HEADS = {"global_step": (1,), "dense_head.conv_cls.weight": (18, 512, 1, 1), "dense_head.conv_cls.bias": (18,)}
DETECTORS = {
    "plain": ({**second_kitti(), **HEADS}, FEATURES),
    "res": ({**centerpoint(), **HEADS}, (*FEATURES, "elongation")),
}


def trained(variant, inputs=4, seed=0):
    """Published encoder with random weights and statistics."""
    torch.manual_seed(seed)
    net = LidarEncoder(variant, inputs, SHAPE).eval()
    for name, value in net.state_dict().items():
        if name.endswith(("running_mean", ".bias")):
            torch.nn.init.normal_(value, std=0.1)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(value, 0.5, 2)
    return net


def sweep(channels=4, count=300):
    g = torch.Generator().manual_seed(1)
    keys = torch.randperm(40 * 16 * 16, generator=g)[:count].sort().values
    indices = torch.stack([0 * keys, keys // 256, keys // 16 % 16, keys % 16], 1)
    return torch.rand(count, channels, generator=g), indices, 1


def load_like_openpcdet(detector, file):
    """Its rule: a tensor is taken if its name is known and its shape fits, at once or after the permutation of spconv 1
    weights; all others are skipped."""
    taken = {}
    for name, value in file.items():
        if name in detector and value.shape != detector[name] and value.ndim == 5:
            value = value.permute(4, 0, 1, 2, 3)
        if name in detector and value.shape == detector[name]:
            taken[name] = value
    return taken


@pytest.mark.parametrize(("variant", "count", "entries"), [("plain", 156, 159), ("res", 226, 229)])
@pytest.mark.parametrize("old", [False, True])
def test_detectors_of_openpcdet_take_every_tensor(variant, count, entries, old):
    detector, wanted = DETECTORS[variant]
    assert len(detector) == entries
    state = trained(variant).state_dict()
    file = handoff.to_openpcdet(state, variant, FEATURES, wanted)
    if old:  # as spconv 1 keeps weights
        file = {k: v.permute(1, 2, 3, 4, 0) if v.ndim == 5 else v for k, v in file.items()}
    taken = load_like_openpcdet(detector, file)
    assert len(taken) == len(file) == count
    assert detector.keys() - taken.keys() == HEADS.keys()
    back = handoff.from_openpcdet({**file, "global_step": torch.zeros(1)}, variant, len(wanted))
    assert all(torch.equal(back[k], v) for k, v in handoff.to_openpcdet(state, variant, FEATURES, wanted).items())


def test_a_missing_feature_gets_zero_weights_and_changes_nothing():
    net = trained("plain")
    features, indices, batch = sweep()
    expected = net(features, indices, batch).bev
    file = handoff.to_openpcdet(net.state_dict(), "plain", FEATURES, (*FEATURES, "timestamp"))
    wide = LidarEncoder("plain", 5, SHAPE).eval()
    wide.load_state_dict(file)
    lag = torch.rand(len(features), 1)
    torch.testing.assert_close(wide(torch.cat([features, lag], 1), indices, batch).bev, expected, rtol=0, atol=1e-6)


def test_features_are_reordered_and_scaled():
    net = trained("plain")
    features, indices, batch = sweep()
    expected = net(features, indices, batch).bev
    order = ("x", "y", "intensity", "z")
    net.load_state_dict(handoff.to_openpcdet(net.state_dict(), "plain", FEATURES, order, scales={"intensity": 255.0}))
    theirs = features[:, [0, 1, 3, 2]] * torch.tensor([1, 1, 255, 1])
    torch.testing.assert_close(net(theirs, indices, batch).bev, expected, rtol=0, atol=1e-6)


def test_a_trained_feature_is_not_lost():
    state = trained("plain").state_dict()
    with pytest.raises(ValueError, match=r"was trained with intensity, which is not among x, y, z"):
        handoff.to_openpcdet(state, "plain", FEATURES, ("x", "y", "z"))
    state["backbone_3d.conv_input.0.weight"][..., 3] = 0
    file = handoff.to_openpcdet(state, "plain", FEATURES, ("x", "y", "z"))
    assert file["backbone_3d.conv_input.0.weight"].shape == (16, 3, 3, 3, 3)
    with pytest.raises(ValueError, match="named once each"):
        handoff.to_openpcdet(state, "plain", FEATURES, ("x", "y", "z", "x"))
    with pytest.raises(ValueError, match="scale of reflectivity"):
        handoff.to_openpcdet(state, "plain", FEATURES, FEATURES, scales={"reflectivity": 2.0})


def test_a_wrong_variant_width_or_grid_is_a_sentence():
    state = trained("plain").state_dict()
    with pytest.raises(ValueError, match=r"not the res encoder of 226 tensors: 112 are missing \(.*42 unknown"):
        handoff.to_openpcdet(state, "res", FEATURES, FEATURES)
    narrow = LidarEncoder("plain", 4, SHAPE, width=8).state_dict()
    with pytest.raises(ValueError, match="only the published widths"):
        handoff.to_openpcdet(narrow, "plain", FEATURES, FEATURES)
    state["backbone_2d.blocks.0.1.weight"] = torch.zeros(128, 384, 3, 3)
    with pytest.raises(ValueError, match=r"\(128, 384, 3, 3\), must be \(128, 256, 3, 3\)"):
        handoff.to_openpcdet(state, "plain", FEATURES, FEATURES)
    with pytest.raises(ValueError, match="5 input features"):
        handoff.to_openpcdet(trained("plain").state_dict(), "plain", (*FEATURES, "t"), (*FEATURES, "t"))
    with pytest.raises(ValueError, match="64 voxels in z ends in 3 layers"):
        handoff.describe("plain", FEATURES, (800, 800, 64), "openpcdet")
    with pytest.raises(ValueError, match="156 are missing"):
        handoff.from_openpcdet({}, "plain", 4)
    with pytest.raises(ValueError, match="missing"):
        handoff.from_mmdet3d({}, "res", 4)


def test_names_of_mmdet3d():
    state = trained("plain").state_dict()
    plain = handoff.to_mmdet3d(state, "plain", FEATURES, FEATURES, prefix="")
    assert len(plain) == 156
    ours = state["backbone_3d.conv3.1.0.weight"]
    assert torch.equal(plain["middle_encoder.encoder_layers.encoder_layer3.1.0.weight"], ours.permute(1, 2, 3, 4, 0))
    assert plain["middle_encoder.conv_input.0.weight"].shape == (3, 3, 3, 4, 16)
    assert {f"backbone.blocks.1.{i}.weight" for i in (0, 3, 6, 9, 12, 15)} <= plain.keys()
    assert torch.equal(plain["backbone.blocks.0.4.running_var"], state["backbone_2d.blocks.0.5.running_var"])
    assert torch.equal(plain["neck.deblocks.0.0.weight"], state["backbone_2d.deblocks.0.0.weight"])
    state = trained("res").state_dict()
    res = handoff.to_mmdet3d(state, "res", FEATURES, FEATURES)
    assert len(res) == 226 - 16
    same = {
        "pts_middle_encoder.encoder_layers.encoder_layer1.2.0.weight": "backbone_3d.conv2.0.0.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer3.2.0.weight": "backbone_3d.conv4.0.0.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer1.1.conv2.weight": "backbone_3d.conv1.1.conv2.weight",
        "pts_middle_encoder.encoder_layers.encoder_layer4.1.conv1.weight": "backbone_3d.conv4.2.conv1.weight",
    }
    for theirs, name in same.items():
        assert torch.equal(res[theirs], state[name].permute(1, 2, 3, 4, 0)), theirs
    assert res["pts_neck.deblocks.0.0.weight"].shape == (256, 128, 1, 1)
    assert all(v.is_contiguous() for v in res.values())


def test_goes_to_mmdet3d_and_back():
    state = trained("plain").state_dict()
    back = handoff.from_mmdet3d(handoff.to_mmdet3d(state, "plain", FEATURES, FEATURES), "plain", 4)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) for k, v in state.items())
    net = trained("res")
    expected = net(*sweep()).bev
    file = handoff.to_mmdet3d(net.state_dict(), "res", FEATURES, FEATURES)
    net.load_state_dict(handoff.from_mmdet3d(file, "res", 4))  # biases are in the norms now
    assert not net.backbone_3d.conv1[0].conv1.bias.any()
    torch.testing.assert_close(net(*sweep()).bev, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    again = handoff.to_mmdet3d(net.state_dict(), "res", FEATURES, FEATURES)
    assert all(torch.equal(again[k], v) for k, v in file.items())


def test_a_file_tells_what_it_is(tmp_path):
    wanted = (*FEATURES, "timestamp")
    file = handoff.to_openpcdet(trained("plain").state_dict(), "plain", FEATURES, wanted)
    path = tmp_path / "encoder.safetensors"
    handoff.write(path, file, handoff.describe("plain", wanted, (1408, 1600, 40), "openpcdet"))
    found = load_file(path)
    assert found.keys() == file.keys()
    assert all(torch.equal(found[k], v) for k, v in file.items())
    about = json.loads((tmp_path / "encoder.json").read_text())
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (about["variant"], about["in_features"], about["layers"], about["tensors"]) == (
        "plain",
        list(wanted),
        2,
        156,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]
