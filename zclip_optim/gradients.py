"""From parameters to one norm, and from one coefficient to scaled gradients."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# torch accumulates a norm in float32, with a few running sums: over more than some thousand elements the last digits
# drift (1e-3 over 25 M equal ones). Norms of short rows, summed in float64, stay under 1e-6 and run as fast.
ROW = 2**8
SMALL = 2**12
FEW = 16  # so many small tensors are copied into one rather than normed one by one
CHUNK = 2**20  # bounds the copy that is made of 16-bit gradients
# Sums of squares below this may have lost elements to float32's underflow, even over 1e9 elements.
SMALLEST_SUM = 1e-20


def collect_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of `params` that exist, those of tied parameters once."""
    gradients = [p.grad for p in params if p.grad is not None]
    if len(set(map(id, gradients))) < len(gradients):
        gradients = list({id(g): g for g in gradients}.values())
    return gradients


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm over all elements of dense, sparse, real and complex tensors of any floating dtype and device.

    Accumulated in float32 or wider, and right also where the squares of the elements overflow or vanish in float32.
    Reads every gradient once; an accelerator's sum is read back by the host, once for each dtype.
    """
    total = _sum_of_squares(gradients)
    return math.sqrt(total) if SMALLEST_SUM < total < math.inf else _rescaled_norm(gradients)


def scale_gradients_(gradients: Sequence[Tensor], coef: float) -> None:
    """Multiply every gradient by `coef` in place; leaves the bits alone for a coefficient of 1."""
    if coef == 1:
        return
    for gradient in gradients:
        if gradient.is_cpu:  # where _foreach_mul_ would round the coefficient to a 16-bit dtype, and loop as well
            gradient.mul_(coef)
    on_accelerator = [gradient for gradient in gradients if not gradient.is_cpu]
    if on_accelerator:
        torch._foreach_mul_(on_accelerator, coef)


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


def _real_values(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _sum_of_squares(gradients: Iterable[Tensor]) -> float:
    total = 0.0
    batches: defaultdict[Any, list[Tensor]] = defaultdict(list)  # small tensors, or an accelerator's: one call for many
    for gradient in gradients:
        values = _real_values(gradient) if gradient.is_sparse or gradient.is_complex() else gradient
        if not values.is_cpu:
            batches[values.device, values.dtype].append(values)
        elif values.numel() > SMALL:
            total += _large_sum_of_squares(values)
        elif values.numel() > 0:
            batches[values.dtype].append(values)
    return sum(map(_batch_sum_of_squares, batches.values()), total)


def _batch_sum_of_squares(batch: list[Tensor]) -> float:
    dtype = torch.promote_types(batch[0].dtype, torch.float32)
    if len(batch) <= FEW and sum([values.numel() for values in batch]) <= SMALL // 2:
        values = torch.cat([values.reshape(-1) for values in batch]).to(dtype)
        return float(values.dot(values))
    return _dot(torch.stack(torch._foreach_norm(batch, dtype=dtype)))


def _large_sum_of_squares(value: Tensor, divisor: float = 1.0) -> float:
    dtype = torch.promote_types(value.dtype, torch.float32)
    flat = _flat(value)
    total = 0.0
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK].to(dtype).contiguous()
        if divisor != 1:
            chunk = chunk / divisor
        end = chunk.numel() // ROW * ROW
        total += _dot(torch.linalg.vector_norm(chunk[:end].view(-1, ROW), dim=1)) + _dot(chunk[end:])
    return total


def _dot(values: Tensor) -> float:
    values = values.cpu().double()  # in this order: not every accelerator has float64
    return values.dot(values).item()


def _flat(value: Tensor) -> Tensor:
    """All elements in one dimension, in memory order: a view unless the tensor has holes or repeats."""
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True)).reshape(-1)


def _rescaled_norm(gradients: Iterable[Tensor]) -> float:
    """Divides by the largest element before squaring, as LAPACK's nrm2 does; NaN or infinite if an element is."""
    values = [value for value in map(_real_values, gradients) if value.numel() > 0]
    peaks = [torch.linalg.vector_norm(value, math.inf).item() for value in values]
    peak = max(peaks, default=0.0)
    if peak == 0 or not all(map(math.isfinite, peaks)):
        return float(sum(peaks))
    return peak * math.sqrt(sum(_large_sum_of_squares(value, peak) for value in values))
