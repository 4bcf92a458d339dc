"""Checkpoints that are complete or not there, for any ZeRO stage and world size.

One portable format instead of DeepSpeed's own (which cannot change the world size and loses BatchNorm statistics on
conversion): a folder ``step-00000120`` with full fp32 values,

    model.safetensors      parameters and buffers
    ema.safetensors        averaged parameters and floating buffers (if EMA is on)
    optimizer.safetensors  Adam's moments
    state.json             position in the data, hyper-parameters, config, fingerprints, MLflow run
    COMPLETE.json          sizes and SHA-256 of the others

written next to its final name and renamed when complete. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from occstream.sharding import storage, threads

FORMAT = 1
COMPLETE, LATEST = "COMPLETE.json", "latest.json"
ASIDE = "damaged-"
SENSORS = ("sensors", "cameras")  # names of sensors in a state, now and in earlier versions
NAMES = (*SENSORS, "scenes")  # lists of names in a state
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> Path:
    """Writes one checkpoint (one rank only).

    Args:
        root: folder of the run's checkpoints.
        tensors: file stem -> full CPU tensors by name.
        state: JSON values.

    Raises:
        OSError: the disk is full, for example; what is there stays.
        FloatingPointError: a tensor holds NaN or infinity; nothing is written.
    """
    for stem, values in tensors.items():
        bad = [k for k, v in values.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if bad:
            raise FloatingPointError(
                f"step {step}: {len(bad)} tensors of {stem} hold NaN or infinity{_some(bad)}; this checkpoint is not saved. "
                "Restart from the previous one with a lower optim.lr or optim.clip, or a longer optim.warmup"
            )
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for stem, values in tensors.items():
            file = partial / f"{stem}.safetensors"
            save_file({k: v.contiguous() for k, v in values.items()}, file)
            file.chmod(storage.file_mode())
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        files = {}
        for path in sorted(partial.iterdir()):
            _sync(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        (partial / COMPLETE).write_text(json.dumps({"step": step, "files": files}, indent=1))
        _sync(partial / COMPLETE)
        storage.sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        storage.sync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(root).free / 2**30
        raise OSError(
            f"{final}: cannot be written ({error}; {free:.1f} GiB free there): make room and start the run again; it "
            "resumes from the previous checkpoint"
        ) from error
    return final


def prune(root: Path, keep: int, *, every: int = 0, best: str = "", busy: Iterable[Path] = ()) -> None:
    """Removes checkpoints that nothing asks to keep.

    Args:
        root: folder of the run's checkpoints.
        keep: number of newest ones that stay.
        every: those at multiples of this many steps stay; 0: none for that reason.
        best: the one with the highest value of this metric in ``scores.json`` stays; "": none for that reason.
        busy: those that are being uploaded stay this time.
    """
    there = complete_steps(root)
    stay = {*there[-keep:], *busy}
    if every:
        stay |= {p for p in there if step_of(p) % every == 0}
    if best:
        scores = {int(step): values[best] for step, values in read_scores(root).items() if best in values}
        known = [p for p in there if step_of(p) in scores]
        stay |= {max(known, key=lambda p: scores[step_of(p)])} if known else set()
    for path in there:
        if path not in stay:
            shutil.rmtree(path)


def read_scores(root: Path) -> dict[str, dict[str, float]]:
    """Metrics of evaluations by step, of the run whose checkpoints are here."""
    path = root / "scores.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_scores(root: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Remembers an evaluation, for ``prune``."""
    root.mkdir(parents=True, exist_ok=True)
    scores = {**read_scores(root), str(step): {k: v for k, v in metrics.items() if v == v}}
    storage.publish(json.dumps(scores).encode(), str(root / "scores.json"))


def step_of(path: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def folder_name(step: int) -> str:
    """As ``step_of`` reads it."""
    return f"step-{step:08d}"


def upload(path: Path, url: str) -> None:
    """Copies a complete checkpoint below a URL: its files, then COMPLETE.json, then ``latest.json``, which names it."""
    names = [*_listed((path / COMPLETE).read_bytes(), path), COMPLETE]
    for name in names:
        storage.publish(path / name, storage.join(url, path.name, name))
    storage.publish(json.dumps({"checkpoint": path.name}).encode(), storage.join(url, LATEST))


def latest_remote(url: str) -> int | None:
    """Step of the newest checkpoint that is complete below a URL; None if there is none."""
    try:
        found = storage.read_bytes(storage.join(url, LATEST))
    except FileNotFoundError:
        return None
    try:
        named = re.fullmatch(r"step-(\d{8})", json.loads(found)["checkpoint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        named = None
    if named is None:
        raise Damaged(f"{storage.join(url, LATEST)}: does not name a checkpoint; remove it to start without")
    return int(named[1])


def remote_steps(url: str) -> list[int]:
    """Steps of checkpoints below a URL up to the newest complete one, oldest first."""
    last = latest_remote(url)
    if last is None:
        return []
    found: set[int] = set()
    with contextlib.suppress(PermissionError):  # without the right to list, the newest is all that is known
        found = {int(m[1]) for name in storage.folders(url) if (m := re.fullmatch(r"step-(\d{8})", name))}
    return sorted({step for step in found if step <= last} | {last})


def download(url: str, step: int, root: Path) -> Path:
    """Brings a remote checkpoint into ``root``, verified, unless it is there. Nodes that share ``root`` may do so at once.

    Raises:
        ValueError: it is not complete there, or damaged.
    """
    final = root / f"step-{step:08d}"
    # Containers of one job often have the same process number.
    partial = root / f".partial-{step:08d}-{socket.gethostname()}-{os.getpid()}"
    if (final / COMPLETE).is_file():
        return final
    source = storage.join(url, final.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        listed = storage.read_bytes(storage.join(source, COMPLETE))
        for name in _listed(listed, source):
            storage.fetch(storage.join(source, name), partial / name)
        (partial / COMPLETE).write_bytes(listed)
        Checkpoint(partial)
        for path in partial.iterdir():
            _sync(path)
        storage.sync_folder(partial)
        try:
            partial.rename(final)
        except OSError:
            if not (final / COMPLETE).is_file():  # of a node that was faster
                raise
        storage.sync_folder(root)
    except FileNotFoundError as error:
        raise Damaged(f"{source}: incomplete ({error}); remove {LATEST} there to start without it") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


class Uploader:
    """Uploads checkpoints one at a time in a background thread. Failures are reported and retried every
    ``AGAIN`` seconds and with the next checkpoint, and does not end the run.

    Attributes:
        url: below which. busy: checkpoints that wait or are under way, oldest first. seconds: of the last upload.
    """

    AGAIN, MOST = 60.0, 8  # seconds; checkpoints that wait: they take room on the disk

    def __init__(self, url: str) -> None:
        self.url, self.busy, self.seconds, self.failed = url, [], 0.0, ""
        self._change, self._fresh, self._deadline = threading.Condition(), False, 0.0
        self._thread = threads.start("upload", self._work, self._ended)

    def add(self, path: Path) -> None:
        """Queues a checkpoint's folder. Beyond ``MOST``, an old one is given up, and said so."""
        with self._change:
            self.busy.append(path)
            while len(self.busy) > self.MOST:
                # The oldest is the one under way, unless nothing gets through.
                left = self.busy.pop(0 if self.failed else 1)
                self._say(f"{left.name} will not be uploaded to {self.url}: {self.MOST} newer ones are waiting")
            self._fresh = True
            self._change.notify_all()

    def close(self, wait: float) -> bool:
        """Waits this many seconds for what is left; whether everything is there."""
        with self._change:
            self._deadline = time.monotonic() + wait
            self._change.notify_all()
        self._thread.join(wait)
        return not self.busy and not self.failed

    def _ended(self, error: BaseException) -> None:
        self.failed = f"{type(error).__name__}: {error}"
        self._say(f"nothing more is uploaded to {self.url} ({self.failed}); it stays here")

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._fresh or self._deadline, self.AGAIN if self.busy else None)
                self._fresh, waiting = False, list(self.busy)
            for path in waiting:
                if not self._upload(path):
                    break  # the store's trouble is that of the others too
            if self._deadline:
                if not self.busy or time.monotonic() > self._deadline:
                    return
                time.sleep(1.0)

    def _upload(self, path: Path) -> bool:
        began = time.perf_counter()
        try:
            upload(path, self.url)
        except Exception as error:  # the store's trouble is not training's
            if str(error) != self.failed:
                self._say(f"{path.name} was not uploaded to {self.url} ({error}); it stays here and will be retried")
            self.failed = str(error)
            if (path / COMPLETE).is_file():
                return False
        else:
            self.seconds, self.failed = time.perf_counter() - began, ""
        with self._change:
            if path in self.busy:
                self.busy.remove(path)
        return True


def complete_steps(root: Path) -> list[Path]:
    """Complete checkpoints below ``root``, oldest first."""
    return sorted(p.parent for p in root.glob("step-*/COMPLETE.json"))


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete_steps(root)
    return found[-1] if found else None


class Checkpoint:
    """Reads one checkpoint folder, verified.

    Args:
        path: the folder ``step-…``, or a run's folder: its newest complete checkpoint is taken, or if that one is damaged,
            the one before, which is said.
        strict: what is damaged is an error; nothing else is taken.
        hashed: whether to compare the content with its SHA-256; False where another process of this machine just did.

    Raises:
        ValueError: nothing complete there, or a file is missing, truncated or changed.
    """

    def __init__(self, path: str | Path, strict: bool = False, hashed: bool = True) -> None:
        path = Path(path)
        candidates = [path]
        if not (path / COMPLETE).is_file():
            candidates = next((found for root in (path, path / "checkpoints") if (found := complete_steps(root))), [])
            if not candidates:
                raise ValueError(f"{path}: no complete checkpoint there (no step-*/COMPLETE.json)")
        while True:
            self.path = candidates.pop()
            try:
                self.state = _verified(self.path, hashed)
                return
            except Damaged as error:
                if strict or not candidates:
                    raise
                print(f"WARNING: {error}; taking {candidates[-1].name}, the one before", file=sys.stderr, flush=True)

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Tensors of one file by name; {} if the checkpoint has no such file."""
        file = self.path / f"{stem}.safetensors"
        try:
            return load_file(file) if file.exists() else {}
        except SafetensorError as error:
            raise Damaged(f"{file}: damaged ({str(error)[:120]}); take another checkpoint") from None

    @property
    def digest(self) -> str:
        """16 hex digits that name the content of all files."""
        files = _listed((self.path / COMPLETE).read_bytes(), self.path)
        listed = json.dumps({name: want["sha256"] for name, want in sorted(files.items())})
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def weights(self) -> dict[str, Tensor]:
        """What to evaluate or to start from: the averaged weights where there are any, else the last ones."""
        return {**self.tensors("model"), **self.tensors("ema")}


def _listed(data: bytes, where: object) -> dict[str, dict]:
    """``files`` of a COMPLETE.json. Its names become paths, here and below URLs, so they must be plain names of files.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        files = json.loads(data)["files"]
        good = all(
            _FILE.fullmatch(n) and type(w["size"]) is int and isinstance(w["sha256"], str) for n, w in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise Damaged(f"{where}/{COMPLETE}: damaged (not what was written); take another checkpoint")
    return files


def sensors(state: Mapping[str, Any]) -> list[str]:
    """Names of the sensors that a run's samples were made of, in order."""
    return next((list(state[key]) for key in SENSORS if key in state), [])


def scenes(state: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of all scenes that weights were trained on: of all streams of the run, and of those that it started from. None: that
    is not known."""
    return frozenset(state["scenes"]) if "scenes" in state else None


def scenes_of(path: str | Path) -> frozenset[str] | None:
    """``scenes`` of a checkpoint's or run's folder that was verified; None for a file of weights."""
    return scenes(Checkpoint(path, strict=True, hashed=False).state) if Path(path).is_dir() else None


def _check_state(state: object, where: Path) -> None:
    """Raises Damaged if fields of a state are of another type or out of range."""
    bad = _wrong_fields(state) if isinstance(state, dict) else ["it"]
    if bad:
        raise Damaged(f"{where}: {bad[0]} is not what was written; take another checkpoint")


def _wrong_fields(state: dict) -> list[str]:
    kinds = {"config": dict, "data": dict, "fingerprints": (dict, list, str), "groups": list} | dict.fromkeys(
        NAMES, list
    )
    bad = [name for name, kind in kinds.items() if name in state and not isinstance(state[name], kind)]
    whole = (name for name in ("step", "ema_updates") if state.get(name) is not None)
    bad += [name for name in whole if type(state[name]) is not int or not 0 <= state[name] < 2**53]
    for key in NAMES:
        if key not in bad and not all(isinstance(name, str) for name in state.get(key, ())):
            bad.append(key)
    if "groups" not in bad and not all(isinstance(g, dict) for g in state.get("groups", ())):
        bad.append("groups")
    return bad


def _verified(path: Path, hashed: bool = True) -> dict:
    """``state.json`` of a checkpoint whose files are all as COMPLETE.json says. Raises Damaged that names the file."""
    files = _listed((path / COMPLETE).read_bytes(), path)
    for name, want in files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{file}: missing, though {path.name} was complete; take another checkpoint")
        if file.stat().st_size != want["size"] or (hashed and sha256(file) != want["sha256"]):
            raise Damaged(f"{file}: damaged (size or SHA-256 differ from COMPLETE.json); take another checkpoint")
    try:
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / 'state.json'}: damaged ({str(error)[:120]}); take another checkpoint") from None
    _check_state(state, path / "state.json")
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is neither found nor counted again; returns where it is then."""
    target = path.with_name(f"{ASIDE}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights of a checkpoint folder, a run's folder, an exported ``.safetensors``, or a ``.pt`` or ``.pth`` state dict, also one
    that detection frameworks wrap as ``model_state`` or ``state_dict``."""
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, strict=True).weights()
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint (expected a run's folder, step-… folder or .safetensors file)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable weights file ({str(error)[:120]})") from None
    except Exception as error:
        # weights_only refuses anything but tensors; say what to do instead of suggesting to trust the file.
        raise ValueError(
            f"{path}: refused ({type(error).__name__}); save plain tensors, best as .safetensors"
        ) from None
    for name in ("model_state", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: is not a state dict; save plain tensors by name, best as .safetensors")
    return dict(found)


def load_declared(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    expected: Iterable[str],
    *,
    origin: str,
    dropped: tuple[str, ...] = (),
) -> list[str]:
    """Copies exactly the declared keys into a module.

    Args:
        module: receives the values.
        weights: by name.
        expected: keys of ``module.state_dict()`` that must come from ``weights``, all of them.
        origin: path, for messages.
        dropped: prefixes of keys in ``weights`` that are left behind on purpose.

    Returns:
        Keys of the module that were not declared and keep their initial values.

    Raises:
        ValueError: a declared key is missing or has another shape, or ``weights`` has keys that nobody declared; nothing
            is loaded then.
    """
    own = module.state_dict()
    expected = list(expected)
    missing = [k for k in expected if k not in weights]
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in expected
        if k in weights and weights[k].shape != own[k].shape
    ]
    if missing or shapes:
        raise ValueError(
            f"{origin} does not fit this model: {len(missing)} of {len(expected)} declared tensors are missing"
            f"{_some(missing)}, {len(shapes)} have another shape{_some(shapes)}. "
            "It was made by another model, grid or size; use the recipe that it was trained with"
        )
    left = sorted(k for k in weights.keys() - set(expected) if not k.startswith(dropped))
    if left:
        raise ValueError(
            f"{origin} does not fit this model: it has {len(left)} tensors that this model neither uses nor drops "
            f"on purpose{_some(left)}. Give a run of an earlier stage of the same model"
        )
    with torch.no_grad():
        for key in expected:
            own[key].copy_(weights[key])
    return [k for k in own if k not in set(expected)]


def _some(items: list[str]) -> str:
    return f" ({', '.join(items[:4])}{', …' if len(items) > 4 else ''})" if items else ""


def sha256(path: Path) -> str:
    """Of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
