"""What a section of the GPU check is: a name, what is expected, and work that says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from occstream.pretrain.tasks.b2s import B2SRecipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "tests/pretrain/small.yaml")  # the smallest that has every part of a network


class Failed(Exception):
    """Something else was found than expected."""


class Skipped(Exception):
    """What the section needs is not here."""


def need(ok: bool, found: str) -> str:
    """``found`` if all is well. Raises Failed with it otherwise."""
    if not ok:
        raise Failed(found)
    return found


@dataclass(frozen=True)
class Check:
    """Where and how sections run.

    Attributes:
        dry: on the CPU at the smallest size: shows that the check works, says nothing about a GPU.
        out: folder for what sections write.
    """

    dry: bool
    out: Path

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    def data(self) -> str:
        """Scenes of three frames with six small images, packed once for all sections."""
        from tests.pretrain.small import pack_small

        url = self.out / "small"
        if not (url / "manifest.json").exists():
            pack_small(str(url), scenes=3)
        return str(url)

    def small(self, stage: str, *words: str) -> B2SRecipe:
        """The smallest recipe that has every part of a network."""
        words = (f"data.url={self.data()}", f"replay.url={self.data()}", "model.dropout=0.0", *words)
        return _recipe(RECIPE, words, stage)

    def sized(self, recipe: str, stage: str, *words: str) -> B2SRecipe:
        """A packaged recipe without data, as it is; dry, the smallest one with its kind of network."""
        kind = _recipe(recipe, words, stage)
        if not self.dry:
            return kind
        keep = [w for w in words if not w.startswith(("data.", "replay.", "augment."))]
        keep += ["model.dropout=0.0", f"model_name={kind.model_name}", f"model.strategy={kind.model.strategy}"]
        keep += ["model.cap=4000"]  # all that labels call occupied must fit
        keep += [f"model.dense_layers={min(1, kind.model.dense_layers)}", f"data.binary_from={kind.data.binary_from}"]
        return _recipe(RECIPE, keep, stage)


def _recipe(name: str, words: Sequence[str], stage: str) -> B2SRecipe:
    from occstream.pretrain.config import load_config
    from occstream.pretrain.tasks.b2s import B2SRecipe

    config = load_config(name, words, stage=stage)
    if not isinstance(config, B2SRecipe):
        raise ValueError(f"{name}: is of task {config.task}, the check is of b2s")
    return config


@dataclass(frozen=True)
class Section:
    name: str
    expected: str
    work: Callable[[Check], str]


SECTIONS: dict[str, Section] = {}


def section(name: str, expected: str) -> Callable:
    """Registers a section; they run in the order of their definition, each in a process of its own."""

    def add(work: Callable[[Check], str]) -> Callable[[Check], str]:
        SECTIONS[name] = Section(name, expected, work)
        return work

    return add


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """GiB allocated at most so far; 0 on the CPU, which does not count."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
