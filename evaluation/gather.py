"""What metrics bring together from all ranks that is no plain sum: rows, names, and sums of fractions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

# Sums of real numbers depend on their order in the last bits, and so on the number of ranks. Sums of integers do not:
# shares (0..1) are added in units of 2**-40, which holds 8 million of them and rounds each by at most 5e-13.
SHARE = float(1 << 40)


def gather_rows(rows: np.ndarray, device: torch.device | str = "cpu") -> list[np.ndarray]:
    """Every rank's rows, in the order of the ranks (collective).

    Args:
        rows: (n, columns), of one dtype and number of columns on all ranks; n may differ.
        device: of the collectives: the GPU under NCCL.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [rows]
    mine = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    sizes = [int(count) for count in counts]
    padded = mine.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size].cpu().numpy() for part, size in zip(parts, sizes)]


def gather_names(names: Sequence[str], device: torch.device | str = "cpu") -> list[list[str]]:
    """Every rank's names (without line breaks), in the order of the ranks (collective)."""
    if bad := [name for name in names if "\n" in name]:
        raise ValueError(f"name {bad[0]!r} has a line break")
    joined = "".join(f"{name}\n" for name in names).encode()
    parts = gather_rows(np.frombuffer(joined, np.uint8).copy(), device)
    return [part.tobytes().decode().split("\n")[:-1] for part in parts]
