"""Records of other people's tables: every field is checked where it is read, and an error names table, row and field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from occstream.sharding.rawfiles import pose_of
from occstream.sharding.rawtree import Place

FARTHEST = 1e8  # meters from the origin of a map: further than any projection of the earth puts a vehicle
LARGEST = 2**53  # whole numbers beyond it do not survive JSON


class Row:
    """One record.

    Args:
        where: names it in errors: file and token.
        values: its fields.

    Raises:
        ValueError: it is no record (or, in the methods: a field is missing, of another type or out of range).
    """

    __slots__ = ("values", "where")

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: is {_short(values)}, not a record of fields")
        self.where, self.values = where, values

    def error(self, field: str, problem: str) -> ValueError:
        """The error of a field, to be raised."""
        return ValueError(f"{self.where}: {field} {problem}")

    def _of(self, field: str) -> Any:
        try:
            return self.values[field]
        except KeyError:
            raise self.error(field, "is missing; the file is damaged or of another version") from None

    def has(self, field: str) -> bool:
        """Whether the field is there, not null and not empty."""
        value = self.values.get(field)
        try:
            return value is not None and len(value) > 0
        except TypeError:  # a number, or an array without axes
            return True

    def text(self, field: str, empty: bool = False) -> str:
        """A string; not the empty one unless ``empty``."""
        value = self._of(field)
        if not isinstance(value, str) or not (value or empty):
            raise self.error(field, f"is {_short(value)}, not {'a' if empty else 'a non-empty'} text")
        return value

    def path(self, field: str) -> str:
        """A relative path that stays below the folder it is joined to."""
        value = self.text(field)
        parts = Path(value.replace("\\", "/")).parts
        if "\0" in value or ".." in parts or Path(value).is_absolute():
            raise self.error(field, f"is {_short(value)}; it must be below the data set's folder")
        return value

    def flag(self, field: str) -> bool:
        value = self._of(field)
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(field, f"is {_short(value)}, not true or false")
        return bool(value)

    def whole(self, field: str, low: int = -LARGEST, high: int = LARGEST) -> int:
        """A whole number, ``low <= number <= high``."""
        value = self._of(field)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise self.error(field, f"is {_short(value)}, not a whole number")
        if not (low <= value <= high and value == math.floor(value)):
            raise self.error(field, f"is {_short(value)}, not a whole number {low} to {high}")
        return int(value)

    def numbers(self, field: str, *shape: int, far: float = FARTHEST) -> np.ndarray:
        """float64 of a shape (-1: any length), finite, at most ``far`` from 0."""
        value = self._of(field)
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            array = np.asarray("")
        if array.dtype.kind not in "fiu":
            raise self.error(field, f"is {_short(value)}, not numbers")
        array = array.astype(np.float64)
        if array.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, array.shape)):
            raise self.error(field, f"has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise self.error(field, f"is not finite ({_short(value)}); correct or remove the row")
        if not (np.abs(array) <= far).all():
            raise self.error(field, f"is {_short(value)}, beyond {far:g}")
        return array

    def rotation(self, field: str) -> np.ndarray:
        """(3, 3) float64 of a unit quaternion w, x, y, z or of a rotation matrix."""
        value = self._of(field)
        if np.shape(value) == (3, 3) if isinstance(value, np.ndarray) else isinstance(value, list) and len(value) == 3:
            turn = self.numbers(field, 3, 3)
            if not (np.allclose(turn @ turn.T, np.eye(3), atol=1e-3) and np.linalg.det(turn) > 0):
                raise self.error(field, f"is {_short(value)}, not a rotation")
            return turn
        w, x, y, z = self.numbers(field, 4)
        if not 0.9 < w * w + x * x + y * y + z * z < 1.1:
            raise self.error(field, f"is {_short(value)}, not a unit quaternion (w, x, y, z)")
        return pose_of((0, 0, 0), (w, x, y, z))[:3, :3]

    def pose(self, translation: str, rotation: str) -> np.ndarray:
        """(4, 4) float64 of a translation in meters and a rotation."""
        pose = np.eye(4)
        pose[:3, 3], pose[:3, :3] = self.numbers(translation, 3), self.rotation(rotation)
        return pose

    def intrinsics(self, field: str) -> np.ndarray:
        """(3, 3) float64, pixels."""
        k = self.numbers(field, 3, 3)
        if not (k[0, 0] > 0 and k[1, 1] > 0 and np.allclose(k[2], [0, 0, 1])):
            raise self.error(field, f"is {_short(k.tolist())}, not those of a camera (fx, fy > 0, last row 0 0 1)")
        return k

    def row(self, field: str) -> Row:
        """A record within the record."""
        return Row(f"{self.where}: {field}", self._of(field))

    def texts(self, field: str) -> list[str]:
        value = self._of(field)
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise self.error(field, f"is {_short(value)}, not a list of strings")
        return list(value)


def read_list(path: Place) -> list:
    """The list that a JSON file holds. Raises ValueError if it is missing, damaged or holds something else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: table is missing; the metadata archive of nuScenes holds all of them") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); unpack the metadata archive again") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: holds {_short(found)}, not a list of records; unpack the metadata archive again")
    return found


class Table:
    """A JSON file with a list of records that have tokens.

    Args:
        path: of the file.

    Raises:
        ValueError: it is missing or damaged, or two records have one token.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.records = read_list(path)
        try:
            self.by_token = {record["token"]: record for record in self.records}
        except (KeyError, TypeError):
            self.by_token = {self._named(i).text("token"): record for i, record in enumerate(self.records)}
        if len(self.by_token) != len(self.records) or not all(map(str.__instancecheck__, self.by_token)):
            seen: set[str] = set()
            for i in range(len(self.records)):
                token = self._named(i).text("token")
                if token in seen:
                    raise ValueError(f"{path}: has two rows with token {token!r}; unpack the archive again")
                seen.add(token)

    def _named(self, number: int) -> Row:
        return Row(f"{self.path}: row number {number}", self.records[number])

    def row(self, record: Any) -> Row:
        """One of its records, with its fields checked on reading."""
        token = record.get("token") if isinstance(record, Mapping) else None
        return Row(f"{self.path}: row {token}" if token else str(self.path), record)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, self.records)

    def join(self, row: Row, field: str) -> Row:
        """The record whose token a field of another table's row holds. Raises ValueError that names both."""
        token = row.text(field)
        if token not in self.by_token:
            raise row.error(
                field, f"is {token!r}, which {self.path.name} does not have; the tables do not belong together"
            )
        return self.row(self.by_token[token])


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # of objects that a damaged file made
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
