"""Columns of Feather (Arrow IPC) and Parquet files, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from occstream.sharding.rawfiles import read_file
from occstream.sharding.rawtree import Place

TEXT, BYTES = "text", "bytes"


def read_feather(path: Place, columns: Mapping[str, str], why: str = "") -> dict[str, np.ndarray]:
    """Columns of a table, each (N,).

    Args:
        columns: by name, the dtype that they are wanted in, or ``TEXT`` (an array of ``str``). Whole numbers are only
            read from columns of whole numbers that fit.
        why: the file is wanted.

    Raises:
        ValueError: no such file, no Feather file, a column is missing, of another type, or has a row without a value or with
            one that is not finite; names file, column and row.
    """
    import pyarrow as pa
    from pyarrow import feather

    data = read_file(path, why)
    try:
        with pa.BufferReader(data) as source:
            have = pa.ipc.open_file(source).schema.names
            if lacking := [name for name in columns if name not in have]:
                raise ValueError(f"{path}: has no column {lacking[0]!r}, only {', '.join(have)[:200]}")
            table = feather.read_table(pa.BufferReader(data), columns=list(columns), use_threads=False)
            table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not readable as Feather ({said}); download it again") from None
    return _checked(table, columns, path)


def read_parquet(path: Place, columns: Mapping[str, str], why: str = "") -> dict[str, np.ndarray]:
    """As ``read_feather``, of a Parquet file; also ``"bool"`` and ``BYTES`` (an array of ``bytes``)."""
    import pyarrow as pa
    from pyarrow import parquet

    data = read_file(path, why)
    try:
        with parquet.ParquetFile(pa.BufferReader(data)) as file:
            have = file.schema_arrow.names
            if lacking := [name for name in columns if name not in have]:
                raise ValueError(f"{path}: has no column {lacking[0]!r}, only {', '.join(have)[:200]}")
            table = file.read(columns=list(columns), use_threads=False)
            table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not readable as Parquet ({said}); download it again") from None
    return _checked(table, columns, path)


def parquet_columns(path: Place) -> list[str]:
    """Names of the columns. Raises ValueError if it is no Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(pa.BufferReader(read_file(path))).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({str(error)[:120]}); download it again") from None


def _checked(table: Any, columns: Mapping[str, str], path: Place) -> dict[str, np.ndarray]:
    """Columns of a ``pyarrow.Table``."""
    found = {}
    for name, kind in columns.items():
        column = table.column(name)
        if column.null_count:
            row = next(i for i, value in enumerate(column) if not value.is_valid)
            raise ValueError(f"{path}: row {row} has no {name}; download it again")
        found[name] = _column(column, kind, f"{path}: column {name}")
    return found


def _column(column: Any, kind: str, where: str) -> np.ndarray:
    """Values of a ``pyarrow.ChunkedArray`` without empty rows."""
    import pyarrow as pa

    if kind == TEXT:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(f"{where} is {column.type}, not text; it is of another version")
        return np.array(column.to_pylist(), dtype=object).astype(str)
    if kind in (BYTES, "bool"):
        fits = pa.types.is_boolean if kind == "bool" else lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t)
        if not fits(column.type):
            raise ValueError(f"{where} is {column.type}, not {kind}; it is of another version")
        return np.array(column.to_pylist(), dtype=bool if kind == "bool" else object)
    wanted = np.dtype(kind)
    fits = pa.types.is_integer(column.type) or (wanted.kind == "f" and pa.types.is_floating(column.type))
    if not fits:
        raise ValueError(f"{where} is {column.type}, not {wanted}; it is of another version")
    values = column.to_numpy()
    if wanted.kind == "f":
        values = values.astype(wanted)
        if not (finite := np.isfinite(values)).all():
            raise ValueError(f"{where} is not finite in row {int(np.argmin(finite))}; download it again")
        return values
    if len(values) and (values.min() < np.iinfo(wanted).min or values.max() > np.iinfo(wanted).max):
        raise ValueError(f"{where} holds numbers beyond {wanted}; it is of another version")
    return values.astype(wanted)
