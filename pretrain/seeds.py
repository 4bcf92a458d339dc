"""Global random generators as functions of integers."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(*keys: int) -> None:
    """Makes torch's, numpy's and Python's global generators a function of ``keys`` (weights, dropout)."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in keys]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)
    np.random.seed(int(state) & 0xFFFFFFFF)  # noqa: NPY002  third-party layers may draw from it
    random.seed(int(state))
