"""The reader printed on the format page reads what we write; so does webdataset alone."""

import re
from pathlib import Path

import numpy as np
import pytest
import webdataset

from occstream.sharding.codec import Coding
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.sources import open_source
from occstream.sharding.stream import ShardReader

PAGE = Path(__file__).resolve().parents[2] / "sharding" / "FORMAT.md"
GROUPS = ("cameras", "lidar", "labels")


@pytest.mark.parametrize("step", [0.0, 0.002])
def test_strangers_read_our_shards(tmp_path, step):
    options = {"scenes": 2, "frames": 2, "image_size": (32, 88), "grid": "tiny"}
    settings = {"grid": get_grid("tiny"), "scenes_per_shard": 2, "coding": Coding(lidar_step=step)}
    pack(open_source("synthetic", options), str(tmp_path), **settings)
    page: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], page)
    ours = ShardReader(Manifest.load(str(tmp_path)), GROUPS)
    compared = 0
    for group in GROUPS:
        [path] = (tmp_path / group).glob("*.tar")
        theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
        for i, (key, head, members) in enumerate(page["frames"](path)):
            assert theirs[i]["__key__"] == key
            assert {k: v for k, v in theirs[i].items() if not k.startswith("__") and k != "frame.json"} == members
            frame = ours.frame(i // 2, i % 2)
            assert frame.key == key
            np.testing.assert_array_equal(frame.ego_to_global, np.array(head["ego_to_global"]).reshape(4, 4))
            for name, camera in head.get("cameras", {}).items():
                assert members[camera["member"]] == frame.cameras[name].jpeg
                compared += 1
            for name in head.get("arrays", {}):
                owner = frame.lidar if group == "lidar" else frame.labels
                np.testing.assert_array_equal(page["array"](head, members, name), getattr(owner, name))
                compared += 1
    assert compared == 4 * (6 + 5 + 4)
