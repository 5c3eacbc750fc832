"""From parameters to one norm, and from one coefficient to scaled gradients."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors
from torch.nn import Parameter

# torch accumulates a norm in float32, with a few running sums: over more than a thousand elements the last digits drift
# (1e-6 over 1,024 equal ones, 1e-3 over 25 M). Norms of short rows, summed in float64, are 5e-7 off if all elements are
# equal, 2e-6 with the worst that was contrived, some 1e-9 on random ones, and run nearly as fast as a plain read.
ROW = 2**9
SHORT = 2**10  # elements, up to which one norm in float32 will do (1e-6 if all are equal, 4e-6 contrived)
# Calls are what small gradients cost, so a batch of them is copied into one tensor, unless they are few. Of large ones
# no copy is made but of 16-bit ones, in float32, and of those with holes in memory, chunk by chunk.
SMALL = 2**12
FEW = 8
BATCH = 2**18  # elements, at most
CHUNK = 2**22
COPIED_CHUNK = 2**20
# Sums of squares below this may have lost elements to float32's underflow, even over 1e9 elements.
SMALLEST_SUM = 1e-20


def collect_gradients(param_groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The gradients that the parameters of the groups have, those of tied parameters once."""
    gradients = [gradient for group in param_groups for p in group["params"] if (gradient := p.grad) is not None]
    if len(set(map(id, gradients))) < len(gradients):
        gradients = list({id(g): g for g in gradients}.values())
    return gradients


def stays_on_device(tensor: Tensor) -> bool:
    """Whether a value computed from this tensor must not be read by the host in every step."""
    return not tensor.is_cpu


def local_norm(gradients: list[Tensor], device: torch.device | None) -> Any:
    """L2 norm of the gradients in this process: a number, or a tensor without dimensions on an accelerator."""
    return gradient_norm(gradients) if device is None else device_norm(gradients, device)


def gradient_norm(gradients: list[Tensor]) -> float:
    """L2 norm over all elements of dense, sparse (COO), real and complex tensors of any floating dtype and device.

    Accumulated in float32 or wider, and right also where the squares of the elements overflow or vanish in float32.
    Reads every gradient once. For gradients on the CPU; one on an accelerator is read back.
    """
    total = _sum_of_squares(gradients)
    return math.sqrt(total) if SMALLEST_SUM < total < math.inf else _rescaled_norm(gradients)


def device_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm as a tensor without dimensions on `device`, for gradients on accelerators.

    Nothing is read back (but by `coalesce` of sparse gradients). Accumulated in float64, where no square of a float32
    overflows or vanishes, but those of float64 gradients may; a device without float64 accumulates in float32.
    """
    dtype = wide_dtype(device)
    batches = _by_device_and_dtype(map(_real_values, gradients))
    norms = [norm.to(device) for batch in batches for norm in torch._foreach_norm(batch, 2, dtype)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=dtype, device=device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def scale_gradients_(gradients: Sequence[Tensor], coef: float | Tensor) -> None:
    """Multiply every gradient by `coef` in place; a coefficient of 1 leaves the bits alone.

    A tensor is rounded to the gradients' dtype first, which a number on the CPU is not.
    """
    if isinstance(coef, Tensor):
        # A real factor is the same to a conjugate, which foreach functions do not take.
        for batch in _by_device_and_dtype(g.conj() if g.is_conj() else g for g in gradients):
            torch._foreach_mul_(batch, coef.to(batch[0].device, batch[0].dtype))
    elif coef != 1:
        for gradient in gradients:
            gradient.mul_(coef)  # _foreach_mul_ would round to a 16-bit dtype


def zero_gradients_(gradients: Sequence[Tensor]) -> None:
    """Set every gradient to zero in place, NaN and infinite elements too."""
    for gradient in gradients:
        gradient.detach().zero_()


def describe_nonfinite(param_groups: Iterable[dict[str, Any]], limit: int = 10) -> str:
    """The parameters whose gradients hold NaN or infinities in this process: by name where the groups have names, else
    by position; empty if there are none.
    """
    found = []
    for i, group in enumerate(param_groups):
        for j, p in enumerate(group["params"]):
            if p.grad is not None and not _real_values(local_tensor(p.grad)).isfinite().all():
                name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}]['params'][{j}]"
                found.append(f"{name} {tuple(p.shape)}")
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def local_tensor(value: Tensor) -> Tensor:
    """The elements of a DTensor that this process holds, in its own memory; of another tensor all."""
    if type(value) in (Tensor, Parameter) or not hasattr(value, "to_local"):
        return value
    with torch.no_grad():  # else it would be a copy that autograd knows
        local: Tensor = value.to_local()
        if hasattr(local, "trigger_wait"):  # still on its way from another rank
            local = local.trigger_wait()
    return local


def _by_device_and_dtype(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """What the foreach functions take in one kernel."""
    batches: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        batches[tensor.device, tensor.dtype].append(tensor)
    return batches.values()


def _real_values(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if gradient.is_conj():
        gradient = gradient.conj()  # of the same norm, without a copy
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _sum_of_squares(gradients: list[Tensor]) -> float:
    if 0 < len(gradients) <= FEW and all(map(_is_short, gradients)):
        return sum([float(norm * norm) for norm in map(Tensor.item, torch._foreach_norm(gradients))])
    total = 0.0
    batch: list[Tensor] = []
    room = BATCH
    for g in gradients:
        size = g.numel()
        if size > SMALL:
            total += _sum_over_large(g)
            continue
        if size > room:
            total += _sum_over_batch(batch)
            batch, room = [], BATCH
        batch.append(g)
        room -= size
    return total + _sum_over_batch(batch) if batch else total


def _is_short(g: Tensor) -> bool:
    return g.dtype is torch.float32 and g.numel() <= SHORT and not g.is_sparse


def _sum_over_batch(batch: list[Tensor]) -> float:
    try:
        flat = flatten_dense_tensors(batch)
    except RuntimeError:  # some are sparse, or they are on several devices
        return sum([_sum_over(g) for g in batch])
    return _sum_over_rows(flat) if flat.dtype is torch.float32 else _sum_over(flat)


def _sum_over_large(g: Tensor) -> float:
    if g.dtype is torch.float32 and g.numel() <= CHUNK and g.is_contiguous():  # which no sparse tensor is
        return _sum_over_rows(g)
    return _sum_over(g)


def _sum_over(gradient: Tensor, divisor: float = 1.0) -> float:
    """Sum of the squares of any kind of tensor, divided by `divisor`."""
    values = _real_values(gradient).squeeze()
    values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))  # the order of memory
    dtype = torch.promote_types(values.dtype, torch.float32)
    if values.is_contiguous():
        copied = values.dtype != dtype or divisor != 1
        chunks = torch.split(values.view(-1), COPIED_CHUNK if copied else CHUNK)
    else:
        chunks = torch.split(values, max(1, COPIED_CHUNK // values[0].numel()))
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
    rows = torch.linalg.vector_norm(values.view(-1, ROW), 2, 1).double()
    return float(total + rows.dot(rows).item())


def _rescaled_norm(gradients: Iterable[Tensor]) -> float:
    """Divides by the largest element before squaring, as LAPACK's nrm2 does; NaN or infinite if an element is."""
    values = [value for value in map(_real_values, gradients) if value.numel() > 0]
    peaks = [torch.linalg.vector_norm(value, math.inf).item() for value in values]
    peak = max(peaks, default=0.0)
    if peak == 0 or not all(map(math.isfinite, peaks)):
        return float(sum(peaks))
    return peak * math.sqrt(sum([_sum_over(value, peak) for value in values]))
