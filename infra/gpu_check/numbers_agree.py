"""Sections that compare numbers: devices, precisions, kernels, norms, decoders."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import get_args
from unittest import mock

import numpy as np
import torch
from checks import Check, Skipped, need, peak, section
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

import occstream.models
from occstream.evaluation.bayes import Confusions, naive_bayes
from occstream.evaluation.cudapull import pull_into
from occstream.evaluation.propagate import packed, pull, pull_maps
from occstream.evaluation.rules import Pulled, Rule
from occstream.evaluation.votes import VoteConfig, voting
from occstream.launch.doctor import examine, report
from occstream.models import MODELS, Batch, attention, build_model, kernels, lift
from occstream.models.b2s import Strategy
from occstream.models.batch import Cameras
from occstream.models.layers import SyncBatchNorm
from occstream.pretrain.distributed import World
from occstream.pretrain.losses import LossConfig, _NegativeFocal
from occstream.pretrain.meter import best_time
from occstream.pretrain.networks import create_model
from occstream.pretrain.streams import TrainData
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.grid import GRIDS, VoxelGrid
from occstream.sharding.schema import TAXONOMIES
from tests.models.helpers import SMALL, make_batch, occupancy_loss, two_equal_ranks

Given = Tensor | list[tuple[Tensor, Tensor]]  # by the geometry: points, or pixels and depths of every camera


@contextlib.contextmanager
def _with_kernels(check: Check, wanted: bool) -> Iterator[None]:
    """Kernels on the GPU, or through Triton's interpreter."""
    if check.dry:
        with mock.patch.object(kernels, "wanted_for", return_value=wanted):
            yield
        return
    kernels.use(wanted)
    yield
    kernels.use(False)


def _exact() -> None:
    """No TF32: it rounds factors to 10 bits."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@section("doctor", "nothing is missing that training needs")
def doctor(check: Check) -> str:
    findings = examine()
    print(report(findings))
    missing = [f.name for f in findings if f.ok is False]
    cuda = next((f.value for f in findings if f.name == "cuda"), "no CUDA build")
    return need(not missing, f"{cuda}" + (f"; missing: {', '.join(missing)}" if missing else ""))


@section("agree", "loss and gradient norm of every model and strategy on CPU, GPU and with kernels: within 1e-3")
def agree(check: Check) -> str:
    _exact()
    config = check.small("finetune").model
    worst, cases = (0.0, ""), list(itertools.product(sorted(MODELS), get_args(Strategy)))
    # Dry, the section of the kernels runs them: a whole network through Triton's interpreter takes a minute.
    ways = [("cpu", False), ("cpu", False)] if check.dry else [("cpu", False), ("cuda", False), ("cuda", True)]
    for name, strategy in cases[:1] if check.dry else cases:
        torch.manual_seed(0)
        settings = dataclasses.replace(config, strategy=strategy, dense_layers=1)
        model = build_model(name, settings, grid=SMALL, num_classes=17, image_size=(32, 64), semantic=True)
        batch, found = make_batch(3, 2 if model.predicts_binary else 3), []
        _off_the_kinks(model)
        for device, wanted in ways:
            with _with_kernels(check, wanted):
                model, moved = model.to(device).train(), batch.to(torch.device(device))
                model.zero_grad()
                loss, _ = occupancy_loss(model(moved), moved, LossConfig())
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            found.append((loss.item(), norm.item()))
        gap = max(abs(a - b) / abs(a) for other in found[1:] for a, b in zip(found[0], other))
        print(name, strategy, found, f"{gap:.1e}")
        worst = max(worst, (gap, f"{name} {strategy}"))
    return need(worst[0] < 1e-3, f"largest relative difference {worst[0]:.1e} ({worst[1]})")


def _off_the_kinks(model: nn.Module) -> None:
    """Offsets begin at whole cells, where linear interpolation has a kink and rounding picks the side."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("offsets.bias"):
                parameter += 0.3


@section(
    "geometry",
    "lifted points and projected pixels under bf16 as in fp32: no point in another voxel, pixels within 1e-3",
)
def geometry(check: Check) -> str:
    said, good = [], True
    for recipe in ("r50", "r50-bevformer"):
        # Labels choose the voxels: predictions differ with the precision.
        config = check.sized(recipe, "finetune", "replay.url=", "model.selection=gt")
        model = create_model(config).to(check.device).train()
        frames = task_of(config).synthetic_batch(1, 0).to(check.device)
        plain, mixed = (_places(model, frames, check.device, bf16) for bf16 in (False, True))
        need(len(plain) == len(mixed) > 0, f"{recipe}: {len(plain)} and {len(mixed)} calls of the geometry")
        size = torch.tensor(config.voxel_grid.voxel, device=check.device)
        moved = [
            float(((a / size).floor() != (b / size).floor()).any(-1).float().mean())
            for (kind, a), (_, b) in zip(plain, mixed)
            if kind == "unproject"
        ]
        pixels = [float((a - b).abs().max()) for (kind, a), (_, b) in zip(plain, mixed) if kind == "project" and len(a)]
        good &= max(moved, default=0.0) == 0 and max(pixels, default=0.0) < 1e-3
        parts = [f"{100 * max(moved):.2f} % of points in another voxel"] if moved else []
        parts += [f"pixels off by {max(pixels):.1e}"] if pixels else []
        said.append(f"{recipe}: " + ", ".join(parts))
    return need(good, "\n".join(said))


def _places(model: nn.Module, frames: Batch, device: torch.device, bf16: bool) -> list[tuple[str, Tensor]]:
    """What the geometry gave during a forward pass: points in meters, and pixels of points before the camera."""
    found: list[tuple[str, Tensor]] = []

    def watched(name: str, work: Callable[..., Given]) -> Callable[..., Given]:
        def call(*args: object) -> Given:
            out = work(*args)
            if isinstance(out, Tensor):
                found.append((name, out.float()))
            else:
                found.extend((name, pixel.float()[depth > 0.5]) for pixel, depth in out)
            return out

        return call

    modules = [
        importlib.import_module(f"occstream.models.{m.name}") for m in pkgutil.iter_modules(occstream.models.__path__)
    ]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module, name in itertools.product(modules, ("unproject", "project")):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, watched(name, getattr(lift, name))))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        model(frames)
    return found


@section(
    "kernels",
    "Triton kernels at the sizes of r50, values and gradients against PyTorch in fp32: within 1e-4 of the largest",
)
def full_kernels(check: Check) -> str:
    if not check.dry:
        _exact()
    device, said, worst = check.device, [], 0.0
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    views, bins, cells, channels, voxels = (2, 7, 6, 5, 50) if check.dry else (12, 88, 16 * 44, 64, 2 * 200 * 200 * 16)
    depth, context = draw(views, bins, cells).requires_grad_(), draw(views * cells, channels).requires_grad_()
    voxel = torch.randint(-1, voxels, (views, bins, cells), generator=g).to(device)
    keep = (voxel.reshape(-1) >= 0).nonzero().squeeze(1)
    pixel = keep // (bins * cells) * cells + keep % cells
    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "pooling": (
            lambda: lift._Pool.apply(depth.reshape(-1)[keep], context, pixel, voxel.reshape(-1)[keep], voxels),
            lambda: kernels.pool(depth, context, voxel, voxels),
            (depth, context),
        )
    }
    shape, tokens, heads, width = ((3, 4, 5), [9, 7], 2, 4) if check.dry else ((100, 100, 8), [20_000, 10_000], 8, 256)
    values = draw(2, width, *shape).requires_grad_()
    cells = torch.tensor(shape, device=device) * (0.5 + 0.4 * draw(sum(tokens), heads, 4, 3)) - 0.5
    # Away from whole cells, where the gradient jumps and rounding picks the side.
    cells = cells.floor() + 0.1 + 0.8 * (cells - cells.floor())
    places = ((cells + 0.5) / torch.tensor(shape, device=device)).requires_grad_()
    weights = draw(sum(tokens), heads, 4).requires_grad_()
    inputs = (values, places, weights)
    cases["sampling"] = (lambda: attention.sample(*inputs, tokens), lambda: kernels.sample(*inputs, tokens), inputs)
    logits = (4 * draw(*((50, 9) if check.dry else (640_000, 17)))).requires_grad_()
    cases["focal loss"] = (
        lambda: _NegativeFocal.apply(logits, 2.0, None),
        lambda: _Focal.apply(logits),
        (logits,),
    )
    for name, (reference, kernel, given) in cases.items():
        found = []
        for work in (reference, kernel):
            out = work()
            slopes = torch.autograd.grad(out, given, torch.ones_like(out))
            found.append([out.detach(), *slopes])
        gap = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*found))
        slow, fast = (
            best_time(lambda w=w, given=given: torch.autograd.grad(w().sum(), given), device, 1 if check.dry else 6)
            for w in (reference, kernel)
        )
        said.append(f"{name}: {gap:.1e}, {1e3 * slow:.1f} ms to {1e3 * fast:.1f} ms")
        worst = max(worst, gap)
    return need(worst < 1e-4, "\n".join(said))


class _Focal(torch.autograd.Function):
    """The kernel gives value and slope at once."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor) -> Tensor:
        value, slope = kernels.negative_focal(logits.detach(), 2.0, None)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> Tensor:
        [slope] = ctx.saved_tensors
        return grad * slope


@section("votes", "the kernel of `occstream refine`: the bytes of the CPU, on SemanticKITTI's grid with 23 frames")
def votes(check: Check) -> str:
    rng = np.random.default_rng(0)
    grid = VoxelGrid("small", (0, -2, -1), (4, 2, 1), (0.5, 0.5, 0.5)) if check.dry else GRIDS["semantickitti"]
    frames, taxonomy = (3, TAXONOMIES["occ3d"]) if check.dry else (23, TAXONOMIES["semantickitti"])
    poses = np.stack([np.eye(4)] * frames)
    angle = np.linspace(0, 0.6, frames)
    poses[:, 0, 0], poses[:, 1, 1], poses[:, 1, 0], poses[:, 0, 1] = (
        np.cos(angle), np.cos(angle), np.sin(angle), -np.sin(angle),
    )  # fmt: skip
    poses[:, 0, 3] = np.arange(frames) * 0.08 * (grid.upper[0] - grid.lower[0]) / 2
    classes = taxonomy.num_classes + 1
    said = rng.integers(0, classes, (frames, *grid.shape), np.uint8)
    sources = packed(said, rng.random(said.shape) < 0.5)
    maps, before, found = pull_maps(grid, poses[0], grid, poses), said[0], []
    bayes = naive_bayes(Confusions(rng.integers(0, 200, (9, 2, classes, classes))), grid, taxonomy)
    for rule in (voting(VoteConfig(), grid, taxonomy), bayes):
        rule = dataclasses.replace(rule, parked=True)
        want = pull(rule, maps, sources, range(frames), before=before, itself=0, device="cpu").semantic
        index = np.argwhere(before < 255)
        frames_of = {"slots": range(frames), "itself": 0, "numbers": range(frames)}
        options = {**frames_of, "index": index, "doubts": None, "device": str(check.device)}
        made = []

        def work(rule: Rule = rule, options: dict = options, made: list = made) -> None:
            out = Pulled(before.copy())
            pull_into(out, rule, maps, sources, **options)
            made[:] = [out.semantic]

        took = best_time(work, check.device, 1 if check.dry else 5)
        found.append(f"{'bayes' if rule.bayes else 'votes'}: {1e3 * took:.1f} ms a frame")
        need(bool((made[0] == want).all()), f"{found[-1]}, {int((made[0] != want).sum())} voxels differ")
    return "; ".join(found)


@section(
    "batch norm",
    "SyncBatchNorm as cuDNN's batch norm, forward, backward and running values, alone and over two ranks that hold the same: "
    "fp32 within 1e-4, bf16 within 5e-2",
)
def batch_norm(check: Check) -> str:
    device = check.device
    shape = (4, 8, 6, 5) if check.dry else (48, 256, 64, 176)
    said, good = [], True
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        found, cost = [], []
        for kind, ranks in (
            (nn.BatchNorm2d, contextlib.nullcontext),
            (SyncBatchNorm, contextlib.nullcontext),
            (SyncBatchNorm, two_equal_ranks),
        ):
            torch.manual_seed(0)
            norm = kind(shape[1]).to(device).train()
            x = (3 + 2 * torch.randn(shape)).to(device, dtype).requires_grad_()
            with ranks(), peak(device) as so_far:
                before = so_far()  # results of the other kinds
                out = norm(x)
                out.backward(torch.linspace(-1, 1, x.numel(), device=device).view(shape).to(dtype))
                cost.append(so_far() - before)
            slopes = [x.grad, norm.weight.grad, norm.bias.grad]
            results = (out, *slopes, norm.running_mean, norm.running_var)
            found.append([t.detach().float() for t in results if t is not None])
            with ranks():
                took = best_time(lambda norm=norm, x=x: norm(x).sum().backward(), device, 1 if check.dry else 6)
            cost[-1] = (cost[-1], took)
        memory, slow = cost[0]
        for name, mine, (ours, fast) in zip(("alone", "two ranks"), found[1:], cost[1:]):
            pairs = zip(found[0][:-1] if name == "two ranks" and check.dry else found[0], mine)
            gap = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)
            good &= gap < limit
            said.append(
                f"{str(dtype)[6:]} {name}: {gap:.1e}, {1e3 * slow:.2f} ms and {memory:.2f} GiB to {1e3 * fast:.2f} ms and "
                f"{ours:.2f} GiB"
            )
    return need(good, "\n".join(said))


@section(
    "decoder", "JPEGs decoded by the readers and by nvImageCodec: the same stream, pixels within 2 of 255 on average"
)
def decoder(check: Check) -> str:
    try:
        from nvidia import nvimgcodec  # noqa: F401
    except ImportError:
        raise Skipped("nvImageCodec is not installed (pip install 'occstream[jpeg]')") from None
    import time

    found, said = {}, []
    url, words = check.data(), []
    if not check.dry:
        from tests.pretrain.small import pack_small

        url, words = str(check.out / "large"), ["augment.image_size=[256,704]", "train.threads=8"]
        pack_small(url, scenes=6, image_size=(900, 1600))
    count = 1 if check.dry else 40
    for way in ("cpu", "nvimagecodec"):
        config = check.small("finetune", f"data.url={url}", "replay.url=", f"train.decoder={way}", *words)
        feed = TrainData(config, World(0, 1, check.device))
        images = feed.next().part(Cameras).images.float().clone()
        began = time.perf_counter()
        for _ in range(count):
            feed.next()
        if not check.dry:
            torch.cuda.synchronize()
        said.append(f"{way}: {config.train.batch * count / (time.perf_counter() - began):.0f} samples/s")
        found[way] = images
        feed.close()
    gap = (found["cpu"] - found["nvimagecodec"]).abs().mean().item()
    return need(gap < 2, f"mean difference of pixels {gap:.2f}; " + ", ".join(said))
