"""How far a long job is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

EVERY = 60.0  # seconds after which a log gets a line, also within a tenth of the job


class Bar:
    """Shows the shards of a job that are done, their rate, and how long the others will take at the rate of the last ones: those
    that were there before took no time. Call it after each shard, and leave its context in any case.

    Args:
        what: the job.
        terminal: whether standard error is one; there the bar is, while lines go to standard output.
        clock: seconds.
    """

    def __init__(self, what: str, *, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self._clock = what, clock
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._began = clock()
        self._last = deque([self._began], maxlen=20)  # when the last shards were done
        self._said = -math.inf
        self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, done: int, total: int, notes: Sequence[str] = ()) -> None:
        """
        Args:
            done, total: shards.
            notes: what else to say, such as failures.
        """
        self._last.append(self._clock())
        took = (self._last[-1] - self._last[0]) / (len(self._last) - 1)
        rest = (
            f"eta {_duration((total - done) * took)}"
            if done < total
            else f"took {_duration(self._last[-1] - self._began)}"
        )
        rate = f"{1 / took:.1f} shards/s" if 0 < took < 1 else f"{took:.1f} s a shard"
        parts = [rate, rest, *notes]
        if self._terminal:
            self._draw(done, total, parts)
        elif done % max(1, total // 10) == 0 or done == total or self._last[-1] - self._said >= EVERY:
            self._said = self._last[-1]
            print(f"{self.what}: {', '.join([f'{done}/{total} shards', *parts])}", flush=True)

    def _draw(self, done: int, total: int, parts: Sequence[str]) -> None:
        from tqdm import tqdm

        if self._bar is None:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} shards [{elapsed}{postfix}]"
            self._bar = tqdm(total=total, desc=self.what, bar_format=form, dynamic_ncols=True, file=sys.stderr)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(done - self._bar.n)
        self._bar.refresh()
        if done == total:
            self.__exit__()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
