"""Writes small data sets in the public layouts. ``LAYOUTS[source]`` gives the options that open what it wrote: the contract
test runs on every entry, and fails for a source that has none."""

from __future__ import annotations

import atexit
import functools
import pickle
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from pyarrow import feather
from scipy.spatial.transform import Rotation

from tests.sharding import toy_nuscenes

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
GRID = (200, 200, 16)
LEVEL = [1.0, 0.0, 0.0, 0.0]


def nuscenes(root: Path) -> dict:
    toy_nuscenes.write(root, scenes=2)
    return {"root": str(root), "sweeps": True}


def nuscenes_with(labels: str):
    def write(root: Path) -> dict:
        options = nuscenes(root)
        for k in range(2):
            for i in range(2):
                {"occ3d": occ3d_frame, "openoccupancy": openoccupancy_frame, "surroundocc": surroundocc_frame}[labels](
                    root, f"scene-{k:04d}", f"scene{k}", f"s{k}-{i}", f"ls{k}-{i}"
                )
        return options | {"labels": labels}

    return write


def _save(path: Path, value: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, value)


def occ3d_frame(root: Path, scene: str, scene_token: str, sample: str, lidar: str) -> None:
    """Voxels (3, 5, 7) car, (4, 5, 7) car that nobody saw, the rest free; the first half of x is seen."""
    semantics, seen = np.full(GRID, 17, np.uint8), np.zeros(GRID, np.uint8)
    semantics[3, 5, 7], semantics[150, 5, 7] = 4, 4
    seen[:100] = 1
    folder = root / "gts" / scene / sample
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "labels.npz", semantics=semantics, mask_lidar=seen, mask_camera=seen)


def openoccupancy_frame(root: Path, scene: str, scene_token: str, sample: str, lidar: str) -> None:
    rows = np.array([[7, 5, 3, 4], [8, 5, 3, 0], [39, 511, 510, 16]])  # z, y, x, class
    _save(root / "nuScenes-Occupancy" / f"scene_{scene_token}" / "occupancy" / f"{lidar}.npy", rows)


def surroundocc_frame(root: Path, scene: str, scene_token: str, sample: str, lidar: str) -> None:
    rows = np.array([[3, 5, 7, 4], [3, 5, 8, 0], [199, 198, 15, 16]])  # x, y, z, class
    _save(root / "nuscenes_occ" / "samples" / f"{lidar}.bin.npy", rows)


def occ3d(root: Path) -> dict:
    for sample in ("b", "a"):
        occ3d_frame(root, "scene-0007", "", sample, "")
    return {"root": str(root)}


def lzf_packed(raw: bytes) -> bytes:
    """LZF: literals, and repetitions of three bytes or more that came up to 8 KiB before."""
    out, literals, last, at = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literals), 32):
            run = literals[start : start + 32]
            out.extend((len(run) - 1, *run))
        literals.clear()

    while at < len(raw):
        before = last.get(raw[at : at + 3], -1) if at + 3 <= len(raw) else -1
        last[raw[at : at + 3]] = at
        if before < 0 or at - before > 8192:
            literals.append(raw[at])
            at += 1
            continue
        length = 3
        while length < 264 and at + length < len(raw) and raw[before + length] == raw[at + length]:
            length += 1
        flush()
        far, more = at - before - 1, length - 2
        out.extend((min(more, 7) << 5 | far >> 8, *([more - 7] if more >= 7 else []), far & 255))
        at += length
    flush()
    return bytes(out)


def pcd(points: np.ndarray, coding: str = "binary") -> bytes:
    """PCD bytes of (N, 4) x, y, z, intensity with an integer ring."""
    kind = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4"), ("ring", "u1")])
    rows = np.zeros(len(points), kind)
    for i, name in enumerate(("x", "y", "z", "intensity")):
        rows[name] = points[:, i]
    rows["ring"] = np.arange(len(points)) % 40
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z intensity ring\nSIZE 4 4 4 4 1\nTYPE F F F F U\nCOUNT 1 1 1 1 1\n"
    head += f"WIDTH {len(rows)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(rows)}\nDATA {coding}\n"
    if coding == "binary":
        return head.encode() + rows.tobytes()
    if coding == "binary_compressed":
        raw = b"".join(rows[name].tobytes() for name in kind.names)
        packed = lzf_packed(raw)
        return head.encode() + np.array([len(packed), len(raw)], "<u4").tobytes() + packed
    return (head + "\n".join(" ".join(str(v) for v in row) for row in rows.tolist()) + "\n").encode()


def ground(rng, height: float, ahead: float = 0.0) -> np.ndarray:
    """(60, 4) returns of a level road around a LiDAR at a height, within 8 m of the vehicle's rear axle."""
    points = rng.uniform(-5, 5, (60, 4))
    points[:, 0] -= ahead
    points[:, 2], points[:, 3] = -height, 0.1
    return points


def openscene(root: Path, occupancy: bool = True, scenes: int = 2, frames: int = 2) -> dict:
    rng = np.random.default_rng(1)
    infos = []
    for k in range(scenes):
        scene = f"log-0001-scene-{k:04d}"
        for i in range(frames):
            token = f"{k:08x}{i:08x}"
            cameras = {}
            for name in ("CAM_F0", "CAM_L0", "CAM_R0", "CAM_L1", "CAM_R1", "CAM_L2", "CAM_R2", "CAM_B0"):
                path = f"log-a/{name}/{token}.jpg"
                image = root / "sensor_blobs" / "mini" / path
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(simplejpeg.encode_jpeg(IMAGE))
                cameras[name] = {
                    "data_path": path,
                    "sensor2lidar_rotation": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
                    "sensor2lidar_translation": np.array([1.0, 0, 0.2]),
                    "cam_intrinsic": np.array([[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]]),
                    "distortion": np.array([-0.3, 0.1, 0, 0, 0.02]),
                }
            cloud = root / "sensor_blobs" / "mini" / "log-a" / "MergedPointCloud" / f"{token}.pcd"
            cloud.parent.mkdir(parents=True, exist_ok=True)
            points = np.concatenate([rng.uniform(-20, 20, (50, 4)), ground(rng, 1.5 + 0.325)])
            cloud.write_bytes(pcd(points, "binary" if i else "ascii"))
            info = {
                "token": token,
                "frame_idx": i,
                "timestamp": 10**15 + 500_000 * i,
                "log_name": "log-a",
                "scene_name": scene,
                "map_location": "us-nv-las-vegas",
                "vehicle_name": "v1",
                "lidar_path": f"log-a/MergedPointCloud/{token}.pcd",
                "lidar2ego_translation": np.array([0.0, 0, 1.5]),
                "lidar2ego_rotation": LEVEL,
                "ego2global_translation": np.array([6.0e5 + 2 * i, 4.0e6, 600]),
                "ego2global_rotation": np.array([np.cos(0.5), 0, 0, np.sin(0.5)]),
                "cams": cameras,
                "anns": {
                    "gt_boxes": np.array([[10.0, 2, 0.5, 4.5, 1.9, 1.6, 0.3]]),
                    "gt_names": np.array(["vehicle"]),
                    "gt_velocity_3d": np.array([[3.0, 1.0, 0.0]]),
                    "instance_tokens": [f"i{token}"],
                    "track_tokens": ["t0"],
                },
            }
            if occupancy:
                info["occ_gt_final_path"] = (
                    f"dataset/openscene-v1.0/occupancy/mini/{scene}/occ_gt/{i:03d}_occ_final.npy"
                )
                info["flow_gt_final_path"] = info["occ_gt_final_path"].replace("occ_final", "flow_final")
                folder = root / "occupancy" / "mini" / scene / "occ_gt"
                # OpenScene's flat index: (3, 5, 7) -> 281003. Rows are not in C order.
                rows = np.array([[281003, 0], [15 * 40000 + 199 * 200 + 199, 10], [281004, 4]])
                _save(folder / f"{i:03d}_occ_final.npy", rows)
                _save(folder / f"{i:03d}_flow_final.npy", np.array([[3.0, 1.0], [0, 0], [0.5, 0]]))
            infos.append(info)
    (root / "meta_datas").mkdir(parents=True, exist_ok=True)
    content = {"infos": infos, "metadata": {"version": "mini"}} if occupancy else infos
    (root / "meta_datas" / "log-a.pkl").write_bytes(pickle.dumps(content))
    return {"root": str(root)}


def kitti_voxels(folder: Path, scan: int, car: int = 10) -> np.ndarray:
    """Writes the voxel files of one scan; returns the raw labels (X, Y, Z). Voxel (0, 0, 0) and (0, 0, 6..7) are invalid:
    the first byte is 131."""
    raw = np.zeros((256, 256, 32), np.uint16)
    raw[10, 20, 5], raw[11, 20, 5], raw[12, 20, 5], raw[13, 20, 5] = car, 252, 99, 40
    invalid = np.zeros(raw.shape, bool)
    invalid[0, 0, [0, 6, 7]] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{scan:06d}.label").write_bytes(raw.tobytes())
    (folder / f"{scan:06d}.invalid").write_bytes(np.packbits(invalid).tobytes())
    assert (folder / f"{scan:06d}.invalid").read_bytes()[0] == 131
    return raw


def _png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), IMAGE)


# Camera axes (x right, y down, z forward) of a LiDAR's (x forward, y left, z up), 0.1 m behind and below.
TR = [[0, -1, 0, 0.02], [0, 0, -1, -0.1], [1, 0, 0, -0.3]]
P2 = [[50.0, 0, 31.5, 3.0], [0, 50, 23.5, 0.1], [0, 0, 1, 0.003]]


# SSCBench's camera is turned by 0.01 rad about its y axis when its image is rectified.
R_RECT = [[np.cos(0.01), 0, np.sin(0.01)], [0, 1, 0], [-np.sin(0.01), 0, np.cos(0.01)]]


def semantickitti(root: Path, voxels: bool = True) -> dict:
    rng = np.random.default_rng(2)
    folder = root / "sequences" / "00"
    for name in ("velodyne", "labels"):
        (folder / name).mkdir(parents=True)
    for scan in range(7):
        points = np.concatenate([rng.uniform(1, 20, (30, 4)), ground(rng, 1.73, 0.76)]).astype(np.float32)
        (folder / "velodyne" / f"{scan:06d}.bin").write_bytes(points.tobytes())
        raw = rng.choice([0, 10, 40, 252, 99], 90).astype(np.uint32) | (7 << 16)
        (folder / "labels" / f"{scan:06d}.label").write_bytes(raw.tobytes())
    row = lambda m: " ".join(repr(float(v)) for v in np.ravel(m))  # noqa: E731
    (folder / "calib.txt").write_text(f"P2: {row(P2)}\nTr: {row(TR)}\n")
    poses = [np.hstack([np.eye(3), [[0], [0], [2.0 * s]]]) for s in range(7)]  # 2 m forward = z of the camera
    (folder / "poses.txt").write_text("\n".join(row(p) for p in poses) + "\n")
    (folder / "times.txt").write_text("\n".join(f"{0.104 * s:e}" for s in range(7)) + "\n")
    for scan in (0, 5):
        _png(folder / "image_2" / f"{scan:06d}.png")
        if voxels:
            kitti_voxels(folder / "voxels", scan)
    return {"root": str(root)}


# Boxes of KITTI object's toy frames in the LiDAR's frame: center, length, width, height, and the angle about the camera's y.
KITTI_BOXES = {
    "Car": ((9.0, 1.5, -0.9), (4.2, 1.8, 1.66), -1.9),
    "Cyclist": ((6.0, -2.0, -0.85), (1.8, 0.7, 1.76), 0.4),
}


def kitti_scan(rows: int = 64, columns: int = 120) -> np.ndarray:
    """A turn of a LiDAR 1.73 m above level ground, row by row from above, each from ahead around the left: (N, 4) float32.
    Rays end in the ground, 25 m away, or 5 cm behind the surface of a box of ``KITTI_BOXES``."""
    up = np.radians(np.linspace(2, -24.8, rows))[:, None]
    around = np.radians((np.arange(columns) + 0.5) * 360 / columns)[None]
    rays = np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up) * np.ones_like(around)], -1)
    rays = rays.reshape(-1, 3)
    far = np.minimum(25.0, np.where(rays[:, 2] < 0, -1.73 / np.minimum(rays[:, 2], -1e-9), 25.0))
    for center, size, turn in KITTI_BOXES.values():
        yaw = -turn - np.pi / 2
        into = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        start, way, half = into @ -np.array(center), rays @ into.T, np.array(size) / 2
        with np.errstate(divide="ignore"):
            ends = np.sort([(-half - start) / way, (half - start) / way], 0)
        enter, leave = ends[0].max(1), ends[1].min(1)
        hit = (enter > 0) & (enter + 0.1 < leave) & (enter < far)
        far = np.where(hit, enter + 0.05, far)
    return np.concatenate([rays * far[:, None], np.full((len(rays), 1), 0.25)], 1).astype(np.float32)


def kitti_object(root: Path) -> dict:
    folder = root / "training"
    row = lambda m: " ".join(repr(float(v)) for v in np.ravel(m))  # noqa: E731
    lines = ["DontCare -1 -1 -10 5 10 15.5 20 -1 -1 -1 -1000 -1000 -1000 -10"]
    for kind, (center, (length, width, height), turn) in KITTI_BOXES.items():
        x, y, z = np.array(R_RECT) @ (np.array(TR) @ [*center, 1])
        lines.append(
            f"{kind} 0.00 0 -1.5 1 2 3 4 {height} {width} {length} {row([x, y + height / 2, z])} {turn + 0.01!r}"
        )
    for number, label in (("000003", lines), ("000007", lines[:1])):
        for name, data in (("velodyne", kitti_scan().tobytes()), ("label_2", "\n".join(label).encode() + b"\n")):
            path = folder / name / f"{number}{'.bin' if name == 'velodyne' else '.txt'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        _png(folder / "image_2" / f"{number}.png")
        (folder / "calib").mkdir(exist_ok=True)
        calibration = {"P0": P2, "P2": P2, "R0_rect": R_RECT, "Tr_velo_to_cam": TR, "Tr_imu_to_velo": TR}
        text = "".join(f"{key}: {row(value)}\n" for key, value in calibration.items())
        (folder / "calib" / f"{number}.txt").write_text(text + "\n")
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "val.txt").write_text("000007\n000009\n")
    return {"root": str(root)}


AV2_START = 315966265_259836000  # nanoseconds


def av2_table(path: Path, **columns: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(pa.table(columns), path, compression="lz4")


def av2_rows(poses: list[np.ndarray]) -> dict[str, list[float]]:
    """Columns of poses: quaternion w first, place."""
    turns = [Rotation.from_matrix(p[:3, :3]).as_quat(scalar_first=True) for p in poses]
    rows = np.concatenate([np.array(turns), np.array([p[:3, 3] for p in poses])], 1)
    return dict(zip(("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m"), rows.T.tolist()))


def av2_ego(time: float) -> np.ndarray:
    """Ego -> city ``time`` seconds after the first sweep: 8 m/s ahead, turning left by 0.2 rad/s."""
    c, s = np.cos(0.4 + 0.2 * time), np.sin(0.4 + 0.2 * time)
    pose = np.eye(4)
    pose[:2, :2] = [[c, -s], [s, c]]
    pose[:3, 3] = 5000 + 40 * (s - np.sin(0.4)), 2400 - 40 * (c - np.cos(0.4)), 60
    return pose


AV2_CARS = {  # by track: category, place in the city at the first sweep, velocity there, heading, length, width, height
    "a-car": ("REGULAR_VEHICLE", (5010.0, 2409.0, 60.5), (5.0, 2.0, 0.0), 0.38, (4.5, 1.9, 1.6)),
    "a-bollard": ("BOLLARD", (5004.0, 2402.0, 60.2), (0.0, 0.0, 0.0), 1.0, (0.5, 0.5, 0.9)),
}


def av2_boxes(time: float) -> list[tuple[str, str, np.ndarray, tuple[float, float, float]]]:
    """Track, category, box -> ego and size at a time."""
    found = []
    for track, (category, place, velocity, heading, size) in AV2_CARS.items():
        box = np.eye(4)
        box[:2, :2] = [[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]]
        box[:3, 3] = np.array(place) + time * np.array(velocity)
        found.append((track, category, np.linalg.inv(av2_ego(time)) @ box, size))
    return found


def argoverse2(root: Path, logs: tuple[tuple[str, str], ...] = (("val", "log-a"), ("test", "log-b"))) -> dict:
    """Six sweeps 100 ms apart, a box that moves and one that does not, two ring cameras and a stereo camera."""
    rng = np.random.default_rng(5)
    ticks = [-0.3, *(round(-0.1 + 0.005 * i + 0.0007 * (i % 3), 6) for i in range(160)), *(0.1 * i for i in range(6))]
    ticks = sorted(set(ticks))
    looks = {"ring_front_center": (48, 64, 0.0), "ring_side_left": (64, 48, 1.7), "stereo_front_left": (64, 48, 0.0)}
    for split, log in logs:
        folder = root / "sensor" / split / log
        stamps = [AV2_START + round(t * 1e9) for t in ticks]
        av2_table(folder / "city_SE3_egovehicle.feather", timestamp_ns=stamps, **av2_rows(list(map(av2_ego, ticks))))
        annotations = []
        for i in range(6):
            stamp, boxes = AV2_START + round(0.1 * i * 1e9), av2_boxes(0.1 * i)
            clouds = [ground(rng, 0.33)[:, :3]]
            for track, category, box, size in boxes:
                inside = rng.uniform(-0.45, 0.45, (int(rng.integers(5, 40)), 3)) * size
                clouds.append(inside @ box[:3, :3].T + box[:3, 3])
                annotations.append((stamp, track, category, *size, len(inside), box))
            xyz = np.concatenate(clouds).astype(np.float16)
            lasers = rng.integers(0, 64, len(xyz)).astype(np.uint8)
            offsets = np.sort(rng.integers(0, 100_000_000, len(xyz))).astype(np.int32)
            columns = {axis: xyz[:, k] for k, axis in enumerate("xyz")}
            intensity = rng.integers(0, 256, len(xyz)).astype(np.uint8)
            path = folder / "sensors" / "lidar" / f"{stamp}.feather"
            av2_table(path, **columns, intensity=intensity, laser_number=lasers, offset_ns=offsets)
        if split != "test":
            names = ("timestamp_ns", "track_uuid", "category", "length_m", "width_m", "height_m", "num_interior_pts")
            columns = dict(zip(names, map(list, zip(*(row[:-1] for row in annotations)))))
            av2_table(folder / "annotations.feather", **columns, **av2_rows([row[-1] for row in annotations]))
        sensors = {name: np.eye(4) for name in (*looks, "up_lidar", "down_lidar")}
        for name, (_, _, yaw) in looks.items():
            c, s = np.cos(yaw), np.sin(yaw)
            sensors[name][:3, :3] = [[s, 0, c], [-c, 0, s], [0, -1, 0]]
            sensors[name][:3, 3] = 1.5, 0.1, 1.4
        sensors["up_lidar"][:3, 3], sensors["down_lidar"][:3, 3] = (1.35, 0, 1.64), (1.35, 0.01, 1.52)
        calibration = folder / "calibration"
        poses = av2_rows(list(sensors.values()))
        av2_table(calibration / "egovehicle_SE3_sensor.feather", sensor_name=list(sensors), **poses)
        widths, heights = (np.array([look[k] for look in looks.values()], np.uint16) for k in (0, 1))
        numbers = {"fx_px": 50.0, "fy_px": 51.0, "cx_px": 30.5, "cy_px": 24.5, "k1": -0.24, "k2": -0.2, "k3": 0.3}
        numbers = {name: [value] * len(looks) for name, value in numbers.items()}
        path = calibration / "intrinsics.feather"
        av2_table(path, sensor_name=list(looks), **numbers, height_px=heights, width_px=widths)
        for name, (width, _, _) in looks.items():
            image = IMAGE if width == 64 else np.ascontiguousarray(IMAGE.transpose(1, 0, 2))
            for shot in range(3 if name == "ring_side_left" else 11):
                path = folder / "sensors" / "cameras" / name / f"{AV2_START + 12_000_000 + 50_000_000 * shot}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(simplejpeg.encode_jpeg(image, 90))
        (folder / "map").mkdir()
        (folder / "map" / f"log_map_archive_{log}____PIT_city_47896.json").write_text("{}")
    return {"root": str(root)}


def sscbench(root: Path, points: bool = True) -> dict:
    drive = root / "data_2d_raw" / "2013_05_28_drive_0000_sync"
    row = lambda m: " ".join(repr(float(v)) for v in np.ravel(m))  # noqa: E731
    for scan in (0, 5):
        kitti_voxels(drive / "voxels", scan)
        _png(drive / "image_00" / "data_rect" / f"{scan:06d}.png")
    for scan in (0, 5) if points else ():
        turn = root / "data_3d_raw" / drive.name / "velodyne_points" / "data" / f"{scan:010d}.bin"
        turn.parent.mkdir(parents=True, exist_ok=True)
        turn.write_bytes(ground(np.random.default_rng(scan), 1.73, 0.76).astype(np.float32).tobytes())
    poses = [f"{s} {row(np.vstack([np.hstack([np.eye(3), [[0], [0], [s]]]), [0, 0, 0, 1]]))}" for s in (0, 5)]
    (drive / "cam0_to_world.txt").write_text("\n".join(poses) + "\n")
    (root / "calibration").mkdir()
    to_velo = np.linalg.inv(np.vstack([TR, [0, 0, 0, 1]]))[:3]
    (root / "calibration" / "calib_cam_to_velo.txt").write_text(row(to_velo) + "\n")
    (root / "calibration" / "perspective.txt").write_text(
        f"S_rect_00: 64 48\nR_rect_00: {row(R_RECT)}\nP_rect_00: {row(P2)}\n"
    )
    return {"root": str(root)}


def waymo_occ3d(root: Path) -> dict:
    for number, free in ((0, 23), (1, 15)):  # as released, and as documented
        label, seen = np.full(GRID, free, np.uint8), np.zeros(GRID, np.uint8)
        label[3, 5, 7], label[4, 5, 7] = 1, 14
        seen[:100] = 1
        folder = root / "training" / "000"
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"voxel_label": label, "origin_voxel_state": seen, "final_voxel_state": seen, "infov": seen > 0}
        arrays["infov"][:, 150:] = False
        np.savez_compressed(folder / f"{number:03d}_04.npz", **arrays, ego2global=np.eye(4))
    return {"root": str(root)}


def synthetic(root: Path) -> dict:
    return {"scenes": 2, "frames": 2, "image_size": (32, 88), "beams": 32, "grid": "tiny"}


def physicalai(root: Path, generation: str = "26.03") -> dict:
    pytest.importorskip("DracoPy")
    pytest.importorskip("av")
    shutil.copytree(pai_tree(generation), root, dirs_exist_ok=True)
    return {"root": str(root)}


@functools.cache
def pai_tree(generation: str) -> Path:
    """Two clips of six turns of the LiDAR, made once in a process."""
    from tests.sharding import pai_clip

    folder = Path(tempfile.mkdtemp(prefix="occstream-pai-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pai_clip.make(folder, seconds=0.6, generation=generation)
    return folder


def physicalai_25_10(root: Path) -> dict:
    return physicalai(root, "25.10")


LAYOUTS = {
    "physicalai": [physicalai, physicalai_25_10],
    "nuscenes": [nuscenes, *(nuscenes_with(name) for name in ("occ3d", "openoccupancy", "surroundocc"))],
    "occ3d": [occ3d],
    "openscene": [openscene],
    "semantickitti": [semantickitti],
    "sscbench": [sscbench],
    "kitti_object": [kitti_object],
    "argoverse2": [argoverse2],
    "waymo_occ3d": [waymo_occ3d],
    "synthetic": [synthetic],
}
