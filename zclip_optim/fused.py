"""torch's fused optimizers scale the gradients and skip a step in their own kernels, if they are told to.

`grad_scale` and `found_inf`, tensors set as attributes (the way of GradScaler), make the kernel divide every gradient
by the one, writing it back, and do nothing at all where the other is not 0. So clipping costs no pass over memory, and
a skip no read of the flag.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW

from zclip_optim.gradients import Gradients

FUSED = (Adam, AdamW, SGD, Adagrad)
ATTRIBUTES = ("grad_scale", "found_inf")  # which GradScaler sets too, on the optimizer that it steps


class Kernels:
    """What the kernels of optimizers are told for one step, and is to be taken back at its end.

    Args:
        optimizers: that step together; if one of them has no such kernels, none is told anything.

    Attributes:
        scale_themselves: whether the kernels were told to scale the gradients.
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.optimizers = optimizers
        self.scale_themselves = False

    def scale(self, coef: Tensor) -> bool:
        """Have the step multiply the gradients by `coef`, a tensor of one element; whether the optimizers can do it."""
        if not all(map(_is_fused, self.optimizers)):
            return False
        grad_scale = coef.reciprocal().float().reshape(())
        for optimizer in self.optimizers:
            optimizer.grad_scale = grad_scale
        self.scale_themselves = True
        return True

    def skip(self, flag: Tensor) -> bool:
        """Have the step do nothing if `flag` is true; whether that can be done, which takes a step that got a scale.

        Never SGD with momentum: skipped on its first step, torch's kernel leaves an uninitialised momentum buffer.
        """
        if not self.scale_themselves or any(map(_has_momentum, self.optimizers)):
            return False
        found_inf = flag.float().reshape(())
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
        return True

    def take_back(self) -> None:
        """End the step."""
        if self.scale_themselves:
            self.scale_themselves = False
            for optimizer in self.optimizers:
                for name in ATTRIBUTES:
                    optimizer.__dict__.pop(name, None)


class KernelScaler:
    """Gradients that the kernels of the optimizer scale in its step, if they can."""

    def __init__(self, gradients: Gradients, kernels: Kernels) -> None:
        self.gradients, self.kernels, self.device = gradients, kernels, gradients.device

    def scale_(self, coefs: Any) -> None:
        """Multiply the gradients by the coefficient of their scope, or have the kernels do it."""
        if not (self.gradients.can_be_scaled_one_by_one() and self.kernels.scale(coefs)):
            self.gradients.scale_(coefs)

    def leaves_out(self, flag: Tensor) -> bool:
        """Whether the kernels do."""
        return self.kernels.skip(flag)

    @property
    def acts_later(self) -> bool:
        """Whether the kernels were told to."""
        return self.kernels.scale_themselves

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """As `Gradients` does."""
        return self.gradients.describe_nonfinite(ask_others=ask_others)


def _is_fused(optimizer: Any) -> bool:
    return type(optimizer) in FUSED and all(group["fused"] for group in optimizer.param_groups)


def _has_momentum(optimizer: Any) -> bool:
    return type(optimizer) is SGD and any(group["momentum"] != 0 for group in optimizer.param_groups)
