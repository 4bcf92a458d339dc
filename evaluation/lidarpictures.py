"""Pictures of LiDAR tasks: boxes from above and in the cameras, classes of points from above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from occstream.evaluation.detection import BoxSet, rules_of
from occstream.evaluation.lidar import true_boxes
from occstream.models.batch import Batch, PointLabels, Points
from occstream.models.centerpoint import Detections
from occstream.models.rotated import corners
from occstream.sharding.schema import IGNORE, Frame, Taxonomy, camera_to_key_ego

NEAR = 0.3  # meters before a camera; what is nearer is not drawn
SURE = 0.5  # score of boxes that the title counts apart
NUMBERED = 40  # boxes whose scores are written, at most: more would hide each other
_EDGES = [(i, (i + 1) % 4) for i in range(4)]
_EDGES += [(a + 4, b + 4) for a, b in _EDGES] + [(i, i + 4) for i in range(4)]
_COLUMNS = 3  # cameras side by side, at most
_WIDTH = 9  # inches
_TRUE, _POINT = "#202020", "#9aa4ad"


def detection_picture(
    path: Path,
    batch: Batch,
    found: Detections,
    index: int,
    *,
    taxonomy: Taxonomy,
    reach: float = 50.0,
    title: str = "",
    cameras: Frame | None = None,
) -> None:
    """One PNG for a frame, from above, x up and y left: points, true boxes filled, found ones as outlines with a line to the
    front, the fainter the lower their score. Below it the cameras with both.

    Args:
        path: written; its folder is created.
        batch: with boxes if the frame is labeled; its points are drawn, where it has any.
        found: of the frame.
        index: of the frame in the batch.
        taxonomy: of the labels; boxes have the classes of ``rules_of``.
        reach: meters from the ego to each side.
        cameras: the frame with its cameras, as it was before augmentation.
    """
    names, places = rules_of(taxonomy).classes, dict(zip(taxonomy.classes, taxonomy.colors))
    colors = np.array([places[name] for name in names]) / 255
    truth = true_boxes(batch)[index] if batch.boxes is not None and index < batch.labeled else None
    below = camera_height(cameras) if cameras and cameras.cameras else 0.0
    figure = Figure(figsize=(_WIDTH, 9.6 + below), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top = figure
    if cameras and below:
        top, bottom = figure.subfigures(2, 1, height_ratios=[9.6, below], squeeze=False).ravel()
        undo = np.linalg.inv(batch.scene_aug[index].double().cpu().numpy())
        boxes_in_images(bottom, cameras, undo, _in_camera(truth, found, colors))
    axes = top.add_subplot()
    ground_axes(axes, reach)
    if batch.points is not None:
        _dots(axes, _points(batch, index), _POINT)
    if truth is not None:
        axes.add_collection(
            PolyCollection(
                list(shown(corners(truth.boxes))), facecolors=_faint(colors[truth.classes], 0.35), edgecolors=_TRUE
            )
        )
    lines = np.concatenate([outlines(found.boxes), headings(found.boxes)])
    shades = np.tile(
        _faint(0.85 * colors[found.classes], _strength(found)), (2, 1)
    )  # bright ones are hard to see on white
    axes.add_collection(LineCollection(list(shown(lines)), colors=shades, linewidths=1.6))
    _numbers(axes, found, reach)
    # Of a sweep that reaches further than the picture, what lies in the picture.
    inside = [] if truth is None else truth.classes[(np.abs(truth.boxes[:, :2]) < reach).all(1)].tolist()
    _legend(top, sorted({*found.classes.tolist(), *inside}), names, colors)
    said = f"{len(found.boxes)} found, {(found.scores >= SURE).sum()} of them with a score of {SURE} or more"
    said += "" if truth is None else f", {len(inside)} true in the picture"
    _save(figure, path, f"{title or batch.keys[index]}\n{said}")


def segmentation_picture(
    path: Path,
    batch: Batch,
    found: np.ndarray,
    index: int,
    *,
    taxonomy: Taxonomy,
    reach: float = 50.0,
    title: str = "",
) -> None:
    """One PNG for a frame, from above: points in the colors of their true classes, and of those that were found.

    Args:
        path: written; its folder is created.
        batch: with points, and with their labels if the frame is labeled.
        found: (n,) classes of the frame's points.
        index: of the frame in the batch.
        taxonomy: of the classes.
        reach: meters from the ego to each side.
    """
    xyz, table = _points(batch, index), np.full((256, 3), 0.87)
    table[: taxonomy.num_classes] = np.array(taxonomy.colors) / 255
    panels = [("found", np.asarray(found))]
    if batch.point_labels is not None and index < batch.labeled:
        part = batch.part(PointLabels)
        panels.insert(0, ("true", part.classes[part.owners() == index].cpu().numpy()))
    figure = Figure(figsize=(8 * len(panels), 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, classes) in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels):
        ground_axes(axes, reach)
        _dots(axes, xyz, table[classes])
        axes.set_title(name, fontsize=10)
    there = sorted({int(c) for _, classes in panels for c in np.unique(classes)} - {IGNORE, taxonomy.free_id})
    handles = [Patch(color=table[c], label=taxonomy.classes[c]) for c in there]
    if any((classes == IGNORE).any() for _, classes in panels):
        handles.append(Patch(color=table[IGNORE], label="unknown"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    said = f"{len(xyz)} points"
    if len(panels) > 1 and (known := panels[0][1] != IGNORE).any():
        said += f", {100 * (panels[0][1] == panels[1][1])[known].mean():.1f} % of the known ones right"
    _save(figure, path, f"{title or batch.keys[index]}\n{said}")


def _points(batch: Batch, index: int) -> np.ndarray:
    """(n, 3) of a frame."""
    part = batch.part(Points)
    return part.xyz[part.owners() == index].cpu().numpy()


def ground_axes(axes: Axes, reach: float) -> None:
    """Empty axes from above: horizontally -y, so that left is left, vertically x; the ego in the middle."""
    axes.set(
        xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="y to the left, m", ylabel="x forward, m"
    )
    ticks = np.arange(-(reach // 10) * 10, reach + 1, 10 if reach < 60 else 20)
    axes.set_xticks(ticks, [f"{0 - t:g}" for t in ticks], fontsize=7)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks], fontsize=7)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.plot([0], [0], marker="^", color=_TRUE, markersize=7)


def _dots(axes: Axes, xyz: np.ndarray, color: str | np.ndarray) -> None:
    axes.scatter(-xyz[:, 1], xyz[:, 0], s=1.0, c=color, linewidths=0, rasterized=True)


def shown(ground: np.ndarray) -> np.ndarray:
    """(…, 2) x, y of the ego frame -> places in the picture from above."""
    return np.stack([-ground[..., 1], ground[..., 0]], -1)


def outlines(boxes: np.ndarray) -> np.ndarray:
    """(n, 5, 2) around each box, closed."""
    around = corners(boxes)
    return np.concatenate([around, around[:, :1]], 1)


def headings(boxes: np.ndarray) -> np.ndarray:
    """(n, 5, 2) from the center to beyond the front; as many points as an outline has."""
    ahead = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) * (boxes[:, 3:4] / 2 + 0.7)
    return boxes[:, None, :2] + ahead[:, None] * np.linspace(0, 1, 5)[:, None]


def _faint(colors: np.ndarray, strength: float | np.ndarray) -> np.ndarray:
    """(n, 3) with opacity -> (n, 4)."""
    return np.concatenate([colors, np.broadcast_to(strength, len(colors))[:, None]], 1)


def _numbers(axes: Axes, found: Detections, reach: float) -> None:
    """Scores of the surest boxes, beside them."""
    for box, score in list(zip(found.boxes, found.scores))[:NUMBERED]:
        x, y = -box[1] + box[4] / 2 + 0.5, box[0] + box[3] / 2
        if max(abs(x), abs(y)) < reach:
            axes.text(x, y, f"{score:.2f}", fontsize=6, color=_TRUE, clip_on=True)


def _legend(figure: Figure | SubFigure, there: Sequence[int], names: Sequence[str], colors: np.ndarray) -> None:
    handles: list[Patch | Line2D] = [Patch(color=colors[c], label=names[c]) for c in there]
    handles += [
        Patch(facecolor="#d9d9d9", edgecolor=_TRUE, label="true (white in cameras)"),
        Line2D([], [], color="#606060", label="found (line: front, opacity: score)"),
        Line2D([], [], color=_POINT, marker=".", linestyle="", label="LiDAR"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def boxes_in_images(
    figure: SubFigure, frame: Frame, undo: np.ndarray, drawn: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Images of a frame with the edges of boxes.

    Args:
        undo: (3, 3) from the augmented ego frame to the ego frame.
        drawn: boxes and their colors.
    """
    columns = min(_COLUMNS, len(frame.cameras))
    rows = -(-len(frame.cameras) // columns)
    for i, name in enumerate(sorted(frame.cameras, key=lambda name: _place(frame, name))):
        camera = frame.cameras[name]
        axes = figure.add_subplot(rows, columns, i + 1)
        image = simplejpeg.decode_jpeg(camera.jpeg, "RGB", min_width=1000, min_height=1)
        axes.imshow(image, extent=(-0.5, camera.width - 0.5, camera.height - 0.5, -0.5))
        to_camera = np.linalg.inv(camera_to_key_ego(frame, camera))
        for boxes, shade in drawn:
            lines, of = _edges(boxes, undo, to_camera, camera.intrinsics)
            axes.add_collection(LineCollection(list(lines), colors=shade[of], linewidths=0.9))
        axes.set(xlim=(-0.5, camera.width - 0.5), ylim=(camera.height - 0.5, -0.5))
        axes.set_title(name, fontsize=8, pad=2)
        axes.axis("off")


def camera_height(frame: Frame, width: float = _WIDTH) -> float:
    """Inches that its images need on a picture of this width."""
    columns = min(_COLUMNS, len(frame.cameras))
    highest = max(camera.height / camera.width for camera in frame.cameras.values())
    return -(-len(frame.cameras) // columns) * (width / columns * highest + 0.25)


def _place(frame: Frame, name: str) -> tuple[bool, float]:
    """Where a camera's image goes: those that look ahead before those that look back, each from left to right."""
    ahead = camera_to_key_ego(frame, frame.cameras[name])[:3, 2]
    back = bool(ahead[0] < 0)
    yaw = np.arctan2(ahead[1], ahead[0])
    return back, float(yaw % (2 * np.pi) if back else -yaw)


def _strength(found: Detections) -> np.ndarray:
    """(n,) opacity of boxes by their scores."""
    return np.clip(0.25 + 0.75 * found.scores, 0, 1)


def _in_camera(truth: BoxSet | None, found: Detections, colors: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes and their (n, 4) colors, in the order in which they are drawn: true ones white."""
    drawn = [(found.boxes, _faint(colors[found.classes], _strength(found)))]
    if truth is not None:
        drawn.insert(0, (np.asarray(truth.boxes), _faint(np.ones((len(truth.boxes), 3)), 0.9)))
    return drawn


def _edges(
    boxes: np.ndarray, undo: np.ndarray, to_camera: np.ndarray, intrinsics: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Edges of boxes in an image, as far as they are before the camera.

    Args:
        boxes: (n, 7).
        undo: (3, 3) from the augmented ego frame to the ego frame. to_camera: (4, 4) on from there. intrinsics: (3, 3).

    Returns:
        (m, 2, 2) pixels of both ends, (m,) int64 place of each edge's box.
    """
    base = np.repeat(corners(boxes), 2, 0).reshape(len(boxes), 2, 4, 2)
    height = boxes[:, None, None, 2:3] + boxes[:, None, None, 5:6] / 2 * np.array([-1, 1])[:, None, None]
    solid = np.concatenate([base, np.broadcast_to(height, (len(boxes), 2, 4, 1))], -1).reshape(-1, 8, 3)
    local = solid @ undo.T @ to_camera[:3, :3].T + to_camera[:3, 3]
    ends = local[:, _EDGES].reshape(-1, 2, 3)
    of = np.repeat(np.arange(len(boxes)), len(_EDGES))
    keep = (ends[..., 2] > NEAR).any(1)
    ends, of = ends[keep], of[keep]
    first, second = ends[:, 0], ends[:, 1]
    along = (NEAR - first[:, 2]) / np.where(first[:, 2] == second[:, 2], 1, second[:, 2] - first[:, 2])
    cut = first + along[:, None] * (second - first)
    ends = np.stack([np.where(e[:, 2:] < NEAR, cut, e) for e in (first, second)], 1)
    pixels = ends @ intrinsics.T
    return pixels[..., :2] / pixels[..., 2:], of


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
