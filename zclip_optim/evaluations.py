"""A step in which the gradients are evaluated more than once: by a closure, or in stages, with a backward before each.

Each evaluation is clipped, and the first is a step to the statistics. None leaves the step half done: one that may not
step, before the parameters have moved, leaves all of it out; a later one gets zero gradients, so that the optimizer can
end what it began, and the parameters are put back to where the step found them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from zclip_optim.chain import Chain, given, with_those_inside
from zclip_optim.clipper import ZClip
from zclip_optim.fused import Kernels
from zclip_optim.gradients import ParamGroups, choices, collect_gradients, zero_gradients_
from zclip_optim.health import NonFiniteGradientError
from zclip_optim.running import uncompiled

STAGES = ("first_step", "second_step", "third_step")  # of SAM and its kin
OF_TORCH = {cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, Optimizer)}
STAY_PUT = (OF_TORCH - {Optimizer, LBFGS}) | {Chain}  # leave the parameters alone until their closure has returned


class Evaluations:
    """The steps with several evaluations of a base optimizer, one after the other.

    Args:
        clipper: clips the gradients of each evaluation.
    """

    def __init__(self, clipper: ZClip) -> None:
        self.clipper = clipper
        self._stayed_put = False  # in the last step with a closure
        self._begun: _Step | None = None  # in stages, of which some are to come

    def step(self, base: Any, kernels: Kernels, closure: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """Let the base optimizer step with a closure, or what its step takes in the place of one, and more.

        Returns:
            What the base optimizer returns, or the loss if the step was left out.

        Raises:
            TypeError: its step does not take these arguments.
        """
        is_closure = callable(closure)
        if args or kwargs or not is_closure:
            uncompiled(refuse_arguments)(base, *given(closure, args), **kwargs)
        if is_closure:
            return self._evaluate(base, kernels, closure, *args, **kwargs)
        if self.clipper._clip(base.param_groups, kernels=kernels):
            return base.step(*given(closure, args), **kwargs)
        return uncompiled(count_left_out)(base)

    def _evaluate(self, base: Any, kernels: Kernels, closure: Callable[[], Any], /, *args: Any, **kwargs: Any) -> Any:
        step = _Step(base, self.clipper, may_move=not self._stayed_put, kernels=kernels)
        clipping = _ClippingClosure(step, closure)
        try:
            result = base.step(clipping, *args, **kwargs)
        except _SkipStep as skipped:
            count_left_out(base)
            return skipped.loss
        if not step.evaluations:
            name = type(base).__name__
            self.clipper._health.warn(
                "closure", f"{name} did not call the closure that its step() was given, so nothing was clipped there"
            )
        # LBFGS moves nothing in a step that finds it at the minimum.
        self._stayed_put = not clipping.moved and not isinstance(base, LBFGS)
        step.end()
        return result

    def take(self, base: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Take a stage; what the base optimizer's method returns, or None where it is left out."""
        step = self._begun
        if step is None or name == STAGES[0]:
            step = _Step(base, self.clipper)
        is_last = name == [each for each in STAGES if hasattr(base, each)][-1]
        self._begun = None if is_last else step
        if not step.is_over and step.clip(moved=step.evaluations > 0):
            result = getattr(base, name)(*args, **kwargs)
            if is_last or step.error is not None:
                step.end()
            return result
        step.end()  # the stages to come would go back to where an older one began
        count_left_out(base)
        if args[:1] == (True,) or kwargs.get("zero_grad"):
            base.zero_grad()
        return None


def count_left_out(base: Any) -> None:
    """Have a step that was left out count for schedulers on an optimizer, or on one that it holds, as one that was
    called: they warn of the wrong order of calls if there was none.
    """
    for optimizer in with_those_inside(base):
        if hasattr(getattr(optimizer, "step", None), "_wrapped_by_lr_sched"):
            optimizer._opt_called = True


def refuse_arguments(base: Any, /, *args: Any, **kwargs: Any) -> None:
    """Refuse arguments that the step of an optimizer, or of one of several, does not take.

    Raises:
        TypeError: there are such arguments, or a closure that cannot be called; shows what the step takes.
    """
    for optimizer in base.parts if isinstance(base, Chain) else (base,):
        name, signature = type(optimizer).__name__, _signature_of_step(optimizer)
        try:
            closure = signature.bind(*args, **kwargs).arguments.get("closure") if signature else None
        except TypeError as error:
            raise TypeError(
                f"step() cannot hand on its arguments, since {name}.step{signature} does not take them: {error}"
            ) from None
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be None or a function to call, got a {type(closure).__name__}")


def _signature_of_step(optimizer: Any) -> inspect.Signature | None:
    """None where it is not known, as of a step that is not written in Python."""
    try:
        signature = inspect.signature(optimizer.step)
    except ValueError:
        return None
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name == "self":  # as of the function that a scheduler sets on the instance
        return signature.replace(parameters=parameters[1:])
    return signature


class _Step:
    """One step: what was done in it, and the parameters as it found them, if they may have to be put back.

    Args:
        base: the optimizer that takes it.
        clipper: clips the gradients of each evaluation.
        may_move: whether the parameters may move before an evaluation, with an optimizer that is not known not to.
        kernels: of the optimizer, if it steps at the end of this.
    """

    def __init__(self, base: Any, clipper: ZClip, may_move: bool = True, kernels: Kernels | None = None) -> None:
        choices(base.param_groups)  # before the optimizer may have moved its parameters
        self.base, self.clipper, self.kernels = base, clipper, kernels
        self.is_watched = type(base) not in STAY_PUT
        needs_copy = may_move and self.is_watched and clipper.config.can_skip
        self.start = Snapshot(base.param_groups) if needs_copy else None
        self.evaluations = 0
        self.error: NonFiniteGradientError | None = None
        self.must_go_back = self.is_over = False

    def clip(self, moved: bool) -> bool:
        """Clip the gradients of an evaluation; whether the optimizer is to go on, with zero gradients at worst."""
        is_first, groups = not self.evaluations, self.base.param_groups
        self.evaluations += 1
        try:
            if self.clipper._clip(groups, new_step=is_first, kernels=self.kernels):
                return True
        except NonFiniteGradientError as error:
            self.error = error
        if moved:
            self.must_go_back = True
            zero_gradients_(collect_gradients(groups))
        return moved

    def end(self) -> None:
        """Put the parameters back, if an evaluation was refused after they had moved, and drop what was kept for it.

        Raises:
            NonFiniteGradientError: of the last evaluation that raised it.
        """
        start, error, must_go_back = self.start, self.error, self.must_go_back
        self.start, self.error, self.must_go_back, self.is_over = None, None, False, True
        if must_go_back and start is not None:
            start.put_back()
        elif must_go_back:
            self.clipper._health.warn(
                "moved",
                f"a NaN or infinite norm met {type(self.base).__name__} where it had moved the parameters to, for a "
                "further evaluation; it had not done so before, or was copied in the middle of the step, so there is "
                "no copy, and they stay there",
            )
        if error is not None:
            raise error

    def __getstate__(self) -> dict[str, Any]:
        """Without the parameters, which would be in it twice."""
        return {**self.__dict__, "start": None}


class Snapshot:
    """Parameters as they are now."""

    def __init__(self, param_groups: ParamGroups) -> None:
        self.values = [(p, p.detach().clone()) for group in param_groups for p in group["params"]]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them that again."""
        for p, value in self.values:
            p.copy_(value)


class _ClippingClosure:
    """A closure that clips the gradients it leaves behind.

    That the optimizer moves the parameters (SAM always, LBFGS from its second evaluation on), their version counters
    tell, which torch does not count up for a DTensor that a foreach or fused operation alone writes to: such a step is
    left where it was.
    """

    def __init__(self, step: _Step, closure: Callable[[], Any]) -> None:
        self.step, self.closure = step, closure
        self.versions = self._versions()
        self.moved = False

    def __call__(self) -> Any:
        self.moved |= self._versions() != self.versions
        with torch.enable_grad():
            loss = self.closure()
        self.versions = self._versions()  # a closure may write to parameters as well
        if not self.step.clip(self.moved):
            raise self.step.error or _SkipStep(loss)
        return loss

    def _versions(self) -> list[int]:
        groups = self.step.base.param_groups if self.step.is_watched else ()
        return [p._version for group in groups for p in group["params"]]


class _SkipStep(Exception):  # noqa: N818
    """Leaves the base optimizer's step from within its closure."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
