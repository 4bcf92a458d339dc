"""JPEGs decoded and warped where the network runs, by nvImageCodec: on the GPU, or without one by its CPU code.

The same pixels as ``augment.warp_jpeg`` but for rounding: whole images come to the device, are averaged over blocks where that
lets the decoder shrink them, and warped.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from occstream.pretrain.augment import shrink_factor
from occstream.sharding.schema import Camera
from occstream.sharding.stream import StreamBatch

TOGETHER = 12  # images warped at a time: bounds memory (12 of 900 x 1600 in fp32 are 207 MB)


class DeviceImages:
    """Completes batches of a stream whose filler does not decode: adds ``images`` (n, V, 3, H, W) uint8 on a device.

    Args:
        image_size: (H, W) of the network's input.
        device: CUDA or CPU.
        threads: of the decoder's own, for what it does on the CPU.

    Raises:
        ImportError: nvImageCodec is not installed.
    """

    def __init__(self, image_size: tuple[int, int], device: torch.device, threads: int) -> None:
        nvimgcodec: Any  # compiled: it has no types
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise ImportError(
                f"train.decoder=nvimagecodec: {error}; pip install 'occstream[jpeg]', or set train.decoder=cpu"
            ) from None
        self.image_size, self.device, self._codec = image_size, device, nvimgcodec
        if device.type == "cuda":
            place, backends = device.index or 0, None
        else:
            backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
            place = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        # libjpeg's way of spreading color over pixels, so that both decoders agree.
        self._decoder = nvimgcodec.Decoder(place, max(1, threads), backends, options=":fancy_upsampling=1")
        # Beside the network's kernels; whoever takes the images later need not wait for them.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._params = nvimgcodec.DecodeParams(
            apply_exif_orientation=False, sample_format=nvimgcodec.SampleFormat.P_RGB
        )

    def __call__(self, batch: StreamBatch) -> None:
        """Adds the images, complete; its other arrays stay as they are. For one thread at a time.

        Raises:
            ValueError: a JPEG cannot be decoded, or has another size than its metadata says.
        """
        if self._stream is None:
            return self._add(batch)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._add(batch)
        self._stream.synchronize()

    def _add(self, batch: StreamBatch) -> None:
        views = batch.arrays["cameras.intrinsics"].shape[1]
        affines = np.concatenate(
            [batch.arrays["cameras.post_rot"][..., :2, :2], batch.arrays["cameras.post_tran"][..., :2, None]], -1
        )
        out = torch.empty(len(batch.returned), views, 3, *self.image_size, dtype=torch.uint8, device=self.device)
        alike = defaultdict(list)  # images of one size, shrunk alike, are warped together
        for place, image in zip(np.ndindex(affines.shape[:2]), self._decode(batch.returned)):
            alike[tuple(image.shape), shrink_factor(affines[place])].append((place, image))
        for (_, factor), found in alike.items():
            for start in range(0, len(found), TOGETHER):
                part = found[start : start + TOGETHER]
                chosen = tuple(np.transpose([place for place, _ in part]))
                pixels = torch.stack([image for _, image in part])
                out[chosen] = warp(pixels, affines[chosen], factor, self.image_size)
        batch.made["cameras.images"] = out

    def _decode(self, samples: list[list[tuple[str, Camera]]]) -> list[Tensor]:
        """(3, h, w) uint8 of every image of every sample."""
        cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if cuda else 0
        cameras = [named for sample in samples for named in sample]
        sources = [self._codec.CodeStream(camera.jpeg) for _, camera in cameras]
        decoded = self._decoder.decode(sources, params=self._params, cuda_stream=stream) if sources else []
        images = []
        for (name, camera), image in zip(cameras, decoded, strict=True):
            if image is None:
                raise ValueError(
                    f"{name}: nvImageCodec cannot decode its JPEG; pack its scene again, or train.decoder=cpu"
                )
            if image.shape != (3, camera.height, camera.width):
                raise ValueError(
                    f"{name}: image has {image.shape[2]}x{image.shape[1]} pixels, its metadata says "
                    f"{camera.width}x{camera.height}"
                )
            # Without a CUDA driver its images cannot be handed on by DLPack.
            images.append(torch.from_dlpack(image.cuda()) if cuda else torch.from_numpy(np.array(image)))
        return images


def warp(images: Tensor, affines: np.ndarray, factor: int, size: tuple[int, int]) -> Tensor:
    """Images through affine maps, bilinear, black outside; means of ``factor`` x ``factor`` pixels first.

    Args:
        images: (n, 3, h, w) uint8.
        affines: (n, 2, 3) from pixels of theirs to pixels of the result.
        size: (H, W) of the result.

    Returns:
        (n, 3, H, W) uint8 on the same device.
    """
    pixels = images.float()
    if factor > 1:
        pixels = F.avg_pool2d(pixels, factor, ceil_mode=True, count_include_pad=False)
    whole = np.tile(np.eye(3), (len(images), 1, 1))
    whole[:, :2] = affines
    whole = whole @ [[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]]
    # affine_grid counts from -1 to 1 between the centers of the outermost pixels.
    back = _to_unit(*pixels.shape[:1:-1]) @ np.linalg.inv(whole) @ np.linalg.inv(_to_unit(size[1], size[0]))
    theta = torch.from_numpy(back[:, :2]).to(pixels)
    grid = F.affine_grid(theta, [len(images), 3, *size], align_corners=True)
    return F.grid_sample(pixels, grid, align_corners=True).round_().to(torch.uint8)


def _to_unit(width: int, height: int) -> np.ndarray:
    return np.array([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]])
