"""Gradients: where a norm comes from and a coefficient goes to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from zclip_optim.algorithm import Scalar
from zclip_optim.norm import by_device_and_dtype, device_norm, gradient_norm, real_values

ParamGroups: TypeAlias = Sequence[Mapping[str, Any]]


class Gradients:
    """The gradients of param groups, all elements of which are in this process.

    Args:
        param_groups: as in an optimizer.
        scope: "global" for one norm, "group" for one per param group.

    Attributes:
        device: the accelerator that a step stays on, that of the first parameter; None for the CPU.
        scopes: the param groups that have a norm together.
    """

    def __init__(self, param_groups: ParamGroups, scope: str) -> None:
        self.param_groups, self.device = param_groups, _accelerator(param_groups)
        self.scopes = [param_groups] if scope == "global" else [[group] for group in param_groups]
        self._local = [collect_gradients(groups) for groups in self.scopes]

    def norms(self) -> Any:
        """The L2 norm of each scope: a list of numbers, or a tensor on the accelerator with an element for each."""
        if self.device is None:
            return [gradient_norm(gradients) for gradients in self._local]
        return torch.stack([device_norm(gradients, self.device) for gradients in self._local])

    def scale_(self, coefs: Iterable[Scalar]) -> None:
        """Multiply the gradients by the coefficient of their scope, in place."""
        for gradients, coef in zip(self._local, coefs, strict=True):
            if isinstance(coef, Tensor) or coef != 1:
                scale_gradients_(gradients, coef)

    def can_be_scaled_one_by_one(self) -> bool:
        """Whether there is one scope and no gradient belongs to two parameters, which a kernel would scale twice."""
        held = sum([p.grad is not None for group in self.param_groups for p in group["params"]])
        return len(self._local) == 1 and len(self._local[0]) == held

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """The parameters whose gradients hold NaN or infinities; empty if there are none.

        Args:
            ask_others: whether every rank that has seen a bad norm calls this now, so that they can tell each other.
        """
        return describe_nonfinite(self.param_groups)


def collect_gradients(param_groups: ParamGroups) -> list[Tensor]:
    """The gradients that the parameters of the groups have, those of tied parameters once."""
    gradients = [gradient for group in param_groups for p in group["params"] if (gradient := p.grad) is not None]
    if len(set(map(id, gradients))) < len(gradients):
        gradients = list({id(g): g for g in gradients}.values())
    return gradients


def stays_on_device(tensor: Tensor) -> bool:
    """Whether a value computed from this tensor must not be read by the host in every step."""
    return not tensor.is_cpu


def _accelerator(param_groups: ParamGroups) -> torch.device | None:
    for group in param_groups:
        for p in group["params"]:
            return p.device if stays_on_device(p) else None
    return None


@torch.no_grad()
def scale_gradients_(gradients: Sequence[Tensor], coef: float | Tensor) -> None:
    """Multiply every gradient by `coef` in place; a coefficient of 1 leaves the bits alone.

    A tensor is rounded to the gradients' dtype first, which a number on the CPU is not.
    """
    if isinstance(coef, Tensor):
        # A real factor is the same to a conjugate, which foreach functions do not take.
        for batch in by_device_and_dtype(g.conj() if g.is_conj() else g for g in gradients):
            torch._foreach_mul_(batch, coef.to(batch[0].device, batch[0].dtype))
    elif coef != 1:
        for gradient in gradients:
            gradient.mul_(coef)  # _foreach_mul_ would round to a 16-bit dtype


def zero_gradients_(gradients: Sequence[Tensor]) -> None:
    """Set every gradient to zero in place, NaN and infinite elements too."""
    for gradient in gradients:
        gradient.detach().zero_()


def describe_nonfinite(param_groups: ParamGroups, limit: int = 10) -> str:
    """The parameters whose gradients hold NaN or infinities in this process: by name where the groups have names, else
    by position; empty if there are none.
    """
    found = []
    for i, group in enumerate(param_groups):
        for j, p in enumerate(group["params"]):
            if p.grad is not None and not real_values(local_tensor(p.grad)).isfinite().all():
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
