"""Global propagation: frames of a drive vote on each other's voxels, without learning (OccFiner, Sec. III-C).

The paper pushes voxels of every frame into the target's grid, which leaves holes where grids are turned against each other.
Here each target voxel is *pulled*: its center is looked up in the grid of every source, and what the source says there
counts. Scores are sums of integers, so the order of sources, threads and machines cannot change a byte; places are float64
sums that are written out, so neither can the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numba
import numpy as np

from occstream.evaluation.rules import ABSTAIN, DOUBTFUL, IN_VIEW, LOG_UNIT, Pulled, Rule
from occstream.sharding.exactmath import decay
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.poses import compose, inverse

MOST_SOURCES = 32_767  # of one target: they are counted in 16 bits
Device = Literal["auto", "cpu", "cuda"]
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # one of them is there where a process may see a GPU (Linux, WSL)
SLACK = 1e-6  # voxels: a center that falls on a face goes to the upper voxel, whatever rounding made of it


def packed(
    semantic: np.ndarray,
    in_view: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    evidence: np.ndarray | None = None,
    free: int = ABSTAIN,
) -> np.ndarray:
    """What a source says, one byte a voxel.

    Args:
        semantic: (X, Y, Z) uint8 class ids; IGNORE says nothing.
        in_view: (X, Y, Z) bool, what a camera saw; None: everything.
        out: (X, Y, Z) uint8 to write to.
        evidence: (X, Y, Z) uint8, how probably a voxel is occupied in 255ths: free voxels (id ``free``) then say how much they
            are in doubt, by DOUBTFUL, in words after ``free``.
    """
    out = np.empty(semantic.shape, np.uint8) if out is None else out
    np.minimum(semantic, ABSTAIN, out=out)
    if evidence is not None:
        out += np.where(semantic == free, np.searchsorted(DOUBTFUL, evidence, "right"), 0).astype(np.uint8)
    if in_view is None:
        out |= IN_VIEW
    else:
        out |= in_view.view(np.uint8) << np.uint8(7)
    return out


def index_to_meters(grid: VoxelGrid) -> np.ndarray:
    """(4, 4) float64: voxel index -> center in meters of the grid's frame."""
    out = np.diag([*grid.voxel, 1.0])
    out[:3, 3] = np.asarray(grid.lower) + 0.5 * np.asarray(grid.voxel)
    return out


def pull_maps(
    target: VoxelGrid, target_to_world: np.ndarray, source: VoxelGrid, sources_to_world: np.ndarray
) -> np.ndarray:
    """(S, 3, 4) float64: index of a target voxel -> place of its center in each source, in voxels from its lower corner.

    Args:
        target, source: grids.
        target_to_world: (4, 4) pose of the target's frame in any frame of the world.
        sources_to_world: (S, 4, 4) likewise.
    """
    to_source = compose(inverse(sources_to_world), target_to_world, index_to_meters(target))
    out = to_source[..., :3, :].copy()
    out[..., 3] -= source.lower
    out /= np.asarray(source.voxel)[:, None]
    out[..., 3] += SLACK
    return out


def overlapping(maps: np.ndarray, begin: Sequence[int], end: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """(S,) bool: sources whose box the target voxels ``begin`` to ``end`` may reach; what is False cannot."""
    corners = np.array(np.meshgrid(*([b, e - 1] for b, e in zip(begin, end)), indexing="ij"), float).reshape(3, 8)
    place = compose(maps, np.vstack([corners, np.ones(8)]))  # (S, 3, 8)
    size = np.asarray(shape, float)[:, None]
    beyond = (place < 0).all(-1) | (place >= size).all(-1)
    return np.asarray(~beyond.any(-1))


def pull(
    rule: Rule,
    maps: np.ndarray,
    sources: np.ndarray,
    slots: Sequence[int],
    *,
    before: np.ndarray,
    itself: int = -1,
    wanted: np.ndarray | None = None,
    begin: Sequence[int] = (0, 0, 0),
    end: Sequence[int] | None = None,
    details: bool = False,
    numbers: Sequence[int] | None = None,
    doubts: tuple[np.ndarray, np.ndarray] | None = None,
    threads: int = 1,
    device: Device = "auto",
) -> Pulled:
    """Scores of all sources for a box of target voxels, and the class that wins.

    The highest score wins, of equal ones the lowest class id. Where nobody votes, or all votes weigh nothing, the class
    stays as it was.

    Args:
        rule: how to count.
        maps: (S, 3, 4) of ``pull_maps``.
        sources: (any, *grid's shape) uint8 of ``packed``.
        slots: S places in ``sources``.
        before: (X, Y, Z) uint8, what the target says itself (IGNORE: nothing).
        itself: which of the S sources is the target; -1: none.
        wanted: (X, Y, Z) bool, voxels to decide; None: all.
        begin, end: range of voxel indices to look at; the whole target by default.
        details: count frames and confidence as well.
        numbers: S numbers to report as ``last``; 0, 1, … by default.
        doubts: second classes (IGNORE: none) and how sure sources are of the first beside them, in 255ths, like ``sources``:
            a voxel's weight, or what a table says of it, is shared by both.
        threads: to work with on the CPU.
        device: cuda, cpu, or the GPU where there is one (auto). The same bytes come out; confidence under a table is the CPU's.

    Raises:
        ValueError: the rule was made for another grid, or there are too many sources.
    """
    if len(slots) > MOST_SOURCES:
        raise ValueError(f"{len(slots)} sources for one target, at most {MOST_SOURCES} can be counted")
    shape = sources.shape[1:]
    size = int(np.prod(shape))
    if rule.voxels != size:
        raise ValueError(f"the rule was made for a grid of {rule.voxels} voxels, not {size}")
    end, room = before.shape if end is None else end, before.shape if details else (0, 0, 0)
    frames, last, confidence = np.zeros(room, np.int32), np.full(room, -1, np.int32), np.zeros(room, np.uint8)
    out = Pulled(before.copy(), frames, last, confidence) if details else Pulled(before.copy())
    if on_gpu(device) and not (details and rule.bayes):
        from occstream.evaluation.cudapull import pull_into

        options = {"slots": slots, "itself": itself, "numbers": numbers, "doubts": doubts}
        pull_into(out, rule, maps, sources, index=_chosen(wanted, begin, end), **options)
        return out
    second, sure = (each.reshape(-1, size) for each in doubts or (np.zeros(0, np.uint8), np.zeros(0, np.uint8)))
    arguments = (
        np.ascontiguousarray(maps, np.float64),
        sources.reshape(len(sources), size),
        second,
        sure,
        np.asarray(slots, np.int64),
        np.asarray(shape, np.int64),
        np.asarray(range(len(slots)) if numbers is None else numbers, np.int32),
        int(itself),
        np.zeros((0, 0, 0), bool) if wanted is None else wanted,
        *rule.arguments(),
        out.semantic,
        frames,
        last,
        confidence,
    )

    def work(first: int, after: int) -> None:
        _pull((first, begin[1], begin[2]), (after, end[1], end[2]), *arguments)

    _in_threads(work, begin[0], end[0], threads)
    return out


def _in_threads(work: Callable[[int, int], None], begin: int, end: int, threads: int) -> None:
    """Calls work for the parts of a range."""
    cuts = np.linspace(begin, end, max(1, min(threads, end - begin)) + 1).astype(int).tolist()
    if len(cuts) == 2:
        work(*cuts)
    else:
        with ThreadPoolExecutor(len(cuts) - 1) as pool:
            list(pool.map(work, cuts[:-1], cuts[1:]))


def on_gpu(device: Device) -> bool:
    """Whether ``pull`` works on a GPU. Raises ValueError if one is asked for and there is none."""
    if device == "cpu" or (device == "auto" and not any(Path(place).exists() for place in GPU_FILES)):
        return False  # without importing torch
    from occstream.evaluation.cudapull import usable

    if device == "cuda" and not usable():
        raise ValueError("device cuda: there is no CUDA device here, or Triton is missing; use cpu or auto")
    return usable()


def _chosen(wanted: np.ndarray | None, begin: Sequence[int], end: Sequence[int]) -> np.ndarray:
    """(V, 3) indices of the target voxels to decide."""
    box = tuple(slice(b, e) for b, e in zip(begin, end))
    if wanted is None:
        return np.stack(np.meshgrid(*map(np.arange, begin, end), indexing="ij"), -1).reshape(-1, 3)
    return np.argwhere(wanted[box]) + np.asarray(begin)


def evidence(
    rule: Rule, maps: np.ndarray, sources: np.ndarray, slots: Sequence[int], *, index: np.ndarray
) -> np.ndarray:
    """(V, K + 1) int64: scores of single target voxels by a table, without the prior.

    Args:
        rule, maps, sources, slots: as for ``pull``; the rule with a table.
        index: (V, 3) int64 of the voxels.
    """
    shape = sources.shape[1:]
    out = np.zeros((len(index), rule.num_classes + 1), np.int64)
    words = len(rule.things)
    flat = sources.reshape(len(sources), -1)
    _evidence(
        index, maps, flat, np.asarray(slots, np.int64), np.asarray(shape, np.int64), rule.place, rule.table, words, out
    )
    return out


# Compiled functions take all arguments by position (numba knows no keyword-only ones).
@numba.njit(cache=True, nogil=True)
def _evidence(  # noqa: PLR0917
    index: np.ndarray, maps: np.ndarray, sources: np.ndarray, slots: np.ndarray, shape: np.ndarray, place: np.ndarray,
    table: np.ndarray, words: int, out: np.ndarray,
) -> None:  # fmt: skip
    a, b, c = shape
    classes = out.shape[1]
    for n in range(len(index)):
        i, j, k = index[n]
        for s in range(len(slots)):
            m = maps[s]
            x = m[0, 0] * i + m[0, 1] * j + m[0, 3] + m[0, 2] * k
            y = m[1, 0] * i + m[1, 1] * j + m[1, 3] + m[1, 2] * k
            z = m[2, 0] * i + m[2, 1] * j + m[2, 3] + m[2, 2] * k
            if 0 <= x < a and 0 <= y < b and 0 <= z < c:
                at = (int(x) * b + int(y)) * c + int(z)
                said = sources[slots[s], at] & 127
                if said != ABSTAIN:
                    row = (place[at] * 2 + (sources[slots[s], at] >> 7)) * words + said
                    for q in range(classes):
                        out[n, q] += table[row, q]


@numba.njit(cache=True, nogil=True)
def _misses(first: float, last: float, size: int) -> bool:
    """Whether a line from ``first`` to ``last`` lies on one side of 0..size."""
    return (first < 0 and last < 0) or (first >= size and last >= size)


@numba.njit(cache=True, nogil=True)
def _pull(  # noqa: PLR0917
    begin: tuple[int, int, int], end: tuple[int, int, int], maps: np.ndarray, sources: np.ndarray, second: np.ndarray,
    sure: np.ndarray, slots: np.ndarray, shape: np.ndarray, numbers: np.ndarray, itself: int, wanted: np.ndarray,
    weights: np.ndarray, shares: np.ndarray, place: np.ndarray, table: np.ndarray, prior: np.ndarray, things: np.ndarray,
    parked: bool, trusted: np.ndarray, out: np.ndarray, frames: np.ndarray, last: np.ndarray, confidence: np.ndarray,
) -> None:  # fmt: skip
    classes, low, height = len(shares), begin[2], end[2] - begin[2]
    bayes, some, details = len(table) > 0, wanted.size > 0, frames.size > 0
    score, of_things = np.zeros((height, classes), np.int64), np.zeros((height, classes), np.int64)
    # By voxel of the column, 16 bits each: sources that say something; of these, in view; of these, things; other frames'
    # things. One sum is faster than four.
    heard, latest = np.zeros(height, np.int64), np.zeros(height, np.int32)
    for i in range(begin[0], end[0]):
        for j in range(begin[1], end[1]):
            if some and not wanted[i, j, low : end[2]].any():
                continue
            score[:] = 0
            of_things[:] = 0
            heard[:] = 0
            latest[:] = -1
            for s in range(len(slots)):
                _hear(i, j, low, maps[s], sources[slots[s]], shape, numbers[s], s == itself, weights, shares, place,
                      table, things, parked, score, of_things, heard, latest, details)  # fmt: skip
            _doubt(i, j, low, maps, sources, second, sure, slots, shape, itself, weights, shares, place, table, things,
                   parked, score, of_things)  # fmt: skip
            for h in range(height):
                k = h + low
                if some and not wanted[i, j, k]:
                    continue
                best, votes, moving = _decide(score[h], of_things[h], prior, bayes, heard[h], parked)
                if best < 0:
                    continue
                at = (i * shape[1] + j) * shape[2] + k  # the target is the source ``itself``
                if moving and _own_stays(
                    out[i, j, k], best, things, at, itself, sources[slots[itself]], place, trusted, classes
                ):
                    best = out[i, j, k]
                out[i, j, k] = best
                if details:
                    frames[i, j, k], last[i, j, k] = votes, latest[h]
                    confidence[i, j, k] = _confidence(score[h], best, bayes)


# These two are written into the loop that calls them: as functions they cost a tenth of its time.
@numba.njit(cache=True, nogil=True, inline="always")
def _decide(  # noqa: PLR0917
    score: np.ndarray, of_things: np.ndarray, prior: np.ndarray, bayes: bool, heard: int, parked: bool
) -> tuple[int, int, bool]:
    """The class that wins at a voxel, -1 if nobody votes; how many vote; whether other frames' things were taken out."""
    votes = heard & 0xFFFF
    moving = parked and 2 * (heard >> 32 & 0xFFFF) < (heard >> 16 & 0xFFFF)
    if moving:
        votes -= heard >> 48
        for q in range(len(score)):
            score[q] -= of_things[q]
    return _winner(score, prior, bayes, votes), votes, moving


@numba.njit(cache=True, nogil=True, inline="always")
def _own_stays(  # noqa: PLR0917
    own: int, best: int, things: np.ndarray, at: int, itself: int, source: np.ndarray, place: np.ndarray,
    trusted: np.ndarray, classes: int,
) -> bool:  # fmt: skip
    """Whether the target's own thing stays where the others say thing or free; ``source`` is the target."""
    if own >= classes or not things[own] or not (things[best] or best == classes - 1):
        return False
    if len(trusted) == 0 or itself < 0:
        return True
    return bool(trusted[(place[at] * 2 + (source[at] >> 7)) * len(things) + own])


@numba.njit(cache=True, nogil=True)
def _hear(  # noqa: PLR0917
    i: int, j: int, low: int, m: np.ndarray, source: np.ndarray, shape: np.ndarray, number: int, itself: bool,
    weights: np.ndarray, shares: np.ndarray, place: np.ndarray, table: np.ndarray, things: np.ndarray, parked: bool,
    score: np.ndarray, of_things: np.ndarray, heard: np.ndarray, latest: np.ndarray, details: bool,
) -> None:  # fmt: skip
    """Adds what one source says about a column of target voxels."""
    a, b, c = shape
    height, classes = score.shape
    x0 = m[0, 0] * i + m[0, 1] * j + m[0, 3]
    y0 = m[1, 0] * i + m[1, 1] * j + m[1, 3]
    z0 = m[2, 0] * i + m[2, 1] * j + m[2, 3]
    dx, dy, dz, top = m[0, 2], m[1, 2], m[2, 2], low + height - 1
    if (
        _misses(x0 + dx * low, x0 + dx * top, a)
        or _misses(y0 + dy * low, y0 + dy * top, b)
        or _misses(z0 + dz * low, z0 + dz * top, c)
    ):
        return
    bayes = len(table) > 0
    for h in range(height):
        k = h + low
        x, y, z = x0 + dx * k, y0 + dy * k, z0 + dz * k
        if not (0 <= x < a and 0 <= y < b and 0 <= z < c):
            continue
        at = np.uint64((int(x) * b + int(y)) * c + int(z))
        said, view = source[at] & 127, source[at] >> 7
        if said == ABSTAIN:
            continue
        thing = parked and things[said]
        apart = thing and not itself
        heard[h] += 1 + (np.int64(view) << 16) + (np.int64(view and thing) << 32) + (np.int64(apart) << 48)
        if details:
            latest[h] = max(latest[h], number)
        if bayes:
            row = table[(place[at] * 2 + view) * len(things) + said]
            for q in range(classes):
                score[h, q] += row[q]
                if apart:
                    of_things[h, q] += row[q]
        else:
            weight = weights[view, at] * shares[said]
            score[h, said] += weight
            if apart:
                of_things[h, said] += weight


@numba.njit(cache=True, nogil=True)
def _doubt(  # noqa: PLR0917
    i: int, j: int, low: int, maps: np.ndarray, sources: np.ndarray, second: np.ndarray, sure: np.ndarray,
    slots: np.ndarray, shape: np.ndarray, itself: int, weights: np.ndarray, shares: np.ndarray, place: np.ndarray,
    table: np.ndarray, things: np.ndarray, parked: bool, score: np.ndarray, of_things: np.ndarray,
) -> None:  # fmt: skip
    """Takes from the first classes of what ``_hear`` has added what belongs to the second ones, if sources have any."""
    if len(second) == 0:
        return
    a, b, c = shape
    height, classes = score.shape
    for s in range(len(slots)):
        m, slot = maps[s], slots[s]
        for h in range(height):
            k = h + low
            x = m[0, 0] * i + m[0, 1] * j + m[0, 3] + m[0, 2] * k
            y = m[1, 0] * i + m[1, 1] * j + m[1, 3] + m[1, 2] * k
            z = m[2, 0] * i + m[2, 1] * j + m[2, 3] + m[2, 2] * k
            if not (0 <= x < a and 0 <= y < b and 0 <= z < c):
                continue
            at = (int(x) * b + int(y)) * c + int(z)
            said, other, view = int(sources[slot, at] & 127), int(second[slot, at]), int(sources[slot, at] >> 7)
            if said == ABSTAIN or other >= classes:
                continue
            part = int(sure[slot, at])
            apart = parked and s != itself
            words = len(things)
            _share(h, said, part, 1, at, view, weights, shares, place, table, words, score)
            _share(h, other, 255 - part, 0, at, view, weights, shares, place, table, words, score)
            if apart and things[said]:
                _share(h, said, part, 1, at, view, weights, shares, place, table, words, of_things)
            if apart and things[other]:
                _share(h, other, 255 - part, 0, at, view, weights, shares, place, table, words, of_things)


@numba.njit(cache=True, nogil=True)
def _share(  # noqa: PLR0917
    h: int, said: int, part: int, heard: int, at: int, view: int, weights: np.ndarray, shares: np.ndarray,
    place: np.ndarray, table: np.ndarray, words: int, score: np.ndarray,
) -> None:  # fmt: skip
    """Adds ``part`` of 255ths of what a class adds, less the whole where that was ``heard`` (1) already."""
    classes = score.shape[1]
    if len(table) > 0:
        row = table[(place[at] * 2 + view) * words + said]
        for q in range(classes):
            score[h, q] += row[q] * part // 255 - heard * row[q]
    else:
        amount = weights[view, at] * shares[said]
        score[h, said] += amount * part // 255 - heard * amount


@numba.njit(cache=True, nogil=True)
def _winner(score: np.ndarray, prior: np.ndarray, bayes: bool, votes: int) -> int:
    """The class of the highest score (with its prior, which is added in place), the lowest of equal ones; -1 if nothing
    was said."""
    if votes == 0:
        return -1
    if bayes:
        for q in range(len(score)):
            score[q] += prior[q]
    best = 0
    for q in range(1, len(score)):
        if score[q] > score[best]:
            best = q
    return best if bayes or score[best] > 0 else -1


@numba.njit(cache=True, nogil=True)
def _confidence(score: np.ndarray, best: int, bayes: bool) -> np.uint8:
    """The share of the votes, or the posterior, of a class; 255 is 1."""
    total, part = 0.0, 1.0
    for q in range(len(score)):
        if bayes:
            # Below e^-99 of the winner a class is nothing.
            total += decay(min(max((score[best] - score[q]) / LOG_UNIT, 0.0), 99.0))
        else:
            total += score[q]
    if not bayes:
        part = float(score[best])
    return np.uint8(np.floor(255.0 * part / total + 0.5)) if total > 0 else np.uint8(0)
