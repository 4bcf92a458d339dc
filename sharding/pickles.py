"""Reads pickles of plain values and numpy arrays that come from other people.

Nothing of a pickle runs, and numpy's own functions of reconstruction are not called either: fed with a forged dtype or
state they read and write foreign memory. Stand-ins take what numpy would be given, and arrays are then made from bytes, a
plain dtype and a shape that fit each other.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|[SU][0-9]{1,4})|bool|u?int(8|16|32|64)|float(16|32|64)")
_ROOM = 4 << 30  # bytes that reading may take in addition to a multiple of the file's size
DEEPEST = 100


class _Kind:
    """Stands for ``numpy.dtype``: one of numbers, truth values or text, and nothing else."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise pickle.UnpicklingError(f"an array of type {str(name)[:40]!r}")
        self.dtype = np.dtype(name)
        if not self.dtype.itemsize:
            raise pickle.UnpicklingError("an array of values without size")

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, sub-array, names, fields, item size, alignment, flags): only the order is taken over.
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of a structured type")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array that numpy would fill by ``__setstate__``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise pickle.UnpicklingError("an array in an unknown form")
        shape, kind, fortran, data = state[-4:]
        self.value = _filled(data, kind, shape, "F" if fortran is True else "C")


def _filled(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(kind, _Kind) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array of objects")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise pickle.UnpicklingError("an array of an impossible shape")
    if math.prod(shape) * kind.dtype.itemsize != len(data) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(bytes(data), kind.dtype).reshape(shape, order=order)


def _scalar(kind: Any, data: Any = b"") -> Any:
    if isinstance(data, str):
        data = data.encode("latin1")
    return _filled(data, kind, (1,), "C")[0]


def _encode(text: Any, coding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


def _bytearray(data: Any = b"") -> bytearray:
    if not isinstance(data, (bytes, bytearray)):  # a number would be a size to allocate
        raise pickle.UnpicklingError("a bytearray of something else than bytes")
    return bytearray(data)


class _Name:
    """What a pickle may name: it can be called, and nothing of it can be changed by the pickle."""

    __slots__ = ("_call",)

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"a change of {name}")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a modification of a function")


_ALLOWED = {
    ("numpy", "ndarray"): lambda *args: _Array(),
    ("numpy", "dtype"): _Kind,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *args: {},
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "bytes"): lambda *args: bytes(_bytearray(*args)),
    ("builtins", "list"): lambda *args: [],  # as the default of a defaultdict
    ("builtins", "dict"): lambda *args: {},
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")
        for module, name, made in (
            ("multiarray", "_reconstruct", lambda *args: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _filled),
        )
    },
}
# Types of plain values whose instances pickles of protocol 2 and later make by ``cls.__new__``.
_TYPES = {("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset"), ("builtins", "complex")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to import {module}.{name}")
        made = _ALLOWED[module, name]
        return made if (module, name) in _TYPES else _Name(made)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an external object")


def loads(data: bytes) -> Any:
    """Plain values and arrays of numbers, truth values and text.

    Raises:
        ValueError: says what else the pickle wants, or that it is damaged.
    """
    try:
        with _bounded(len(data)):
            return _settled(_Unpickler(io.BytesIO(data)).load(), {}, 0)
    except Exception as error:  # a damaged pickle can raise anything, MemoryError and RecursionError among it
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{reason}; only plain values and numpy arrays are accepted from pickles") from None


def _settled(value: Any, done: dict[int, Any], depth: int) -> Any:
    """The value with arrays in place of their stand-ins; lists and dicts are changed in place."""
    if isinstance(value, (_Array, _Kind, _Name, type)):
        return _array_of(value)
    if not isinstance(value, (list, dict, tuple, set, frozenset)) or id(value) in done:
        return done.get(id(value), value)
    if depth > DEEPEST:
        raise pickle.UnpicklingError(f"values nested more than {DEEPEST} deep")
    done[id(value)] = value
    if isinstance(value, list):
        value[:] = [_settled(v, done, depth + 1) for v in value]
    elif isinstance(value, dict):
        for key, inner in value.items():
            _settled(key, done, depth + 1)
            value[key] = _settled(inner, done, depth + 1)
    elif isinstance(value, tuple):
        done[id(value)] = tuple([_settled(v, done, depth + 1) for v in value])
    elif any(isinstance(v, (_Array, _Kind, _Name, type)) for v in value):
        raise pickle.UnpicklingError("an array in a set")
    return done[id(value)]


def _array_of(value: Any) -> np.ndarray:
    """The array that a stand-in is for. Raises UnpicklingError if it stands for something else."""
    if not isinstance(value, _Array):
        raise pickle.UnpicklingError("a type or function as a value")
    if value.value is None:
        raise pickle.UnpicklingError("an array without content")
    return value.value


@contextlib.contextmanager
def _bounded(size: int) -> Iterator[None]:
    """A few opcodes make unpickling allocate any amount, so memory is limited while it runs, where the system can."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            have = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = have + 32 * size + _ROOM
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
