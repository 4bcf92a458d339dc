"""What every scene must be before anything is computed from it, whichever source it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from occstream.sharding.schema import Boxes, Frame, LidarSweep, Scene

LACKING = "lacking"  # attribute of a scene: by camera, how many of its frames have no image of it though others have
DROPPED = "dropped_returns"  # attribute of a scene: how many LiDAR returns had coordinates that are not finite
_OF_POINTS = ("intensity", "ring", "time_lag", "classes", "moving", "instances")


def admit(scene: Scene) -> Scene:
    """The scene without LiDAR returns whose coordinates are not finite; their number becomes the attribute ``DROPPED``.

    Raises:
        ValueError: a pose, box, intrinsic matrix or value of a point is not finite or has another shape, frames are not in
            the order of time, or a sweep has no finite return; names the frame and the part.
    """
    dropped, frames, before = 0, [], None
    for frame in scene.frames:
        where = f"frame {frame.key}"
        if frame.timestamp is not None:
            if before is not None and frame.timestamp <= before:
                raise ValueError(
                    f"{where}: time stamp {frame.timestamp} is not after that of the frame before, {before}"
                )
            before = frame.timestamp
        _check_poses(frame, where)
        if frame.boxes is not None:
            _check_boxes(frame.boxes, where)
        kept = {}
        if frame.lidar is not None:
            kept["lidar"] = _finite(frame.lidar, f"{where}, LiDAR")
            dropped += len(frame.lidar.xyz) - len(kept["lidar"].xyz)
        if frame.sweeps:
            kept["sweeps"] = [_finite(s, f"{where}, sweep {s.timestamp}") for s in frame.sweeps]
            dropped += sum(len(s.xyz) for s in frame.sweeps) - sum(len(s.xyz) for s in kept["sweeps"])
        frames.append(dataclasses.replace(frame, **kept))
    if not dropped:
        return scene
    return dataclasses.replace(scene, frames=frames, attributes={**scene.attributes, DROPPED: dropped})


def with_lacking(scene: Scene, chosen: Sequence[str] = ()) -> Scene:
    """The scene with the attribute ``LACKING`` if some of its frames have fewer cameras, or of the chosen ones, than others."""
    rig = dict.fromkeys(n for f in scene.frames for n in f.cameras if not chosen or n in chosen)
    lacking = {name: sum(name not in frame.cameras for frame in scene.frames) for name in rig}
    lacking = {name: count for name, count in sorted(lacking.items()) if count}
    return dataclasses.replace(scene, attributes={**scene.attributes, LACKING: lacking}) if lacking else scene


def is_rigid(pose: np.ndarray) -> bool:
    """Whether a matrix is (4, 4), finite, and a rotation with a translation."""
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        return False
    turn = pose[:3, :3]
    return bool(
        np.allclose(turn @ turn.T, np.eye(3), atol=1e-3)
        and np.linalg.det(turn) > 0
        and np.allclose(pose[3], [0, 0, 0, 1])
    )


def _check_poses(frame: Frame, where: str) -> None:
    poses = {"ego_to_global": frame.ego_to_global}
    sensors = {**frame.cameras, **({"LiDAR": frame.lidar} if frame.lidar else {})}
    sensors |= {f"sweep {sweep.timestamp}": sweep for sweep in frame.sweeps}
    for name, sensor in sensors.items():
        poses |= {f"{name}: sensor_to_ego": sensor.sensor_to_ego, f"{name}: ego_to_global": sensor.ego_to_global}
    for name, pose in poses.items():
        if pose is not None and not is_rigid(pose):
            raise ValueError(f"{where}: {name} is not a rigid pose: {np.asarray(pose).tolist()}; correct the source")
    for name, camera in frame.cameras.items():
        if camera.intrinsics.shape != (3, 3) or not np.isfinite(camera.intrinsics).all():
            raise ValueError(f"{where}: {name}: intrinsics are not 3x3 finite numbers: {camera.intrinsics.tolist()}")
        if camera.distortion is not None and not np.isfinite(camera.distortion).all():
            raise ValueError(f"{where}: {name}: distortion is not finite: {camera.distortion}")


def _check_boxes(boxes: Boxes, where: str) -> None:
    rows = np.asarray(boxes.boxes)
    if rows.ndim != 2 or rows.shape[1] != 7 or not len(rows) == len(boxes.names) == len(boxes.track_ids):
        raise ValueError(
            f"{where}: boxes have shape {rows.shape} for {len(boxes.names)} names and {len(boxes.track_ids)} tracks, "
            "expected (N, 7)"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(f"{where}: box {bad[0]} ({boxes.names[bad[0]]}) is not finite: {rows[bad[0]].tolist()}")
    if boxes.velocity is not None:
        velocity = np.asarray(boxes.velocity)
        if velocity.shape != (len(rows), 2) or np.isinf(velocity).any():
            raise ValueError(f"{where}: velocities of boxes are infinite or have shape {velocity.shape}, not (N, 2)")


def _finite(sweep: LidarSweep, where: str) -> LidarSweep:
    if sweep.xyz.ndim != 2 or sweep.xyz.shape[1] != 3:
        raise ValueError(f"{where}: points have shape {sweep.xyz.shape}, expected (N, 3)")
    keep = np.asarray(np.isfinite(sweep.xyz).all(1))
    if len(keep) and not keep.any():
        raise ValueError(f"{where}: none of its {len(keep)} returns has finite coordinates; its file is damaged")
    arrays = {name: value for name in _OF_POINTS if (value := getattr(sweep, name)) is not None}
    for name, value in arrays.items():
        if value.shape != (len(keep),):
            raise ValueError(f"{where}: {name} has shape {value.shape} for {len(keep)} points")
        if value.dtype.kind == "f" and not np.isfinite(value[keep]).all():
            raise ValueError(f"{where}: {name} of a return is not finite; its file is damaged or has other columns")
    if keep.all():
        return sweep
    kept = {name: value[keep] for name, value in arrays.items()}
    return dataclasses.replace(sweep, xyz=sweep.xyz[keep], **kept)
