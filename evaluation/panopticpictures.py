"""Pictures of panoptic voxels and boxes, each instance in a color of its own, and animations of pictures over time."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from occstream.evaluation.instances import FoundBoxes, Segments
from occstream.evaluation.lidarpictures import boxes_in_images, camera_height, ground_axes, headings, outlines, shown
from occstream.evaluation.report import class_colors, render
from occstream.sharding.schema import IGNORE, Frame, Taxonomy

SAME = 4.0  # meters between the centers of a true and a found box that get one color
PALE = 215  # gray that colors of classes are mixed with
_WIDTH, _ABOVE = 13.5, 5.4  # inches; of boxes from above the height
_FOUND = "found:"


def instance_color(name: str) -> np.ndarray:
    """(3,) uint8: bright, a function of the name alone, so that what is the same has one color in all pictures."""
    hue, saturation, value = (byte / 255 for byte in hashlib.blake2b(name.encode(), digest_size=3).digest())
    color = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * saturation, 0.75 + 0.25 * value)
    return (255 * np.array(color)).astype(np.uint8)


def matched_names(found: FoundBoxes, kept: np.ndarray, truth: FoundBoxes, names: Sequence[str]) -> list[str]:
    """Names of instances 1, 2, … of boxes that claimed voxels: that of the nearest true box of the class within ``SAME``, which
    no surer one has, else one of its own.

    Args:
        found: boxes; ``kept`` are rows of those that became instances.
        truth: true boxes. names: of each.
    """
    free, out = list(range(len(truth.boxes))), []
    for rank, number in enumerate(kept.tolist(), 1):
        rivals = [i for i in free if truth.classes[i] == found.classes[number]]
        offsets = truth.boxes[rivals, :2].astype(np.float64) - found.boxes[number, :2]
        distance = np.sqrt((offsets**2).sum(1))
        if len(rivals) and distance.min() < SAME:
            free.remove(best := rivals[int(distance.argmin())])
            out.append(names[best])
        else:
            out.append(f"{_FOUND}{rank}")
    return out


def panoptic_colors(classes: np.ndarray, instances: np.ndarray, taxonomy: Taxonomy, names: Sequence[str]) -> np.ndarray:
    """(X, Y, Z, 3) uint8: instances in colors of their own, all else in those of the classes, pale.

    Args:
        classes, instances: (X, Y, Z), of things above 0.
        names: of instances 1, 2, …; those beyond have names by their number.
    """
    colors = (0.4 * class_colors(classes, taxonomy) + 0.6 * PALE).astype(np.uint8)
    for number in map(int, np.unique(instances[instances > 0])):
        name = names[number - 1] if number <= len(names) else f"{_FOUND}{number}"
        colors[instances == number] = instance_color(name)
    return colors


def panoptic_picture(
    path: Path,
    *,
    truth: tuple[np.ndarray, np.ndarray] | None,
    found: Segments,
    true_boxes: FoundBoxes,
    boxes: FoundBoxes,
    least: float,
    taxonomy: Taxonomy,
    reach: float,
    tracks: Sequence[str] = (),
    frame: Frame | None = None,
    undo: np.ndarray | None = None,
    title: str = "",
) -> None:
    """One PNG of a frame: true and predicted panoptic voxels side by side, below them boxes from above, and cameras with boxes.

    Args:
        path: written; its folder is created.
        truth: true classes and instances, (X, Y, Z); ``IGNORE`` is not drawn. None: unknown.
        found: predicted; ``kept`` are rows of ``boxes``.
        true_boxes, boxes: ids of the taxonomy. Those of ``boxes`` with a score above ``least`` are drawn, gray where they
            have no instance.
        taxonomy: of the classes.
        reach: meters from the ego to each side, for boxes from above.
        tracks: identities of the true boxes over time; empty: their numbers.
        frame: with the cameras, as it was before augmentation.
        undo: (3, 3) from the augmented frame of the labels to the ego frame; None: they are the same.
        title: above it.
    """
    tracks = list(tracks) or [str(i) for i in range(len(true_boxes.boxes))]
    names, free = matched_names(boxes, found.kept, true_boxes, tracks), taxonomy.free_id
    panels = []
    if truth is not None:
        solid = (truth[0] != free) & (truth[0] != IGNORE)
        there = len(np.unique(truth[1][truth[1] > 0]))
        panels.append(
            (f"true: {there} instances", render(solid, panoptic_colors(truth[0], truth[1], taxonomy, tracks)))
        )
    colors = panoptic_colors(found.classes, found.instances, taxonomy, names)
    unseen = np.zeros(colors.shape[:3], bool) if truth is None else truth[0] == IGNORE
    title_of = f"predicted: {len(names)} instances of boxes, {max(0, int(found.instances.max()) - len(names))} others"
    panels.append((title_of, render((found.classes != free) & ~unseen, colors)))
    shade_true = np.array([instance_color(name) for name in tracks]).reshape(-1, 3) / 255
    shade = np.full((len(boxes.boxes), 4), (0.5, 0.5, 0.5, 0.35))
    shade[found.kept] = [(*(instance_color(name) / 255), 1.0) for name in names] or shade[:0]
    sure = boxes.scores > least
    said, shade = boxes.boxes[sure], shade[sure]
    below = camera_height(frame, _WIDTH) if frame and frame.cameras else 0.0
    heights = [_WIDTH / 2 * 420 / 640 + 0.3, _ABOVE, *([below] if below else [])]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.9), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel()
    for i, (name, picture) in enumerate(panels):
        axes = parts[0].add_subplot(1, len(panels), i + 1)
        axes.imshow(picture)
        axes.set_title(name, fontsize=10, pad=3)
        axes.axis("off")
    for i, (rows, lines) in enumerate(((true_boxes.boxes, shade_true), (said, shade))):
        axes = parts[1].add_subplot(1, 2, i + 1)
        ground_axes(axes, reach)
        places = np.concatenate([outlines(rows), headings(rows)])
        axes.add_collection(LineCollection(list(shown(places)), colors=np.tile(lines, (2, 1)), linewidths=1.6))
    if below and frame is not None:
        # True boxes white below the found ones.
        drawn = [(true_boxes.boxes, np.tile([1.0, 1.0, 1.0, 0.9], (len(true_boxes.boxes), 1))), (said, shade)]
        boxes_in_images(parts[2], frame, np.eye(3) if undo is None else undo, drawn)
    present = {int(c) for classes in ((truth[0],) if truth else ()) + (found.classes,) for c in np.unique(classes)}
    stuff = [c for c in sorted(present - {IGNORE, free}) if taxonomy.classes[c] not in taxonomy.things]
    pale = (0.4 * np.array(taxonomy.colors) + 0.6 * PALE) / 255
    handles = [Patch(color=pale[c], label=taxonomy.classes[c]) for c in stuff]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def animate(path: Path, pictures: Sequence[Path], seconds: float = 0.5) -> None:
    """Writes a GIF of pictures in order, which runs without end.

    Args:
        path: written.
        pictures: of one size or smaller than the largest, which they are centered in.
        seconds: that each is shown.
    """
    frames = [Image.open(picture).convert("RGB") for picture in pictures]
    size = max(f.width for f in frames), max(f.height for f in frames)
    canvas = []
    for frame in frames:
        whole = Image.new("RGB", size, "white")
        whole.paste(frame, ((size[0] - frame.width) // 2, (size[1] - frame.height) // 2))
        canvas.append(whole.quantize(256, dither=Image.Dither.NONE))
    canvas[0].save(path, save_all=True, append_images=canvas[1:], duration=round(1000 * seconds), loop=0)
