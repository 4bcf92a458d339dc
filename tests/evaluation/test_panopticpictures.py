"""Pictures of panoptic voxels: colors that follow an object, names of found boxes, files that are written, and animations."""

import numpy as np
import pytest
from PIL import Image

from occstream.evaluation.instances import FoundBoxes, Segments
from occstream.evaluation.panopticpictures import (
    animate,
    instance_color,
    matched_names,
    panoptic_colors,
    panoptic_picture,
)
from occstream.sharding.schema import OCC3D

CAR, BUS, ROAD, FREE = OCC3D.id("car"), OCC3D.id("bus"), OCC3D.id("driveable_surface"), OCC3D.free_id


def boxes(*rows: tuple[float, int]) -> FoundBoxes:
    """At x, of a class, each less sure than the one before."""
    places = np.array([[x, 0, 0, 4, 2, 1.5, 0] for x, _ in rows], np.float32).reshape(-1, 7)
    return FoundBoxes(places, np.array([kind for _, kind in rows]), np.linspace(0.9, 0.5, len(rows), dtype=np.float32))


def test_found_boxes_have_the_name_of_the_nearest_true_one_of_their_class():
    truth = boxes((0, CAR), (10, CAR), (20, BUS))
    found = boxes((1, CAR), (2, CAR), (20.5, CAR), (19, BUS), (10.5, CAR))
    names = matched_names(found, np.array([0, 1, 2, 3, 4]), truth, ["a", "b", "c"])
    assert names == ["a", "found:2", "found:3", "c", "b"]
    assert matched_names(found, np.array([4, 3]), truth, ["a", "b", "c"]) == ["b", "c"]
    assert matched_names(found, np.array([0]), boxes(), []) == ["found:1"]


def test_an_object_has_one_color_whatever_its_number():
    assert instance_color("t1").tolist() == instance_color("t1").tolist()
    classes = np.array([[[CAR, CAR, ROAD, FREE]]])
    first = panoptic_colors(classes, np.array([[[1, 2, 0, 0]]]), OCC3D, ["t1", "t2"])
    second = panoptic_colors(classes, np.array([[[2, 1, 0, 0]]]), OCC3D, ["t2", "t1"])
    assert first[0, 0, :2].tolist() == second[0, 0, :2].tolist()
    assert first[0, 0, 0].tolist() != first[0, 0, 1].tolist()
    assert first[0, 0, 2].tolist() == second[0, 0, 2].tolist()
    beyond = panoptic_colors(classes, np.array([[[3, 4, 0, 0]]]), OCC3D, ["t1"])
    assert beyond[0, 0, 0].tolist() != beyond[0, 0, 1].tolist()


@pytest.mark.parametrize("known", [True, False])
def test_pictures_are_written_with_and_without_truth_and_become_an_animation(tmp_path, known):
    classes = np.full((12, 12, 4), FREE, np.uint8)
    classes[..., 0], classes[3:6, 3:5, 1] = ROAD, CAR
    ids = (classes == CAR).astype(np.uint16)
    said = boxes((1, CAR), (5, CAR))
    pictures = []
    for number in range(2 if known else 1):
        pictures.append(tmp_path / "deep" / f"{number}.png")
        panoptic_picture(
            pictures[-1],
            truth=(classes, ids) if known else None,
            found=Segments(classes, ids, np.array([number])),
            true_boxes=boxes((1, CAR)) if known else boxes(),
            boxes=said,
            least=0.4,
            taxonomy=OCC3D,
            reach=6,
            title="one",
        )
    animate(tmp_path / "all.gif", pictures)
    found, picture = Image.open(tmp_path / "all.gif"), Image.open(pictures[0])
    assert (found.n_frames, found.size) == (len(pictures), picture.size)
    assert np.asarray(picture.convert("RGB")).std() > 20


def test_pictures_of_two_sizes_are_centered(tmp_path):
    for name, size in (("a", (20, 10)), ("b", (10, 30))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{name}.png")
    animate(tmp_path / "all.gif", [tmp_path / "a.png", tmp_path / "b.png"], 0.25)
    found = Image.open(tmp_path / "all.gif")
    assert found.size == (20, 30)
    assert found.info["duration"] == 250
    assert found.convert("RGB").getpixel((10, 15)) == (0, 0, 255)
    assert found.convert("RGB").getpixel((10, 2)) == (255, 255, 255)
