"""Index identity on a non-cubic grid (SPEC A.6, I.2), and compaction per image."""

import torch

from occstream.models.attention import ImageAttention, VolumeAttention, sample_images, sample_volume

SHAPE = (5, 7, 3)


def one_hot(*shape, points):
    weights = torch.zeros(*shape, points)
    weights[..., 0] = 1
    return weights


def test_each_voxel_samples_itself_with_zero_offsets():
    """The value at every query is the value at the same voxel: 105 of 105, in each head."""
    volume = torch.arange(2 * 4 * 105, dtype=torch.float32).view(2, 4, *SHAPE)
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij"), -1).reshape(-1, 3)
    reference = (index + 0.5) / torch.tensor(SHAPE)
    locations = reference[None, :, None, None].expand(2, -1, 2, 4, 3).clone()
    locations[..., 1:, :] += 0.3  # points of weight 0 lie elsewhere
    sampled = sample_volume(volume, locations, one_hot(2, 105, 2, points=4))
    torch.testing.assert_close(sampled, volume.flatten(2).mT)


def test_an_offset_of_one_cell_along_each_axis_samples_that_neighbour():
    volume = torch.rand(1, 2, *SHAPE)
    for axis in range(3):
        index = torch.tensor([2, 3, 1])
        step = torch.zeros(3)
        step[axis] = 1
        location = ((index + 0.5 + step) / torch.tensor(SHAPE)).view(1, 1, 1, 1, 3)
        want = volume[0, :, *(index + step.long()).tolist()]
        got = sample_volume(volume, location.expand(1, 1, 1, 1, 3), torch.ones(1, 1, 1, 1))
        torch.testing.assert_close(got[0, 0], want)


def test_samples_outside_are_zero():
    volume = torch.ones(1, 2, *SHAPE)
    far = torch.full((1, 1, 1, 1, 3), 1.7)
    assert sample_volume(volume, far, torch.ones(1, 1, 1, 1)).abs().max() == 0


def test_image_sampling_reads_u_across_and_v_down():
    image = torch.rand(1, 2, 4, 6)
    location = torch.tensor([(4 + 0.5) / 6, (1 + 0.5) / 4]).view(1, 1, 1, 1, 2)
    torch.testing.assert_close(sample_images(image, location, torch.ones(1, 1, 1, 1))[0, 0], image[0, :, 1, 4])


def test_volume_attention_at_start_ignores_the_query():
    torch.manual_seed(0)
    layer = VolumeAttention(8, heads=2, points=4, dropout=0.0)
    volume, reference = torch.rand(1, 8, *SHAPE), torch.full((1, 1, 3), 0.5)
    a = layer(torch.rand(1, 1, 8), reference, volume)
    b = layer(torch.rand(1, 1, 8), reference, volume)
    torch.testing.assert_close(a, b)


def test_image_attention_equals_a_loop_over_queries_and_cameras():
    """Compaction uses each batch element's own visibility (SPEC A.6)."""
    torch.manual_seed(1)
    b, v, q, c = 2, 3, 11, 8
    layer = ImageAttention(c, 5, heads=2, points=4, dropout=0.0)
    torch.nn.init.normal_(layer.sampling.offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.sampling.weights.weight)
    queries, pixels = torch.rand(b, q, c), torch.rand(b, v, q, 2)
    visible, features = torch.rand(b, v, q) > 0.5, torch.rand(b, v, 5, 4, 6)
    visible[0, :, 3] = False
    found = layer(queries, pixels, visible, features)
    offsets, weights = layer.sampling(queries)
    for i in range(b):
        for j in range(q):
            seen = [k for k in range(v) if visible[i, k, j]]
            total = torch.zeros(c)
            for k in seen:
                values = layer.value(features[i, k][None])
                location = pixels[i, k, j] + offsets[i, j] / torch.tensor([6.0, 4.0])
                total = total + sample_images(values, location[None, None], weights[i, j][None, None])[0, 0]
            want = layer.output(total / max(1, len(seen)))
            torch.testing.assert_close(found[i, j], want, atol=1e-5, rtol=1e-4)
