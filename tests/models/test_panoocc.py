"""The network of PanoOcc as a whole: what moves with what, and the edges of its inputs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from occstream.evaluation.occupancy import OccupancyMetric, classify
from occstream.evaluation.predictions import predict
from occstream.models import kernels
from occstream.models.attention import _Sampling
from occstream.models.batch import Batch, History
from occstream.models.panoocc import PanoOcc, PanoOccConfig, VoxelHead
from occstream.models.voxelqueries import ViewEncoder, VoxelLayer
from occstream.pretrain import panolosses
from occstream.pretrain.panolosses import PanoLoss
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.schema import OCC3D
from tests.models.helpers import SMALL, make_batch

ODD = VoxelGrid("odd", (-5, -7, -1), (5, 7, 2), (2, 2, 1))  # 5 x 7 x 3
LABELS = {"classes": OCC3D.classes, "things": [i for i, name in enumerate(OCC3D.classes) if name in OCC3D.things]}
CONFIG = PanoOccConfig(
    backbone="resnet18",
    backbone_width=16,
    feature_channels=8,
    feature_stride=8,
    feature_levels=2,
    queries=(4, 4, 2),
    channels=16,
    layers=2,
    heads=2,
    self_points=2,
    cross_points=2,
    ffn_channels=16,
    dropout=0.0,
    frames=2,
    upsample=((1, 1, 1), (2, 2, 2)),
    upsample_channels=(8, 8),
    head_channels=8,
)  # SMALL is 16 x 16 x 4: twice as fine as 8 x 8 x 4 in x and y


def build(semantic=True, grid=SMALL, **changes) -> PanoOcc:
    torch.manual_seed(0)
    model = PanoOcc(dataclasses.replace(CONFIG, **changes), grid, 17, (32, 64), semantic=semantic)
    with torch.no_grad():  # queries that differ, and classes that are not all free
        model.views.queries.mul_(20)
        for head in (model.voxel_head and model.voxel_head.net[-1], model.thing_head):
            if head is not None:
                head.bias.zero_()
    return model.eval()


def moving(size=2, semantic=1, frames=2, views=2, grid=SMALL, seed=0) -> Batch:
    """Frames of a vehicle that drives forward by 1.3 m a key-frame and turns."""
    batch = make_batch(size, semantic, views=frames * views, grid=grid, seed=seed)
    poses = torch.eye(4).repeat(size, frames, 1, 1)
    for f in range(frames):
        angle = 0.1 * f
        poses[:, f, :2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        poses[:, f, 0, 3] = -1.3 * f
    batch.history = History(poses, torch.ones(size, frames, dtype=torch.bool))
    return batch


def pano_loss(model, batch, **settings):
    outputs, loss = model(batch), PanoLoss(**settings)
    counts = joint_counts([panolosses.counts(outputs, batch, loss, **LABELS)])
    weights = {term: getattr(loss, f"{term}_weight") for term in ("binary", "occupied", "voxel", "lovasz", "thing")}
    return combine(panolosses.sums(outputs, batch, loss, **LABELS), counts, weights)


def test_outputs_have_the_shapes_that_are_promised():
    batch = moving(3, 2)
    out = build()(batch)
    assert out.binary_logits.shape == (3, 8, 8, 4)
    assert out.semantic_logits.shape == (2, 17, 16, 16, 4)
    assert out.decoded.features.shape == (2, 8, 8, 8, 4)
    assert out.things.shape == (2 * 8 * 8 * 4,)
    assert out.semantic_logits.dtype == out.binary_logits.dtype == torch.float32
    before = build(semantic=False)(batch)
    assert (before.semantic_logits, before.decoded, before.things) == (None, None, None)
    torch.testing.assert_close(before.binary_logits, out.binary_logits)


def test_a_grid_that_the_decoder_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"grid 'odd' \(5, 7, 3\) is not whole times as fine as the decoder's \(8, 8, 4\)"
    ):
        build(grid=ODD)
    with pytest.raises(ValueError, match="upsample has 1 levels and upsample_channels 2"):
        dataclasses.replace(CONFIG, upsample=((2, 2, 2),))
    with pytest.raises(ValueError, match="the batch has 3 key-frames of each sample, the network 2"):
        build()(moving(frames=3))


def test_each_query_comes_out_where_its_voxel_is():
    """105 of 105 on 5 x 7 x 3, and with its own position embedding."""
    torch.manual_seed(0)
    encoder = ViewEncoder(dataclasses.replace(CONFIG, queries=ODD.shape), ODD, (32, 64))
    batch = make_batch(2, 0, views=2)
    features = [torch.rand(2, 2, 8, 4, 8), torch.rand(2, 2, 8, 2, 4)]
    seen = {}

    class Record(nn.Module):
        def forward(self, x, tokens, features, shape):
            seen.update(tokens=tokens, shape=shape)
            return x

    encoder.layers = nn.ModuleList([Record()])
    found = encoder(features, batch)
    assert torch.equal(found, encoder.queries.permute(3, 0, 1, 2).expand(2, -1, -1, -1, -1))
    tokens = seen["tokens"]
    steps = (tokens.references * torch.tensor(ODD.shape)).floor().long().view(2, 3, 5, 7, 3)
    for x, y, z in ((0, 0, 0), (4, 0, 2), (1, 6, 1)):
        assert steps[1, z, x, y].tolist() == [x, y, z]
        place = int(tokens.place.view(2, 3, 5, 7)[1, z, x, y])
        assert place == 105 + (x * 7 + y) * 3 + z
        torch.testing.assert_close(
            tokens.position.view(2, 3, 5, 7, -1)[1, z, x, y], encoder.tokens.embedding(torch.tensor([x, y, z]))
        )


def test_self_attention_never_mixes_heights_and_sees_its_own_frame_alone():
    torch.manual_seed(0)
    layer = VoxelLayer(CONFIG)
    nn.init.normal_(layer.planes[0].sampling.offsets.weight, std=1.0)
    encoder = ViewEncoder(dataclasses.replace(CONFIG, queries=ODD.shape), ODD, (32, 64))
    batch, features = make_batch(2, 0, views=2), [torch.rand(2, 2, 8, 4, 8), torch.rand(2, 2, 8, 2, 4)]
    tokens = encoder.tokens.at([encoder.order] * 2, batch)
    x = torch.rand(2, 3, 35, 16)  # frame, height, place
    other = x.clone()
    other[0, 1, 17] += 1
    found, changed = (layer(v.flatten(0, 2), tokens, features, ODD.shape).view(2, 3, 35, 16) for v in (x, other))
    different = (found - changed).abs().amax(-1) > 0
    assert different[0, 1].sum() > 3
    different[0, 1] = False
    assert not different.any()


def symmetric(model: PanoOcc) -> PanoOcc:
    """All that knows a direction is made the same along x and y, forth and back."""
    both = lambda v, dims: v.add(v.flip(dims[:1])).add(v.flip(dims[1:])).add(v.flip(dims)) / 4  # noqa: E731
    with torch.no_grad():
        model.views.queries.copy_(both(model.views.queries, (0, 1)))
        for axis in (0, 1):
            table = model.views.tokens.embedding.axes[axis].weight
            table.copy_((table + table.flip(0)) / 2)
        for layer in model.views.layers:
            for attention in layer.planes:
                attention.sampling.offsets.bias.zero_()
        for module in (*model.temporal.modules(), *model.decoder.modules()):
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                module.weight.copy_(both(module.weight, (2, 3)))
    return model


@pytest.mark.parametrize("mirror", [(True, False), (False, True), (True, True)])
def test_the_mirrored_scene_gives_the_mirrored_prediction(mirror):
    """Cameras, motion and all, where the weights know no direction."""
    model, batch = symmetric(build()), moving()
    with torch.no_grad():
        out, other = model(batch), model(batch.mirrored(*mirror))
    dims = [axis for axis, wanted in enumerate(mirror) if wanted]
    for name, first in (("binary_logits", 1), ("semantic_logits", 2)):
        expected = getattr(out, name).flip([first + d for d in dims])
        assert expected.std() > 1e-3
        torch.testing.assert_close(getattr(other, name), expected, atol=1e-4, rtol=1e-3)


def test_the_first_key_frame_of_a_scene_depends_on_nothing_before_it():
    model, batch = build(frames=3), moving(frames=3)
    batch.history.exists[0, 1:] = False
    out = model(batch)
    blank = moving(frames=3)
    blank.history.exists[0, 1:] = False
    blank.cameras.images[0, 2:] = 0
    blank.history.past_to_current[0, 1:] = torch.eye(4)
    blank.cameras.camera_to_ego[0, 2:] = batch.cameras.camera_to_ego[0, :1]
    torch.testing.assert_close(model(blank).semantic_logits[0], out.semantic_logits[0])
    batch.history.exists[0, 1] = True
    assert not torch.allclose(model(batch).semantic_logits[0], out.semantic_logits[0])


@pytest.mark.parametrize("learned", [False, True])
def test_all_key_frames_may_be_absent(learned):
    model, batch = build(past_gradient=learned).train(), moving(frames=2)
    batch.history.exists[:, 1:] = False
    loss, _ = pano_loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_reach_earlier_key_frames_only_if_asked():
    """And what is computed without them has neither dropout nor statistics of its own."""
    for learned in (False, True):
        model, batch = build(past_gradient=learned, dropout=0.1).train(), moving(size=1)
        shown = batch.cameras.images.float()
        batch.cameras = dataclasses.replace(batch.cameras, images=shown.requires_grad_())
        before = int(model.images.body.embedder.embedder.normalization.num_batches_tracked)
        pano_loss(model, batch)[0].backward()
        reached = shown.grad.abs().amax((2, 3, 4)) > 0
        assert reached.tolist() == [[True, True, learned, learned]]
        assert int(model.images.body.embedder.embedder.normalization.num_batches_tracked) == before + 1
        assert model.images.training
        assert model.views.layers[0].training


def test_key_frames_with_and_without_gradient_are_the_same_features():
    batch = moving()
    batch.history.exists[1, 1] = False
    found = [build(past_gradient=learned)(batch).semantic_logits for learned in (False, True)]
    torch.testing.assert_close(*found)


def test_one_camera_is_enough():
    model, batch = build().train(), moving(views=1)
    loss, terms = pano_loss(model, batch)
    loss.backward()
    assert all(term.isfinite() for term in terms.values())
    with pytest.raises(ValueError, match=r"9 cameras, but the model has embeddings for 8: set model\.cameras"):
        model(moving(views=9))


@pytest.mark.parametrize("voxels", ["points", "dense"])
def test_a_network_that_says_free_everywhere_is_scored_and_learns(voxels):
    model, batch = build(), moving(2, 2)
    with torch.no_grad():
        model.voxel_head.net[-1].bias.fill_(-50)
        model.binary_head.bias.fill_(-50)
    loss, _ = pano_loss(model.train(), batch, voxels=voxels)
    loss.backward()
    assert loss.isfinite()
    assert model.voxel_head.net[-1].bias.grad.abs().max() > 0
    out = model.eval()(batch)
    assert (classify(out.semantic_logits, "softmax_focal") == OCC3D.free_id).all()
    metric = OccupancyMetric(OCC3D, SMALL, kind="softmax_focal")
    metric.update(out, batch)
    assert (metric.result().iou, metric.result().binary_iou) == (0, 0)
    [(_, labels), _] = predict(model, [batch], kind="softmax_focal", flips=True)
    assert not labels.binary.any()


def test_in_bf16_it_says_nearly_the_same_and_every_weight_learns():
    """Weights that were cast for earlier key-frames, without gradients, are not the ones that learn."""
    model, batch = build(), moving()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _Sampling):  # at first they do not look at the query, nor at where it is
                nn.init.normal_(module.weights.weight, std=0.1)
        wide = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(batch)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    loss = PanoLoss()
    counts = joint_counts([panolosses.counts(outputs, batch, loss, **LABELS)])
    sums = panolosses.sums(outputs, batch, loss, **LABELS)
    combine(sums, counts, dict.fromkeys(("binary", "voxel", "lovasz", "thing"), 1.0))[0].backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == ["temporal.absent"]  # nothing is absent
    for name in ("binary_logits", "semantic_logits"):
        a, b = getattr(narrow, name), getattr(wide, name)
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.05 * b.abs().max()


def test_places_are_in_fp32_whatever_the_features_are():
    torch.manual_seed(0)
    head, features, places = VoxelHead(3, 8, 5), torch.rand(1, 3, 40, 6, 4).bfloat16(), torch.rand(50, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (head.at(values, places, [50]) for values in (features, features.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "value"), [("head_rows", 3), ("checkpointing", True)])
def test_what_saves_memory_changes_nothing(name, value):
    found = []
    for changes in ({}, {name: value}):
        model = build(**changes).train()
        loss, _ = pano_loss(model, moving())
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    for key, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
def test_triton_kernels_give_the_same_network(monkeypatch):
    """Through the interpreter: outputs, loss and gradients."""
    pytest.importorskip("triton")
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(kernels, "wanted_for", lambda tensor, wanted=wanted: wanted)
        model, batch = build(layers=1, past_gradient=True), moving(1, 1)
        with torch.no_grad():  # off the whole cells, where interpolation has a kink
            for key, parameter in model.named_parameters():
                if key.endswith("offsets.bias"):
                    parameter += 0.3
        loss, _ = pano_loss(model, batch)
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0])
    largest = max(float(grad.abs().max()) for grad in found[0][1].values())
    for key, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], grad, rtol=1e-3, atol=1e-5 * largest, msg=key)


SPARSE = {"decoder": "sparse", "keep": (0.5, 0.25)}


def test_a_sparse_decoder_classifies_what_it_keeps_and_the_rest_is_free():
    batch = moving(3, 2)
    out = build(**SPARSE)(batch)
    assert out.semantic_logits.shape == (2, 17, 16, 16, 4)
    assert [len(level.logits) for level in out.levels] == [3 * 32, 3 * 16 * 8]
    assert out.decoded.indices.shape == (2 * 32, 4)
    assert out.things.shape == (2 * 32,)
    active = out.decoded.volume(torch.ones(len(out.things), 1))[:, 0].bool()
    classes, occupied = classify(out.semantic_logits, "softmax_focal", 0.25), out.binary_logits > 0
    assert (classes[~active.repeat_interleave(2, 1).repeat_interleave(2, 2)] == 17).all()
    assert not occupied[:2][~active].any()


def test_all_parameters_of_a_sparse_decoder_learn_also_without_semantic_frames_or_voxels():
    for semantic, keep in ((2, (0.5, 0.25)), (0, (0.5, 0.25)), (1, (1.0, 1.0))):
        by = "threshold" if keep[0] == 1 else "share"
        model = build(decoder="sparse", keep=keep, keep_by=by, selection="predicted", submanifold=True).train()
        batch = moving(2, semantic)
        out = model(batch)
        assert len(out.decoded.features) == 0 or by == "share"
        loss, terms = pano_loss(model, batch)
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        assert float(terms["occupied"]) > 0
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing, missing


def test_labels_that_a_sparse_decoder_keeps_in_training_are_what_counts():
    batch = moving(2, 1)
    batch.occupancy.binary[:] = False
    batch.occupancy.binary[:, 3, 5, 1] = True
    batch.occupancy.binary_valid[:] = True
    batch.occupancy.binary_valid[1, 3, 5, 1] = False  # nobody knows of that one
    model = build(decoder="sparse", keep=(0.01, 0.01)).train()
    levels = model(batch).levels
    assert [level.kept.tolist() for level in levels] == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": (0.5,)}, "keep has 1 numbers, must have one for each of 2 levels"),
        ({"keep": (0.5, 0.0)}, "keep has 0.0, must be a share above 0"),
        ({"sparse": "other"}, "sparse is 'other'"),
    ],
)
def test_wrong_settings_of_a_sparse_decoder_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        build(**{"decoder": "sparse", "keep": (0.5, 0.5), **changes})
