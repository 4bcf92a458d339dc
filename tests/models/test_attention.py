"""Index identity on a non-cubic grid, and queries of their own number for each frame and image."""

import pytest
import torch

from occstream.models.attention import ImageAttention, Sightings, VolumeAttention, sample
from occstream.models.lift import project
from occstream.models.transformer import VoxelTokens
from occstream.sharding.grid import VoxelGrid
from tests.models.helpers import make_batch

SHAPE = (5, 7, 3)


def one_hot(*shape, points):
    weights = torch.zeros(*shape, points)
    weights[..., 0] = 1
    return weights


def test_each_voxel_samples_itself_with_zero_offsets():
    """The value at every query is the value at the same voxel: 105 of 105, in each head."""
    volume = torch.arange(2 * 4 * 105, dtype=torch.float32).view(2, 4, *SHAPE)
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1).reshape(-1, 3)
    reference = ((index + 0.5) / torch.tensor(SHAPE)).repeat(2, 1)
    locations = reference[:, None, None].expand(-1, 2, 4, 3).clone()
    locations[..., 1:, :] += 0.3  # points of weight 0 lie elsewhere
    sampled = sample(volume, locations, one_hot(210, 2, points=4), [105, 105])
    torch.testing.assert_close(sampled, volume.flatten(2).mT.flatten(0, 1))


def test_an_offset_of_one_cell_along_each_axis_samples_that_neighbour():
    volume = torch.rand(1, 2, *SHAPE)
    for axis in range(3):
        index = torch.tensor([2, 3, 1])
        step = torch.zeros(3)
        step[axis] = 1
        location = ((index + 0.5 + step) / torch.tensor(SHAPE)).view(1, 1, 1, 3)
        want = volume[0, :, *(index + step.long()).tolist()]
        torch.testing.assert_close(sample(volume, location, torch.ones(1, 1, 1), [1])[0], want)


def test_samples_outside_are_zero():
    volume = torch.ones(1, 2, *SHAPE)
    assert sample(volume, torch.full((1, 1, 1, 3), 1.7), torch.ones(1, 1, 1), [1]).abs().max() == 0


def test_image_sampling_reads_u_across_and_v_down():
    image = torch.rand(1, 2, 4, 6)
    location = torch.tensor([(4 + 0.5) / 6, (1 + 0.5) / 4]).view(1, 1, 1, 2)
    torch.testing.assert_close(sample(image, location, torch.ones(1, 1, 1), [1])[0], image[0, :, 1, 4])


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
def test_queries_of_a_map_see_that_map_alone(counts):
    values = torch.rand(3, 4, *SHAPE)
    locations, weights = torch.rand(sum(counts), 2, 3, 3), torch.rand(sum(counts), 2, 3)
    found = sample(values, locations, weights, counts)
    assert found.shape == (sum(counts), 4)
    at = 0
    for number, count in enumerate(counts):
        part = slice(at, at + count)
        alone = sample(values[number : number + 1], locations[part], weights[part], [count])
        torch.testing.assert_close(found[part], alone)
        at += count


def test_volume_attention_at_start_ignores_the_query():
    torch.manual_seed(0)
    layer = VolumeAttention(8, heads=2, points=4, dropout=0.0)
    volume, reference = torch.rand(1, 8, *SHAPE), torch.full((1, 3), 0.5)
    a = layer(torch.rand(1, 8), reference, volume, [1])
    b = layer(torch.rand(1, 8), reference, volume, [1])
    torch.testing.assert_close(a, b)


def test_image_attention_equals_a_loop_over_queries_and_cameras():
    """Each frame's tokens attend to the images that see them, with its own visibility."""
    torch.manual_seed(1)
    v, c, frames = 3, 8, (11, 4)
    frame = torch.tensor([0] * 11 + [1] * 4)
    layer = ImageAttention(c, 5, heads=2, points=4, dropout=0.0)
    torch.nn.init.normal_(layer.sampling.offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.sampling.weights.weight)
    queries, pixels = torch.rand(15, c), torch.rand(v, 15, 2)
    visible, features = torch.rand(v, 15) > 0.5, torch.rand(2, v, 5, 4, 6)
    visible[:, 3] = False
    camera, token = visible.nonzero().unbind(1)
    counts = [int((visible[k] & (frame == i)).sum()) for k in range(v) for i in range(len(frames))]
    found = layer(queries, Sightings(token, pixels[camera, token], counts, visible.sum(0)), features)
    offsets, weights = layer.sampling(queries)
    for j, i in enumerate(frame.tolist()):
        seen = [k for k in range(v) if visible[k, j]]
        total = torch.zeros(c)
        for k in seen:
            location = pixels[k, j] + offsets[j] / torch.tensor([6.0, 4.0])
            total = total + sample(layer.value(features[i, k][None]), location[None], weights[j][None], [1])[0]
        torch.testing.assert_close(found[j], layer.output(total / max(1, len(seen))), atol=1e-5, rtol=1e-4)


def test_tokens_of_a_batch_are_those_of_its_frames():
    """Places, references and sightings of frames with 9, 0 and 40 tokens, against each frame alone."""
    batch = make_batch(3, 0, views=2, seed=4)
    grid = VoxelGrid("odd", (-5, -7, -1), (5, 7, 2), (2, 2, 1))
    tokens = VoxelTokens(grid, 12, tuple(batch.cameras.images.shape[-2:]))
    index = [torch.randperm(105)[:n] for n in (9, 0, 40)]
    found = tokens.at(index, batch)
    assert found.counts == [9, 0, 40]
    assert found.place.tolist() == [105 * i + int(j) for i, part in enumerate(index) for j in part]
    pairs, at, start = [], 0, 0
    for image, count in enumerate(found.seen.counts):
        pairs += [(image % 3, image // 3, int(t)) for t in found.seen.token[at : at + count]]
        at += count
    assert at == len(found.seen.token) == len(found.seen.pixel)
    for i, part in enumerate(index):
        empty = [torch.zeros(0, dtype=torch.long)] * 3
        alone = tokens.at([*empty[:i], part, *empty[i + 1 :]], batch)
        rows = slice(start, start + len(part))
        torch.testing.assert_close(found.references[rows], alone.references)
        torch.testing.assert_close(found.seen.cameras[rows], alone.seen.cameras)
        mine = [(camera, token - start) for frame, camera, token in pairs if frame == i]
        theirs = [(k // 3, int(t)) for k, t in zip(_repeat(alone.seen.counts), alone.seen.token)]
        assert mine == theirs
        start += len(part)
    assert found.seen.cameras.sum() == at > 0


def _repeat(counts):
    return [k for k, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(("height", "stride"), [(450, 32), (448, 32), (450, 16)])
def test_a_pixel_samples_the_feature_whose_rows_it_lies_in(height, stride):
    """Also where the image does not divide by the stride: row i of the features covers pixels 32 i to 32 (i + 1)."""
    batch, rows = make_batch(1, 1, views=1, augment=False, image_size=(height, 800)), -(-height // stride)
    tokens = VoxelTokens(VoxelGrid("g", (2, -2, 0), (10, 2, 3), (0.5, 0.5, 0.5)), 12, (height, 800), stride)
    index = torch.arange(len(tokens.centers))
    seen = tokens.at([index], batch).seen
    [(pixels, _)] = project([tokens.centers], batch)
    wanted = pixels[0, seen.token]
    assert len(wanted) > 100
    features = (torch.arange(rows) + 0.5).view(1, 1, rows, 1).expand(1, 1, rows, 25) * stride  # pixel of each row
    found = sample(features, seen.pixel[:, None, None], torch.ones(len(wanted), 1, 1), [len(wanted)])[:, 0]
    inside = (wanted[:, 1] > stride / 2) & (wanted[:, 1] < (rows - 0.5) * stride) & (wanted[:, 0] > 16)
    inside &= wanted[:, 0] < 784
    torch.testing.assert_close(found[inside], wanted[inside, 1], atol=0.01, rtol=0)
