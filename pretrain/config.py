"""Recipes: typed settings, read from YAML plus dotted overrides, strictly.

A recipe is a YAML file with the sections of ``Config``. ``load_config`` merges: defaults < recipe (< the recipe its
``base:`` names) < overrides such as ``data.scenes=2000``. An unknown key is an error that names the nearest known key;
a bad value says value, limit and remedy. The ``model`` section takes the fields of the registered model's own dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from occstream.pretrain.events import default_uri
from occstream.pretrain.optim import OptimConfig
from occstream.pretrain.renamed import refuse_old_names
from occstream.pretrain.tasks.registry import get_task
from occstream.pretrain.yamlfile import NotYaml, read_yaml
from occstream.sharding.grid import VoxelGrid, get_grid
from occstream.sharding.places import place
from occstream.sharding.schema import TAXONOMIES, Taxonomy, get_taxonomy
from occstream.sharding.secrets import refuse_secrets

Mask = Literal["auto", "none", "lidar", "camera"]


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass
class DataConfig:
    """The stream that a stage trains on."""

    url: str = ""
    """Root of a packed data set (contains ``manifest.json``): a folder, ``file://`` or ``s3://``."""
    scenes: int | None = None
    """Train on the first n scenes of the seeded permutation; subsets are nested. None: all that are not held out."""
    scene_names: tuple[str, ...] | None = None
    """Train on exactly these scenes instead of a subset."""
    subset_seed: int = 0
    """Seed of the permutation that subsets are taken from. Keep it fixed throughout a study."""
    holdout: int = 0
    """Scenes at the end of that permutation that are never trained on (for evaluation)."""
    fold: str = ""
    """i/n: train without every n-th of these scenes, beginning with the i-th. n runs, 1/n to n/n, then predict each scene by one
    that has not seen it (``occstream predict --folds``). Empty: on all."""
    labels: str = "labels"
    """Label group: the set's own, or one attached to it (``occstream attach``)."""

    def __post_init__(self) -> None:
        i, _, n = self.fold.partition("/")
        _need(
            not self.fold or (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n) and int(n) >= 2),
            f"fold is {self.fold!r}, must be i/n with 1 <= i <= n and n at least 2, such as 1/3",
        )
        _need(self.scenes is None or self.scenes >= 1, f"scenes is {self.scenes}, must be at least 1 (or null for all)")
        _need(self.holdout >= 0, f"holdout is {self.holdout}, must not be negative")


@dataclass
class ReplaySource:
    """Where replayed frames of an earlier stage (B) come from."""

    url: str = ""
    """Data set with binary labels. Empty: no replay."""
    weight: int = 1
    """Share of this source among all replay sources, as an integer (2 and 1: two thirds and one third)."""
    scenes: int | None = None
    """Pool of B scenes, selected like ``data.scenes``. None: all."""
    draw: int | None = None
    """Scenes drawn afresh from the pool for each pass. None: as many as there are S scenes."""
    subset_seed: int = 0
    """Same as ``data.subset_seed``."""
    holdout: int = 0
    """Same as ``data.holdout``."""
    labels: str = "labels"
    """Same as ``data.labels``."""
    mask: Mask = "auto"
    """Same as ``data.mask``."""

    def __post_init__(self) -> None:
        _need(self.weight >= 1, f"weight is {self.weight}, must be a whole number from 1")
        _need(self.draw is None or self.draw >= 1, f"draw is {self.draw}, must be at least 1 (or null)")


@dataclass
class ReplayConfig(ReplaySource):
    """Replay of pre-training frames (B) during fine-tuning (B2S, Sec. 3.3). Off for S+B* and S."""

    batch: int | None = None
    """B frames per step over all ranks, in addition to ``train.batch`` S frames. None: as many as S (our default)."""
    more: tuple[ReplaySource, ...] = ()
    """Further sources, mixed by ``weight``: ``replay.more=[{url: s3://…, weight: 2}]``."""


@dataclass
class EvalConfig:
    """Evaluation at the end of training (and every ``every`` steps)."""

    url: str = ""
    """Data set to evaluate on. Empty: the held-out scenes of ``data.url``; none held out: no evaluation."""
    holdout: int = 0
    """Only the scenes of ``url`` that training on it with this ``data.holdout`` would hold out; 0: all."""
    scenes: int | None = None
    """Maximum number of its scenes. None: all."""
    scene_names: tuple[str, ...] | None = None
    """Evaluate on exactly these scenes of ``url``, or of ``data.url``."""
    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    batch: int = 8
    """Frames per forward and rank."""
    pictures: int = 1
    """Pictures of predictions to draw at the end."""

    def __post_init__(self) -> None:
        _need(self.batch >= 1, f"batch is {self.batch}, must be at least 1")
        _need(self.scenes is None or self.scenes >= 1, f"scenes is {self.scenes}, must be at least 1 (or null for all)")
        for name in ("holdout", "every", "pictures"):
            _need(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, must not be negative")


@dataclass
class TrainConfig:
    """Length of the run, its batches, and how it runs."""

    seed: int = 0
    """Seeds the initial weights, the data order, augmentation and dropout."""
    batch: int = 8
    """Frames of ``data`` per optimizer step, over all ranks and micro-steps."""
    accumulate: int = 1
    """Micro-steps per optimizer step (DeepSpeed's gradient accumulation)."""
    epochs: float = 24.0
    """Passes over ``data``; ignored if ``steps`` is set."""
    steps: int | None = None
    """Total optimizer steps. None: from ``epochs``."""
    ema: bool = True
    """Evaluate and export an exponential moving average of all floating state."""
    ema_decay: float = 0.999
    """Its decay after warm-up."""
    ema_start: int = 10_560
    """The step count its warm-up starts with (COTR)."""
    ema_warmup: Literal["exponential", "mean"] = "exponential"
    """How the decay rises to ``ema_decay``: as 1 - exp(-n / 2000) with n updates (exponential); or so that the average is the
    plain mean of all weights so far until it gets there (mean, usual for teachers; then set ``ema_start=0``)."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage 0 to 3."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16: torch autocast over fp32 parameters. auto: bf16 where the device has instructions for it (CUDA from compute
    capability 8.0 on, CPUs with AVX512-BF16 or AMX), else fp32; the run says which, and its checkpoints hold it."""
    tf32: bool = False
    """On CUDA, matrix products and convolutions of fp32 tensors round their inputs to TF32 (10 bits of mantissa): faster on
    A100 and later. False: fp32 means fp32."""
    kernels: bool = False
    """Kernels in place of plain PyTorch: on CUDA Triton's for voxel pooling, deformable sampling and the focal loss, on the CPU
    compiled loops for the first two (``occstream bench step`` and ``infra/gpu_check.sh`` compare them with the reference)."""
    compile: bool = False
    """``torch.compile`` of the image encoder, on CUDA; ZeRO stages 0 to 2."""
    init: str = ""
    """Weights to start from: a checkpoint folder of a pre-training run, or an exported ``.safetensors``."""
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those at multiples of this number of steps."""
    keep_best: str = ""
    """Also keep the one with the highest value of this metric, e.g. eval/miou (see ``eval.every``: a checkpoint is then saved
    with each evaluation)."""
    upload: str = ""
    """URL under which every checkpoint is copied during training; a run that starts on another disk resumes from there.
    Nothing is removed there: give the bucket a lifecycle rule."""
    log_every: int = 10
    """Steps between log lines."""
    threads: int = 2
    """Reader threads per stream and rank."""
    decoder: Literal["cpu", "nvimagecodec"] = "cpu"
    """Decoder of the JPEGs: the reader threads, or nvImageCodec on the GPU (``pip install 'occstream[jpeg]'``)."""
    data_timeout: float = 300.0
    """Seconds that a step waits for data before it is an error on all ranks; less than ``timeout_minutes``."""
    timeout_minutes: float = 10.0
    """A collective, or a whole step, that takes longer ends the job, with the stack traces of all threads in the run's folder
    (raise it for slow storage)."""
    skip_nonfinite: int = 0
    """Steps whose loss or gradients are not finite that are left out, counted and named, before it is an error (in each
    start of the run)."""
    profile: int = 0
    """Steps to trace with torch.profiler after the first ten, on the main rank: a Chrome trace and a table in the run's
    folder and in MLflow. 0: none."""
    log_keys: bool = False
    """Write the frame keys of every step to ``keys-rank-<n>.txt`` in the run's folder."""

    def __post_init__(self) -> None:
        _need(self.batch >= 1, f"batch is {self.batch}, must be at least 1")
        _need(self.accumulate >= 1, f"accumulate is {self.accumulate}, must be at least 1")
        _need(
            self.batch % self.accumulate == 0,
            f"batch {self.batch} does not divide by accumulate {self.accumulate}; change one of them",
        )
        _need(self.zero_stage in (0, 1, 2, 3), f"zero_stage is {self.zero_stage}, must be 0, 1, 2 or 3")
        _need(not (self.compile and self.zero_stage == 3), "compile does not work with zero_stage 3; use 0 to 2")
        _need(self.steps is None or self.steps >= 1, f"steps is {self.steps}, must be at least 1 (or null)")
        _need(self.epochs > 0, f"epochs is {self.epochs}, must be positive")
        _need(self.keep >= 1, f"keep is {self.keep}, must be at least 1")
        _need(self.log_every >= 1, f"log_every is {self.log_every}, must be at least 1")
        _need(self.data_timeout > 0, f"data_timeout is {self.data_timeout}, must be positive")
        for name in ("threads", "timeout_minutes", "save_every", "keep_every", "skip_nonfinite", "profile"):
            _need(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, must not be negative")


@dataclass
class TrackConfig:
    """Where metrics go after the local JSONL."""

    uri: str = field(default_factory=default_uri)
    """MLflow tracking URI (sqlite:///…, http://…). Not set: MLFLOW_TRACKING_URI from the environment, otherwise
    sqlite:///runs/mlflow.db. Empty: JSONL only."""
    experiment: str = "occstream"
    """MLflow experiment: one per study."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run, e.g. study, arm: the axes that runs are compared by."""
    axes: dict[str, float] = field(default_factory=dict)
    """Numbers of the run's place in a study, logged as metrics ``axis/…`` (MLflow compares tags as text only)."""


@dataclass
class Config:
    """Everything one training run depends on; goes into its checkpoints and its MLflow run. A task has a subclass with
    sections of its own (``model``, ``loss``, ``augment``, more in ``data`` and ``eval``)."""

    task: str = "b2s"
    """What is trained: a task that comes with the package, that an installed one registers, or of ``--import``."""
    stage: str = "pretrain"
    """Stage of the task; of b2s: pretrain (binary decoder only) or finetune (the whole network)."""
    grid: str = "occ3d"
    """Name of a ``VoxelGrid`` preset; must be the grid of the packed labels."""
    taxonomy: str = "occ3d"
    """Name of the taxonomy of the packed labels."""
    output: str = "runs/default"
    """Folder of this run: metrics.jsonl, checkpoints, pictures. Rerunning the same command resumes from it."""
    data: DataConfig = field(default_factory=DataConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        _need(self.taxonomy in TAXONOMIES, f"taxonomy is {self.taxonomy!r}, must be one of {', '.join(TAXONOMIES)}")
        get_grid(self.grid)

    @classmethod
    def open_sections(cls, data: Mapping[str, Any]) -> dict[str, type]:
        """Types of sections that depend on other keys, by name, for these values of a recipe."""
        return {}

    @property
    def voxel_grid(self) -> VoxelGrid:
        """The preset that ``grid`` names."""
        return get_grid(self.grid)

    @property
    def classes(self) -> Taxonomy:
        """The taxonomy that ``taxonomy`` names."""
        return get_taxonomy(self.taxonomy)

    def to_dict(self) -> dict:
        """JSON values, complete: ``parse_config`` of it gives the same config."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def dotted_keys(cls: type, prefix: str = "") -> Iterable[str]:
    """All keys of a config dataclass and of those in it."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            yield from dotted_keys(hints[f.name], f"{prefix}{f.name}.")


def build_section(cls: type, data: Any, path: str, known: list[str]) -> Any:
    """A config dataclass from plain values, strictly.

    Args:
        cls: whose fields may be dataclasses themselves.
        data: a mapping.
        path: dotted, of this section; for messages.
        known: keys that a wrong one may have meant.

    Raises:
        ValueError: unknown key, with the nearest; or a bad value.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{path or 'recipe'}: expected a section of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ValueError(f"unknown key {full!r}{_nearest(full, str(key), known)}")
        values[key] = _build_value(hints[key], value, full, known)
    _check_numbers(cls, values, path)
    for key, value in values.items():
        for text in _strings(value):
            refuse_secrets(text, f"{path}.{key}" if path else key)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None


def _build_value(hint: Any, value: Any, path: str, known: list[str]) -> Any:
    """The value of a field from a plain one. A field may be a section, a dict of sections by free names, or a section or
    something else."""
    inner = [arg for arg in typing.get_args(hint) if _is_section(arg)]
    if _is_section(hint):
        return value if isinstance(value, hint) else build_section(hint, value, path, known)
    if isinstance(value, Mapping) and typing.get_origin(hint) is dict and inner:
        return {name: build_section(inner[-1], v or {}, f"{path}.{name}", known) for name, v in value.items()}
    if isinstance(value, dict) and inner:
        return build_section(inner[0], value, path, known)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
        raise ValueError(f"{path} = {value!r}: {reasons}") from None


def _is_section(hint: Any) -> typing.TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _check_numbers(cls: type, values: Mapping[str, Any], path: str) -> None:
    """Raises ValueError for a number that is not finite, and for a negative one where the default has none: of all keys
    whose default is not negative, below 0 means nothing. (Numbers by free names may be anything finite.)"""
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        signed = isinstance(default, Mapping) or any(number < 0 for number in _numbers(default))
        for number in _numbers(values.get(f.name)):
            full = f"{path}.{f.name}" if path else f.name
            if not math.isfinite(number):
                raise ValueError(f"{full} is {number}, must be a finite number")
            if number < 0 and not signed:
                raise ValueError(f"{full} is {number}, must not be negative")


def _strings(value: Any) -> Iterable[str]:
    value = _plain(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)


def _nearest(full: str, key: str, known: list[str]) -> str:
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key]
    near = same_leaf or difflib.get_close_matches(full, known, 1, 0.5)
    if not near:
        near = [k for k in known if difflib.get_close_matches(key, [k.rsplit(".", 1)[-1]], 1, 0.6)][:1]
    return f"; did you mean {' or '.join(repr(k) for k in near[:3])}?" if near else ""


# Paths and URLs among the settings, by section.
_PLACES = (("", "output"), ("data", "url"), ("replay", "url"), ("eval", "url"), ("train", "init"), ("train", "upload"))


def parse_config(data: Mapping[str, Any]) -> Config:
    """A task's ``Config`` from nested plain values. Raises ValueError with the dotted key, the value and what would be right."""
    refuse_old_names(data)
    data = dict(data)
    task = get_task(data.get("task", Config.task))
    cls = task.Config
    open_sections = cls.open_sections(data)
    known = list(dotted_keys(cls))
    for name, section in open_sections.items():
        known += dotted_keys(section, f"{name}.")
    _refuse_strangers(data, task.name, known)
    for name, section in open_sections.items():
        value = data.get(name)
        data[name] = value if isinstance(value, section) else build_section(section, value or {}, name, known)
    config = build_section(cls, {"task": task.name, "stage": next(iter(task.stages)), **data}, "", known)
    _need(
        config.stage in task.stages,
        f"task {task.name} has no stage {config.stage!r}; it has: {', '.join(task.stages)}",
    )
    for section, name in _PLACES:
        owner = getattr(config, section) if section else config
        setattr(owner, name, place(getattr(owner, name)))
    if "://" in config.output:
        raise ValueError(
            f"output is {config.output!r}: must be a local folder; checkpoints can go to train.upload as well"
        )
    return config


def _refuse_strangers(data: Mapping[str, Any], task: str, known: list[str]) -> None:
    """Raises ValueError that names all keys that a recipe of another task, or of another model, has and this one has not; one
    alone may be a slip, which ``build_section`` knows more about."""
    strange = []
    for section, value in data.items():
        if section not in known:
            strange.append(section)
        elif isinstance(value, Mapping) and any(key.startswith(f"{section}.") for key in known):
            strange += [f"{section}.{key}" for key in value if f"{section}.{key}" not in known]
    if len(strange) > 1:
        model = f" with model {data['model_name']}" if "model_name" in known and "model_name" in data else ""
        raise ValueError(
            f"task {task}{model} has no {', '.join(str(key) for key in strange[:12])}"
            f"{f' and {len(strange) - 12} more' if strange[12:] else ''}: this recipe is of another task or model; leave these "
            "keys out, or begin with another recipe"
        )


def packaged_recipes() -> dict[str, Path]:
    """Recipes and studies that come with the package, by name; each task has a folder of them."""
    root = Path(str(resources.files("occstream.launch.recipes")))
    return {path.stem: path for path in sorted(root.rglob("*.yaml"), key=lambda path: path.stem)}


def read_recipe(name: str, above: tuple[str, ...] = ()) -> dict:
    """Values of a recipe: a file path, or the name of one that comes with the package; ``base`` is merged below it."""
    path = Path(place(name))
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"recipe {name!r}: no such file")
        try:
            text, folder = path.read_text(), path.parent
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name}: is not text ({error.reason} at byte {error.start})") from None
    else:
        found = packaged_recipes()
        if name not in found:
            near = difflib.get_close_matches(name, found, 1)
            raise ValueError(
                f"unknown recipe {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
                f"Recipes: {', '.join(found)}, or a path to a .yaml file"
            )
        text, folder = found[name].read_text(), found[name].parent
    data = read_yaml(text, f"recipe {name}") or {}
    if not isinstance(data, dict):
        raise ValueError(f"recipe {name!r}: expected sections of keys at the top level")
    base = data.pop("base", None)
    if base:
        if not isinstance(base, str):
            raise ValueError(f"recipe {name!r}: base is {str(base)[:40]!r}, not the name of a recipe or file")
        if len(above) > 20:
            raise ValueError(f"recipe {above[0]!r}: its bases form a cycle: {' -> '.join([*above[:3], name])}")
        below = folder / base
        data = merge(read_recipe(str(below) if below.suffix else base, (*above, name)), data)
    return data


def merge(low: Mapping, high: Mapping) -> dict:
    """Nested mappings merged key by key, ``high`` wins."""
    out = dict(low)
    for key, value in high.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if nested else value
    return out


# What follows these keys is the name of a module, with its dots.
_OF_MODULE = re.compile(r"((?:.*\.)?optim\.(?:decay_)?groups)\.(.+)")


def parse_overrides(words: Iterable[str]) -> dict:
    """``["optim.lr=1e-3", "data.url=s3://b/x"]`` to nested values; values are YAML scalars or lists."""
    out: dict = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise ValueError(f"override {word!r}: write key=value, for example optim.lr=1e-4")
        try:
            value = read_yaml(text, f"setting {word!r}") if text else ""
        except NotYaml:
            value = text
        if isinstance(value, str):
            # YAML 1.1 reads 1e-4 as a string.
            with contextlib.suppress(ValueError):
                value = float(value) if value.lower() not in ("nan", "inf", "-inf", "infinity") else value
        module = _OF_MODULE.fullmatch(key)
        path = [*module[1].split("."), module[2]] if module else key.split(".")
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def load_config(recipe: str, overrides: Iterable[str] = (), **fixed: Any) -> Config:
    """Recipe by name or path plus overrides; ``fixed`` are values the entry point decides, such as ``stage``."""
    return parse_config(merge(merge(read_recipe(recipe), parse_overrides(overrides)), fixed))
