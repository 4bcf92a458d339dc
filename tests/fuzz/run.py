"""Changes valid inputs at random and looks for what no reader documents.

python -m tests.fuzz.run [TARGET [SECONDS]]      counts, and for each new kind of failure the input
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Iterator

from tests.fuzz.targets import TARGETS, Target, members_of, packed

JUNK = (
    None, True, -1, 0, 1.5, 1e9, 10**9, 2**63, 10**400, float("nan"), "", "x", "../../x", "a\nb", [], {}, [[]], [None], {"": 0},
)  # fmt: skip
PIECES = (
    b"",
    b"\0",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"-1",
    b"1e9",
    b"99999999999999999999",
    b"nan",
    b"../",
    b"[" * 50,
    b"{",
    b'"',
)


def changed(seed: bytes, draw: random.Random) -> bytes:
    """A seed with a few bytes changed, or with other values in its JSON."""
    at = seed.find(b"{")
    if at >= 0 and draw.random() < 0.5:
        starts = [i for i in range(len(seed)) if seed.startswith(b'{"', i)]
        for start in draw.sample(starts, min(len(starts), 3)):
            try:
                value, end = json.JSONDecoder().raw_decode(seed[start:].decode("latin1"))
            except ValueError:
                continue
            text = json.dumps(_junked(value, draw)).encode("latin1", "replace")
            return seed[:start] + text + seed[start + end :]
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            data[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        elif kind == 2:
            del data[at : at + draw.choice((1, 4, 64, len(data)))]
        elif kind == 3:
            data[at : at + draw.choice((0, 1, 4))] = draw.choice(PIECES)
        else:
            other = draw.randrange(len(data) + 1)
            data[at:at] = data[other : other + draw.randrange(64)]
    return bytes(data)


def _member_changed(seed: bytes, draw: random.Random) -> bytes:
    members = members_of(seed)
    name = draw.choice(sorted(members))
    if draw.random() < 0.05:
        del members[name]
    else:
        members[name] = changed(members[name], draw)
    return packed(members or {"x": b""})


def _junked(value, draw: random.Random):
    """JSON with one value, somewhere, replaced, removed or doubled."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(list(keys))
        if draw.random() < 0.1:
            del value[key]
        elif isinstance(value, list) and draw.random() < 0.1:
            value.append(value[key])
        else:
            value[key] = _junked(value[key], draw)
        return value
    return draw.choice(JUNK)


def failures(target: Target, draw: random.Random, rounds: Iterator) -> Iterator[tuple[bytes, Exception]]:
    """Inputs on which a reader raises what it does not document. The valid ones must be read."""
    for seed in target.seeds:
        target.read(seed)
    for _ in rounds:
        data = draw.choice(target.seeds)
        for _ in range(draw.choice((1, 1, 2))):
            data = _member_changed(data, draw) if target.members else changed(data, draw)
        try:
            target.read(data)
        except target.allowed:
            pass
        except Exception as error:
            yield data, error


def main(name: str = "", seconds: str = "10") -> int:
    found = 0
    for target in [name] if name else TARGETS:
        count, kinds, end = 0, set(), time.process_time() + float(seconds)

        def rounds(end=end):
            nonlocal count
            while time.process_time() < end:
                count += 1
                yield count

        for data, error in failures(TARGETS[target], random.Random(time.time_ns()), rounds()):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = type(error).__name__, frame.filename, frame.lineno
            if kind not in kinds:
                kinds.add(kind)
                print(f"{target}: {kind[0]} at {kind[1]}:{kind[2]}: {str(error)[:200]}\n    {data[:400]!r}", flush=True)
        print(f"{target}: {count} inputs in {seconds} s of CPU, {len(kinds)} kinds of undocumented errors", flush=True)
        found += len(kinds)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
