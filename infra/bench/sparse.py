"""Time of sparse convolution in torch over that of spconv: VoxelBackBone8x on a sweep, one thread, rulebooks included.

    python infra/bench/sparse.py SCAN.bin [--voxels 33000] [--rounds 11] [--variant plain|res]

A sweep of KITTI (float32 x, y, z, reflectance), on the grid of SECOND's KITTI configuration, as far ahead as there are so many
voxels. The two take turns; medians of CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

from occstream.models.voxelbackbones import VARIANTS
from occstream.models.voxels import Voxels, voxelize
from occstream.sharding.grid import VoxelGrid

GRID = VoxelGrid("kitti", (0.0, -40.0, -3.0), (70.4, 40.0, 1.0), (0.05, 0.05, 0.1))


def sweep(path: str, most: int) -> Voxels:
    """Voxels of the nearest points, at most so many."""
    points = torch.from_numpy(np.fromfile(path, np.float32).reshape(-1, 4))
    near, far = 0, len(points)
    points = points[points[:, 0].argsort(stable=True)]
    while near + 1 < far:
        middle = (near + far) // 2
        count = len(voxelize(points[:middle], torch.zeros(middle, dtype=torch.int64), GRID).features)
        near, far = (middle, far) if count <= most else (near, middle)
    return voxelize(points[:near], torch.zeros(near, dtype=torch.int64), GRID)


def step(net: nn.Module, voxels: Voxels) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    began = time.process_time()
    out = net(voxels.features, voxels.indices, 1)
    between = time.process_time()
    (out.bev.square().mean() + out.points.square().mean()).backward()
    return between - began, time.process_time() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan")
    parser.add_argument("--voxels", type=int, default=33_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="plain")
    args = parser.parse_args()
    torch.set_num_threads(1)
    voxels = sweep(args.scan, args.voxels)
    nets = {}
    for backend in ("torch", "spconv"):
        torch.manual_seed(0)
        nets[backend] = VARIANTS[args.variant](4, GRID.shape, backend).train()
        step(nets[backend], voxels)
    times: dict[str, list[tuple[float, float]]] = {backend: [] for backend in nets}
    for number in range(args.rounds):
        for backend in sorted(nets, reverse=bool(number % 2)):
            times[backend].append(step(nets[backend], voxels))
    print(f"{len(voxels.features)} voxels, {args.variant}, {args.rounds} rounds")
    for name, of in (("forward", lambda t: t[0]), ("backward", lambda t: t[1]), ("both", sum)):
        ours, theirs = (statistics.median(map(of, times[backend])) for backend in ("torch", "spconv"))
        print(f"{name}: torch {1000 * ours:.0f} ms, spconv {1000 * theirs:.0f} ms, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
