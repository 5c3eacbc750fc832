"""torch's fused optimizers scale the gradients and skip a step in their own kernels, if they are told to.

`grad_scale` and `found_inf`, tensors set as attributes (the way of GradScaler), make the kernel divide every gradient
by the one, writing it back, and do nothing at all where the other is not 0. So clipping costs no pass over memory, and
a skip no read of the flag.
"""

from typing import Any

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW

FUSED = (Adam, AdamW, SGD, Adagrad)


def hand_scale(optimizer: Any, coef: Tensor) -> bool:
    """Have the next step multiply the gradients by `coef`, a tensor of one element; whether the optimizer can do it."""
    if type(optimizer) not in FUSED or not all(group["fused"] for group in optimizer.param_groups):
        return False
    optimizer.grad_scale = coef.reciprocal().float().reshape(())
    return True


def hand_skip(optimizer: Any, skip: Tensor) -> bool:
    """Have the next step, which got a scale, do nothing if `skip` is true; whether the optimizer can do it.

    Never SGD with momentum: skipped on its first step, torch's kernel leaves an uninitialised momentum buffer.
    """
    if type(optimizer) is SGD and any(group["momentum"] != 0 for group in optimizer.param_groups):
        return False
    optimizer.found_inf = skip.float().reshape(())
    return True


def take_back(optimizer: Any) -> None:
    """Remove what was handed over, after the step."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)
