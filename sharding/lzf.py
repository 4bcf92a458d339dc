"""LZF, as PCD files compress points: runs of literals, and repetitions of what came up to 8 KiB before."""

from __future__ import annotations

import numba
import numpy as np


def unpack(data: bytes, size: int) -> bytes:
    """Decompresses to exactly ``size`` bytes. Raises ValueError if the data do not give so many."""
    out = np.zeros(size, np.uint8)
    if _unpack(np.frombuffer(data, np.uint8), out) != size:
        raise ValueError(f"compressed points do not unpack to the {size} bytes that are announced")
    return out.tobytes()


@numba.njit(cache=True, nogil=True)
def _unpack(data: np.ndarray, out: np.ndarray) -> int:
    """Bytes written; -1 if a run leads out of either."""
    at = to = 0
    while at < len(data):
        control = int(data[at])
        at += 1
        if control < 32:
            run = control + 1
            if at + run > len(data) or to + run > len(out):
                return -1
            out[to : to + run] = data[at : at + run]
            at += run
            to += run
            continue
        run = control >> 5
        if run == 7:
            if at >= len(data):
                return -1
            run += int(data[at])
            at += 1
        if at >= len(data):
            return -1
        start = to - ((control & 31) << 8) - int(data[at]) - 1
        at += 1
        run += 2
        if start < 0 or to + run > len(out):
            return -1
        for i in range(run):  # they may overlap: each byte may repeat one that was written just now
            out[to + i] = out[start + i]
        to += run
    return to
