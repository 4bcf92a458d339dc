"""Learning rate by samples."""

from __future__ import annotations

import math

from occstream.pretrain.config import TrainConfig


def learning_rate(samples: int, total: int, config: TrainConfig) -> float:
    """Learning rate of the step that begins after ``samples`` frames: a function of samples, not of calls,
    so that a resume at another world size continues the same curve.

    Args:
        samples: S frames already trained on.
        total: S frames of the whole run.
    """
    warm = config.warmup * config.batch
    if samples < warm:
        return config.lr * (0.001 + 0.999 * samples / warm)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (samples - warm) / max(1, total - warm))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
