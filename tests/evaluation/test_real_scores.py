"""The truth of real key-frames, handed in as a prediction, scores 1.0 in every metric, also by way of a submission."""

import numpy as np
import pytest
import torch

from occstream.evaluation.detection import NUSCENES, BoxSet, DetectionMetric
from occstream.evaluation.panoptic import nuscenes_panoptic
from occstream.evaluation.pointseg import PointMetric
from occstream.evaluation.rayiou import RayMetric, ray_origins
from occstream.evaluation.submission import Inputs, ego_boxes, global_boxes, read_detection, write_detection
from occstream.sharding.grid import get_grid
from occstream.sharding.poses import compose, inverse
from occstream.sharding.schema import IGNORE, OCC3D
from occstream.sharding.sources import open_source
from occstream.sharding.voxelrays import first_box


@pytest.fixture(scope="module")
def frames(shared_data):
    return open_source("nuscenes", {"root": str(shared_data / "nuscenes")}).load("scene-9001").frames


def instances_of(frame):
    """(N,) 1 + the number of the box that a point of its sweep is in, 0: none."""
    rows, into = frame.boxes.boxes.astype(float), []
    for x, y, z, *_, yaw in rows:
        c, s = np.cos(yaw), np.sin(yaw)
        into.append(inverse(np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])))
    into = compose(np.array(into), frame.lidar.sensor_to_ego)[:, :3]
    return first_box(frame.lidar.xyz, np.ascontiguousarray(into), rows[:, 3:6] / 2) + 1


def test_boxes_by_way_of_a_submission(frames, tmp_path):
    truths = [BoxSet.of(frame.boxes, NUSCENES) for frame in frames]
    results = {}
    for frame, truth in zip(frames, truths):
        n = len(truth.boxes)
        sure = BoxSet(truth.boxes, truth.classes, np.nan_to_num(truth.velocity), scores=np.linspace(0.1, 1, n))
        results[frame.token] = global_boxes(frame.token, sure, frame.ego_to_global)
    write_detection(tmp_path / "r.json", results, Inputs(lidar=True), samples=[frame.token for frame in frames])
    _, results = read_detection(tmp_path / "r.json")
    metric = DetectionMetric()
    for frame, truth in zip(frames, truths):
        metric.update(frame.token, ego_boxes(results[frame.token], frame.ego_to_global), truth)
    scores = metric.result()
    assert metric.truths.sum() > 100
    assert scores["mAP_present"] == pytest.approx(1)
    for name, count in zip(NUSCENES.classes, metric.truths.tolist()):
        errors = [scores[f"{e}/{name}"] for e in ("mATE", "mASE", "mAOE", "mAVE")]
        assert not count or np.nan_to_num(errors) == pytest.approx(np.zeros(4), abs=1e-5), name


def test_points_and_their_instances(frames):
    semantic, panoptic = PointMetric(), nuscenes_panoptic()
    for frame in frames:
        classes = frame.lidar.classes
        thing = (classes >= 1) & (classes <= 10)
        instances = np.where(thing, instances_of(frame), 0)
        assert (instances[thing] > 0).mean() > 0.5
        semantic.update(torch.from_numpy(classes), torch.from_numpy(classes))
        panoptic.update(classes, instances, classes, instances)
    assert semantic.result()["mIoU"] == semantic.result()["accuracy"] == 1
    scores = panoptic.result()
    assert scores["PQ_present"] == scores["SQ_present"] == scores["RQ_present"] == scores["mIoU_present"] == 1


def test_rays_from_the_scenes_own_lidar_places(frames):
    grid, frame = get_grid("occ3d"), frames[3]
    pose = frame.lidar.sensor_to_ego
    points = frame.lidar.xyz @ pose[:3, :3].T + pose[:3, 3]
    index, inside = grid.to_index(points)
    keep = inside & (frame.lidar.classes != IGNORE)
    labels = np.full(grid.shape, OCC3D.free_id, np.uint8)
    labels[tuple(index[keep].T)] = frame.lidar.classes[keep]
    places = [f.ego_to_global @ f.lidar.sensor_to_ego for f in frames]
    origins = ray_origins(places, frame.ego_to_global, grid)
    assert 1 <= len(origins) <= 8
    assert np.abs(origins - pose[:3, 3]).min() < 0.01  # its own place is among them
    metric = RayMetric(OCC3D, grid)
    metric.update(labels, labels, origins)
    assert metric.result()["RayIoU"] == 1
    assert metric.counts[:, 0].sum() > 10_000
    coarse = labels.copy()
    coarse[:, 1:] = labels[:, :-1]  # one voxel to the left
    shifted = RayMetric(OCC3D, grid)
    shifted.update(coarse, labels, origins)
    assert 0.2 < shifted.result()["RayIoU"] < 0.9
