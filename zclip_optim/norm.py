"""From the gradients in this process to one norm."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors

# How much is measured in one go. torch accumulates a norm in float32 with a few running sums, whose last digits drift:
# by 1e-3 over 25 M equal elements. Short norms, and the norm of their norms, do not; but calls are what small gradients
# cost. So tiny ones are copied into one tensor, a batch at a time; small ones, and few, are measured by one call
# without a copy; larger ones by a dot product each, or by rows, as fast as they can be read. Right for clipping are
# 1e-6 on gradients as they are and 1e-4 on the worst that can be contrived.
# Measured, relative errors of the norm of one tensor: random elements, their fifth powers, equal ones, contrived ones.
#   norm, 8,192    1e-7, 4e-7, 7e-6, 3e-5     gradients have structure: 16,384 of a small transformer's were 2e-6 off
#   dot, 16,384    1e-7, 3e-7, 2e-6, 2e-5     by MKL; not measured with another BLAS
#   rows           6e-8, 2e-7, 1e-6, 6e-6     of 16 bit 3e-8, 3e-7, 0, 4e-6
# constant             unit                 a larger one is
ROW = 2**10  #         elements of a row    no faster, less exact
HALF_ROW = 2**11  #    the same, of 16 bit  faster, less exact
DOT = 2**14  #         elements, a tensor   faster, less exact
TINY = 2**10  #        elements, a tensor   more copies, fewer calls
SMALL = 2**13  #       elements, a tensor   faster, less exact
FEW = 2**6  #          tensors              faster up to some hundred: a call for all, no copy
BATCH = 2**18  #       elements, a batch    more memory, fewer calls
CHUNK = 2**20  #       elements, a copy     more memory, fewer calls
LARGE = 2**20  #       elements, a tensor   fewer calls, less exact
SMALLEST = 1e-10  #    a norm               more norms taken again, because elements may have vanished in float32

HALVES = {torch.float16, torch.bfloat16}
ORDINARY = {torch.float32, torch.float64, *HALVES}
COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def gradient_norm(gradients: list[Tensor]) -> float:
    """L2 norm over all elements of dense, sparse, nested, real and complex tensors of any floating dtype and device.

    Accumulated in float32 or wider, and right also where the squares of the elements overflow or vanish in float32: to
    1e-6 on gradients as they are, to 1e-4 on the worst that was contrived. Reads every gradient once. For gradients on
    the CPU; one on an accelerator is read back.
    """
    norm = math.sqrt(_squares(gradients))
    return norm if SMALLEST < norm < math.inf else _rescaled_norm(gradients)


def device_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm as a tensor without dimensions on `device`, for gradients on accelerators.

    Nothing is read back (but by `coalesce` of sparse gradients). Accumulated in float64, where no square of a float32
    overflows or vanishes, but those of float64 gradients may; a device without float64 accumulates in float32.
    """
    dtype = wide_dtype(device)
    batches = by_device_and_dtype(map(real_values, gradients))
    norms = [norm.to(device) for batch in batches for norm in torch._foreach_norm(batch, 2, dtype)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=dtype, device=device)


@functools.cache
def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device calculates in; asked once, since MPS and Intel Arc lack float64."""
    try:
        torch.ones((), dtype=torch.float64, device=device).square_()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return torch.float32
    return torch.float64


def by_device_and_dtype(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """What the foreach functions take in one kernel."""
    batches: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        batches[tensor.device, tensor.dtype].append(tensor)
    return batches.values()


def is_ordinary(gradient: Tensor) -> bool:
    """Whether it is dense and of a real dtype that torch calculates with."""
    return gradient.dtype in ORDINARY and gradient.layout is torch.strided and not gradient.is_nested


def real_values(gradient: Tensor) -> Tensor:
    """A dense real tensor of the same norm: what a sparse or nested one stores, both parts of complex ones."""
    if is_ordinary(gradient):
        return gradient
    if gradient.is_sparse:
        values = gradient.coalesce().values()
    elif gradient.layout is torch.jagged and not gradient.is_contiguous():  # with holes in its buffer
        values = torch.cat([part.reshape(-1) for part in gradient.detach().unbind()])
    else:
        values = gradient.to_dense() if gradient.is_mkldnn else stored_values(gradient)
    if values.is_conj():
        values = values.conj()  # of the same norm, without a copy
    if values.is_complex():
        return torch.view_as_real(values)
    return values.float() if values.dtype.itemsize == 1 else values  # float8


def stored_values(gradient: Tensor) -> Tensor:
    """What a nested tensor, or a sparse one other than COO, stores, in its own memory; any other tensor as it is."""
    if gradient.is_nested or gradient.layout in COMPRESSED:
        values: Tensor = gradient.values().detach()
        return values
    return gradient


def _squares(gradients: list[Tensor]) -> float:
    """The sum of the squares of all elements."""
    if len(gradients) > FEW:
        return _squares_of_all_kinds(gradients, TINY)
    for g in gradients:
        if g.dtype is not torch.float32 or g.numel() > SMALL:
            return _squares_of_all_kinds(gradients, 0)
    return _squares_of_short(gradients)


def _squares_of_all_kinds(gradients: list[Tensor], tiny: int) -> float:
    total = 0.0
    short: list[Tensor] = []
    halves: list[Tensor] = []
    batch: list[Tensor] = []
    room = BATCH
    for g in gradients:
        size = g.numel()
        if size > SMALL:
            rows = _in_rows(g, size)
            if rows is None:
                short += _norms_of_any(g)
            elif rows.dtype is not torch.float32:
                halves.append(rows)
            elif size <= DOT:
                total += rows.dot(rows).item()
            else:
                norms = torch.linalg.vector_norm(rows, 2, 1)
                short.append(norms if size <= LARGE else torch.linalg.vector_norm(norms, dtype=torch.float64))
        elif size > tiny and g.dtype is torch.float32:
            short.append(g)
        else:
            if size > room:
                short += _norms_of_batch(batch)
                batch, room = [], BATCH
            batch.append(g)
            room -= size
    if batch:
        short += _norms_of_batch(batch)
    if halves:
        total += _squares_of_halves(halves)
    return total + _squares_of_short(short)


def _squares_of_short(tensors: list[Tensor]) -> float:
    norms: Sequence[Tensor] = ()
    try:
        if tensors:
            norms = torch._foreach_norm(tensors)
    except RuntimeError:  # some are sparse or nested
        norms = [norm for tensor in tensors for norm in _norms_of_any(tensor)]
    total = 0.0
    for each in norms:
        norm = each.item()
        total += norm * norm
    return total


def _norms_of_batch(batch: list[Tensor]) -> list[Tensor]:
    try:
        flat = flatten_dense_tensors(batch)
    except RuntimeError:  # some are sparse or nested, or they are on several devices
        return [norms for g in batch for norms in _norms_of_any(g)]
    return _norms_of_chunk(flat) if flat.dtype is torch.float32 else _norms_of_any(flat)


def _in_rows(g: Tensor, size: int) -> Tensor | None:
    """A large tensor where it lies, if it can be measured there; up to DOT elements in one dimension."""
    is_single = g.dtype is torch.float32
    if not (g.is_cpu and (is_single or g.dtype in HALVES)):
        return None
    length = _row_length(size) if is_single else _row_length(size, HALF_ROW)
    try:
        if not g.is_contiguous():
            return None
        if is_single and size <= DOT:
            return g.view(-1)
        return g.view(-1, length) if length else None
    except RuntimeError:  # sparse or nested
        return None


@functools.lru_cache(2**12)
def _row_length(size: int, longest: int = ROW) -> int:
    """Of the longest rows, up to this, that a tensor of this size is made of; 0 if they were too short."""
    return next((length for length in range(longest, longest // 4, -1) if size % length == 0), 0)


def _squares_of_halves(tensors: list[Tensor]) -> float:
    """Of 16-bit tensors in rows. Mean and variance: what torch has that reads them once and accumulates in float32."""
    means, variances = [], []
    for rows in tensors:
        zeros = torch.zeros(len(rows), dtype=torch.float32, device="cpu")
        mean, variance = torch.batch_norm_update_stats(rows[None], zeros, zeros, 0.0)
        means.append(mean)
        variances.append(variance)
    torch._foreach_addcmul_(variances, means, means)
    sums = torch._foreach_norm(variances, 1, torch.float64)
    return sum([rows.shape[1] * each.item() for rows, each in zip(tensors, sums, strict=True)])


def _norms_of_any(gradient: Tensor, divisor: float = 1.0) -> list[Tensor]:
    """Of a tensor of any kind, divided by `divisor`; on the CPU."""
    values = real_values(gradient).squeeze()
    values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))  # the order of memory
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.is_contiguous():
        is_copied = values.dtype != dtype or divisor != 1
        chunks = torch.split(values.view(-1), CHUNK) if is_copied else (values,)
    else:
        chunks = torch.split(values, max(1, CHUNK // values[0].numel()))
    return [norms for chunk in chunks for norms in _norms_of_chunk(_divided(chunk.to(dtype), divisor))]


def _divided(chunk: Tensor, divisor: float) -> Tensor:
    return chunk.contiguous() if divisor == 1 else chunk.contiguous() / divisor


def _norms_of_chunk(values: Tensor) -> list[Tensor]:
    """Of a contiguous tensor in float32 or wider: of its rows together, and of what they leave over."""
    rest = values.numel() % ROW
    if rest:
        values = values.view(-1)
        return [*_norms_of_chunk(values[:-rest]), torch.linalg.vector_norm(values[-rest:]).cpu()]
    norms = torch.linalg.vector_norm(values.view(-1, ROW), 2, 1)
    return [torch.linalg.vector_norm(norms, dtype=wide_dtype(norms.device)).cpu()]


def _rescaled_norm(gradients: Iterable[Tensor]) -> float:
    """Divides by the largest element before squaring, as LAPACK's nrm2 does; NaN or infinite if an element is."""
    values = [value for value in map(real_values, gradients) if value.numel() > 0]
    peaks = [torch.linalg.vector_norm(value, math.inf).item() for value in values]
    peak = max(peaks, default=0.0)
    if peak == 0 or not all(map(math.isfinite, peaks)):
        return float(sum(peaks))
    return peak * math.sqrt(_squares_of_short([norms for value in values for norms in _norms_of_any(value, peak)]))
