"""Evaluating a model that is handed in on a stream that is handed in, by a metric that is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import nn

from occstream.evaluation.metrics import sum_over_ranks
from occstream.models import Batch


@dataclass
class EvalResult:
    """Scores of an evaluation; a metric's own kind says which.

    Attributes:
        frames: evaluated over all ranks. left_out: those that could not be read, named when that was found.
        seconds: wall time.
        headline: names of the scores that come first, and how people call them.
    """

    frames: int
    seconds: float = 0.0
    left_out: int = 0
    headline: ClassVar[Mapping[str, str]] = {}

    def scores(self) -> dict[str, float]:
        """By name, without those that this network has not."""
        return {}

    def conditions(self) -> str:
        """What the scores depend on, for people; may be empty."""
        return ""

    def metrics(self) -> dict[str, float]:
        """MLflow metrics."""
        out = {"eval/frames": float(self.frames)}
        if self.left_out:
            out["eval/frames_left_out"] = float(self.left_out)
        return out | {f"eval/{name}": value for name, value in self.scores().items()}

    def summary(self) -> str:
        """One line."""
        scores = self.scores()
        said = ", ".join(f"{word} {scores[name]:.2f}" for name, word in self.headline.items() if name in scores)
        conditions = f" ({said_of})" if (said_of := self.conditions()) else ""
        left = f"; without {self.left_out} more that cannot be read" if self.left_out else ""
        return f"{said}{conditions}{left}"

    def table(self) -> str:
        """For the terminal: the summary, then what scores there are by class and by range (``class/…``, ``range/…/…``)."""
        lines, ranges = [f"{self.frames} frames: {self.summary()}"], {}
        for name, value in self.scores().items():
            kind, _, rest = name.partition("/")
            if kind == "class":
                lines.append(f"  {rest:<22} {value:6.2f}")
            elif kind == "range":
                place, _, score = rest.rpartition("/")
                ranges.setdefault(place, []).append(f"{self.headline.get(score, score)} {value:.2f}")
        return "\n".join([*lines, *(f"  {place:<22} {', '.join(said)}" for place, said in ranges.items())])


class Metric(Protocol):
    """Counts over the batches of one evaluation.

    Attributes:
        nothing: what it means that nothing was counted, and what to do, for the error's message.
    """

    nothing: str

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; frames with an empty key count for nothing. Returns the number of valid elements."""
        ...

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        ...

    def result(self) -> EvalResult:
        """The scores, the same on every rank; the caller adds frames and time."""
        ...


@dataclass
class JointResult(EvalResult):
    """Scores of several metrics; those by class have the name of their kind before the class."""

    results: dict[str, EvalResult] = field(default_factory=dict)

    def scores(self) -> dict[str, float]:
        found = {}
        for kind, part in self.results.items():
            found |= {name.replace("class/", f"class/{kind} ", 1): value for name, value in part.scores().items()}
        return found

    def summary(self) -> str:
        return "; ".join(part.summary() for part in self.results.values())


class JointMetric:
    """Several metrics of one evaluation.

    Args:
        metrics: by what kind of score they give of classes, such as AP and IoU.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.nothing = " or ".join(metric.nothing for metric in self.metrics.values())

    def update(self, outputs: Any, batch: Batch) -> int:
        """Counts a batch; returns the number of valid elements of all."""
        return sum(metric.update(outputs, batch) for metric in self.metrics.values())

    def all_reduce(self, device: torch.device) -> None:
        """Sums over ranks (collective)."""
        for metric in self.metrics.values():
            metric.all_reduce(device)

    def result(self) -> JointResult:
        """The scores."""
        return JointResult(0, results={kind: metric.result() for kind, metric in self.metrics.items()})


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    metric: Metric,
    *,
    expected: int | None = None,
    watch: Callable[[Batch, Any], None] | None = None,
) -> EvalResult:
    """Runs the model over a finite stream and counts (collective).

    Args:
        model: its mode is restored afterwards.
        batches: this rank's share, at least one; masks are already in the labels. Frames with an empty key only fill a place:
            nothing of them is valid.
        metric: that has counted nothing yet.
        expected: frames that all ranks have together, where that is known.
        watch: gets each batch and its outputs (for pictures).

    Returns:
        The same result on every rank.

    Raises:
        ValueError: on every rank: other frames came than were expected, a rank had none, or nothing was valid.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    frames, device = torch.zeros(3, dtype=torch.int64), torch.device("cpu")
    try:
        for batch, counted in _in_step(batches):
            outputs = model(batch)
            if not counted:
                continue
            device = batch.device
            unread = sum(not key for key in batch.keys)
            frames += torch.tensor([batch.size, metric.update(outputs, batch), unread])
            if watch:
                watch(batch, outputs)
    finally:
        model.train(training)
    seen, valid, unread = sum_over_ranks(frames, device).tolist()
    if not seen or (expected is not None and seen != expected):
        planned = "some" if expected is None else expected
        raise ValueError(
            f"evaluated {seen} frames where {planned} were to be: its data ended early, so there is no score"
        )
    if not valid:
        raise ValueError(f"evaluated {seen} frames {metric.nothing}")
    metric.all_reduce(device)
    result = metric.result()
    result.frames, result.left_out, result.seconds = seen - unread, unread, time.perf_counter() - began
    return result


def _in_step(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, then the last one again, not to be counted, while another rank still has some: under ZeRO-3
    every forward gathers parameters from all ranks. A rank that cannot read, or has no frames, ends all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from ((batch, True) for batch in batches)
        return
    source, last = iter(batches), None
    while True:
        batch: Batch | None = None
        error: Exception | None = None
        try:
            batch = next(source, None)
        except Exception as problem:
            error = problem
        if error is None and batch is None and last is None:
            error = ValueError(f"rank {dist.get_rank()} had no frames to evaluate, so there is no score")
        most = _most(_FAILED if error else int(batch is not None))
        if most == _FAILED:
            raise error or ValueError("another rank could not read its frames to evaluate; see its message")
        if not most:
            return
        last = last if batch is None else batch
        assert last is not None, "a rank without frames has failed above"
        yield last, batch is not None


_FAILED = 2


def _most(mine: int) -> int:
    """The largest number of all ranks (collective)."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    flag = torch.tensor([mine], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())
