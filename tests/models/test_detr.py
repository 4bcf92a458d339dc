"""The detection head of queries: codes of boxes, reference points, what it says and in which order."""

import math

import numpy as np
import pytest
import torch

from occstream.models.detr import CODE, DetrConfig, DetrHead, Queried, decode, encode, found_boxes
from occstream.sharding.grid import VoxelGrid

GRID = VoxelGrid("street", (-12.0, -8.0, -2.0), (12.0, 8.0, 4.0), (0.5, 0.5, 0.5))
CLASSES = ("car", "pedestrian", "barrier")


def head(seed: int = 0, **changes) -> DetrHead:
    torch.manual_seed(seed)
    small = {"queries": 7, "layers": 3, "channels": 16, "heads": 4, "ffn_channels": 32, "dropout": 0.0}
    return DetrHead(6, GRID, CLASSES, DetrConfig(**small | changes))


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centers = (torch.rand(n, 3, generator=g) - 0.5) * torch.tensor([20.0, 14.0, 4.0])
    sizes = torch.rand(n, 3, generator=g) * 5 + 0.3
    yaw = (torch.rand(n, 1, generator=g) * 2 - 1) * math.pi
    return torch.cat([centers, sizes, yaw], 1), torch.randn(n, 2, generator=g)


def test_codes_hold_boxes_and_give_them_back():
    boxes, velocity = rows(200)
    found, moved = decode(encode(boxes, velocity).numpy())
    np.testing.assert_allclose(found, boxes.numpy(), atol=2e-5)
    np.testing.assert_array_equal(moved, velocity.numpy())
    assert found.dtype == np.float32


def test_a_code_has_the_published_order():
    code = encode(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.pi / 2]]), torch.tensor([[7.0, math.nan]]))[0]
    expected = [1, 2, math.log(5), math.log(4), 3, math.log(6), 1, 0, 7]  # the width goes before the length
    np.testing.assert_allclose(code[:9].numpy(), expected, atol=1e-6)
    assert code[9].isnan()


@pytest.mark.parametrize(
    ("sine", "cosine", "yaw"), [(0.0, -1.0, math.pi), (-0.0, -1.0, math.pi), (-1.0, 0.0, -math.pi / 2), (0.0, 2.0, 0.0)]
)
def test_headings_are_above_minus_pi_and_at_most_pi(sine, cosine, yaw):
    code = np.zeros((1, CODE), np.float32)
    code[0, 6:8] = sine, cosine
    assert decode(code)[0][0, 6] == pytest.approx(yaw)
    assert decode(code.astype(np.float64))[0][0, 6] == pytest.approx(yaw)


def test_new_boxes_are_at_their_reference_points_and_unlikely():
    net = head().eval()
    found = net(torch.randn(2, 6, 12, 8))
    assert found.logits.shape == (3, 2, 7, 3)
    assert found.codes.shape == (3, 2, 7, CODE)
    at = net.references(net.position).sigmoid() * torch.tensor([24.0, 16.0, 6.0]) - torch.tensor([12.0, 8.0, 2.0])
    for layer in found.codes:
        torch.testing.assert_close(layer[:, :, [0, 1, 4]], at.expand(2, 7, 3), atol=1e-4, rtol=1e-5)
    net.names[0][-1].weight.data.zero_()
    assert net(torch.randn(1, 6, 12, 8)).logits[0].sigmoid().detach().numpy() == pytest.approx(0.01)


def test_each_layer_moves_the_points_of_the_layer_before():
    """A step of 1 before the sigmoid at every layer; centers stay within the grid's box."""
    net = head().eval()
    for boxes in net.boxes:
        boxes[-1].bias.data[0] = 1.0
    x = net(torch.randn(1, 6, 12, 8)).codes[:, 0, :, 0]
    share = (x + 12) / 24
    for layer in (0, 1):
        torch.testing.assert_close(share[layer + 1].logit(), share[layer].logit() + 1, atol=1e-4, rtol=1e-4)
    for boxes in net.boxes:
        boxes[-1].bias.data[0] = 1e3
    assert (net(torch.randn(1, 6, 12, 8)).codes[..., 0] <= 12).all()


def test_reference_points_look_where_they_lie():
    """A bright cell at one corner of the map is seen by queries there, along x and y of the ego."""
    net = head(queries=2).eval()
    layer = net.layers[0].map
    with torch.no_grad():
        layer.sampling.offsets.bias.zero_()
        layer.value.weight.copy_(torch.eye(16)[:, :, None, None])
        layer.output.weight.copy_(torch.eye(16))
        for part in (layer.value, layer.output):
            part.bias.zero_()
    bev = torch.zeros(1, 16, 12, 8)
    bev[:, :, 10, 1] = 1.0
    at = torch.tensor([[10.5 / 12, 1.5 / 8], [1.5 / 12, 6.5 / 8]])
    seen = layer(torch.zeros(2, 16), at, bev, [2])
    torch.testing.assert_close(seen, torch.tensor([[1.0], [0.0]]).expand(2, 16), atol=1e-5, rtol=0)


def test_frames_of_a_batch_do_not_touch_each_other():
    net, bev = head(1).eval(), torch.randn(3, 6, 12, 8)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    both, alone = net(bev), net(bev[1:2])
    torch.testing.assert_close(both.codes[:, 1:2], alone.codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.logits[:, 1:2], alone.logits, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient_and_bf16_says_fp32():
    net = head()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(torch.randn(1, 6, 12, 8))
    assert found.logits.dtype == found.codes.dtype == torch.float32
    (found.logits.square().sum() + found.codes.square().sum()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def said(logits: list[list[float]], x: list[float]) -> Queried:
    codes = torch.zeros(1, 1, len(x), CODE)
    codes[0, 0, :, 0] = torch.tensor(x)
    return Queried(torch.tensor(logits)[None, None], codes)


def test_the_surest_pairs_of_query_and_class_are_said_equal_ones_in_order():
    outputs = said([[0.0, 2.0, -9.0], [2.0, 0.0, -9.0]], [1.0, 2.0])
    [found] = found_boxes(outputs, DetrConfig(most=4))
    assert found.classes.tolist() == [1, 0, 0, 1]
    assert found.boxes[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert found.scores == pytest.approx([0.880797, 0.880797, 0.5, 0.5])
    assert len(found_boxes(outputs, DetrConfig(most=1))[0].boxes) == 1
    assert len(found_boxes(outputs, DetrConfig(most=4, score_threshold=0.6))[0].boxes) == 2


def test_boxes_out_of_range_or_not_finite_are_not_said():
    outputs = said([[3.0, -9.0, -9.0]] * 4, [5.0, 61.3, -61.3, math.nan])
    [found] = found_boxes(outputs, DetrConfig(most=4))
    assert found.boxes[:, 0].tolist() == [5.0]
    [far] = found_boxes(outputs, DetrConfig(most=4, limits=(100.0, 1.0, 1.0)))
    assert far.boxes[:, 0].tolist() == [5.0, pytest.approx(61.3), pytest.approx(-61.3)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queries": 0}, "queries is 0, must be at least 1"),
        ({"heads": 3}, "channels is 256, must be divisible by heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"score_threshold": 1.0}, "score_threshold is 1.0"),
        ({"limits": (0.0, 1.0, 1.0)}, "limits is"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DetrConfig(**wrong)


def test_a_taxonomy_without_things_is_refused():
    with pytest.raises(ValueError, match="no class to detect"):
        DetrHead(6, GRID, (), DetrConfig())
