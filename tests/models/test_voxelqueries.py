"""Attention of voxel queries: levels of images, reference points, heights apart, and the order of voxels on an odd grid."""

from __future__ import annotations

import pytest
import torch

from occstream.models.attention import ImageAttention, MapAttention, Sightings, sample
from occstream.models.backbones import ImageEncoder
from occstream.models.lift import project
from occstream.models.transformer import VoxelTokens
from occstream.sharding.grid import VoxelGrid
from tests.models.helpers import make_batch

ODD = VoxelGrid("odd", (-5, -7, -1), (5, 7, 2), (2, 2, 1))  # 5 x 7 x 3


def shaken(layer):
    """A layer whose offsets and weights depend on the query."""
    torch.nn.init.normal_(layer.sampling.offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.sampling.weights.weight)
    return layer


@pytest.mark.parametrize(("levels", "references"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_samples_of_all_levels_and_reference_points_are_added_up(levels, references):
    """Against a loop over queries, cameras, reference points and levels, with one softmax over all samples of a query."""
    torch.manual_seed(levels)
    v, c, points, tokens = 2, 8, 3, 9
    layer = shaken(ImageAttention(c, 5, 2, points, levels=levels, references=references, dropout=0.0))
    queries, pixels = torch.rand(tokens, c), torch.rand(v, tokens, references, 2)
    visible = torch.rand(v, tokens, references) > 0.4
    visible[:, 3] = False
    features = [torch.rand(1, v, 5, -(-7 // 2**i), -(-10 // 2**i)) for i in range(levels)]
    camera, token, reference = visible.nonzero().unbind(1)
    seen = Sightings(
        token, pixels[camera, token, reference], visible.sum((1, 2)).tolist(), visible.any(2).sum(0),
        reference if references > 1 else None,
    )  # fmt: skip
    found = layer(queries, seen, features)
    offsets, weights = layer.sampling(queries)
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens, 2))
    offsets = offsets.view(tokens, 2, references, levels, points, 2)
    weights = weights.view(tokens, 2, references, levels, points)
    for j in range(tokens):
        total = torch.zeros(c)
        for k, r in visible[:, j].nonzero().tolist():
            for i, values in enumerate(features):
                (h, w), (h0, w0) = values.shape[-2:], features[0].shape[-2:]
                pixel = pixels[k, j, r] * torch.tensor([w0, h0])  # in features of the first level
                location = (pixel / 2**i + offsets[j, :, r, i]) / torch.tensor([w, h])
                total = (
                    total + sample(layer.value(values[0, k][None]), location[None], weights[j, :, r, i][None], [1])[0]
                )
        expected = layer.output(total / max(1, int(visible[:, j].any(1).sum())))
        torch.testing.assert_close(found[j], expected, atol=1e-5, rtol=1e-4)


def test_each_place_of_a_map_samples_itself_and_x_is_along_its_rows():
    layer = MapAttention(2, heads=1, points=1, dropout=0.0)
    bev = torch.rand(1, 2, 5, 7)
    with torch.no_grad():
        layer.value.weight.copy_(torch.eye(2)[..., None, None])
        layer.output.weight.copy_(torch.eye(2))
        for name in (layer.value, layer.output):
            name.bias.zero_()
        for step, place in (((0.0, 0.0), (2, 3)), ((1.0, 0.0), (3, 3)), ((0.0, 2.0), (2, 5))):
            layer.sampling.offsets.bias.copy_(torch.tensor(step))
            reference = torch.tensor([[2.5 / 5, 3.5 / 7]])
            torch.testing.assert_close(layer(torch.rand(1, 2), reference, bev, [1])[0], bev[0, :, place[0], place[1]])


@pytest.mark.parametrize("references", [1, 4])
def test_reference_points_are_spread_over_the_height_of_a_voxel(references):
    batch = make_batch(2, 0, views=2, seed=4)
    tokens = VoxelTokens(ODD, 12, (32, 64), references=references)
    index = [torch.arange(105), torch.arange(40)]
    seen = tokens.at(index, batch).seen
    number = seen.reference if references > 1 else torch.zeros_like(seen.token)
    found = {}
    image = torch.arange(4).repeat_interleave(torch.tensor(seen.counts))
    for k, t, r, pixel in zip(image.tolist(), seen.token.tolist(), number.tolist(), seen.pixel):
        found[k // 2, t, r] = pixel
    for r in range(references):
        up = torch.tensor([0.0, 0.0, ((r + 0.5) / references - 0.5) * ODD.voxel[2]])
        for frame, (pixels, depth) in enumerate(project([tokens.centers[i] + up for i in index], batch)):
            inside = ((pixels > 0) & (pixels < torch.tensor([64.0, 32.0]))).all(-1) & (depth > 1e-5)
            for v, t in inside.nonzero().tolist():
                pixel = found.pop((v, t + 105 * frame, r))
                torch.testing.assert_close(pixel * torch.tensor([64.0, 32.0]), pixels[v, t], atol=1e-3, rtol=1e-4)
    assert not found
    assert seen.cameras.max() <= 2
    assert (seen.cameras > 0).sum() == len(seen.token.unique())


def test_an_image_encoder_emits_levels_and_the_first_is_the_one_of_one():
    torch.manual_seed(0)
    encoder = ImageEncoder("resnet18", 16, 12, 8, emitted=4).eval()
    images = torch.rand(2, 3, 36, 68)
    pyramid = encoder.pyramid(images)
    assert [tuple(level.shape) for level in pyramid] == [(2, 12, 5, 9), (2, 12, 3, 5), (2, 12, 2, 3), (2, 12, 1, 2)]
    one = ImageEncoder("resnet18", 16, 12, 8).eval()
    missing, more = one.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing
    assert {key.partition(".")[0] for key in more} == {"coarser", "beyond"}
    assert torch.equal(one(images), pyramid[0])
    for stride, levels in ((8, 5), (32, 3), (8, 0)):
        with pytest.raises(ValueError, match=f"{levels} levels of image features from stride {stride} on"):
            ImageEncoder("resnet18", 16, 12, stride, emitted=levels)
