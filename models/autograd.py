"""Types of what torch hands to autograd functions: for annotations, nothing is computed here."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """First argument of ``forward`` and ``backward``, to which torch passes all by position (hence ``noqa: PLR0917``). Its
    own stubs know one saved tensor and one input alone.

    Attributes:
        saved_tensors: what ``save_for_backward`` got.
        needs_input_grad: for each argument of ``forward``.
        counts: what a function keeps that is no tensor.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    counts: np.ndarray
