"""Learning rates by samples, groups of parameters, and settings under their old names."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from occstream.pretrain import renamed
from occstream.pretrain.checkpoint import Checkpoint
from occstream.pretrain.config import load_config, parse_config
from occstream.pretrain.optim import OptimConfig, Schedule, describe_groups, make_optimizer, parameter_groups
from occstream.pretrain.optimstate import load_optimizer_state
from occstream.pretrain.renamed import saved_settings
from occstream.pretrain.resume import check_same_run
from tests.pretrain.inprocess import train, world  # noqa: F401  a fixture
from tests.pretrain.small import RECIPE, losses, pack_small


def optim(*words: str) -> OptimConfig:
    return load_config(RECIPE, list(words)).optim


# Learning rate

BATCH, STEPS, EPOCH = 4, 50, 40  # ten steps in an epoch
EXPECTED = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.02),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [20, 40], gamma=0.3),
    "exponential": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9 ** (step // 10)),
    # Torch reaches the peak and the end one step early: it counts to the last step, not to the end of the run.
    "onecycle": lambda o: lr_scheduler.OneCycleLR(
        o, 2.0, STEPS + 1, pct_start=(0.3 * STEPS + 1) / (STEPS + 1), div_factor=5, final_div_factor=50,
        base_momentum=0.8, max_momentum=0.96,
    ),
}  # fmt: skip
WORDS = {
    "cosine": ["optim.min_lr_ratio=0.01"],
    "multistep": ["optim.milestones=[2, 4]", "optim.milestone_factor=0.3"],
    "exponential": ["optim.epoch_factor=0.9"],
    "onecycle": ["optim.pct_start=0.3", "optim.div_factor=5", "optim.final_div_factor=50", "optim.moms=[0.96, 0.8]"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_schedules_are_those_of_torch(name):
    config = optim(f"optim.schedule={name}", "optim.warmup=0", "optim.lr=2", "optim.betas=[0.9, 0.99]", *WORDS[name])
    schedule = Schedule(config, BATCH, BATCH * STEPS, EPOCH)
    ours, theirs = (torch.optim.Adam([{"params": [nn.Parameter(torch.ones(1))], "lr_factor": 1.0}], 2.0) for _ in "ab")
    scheduler = EXPECTED[name](theirs)
    for step in range(STEPS):
        assert schedule.apply(ours, step * BATCH) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6), step
        assert ours.param_groups[0]["lr"] == schedule.lr(step * BATCH)
        first = theirs.param_groups[0]["betas"][0] if name == "onecycle" else 0.9
        assert ours.param_groups[0]["betas"] == pytest.approx((first, 0.99), rel=1e-6), step
        theirs.step()
        scheduler.step()


def test_an_epoch_of_the_exponential_schedule_is_a_step_of_torchs():
    config = optim("optim.schedule=exponential", "optim.warmup=0", "optim.lr=1", "optim.epoch_factor=0.5")
    schedule = Schedule(config, BATCH, BATCH * STEPS, EPOCH)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)
    scheduler = lr_scheduler.ExponentialLR(other, 0.5)
    for epoch in range(5):
        assert schedule.lr(epoch * EPOCH) == schedule.lr(epoch * EPOCH + EPOCH - 1) == other.param_groups[0]["lr"]
        other.step()
        scheduler.step()


def test_rates_depend_on_samples_not_on_steps_of_this_start():
    """Half the batch, twice the steps: the same rate after the same samples, warm-up (of as many samples) included."""
    for name, words in {**WORDS, "constant": []}.items():
        config = [optim(f"optim.schedule={name}", f"optim.warmup={n}", *words) for n in (5, 10)]
        large, small = Schedule(config[0], 4, 200, 40), Schedule(config[1], 2, 200, 40)
        assert [large.lr(n) for n in range(0, 200, 4)] == [small.lr(n) for n in range(0, 200, 4)], name


def test_warm_up_is_a_line_from_a_thousandth():
    for name in ("constant", "cosine"):
        config = optim(f"optim.schedule={name}", "optim.warmup=10", "optim.lr=1", "optim.min_lr_ratio=0.001")
        schedule = Schedule(config, 4, 400, 400)
        assert [schedule.lr(n) for n in (0, 20, 40)] == pytest.approx([0.001, 0.5005, 1.0])
        end = {"constant": 1.0, "cosine": 0.001}[name]
        assert [schedule.lr(n) for n in (220, 400)] == pytest.approx([(1 + end) / 2, end])


# Groups


def network() -> nn.Module:
    images = nn.Sequential()
    images.add_module("backbone", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    images.add_module("neck", nn.Linear(4, 2))
    model = nn.Sequential()
    model.add_module("images", images)
    model.add_module("head", nn.Linear(2, 1))
    return model


def names(model: nn.Module, group: dict) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_without_settings_there_is_one_group_in_the_models_order():
    model = network()
    [group] = parameter_groups(model, optim())
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["name"], group["lr_factor"], group["weight_decay"]) == ("rest", 1.0, 0.01)


def test_the_innermost_module_counts_and_vectors_may_go_without_decay():
    model = network()
    model.head.bias.requires_grad = False
    words = ["optim.groups.images=0.1", "optim.groups.images.backbone=0.5", "optim.weight_decay=0.2"]
    config = optim(*words, "optim.decay_groups={images.neck: 0.5}", "optim.decay_vectors=false")
    groups = {g["name"]: g for g in parameter_groups(model, config)}
    assert {name: (g["lr_factor"], g["weight_decay"], names(model, g)) for name, g in groups.items()} == {
        "images.backbone": (0.5, 0.2, ["images.backbone.0.weight"]),
        "images.backbone, without decay": (
            0.5,
            0.0,
            ["images.backbone.0.bias", "images.backbone.1.weight", "images.backbone.1.bias"],
        ),
        "images, decay of images.neck": (0.1, 0.1, ["images.neck.weight"]),
        "images, decay of images.neck, without decay": (0.1, 0.0, ["images.neck.bias"]),
        "rest": (1.0, 0.2, ["head.weight"]),
    }
    assert "rest: 2 parameters, lr x 1, weight decay 0.2" in describe_groups(groups.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optim.groups.image=1"],
            r"\.groups names 'image', .*has images, head, frozen, again; did you mean 'images'\?",
        ),
        (["optim.groups={images.bone: 1}"], r"names 'images\.bone', .*images has backbone, neck"),
        (["optim.decay_groups.hea=0"], r"optim\.decay_groups names 'hea', .*did you mean 'head'"),
        (["optim.groups={images: 1, images.neck: 2, images.backbone: 3}"], r"optim\.groups\.images changes nothing"),
        (["optim.groups.frozen=2"], r"optim\.groups\.frozen changes nothing: no parameter there learns"),
        (["optim.groups.again=2"], r"head\.bias.* are one tensor, but belong to different groups"),
    ],
)
def test_groups_that_name_nothing_are_one_line(words, message):
    model = network()
    model.add_module("frozen", nn.Linear(1, 1).requires_grad_(False))
    model.add_module("again", nn.Linear(2, 1))
    model.again.bias = model.head.bias
    with pytest.raises(ValueError, match=message) as caught:
        parameter_groups(model, optim(*words))
    assert "\n" not in str(caught.value)


def test_a_tied_tensor_is_in_its_group_once():
    model = network()
    model.add_module("again", nn.Linear(2, 1))
    model.again.bias = model.head.bias
    [group] = parameter_groups(model, optim())
    assert names(model, group) == [name for name, _ in model.named_parameters()]


def test_adam_adds_the_decay_to_the_gradient_and_betas_and_eps_are_used():
    def moved(*words):
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        config = optim("optim.lr=0.1", "optim.weight_decay=0.5", *words)
        optimizer = make_optimizer(model, config, fused=False)
        for gradient in (1.0, 3.0):
            model.weight.grad = torch.full_like(model.weight, gradient)
            optimizer.step()
        return float(model.weight.detach())

    def expected(decoupled, b1=0.9, b2=0.999, eps=1e-8):
        w, m, v = 1.0, 0.0, 0.0
        for t, gradient in enumerate((1.0, 3.0), 1):
            g = gradient if decoupled else gradient + 0.5 * w
            w = w * (1 - 0.1 * 0.5) if decoupled else w
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            w -= 0.1 * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
        return w

    assert moved() == pytest.approx(expected(True), rel=1e-5)
    assert moved("optim.optimizer=adam") == pytest.approx(expected(False), rel=1e-5)
    changed = moved("optim.betas=[0.5, 0.9]", "optim.eps=0.5")
    assert changed == pytest.approx(expected(True, 0.5, 0.9, 0.5), rel=1e-5)


# Settings


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=0", "optim: lr is 0.0, must be positive"),
        ("optim.betas=[0.9, 1]", r"betas is \[0.9, 1.0\], must be at least 0 and below 1"),
        ("optim.pct_start=1", "pct_start is 1.0, must be between 0 and 1"),
        ("optim.div_factor=0.5", "div_factor is 0.5, must be at least 1"),
        ("optim.milestones=[3, 2]", "must be positive and rise"),
        ("optim.schedule=multistep", r"needs epochs to go down after, for example milestones=\[20, 23\]"),
        ("optim.epoch_factor=2", "epoch_factor is 2.0, must be at most 1"),
        ("optim.groups.images=-1", r"groups.images is -1.0, must not be negative"),
        ("optim.groups.images=x", r"optim.groups = .*valid number"),
        ("train.lr=1e-3", r"settings have new names: train.lr is now optim.lr"),
        ("loss.normaliser=valid", r"loss.normaliser is now loss.normalizer"),
    ],
)
def test_values_that_cannot_be_and_old_names_are_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(RECIPE, [word])
    assert "\n" not in str(caught.value)


def older(config) -> dict:
    """Settings as version 0.1 wrote them."""
    settings = json.loads(json.dumps(config.to_dict()))
    for old, new in renamed.RENAMED.items():
        (section, _, key), (now, _, name) = old.partition("."), new.partition(".")
        settings[section][key] = settings[now].pop(name)
    del settings["optim"]
    return settings


def test_settings_in_checkpoints_of_earlier_versions_are_read_under_their_new_names(capsys):
    words = ["optim.lr=0.5", "optim.clip=7", "optim.schedule=cosine", "loss.normalizer=valid"]
    config = load_config(RECIPE, [*words, "loss.replay_normalizer=joint"])
    renamed._say_once.cache_clear()
    state = {"config": older(config), "fingerprints": {}}
    for _ in range(2):
        assert parse_config(saved_settings(state)).to_dict() == config.to_dict()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "train.lr is now optim.lr" in said
    assert "loss.replay_normaliser is now loss.replay_normalizer" in said
    check_same_run(config, {}, SimpleNamespace(path="step", state=state))
    assert "lr" in state["config"]["train"], "the checkpoint's own settings stay"


# Resuming


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("optim") / "data")
    pack_small(url)
    return url


def test_a_resumed_run_with_groups_and_one_cycle_is_the_uninterrupted_one(data, tmp_path, world, capsys):  # noqa: F811
    words = ["train.steps=4", "train.save_every=2", "train.keep=9", "eval.scenes=1", "optim.schedule=onecycle"]
    words += ["optim.groups.images=0.1", "optim.decay_vectors=false", "optim.optimizer=adam"]
    train(world, "pretrain", data, tmp_path / "whole", *words)
    said = capsys.readouterr().out
    assert "groups of parameters: images: " in said
    step = "checkpoints/step-00000002"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "parts" / step)
    for other, message in {
        "optim.groups.images=0.2": r"trained with optim\.groups\.images=0\.1, this run has optim\.groups\.images=0\.2",
        "optim.groups.images=1": r"optim\.groups\.images=0\.1, this run has optim\.groups\.images=1\.0",
    }.items():
        with pytest.raises(ValueError, match=message):
            train(world, "pretrain", data, tmp_path / "parts", *words, other)
    with pytest.raises(ValueError, match=r"trained with optim\.groups\.images=0\.1, this run has .*images=None"):
        train(world, "pretrain", data, tmp_path / "parts", *(w for w in words if "groups" not in w))
    train(world, "pretrain", data, tmp_path / "parts", *words)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(parts) == [3, 4]
    assert {step: whole[step] for step in parts} == parts
    ends = [Checkpoint(tmp_path / name) for name in ("whole", "parts")]
    for kind in ("model", "optimizer", "ema"):
        first, second = (saved.tensors(kind) for saved in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first), kind
    assert [g["name"] for g in ends[0].state["groups"]] == [
        "images",
        "images, without decay",
        "rest",
        "rest, without decay",
    ]


def test_a_state_of_other_groups_or_parameters_does_not_fit():
    model = nn.Linear(2, 1)
    optimizer = make_optimizer(model, optim(), fused=False)
    engine = SimpleNamespace(optimizer=optimizer, module=model, zero_optimization_stage=lambda: 0)
    tensors = {f"{m}/{n}": torch.ones_like(p) for m in ("exp_avg", "exp_avg_sq") for n, p in model.named_parameters()}
    tensors["step"] = torch.tensor(3.0)
    now = {"name": "rest", "lr_factor": 1.0, "weight_decay": 0.01}
    for groups in ([now], [{"lr": 0.1, "weight_decay": 0.01}]):  # earlier versions had one group without a name
        load_optimizer_state(engine, tensors, groups, None)
        assert float(optimizer.state[model.weight]["step"]) == 3
    for groups in ([{**now, "name": "images"}, now], [{**now, "lr_factor": 0.1}], []):
        with pytest.raises(
            ValueError, match=r"groups of parameters were .*and are rest \(lr x 1.0, weight decay 0.01\) now"
        ):
            load_optimizer_state(engine, tensors, groups, None)
    del tensors["exp_avg/bias"]
    with pytest.raises(ValueError, match=r"optimizer state does not fit: 1 parameters .*\(bias\)"):
        load_optimizer_state(engine, tensors, [now], None)
