"""Sparse 3-D convolution: submanifold, strided and inverse, with weights and parameter names of spconv.

A layer computes the active voxels alone. Which input voxel meets which output voxel under which kernel offset is its
*rulebook*; layers that name the same ``indice_key`` share one. The reference is plain PyTorch: voxels in ascending order of
(batch, z, y, x), neighbors found by binary search, one matrix product per kernel offset. For the backward pass it keeps its
input, its weight and the rulebook, nothing gathered. On every device each output row is written once per offset, so results
are the same in every run.

``spconv``, where installed, computes the same layers. Its limits are met here: it gets contiguous int32 indices, fp32 (it
knows no bf16), on the CPU its native algorithm, a bias is added outside of it, and what is empty goes to the reference.

Weights are (out, kz, ky, kx, in); shapes of grids are (Z, Y, X); indices are (batch, z, y, x).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occstream.models.autograd import Context
from occstream.models.layers import SyncBatchNorm, full_precision, row, world_size

Triple = tuple[int, int, int]
Setting = tuple[Triple, Triple, Triple]  # kernel, stride, padding
Pairs = tuple[tuple[Tensor, Tensor] | None, ...]  # see ``Rulebook``
Backend = Literal["torch", "spconv"]


# --- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseTensor:
    """Features of active voxels. Made by ``SparseTensor.of``, which checks and sorts.

    Attributes:
        features: (N, C).
        indices: (N, 4) int32, contiguous: batch, z, y, x; no voxel twice.
        shape: (Z, Y, X) of the grid.
        batch_size: number of grids.
        ascending: rows are in ascending order of their indices. True for all that the reference computes; the outputs of
            spconv's strided layers come in an order of its own.
        rulebooks: of the layers so far by their ``indice_key``, shared by all tensors of the same voxels. A strided layer
            gives its own to what follows it alone: what led to it may go through the layer again.
        native: what spconv keeps, likewise.
    """

    features: Tensor
    indices: Tensor
    shape: Triple
    batch_size: int
    ascending: bool = True
    rulebooks: dict[str, Rulebook] = field(default_factory=dict, repr=False)
    native: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, features: Tensor, indices: Tensor, shape: Triple, batch_size: int) -> SparseTensor:
        """Checks and sorts.

        Args:
            features: (N, C), any floating type.
            indices: (N, 4), any integer type: batch, z, y, x, in any order of rows.

        Raises:
            ValueError: a voxel outside of the grid or the batch, a voxel given twice, or shapes that do not fit.
        """
        if features.ndim != 2 or indices.shape != (len(features), 4) or indices.is_floating_point():
            raise ValueError(
                f"need features (N, C) and integer indices (N, 4) (batch, z, y, x), got {tuple(features.shape)} and "
                f"{tuple(indices.shape)} {indices.dtype}"
            )
        wide = indices.long()
        outside = ((wide < 0) | (wide >= row(wide, (batch_size, *shape)))).any(1)
        if outside.any():
            first = tuple(wide[outside.nonzero()[0, 0]].tolist())
            raise ValueError(
                f"voxel (batch, z, y, x) = {first} is outside of {batch_size} grids of {tuple(shape)} (z, y, x); "
                f"{int(outside.sum())} such voxels"
            )
        keys, order = torch.sort(order_keys(wide, shape))
        twice = keys[1:] == keys[:-1]
        if twice.any():
            first = tuple(wide[order[twice.nonzero()[0, 0]]].tolist())
            raise ValueError(
                f"voxel (batch, z, y, x) = {first} is given more than once; {int(twice.sum())} rows too many: "
                f"average the points of each voxel first (voxelize)"
            )
        return cls(features[order], wide[order].int().contiguous(), _triple(shape), batch_size)

    def replace(self, features: Tensor) -> SparseTensor:
        """The same voxels with other features (N, C')."""
        return dataclasses.replace(self, features=features)

    def dense(self) -> Tensor:
        """(batch_size, C, Z, Y, X), zero where no voxel is active."""
        out = self.features.new_zeros(self.batch_size * math.prod(self.shape), self.features.shape[1])
        out = out.index_copy(0, order_keys(self.indices.long(), self.shape), self.features)
        return out.view(self.batch_size, *self.shape, -1).permute(0, 4, 1, 2, 3).contiguous()


def order_keys(indices: Tensor, shape: Triple, margin: Triple = (0, 0, 0)) -> Tensor:
    """(N, 4) int64 -> (N,) int64 in the order of the indices. With a margin, all neighbors within it have keys of their own,
    also those outside of the grid."""
    b, z, y, x = indices.unbind(1)
    (depth, height, width), (mz, my, mx) = (n + 2 * m for n, m in zip(shape, margin)), margin
    return ((b * depth + z + mz) * height + y + my) * width + x + mx


def key_indices(keys: Tensor, shape: Triple) -> Tensor:
    """(N,) keys without margin -> (N, 4) int32."""
    found = [keys]
    for size in reversed(shape):
        found[:1] = [torch.div(found[0], size, rounding_mode="floor"), found[0] % size]
    return torch.stack(found, 1).int()


# --- rulebooks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rulebook:
    """Which rows meet in a convolution.

    Attributes:
        pairs: per kernel offset (z slowest) the rows of input and output, (n,) int32 each, every row at most once; None
            where each row meets itself (the center of a submanifold kernel). Empty if spconv has them.
        inputs, outputs: (N, 4) and (M, 4) int32 voxels of both sides; their shapes (Z, Y, X).
        setting: kernel, stride and padding; stride 0 for submanifold.
    """

    pairs: Pairs
    inputs: Tensor
    outputs: Tensor
    input_shape: Triple
    output_shape: Triple
    setting: Setting
    input_ascending: bool = True


def submanifold_pairs(indices: Tensor, shape: Triple, kernel: Triple) -> Pairs:
    """Pairs of each kernel offset for ascending (N, 4) indices and odd kernel sizes; see ``Rulebook``.

    Neighbors along x follow each other in the order of keys: one search finds a line of the kernel. Offsets beyond the
    center mirror those before it.
    """
    mz, my, mx = margin = _triple(k // 2 for k in kernel)
    keys = order_keys(indices.long(), shape, margin)
    line = shape[2] + 2 * mx
    plane = (shape[1] + 2 * my) * line
    ended = torch.cat([keys, keys.new_full((1,), -1)])  # a search may end behind the last key
    pairs: list[tuple[Tensor, Tensor] | None] = [None] * math.prod(kernel)
    center = len(pairs) // 2
    for dz, dy in itertools.product(range(mz + 1), range(-my, my + 1)):
        if (dz, dy) < (0, 0):
            continue
        first = 1 if (dz, dy) == (0, 0) else -mx
        wanted = keys + (dz * plane + dy * line + first)
        at = torch.searchsorted(keys, wanted)
        for dx in range(first, mx + 1):
            hit = ended[at] == wanted
            target = hit.nonzero().squeeze(1)
            source, target = at[target].int(), target.int()
            offset = (dz * kernel[1] + dy) * kernel[2] + dx
            pairs[center + offset], pairs[center - offset] = (source, target), (target, source)
            at, wanted = at + hit, wanted + 1
    return tuple(pairs)


def strided_shape(shape: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    """(Z, Y, X) after a strided convolution."""
    return _triple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding))


def strided_pairs(indices: Tensor, shape: Triple, setting: Setting) -> tuple[tuple[tuple[Tensor, Tensor], ...], Tensor]:
    """Pairs of each kernel offset and the output voxels (M, 4) int32, ascending: all that an input voxel reaches."""
    (kernel, stride, padding), out = setting, strided_shape(shape, *setting)
    wide = indices.long()
    reached = []  # per axis and offset: input rows that reach an output along it, and its coordinate there
    for axis in range(3):
        moved = wide[:, axis + 1, None] + padding[axis] - torch.arange(kernel[axis], device=wide.device)
        at = torch.div(moved, stride[axis], rounding_mode="floor")
        reached.append(((moved == at * stride[axis]) & (at >= 0) & (at < out[axis]), at))
    (in_z, z), (in_y, y), (in_x, x) = reached
    sources, keys = [], []
    for kz, ky in itertools.product(range(kernel[0]), range(kernel[1])):
        rows = (in_z[:, kz] & in_y[:, ky]).nonzero().squeeze(1)
        begin = ((wide[rows, 0] * out[0] + z[rows, kz]) * out[1] + y[rows, ky]) * out[2]
        for kx in range(kernel[2]):
            kept = in_x[rows, kx].nonzero().squeeze(1)
            sources.append(rows[kept])
            keys.append(begin[kept] + x[sources[-1], kx])
    found, targets = torch.unique(torch.cat(keys), return_inverse=True)
    pairs = zip(sources, targets.int().split([len(s) for s in sources]))
    return tuple((s.int(), t) for s, t in pairs), key_indices(found, out)


def _blocks(pairs: Pairs, rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Kernel offset and rows of input and output, at most ``rows`` at a time."""
    for offset, pair in enumerate(pairs):
        for source, target in zip(*(side.split(rows) for side in pair)) if pair is not None and len(pair[0]) else ():
            yield offset, source, target


class _Scratch:
    """Memory for what is gathered: fresh memory, and memory that leaves the CPU's cache, costs more than the products."""

    def __init__(self, like: Tensor, pairs: Pairs, *widths: int) -> None:
        longest = max((len(pair[0]) for pair in pairs if pair is not None), default=0)
        self.rows = max(1, longest if like.is_cuda else min(longest, 2048))
        self.parts = [like.new_empty(self.rows * width) for width in widths]

    def take(self, part: int, table: Tensor, rows: Tensor) -> Tensor:
        """``table[rows]``."""
        return torch.index_select(table, 0, rows, out=self._of(part, len(rows), table.shape[1]))

    def product(self, part: int, a: Tensor, b: Tensor) -> Tensor:
        """(n, m) @ (m, k) -> (n, k)."""
        return torch.mm(a, b, out=self._of(part, len(a), b.shape[1]))

    def _of(self, part: int, rows: int, width: int) -> Tensor:
        return self.parts[part][: rows * width].view(rows, width)


if TYPE_CHECKING:

    class _Context(Context):
        pairs: Pairs


class _Convolve(torch.autograd.Function):
    """Features (N, C), weight (out, kz, ky, kx, in) -> (rows, out) by the pairs of a rulebook, in the dtype of the features."""

    @staticmethod
    def forward(ctx: _Context, features: Tensor, weight: Tensor, pairs: Pairs, rows: int) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(features, weight)
        ctx.pairs = pairs
        maps = weight.flatten(1, 3).permute(1, 2, 0).contiguous()  # (K, in, out)
        out = features @ maps[pairs.index(None)] if None in pairs else features.new_zeros(rows, weight.shape[0])
        scratch = _Scratch(features, pairs, *maps.shape[1:])
        for offset, source, target in _blocks(pairs, scratch.rows):
            out.index_add_(0, target, scratch.product(1, scratch.take(0, features, source), maps[offset]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (features, weight), pairs = ctx.saved_tensors, ctx.pairs
        grad = grad.contiguous()
        maps = weight.flatten(1, 3).transpose(0, 1).contiguous()  # (K, out, in)
        to_weight = torch.zeros_like(maps) if ctx.needs_input_grad[1] else None
        to_features = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
        if None in pairs:
            center = pairs.index(None)
            if to_weight is not None:
                torch.mm(grad.t(), features, out=to_weight[center])
            if to_features is not None:
                torch.mm(grad, maps[center], out=to_features)
        outputs, inputs = maps.shape[1:]
        scratch = _Scratch(features, pairs, outputs, inputs, inputs)
        for offset, source, target in _blocks(pairs, scratch.rows):
            come = scratch.take(0, grad, target)
            if to_weight is not None:
                to_weight[offset].addmm_(come.t(), scratch.take(1, features, source))
            if to_features is not None:
                to_features.index_add_(0, source, scratch.product(2, come, maps[offset]))
        if to_weight is not None:
            to_weight = to_weight.transpose(0, 1).reshape(weight.shape)
        return to_features, to_weight, None, None


# --- layers ------------------------------------------------------------------------------------------------------------


def choose_backend(wanted: str) -> Backend:
    """``auto``, ``torch`` or ``spconv`` -> what layers are built with. Auto is spconv where it can be imported and there is a
    GPU (on a CPU the reference needs no import of seconds and is about as fast), else the reference.

    Raises:
        ValueError: another name, or spconv is wanted and cannot be imported.
    """
    if wanted not in ("auto", "torch", "spconv"):
        raise ValueError(f"sparse is {wanted!r}, must be auto, torch or spconv")
    if wanted == "torch" or (wanted == "auto" and not torch.cuda.is_available()):
        return "torch"
    if importlib.util.find_spec("spconv") is None:
        if wanted == "auto":
            return "torch"
        raise ValueError("sparse is 'spconv', which is not installed: pip install -e '.[gpu]', or choose torch")
    try:
        _spconv()
    except Exception as error:  # a build for other CUDA libraries fails in ways of its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if wanted == "spconv":
            raise ValueError(f"sparse is 'spconv', which cannot be imported ({line}): choose torch") from None
        warnings.warn(f"spconv is installed but cannot be imported ({line}): sparse convolution in torch", stacklevel=2)
        return "torch"
    return "spconv"


@functools.cache
def _spconv() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch as library  # pyright: ignore[reportMissingImports]  (an extra)
    return library


@functools.cache
def _spconv_layer(kind: str, inputs: int, outputs: int, setting: Setting, *, key: str | None, cuda: bool) -> nn.Module:
    """A layer of spconv to which the weight is lent at each call; what it drew for its own leaves random numbers as they were."""
    library = _spconv()
    kernel, stride, padding = map(list, setting)
    geometry = {} if kind == "SparseInverseConv3d" else {"stride": stride, "padding": padding}
    with torch.random.fork_rng(devices=[]):
        layer = getattr(library, kind)(
            inputs,
            outputs,
            kernel,
            bias=False,
            indice_key=key,
            algo=None if cuda else library.ConvAlgo.Native,
            **geometry,
        )
    layer.conv1x1 = False  # its way for kernels of one reads the weight as (in, out)
    return layer


def _triple(value: int | Iterable[int]) -> Triple:
    z, y, x = (value,) * 3 if isinstance(value, int) else value
    return z, y, x


class SparseModule(nn.Module):
    """Takes and gives a ``SparseTensor``, which ``SparseSequential`` must know."""


class _SparseConv(SparseModule):
    """What the three kinds share. Takes and gives a ``SparseTensor``; computes in fp32 (fp64 for fp64), autocast or not.

    Args:
        inputs, outputs: channels.
        kernel, stride, padding: one number or (z, y, x).
        indice_key: layers of the same name use one rulebook; an inverse layer names its strided one.
        backend: from ``choose_backend``.
    """

    kind = ""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Triple = 3,
        stride: int | Triple = 1,
        *,
        padding: int | Triple = 0,
        bias: bool = False,
        indice_key: str | None = None,
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.indice_key, self.backend = inputs, outputs, indice_key, backend
        self.kernel, self.stride, self.padding = _triple(kernel), _triple(stride), _triple(padding)
        self.weight = nn.Parameter(torch.empty(outputs, *self.kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        bound = 1 / math.sqrt(inputs * math.prod(self.kernel))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def setting(self) -> Setting:
        return self.kernel, self.stride, self.padding

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, {self.setting}, indice_key={self.indice_key!r}, backend={self.backend}"

    def forward(self, x: SparseTensor) -> SparseTensor:
        if x.features.shape[1] != self.inputs:
            raise ValueError(f"{self.kind} of {self.inputs} channels got {x.features.shape[1]}")
        with full_precision(x.features.device):
            features = x.features if x.features.dtype == torch.float64 else x.features.float()
            x, weight = x.replace(features), self.weight.to(features.dtype)
            # The native rulebooks of earlier layers are needed for the next: a tensor stays with one back end.
            if self.backend == "spconv" and len(features):
                out = self._by_spconv(x, weight)
            else:
                out = self._by_torch(x, weight)
            return out if self.bias is None else out.replace(out.features + self.bias.to(features.dtype))

    def _by_torch(self, x: SparseTensor, weight: Tensor) -> SparseTensor:
        book = self._book(x)
        if not book.pairs and len(x.features):
            raise ValueError(f"rulebook {self.indice_key!r} is spconv's: build all layers with one back end")
        out = _Convolve.apply(x.features, weight, book.pairs, len(book.outputs))
        return self._result(x, out, book)

    def _by_spconv(self, x: SparseTensor, weight: Tensor) -> SparseTensor:
        self._before_spconv(x)
        library, cuda = _spconv(), x.features.is_cuda
        layer = _spconv_layer(self.kind, self.inputs, self.outputs, self.setting, key=self.indice_key, cuda=cuda)
        layer.train(self.training)
        layer._parameters["weight"] = weight  # pyright: ignore[reportArgumentType] (lent, so not a parameter)
        native = library.SparseConvTensor(x.features.contiguous(), x.indices, list(x.shape), x.batch_size)
        native.indice_dict = x.native
        try:
            out = layer(native)
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"spconv failed in {self.kind} on {len(x.features)} voxels of {x.shape} (z, y, x): {line}; "
                f"torch in its place needs no spconv"
            ) from None
        finally:
            layer._parameters["weight"] = None
        return self._native_result(x, out)

    def _named(self, x: SparseTensor) -> Rulebook | None:
        return x.rulebooks.get(self.indice_key) if self.indice_key is not None else None

    def _must_ascend(self, x: SparseTensor) -> None:
        if not x.ascending and len(x.features):
            raise ValueError("the rows are in spconv's order: build all layers with one back end")

    def _book(self, x: SparseTensor) -> Rulebook:
        raise NotImplementedError

    def _result(self, x: SparseTensor, features: Tensor, book: Rulebook) -> SparseTensor:
        return dataclasses.replace(x, features=features, indices=book.outputs, shape=book.output_shape)

    def _before_spconv(self, x: SparseTensor) -> None:
        """Says in our words what spconv would refuse."""
        raise NotImplementedError

    def _native_result(self, x: SparseTensor, out: Any) -> SparseTensor:
        raise NotImplementedError


_USED = "indice_key {!r} is used by layers of different kernels or voxels; give each stage its own"


class SubMConv3d(_SparseConv):
    """Submanifold convolution: outputs are the input's voxels. Odd kernel; no stride; the padding is half the kernel."""

    kind = "SubMConv3d"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Triple = 3,
        *,
        bias: bool = False,
        indice_key: str | None = None,
        backend: Backend = "torch",
    ) -> None:
        kernel = _triple(kernel)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel of a submanifold convolution is {kernel}, must be odd")
        options = {"padding": _triple(k // 2 for k in kernel), "bias": bias}
        super().__init__(inputs, outputs, kernel, **options, indice_key=indice_key, backend=backend)

    def _kept(self, x: SparseTensor) -> Rulebook | None:
        """The rulebook of this name, if it is one of these voxels and this kernel."""
        book = self._named(x)
        if book is not None and (book.setting != self._own or book.inputs is not x.indices):
            raise ValueError(_USED.format(self.indice_key))
        return book

    def _keep(self, x: SparseTensor, pairs: tuple) -> Rulebook:
        book = Rulebook(pairs, x.indices, x.indices, x.shape, x.shape, self._own)
        if self.indice_key is not None:
            x.rulebooks[self.indice_key] = book
        return book

    @property
    def _own(self) -> Setting:
        return self.kernel, (0, 0, 0), self.padding

    def _book(self, x: SparseTensor) -> Rulebook:
        book = self._kept(x)
        if book is None:
            self._must_ascend(x)
            book = self._keep(x, submanifold_pairs(x.indices, x.shape, self.kernel))
        return book

    def _before_spconv(self, x: SparseTensor) -> None:
        self._kept(x)

    def _native_result(self, x: SparseTensor, out: Any) -> SparseTensor:
        x.native.update(out.indice_dict)
        if self._kept(x) is None:
            self._keep(x, ())
        return x.replace(out.features)


class SparseConv3d(_SparseConv):
    """Strided convolution: outputs are all voxels that an input voxel reaches."""

    kind = "SparseConv3d"

    def _must_be_new(self, x: SparseTensor) -> None:
        if self._named(x) is not None:
            raise ValueError(_USED.format(self.indice_key))

    def _book(self, x: SparseTensor) -> Rulebook:
        self._must_be_new(x)
        self._must_ascend(x)
        pairs, outputs = strided_pairs(x.indices, x.shape, self.setting)
        return Rulebook(pairs, x.indices, outputs, x.shape, strided_shape(x.shape, *self.setting), self.setting)

    def _result(self, x: SparseTensor, features: Tensor, book: Rulebook) -> SparseTensor:
        books = x.rulebooks if self.indice_key is None else {**x.rulebooks, self.indice_key: book}
        return dataclasses.replace(super()._result(x, features, book), rulebooks=books)

    def _before_spconv(self, x: SparseTensor) -> None:
        self._must_be_new(x)

    def _native_result(self, x: SparseTensor, out: Any) -> SparseTensor:
        book = Rulebook((), x.indices, out.indices, x.shape, tuple(out.spatial_shape), self.setting, x.ascending)
        return dataclasses.replace(self._result(x, out.features, book), ascending=False, native=out.indice_dict)


class SparseInverseConv3d(_SparseConv):
    """Back to the voxels from which the strided convolution of the same ``indice_key`` came, by its pairs."""

    kind = "SparseInverseConv3d"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | Triple,
        indice_key: str,
        *,
        bias: bool = False,
        backend: Backend = "torch",
    ) -> None:
        super().__init__(inputs, outputs, kernel, bias=bias, indice_key=indice_key, backend=backend)

    def _strided(self, x: SparseTensor) -> Rulebook:
        book = self._named(x)
        if book is None or book.setting[0] != self.kernel or book.outputs is not x.indices:
            raise ValueError(
                f"inverse convolution {self.indice_key!r} of kernel {self.kernel} needs the output voxels of a strided "
                f"convolution of the same indice_key and kernel"
            )
        return book

    def _book(self, x: SparseTensor) -> Rulebook:
        book = self._strided(x)
        swapped = tuple(None if pair is None else (pair[1], pair[0]) for pair in book.pairs)
        return Rulebook(swapped, book.outputs, book.inputs, book.output_shape, book.input_shape, book.setting)

    def _before_spconv(self, x: SparseTensor) -> None:
        self._strided(x)

    def _native_result(self, x: SparseTensor, out: Any) -> SparseTensor:
        book = self._strided(x)
        voxels = {"indices": book.inputs, "shape": book.input_shape, "ascending": book.input_ascending}
        return dataclasses.replace(x, features=out.features, **voxels)


class SparseBatchNorm(SyncBatchNorm):
    """Batch norm of (N, C) rows over the voxels of all ranks.

    Fewer than two voxels in all have no statistics: the running ones normalize them. A rank without voxels joins the others
    with one of zeros, so that none waits for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C); in training by the joint rows of all ranks (collective)."""
        if not self.training or len(x) > 1:
            return super().forward(x)
        if world_size() == 1:
            mean, var = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x if len(x) else x.new_zeros(1, x.shape[1]))[: len(x)]


class SparseSequential(nn.Sequential, SparseModule):
    """Layers in order: sparse ones take the tensor, all others its features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features (N, C) at the voxels of ``x`` -> what the last layer makes of them."""
        for layer in self:
            x = layer(x) if isinstance(layer, SparseModule) else x.replace(layer(x.features))
        return x
