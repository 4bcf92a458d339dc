"""Batch norm over ranks against one float64 batch norm of the joint batch. Ranks are threads that meet at a barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from occstream.models import syncnorm
from occstream.models.layers import SyncBatchNorm, checkpointed


class Ranks:
    """Runs a function as several ranks at once and counts the collectives of rank 0."""

    def __init__(self, count, monkeypatch):
        self.count, self.barrier, self.here = count, threading.Barrier(count, timeout=20), threading.local()
        self.rows, self.collectives = [None] * count, 0
        monkeypatch.setattr("occstream.models.layers.world_size", lambda: count)
        monkeypatch.setattr(syncnorm, "world_size", lambda: count)
        monkeypatch.setattr(syncnorm, "gather", lambda row: torch.stack(self.exchange(row)))
        monkeypatch.setattr(syncnorm, "add_up", lambda values: torch.stack(self.exchange(values)).sum(0))

    def exchange(self, row):
        self.collectives += self.here.rank == 0
        self.rows[self.here.rank] = row.clone()
        self.barrier.wait()
        found = list(self.rows)
        self.barrier.wait()
        return found

    def run(self, work):
        def one(rank):
            self.here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def drawn(*shape, mean=0.0):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g) + mean


def expected(x, grad, weight, bias):
    """y, gradients of x, weight and bias, and unbiased moments of the joint batch, in float64."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    mean, var = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.double()), mean, var


@pytest.mark.parametrize("steps", ["plain", "fused"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("shape", [(7, 4, 3, 5), (7, 4, 2, 3, 2), (7, 4)])
def test_ranks_with_unequal_shares_are_one_batch_where_the_mean_is_large(ranks, shape, steps, monkeypatch):
    """mean / std = 1e4: what E[x²] − E[x]² gives there is noise. The fused path is the same code around CUDA's functions:
    here their references stand in for them, which asks that they are called as torch's own signatures say."""
    if steps == "fused":
        monkeypatch.setattr(syncnorm, "steps_for", lambda x: by_signature())
    x, grad = drawn(*shape, mean=1e4), drawn(*shape).flip(0)
    weight, bias = drawn(4) + 2, drawn(4).flip(0)
    parts = [slice(0, 1), slice(1, 7)] if ranks == 2 else [slice(0, 1), slice(1, 5), slice(5, 7)]
    group = Ranks(ranks, monkeypatch)

    def work(rank):
        norm = SyncBatchNorm(4, momentum=1.0)
        norm.weight.data.copy_(weight)
        norm.bias.data.copy_(bias)
        mine = x[parts[rank]].clone().requires_grad_()
        y = norm(mine)
        y.backward(grad[parts[rank]])
        return y.detach(), mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var

    found = list(zip(*group.run(work)))
    y, to_x, to_weight, to_bias, mean, var = expected(x, grad, weight, bias)
    # The mean itself has steps of 1e-3 in fp32.
    close = {"atol": 4e-3, "rtol": 1e-3}
    torch.testing.assert_close(torch.cat(found[0]).double(), y, **close)
    torch.testing.assert_close(torch.cat(found[1]).double(), to_x, **close)
    torch.testing.assert_close(sum(found[2]).double(), to_weight, atol=0.1, rtol=1e-3)
    torch.testing.assert_close(sum(found[3]).double(), to_bias, atol=1e-4, rtol=1e-4)
    for rank in range(ranks):
        torch.testing.assert_close(found[4][rank].double(), mean, atol=2e-3, rtol=0)
        torch.testing.assert_close(found[5][rank].double(), var, atol=1e-3, rtol=1e-3)
    assert group.collectives == 2, "one forward, one backward"


def by_signature():
    """The references behind the names and argument orders of torch's fused functions."""
    pairs = {
        "stats": "batch_norm_stats",
        "join": "batch_norm_gather_stats_with_counts",
        "elementwise": "batch_norm_elemt",
        "backward_sums": "batch_norm_backward_reduce",
        "backward_elementwise": "batch_norm_backward_elemt",
    }

    def bound(name, operator):
        assert getattr(syncnorm.FUSED, name) is getattr(torch, operator)
        schema = getattr(torch.ops.aten, operator).default._schema

        def call(*args):
            assert len(args) == len(schema.arguments), schema
            for value, argument in zip(args, schema.arguments):
                wanted = torch.Tensor if "Tensor" in str(argument.type) else (bool, float, int)
                assert isinstance(value, wanted), (operator, argument.name)
                assert not isinstance(value, torch.Tensor) or value.is_contiguous()
            return getattr(syncnorm.PLAIN, name)(*args)

        return call

    return SimpleNamespace(**{name: bound(name, operator) for name, operator in pairs.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_the_input_as_it_came(dtype, monkeypatch):
    group, kept = Ranks(2, monkeypatch), []

    def work(rank):
        norm, x = SyncBatchNorm(4), drawn(6, 4, 8, 8).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((rank, t)) or t, lambda t: t):
            y = norm(x)
        y.sum().backward()
        return x, y

    found = group.run(work)
    assert all(y.dtype == dtype for _, y in found)
    large = [t for rank, t in kept if t.numel() > 100 and rank == 0]
    assert [t.dtype for t in large] == [dtype], "no wide copy of it, no mask, no product"
    assert sum(t.nbytes for rank, t in kept if rank == 0 and t.numel() <= 100) < 100


def test_a_recomputed_forward_asks_no_rank_and_counts_nothing(monkeypatch):
    found, group = [], Ranks(2, monkeypatch)
    for when in (False, True):
        group.collectives, nets = 0, []
        for _ in range(2):
            torch.manual_seed(0)
            layers = (nn.Linear(4, 4), SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 4), SyncBatchNorm(4))
            nets.append(nn.Sequential(*layers))

        def work(rank, when=when, nets=nets):
            net = nets[rank]
            x = drawn(6, 4)[rank::2].requires_grad_()
            y = checkpointed(net, x, when=when)
            y.square().sum().backward(retain_graph=True)
            y.sum().backward()  # a second recomputation
            return y.detach(), x.grad, [p.grad for p in net.parameters()], [b.clone() for b in net.buffers()]

        found.append((group.run(work), group.collectives))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert [count for _, count in found] == [6, 6], "two norms, forward and two backward passes"


def test_one_process_uses_torchs_own_batch_norm():
    """The same numbers as nn.BatchNorm3d, its state dict, and its mode for evaluation."""
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm3d(4)
    x = drawn(3, 4, 2, 3, 4, mean=5.0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_more_elements_than_int32_counts_are_joined_exactly(monkeypatch):
    """The fused function adds up counts as int32."""
    monkeypatch.setattr(syncnorm, "steps_for", lambda x: syncnorm.FUSED)
    x = torch.empty(1).expand(8, 4, 640_000)
    for ranks, wanted in ((8, torch.batch_norm_gather_stats_with_counts), (500, syncnorm.join)):
        monkeypatch.setattr(syncnorm, "world_size", lambda ranks=ranks: ranks)
        assert syncnorm.joins_for(x) is wanted
    means = torch.tensor([1.0, -1.0]).repeat(250).unsqueeze(1)
    moments, counts = (torch.zeros(1), torch.zeros(1)), torch.full((500,), 5_120_000.0)
    mean, invstd = syncnorm.joins_for(x)(x, means, torch.ones(500, 1), *moments, 1.0, 0.0, counts)
    torch.testing.assert_close([mean, invstd], [torch.zeros(1), torch.full((1,), 0.5**0.5)])
    torch.testing.assert_close(moments, (torch.zeros(1), torch.full((1,), 2.0)))
