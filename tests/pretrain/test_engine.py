"""What a step costs besides the network, and a fused optimizer across a resume."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from occstream.pretrain import engine, guards
from occstream.pretrain.config import Config, TrainConfig
from occstream.pretrain.distributed import World
from occstream.pretrain.ema import Ema
from occstream.pretrain.engine import clip_gradients, or_nan
from occstream.pretrain.guards import FiniteGuard
from occstream.pretrain.meter import WARM, Meter
from tests.pretrain.inprocess import train, world  # noqa: F401  a fixture
from tests.pretrain.small import losses, pack_small

ALONE = World(0, 1, torch.device("cpu"))


class Ops(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def network(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(layers)))


def with_gradients(layers: int) -> SimpleNamespace:
    module = network(layers)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    return SimpleNamespace(module=module, optimizer=SimpleNamespace())


def test_judging_and_clipping_a_step_launches_as_much_for_many_parameters_as_for_few():
    counts = []
    for layers in (2, 50):
        made = with_gradients(layers)
        for p in made.module.parameters():
            assert not p._backward_hooks
        with Ops() as ops:
            norm = clip_gradients(made, 1e-3, ALONE)
        counts.append([n for n in ops.names if n not in ("aten::view", "aten::detach", "aten::unbind.int")])
        assert torch.nn.utils.get_total_norm([p.grad for p in made.module.parameters()]) == pytest.approx(
            1e-3, rel=1e-3
        )
        assert norm > 1e-3
    assert "aten::_foreach_norm.Scalar" in counts[0]
    assert len(counts[0]) == len(counts[1]) < 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_or_whose_square_is_not_shows_in_the_norm(value):
    made = with_gradients(3)
    next(made.module.parameters()).grad[0, 0] = value
    assert not torch.isfinite(clip_gradients(made, 5.0, ALONE))


def test_a_loss_that_is_not_finite_and_an_error_elsewhere_spoil_every_gradient_and_nothing_else_does():
    weight = torch.ones(3, requires_grad=True)
    for constant, errors, fine in (
        (0.0, 0.0, True),
        (float("inf"), 0.0, False),
        (float("nan"), 0.0, False),
        (0.0, 1.0, False),
    ):
        [grad] = torch.autograd.grad(or_nan((weight * 2).sum() + constant, torch.tensor(errors)), weight)
        assert bool(grad.isfinite().all()) == bool(grad.isfinite().any()) == fine
        assert not fine or torch.equal(grad, torch.full((3,), 2.0))


def test_the_average_follows_parameters_and_buffers_also_new_ones():
    module, config = network(2), TrainConfig(ema_start=0, ema_decay=0.5)
    mean = Ema(module, config)
    with torch.no_grad():
        module[0][0].weight += 1.0
        module[1][1].running_mean = torch.full((4,), 3.0)  # another tensor than at the start
    before = {name: value.clone() for name, value in mean.values.items()}
    decay = 0.5 * (1 - torch.exp(torch.tensor(-1 / 2000))).item()
    mean.update()
    for name, value in {"0.0.weight": module[0][0].weight, "1.1.running_mean": module[1][1].running_mean}.items():
        assert torch.allclose(mean.values[name], before[name].lerp(value.detach(), 1 - decay), atol=1e-5), name


def test_numbers_of_a_step_are_asked_for_one_step_later():
    """With a fused optimizer the update looks at the norm itself; the host waits for nothing that is not there yet."""
    made = with_gradients(2)
    made.is_gradient_accumulation_boundary, made.zero_optimization_stage = (lambda: True), (lambda: 0)
    made.backward, made.step = (lambda loss: None), mock.Mock()
    heard = []
    with mock.patch.object(guards, "decides", return_value=True):
        guard = FiniteGuard(made, Config(), None, ALONE, heard=lambda *flags: heard.append(flags))
    for step in range(3):
        guard.begin(step)
        guard.backward(torch.tensor(1.0), ["a-0"], torch.tensor([0.0, float(step)]))
        assert guard.step()
        assert made.optimizer.found_inf == 0.0
        assert heard == [(0.0, float(n)) for n in range(step)]
    guard.settle()
    guard.settle()
    assert [stops for _, stops in heard] == [0.0, 1.0, 2.0]
    assert made.step.call_count == 3


def test_a_fused_optimizer_goes_on_where_it_was_and_where_another_was(tmp_path, world):  # noqa: F811
    pack_small(str(tmp_path / "data"))

    def run(name, steps, fused):
        words = [f"train.steps={steps}", "train.save_every=2", "optim.schedule=constant", "eval.scenes=1"]
        with (
            mock.patch.object(engine, "fuses", return_value=fused),
            mock.patch.object(guards, "decides", return_value=fused),
        ):
            train(world, "pretrain", str(tmp_path / "data"), tmp_path / name, *words)
        return losses(tmp_path / name)

    plain, whole = run("plain", 4, False), run("whole", 4, True)
    run("parts", 2, True)
    run("moved", 2, False)
    found = {"parts": run("parts", 4, True), "moved": run("moved", 4, True), "whole": whole}
    for name, other in found.items():
        assert sorted(other) == [1, 2, 3, 4]
        for step, parts in plain.items():
            assert other[step]["train/loss"] == pytest.approx(parts["train/loss"], abs=1e-5), (name, step)
            assert other[step]["opt/grad_norm"] == pytest.approx(parts["opt/grad_norm"], rel=1e-3), (name, step)


def test_ending_a_step_reads_nothing_back_before_the_next(monkeypatch):
    """The guard of a fused optimizer: one read-back of numbers that were copied a step before."""
    made = with_gradients(3)
    made.is_gradient_accumulation_boundary, made.zero_optimization_stage = (lambda: True), (lambda: 0)
    made.backward, made.step = (lambda loss: None), mock.Mock()
    with mock.patch.object(guards, "decides", return_value=True):
        guard = FiniteGuard(made, Config(), None, ALONE, heard=lambda *flags: None)
    for step in range(2):
        with Ops() as ops:
            guard.begin(step)
            guard.backward(torch.tensor(1.0, requires_grad=True), ["a-0"], torch.zeros(2))
            guard.step()
        assert ops.names.count("aten::_local_scalar_dense") == step, "the norm of the step before, on the host already"
        assert not {"aten::nonzero", "aten::is_nonzero", "aten::equal"} & set(ops.names)


def test_the_forward_of_a_step_is_timed_when_the_device_has_done_it(monkeypatch):
    """The host is a step ahead of the device: events are read one step later, not waited for."""
    clock, asked = iter(range(1000)), []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            asked.append(self.at)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = Meter(0, 9, SimpleNamespace(waited=0.0), World(0, 1, torch.device("cuda", 0)))
    for step in range(6):
        with meter.forward():
            next(clock)
        meter.step()
        assert len(asked) == max(0, step - WARM), "those of the step before, after the warm ones"
    assert list(meter.own) == [2.0] * 3
    assert len(meter.times) == len(meter.waits) == 4
