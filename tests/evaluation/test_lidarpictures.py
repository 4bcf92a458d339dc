"""Pictures of boxes and of points: what is where in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import simplejpeg
import torch
from PIL import Image

from occstream.evaluation.detection import rules_of
from occstream.evaluation.lidarpictures import _edges, _place, camera_height, detection_picture, segmentation_picture
from occstream.models.batch import Batch, Boxes, PointLabels, Points
from occstream.models.centerpoint import Detections
from occstream.sharding.schema import OCC3D, Camera, Frame

CAR = rules_of(OCC3D).classes.index("car")
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # a camera that looks along ego x
INTRINSICS = np.array([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]])


def frame() -> Frame:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = AHEAD, (1, 0, 1.5)
    jpeg = simplejpeg.encode_jpeg(np.zeros((90, 160, 3), np.uint8))
    camera = Camera(jpeg, 160, 90, INTRINSICS, pose, np.eye(4), 0)
    return Frame("s", 0, "t", 0, np.eye(4), cameras={"FRONT": camera, "OTHER": camera})


def scene() -> Batch:
    """A car 20 m ahead and 10 m to the left."""
    return Batch(
        torch.eye(3)[None],
        1,
        ["s-0000"],
        points=Points(torch.tensor([[20.0, 10, 0.5], [-30, 0, 0]]), torch.tensor([2])),
        point_labels=PointLabels(torch.tensor([4, 255], dtype=torch.uint8), torch.tensor([2])),
        boxes=Boxes(
            torch.tensor([[20.0, 10, 1, 10, 5, 2, 0]]),
            torch.tensor([CAR], dtype=torch.uint8),
            torch.zeros(1, 2),
            torch.ones(1, dtype=torch.int32),
            torch.tensor([1]),
        ),
    )


def test_edges_of_boxes_are_where_the_camera_sees_them():
    box = np.array([[11.0, 0, 1.5, 2, 4, 2, 0], [-20, 0, 1, 4, 2, 2, 0], [1, 0, 1.5, 4, 4, 1, 0]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = AHEAD, (1, 0, 1.5)
    lines, of = _edges(box, np.eye(3), np.linalg.inv(pose), INTRINSICS)
    assert sorted(set(of.tolist())) == [0, 2], "what is behind is not drawn, and of what is around us the part ahead"
    near = lines[of == 0].reshape(-1, 2)
    np.testing.assert_allclose(near.min(0), (80 - 100 * 2 / 9, 45 - 100 / 9))
    np.testing.assert_allclose(near.max(0), (80 + 100 * 2 / 9, 45 + 100 / 9))
    assert (of == 2).sum() == 8
    mirrored, _ = _edges(box * [1, -1, 1, 1, 1, 1, -1], np.diag([1.0, -1, 1]), np.linalg.inv(pose), INTRINSICS)
    assert sorted(map(tuple, np.round(mirrored.reshape(-1, 2), 6))) == sorted(
        map(tuple, np.round(lines.reshape(-1, 2), 6))
    )


def test_cameras_that_look_ahead_come_first_from_left_to_right():
    yaws = {"BACK": 180, "BACK_LEFT": 110, "BACK_RIGHT": -110, "FRONT": 0, "FRONT_LEFT": 55, "FRONT_RIGHT": -55}
    of, camera = frame(), frame().cameras["FRONT"]
    for name, degrees in yaws.items():
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        pose = np.eye(4)
        pose[:3, :3] = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ AHEAD
        of.cameras[name] = dataclasses.replace(camera, sensor_to_ego=pose)
    found = sorted(yaws, key=lambda name: _place(of, name))
    assert found == ["FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_LEFT", "BACK", "BACK_RIGHT"]


def test_few_cameras_are_drawn_large():
    of = frame()
    assert camera_height(of) == 4.5 * 90 / 160 + 0.25, "side by side"
    del of.cameras["OTHER"]
    assert camera_height(of) == 9 * 90 / 160 + 0.25
    of.cameras |= {name: of.cameras["FRONT"] for name in "abc"}
    assert camera_height(of) == 2 * (3 * 90 / 160 + 0.25), "two rows of three"


def colored(path, low, high) -> np.ndarray:
    """Share of the columns and rows (from the left and the top) at which pixels of a color lie."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rows, columns = np.nonzero(((image >= low) & (image <= high)).all(2))
    return np.stack([columns / image.shape[1], rows / image.shape[0]], 1)


def test_boxes_are_drawn_from_above_and_in_cameras(tmp_path):
    found = Detections(
        np.array([[-30.0, -25, 1, 10, 5, 2, 0.3]], np.float32), None, np.array([CAR]), np.array([1.0], np.float32)
    )
    path = tmp_path / "new" / "boxes.png"
    detection_picture(path, scene(), found, 0, taxonomy=OCC3D, cameras=frame())
    filled = colored(path, (155, 205, 240), (175, 225, 255))  # a third of the car's color on white
    assert 0.3 < np.median(filled[:, 0]) < 0.5, "to the left"
    assert 0.1 < np.median(filled[:, 1]) < 0.4, "ahead"
    outline = colored(path, (0, 115, 195), (20, 140, 220))
    assert np.median(outline[:, 0]) > 0.6
    assert 0.4 < np.median(outline[:, 1]) < 0.75
    assert len(colored(path, (0, 0, 0), (0, 0, 0))) > 3000, "two black images"


def test_points_have_the_colors_of_their_classes(tmp_path):
    path = tmp_path / "points.png"
    batch = scene()
    batch.points.xyz = torch.rand(400, 3) * torch.tensor([30.0, 30, 0])
    batch.points.counts = batch.point_labels.counts = torch.tensor([400])
    batch.point_labels.classes = torch.full((400,), OCC3D.id("pedestrian"), dtype=torch.uint8)
    segmentation_picture(path, batch, np.full(400, OCC3D.id("vegetation")), 0, taxonomy=OCC3D)
    red, green = colored(path, (220, 0, 0), (235, 40, 40)), colored(path, (0, 140, 0), (40, 160, 40))
    assert len(red) > 100 < len(green)
    assert np.median(red[:, 0]) < 0.5 < np.median(green[:, 0])
