"""Data card: what a packed data set is like, in numbers that a scaling study should be read with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from occstream.sharding.contract import LACKING
from occstream.sharding.entries import SceneEntry
from occstream.sharding.manifest import Manifest
from occstream.sharding.schema import IGNORE, get_taxonomy, labeled
from occstream.sharding.stream import ShardReader


def black_shares(scenes: Iterable[SceneEntry]) -> dict[str, float]:
    """By camera that was rectified at packing: the largest share 0..1 of its image that is black, over all scenes."""
    found: dict[str, float] = {}
    for scene in scenes:
        for name, share in scene.attributes.get("rectified", {}).items():
            found[name] = max(found.get(name, 0.0), share)
    return found


def lacking_cameras(scenes: Iterable[SceneEntry]) -> dict[str, int]:
    """By camera of the rig: how many frames have no image of it, though others of their scene have."""
    total: Counter = Counter()
    for scene in scenes:
        total.update(scene.attributes.get(LACKING, {}))
    return dict(total)


def lacking_line(scenes: Iterable[SceneEntry]) -> str:
    """Says so for the terminal; "" if no camera is missing."""
    lacking = lacking_cameras(scenes)
    if not lacking:
        return ""
    listed = ", ".join(f"{name} in {count} frame{'s' if count > 1 else ''}" for name, count in lacking.items())
    return f"missing: {listed}; training replaces such frames with others of their scene, evaluation skips them"


def data_card(manifest: Manifest, other: str = "", frames: int = 100) -> dict[str, float]:
    """Statistics of evenly spaced frames.

    Args:
        manifest: of the data set; its own labels count as the truth.
        other: a sidecar group of binary labels to be compared with them, like ``labels-lidar``; "": none.
        frames: maximum number.

    Returns:
        Shares in percent: ``occupied_share`` of the voxels that the labels know; ``observed_share`` (those that they know)
        and ``in_view_share`` of all voxels; ``occluded_share``: occupied voxels that no camera sees; ``class/<name>`` of the
        occupied voxels; occupied is what is also known; meters:
        ``distance_p50``, ``distance_p90`` of occupied voxels from the ego; ``black_share`` of the
        image of a rectified camera that its lens did not see, the largest of all cameras; and of the other labels, where
        they claim to know: ``recall``, ``precision`` of occupied voxels, ``known_share`` of all voxels. ``scenes``, ``frames``
        of the set.

    Raises:
        ValueError: there are no labels.
    """
    reader = ShardReader(manifest, ("labels",))
    second = ShardReader(manifest.with_sidecar(other), (other,)) if other else None
    chosen = manifest.spread(frames)
    taxonomy, grid = get_taxonomy(manifest.taxonomy), manifest.grid
    if grid is None:
        raise ValueError(f"{manifest.url}: frames have no labels; pack the labels group")
    distance = np.linalg.norm(grid.centers()[..., :2], axis=-1).reshape(grid.shape)
    count = dict.fromkeys(("voxels", "occupied", "observed", "seen", "seen_occupied"), 0)
    classes, far = np.zeros(taxonomy.num_classes, np.int64), []
    hits = np.zeros(4, np.int64)  # known, truly occupied and known, called occupied, both
    for scene, index in chosen:
        labels = reader.frame(scene, index).labels
        if labels is None:
            raise ValueError(f"{manifest.url}: frames have no labels; pack the labels group")
        known = labels.known()
        occupied = labels.binary & known
        count["voxels"] += labels.binary.size
        count["occupied"] += int(occupied.sum())
        count["observed"] += int(known.sum())
        seen = labels.mask_camera if labels.mask_camera is not None else np.ones_like(labels.binary)
        count["seen"] += int(seen.sum())
        count["seen_occupied"] += int((seen & occupied).sum())
        far.append(distance[occupied])
        if labels.semantic is not None:
            found = labels.semantic[occupied]
            classes += np.bincount(found[found < taxonomy.free_id], minlength=taxonomy.num_classes)
        if second:
            theirs = labeled(second.frame(scene, index))
            sure = theirs.known() & known
            if labels.semantic is not None:
                sure = sure & (labels.semantic != IGNORE)
            truth, said = labels.binary & sure, theirs.binary & sure
            hits += [int(v.sum()) for v in (sure, truth, said, truth & said)]
    reader.close()
    far = np.concatenate(far) if far else np.zeros(0)
    share = lambda a, b: 100 * a / b if b else float("nan")  # noqa: E731
    card = {
        "scenes": float(len(manifest.scenes)),
        "frames": float(manifest.num_frames),
        "occupied_share": share(count["occupied"], count["observed"]),
        "observed_share": share(count["observed"], count["voxels"]),
        "in_view_share": share(count["seen"], count["voxels"]),
        "occluded_share": share(count["occupied"] - count["seen_occupied"], count["occupied"]),
        "distance_p50": float(np.quantile(far, 0.5)) if len(far) else float("nan"),
        "distance_p90": float(np.quantile(far, 0.9)) if len(far) else float("nan"),
    }
    if black := black_shares(manifest.scenes):
        card["black_share"] = 100 * max(black.values())
    if classes.sum():
        card |= {f"class/{name}": share(n, classes.sum()) for name, n in zip(taxonomy.classes, classes)}
    if second:
        second.close()
        card |= {
            "labels/recall": share(hits[3], hits[1]),
            "labels/precision": share(hits[3], hits[2]),
            "labels/known_share": share(hits[0], count["voxels"]),
        }
    return card


_WORDS = {
    "scenes": "scenes",
    "frames": "frames",
    "occupied_share": "occupied, % of the known voxels",
    "observed_share": "known (observed by LiDAR), % of all voxels",
    "in_view_share": "in view of a camera, % of all voxels",
    "occluded_share": "occupied but in no camera's view, % of the occupied",
    "distance_p50": "distance of occupied voxels from the ego, median, m",
    "distance_p90": "distance of occupied voxels from the ego, 90 %, m",
    "black_share": "rectified images: black, the largest share of a camera, %",
    "labels/recall": "labels for pre-training: recall of occupied voxels, %",
    "labels/precision": "labels for pre-training: precision of occupied voxels, %",
    "labels/known_share": "labels for pre-training: known, % of all voxels",
}


def rows(card: Mapping[str, float]) -> list[tuple[str, str]]:
    """Words and numbers of a card, classes last and by their share."""
    classes = sorted((k for k in card if k.startswith("class/")), key=lambda k: -card[k])
    said = [(words, card[key]) for key, words in _WORDS.items() if key in card]
    said += [(f"class {key.removeprefix('class/')}, % of the occupied", card[key]) for key in classes]
    return [(words, f"{value:,.0f}" if words in ("scenes", "frames") else f"{value:.2f}") for words, value in said]


def text(card: Mapping[str, float]) -> str:
    """For the terminal."""
    return "\n".join(f"  {words:<60} {value:>10}" for words, value in rows(card))
