"""Prints digests of what the synthetic source and the labels made from LiDAR give in this process, by group, as JSON."""

from __future__ import annotations

import hashlib
import json

from occstream.sharding.codec import Coding, encode
from occstream.sharding.labels import Labeler
from occstream.sharding.sources import open_source


def digests() -> dict[str, str]:
    """BLAKE2b of the encoded members of every frame; "made" are labels from LiDAR, boxes and leveled poses."""
    options = {"scenes": 1, "first": 3, "frames": 3, "image_size": (64, 176), "sweeps": 1, "grid": "tiny"}
    source = open_source("synthetic", options)
    scene = source.load(source.scene_names()[0])
    made = Labeler(source.grid, source.taxonomy.name)(scene)
    found = {}
    for name, frames in (
        ("cameras", scene.frames),
        ("lidar", scene.frames),
        ("labels", scene.frames),
        ("made", made.frames),
    ):
        digest = hashlib.blake2b(digest_size=16)
        for frame in frames:
            for member, data in encode(frame, "labels" if name == "made" else name, Coding(level=1)):
                digest.update(member.encode() + data)
        found[name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests()))
