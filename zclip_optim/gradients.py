"""Gradients: where a norm comes from and a coefficient goes to."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from zclip_optim.algorithm import Scalar
from zclip_optim.norm import (
    by_device_and_dtype,
    device_norm,
    gradient_norm,
    real_values,
    stored_values,
    wide_dtype,
)

ParamGroups: TypeAlias = Sequence[Mapping[str, Any]]
CHOICE = "zclip"  # the key of a param group that says whether it is clipped


class Scaler(Protocol):
    """What carries out a decision on norms: the gradients, or somebody who has them."""

    @property
    def device(self) -> torch.device | None:
        """The accelerator on which the norms and the coefficients stay; None for the CPU."""

    def scale_(self, coefs: Any) -> None:
        """Multiply the gradients by the coefficient of their scope, or have it done."""

    def leaves_out(self, flag: Any) -> bool:
        """Whether it sees to it by itself that the step is left out, if `flag`, a tensor, turns out to be true."""

    @property
    def acts_later(self) -> bool:
        """Whether what it was told is done after the step of this process, so that nobody has seen the norm yet."""

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """The parameters whose gradients hold NaN or infinities; empty if there are none.

        Args:
            ask_others: whether every rank that has seen a bad norm calls this now, so that they can tell each other.
        """


class Gradients:
    """The gradients of param groups, all elements of which are in this process.

    Args:
        param_groups: as in an optimizer; those with ``zclip=False`` are left alone.
        scope: "global" for one norm, "group" for one per param group, 0 for those left alone.

    Attributes:
        device: the accelerator that a step stays on, that of the first parameter; None for the CPU.
        scopes: the param groups that have a norm together.
        local: the gradients of each scope, or what this process has of them.
        are_all_here: whether no other process can have elements of them.
    """

    are_all_here = True
    acts_later = False

    def __init__(self, param_groups: ParamGroups, scope: str) -> None:
        self.param_groups = param_groups
        clipped = [group for group in param_groups if group.get(CHOICE, True) is True]
        if len(clipped) < len(param_groups):
            choices(param_groups)  # each of the others must be False
        self.device = _accelerator(clipped)
        if scope == "global":
            self.scopes = [clipped]
        else:
            self.scopes = [[group] if group.get(CHOICE, True) else [] for group in param_groups] or [[]]
        self.local = [collect_gradients(groups) for groups in self.scopes]

    def norms(self) -> Any:
        """The L2 norm of each scope: a list of numbers, or a tensor on the accelerator with an element for each."""
        if self.device is None:
            return [gradient_norm(gradients) for gradients in self.local]
        return torch.stack([device_norm(gradients, self.device) for gradients in self.local])

    def are_missing(self, norms: Any) -> bool | None:
        """Whether no parameter has a gradient, on any rank; `norms` is what `norms()` returned."""
        return not any(self.local)

    def scale_(self, coefs: Iterable[Scalar]) -> None:
        """Multiply the gradients by the coefficient of their scope, in place."""
        for gradients, coef in zip(self.local, coefs, strict=True):
            if isinstance(coef, Tensor) or coef != 1:
                scale_gradients_(gradients, coef)

    def leaves_out(self, flag: Any) -> bool:
        """No: who takes the step must look."""
        return False

    def can_be_scaled_one_by_one(self) -> bool:
        """Whether a kernel, which scales what it is given, may: no gradient is left alone, or would be scaled twice."""
        held = sum([p.grad is not None for group in self.param_groups for p in group["params"]])
        return len(self.local) == 1 and len(self.local[0]) == held

    def norms_by_parameter(self) -> list[tuple[str, float]]:
        """Name or position, and the L2 norm of its gradient, of each parameter that has one; tied gradients once."""
        return self.norms_here(self.param_groups)

    def norms_here(self, param_groups: ParamGroups) -> list[tuple[str, float]]:
        """The same of what this process has of the gradients of some of the groups."""
        chosen, names, gradients = set(map(id, param_groups)), [], {}
        for name, p, group in named_params(self.param_groups):
            if p.grad is not None and id(group) in chosen and id(p.grad) not in gradients:
                names.append(name)
                gradients[id(p.grad)] = local_tensor(p.grad)
        norms = self._read([self._norm_of([gradient]) for gradient in gradients.values()])
        return list(zip(names, norms, strict=True))

    def _norm_of(self, gradients: list[Tensor]) -> Scalar:
        return gradient_norm(gradients) if self.device is None else device_norm(gradients, self.device)

    def _read(self, values: list[Scalar]) -> list[float]:
        """Numbers, or tensors on the device in one transfer."""
        if self.device is None or not values:
            return values
        dtype = wide_dtype(self.device)
        return torch.stack([torch.as_tensor(v, dtype=dtype, device=self.device) for v in values]).tolist()

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """The parameters whose gradients hold NaN or infinities; empty if there are none.

        Args:
            ask_others: whether every rank that has seen a bad norm calls this now, so that they can tell each other.
        """
        return describe_nonfinite(self.param_groups)


class ReportedNorm:
    """The norm of gradients that somebody else has, who scales them, and steps or leaves it.

    Args:
        norm: a number, or a tensor of one element; of a DTensor the whole, for which every rank of its mesh is here.

    Attributes:
        device: the accelerator that a step stays on, that of the norm; None for the CPU.
        factor: for the gradients, once it has been decided.

    Raises:
        TypeError: it is something else.
        ValueError: it is below 0.
    """

    acts_later = True

    def __init__(self, norm: float | Tensor) -> None:
        self.factor: Any = 1.0
        self.device: torch.device | None = None
        if isinstance(norm, Tensor):
            norm = whole_tensor(norm)
            self.device = norm.device if stays_on_device(norm) else None
        _refuse_unless_one(norm)
        self.norm = norm if self.device is not None else float(norm)
        if self.device is None and self.norm < 0:
            raise ValueError(f"norm must be >= 0, got {self.norm}; give math.inf where gradients have overflown")

    def norms(self) -> Any:
        """The norm as it was reported, as `Gradients.norms` gives them. On an accelerator one below 0 becomes NaN."""
        if self.device is None:
            return [self.norm]
        norm = torch.as_tensor(self.norm).reshape(1).to(wide_dtype(self.device))
        return norm.where((norm < 0).logical_not(), math.nan)

    def scale_(self, coefs: Any) -> None:
        """Keep the coefficient."""
        self.factor = coefs[0]

    def leaves_out(self, flag: Any) -> bool:
        """True: its owner learns of it from `ZClip.step_was_skipped`."""
        return True

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """That it is not known."""
        return "not known where only a norm is reported"


def choices(param_groups: Iterable[Mapping[str, Any]]) -> list[bool]:
    """Whether each of these param groups is clipped; they are, unless they say otherwise.

    Raises:
        ValueError: one says something else than yes or no.
    """
    chosen = [group.get(CHOICE, True) for group in param_groups]
    for i, choice in enumerate(chosen):
        if type(choice) is not bool:
            raise ValueError(f"{CHOICE!r} in param_groups[{i}] must be True or False, got {choice!r}")
    return chosen


def collect_gradients(param_groups: ParamGroups) -> list[Tensor]:
    """The gradients that the parameters of the groups have, those of tied parameters once."""
    found: dict[int, Tensor] = {}
    for group in param_groups:
        for p in group["params"]:
            gradient = p.grad
            if gradient is not None:
                found[id(gradient)] = gradient
    return list(found.values())


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
        for batch in by_device_and_dtype(v.conj() if v.is_conj() else v for v in map(stored_values, gradients)):
            if batch[0].dtype.itemsize == 1:
                _scale_bytes_(batch, coef)
            else:
                torch._foreach_mul_(batch, coef.to(batch[0].device, batch[0].dtype))
    elif coef != 1:
        for gradient in gradients:
            if gradient.dtype.itemsize == 1:
                _scale_bytes_([gradient], coef)
            else:
                gradient.mul_(coef)  # _foreach_mul_ would round to a 16-bit dtype


def _scale_bytes_(gradients: Sequence[Tensor], coef: float | Tensor) -> None:
    """For float8, with which torch does not calculate."""
    for gradient in gradients:
        gradient.copy_(gradient.float() * coef)


def zero_gradients_(gradients: Sequence[Tensor]) -> None:
    """Set every gradient to zero in place, NaN and infinite elements too."""
    for gradient in gradients:
        gradient.detach().zero_()


def describe_nonfinite(param_groups: ParamGroups, limit: int = 10) -> str:
    """The parameters whose gradients hold NaN or infinities in this process: by name where the groups have names, else
    by position; empty if there are none.
    """
    found = [
        f"{name} {'nested' if p.is_nested else tuple(p.shape)}"
        for name, p, gradient in named_gradients(param_groups)
        if not real_values(gradient).isfinite().all()
    ]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def named_params(param_groups: ParamGroups) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Name or position, parameter, and its group, but of groups left alone.

    Where parameters were put into a group or taken out by hand, its names are those of others, and positions tell more.
    """
    for i, group in enumerate(param_groups):
        params = group["params"] if group.get(CHOICE, True) else ()
        names = group.get("param_names", ())
        are_theirs = len(names) == len(params)
        for j, p in enumerate(params):
            yield names[j] if are_theirs else f"param_groups[{i}]['params'][{j}]", p, group


def named_gradients(param_groups: ParamGroups) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name or position, parameter, and what this process has of its gradient."""
    for name, p, _ in named_params(param_groups):
        if p.grad is not None:
            yield name, p, local_tensor(p.grad)


def whole_tensor(value: Tensor) -> Tensor:
    """A DTensor with the elements of all ranks, each of which must call it; another tensor as it is."""
    value = value.detach()
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _refuse_unless_one(norm: Any) -> None:
    if not (norm.numel() == 1 if isinstance(norm, Tensor) else hasattr(norm, "__float__")):
        got = f"one of shape {tuple(norm.shape)}" if isinstance(norm, Tensor) else repr(norm)
        raise TypeError(f"norm must be a number or a tensor of one element, got {got}")


def local_tensor(value: Tensor) -> Tensor:
    """The elements of a DTensor that this process holds, in its own memory; of another tensor all."""
    if type(value) in (Tensor, Parameter) or not hasattr(value, "to_local"):
        return value
    with torch.no_grad():  # else it would be a copy that autograd knows
        local: Tensor = value.to_local()
        if hasattr(local, "trigger_wait"):  # still on its way from another rank
            local = local.trigger_wait()
    return local
