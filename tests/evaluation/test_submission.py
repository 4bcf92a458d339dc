"""Submission files: what is written is read again, and what the benchmark refuses is refused here, in words."""

import json
import math

import numpy as np
import pytest

from occstream.evaluation.detection import ATTRIBUTES, NUSCENES, BoxSet, DetectionMetric
from occstream.evaluation.submission import (
    Inputs,
    check_sweeps,
    ego_boxes,
    global_boxes,
    read_detection,
    read_lidarseg,
    read_panoptic,
    write_detection,
    write_lidarseg,
    write_meta,
    write_panoptic,
)
from occstream.sharding.rawfiles import pose_of

POSE = pose_of((400.0, 1100.0, 0.5), (math.cos(0.6), 0, 0, math.sin(0.6)))  # the ego looks 1.2 rad from global x


def boxes(n=12):
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [rng.uniform(-20, 20, (n, 3)), rng.uniform(0.5, 5, (n, 3)), rng.uniform(-3.1, 3.1, (n, 1))], 1
    )
    return BoxSet(rows, np.arange(n) % 10, rng.uniform(-3, 3, (n, 2)), None, rng.random(n))


def test_boxes_go_to_the_global_frame_and_back(tmp_path):
    found = boxes()
    tilted = POSE @ pose_of((0, 0, 0), (math.cos(0.03), 0, math.sin(0.03), 0))
    back = ego_boxes(global_boxes("t", found, tilted), tilted)
    assert np.concatenate([back.boxes, back.velocity], 1) == pytest.approx(
        np.concatenate([found.boxes, found.velocity], 1)
    )
    url = tmp_path / "results.json"
    write_detection(url, {"b": global_boxes("b", found, POSE), "a": []}, Inputs(lidar=True), samples=("a", "b"))
    meta, results = read_detection(url, samples=("a", "b"))
    assert meta == {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
    assert results["a"] == []
    again = ego_boxes(results["b"], POSE)
    assert again.boxes == pytest.approx(found.boxes, abs=1e-9)
    assert again.velocity == pytest.approx(found.velocity, abs=1e-12)
    assert again.classes.tolist() == found.classes.tolist()
    assert again.scores.tolist() == found.scores.tolist()
    metric = DetectionMetric()
    metric.update("b", again, BoxSet(found.boxes, found.classes, found.velocity))
    assert metric.result()["mAP"] == pytest.approx(1)
    assert global_boxes("a", found.where(np.zeros(0, int)), POSE) == []


def test_a_record_by_hand():
    row = BoxSet(np.array([[10, 0, 1, 4, 2, 1.5, 0.3]]), np.array([0]), np.array([[1.0, 0]]), None, np.array([0.5]))
    [record] = global_boxes("t", row, POSE)
    assert record["translation"] == pytest.approx([400 + 10 * math.cos(1.2), 1100 + 10 * math.sin(1.2), 1.5])
    assert record["size"] == [2, 4, 1.5]
    assert record["rotation"] == pytest.approx([math.cos(0.75), 0, 0, math.sin(0.75)])
    assert record["velocity"] == pytest.approx([math.cos(1.2), math.sin(1.2)])
    assert (record["detection_name"], record["detection_score"]) == ("car", 0.5)
    assert record["attribute_name"] == "vehicle.moving"
    own = BoxSet(**{**vars(row), "attributes": np.array([ATTRIBUTES.index("vehicle.stopped")])})
    assert global_boxes("t", own, POSE)[0]["attribute_name"] == "vehicle.stopped"
    cone = BoxSet(**{**vars(row), "classes": np.array([NUSCENES.classes.index("traffic_cone")])})
    assert global_boxes("t", cone, POSE)[0]["attribute_name"] == ""


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", [1, 0, 2], "size is not positive"),
        ("detection_score", 1.2, r"detection_score is 1\.2, not within 0\.\.1"),
        ("detection_name", "van", "detection_name is 'van'; known: car"),
        ("attribute_name", "parked", "attribute_name is 'parked'"),
        ("rotation", [1, 1, 0, 0], "not a unit quaternion"),
        ("velocity", [1, 2, 3], "velocity has shape"),
        ("sample_token", "other", "it is listed below t"),
    ],
)
def test_a_wrong_record_is_named_and_nothing_is_written(field, value, words, tmp_path):
    records = global_boxes("t", boxes(), POSE)
    records[3][field] = value
    with pytest.raises(ValueError, match=f"sample t, box 3: .*{words}"):
        write_detection(tmp_path / "x.json", {"t": records}, Inputs())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "y.json").write_text(json.dumps({"meta": Inputs().meta(), "results": {"t": records}}))
    with pytest.raises(ValueError, match=f"sample t, box 3: .*{words}"):
        read_detection(tmp_path / "y.json")


def test_whole_submissions_are_compared_with_the_split(tmp_path):
    url = tmp_path / "x.json"
    with pytest.raises(ValueError, match="lacks 1 of 2 samples, the first is b"):
        write_detection(url, {"a": []}, Inputs(), samples=("a", "b"))
    with pytest.raises(ValueError, match="has unknown 1 of 1 samples, the first is b"):
        write_detection(url, {"a": [], "b": []}, Inputs(), samples=("a",))
    with pytest.raises(ValueError, match=r"sample a has 501 boxes, at most 500"):
        write_detection(url, {"a": [{}] * 501}, Inputs())
    with pytest.raises(ValueError, match="is missing"):
        read_detection(url)
    for text, words in (
        ("{", "not readable as JSON"),
        ("[]", "not a record"),
        ('{"meta": {}, "results": {}}', "meta has"),
        ('{"meta": 3, "results": {}}', "meta"),
    ):
        url.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_detection(url)
    for token in ("../a", "", "a/b", "a\n"):
        with pytest.raises(ValueError, match="is not a token"):
            global_boxes(token, boxes(), POSE)


def test_point_labels_are_read_again(tmp_path):
    classes, instances = np.array([4, 4, 11, 16]), np.array([1, 999, 0, 0])
    write_meta(tmp_path, "val", Inputs(lidar=True))
    write_lidarseg(tmp_path, "val", "abc", classes)
    assert (tmp_path / "lidarseg/val/abc_lidarseg.bin").read_bytes() == bytes([4, 4, 11, 16])
    assert read_lidarseg(tmp_path, "val", "abc", 4).tolist() == classes.tolist()
    check_sweeps(tmp_path, "lidarseg", "val", {"abc": 4})
    assert json.loads((tmp_path / "val/submission.json").read_text()) == {"meta": Inputs(lidar=True).meta()}
    write_meta(tmp_path, "val", Inputs(lidar=True), task="segmentation")
    write_panoptic(tmp_path, "val", "abc", classes, instances=instances)
    data = np.load(tmp_path / "panoptic/val/abc_panoptic.npz")["data"]
    assert (data.dtype, data.tolist()) == (np.uint16, [4001, 4999, 11000, 16000])
    found = read_panoptic(tmp_path, "val", "abc", 4)
    assert [a.tolist() for a in found] == [classes.tolist(), instances.tolist()]
    check_sweeps(tmp_path, "panoptic", "val", {"abc": 4})
    for kind in ("lidarseg", "panoptic"):
        with pytest.raises(ValueError, match="has 4 labels, the sweep has 5 points"):
            check_sweeps(tmp_path, kind, "val", {"abc": 5})
        with pytest.raises(ValueError, match=f"missing_{kind}.* is missing"):
            check_sweeps(tmp_path, kind, "val", {"missing": 5})


def test_point_labels_that_the_benchmark_refuses(tmp_path):
    for classes, words in (([4, 0], "class 0 at 1 points"), ([17], "class 17"), ([], "no points")):
        with pytest.raises(ValueError, match=f"sweep abc: .*{words}"):
            write_lidarseg(tmp_path, "val", "abc", np.array(classes, int))
        with pytest.raises(ValueError, match=f"sweep abc: .*{words}"):
            write_panoptic(tmp_path, "val", "abc", np.array(classes, int), instances=np.zeros(len(classes), int))
    with pytest.raises(ValueError, match="1 points of stuff have an instance"):
        write_panoptic(tmp_path, "val", "abc", np.array([11, 4]), instances=np.array([1, 0]))
    with pytest.raises(ValueError, match="instance 1000 does not fit"):
        write_panoptic(tmp_path, "val", "abc", np.array([4]), instances=np.array([1000]))
    with pytest.raises(ValueError, match="split 'dev' is not known"):
        write_lidarseg(tmp_path, "dev", "abc", np.array([4]))
    with pytest.raises(ValueError, match="not a token"):
        write_lidarseg(tmp_path, "val", "../abc", np.array([4]))
    assert list(tmp_path.rglob("*.*")) == []
    folder = tmp_path / "panoptic/val"
    folder.mkdir(parents=True)
    np.savez(folder / "a_panoptic.npz", data=np.array([4001], np.int32))
    np.savez(folder / "b_panoptic.npz", labels=np.array([4001], np.uint16))
    (folder / "c_panoptic.npz").write_bytes(b"PK no zip")
    np.savez(folder / "d_panoptic.npz", data=np.array([{}], object))
    for token, words in (("a", "int32"), ("b", "not readable"), ("c", "not readable"), ("d", "not readable")):
        with pytest.raises(ValueError, match=f"{token}_panoptic.npz: .*{words}"):
            read_panoptic(tmp_path, "val", token)
