"""Pictures: cameras with projected occupancy, and labels against predictions as 3-D renderings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from occstream.evaluation.occupancy import Head, classify
from occstream.models import Batch, OccOutputs
from occstream.models.batch import Cameras, Occupancy
from occstream.models.lift import project
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import (
    IGNORE,
    Frame,
    Labels,
    Taxonomy,
    camera_to_key_ego,
    get_taxonomy,
    sweep_to_key_ego,
)
from occstream.sharding.voxelrays import first_hit

BINARY_LOW, BINARY_HIGH = np.array([38, 70, 140]), np.array([250, 210, 90])  # colors of the lowest and highest voxel
BACKGROUND = 250
LEAST_WIDTH = 500  # pixels of a camera in a picture: on fewer, dots hide what they lie on
SHADE = {-1: 1.0, 0: 0.72, 1: 0.86, 2: 1.0}  # by the axis of the face


def render(solid: np.ndarray, colors: np.ndarray, size: tuple[int, int] = (420, 640)) -> np.ndarray:
    """View of a voxel scene from behind and above the vehicle.

    Args:
        solid: (X, Y, Z) bool.
        colors: (X, Y, Z, 3) uint8.
        size: (height, width) of the picture.

    Returns:
        (height, width, 3) uint8.
    """
    x, y, z = solid.shape
    target = np.array([x * 0.50, y * 0.5, z * 0.3])
    eye = np.array([-0.50 * x, y * 0.5, max(x, y) * 0.62])
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    height, width = size
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    scale = 0.86 / width
    rays = forward + (u - width / 2)[..., None] * scale * right + (v - height / 2)[..., None] * scale * down
    rays = rays.reshape(-1, 3)
    voxel, axis = first_hit(np.ascontiguousarray(solid), np.broadcast_to(eye, rays.shape).copy(), rays)
    shade = np.array([SHADE[a] for a in (-1, 0, 1, 2)])[axis + 1]
    image = colors.reshape(-1, 3)[np.maximum(voxel, 0)] * shade[:, None]
    # A dark line between neighboring voxels makes their shape readable.
    picture = np.where((voxel >= 0)[:, None], image, BACKGROUND).reshape(height, width, 3)
    number = voxel.reshape(height, width)
    edge = np.zeros((height, width), bool)
    edge[:, 1:] |= number[:, 1:] != number[:, :-1]
    edge[1:] |= number[1:] != number[:-1]
    picture[edge & (number >= 0)] *= 0.8
    return picture.astype(np.uint8)


def height_colors(shape: tuple[int, int, int]) -> np.ndarray:
    """(X, Y, Z, 3) uint8 colors by height, for binary occupancy."""
    t = np.linspace(0, 1, shape[2])[:, None]
    column = (1 - t) * BINARY_LOW + t * BINARY_HIGH
    return np.broadcast_to(column.astype(np.uint8), (*shape, 3))


def class_colors(semantic: np.ndarray, taxonomy: Taxonomy) -> np.ndarray:
    """(X, Y, Z, 3) uint8 colors by class; unknown is gray."""
    table = np.full((256, 3), 128, np.uint8)
    table[: taxonomy.num_classes] = taxonomy.colors
    return table[semantic]


def overlay(image: np.ndarray, pixels: np.ndarray, depth: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Image with voxel centers as dots, near ones larger and in front; a small one is enlarged for it.

    Args:
        image: (H, W, 3) uint8. pixels: (N, 2). depth: (N,) meters. colors: (N, 3) uint8.
    """
    out, times = image.copy(), -(-LEAST_WIDTH // image.shape[1])
    if times > 1:
        size = image.shape[1] * times, image.shape[0] * times
        out = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        pixels = (pixels + 0.5) * times - 0.5
    height, width = out.shape[:2]
    order = np.argsort(-depth)
    for i in order:
        u, v, d = round(pixels[i, 0]), round(pixels[i, 1]), depth[i]
        if d <= 0.5 or not (0 <= u < width and 0 <= v < height):
            continue
        r = int(np.clip(width / 180 * 8 / d, 0, 5))
        patch = out[max(0, v - r) : v + r + 1, max(0, u - r) : u + r + 1]
        patch[...] = (0.35 * patch + 0.65 * colors[i]).astype(np.uint8)
    return out


def prediction_picture(
    path: Path,
    batch: Batch,
    outputs: OccOutputs,
    *,
    index: int,
    grid: VoxelGrid,
    taxonomy: Taxonomy,
    cameras: tuple[str, ...],
    kind: Head = "sigmoid_focal",
    threshold: float = 0.25,
    title: str = "",
) -> None:
    """One composed PNG for a frame: all cameras with the labels projected, labels, binary and semantic prediction.

    Args:
        path: written; its folder is created.
        batch, outputs: with at least ``index`` + 1 frames.
        grid: of the labels. taxonomy: of the classes.
        cameras: names of the first views, for captions; others are not shown.
        kind, threshold: how semantic logits become classes.
    """
    labels = batch.part(Occupancy)
    binary, valid = _numpy(labels.binary[index]), _numpy(labels.binary_valid[index])
    truth = _numpy(labels.classes()[index]) if index < batch.labeled else None
    known = binary & valid
    colors = height_colors(grid.shape) if truth is None else class_colors(truth, taxonomy)
    cells = np.argwhere(_surface(known))
    points = batch.scene_aug.new_tensor(grid.centers(cells), device=batch.scene_aug.device)
    # Labels are already mirrored with the scene, and so is the geometry of the batch.
    [(pixels, depth)] = project([points], batch.select(slice(index, index + 1))) if cameras else [(points, points)]
    panels, present = (
        [("labels", render(known, colors))],
        set(np.unique(truth[known]).tolist()) if truth is not None else set(),
    )
    if outputs.binary_logits is not None:
        logits = outputs.binary_logits[index]
        factors = [a // b for a, b in zip(grid.shape, logits.shape)]
        found = _numpy(logits > 0).repeat(factors[0], 0).repeat(factors[1], 1).repeat(factors[2], 2)
        panels.append(("binary prediction (color: height)", render(found & valid, height_colors(grid.shape))))
    if truth is not None and outputs.semantic_logits is not None:
        classes = _numpy(classify(outputs.semantic_logits[index : index + 1], kind, threshold)[0])
        shown = (classes != taxonomy.free_id) & valid & (truth != IGNORE)
        panels.append(("semantic prediction", render(shown, class_colors(classes, taxonomy))))
        present |= set(np.unique(classes[shown]).tolist())

    dots = colors[tuple(cells.T)] if len(cells) else np.zeros((0, 3), np.uint8)
    images = []
    # Views beyond the names are of earlier key-frames.
    poses = batch.part(Cameras).camera_to_ego[index, : len(cameras)] if cameras else batch.scene_aug.new_zeros(0, 4, 4)
    for i in _around(_numpy(poses)):
        name = cameras[i]
        image = _numpy(batch.part(Cameras).images[index, i]).transpose(1, 2, 0)
        images.append((name, overlay(image, _numpy(pixels[i]), _numpy(depth[i]), dots)))
    named = [k for k in range(taxonomy.num_classes) if k in present]
    _compose(path, images, panels, taxonomy, classes=named, title=title or batch.keys[index])


def frame_picture(path: Path, frame: Frame, manifest: Manifest) -> None:
    """One composed PNG of a packed frame: its cameras with labels and LiDAR projected, LiDAR and labels from above.

    Args:
        path: written; its folder is created.
        frame: decoded, with whatever groups the set has.
        manifest: tells grid and taxonomy.
    """
    labels, grid = frame.labels, manifest.grid
    taxonomy = get_taxonomy(manifest.taxonomy)
    panels, classes = [], []
    cells, dots, points = np.zeros((0, 3), int), np.zeros((0, 3), np.uint8), None
    if labels is not None:
        seen = labels.known()
        known = labels.binary & seen
        colors = (
            height_colors(manifest.label_grid.shape)
            if labels.semantic is None
            else class_colors(labels.semantic, taxonomy)
        )
        cells = np.argwhere(_surface(known) & (seen if labels.mask_camera is None else labels.mask_camera))
        dots = colors[tuple(cells.T)]
        panels.append(("labels", render(known, colors)))
        if labels.semantic is not None:
            classes = [k for k in range(taxonomy.num_classes) if (labels.semantic[known] == k).any()]
        panels.append(("observed, from above (bright: in view of a camera)", _seen_from_above(labels)))
    if frame.lidar is not None:
        points = sweep_to_key_ego(frame, frame.lidar)
        points = frame.lidar.xyz.astype(np.float64) @ points[:3, :3].T + points[:3, 3]
        panels.append((f"LiDAR from above, {len(points)} points, 50 m", _points_from_above(points)))
    centers = grid.centers(cells) if grid else np.zeros((0, 3))
    if grid and grid.frame == "lidar" and frame.lidar is not None:
        pose = sweep_to_key_ego(frame, frame.lidar)
        centers = centers @ pose[:3, :3].T + pose[:3, 3]
    images, seen_by = [], list(frame.cameras.items())
    poses = [camera_to_key_ego(frame, camera) for _, camera in seen_by]
    for name, camera in (seen_by[i] for i in _around(np.array(poses).reshape(-1, 4, 4))):
        image = simplejpeg.decode_jpeg(camera.jpeg, "RGB", min_width=900, min_height=1)
        scale = image.shape[1] / camera.width
        to_camera = np.linalg.inv(camera_to_key_ego(frame, camera))
        local = centers @ to_camera[:3, :3].T + to_camera[:3, 3]
        pixels = local @ camera.intrinsics.T / np.maximum(local[:, 2:], 1e-6) * scale
        images.append((name, overlay(image, pixels[:, :2], local[:, 2], dots)))
    title = f"{frame.key}  ({manifest.labels or 'no'} labels)"
    _compose(path, images, panels, taxonomy, classes=classes, title=title)


def _around(poses: np.ndarray) -> list[int]:
    """Cameras in the order of a driver's view: those that look ahead from left to right, then those that look back.

    Args:
        poses: (V, 3 or 4, 4) camera to ego.
    """
    ahead, left = poses[:, 0, 2], poses[:, 1, 2]
    return sorted(range(len(poses)), key=lambda i: (ahead[i] < -1e-3, -left[i]))


def _seen_from_above(labels: Labels) -> np.ndarray:
    """(H, W, 3) uint8, x up, y left: share of each column that was observed, brighter where in view of a camera."""
    seen = labels.known()
    base = np.array([40, 70, 120])
    image = seen.mean(2)[..., None] * base
    if labels.mask_camera is not None:
        image = image + labels.mask_camera.mean(2)[..., None] * (np.array([250, 225, 150]) - base)
    occupied = (labels.binary & seen).any(2)
    image[occupied] = 0.6 * image[occupied] + 90
    return np.clip(image, 0, 255).astype(np.uint8)[::-1, ::-1]


def _points_from_above(points: np.ndarray, reach: float = 50.0, size: int = 500) -> np.ndarray:
    image = np.full((size, size, 3), 20, np.uint8)
    keep = (np.abs(points[:, :2]) < reach).all(1)
    points = points[keep][np.argsort(points[keep][:, 2])]
    row = ((reach - points[:, 0]) / (2 * reach) * size).astype(int)
    column = ((reach - points[:, 1]) / (2 * reach) * size).astype(int)
    t = np.clip((points[:, 2] + 1) / 5, 0, 1)[:, None]
    image[row, column] = ((1 - t) * [90, 130, 220] + t * BINARY_HIGH).astype(np.uint8)
    return image


def _compose(path: Path, images: list, panels: list, taxonomy: Taxonomy, *, classes: list[int], title: str) -> None:
    """Cameras on top, panels below, a legend of classes, saved as one PNG."""
    columns = (len(images) + 1) // 2 if len(images) > 4 else len(images)
    rows = -(-len(images) // columns) if images else 0
    width = 13.5
    camera_height = width / columns * images[0][1].shape[0] / images[0][1].shape[1] * rows if images else 0.0
    panel_height = width / len(panels) * 420 / 640 if panels else 0.0
    figure = Figure(figsize=(width, camera_height + panel_height + 1.25), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if images and panels:
        ratios = [camera_height + 0.3 * rows, panel_height + 0.5]
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    else:
        top = bottom = figure
    for i, (name, picture) in enumerate(images):
        axes = top.add_subplot(rows, columns, i + 1)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, fontsize=8, pad=2)
        axes.axis("off")
    for i, (name, picture) in enumerate(panels):
        axes = bottom.add_subplot(1, len(panels), i + 1)
        axes.imshow(picture)
        axes.set_title(name, fontsize=10, pad=3)
        axes.axis("off")
    if classes:
        shades = {k: (np.array(taxonomy.colors[k]) / 255).tolist() for k in classes}
        handles = [Patch(color=shades[k], label=taxonomy.classes[k]) for k in classes]
        columns = min(9, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _surface(solid: np.ndarray) -> np.ndarray:
    """Occupied voxels with a free neighbor (or at the border)."""
    padded = np.pad(solid, 1)
    inner = solid.copy()
    for axis in range(3):
        for shift in (-1, 1):
            inner &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
    return solid & ~inner


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
