"""B2S as a whole, and every registered model by being registered."""

import dataclasses
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from occstream.models import build_model, model_entry
from occstream.models.b2s import B2SConfig, Strategy
from occstream.models.backbones import ImageEncoder, _torchvision_name
from occstream.models.batch import concat, pool_binary
from occstream.models.registry import MODELS
from occstream.pretrain.checkpoint import load_declared
from occstream.pretrain.config import load_config
from occstream.pretrain.losses import LossConfig
from occstream.sharding.grid import VoxelGrid
from tests.models.helpers import SMALL, make_batch, occupancy_loss
from tests.pretrain.small import RECIPE

TINY = dataclasses.replace(load_config(RECIPE).model, dropout=0.0, floor=16)
STRATEGIES = get_args(Strategy)


def build(semantic=True, name="b2s_ls", grid=SMALL, **settings):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **({"dense_layers": 1 if name == "b2s_bevformer" else 0} | settings))
    return build_model(name, config, grid=grid, num_classes=17, image_size=(32, 64), semantic=semantic)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_reach_exactly_the_parameters_they_should(name, strategy):
    """With and without semantic frames in the batch: ZeRO must see the same parameters on every rank, and what binary
    frames alone teach ends at the binary head."""
    model = build(name=name, strategy=strategy, dense_layers=1)
    head = ("semantic.", "full.heads.semantic.")
    for semantic in (2, 0) if model.predicts_binary else (3,):
        batch = make_batch(3, semantic)
        outputs = model(batch)
        coarse = (8, 8, 4) if strategy == "intermediate" else SMALL.shape
        assert (outputs.binary_logits.shape == (3, *coarse)) if model.predicts_binary else outputs.binary_logits is None
        assert outputs.semantic_logits.shape == (max(1, semantic), 17, *SMALL.shape)
        loss, parts = occupancy_loss(outputs, batch, LossConfig())
        model.zero_grad()
        loss.backward()
        still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        if semantic:
            # Positions act through offsets and attention weights alone, whose own weights begin at zero.
            assert all(".tokens.embedding." in n for n in still)
        else:
            assert {n for n in still if n.startswith(head)} == {
                n for n, _ in model.named_parameters() if n.startswith(head)
            }
            assert not {n for n in still if n.startswith(("images.", "decoder.", "binary_head.", "full.heads.binary"))}
        assert (float(parts["semantic"]) > 0) == (semantic > 0)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "offboard"])
def test_pretraining_ends_at_the_binary_head_and_what_is_loaded_and_dropped_is_declared(name, strategy):
    first, second = build(semantic=False, name=name, strategy=strategy), build(name=name, strategy=strategy)
    assert first(make_batch(2, 0)).semantic_logits is None
    left = first.state_dict().keys() - set(second.transfer_keys())
    assert set(second.transfer_keys()) <= first.state_dict().keys()
    assert all(k.startswith(second.dropped_keys()) for k in left)
    assert bool(left) == (strategy == "replacing")
    with torch.no_grad():
        for p in first.parameters():
            p.add_(1)
    fresh = load_declared(
        second, first.state_dict(), second.transfer_keys(), origin="test", dropped=second.dropped_keys()
    )
    assert fresh
    assert all(k.startswith(("semantic.", "full.heads.semantic.")) for k in fresh)
    for key in second.transfer_keys():
        torch.testing.assert_close(second.state_dict()[key], first.state_dict()[key])


def test_checkpoints_of_another_strategy_or_family_are_refused_by_name():
    binary = {s: build(semantic=False, strategy=s).state_dict() for s in ("intermediate", "multi")}
    for theirs, ours in (("intermediate", "multi"), ("multi", "intermediate"), ("intermediate", "replacing")):
        model = build(strategy=ours)
        with pytest.raises(ValueError, match=r"missing \((full|binary_head)"):
            load_declared(model, binary[theirs], model.transfer_keys(), origin="theirs", dropped=model.dropped_keys())
    model = build()
    more = binary["intermediate"] | {"other.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"neither uses nor drops on purpose \(other\.weight\)"):
        load_declared(model, more, model.transfer_keys(), origin="theirs", dropped=model.dropped_keys())
    with pytest.raises(ValueError, match="nothing to pre-train"):
        build(semantic=False, strategy="offboard")


def test_offboard_refines_what_the_labels_say_and_nothing_else():
    model, batch = build(strategy="offboard", floor=1).eval(), make_batch(2, 2)
    truth, _ = pool_binary(batch.occupancy.binary, batch.occupancy.binary_valid, (8, 8, 4))
    assert model(batch).selected.tolist() == truth.flatten(1).sum(1).tolist()
    for occupied in (False, True):  # nothing, and everything
        batch.occupancy.binary[...] = occupied
        batch.occupancy.binary_valid[...] = True
        outputs = model(batch)
        assert outputs.selected.tolist() == ([8 * 8 * 4] * 2 if occupied else [0, 0])
        assert torch.isfinite(outputs.semantic_logits).all()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_rigs_and_grids(name):
    """One camera, eight, cameras that see nothing, a grid that is longer than wide."""
    long = VoxelGrid("long", (-8, -12, -1), (8, 12, 2), (1, 1, 1))
    for views in (1, 8):
        batch = make_batch(2, 1, views=views, grid=long)
        outputs = build(name=name, grid=long)(batch)
        assert outputs.semantic_logits.shape[2:] == (16, 24, 3)
    batch.cameras.camera_to_ego[..., :3, 3] += 1000  # far outside
    model = build(name=name, grid=long)
    loss, _ = occupancy_loss(model(batch), batch, LossConfig())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if name == "b2s_bevformer":
        with pytest.raises(ValueError, match=r"set model\.cameras"):
            build(name=name, cameras=2)(make_batch(1, 1))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_activation_checkpointing_and_heads_in_parts_change_nothing(name):
    """Neither losses, nor gradients, nor the statistics of batch norms, which a recomputed forward must not count."""
    batch = make_batch(2, 2)
    found = []
    for settings in ({}, {"checkpointing": True, "head_rows": 3}):
        model = build(name=name, **settings)
        loss, _ = occupancy_loss(model(batch), batch, LossConfig())
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_depth_loss_pulls_the_lift_towards_the_points():
    model, batch = build(semantic=False), make_batch(2, 0)
    shape = model(batch).depth.shape
    batch.cameras.depth = torch.where(torch.rand(2, 3, *shape[-2:]) < 0.5, 7.3, 0.0)
    wanted = int((7.3 - 1) / 2)
    config = LossConfig(binary_weight=0, depth_weight=3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = model(batch).depth[:, :, wanted].mean().item()
    for _ in range(8):
        loss, parts = occupancy_loss(model(batch), batch, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(parts["depth"]) * 3 == pytest.approx(loss.item(), rel=1e-5)
    assert model(batch).depth[:, :, wanted].mean().item() > 2 * before
    other = build(semantic=False, name="b2s_bevformer")(batch)
    with pytest.raises(ValueError, match="predicts no depth"):
        occupancy_loss(other, batch, config)


def test_replayed_frames_change_nothing_of_the_semantic_frames_but_batch_statistics():
    model = build().eval()
    s, b = make_batch(2, 2, seed=1), make_batch(1, 0, seed=2)
    joined = concat(s, b)
    with torch.no_grad():
        alone, together = model(s), model(joined)
    torch.testing.assert_close(alone.semantic_logits, together.semantic_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.binary_logits, together.binary_logits[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"strategy": "offboard"}, {"selection": "gt"}])
def test_voxels_that_labels_choose_are_neither_dropped_nor_added(settings):
    """Also in frames with none at all, and beyond floor and cap of predicted ones."""
    model, batch = build(**settings, floor=40, cap=256).eval(), make_batch(3, 3)
    batch.occupancy.binary[1] = False
    batch.occupancy.binary[2] = True
    outputs = model(batch)
    occupied, _ = pool_binary(batch.occupancy.binary, batch.occupancy.binary_valid, (8, 8, 4))
    assert outputs.selected.tolist() == occupied.flatten(1).sum(1).tolist()
    assert outputs.selected[1] == 0
    chosen = model.semantic.select(*model.semantic.scores(None, batch))
    assert all(occupied[i].flatten()[c].all() for i, c in enumerate(chosen))
    batch.occupancy.binary[...] = False
    model.train()
    loss, _ = occupancy_loss(model(batch), batch, LossConfig())
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None], (
        "no parameter is left out, even with no token"
    )
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("settings", [{"strategy": "offboard"}, {"selection": "union"}])
def test_more_given_voxels_than_the_cap_are_an_error_that_names_it(settings):
    model, batch = build(**settings, floor=1, cap=200).train(), make_batch(1, 1)
    batch.occupancy.binary[...] = batch.occupancy.binary_valid[...] = True
    with pytest.raises(ValueError, match=r"call 256 voxels of B' occupied, model\.cap allows 200: set model\.cap=256"):
        model(batch)


def test_selection_takes_the_most_probable_within_floor_and_cap():
    part = build(floor=3, cap=5).semantic
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.2, 0.95, 0.6, 0.65], [0.1, 0.2, 0.3, 0.05, 0.04, 0.0, 0.0, 0.0]])
    first, second = part.select(scores)
    assert first.tolist() == [5, 0, 2, 3, 7]
    assert second.tolist() == [2, 1, 0], "the floor keeps some even if nothing is predicted"


def test_selection_by_labels_and_by_both():
    batch = make_batch(2, 2)
    logits = torch.full((2, 8, 8, 4), -5.0)
    logits[0, 0, 0, 0] = 5
    truth, _ = pool_binary(batch.occupancy.binary, batch.occupancy.binary_valid, (8, 8, 4))
    gt = build(selection="gt").semantic.scores(logits, batch)[0] > 0.5
    torch.testing.assert_close(gt, truth.flatten(1))
    union = build(selection="union").semantic
    both = union.scores(logits, batch)[0] > 0.5
    assert bool(both[0, 0])
    assert (both[:, 1:] == truth.flatten(1)[:, 1:]).all()
    assert (union.eval().scores(logits, batch)[0] > 0.5).sum() == 1, "no labels outside training"


@pytest.mark.parametrize(
    "settings", [{"query": "dense"}, {"binary_factor": 2, "compact_factor": 2}, {"sparse_layers": 2}]
)
def test_switches_run(settings):
    batch = make_batch(2, 1)
    outputs = build(**settings)(batch)
    assert torch.isfinite(outputs.semantic_logits).all()


def test_one_batch_can_be_learnt():
    model, batch = build(), make_batch(2, 2, augment=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(30):
        loss, _ = occupancy_loss(model(batch), batch, LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.7 * first


@pytest.mark.parametrize(
    ("recipe", "compact", "binary"),
    [
        ("r50", (50, 50, 16), (100, 100, 16)),
        ("r50-bevformer", (50, 50, 16), (100, 100, 16)),
        ("r50-offboard", (256, 256, 40), (256, 256, 40)),
    ],
)
def test_recipes_have_the_shapes_of_the_paper(recipe, compact, binary):
    config = load_config(recipe)
    with torch.device("meta"):
        size, classes = tuple(config.augment.image_size), config.classes.num_classes
        model = build_model(
            config.model_name, config.model, grid=config.voxel_grid, num_classes=classes, image_size=size, semantic=True
        )
    c = model.c
    x, y, z = config.voxel_grid.shape
    assert (x // c.compact_factor, y // c.compact_factor, z) == compact
    assert model.semantic.shape == binary
    assert c.compact_channels == (64 if recipe == "r50-offboard" else 256)
    if recipe == "r50":
        assert len(model.lift.splat.depths) == 88
        assert load_config("r50-openscene").model.depth == (1.0, 60.0, 0.5)
    if recipe == "r50-bevformer":
        assert model.dense.layers[0].volume.sampling.points == 4
        assert model.dense.layers[0].images.sampling.points == 8
        assert len(model.dense.layers) == 2
        assert tuple(t.weight.shape[1] for t in model.dense.tokens.embedding.axes) == (96, 96, 64)


def test_backbone_weights_come_from_a_file_completely_or_not_at_all(tmp_path):
    torch.manual_seed(0)
    source = ImageEncoder("resnet18", 16, 16, 8)
    weights = {f"resnet.{k}": v for k, v in source.body.state_dict().items()}
    save_file(weights, tmp_path / "whole.safetensors")
    torch.manual_seed(1)
    loaded = ImageEncoder("resnet18", 16, 16, 8, weights=str(tmp_path / "whole.safetensors"))
    for key, value in source.body.state_dict().items():
        torch.testing.assert_close(loaded.body.state_dict()[key], value)
    weights.popitem()
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"part\.safetensors"):
        ImageEncoder("resnet18", 16, 16, 8, weights=str(tmp_path / "part.safetensors"))
    with pytest.raises(ValueError, match="no such file"):
        ImageEncoder("resnet18", 16, 16, 8, weights=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backbone_weights_of_a_detector_by_torchvisions_names(tmp_path, name):
    """The names written down here are torchvision's; the detector has more than its backbone."""
    torch.manual_seed(0)
    source = ImageEncoder(name, 16, 16, 8).body.state_dict()
    deep = name == "resnet50"
    known = {
        "embedder.embedder.convolution.weight": "conv1.weight",
        "embedder.embedder.normalization.running_var": "bn1.running_var",
        "encoder.stages.0.layers.0.layer.0.convolution.weight": "layer1.0.conv1.weight",
        "encoder.stages.3.layers.1.layer.1.normalization.bias": "layer4.1.bn2.bias",
        "encoder.stages.1.layers.0.shortcut.convolution.weight": "layer2.0.downsample.0.weight",
        "encoder.stages.1.layers.0.shortcut.normalization.weight": "layer2.0.downsample.1.weight",
    }
    if deep:
        known["encoder.stages.2.layers.5.layer.2.convolution.weight"] = "layer3.5.conv3.weight"
    assert {k: _torchvision_name(k) for k in known} == known
    theirs = {f"img_backbone.{_torchvision_name(k)}": v for k, v in source.items()}
    assert len(theirs) == len(source)
    torch.save({"state_dict": {**theirs, "pts_bbox_head.weight": torch.ones(1)}}, tmp_path / "detector.pt")
    torch.manual_seed(1)
    loaded = ImageEncoder(name, 16, 16, 8, weights=str(tmp_path / "detector.pt"))
    for key, value in source.items():
        torch.testing.assert_close(loaded.body.state_dict()[key], value)


def test_pooled_labels():
    binary = torch.zeros(1, 4, 2, 1, dtype=torch.bool)
    valid = torch.ones_like(binary)
    binary[0, 0, 0, 0] = True  # occupied
    valid[0, 2:, :, 0] = False  # unknown
    binary[0, 3, 1, 0] = True  # occupied, but unknown
    occupied, known = pool_binary(binary, valid, (2, 1, 1))
    assert occupied.flatten().tolist() == [True, False]
    assert known.flatten().tolist() == [True, False]


def test_unknown_names_and_wrong_settings_are_named():
    with pytest.raises(ValueError, match="did you mean 'b2s_ls'"):
        model_entry("b2s_l")
    with pytest.raises(ValueError, match="floor is 9 and cap 3"):
        B2SConfig(floor=9, cap=3)
    with pytest.raises(ValueError, match="does not divide"):
        build(compact_factor=4, binary_factor=2, heads=3)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"heads": 0}, "heads is 0, must be positive"),
        ({"feature_channels": 0}, "feature_channels is 0, must be positive"),
        ({"encoder_channels": (16, 0, 16)}, r"encoder_channels is .* must be positive"),
        ({"encoder_blocks": ()}, "need one each a level"),
        ({"depth": (1.0, 45.0, 0.0)}, r"depth is .* must be positive"),
        ({"depth": (45.0, 1.0, 0.5)}, r"no bin of 0\.5 m fits between 45\.0 and 1\.0 m"),
    ],
)
def test_sizes_that_mean_nothing_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        B2SConfig(**setting)
