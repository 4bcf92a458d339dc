"""From a ``Frame`` and the key-frames before it to a sample of a temporal camera network: images of each with where it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.samples import FrameFiller
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.labels import grid_to_global
from occstream.sharding.poses import compose, inverse
from occstream.sharding.schema import Camera, Frame, Taxonomy
from occstream.sharding.stream import Field, Window


class KeyFrameFiller(FrameFiller):
    """Writes one key-frame and those before it as one sample: ``cameras`` of F V views and ``history``. A camera's images are
    augmented alike in all key-frames, and the scene is mirrored alike. Key-frames that the scene does not have are absent.

    Args:
        frames: F, with the key-frame itself.
        interval: key-frames from one to the next.
        choices: of ``FrameFiller``, but for its history.
    """

    def __init__(
        self,
        config: AugmentConfig,
        cameras: tuple[str, ...],
        grid: VoxelGrid,
        taxonomy: Taxonomy,
        *,
        frames: int,
        interval: int = 1,
        **choices: Any,
    ) -> None:
        super().__init__(config, cameras, grid, taxonomy, **choices)
        self.offsets = tuple(-interval * i for i in range(1, frames))

    @property
    def window(self) -> Window:
        """The key-frames before each one, of which only images and poses are read."""
        posed = ("lidar",) if self.grid.frame == "lidar" else ()  # the sweep says where such a grid is
        return Window(self._before, ("cameras", *posed))

    def _before(self, key: str, index: int, frames: int, epoch: int) -> Iterable[int]:
        return [offset for offset in self.offsets if index + offset >= 0]

    def fields(self) -> dict[str, Field]:
        """Arrays of one sample."""
        found, count = super().fields(), 1 + len(self.offsets)
        for name, field in found.items():
            if name.startswith("cameras."):
                found[name] = field._replace(shape=(count * field.shape[0], *field.shape[1:]))
        found["history.past_to_current"] = Field((count, 4, 4), "float32")
        found["history.exists"] = Field((count,), "bool")
        return found

    def __call__(self, frame: Frame, epoch: int, views: dict[str, np.ndarray]) -> list[tuple[str, Camera]]:
        """As ``FrameFiller``. Raises also ValueError: a key-frame has no pose."""
        returned = super().__call__(frame, epoch, views)
        mirror = np.append(views["scene_aug"].diagonal(), np.float32(1))
        now = inverse(grid_to_global(frame, self.grid)) if self.offsets else np.eye(4)
        for place, taken in enumerate(self._times(frame)):
            pose = np.eye(4) if taken is None or not place else compose(now, grid_to_global(taken, self.grid))
            views["history.past_to_current"][place] = pose.astype(np.float32) * mirror[:, None] * mirror
            views["history.exists"][place] = taken is not None
        return returned

    def _times(self, frame: Frame) -> list[Frame | None]:
        return [frame, *(frame.window.get(offset) for offset in self.offsets)]

    def _to_grid(self, frame: Frame, taken: Frame, camera: Camera) -> np.ndarray:
        """To the frame of the grid when the image was taken."""
        return super()._to_grid(taken, taken, camera)
