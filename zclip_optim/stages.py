"""A step that the user takes in stages, with a backward before each: SAM's first_step() and second_step()."""

from collections.abc import Callable
from typing import Any

import torch

from zclip_optim.clipper import NonFiniteGradientError, ZClip
from zclip_optim.gradients import collect_gradients, zero_gradients_

STAGES = ("first_step", "second_step", "third_step")


class StagedStep:
    """One step in stages, clipped as it would be with a closure.

    The first stage is a step to the statistics, the others are further evaluations within it. If the first may not
    step, the others are left out too, since a second_step() would go back to where an older first_step() began. If a
    later one may not, it gets zero gradients, so that the optimizer can end what it began, and the parameters are put
    back.

    Args:
        optimizer: the base optimizer, which has methods of `STAGES`.
        clipper: clips the gradients before each.
    """

    def __init__(self, optimizer: Any, clipper: ZClip) -> None:
        self.optimizer, self.clipper = optimizer, clipper
        self.last = [name for name in STAGES if hasattr(optimizer, name)][-1]
        can_fail = clipper.config.nonfinite != "pass"
        self.start = [p.detach().clone() for p in self._params()] if can_fail else None
        self.begun = self.left_out = self.must_go_back = False

    def take(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Take a stage; what the base optimizer's method returns, or None where it is left out."""
        if not self.left_out:
            may_step, error = self._clip()
            if may_step or self.begun:
                return self._go_on(getattr(self.optimizer, name), name == self.last, may_step, error, args, kwargs)
            self.left_out = True
            if error is not None:
                raise error
        if args[:1] == (True,) or kwargs.get("zero_grad"):
            self.optimizer.zero_grad()
        return None

    def _clip(self) -> tuple[bool, NonFiniteGradientError | None]:
        try:
            return self.clipper.clip_(self.optimizer.param_groups, new_step=not self.begun), None
        except NonFiniteGradientError as error:
            return False, error

    def _go_on(
        self,
        method: Callable[..., Any],
        is_last: bool,
        may_step: bool,
        error: NonFiniteGradientError | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.begun = True
        if not may_step:
            zero_gradients_(collect_gradients(self.optimizer.param_groups))
            self.must_go_back = True
        result = method(*args, **kwargs)
        if self.must_go_back and (is_last or error is not None):
            self._go_back()
        if error is not None:
            self.left_out = True
            raise error
        return result

    @torch.no_grad()
    def _go_back(self) -> None:
        for p, value in zip(self._params(), self.start or (), strict=True):
            p.copy_(value)

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
