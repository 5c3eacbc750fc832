"""From parameters to one norm, and from one coefficient to scaled gradients."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors
from torch.nn import Parameter

# torch accumulates a norm in float32, with a few running sums: over more than some thousand elements the last digits
# drift (1e-3 over 25 M equal ones). Norms of short rows, normed again in float64, stay under 1e-6 and run as fast.
ROW = 2**8
SHORT = 6 * ROW  # elements, up to which one sum in float32 stays under it as well
# Calls are what small gradients cost, so a batch of them is copied into one tensor, unless they are few. No other copy
# is made but of 16-bit gradients, in float32, chunk by chunk.
SMALL = 2**12
FEW = 8
BATCH = 2**6
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


def local_norm(gradients: Sequence[Tensor], device: torch.device | None) -> Any:
    """L2 norm of the gradients in this process: a number, or a tensor without dimensions on an accelerator."""
    return gradient_norm(gradients) if device is None else device_norm(gradients, device)


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """L2 norm over all elements of dense, sparse, real and complex tensors of any floating dtype and device.

    Accumulated in float32 or wider, and right also where the squares of the elements overflow or vanish in float32.
    Reads every gradient once. For gradients on the CPU; one on an accelerator is read back.
    """
    total = _sum_of_squares(gradients)
    return math.sqrt(total) if SMALLEST_SUM < total < math.inf else _rescaled_norm(gradients)


def device_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """`gradient_norm` as a tensor without dimensions on `device`, for gradients on accelerators.

    Nothing is read back (but by `coalesce` of sparse gradients). Accumulated in float64, where no square of a float32
    overflows or vanishes; a device without float64 accumulates in float32.
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
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _sum_of_squares(gradients: Sequence[Tensor]) -> float:
    small = [g for g in gradients if g.numel() <= SMALL and g.is_cpu and not g.is_sparse]
    if 0 < len(small) == len(gradients) <= FEW and all([g.dtype is torch.float32 for g in gradients]):
        return sum([norm * norm for norm in map(Tensor.item, torch._foreach_norm(small))])
    total = 0.0
    for start in range(0, len(small), BATCH):
        total += _sum_over(flatten_dense_tensors(small[start : start + BATCH]))
    if len(small) < len(gradients):
        done = set(map(id, small))
        total += sum([_sum_over_one(g) for g in gradients if id(g) not in done])
    return total


def _sum_over_one(gradient: Tensor) -> float:
    if gradient.is_cpu:
        return _sum_over(_flat(gradient))
    norm = float(device_norm([gradient], gradient.device))
    return norm * norm


def _sum_over(flat: Tensor, divisor: float = 1.0) -> float:
    """Sum of the squares of a tensor of one dimension divided by `divisor`."""
    if flat.dtype is torch.float32 and flat.numel() <= CHUNK and flat.is_contiguous() and divisor == 1:
        return _sum_over_rows(flat)
    flat = _real_values(flat).reshape(-1)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    if flat.dtype == dtype and flat.is_contiguous() and divisor == 1:
        return sum([_sum_over_rows(chunk) for chunk in torch.split(flat, CHUNK)])
    return sum([_sum_over_rows(_divided(chunk.to(dtype), divisor)) for chunk in torch.split(flat, COPIED_CHUNK)])


def _divided(chunk: Tensor, divisor: float) -> Tensor:
    return chunk.contiguous() if divisor == 1 else chunk.contiguous() / divisor


def _sum_over_rows(flat: Tensor) -> float:
    size = flat.numel()
    if size <= SHORT:
        return float(flat.dot(flat).item())
    whole = size - size % ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), 2, 1)
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64).item()
    return float(norm * norm) + (_sum_over_rows(flat[whole:]) if whole < size else 0.0)


def _flat(value: Tensor) -> Tensor:
    """All elements in one dimension, in memory order: a view unless the tensor has holes or repeats."""
    if value.is_contiguous():
        return value.view(-1)
    value = _real_values(value)
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True)).reshape(-1)


def _rescaled_norm(gradients: Iterable[Tensor]) -> float:
    """Divides by the largest element before squaring, as LAPACK's nrm2 does; NaN or infinite if an element is."""
    values = [value for value in map(_real_values, gradients) if value.numel() > 0]
    peaks = [torch.linalg.vector_norm(value, math.inf).item() for value in values]
    peak = max(peaks, default=0.0)
    if peak == 0 or not all(map(math.isfinite, peaks)):
        return float(sum(peaks))
    return peak * math.sqrt(sum(_sum_over(_flat(value), peak) for value in values))
