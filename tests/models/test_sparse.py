"""Sparse convolution against dense ``conv3d`` with masks, in both back ends."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from occstream.models import sparse
from occstream.models.sparse import (
    SparseBatchNorm,
    SparseConv3d,
    SparseInverseConv3d,
    SparseSequential,
    SparseTensor,
    SubMConv3d,
)
from tests.models.helpers import two_equal_ranks

SHAPE = (11, 24, 30)  # z, y, x: no two alike
needs_spconv = pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is not installed")
BACKENDS = ["torch", pytest.param("spconv", marks=needs_spconv)]
STRIDED = [
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
    ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((2, 3, 4), (1, 2, 3), (1, 0, 2)),
]


def scattered(count=400, channels=5, shape=SHAPE, batch=2, seed=0, dtype=torch.float32):
    """Random voxels in random order: features (N, C), indices (N, 4)."""
    g = torch.Generator().manual_seed(seed)
    total = batch * shape[0] * shape[1] * shape[2]
    keys = torch.randperm(total, generator=g)[: min(count, total)]
    found = []
    for size in reversed(shape):
        found.insert(0, keys % size)
        keys = keys // size
    return torch.randn(len(keys), channels, generator=g, dtype=dtype), torch.stack([keys, *found], 1)


def dense_weight(layer):
    return layer.weight.permute(0, 4, 1, 2, 3)


def active(x: SparseTensor):
    return x.replace(torch.ones_like(x.features[:, :1])).dense()


def check(layer, x, expected, mask):
    """Values, voxels and gradients of a layer against those of the dense computation ``expected(features, weight)``."""
    features = x.features.detach().clone().requires_grad_()
    out = layer(x.replace(features))
    assert torch.equal(active(out), mask)
    target = expected(x.replace(features).dense()) * mask
    close(out.dense(), target)
    torch.manual_seed(1)
    upstream = torch.randn_like(target)
    parameters = [features, *layer.parameters()]
    ours = torch.autograd.grad((out.dense() * upstream).sum(), parameters)
    dense = torch.autograd.grad((target * upstream).sum(), parameters)
    for a, b in zip(ours, dense, strict=True):
        close(a, b)
    return out


def close(a, b):
    """To 1e-5 of the largest value."""
    assert a.shape == b.shape
    largest = b.detach().abs().max().item() if b.numel() else 0
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 5), (3, 1, 1), (1, 1, 1)])
def test_submanifold_is_the_dense_convolution_at_the_active_voxels(kernel, backend):
    x = SparseTensor.of(*scattered(1500), SHAPE, 2)
    torch.manual_seed(0)
    layer = SubMConv3d(5, 7, kernel, bias=True, backend=backend)
    padding = tuple(k // 2 for k in kernel)
    check(layer, x, lambda d: F.conv3d(d, dense_weight(layer), layer.bias, padding=padding), active(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), STRIDED)
def test_strided_is_the_dense_convolution(kernel, stride, padding, backend):
    x = SparseTensor.of(*scattered(), SHAPE, 2)
    torch.manual_seed(0)
    layer = SparseConv3d(5, 6, kernel, stride, padding=padding, backend=backend)
    mask = (F.conv3d(active(x), torch.ones(1, 1, *kernel), None, stride, padding) > 0).float()
    check(layer, x, lambda d: F.conv3d(d, dense_weight(layer), None, stride, padding), mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), STRIDED[:3])
def test_inverse_goes_back_to_the_voxels_it_came_from(kernel, stride, padding, backend):
    x = SparseTensor.of(*scattered(), SHAPE, 2)
    torch.manual_seed(0)
    down = SparseConv3d(5, 4, kernel, stride, padding=padding, indice_key="down", backend=backend)
    between = SubMConv3d(4, 4, 3, indice_key="between", backend=backend)
    up = SparseInverseConv3d(4, 3, kernel, "down", bias=True, backend=backend)
    low = between(down(x))
    rest = [
        n - ((m - 1) * s - 2 * p + k) for n, m, s, p, k in zip(SHAPE, low.shape, stride, padding, kernel, strict=True)
    ]

    def dense(d):
        # The inverse of a convolution is the transposed one; their weights are laid out (in, out, z, y, x).
        weight = up.weight.permute(4, 0, 1, 2, 3)
        return F.conv_transpose3d(d, weight, up.bias, stride, padding, rest)

    out = check(up, low, dense, active(x))
    assert out.shape == SHAPE
    assert torch.equal(out.indices, x.indices)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.integers(1, 3),
    st.integers(0, 60),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 9),
)
def test_any_grid_kernel_and_stride(shape, batch, count, kernel, stride, seed):
    # In float64: torch's dense convolution in float32 reads beyond thin grids at some strides (2.13, CPU).
    x = SparseTensor.of(*scattered(count, 2, shape, batch, seed, torch.float64), shape, batch)
    padding = tuple(k // 2 for k in kernel)
    layer = SparseConv3d(2, 3, kernel, stride, padding=padding).double()
    mask = (F.conv3d(active(x), torch.ones(1, 1, *kernel).double(), None, stride, padding) > 0).double()
    check(layer, x, lambda d: F.conv3d(d, dense_weight(layer), None, stride, padding), mask)
    odd = tuple(2 * (k // 2) + 1 for k in kernel)
    layer = SubMConv3d(2, 3, odd).double()
    check(layer, x, lambda d: F.conv3d(d, dense_weight(layer), padding=tuple(k // 2 for k in odd)), active(x))


def test_gradients_in_float64():
    features, indices = scattered(9, 2, (3, 3, 4), 1, dtype=torch.float64)
    x = SparseTensor.of(features, indices, (3, 3, 4), 1)
    net = SparseSequential(
        SubMConv3d(2, 2, (1, 3, 3), bias=True, indice_key="a"),
        nn.Tanh(),
        SparseConv3d(2, 2, (3, 1, 3), 2, padding=(1, 0, 1), indice_key="b"),
        SparseInverseConv3d(2, 1, (3, 1, 3), "b"),
    ).double()
    names = [name for name, _ in net.named_parameters()]

    def run(values, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x.replace(values),)).features

    values = x.features.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (values, *net.parameters()))


def network(backend):
    torch.manual_seed(3)
    options = {"backend": backend}
    return SparseSequential(
        SubMConv3d(5, 8, indice_key="s1", **options),
        SparseBatchNorm(8),
        nn.ReLU(),
        SubMConv3d(8, 8, bias=True, indice_key="s1", **options),
        SparseConv3d(8, 8, 3, 2, padding=1, indice_key="d", **options),
        SubMConv3d(8, 8, indice_key="s2", **options),
        SparseInverseConv3d(8, 4, 3, "d", **options),
        SubMConv3d(4, 4, indice_key="s1", **options),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_in_every_run_and_order_of_rows(backend, threads):
    features, indices = scattered(600)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for i in range(4):
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(i))
            net = network(backend)
            out = net(SparseTensor.of(features[order], indices[order], SHAPE, 2)).dense()
            out.square().sum().backward()
            found.append([out, *(p.grad for p in net.parameters())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_spconv
@pytest.mark.parametrize("training", [True, False])
def test_back_ends_agree(training):
    found = []
    for backend in ("torch", "spconv"):
        net = network(backend).train(training)
        x = SparseTensor.of(*scattered(3000), SHAPE, 2)
        out = net(x.replace(x.features.requires_grad_())).dense()
        out.square().mean().backward()
        found.append([out, x.features.grad, *(p.grad for p in net.parameters())])
        with torch.no_grad():
            close(network(backend).train(training)(x).dense(), out)
    for a, b in zip(*found, strict=True):
        close(a, b)


@needs_spconv
def test_back_ends_have_the_same_weights_and_draw_the_same_numbers():
    a, b = network("torch"), network("spconv")
    assert {k: v.tolist() for k, v in a.state_dict().items()} == {k: v.tolist() for k, v in b.state_dict().items()}
    state = torch.get_rng_state()
    b(SparseTensor.of(*scattered(), SHAPE, 2))
    assert torch.equal(torch.get_rng_state(), state)
    library = pytest.importorskip("spconv.pytorch")
    theirs = library.SubMConv3d(5, 8, 3, bias=False)
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in a[0].state_dict().items()
    ]


@needs_spconv
def test_an_error_of_spconv_is_one_line(monkeypatch):
    def fails(*_):
        raise ValueError("first\nsecond")

    x = SparseTensor.of(*scattered(), SHAPE, 2)
    monkeypatch.setattr(sparse._spconv().SubMConv3d, "forward", fails)
    with pytest.raises(RuntimeError, match=r"^spconv failed in SubMConv3d on 400 voxels .*: first; .*$"):
        SubMConv3d(5, 8, backend="spconv")(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_two_back_ends_are_not_mixed(backend):
    other = {"torch": "spconv", "spconv": "torch"}[backend]
    if other == "spconv":
        pytest.importorskip("spconv")
    x = SparseTensor.of(*scattered(), SHAPE, 2)
    x = SubMConv3d(5, 5, indice_key="a", backend="spconv")(x)
    with pytest.raises(ValueError, match="one back end"):
        SubMConv3d(5, 5, indice_key="a")(x)
    x = SparseConv3d(5, 5, 3, 2, padding=1, indice_key="b", backend="spconv")(x)
    with pytest.raises(ValueError, match="one back end"):
        SubMConv3d(5, 5, indice_key="c")(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_and_a_single_voxel(count, training, backend):
    net = network(backend).train(training)
    x = SparseTensor.of(*scattered(count), SHAPE, 2)
    out = net(x)
    assert out.dense().shape == (2, 4, *SHAPE)
    assert torch.equal(out.indices, x.indices)
    out.dense().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(torch.isfinite(b).all() for b in net.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_voxel_that_reaches_no_output_leaves_nothing(backend):
    x = SparseTensor.of(torch.ones(1, 3), torch.tensor([[0, 11, 4, 4]]), (12, 9, 9), 1)
    down = SparseConv3d(3, 4, 3, 2, padding=(0, 1, 1), indice_key="down", backend=backend)
    between = SubMConv3d(4, 4, indice_key="between", backend=backend)
    up = SparseInverseConv3d(4, 2, 3, "down", backend=backend)
    low = between(down(x))
    assert low.features.shape == (0, 4)
    out = up(low)
    assert out.features.tolist() == [[0, 0]]
    out.features.sum().backward()
    assert not any(p.grad.any() for layer in (down, between, up) for p in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_grid_of_a_batch_may_be_empty(backend):
    features, indices = scattered(300, batch=1)
    alone = network(backend).eval()(SparseTensor.of(features, indices, SHAPE, 1)).dense()
    indices[:, 0] = 1
    both = network(backend).eval()(SparseTensor.of(features, indices, SHAPE, 3)).dense()
    assert torch.equal(both[1:2], alone)
    assert not both[[0, 2]].any()


def test_a_rank_without_voxels_joins_the_batch_norm():
    norm = SparseBatchNorm(4)
    with two_equal_ranks():
        out = norm(torch.zeros(0, 4, requires_grad=True))
        out.sum().backward()
    assert out.shape == (0, 4)
    assert norm.running_mean.isfinite().all()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_computes_in_fp32_under_autocast(backend):
    x = SparseTensor.of(*scattered(), SHAPE, 2)
    plain = network(backend).eval()(x).features
    with torch.autocast("cpu", torch.bfloat16):
        cast = network(backend).eval()(x).features
        half = network(backend).eval()(x.replace(x.features.bfloat16())).features
    assert torch.equal(plain, cast)
    assert half.dtype == torch.float32
    assert (half - plain).abs().max().item() / plain.abs().max().item() < 2e-2


def test_a_rulebook_is_built_once_and_nothing_gathered_is_kept(monkeypatch):
    built = []
    for name in ("submanifold_pairs", "strided_pairs"):
        ours = getattr(sparse, name)
        monkeypatch.setattr(sparse, name, lambda *a, ours=ours, name=name: built.append(name) or ours(*a))
    x = SparseTensor.of(*scattered(1000), SHAPE, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = SparseSequential(
            *[SubMConv3d(5, 5, indice_key="a") for _ in range(3)], SparseConv3d(5, 5, 3, 2, padding=1)
        )(x)
    assert built == ["submanifold_pairs", "strided_pairs"]
    assert sorted(kept) == sorted(4 * [torch.Size([1000, 5]), torch.Size([5, 3, 3, 3, 5])])
    out.features.sum().backward()
    assert len(built) == 2


def test_indices_that_no_grid_has_are_refused():
    features, indices = scattered(20)
    indices[7] = torch.tensor([1, 11, 3, 2])
    with pytest.raises(ValueError, match=r"\(1, 11, 3, 2\) is outside of 2 grids of \(11, 24, 30\)"):
        SparseTensor.of(features, indices, SHAPE, 2)
    indices[7] = torch.tensor([2, 10, 3, 2])
    with pytest.raises(ValueError, match="outside"):
        SparseTensor.of(features, indices, SHAPE, 2)
    indices[7] = torch.tensor([0, 0, -1, 2])
    with pytest.raises(ValueError, match="outside"):
        SparseTensor.of(features, indices, SHAPE, 2)
    indices[7] = indices[3]
    with pytest.raises(ValueError, match=r"given more than once; 1 rows too many"):
        SparseTensor.of(features, indices, SHAPE, 2)
    with pytest.raises(ValueError, match="need features"):
        SparseTensor.of(features, indices[:, 1:], SHAPE, 2)
    with pytest.raises(ValueError, match="integer"):
        SparseTensor.of(features, indices.float(), SHAPE, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_other_kernels_or_voxels_are_refused(backend):
    x = SparseTensor.of(*scattered(), SHAPE, 2)
    x = SubMConv3d(5, 5, indice_key="a", backend=backend)(x)
    with pytest.raises(ValueError, match="'a' is used by layers of different kernels or voxels"):
        SubMConv3d(5, 5, (3, 1, 1), indice_key="a", backend=backend)(x)
    low = SparseConv3d(5, 5, 3, 2, padding=1, indice_key="b", backend=backend)(x)
    with pytest.raises(ValueError, match="different kernels or voxels"):
        SubMConv3d(5, 5, indice_key="a", backend=backend)(low)
    with pytest.raises(ValueError, match="needs the output voxels"):
        SparseInverseConv3d(5, 5, 3, "b", backend=backend)(x)
    with pytest.raises(ValueError, match="needs the output voxels"):
        SparseInverseConv3d(5, 5, 3, "c", backend=backend)(low)
    with pytest.raises(ValueError, match="5 channels got 6"):
        SubMConv3d(5, 5, backend=backend)(x.replace(torch.zeros(400, 6)))


def test_an_even_submanifold_kernel_is_refused():
    with pytest.raises(ValueError, match="must be odd"):
        SubMConv3d(5, 5, 2)


def test_the_back_end_is_chosen_in_words(monkeypatch):
    assert sparse.choose_backend("torch") == "torch"
    assert sparse.choose_backend("auto") == ("spconv" if torch.cuda.is_available() else "torch")
    with pytest.raises(ValueError, match="must be auto, torch or spconv"):
        sparse.choose_backend("minkowski")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sparse.choose_backend("auto") == "torch"
    with pytest.raises(ValueError, match=r"not installed: pip install -e '\.\[gpu\]'"):
        sparse.choose_backend("spconv")

    def broken():
        raise OSError("libcudart.so.12: cannot open\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(sparse, "_spconv", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(libcudart.so.12: cannot open\)"):
        sparse.choose_backend("spconv")
    with pytest.warns(UserWarning, match="cannot be imported"):
        assert sparse.choose_backend("auto") == "torch"
