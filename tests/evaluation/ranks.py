"""Several ranks in one process: threads whose collectives meet at a barrier."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist


def run_ranks(count, work, monkeypatch):
    """Results of ``work(rank)``, called by ``count`` threads; all_gather and all_reduce go between them."""
    barrier, here, slots = threading.Barrier(count, timeout=20), threading.local(), [None] * count

    def exchange(value):
        slots[here.rank] = value.clone()
        barrier.wait()
        found = [v.clone() for v in slots]
        barrier.wait()
        return found

    def all_gather(parts, mine):
        for part, value in zip(parts, exchange(mine)):
            assert part.shape == value.shape
            assert part.dtype == value.dtype
            part.copy_(value)

    def all_reduce(mine):
        mine.copy_(torch.stack(exchange(mine)).sum(0))

    def one(rank):
        here.rank = rank
        return work(rank)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: count)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
