"""B2S as a whole, and every registered model by being registered."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from occstream.models import build_model, model_entry
from occstream.models.b2s import B2SConfig
from occstream.models.backbones import ImageEncoder
from occstream.models.batch import concat, pool_binary
from occstream.models.registry import MODELS
from occstream.pretrain.config import load_config
from occstream.pretrain.losses import LossConfig, occupancy_loss
from tests.models.helpers import SMALL, make_batch
from tests.pretrain.small import RECIPE

TINY = dataclasses.replace(load_config(RECIPE).model, dropout=0.0, floor=16)


def build(semantic=True, **settings):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **settings)
    return build_model("b2s_ls", config, grid=SMALL, num_classes=17, image_size=(32, 64), semantic=semantic)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_registered_models_train_and_every_parameter_gets_a_gradient(name):
    """With and without semantic frames in the batch: ZeRO must see the same parameters on every rank."""
    model = build_model(name, TINY, grid=SMALL, num_classes=17, image_size=(32, 64), semantic=True)
    for semantic in (2, 0):
        batch = make_batch(3, semantic)
        outputs = model(batch)
        assert outputs.binary_logits.shape == (3, 8, 8, 4)
        assert outputs.semantic_logits.shape == (max(1, semantic), 17, *SMALL.shape)
        loss, parts = occupancy_loss(outputs, batch, LossConfig())
        model.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == []
        in_semantic = sum(float(p.grad.abs().sum()) for n, p in model.named_parameters() if n.startswith("semantic."))
        assert (in_semantic > 0) == (semantic > 0), "an empty semantic part must not move anything"
        assert (float(parts["semantic"]) > 0) == (semantic > 0)


def test_pretraining_network_has_nothing_after_the_binary_decoder_and_all_of_it_transfers():
    first, second = build(semantic=False), build(semantic=True)
    assert not [k for k in first.state_dict() if k.startswith("semantic.")]
    assert set(second.transfer_keys()) == set(first.state_dict())
    batch = make_batch(2, 0)
    assert first(batch).semantic_logits is None


def test_replayed_frames_change_nothing_of_the_semantic_frames_but_batch_statistics():
    model = build().eval()
    s, b = make_batch(2, 2, seed=1), make_batch(1, 0, seed=2)
    joined = concat(s, b)
    with torch.no_grad():
        alone, together = model(s), model(joined)
    torch.testing.assert_close(alone.semantic_logits, together.semantic_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.binary_logits, together.binary_logits[:2], atol=1e-4, rtol=1e-4)


def test_selection_takes_the_most_probable_within_floor_and_cap():
    part = build(floor=3, cap=5).semantic
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.2, 0.95, 0.6, 0.65], [0.1, 0.2, 0.3, 0.05, 0.04, 0.0, 0.0, 0.0]])
    index, used = part.select(scores)
    assert index.shape == (2, 5)
    assert set(index[0][used[0]].tolist()) == {5, 0, 2, 3, 7}
    assert set(index[1][used[1]].tolist()) == {2, 1, 0}, "the floor keeps some even if nothing is predicted"


def test_selection_by_labels_and_by_both():
    batch = make_batch(2, 2)
    logits = torch.full((2, 8, 8, 4), -5.0)
    logits[0, 0, 0, 0] = 5
    truth, _ = pool_binary(batch.binary, batch.binary_valid, (8, 8, 4))
    gt = build(selection="gt").semantic._scores(logits, batch) > 0.5
    torch.testing.assert_close(gt, truth.flatten(1))
    union = build(selection="union").semantic
    both = union._scores(logits, batch) > 0.5
    assert bool(both[0, 0])
    assert (both[:, 1:] == truth.flatten(1)[:, 1:]).all()
    assert (union.eval()._scores(logits, batch) > 0.5).sum() == 1, "no labels outside training"


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


def test_r50_recipe_has_the_shapes_of_the_paper():
    config = load_config("r50")
    with torch.device("meta"):
        model = build_model(
            "b2s_ls", config.model, grid=config.voxel_grid, num_classes=17, image_size=(256, 704), semantic=True
        )
    assert model.compact_shape == (50, 50, 16)
    assert model.semantic.shape == (100, 100, 16)
    assert len(model.lift.depths) == 88
    assert load_config("r50-openscene").model.depth == (1.0, 60.0, 0.5)


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
