"""Draws the front page's picture from a synthetic scene: ``python docs/picture.py docs/img/occupancy.jpg``."""

import sys
from pathlib import Path

import numpy as np
import simplejpeg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from occstream.evaluation.report import class_colors, height_colors, render
from occstream.sharding.schema import get_taxonomy
from occstream.sharding.sources import open_source

SCENE, FRAME = 5, 3  # numbers


def draw(path: Path) -> None:
    source = open_source("synthetic", {"scenes": 6, "frames": 4, "image_size": (225, 400), "lidar": False})
    frame = source.load(source.scene_names()[SCENE]).frames[FRAME]
    labels, taxonomy = frame.labels, get_taxonomy(source.taxonomy.name)
    known = labels.binary & labels.known()
    cameras = [simplejpeg.decode_jpeg(c.jpeg, "RGB") for c in frame.cameras.values()]
    wall = np.concatenate([np.concatenate(cameras[i : i + 2], 1) for i in (0, 2, 4)], 0)
    panels = [
        ("cameras", wall),
        ("1. binary occupancy, from LiDAR: cheap", render(known, height_colors(known.shape), (563, 800))),
        (
            "2. semantic occupancy: a few labeled scenes",
            render(known, class_colors(labels.semantic, taxonomy), (563, 800)),
        ),
    ]
    figure = Figure(figsize=(14, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=[image.shape[1] / image.shape[0] for _, image in panels])
    for axis, (title, image) in zip(axes, panels, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=13)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"quality": 88} if path.suffix == ".jpg" else {})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
