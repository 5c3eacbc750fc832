"""The failures that people meet: warnings, each kind once per run and without a word in between, and an error."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from zclip_optim.algorithm import NormStats, ZClipConfig
from zclip_optim.gradients import Gradients, ParamGroups
from zclip_optim.metrics import ranked
from zclip_optim.param_groups import Turns, is_gone_through
from zclip_optim.state import StepRecord

WINDOW = 200  # steps
HIGH_CLIP_RATE = 0.2
NO_SPREAD = 1e-5  # relative; below it norms are equal but for rounding
NOTHING = math.ulp(0.0)  # smaller than any norm but 0
EQUAL_SHARE = 0.2  # of the norms of a window, which are equal to the largest one
WITHOUT_GRADIENTS = 20  # steps in a row
LARGEST = 3  # parameters that a warning names
CLIPPED_BEFORE, CLIP_RATE, TURNS = "clipped before", "clip rate", "turns"
HIDDEN = (
    "were clipped before they got here, which hides every spike. Turn that clipping off (a trainer's max_grad_norm or "
    "gradient_clip_val, clip_grad_norm_ in a loop)"
)


class ZClipWarning(UserWarning):
    """Something about the gradients or the settings makes adaptive clipping less useful than it could be.

    Each kind is given once per run; a `load_state_dict` begins another one. Kinds:

    - more than a fifth of 200 steps or more were spikes; it names the parameters with the largest norms;
    - the norms of the warm-up differed by more than their mean, which blinds the test for hundreds of steps;
    - `patience` has run out, and the statistics begin to rise;
    - every norm of the warm-up, or a fifth of 200, was equal to the largest: something else clips before;
    - half of `max_consecutive_nonfinite` steps in a row were not finite;
    - no parameter had a gradient at 20 steps in a row;
    - a closure was not called;
    - the statistics in the param groups at construction were not whole, or do not get into the state dict;
    - a `ZClip` was given several sets of parameters in turn, or an iterator that is gone through;
    - in trainers: the trainer's own clipping is on, or an optimizer was never asked to step.
    """


class NonFiniteGradientError(FloatingPointError):
    """The gradient norm was NaN or infinite, and `nonfinite` or `max_consecutive_nonfinite` says to stop."""


def nonfinite_error(norm: float, record: StepRecord, where: str) -> NonFiniteGradientError:
    """The error of a norm that is not finite, or that is too large for statistics."""
    reason = f"gradients with NaN or infinite elements: {where or 'none in this process'}"
    if math.isfinite(norm):
        reason = "its square overflows"
    return NonFiniteGradientError(
        f"the gradient norm is {norm}, after {record.decision.stats.step} finite steps, for {record.nonfinite_streak} "
        f"in a row; {reason}"
    )


def must_stop(record: StepRecord, config: ZClipConfig) -> bool:
    """Whether a step that was not taken is to raise that error."""
    limit = config.max_consecutive_nonfinite or math.inf
    return bool(record.failed and (config.nonfinite == "raise" or record.nonfinite_streak >= limit))


class Health:
    """Watches the records go by: of every step, or, on an accelerator, of those after which they were read.

    Args:
        config: hyperparameters.
        records: where it starts from, one per scope.
    """

    def __init__(self, config: ZClipConfig, records: Sequence[StepRecord]) -> None:
        self.config = config
        self._warmup = config.warmup_steps
        self._patience = math.inf if config.patience is None else config.patience
        self.restart(records)

    def restart(self, records: Sequence[StepRecord]) -> None:
        """Another run begins with these records: every warning can be given again."""
        self._said: set[str] = set()
        self._turns = Turns()
        self.missing = 0  # steps in a row at which no parameter had a gradient
        self.go_on_from(records)

    def go_on_from(self, records: Sequence[StepRecord]) -> None:
        """What comes next is to be compared with these records, as those of another checkpoint or of more scopes."""
        self._seen = records
        self._window_starts = [record.decision.stats for record in records]
        self._next_check = [self._next_step_to_check(i, stats) for i, stats in enumerate(self._window_starts)]
        self._largest = [NOTHING] * len(records)  # norm of the window, but for rounding
        self._as_large = [0] * len(records)  # norms equal to it

    def check(self, records: Sequence[StepRecord], gradients: Gradients | None = None) -> None:
        """Warn if what has happened since the records that were checked before gives reason to.

        Args:
            records: one per scope.
            gradients: those of the step, if they are at hand: a warning can then name parameters.
        """
        if records is self._seen:
            return
        for scope, record in enumerate(records):
            new = record.decision.stats
            if record.norm >= self._largest[scope] and new.step > record.before.step:
                self._count_largest(scope, record.norm)
            if new.step >= self._next_check[scope] or new.streak > self._patience:
                self._check_scope(scope, self._seen[scope].decision.stats, new, gradients)
        if records[0].failed:
            self._check_nonfinite(records[0].nonfinite_streak)
        self._seen = records

    def _count_largest(self, scope: int, norm: float) -> None:
        if norm * (1 - NO_SPREAD) > self._largest[scope] * (1 + NO_SPREAD):
            self._largest[scope], self._as_large[scope] = norm * (1 - NO_SPREAD), 0
        self._as_large[scope] += 1

    def _check_scope(self, scope: int, old: NormStats, new: NormStats, gradients: Gradients | None) -> None:
        if old.step < self._warmup <= new.step:
            self._check_warm_up(scope, new)
        if old.streak <= self._patience < new.streak:
            self._warn_of_regime(scope, new)
        if new.step - self._window_starts[scope].step >= WINDOW:
            self._check_clip_rate(scope, new, gradients)
        self._next_check[scope] = self._next_step_to_check(scope, new)

    def _next_step_to_check(self, scope: int, now: NormStats) -> int:
        """The step that ends the warm-up or the window, whichever is first."""
        end_of_window: int = self._window_starts[scope].step + WINDOW
        return min(self._warmup, end_of_window) if now.step < self._warmup else end_of_window

    def check_given(self, given: Any, param_groups: ParamGroups) -> None:
        """Warn of parameters that are none, or now these, now those, which have norms of another kind.

        Args:
            given: to `ZClip.step`.
            param_groups: made of it.
        """
        if is_gone_through(given, param_groups):
            self.warn(
                "gone through",
                "ZClip.step() was given an iterator, such as model.parameters(), that is gone through by now: nothing "
                "is clipped. Give it the model, or a list",
            )
        if TURNS not in self._said and not torch.compiler.is_compiling() and self._turns.has_come_back(param_groups):
            self.warn(
                TURNS,
                "this ZClip clips several sets of parameters in turn, such as the two networks of a GAN, and compares "
                "the norms of each with those of the others: spikes pass, or ordinary steps are clipped. Make a ZClip "
                "for each of them",
            )

    def count_missing(self, missing: bool | None) -> None:
        """Count a step, if no parameter had a gradient at it.

        Args:
            missing: None if none had one in this process and only the device knows of the other ranks; then the warning
                comes when the records are read.
        """
        self.missing = 0 if missing is False else self.missing + 1
        if missing:
            self._check_missing()

    def check_when_read(self, records: Sequence[StepRecord]) -> None:
        """`check` records that were read from a device, and what could not be known before."""
        self.check(records)
        if self.missing and not any(record.norm for record in records):
            self._check_missing()

    def _check_missing(self) -> None:
        if self.missing >= WITHOUT_GRADIENTS:
            self.warn(
                "missing",
                f"no parameter of this optimizer had a gradient at the last {self.missing} steps: nothing is clipped. "
                "If parameters were replaced or frozen after the optimizer was made (PEFT, to_empty, new layers), make "
                "and wrap it after that; if gradients are used up within backward (LOMO, a hook) or set to None before "
                "step(), there is nothing to clip here",
            )

    def _check_warm_up(self, scope: int, new: NormStats) -> None:
        if self._warmup > 1 and new.var**0.5 <= NO_SPREAD * new.mean:
            self.warn(
                CLIPPED_BEFORE,
                f"all {self._warmup} gradient norms of the warm-up{self._where(scope)} were {new.mean:.4g}: probably "
                f"they {HIDDEN}",
            )
        if self.config.lookback is None and new.var > new.mean**2:
            self.warn(
                "start",
                f"the gradient norms of the warm-up{self._where(scope)} differ by more than their mean (mean "
                f"{new.mean:.4g}, std {new.var**0.5:.4g}): nothing counts as a spike for hundreds of steps. "
                "lookback=0.1 weighs the last norms more",
            )

    def _warn_of_regime(self, scope: int, new: NormStats) -> None:
        self.warn(
            "regime",
            f"more than patience={self.config.patience} spikes in a row{self._where(scope)}, at step {new.step}: "
            f"until a step is none, mean and std, now {new.mean:.4g} and {new.var**0.5:.4g}, rise twofold in 1,000 "
            "steps, and gradients are still clipped. If the run is diverging, lower the learning rate",
        )

    def _check_largest(self, scope: int, steps: int) -> None:
        """At the end of a window, whether a maximum was held."""
        largest, self._largest[scope] = self._largest[scope] / (1 - NO_SPREAD), NOTHING
        equal, self._as_large[scope] = self._as_large[scope], 0
        if equal > EQUAL_SHARE * steps:
            self.warn(
                CLIPPED_BEFORE,
                f"{equal} of the last {steps} gradient norms{self._where(scope)} were {largest:.4g}, and none was "
                f"larger: probably they {HIDDEN}",
            )

    def _check_clip_rate(self, scope: int, new: NormStats, gradients: Gradients | None) -> None:
        """At the end of a window, where the next one starts."""
        start, self._window_starts[scope] = self._window_starts[scope], new
        steps, spikes = new.step - start.step, new.spike_steps - start.spike_steps
        self._check_largest(scope, steps)
        if spikes > HIGH_CLIP_RATE * steps and CLIP_RATE not in self._said:
            self.warn(
                CLIP_RATE,
                f"{spikes} of the last {steps} steps{self._where(scope)} were clipped, at step {new.step}: the "
                f"learning rate may be too high, or z_thresh={self.config.z_thresh:.3g} too low for the spread of "
                f"these norms (mean {new.mean:.4g}, std {new.var**0.5:.4g}); "
                f"{self._largest_parameters(scope, new, gradients)}{self._advice()}",
            )

    def _largest_parameters(self, scope: int, new: NormStats, gradients: Gradients | None) -> str:
        """Of a step that was clipped, in this process: ranks that do not warn would not join a collective."""
        if gradients is None or not any(gradients.scopes[scope]) or not new.streak:
            return "norms_by_parameter() after a clipped step names the parameters with the largest norms"
        norms = ranked(gradients.norms_here(gradients.scopes[scope]), LARGEST)
        where = "" if gradients.are_all_here else " in this process"
        return f"largest in this step{where}: " + ", ".join(f"{each.name} {each.share:.0%}" for each in norms)

    def _advice(self) -> str:
        if self.config.patience is not None:
            return ""
        return (
            ". Or they have risen for good: with an optimizer whose steps are as long as its gradients, like SGD, that "
            "amounts to a lower learning rate, and patience=200 lets the statistics follow slowly"
        )

    def _where(self, scope: int) -> str:
        return f" in param group {scope}" if self.config.scope == "group" else ""

    def _check_nonfinite(self, streak: int) -> None:
        """Whether a streak of norms that are not finite has come half way to the limit."""
        limit = self.config.max_consecutive_nonfinite
        if self.config.nonfinite == "skip" and limit is not None and limit > 1 and streak >= (limit + 1) // 2:
            self.warn(
                "nonfinite",
                f"the gradient norm was NaN or infinite for {streak} steps in a row, which were skipped; at "
                f"max_consecutive_nonfinite={limit} NonFiniteGradientError is raised and names the parameters",
            )

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, ZClipWarning, stacklevel=_stacklevel_of_caller())


def _stacklevel_of_caller() -> int:
    """The stacklevel, as seen from `warn`, of the first frame that is neither this package's nor torch's."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
