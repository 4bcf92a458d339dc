"""Packs the toy source in a process that kills itself (SIGKILL) at the n-th step of writing and publishing.

Arguments: JSON {"url", "part", "kill_at"}; kill_at 0: never. Prints how many steps there were."""

import json
import os
import signal
import sys

from occstream.sharding import pack as packing
from occstream.sharding import storage
from tests.sharding.toy import GRID, ToySource

job = json.loads(sys.argv[1])
steps = 0


def step():
    global steps
    steps += 1
    if steps == job["kill_at"]:
        os.kill(os.getpid(), signal.SIGKILL)


def around(work):
    def wrapped(*args, **kwargs):
        step()
        result = work(*args, **kwargs)
        step()
        return result

    return wrapped


if storage.is_local(job["url"]):
    # In the middle of a copy as well, and before its rename.
    os.fsync, os.replace = around(os.fsync), around(os.replace)
storage.publish = packing.storage.publish = around(storage.publish)
storage.remove = packing.storage.remove = around(storage.remove)
packing.ShardWriter.add = around(packing.ShardWriter.add)
packing.pack(ToySource((3, 2, 1, 4, 2, 3, 1, 2, 3)), job["url"], grid=GRID, scenes_per_shard=2, part=tuple(job["part"]))
print(steps)
