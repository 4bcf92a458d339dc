"""Writes a small data set in the nuScenes layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import simplejpeg
from scipy.spatial.transform import Rotation

SIZE = (64, 48)  # width, height


def fixed_tables() -> dict[str, list[dict]]:
    """Tables that do not depend on the number of scenes."""
    level = [1.0, 0.0, 0.0, 0.0]
    sensors = [{"token": "cam", "channel": "CAM_FRONT"}, {"token": "top", "channel": "LIDAR_TOP"}]
    looking_ahead = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]).as_quat()[[3, 0, 1, 2]].tolist()
    intrinsics = [[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]]
    calibrated = [
        {
            "token": "ccam",
            "sensor_token": "cam",
            "translation": [1, 0, 1.5],
            "rotation": looking_ahead,
            "camera_intrinsic": intrinsics,
        },
        {"token": "ctop", "sensor_token": "top", "translation": [0, 0, 1.8], "rotation": level, "camera_intrinsic": []},
    ]
    categories = [{"token": "kcar", "name": "vehicle.car"}, {"token": "krack", "name": "static_object.bicycle_rack"}]
    log = [{"token": "log", "location": "toy-town"}]
    return {"sensor": sensors, "calibrated_sensor": calibrated, "category": categories, "log": log}


def write(root: Path, scenes: int = 1, samples: int = 2) -> None:
    """Scenes with one camera, a LiDAR with a sweep between key-frames, and one car that drives ahead at 4 m/s."""
    rng = np.random.default_rng(0)
    tables = root / "v1.0-toy"
    tables.mkdir(parents=True)
    for folder in ("samples/CAM_FRONT", "samples/LIDAR_TOP", "sweeps/LIDAR_TOP"):
        (root / folder).mkdir(parents=True)
    t: dict[str, list[dict]] = {
        name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "sample_annotation", "instance")
    }
    t |= fixed_tables()
    level = [1.0, 0.0, 0.0, 0.0]

    def sensor_data(name, sample, calibration, time, key, suffix, folder, x):
        t["ego_pose"].append({"token": f"e{name}", "timestamp": time, "rotation": level, "translation": [x, 0, 0]})
        t["sample_data"].append(
            {
                "token": name,
                "sample_token": sample,
                "ego_pose_token": f"e{name}",
                "calibrated_sensor_token": calibration,
                "timestamp": time,
                "is_key_frame": key,
                "width": SIZE[0],
                "height": SIZE[1],
                "filename": f"{folder}/{name}{suffix}",
                "prev": "",
                "next": "",
            }
        )
        return root / folder / f"{name}{suffix}"

    for k in range(scenes):
        tokens = [f"s{k}-{i}" for i in range(samples)]
        t["scene"].append(
            {"token": f"scene{k}", "name": f"scene-{k:04d}", "log_token": "log", "first_sample_token": tokens[0]}
        )
        t["instance"].append({"token": f"i{k}", "category_token": "kcar"})
        previous = ""
        for i, token in enumerate(tokens):
            time = 1_000_000 * k * 100 + 500_000 * i
            following = tokens[i + 1] if i + 1 < samples else ""
            t["sample"].append({"token": token, "timestamp": time, "scene_token": f"scene{k}", "next": following})
            image = rng.integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
            path = sensor_data(
                f"c{token}", token, "ccam", time - 20_000, True, ".jpg", "samples/CAM_FRONT", 2.0 * i - 0.1
            )
            path.write_bytes(simplejpeg.encode_jpeg(image))
            for key in (False, True) if i else (True,):
                name = f"l{token}{'' if key else 'x'}"
                shift = 0 if key else 250_000
                folder = "samples/LIDAR_TOP" if key else "sweeps/LIDAR_TOP"
                path = sensor_data(name, token, "ctop", time - shift, key, ".bin", folder, 2.0 * i - shift / 250_000)
                points = np.zeros((200, 5), np.float32)
                points[:, 0], points[:, 1], points[:, 2] = rng.uniform(3, 30, 200), rng.uniform(-9, 9, 200), -1.79
                path.write_bytes(points.tobytes())
                t["sample_data"][-1]["prev"], previous = previous, name
            t["sample_annotation"].append(
                {
                    "token": f"a{token}",
                    "sample_token": token,
                    "instance_token": f"i{k}",
                    "translation": [10 + 2.0 * i, 0, 0.8],
                    "size": [1.8, 4.2, 1.6],
                    "rotation": level,
                    "prev": f"as{k}-{i - 1}" if i else "",
                    "next": f"a{following}" if following else "",
                }
            )
    for name, rows in t.items():
        (tables / f"{name}.json").write_text(json.dumps(rows))
