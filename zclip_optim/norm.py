"""From the gradients in this process to one norm."""

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors

# How much is measured in one go. torch accumulates a norm in float32 with a few running sums, whose last digits drift:
# by 1e-3 over 25 M equal elements. Short norms, summed in float64, do not; but calls are what small gradients cost. So
# tiny ones are copied into one tensor, a batch at a time; small ones, and few, are measured by one call without a copy;
# medium ones by rows as long as these; large ones by short rows, nearly as fast as a plain read; and large 16-bit ones
# are copied into a buffer in float32. Right for clipping are 1e-6 on gradients as they are and 1e-4 on the worst that
# can be contrived.
# Measured, relative errors of the norm of one tensor: random elements, their fifth powers, equal ones, contrived ones.
#   in one go   8,192: 8e-8, 3e-7, 7e-6, 3e-5      16,384: 3e-7, 1e-6, 1e-5, 6e-5      rows: 1e-9, -, 5e-7, 2e-6
# Gradients of models have structure: with 16,384 those of a small transformer were 2e-6 off.
# constant             unit                 a larger one is
ROW = 2**9  #          elements of a row    no faster, less exact
TINY = 2**10  #        elements, a tensor   more copies, fewer calls
SMALL = 2**13  #       elements, a tensor   faster, less exact; and of a long row
MEDIUM = 2**16  #      elements, a tensor   fewer calls, more numbers to read
FEW = 8  #             tensors              faster up to some ten: a call for all, no copy
BATCH = 2**18  #       elements, a batch    more memory, fewer calls
CHUNK = 2**20  #       elements, a copy     more memory, fewer calls
LONG = 2**22  #        elements             more memory, of the norms of rows
SMALLEST = 1e-10  #    a norm               more norms taken again, because elements may have vanished in float32

SINGLE = {torch.float32}
HALVES = {torch.float16, torch.bfloat16}
ORDINARY = {torch.float32, torch.float64, *HALVES}
DTYPE = operator.attrgetter("dtype")
COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def gradient_norm(gradients: list[Tensor]) -> float:
    """L2 norm over all elements of dense, sparse, nested, real and complex tensors of any floating dtype and device.

    Accumulated in float32 or wider, and right also where the squares of the elements overflow or vanish in float32: to
    1e-6 on gradients as they are, to 1e-4 on the worst that was contrived. Reads every gradient once. For gradients on
    the CPU; one on an accelerator is read back.
    """
    if len(gradients) <= FEW and set(map(DTYPE, gradients)) == SINGLE and max(map(Tensor.numel, gradients)) <= SMALL:
        norm = _norm_of_small(gradients)
    else:
        norm = math.sqrt(_sum_of_squares(gradients))
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


def _sum_of_squares(gradients: list[Tensor]) -> float:
    tiny = TINY if len(gradients) > FEW else 0
    total = 0.0
    small: list[Tensor] = []
    halves: list[Tensor] = []
    batch: list[Tensor] = []
    room = BATCH
    for g, size in zip(gradients, map(Tensor.numel, gradients), strict=True):
        if size > SMALL:
            if not (g.is_cpu and is_ordinary(g) and g.is_contiguous()) or g.dtype is torch.float64:
                total += _sum_over(g)
            elif g.dtype is not torch.float32:
                halves.append(g)
            elif size <= MEDIUM and size % SMALL == 0:
                total += _sum_over_long_rows(g)
            else:
                total += _sum_over_rows(g) if size <= LONG else _sum_over(g)
        elif size > tiny and g.dtype is torch.float32:
            small.append(g)
        else:
            if size > room:
                total += _sum_over_batch(batch)
                batch, room = [], BATCH
            batch.append(g)
            room -= size
    if small:
        norm = _norm_of_small(small)
        total += norm * norm
    if halves:
        total += _sum_over_halves(halves)
    return total + _sum_over_batch(batch) if batch else total


def _norm_of_small(gradients: list[Tensor]) -> float:
    try:
        return math.hypot(*map(Tensor.item, torch._foreach_norm(gradients)))
    except RuntimeError:  # some are sparse or nested
        return math.sqrt(sum([_sum_over(g) for g in gradients]))


def _sum_over_long_rows(values: Tensor) -> float:
    """Of a contiguous tensor whose size is a multiple of SMALL."""
    norm = math.hypot(*torch.linalg.vector_norm(values.view(-1, SMALL), 2, 1).tolist())
    return norm * norm


def _sum_over_batch(batch: list[Tensor]) -> float:
    try:
        flat = flatten_dense_tensors(batch)
    except RuntimeError:  # some are sparse or nested, or they are on several devices
        return sum([_sum_over(g) for g in batch])
    return _sum_over_rows(flat) if flat.dtype is torch.float32 else _sum_over(flat)


def _sum_over_halves(gradients: list[Tensor]) -> float:
    """Of contiguous 16-bit tensors, which are copied into one buffer, as many as it holds at a time."""
    buffer = torch.empty(min(CHUNK, sum([g.numel() for g in gradients])), device="cpu")
    total, filled = 0.0, 0
    for part in [part for g in gradients for part in torch.split(g.view(-1), CHUNK)]:
        end = filled + part.numel()
        if end > len(buffer):
            total += _sum_over_rows(buffer[:filled])
            filled, end = 0, part.numel()
        buffer[filled:end].copy_(part)
        filled = end
    return total + _sum_over_rows(buffer[:filled])


def _sum_over(gradient: Tensor, divisor: float = 1.0) -> float:
    """Sum of the squares of any kind of tensor, divided by `divisor`."""
    values = real_values(gradient).squeeze()
    values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))  # the order of memory
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.is_contiguous():
        is_copied = values.dtype != dtype or divisor != 1
        chunks = torch.split(values.view(-1), CHUNK if is_copied else LONG)
    else:
        chunks = torch.split(values, max(1, CHUNK // values[0].numel()))
    return sum([_sum_over_rows(_divided(chunk.to(dtype), divisor)) for chunk in chunks])


def _divided(chunk: Tensor, divisor: float) -> Tensor:
    return chunk.contiguous() if divisor == 1 else chunk.contiguous() / divisor


def _sum_over_rows(values: Tensor) -> float:
    """Of a contiguous tensor in float32 or wider."""
    ragged = values.numel() % ROW
    total = 0.0
    if ragged:
        values = values.view(-1)
        end = values[-ragged:]
        total, values = end.dot(end).item(), values[:-ragged]
    rows = torch.linalg.vector_norm(values.view(-1, ROW), 2, 1)
    rows = rows.double() if rows.is_cpu else rows.to(wide_dtype(rows.device))
    return float(total + rows.dot(rows).item())


def _rescaled_norm(gradients: Iterable[Tensor]) -> float:
    """Divides by the largest element before squaring, as LAPACK's nrm2 does; NaN or infinite if an element is."""
    values = [value for value in map(real_values, gradients) if value.numel() > 0]
    peaks = [torch.linalg.vector_norm(value, math.inf).item() for value in values]
    peak = max(peaks, default=0.0)
    if peak == 0 or not all(map(math.isfinite, peaks)):
        return float(sum(peaks))
    return peak * math.sqrt(sum([_sum_over(value, peak) for value in values]))
