"""The kernel that ``cudapull`` launches, in Triton. Importing this needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**63))  # a score below all


@triton.jit
def _floor_share(amount, part):
    """amount * part // 255 as Python divides: also below 0 to the lower number. ``part`` is 0 to 255."""
    product = amount * part
    return tl.where(product >= 0, product // 255, -((-product + 254) // 255))


@triton.jit
def _amounts(
    said, at, view, live, weights, shares, place, table, voxels, classes, words, c, BAYES: tl.constexpr
):  # fmt: skip
    """(V, CH) int64: what a voxel that says a class adds to the score of each."""
    if BAYES:
        bin_of = tl.load(place + at, mask=live, other=0).to(tl.int64)
        row = (bin_of * 2 + view) * words + said
        wanted = live[:, None] & (c < classes)[None, :]
        return tl.load(table + row[:, None] * classes + c[None, :], mask=wanted, other=0).to(tl.int64)
    weight = tl.load(weights + view * voxels + at, mask=live, other=0).to(tl.int64)
    weight *= tl.load(shares + said, mask=live, other=0)
    return tl.where(c[None, :] == said[:, None], weight[:, None], 0)


@triton.jit
def _place(m, i, j, k, live, a, b, c_size):
    """Whether a target voxel's center lies in a source, and in which of its voxels. Sums in the order of the reference."""
    x = tl.load(m) * i + tl.load(m + 1) * j + tl.load(m + 3) + tl.load(m + 2) * k
    y = tl.load(m + 4) * i + tl.load(m + 5) * j + tl.load(m + 7) + tl.load(m + 6) * k
    z = tl.load(m + 8) * i + tl.load(m + 9) * j + tl.load(m + 11) + tl.load(m + 10) * k
    inside = live & (x >= 0) & (x < a) & (y >= 0) & (y < b) & (z >= 0) & (z < c_size)
    # Elsewhere a place may be beyond any whole number.
    x, y, z = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0), tl.where(inside, z, 0.0)
    return inside, (x.to(tl.int64) * b + y.to(tl.int64)) * c_size + z.to(tl.int64)


@triton.jit
def _own_stays(
    own, best, asked, at, source, place, things, trusted, classes, words, TRUSTED: tl.constexpr
):  # fmt: skip
    """Whether the target's own thing stays where the others say thing or free; ``source`` is the target."""
    mine = asked & (own < classes)
    mine = mine & (tl.load(things + own, mask=mine, other=0) != 0)
    mine = mine & ((tl.load(things + best, mask=asked, other=0) != 0) | (best == classes - 1))
    if TRUSTED:
        byte = tl.load(source + at, mask=mine, other=0).to(tl.int64)
        row = (tl.load(place + at, mask=mine, other=0).to(tl.int64) * 2 + (byte >> 7)) * words + own
        mine = mine & (tl.load(trusted + row, mask=mine, other=0) != 0)
    return mine


@triton.jit
def _share_of(best, score, known, c):
    """(V,) uint8: the share of the votes that a class has; 255 is all."""
    chosen = tl.sum(tl.where(c[None, :] == best[:, None], score, 0), 1)
    total = tl.sum(tl.where(known, score, 0), 1)
    share = 255.0 * chosen.to(tl.float64) / tl.where(total > 0, total, 1).to(tl.float64) + 0.5
    return tl.where(total > 0, tl.floor(share), 0.0).to(tl.uint8)


@triton.jit
def pull(
    index, maps, sources, second, sure, slots, numbers, weights, shares, place, table, prior, things, trusted, out, frames,
    last, confidence, count, sources_count, itself, classes, words, a, b, c_size,
    BAYES: tl.constexpr, DOUBTS: tl.constexpr, PARKED: tl.constexpr, TRUSTED: tl.constexpr, DETAILS: tl.constexpr,
    VOXELS: tl.constexpr, CH: tl.constexpr,
) -> None:  # fmt: skip
    """One program for some target voxels, which all sources are pulled into, in their order; ``index`` (V, 3) int32 and
    ``out`` are of these voxels alone. Places are float64 sums in the order of the reference, and must not be fused."""
    n = tl.program_id(0).to(tl.int64) * VOXELS + tl.arange(0, VOXELS)
    live = n < count
    i = tl.load(index + n * 3, mask=live, other=0).to(tl.float64)
    j = tl.load(index + n * 3 + 1, mask=live, other=0).to(tl.float64)
    k = tl.load(index + n * 3 + 2, mask=live, other=0).to(tl.float64)
    c = tl.arange(0, CH)
    voxels = a.to(tl.int64) * b * c_size
    score, of_things = tl.zeros([VOXELS, CH], tl.int64), tl.zeros([VOXELS, CH], tl.int64)
    votes, views = tl.zeros([VOXELS], tl.int32), tl.zeros([VOXELS], tl.int32)
    seen_things, others = tl.zeros([VOXELS], tl.int32), tl.zeros([VOXELS], tl.int32)
    latest = tl.full([VOXELS], -1, tl.int32)
    for s in range(sources_count):
        slot = tl.load(slots + s)
        inside, at = _place(maps + s * 12, i, j, k, live, a, b, c_size)
        byte = tl.load(sources + slot * voxels + at, mask=inside, other=127).to(tl.int64)
        said, view = byte & 127, byte >> 7
        speaks = inside & (said != 127)
        thing = tl.load(things + said, mask=speaks, other=0) != 0
        votes += speaks.to(tl.int32)
        views += (speaks & (view != 0)).to(tl.int32)
        foreign = s != itself
        if PARKED:
            seen_things += (thing & (view != 0)).to(tl.int32)
            others += (thing & foreign).to(tl.int32)
        if DETAILS:
            latest = tl.where(speaks, tl.maximum(latest, tl.load(numbers + s)), latest)
        first = _amounts(said, at, view, speaks, weights, shares, place, table, voxels, classes, words, c, BAYES)
        if DOUBTS:
            other = tl.load(second + slot * voxels + at, mask=speaks, other=255).to(tl.int64)
            part = tl.load(sure + slot * voxels + at, mask=speaks, other=255).to(tl.int64)
            two = speaks & (other < classes)
            other = tl.where(two, other, 0)
            first = tl.where(two[:, None], _floor_share(first, part[:, None]), first)
            more = _amounts(other, at, view, two, weights, shares, place, table, voxels, classes, words, c, BAYES)
            more = _floor_share(more, (255 - part)[:, None])
            score += more
            if PARKED:
                moves = two & foreign & (tl.load(things + other, mask=two, other=0) != 0)
                of_things += tl.where(moves[:, None], more, 0)
        score += first
        if PARKED:
            of_things += tl.where((thing & foreign)[:, None], first, 0)
    moving = live & (votes < 0)  # nowhere
    if PARKED:
        moving = 2 * seen_things < views
        votes = tl.where(moving, votes - others, votes)
        score = tl.where(moving[:, None], score - of_things, score)
    if BAYES:
        score += tl.load(prior + c, mask=c < classes, other=0)[None, :]
    known = (c < classes)[None, :]
    most = tl.max(tl.where(known, score, LEAST), 1)
    best = tl.min(tl.where(known & (score == most[:, None]), c[None, :], CH), 1)
    decided = live & (votes > 0)
    if not BAYES:
        decided = decided & (most > 0)
    own = tl.load(out + n, mask=live, other=255).to(tl.int32)
    if PARKED:
        where = (i.to(tl.int64) * b + j.to(tl.int64)) * c_size + k.to(tl.int64)
        source = sources + tl.load(slots + tl.maximum(itself, 0)) * voxels
        asked = moving & decided
        mine = _own_stays(own, best, asked, where, source, place, things, trusted, classes, words, TRUSTED)
        best = tl.where(mine, own, best)
    tl.store(out + n, tl.where(decided, best, own).to(tl.uint8), mask=live)
    if DETAILS:
        tl.store(frames + n, votes, mask=decided)
        tl.store(last + n, latest, mask=decided)
        share = _share_of(best, score, known, c)
        tl.store(confidence + n, share, mask=decided)
