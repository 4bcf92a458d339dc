"""Where the host waits for a GPU in a training step, found on the CPU: operators and calls that read a tensor back, ask for
a number of elements that depends on data, or copy Python numbers to the device."""

import collections
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from occstream.models import syncnorm
from occstream.pretrain.losses import LossConfig
from tests.models.helpers import make_batch, occupancy_loss, two_equal_ranks
from tests.models.test_b2s import build

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("models", "pretrain"))
READS = {"_local_scalar_dense", "nonzero", "masked_select", "linalg_inv_ex", "linalg_solve_ex", "bincount"}
READS |= {"_unique2", "unique_consecutive", "unique_dim", "equal", "is_nonzero"}
MADE = {"lift_fresh"}  # torch.tensor, new_tensor, as_tensor of Python numbers


class Waits(TorchDispatchMode):
    """Counts by "file function: what"."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()
        self.calls = _Calls(self.found)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        return self.calls.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(isinstance(m, torch.Tensor) and m.dtype in (torch.bool, torch.uint8) for m in masks)
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS | MADE or masked or sized:
            self.found[f"{place()}: {name}"] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What never reaches an operator on the CPU."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "cpu", "numpy"):
            self.found[f"{place()}: {name}"] += 1
        return func(*args, **(kwargs or {}))


def place():
    """The innermost function of the package that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            path = Path(frame.f_code.co_filename).relative_to(ROOT)
            return f"{path} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def waits_of_a_step(name, **settings):
    model, batch = build(name=name, checkpointing=True, head_rows=4, **settings), make_batch(3, 2)
    config = LossConfig()
    with two_equal_ranks(), Waits() as waits:
        outputs = model(batch)
        loss, _ = occupancy_loss(outputs, batch, config, None)
        loss.backward()
    return waits.found


LIFT = {"models/lift.py voxel_pool: nonzero": 1}
SPARSE = {"models/b2s.py select: tolist": 1, "models/transformer.py _sightings: tolist": 1}
LABELS = {"pretrain/losses.py _semantic: tolist": 1}
DENSE = {"models/transformer.py _sightings: tolist": 1}


def total(*parts):
    return dict(sum((collections.Counter(p) for p in parts), collections.Counter()))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("b2s_ls", {}, total(LIFT, SPARSE, LABELS)),
        ("b2s_ls", {"strategy": "replacing", "dense_layers": 1}, total(LIFT, DENSE, LABELS)),
        ("b2s_bevformer", {}, total(DENSE, SPARSE, LABELS)),
        ("b2s_ls", {"semantic": False}, LIFT),
    ],
)
def test_a_step_waits_at_most_six_times_and_the_docs_say_where(name, settings, expected):
    assert waits_of_a_step(name, **settings) == expected
    assert sum(expected.values()) <= 6
    docs = (ROOT / "docs/performance.md").read_text()
    for place in expected:
        assert f"| `{place.partition(':')[0].replace(' ', '`, `')}` |" in docs, place


def test_batch_norms_over_ranks_do_not_wait():
    """The inside of their operators, which a step shows as one."""
    x, row = torch.rand(4, 3, 2, 2), torch.rand(3)
    with two_equal_ranks(), Waits() as waits:
        y, mean, invstd, _, counts = syncnorm.sync_norm._init_fn(x, row, row, 1e-5)
        syncnorm.sync_norm_backward._init_fn(y, x, row, mean, invstd, counts)
    assert not waits.found


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0.5],
        lambda x: x.nonzero(),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0]),
        lambda x: torch.linalg.inv(x.view(2, 2)),
        lambda x: bool(x.any()),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda x: x.bool().unique(),
        lambda x: x.cpu(),
    ],
)
def test_every_kind_of_wait_is_seen(work):
    with Waits() as waits:
        work(torch.rand(4))
    assert sum(waits.found.values()) == 1
