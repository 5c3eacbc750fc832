"""The faults: what each does to the gradients between backward and the method's step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from benchmarks.training.run import Injection

Parameters = Sequence[nn.Parameter]

BURST = 20  # steps
BURST_FACTOR = 20.0
RAMP = 1.02  # factor per step
GAP = 20  # steps without gradients, or with zero ones
DOWN = 10.0  # standard deviations, of the shift that is turned downwards


class Level(NamedTuple):
    """Mean and standard deviation of the norms before the fault, in gradient-norm units."""

    mean: float
    std: float

    @classmethod
    def of(cls, norms: Sequence[float]) -> Level:
        """Of these norms."""
        return cls(statistics.fmean(norms), statistics.pstdev(norms))

    def factor(self, deviations: float) -> float:
        """What a norm of `mean` must be multiplied by to stand so many standard deviations above it."""
        return 1 + deviations * self.std / self.mean


# Changes the gradients at the step that comes so many steps after the fault's first.
Change = Callable[[Parameters, int, Level], None]


@dataclass(frozen=True)
class Fault:
    """A row of the table; `duration` in steps, infinite for a fault that stays."""

    name: str
    label: str
    duration: float
    change: Change

    def at(self, first: int, level: Level) -> Injection:
        """The fault from step `first` (from 0) on."""

        def inject(step: int, parameters: Parameters) -> None:
            if 0 <= step - first < self.duration:
                self.change(parameters, step - first, level)

        return inject


def scale(parameters: Parameters, factor: float) -> None:
    """Multiplies every gradient."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def element(value: float) -> Change:
    """Sets one element of the gradient of the parameter in the middle of the model."""

    def change(parameters: Parameters, since: int, level: Level) -> None:
        gradient = parameters[len(parameters) // 2].grad
        if gradient is not None:
            gradient.view(-1)[0] = value

    return change


def multiple(factor: float) -> Change:
    """Multiplies the gradients by the same factor at every step."""
    return lambda parameters, since, level: scale(parameters, factor)


def shift(deviations: float) -> Change:
    """Lifts the level of the norm by so many of its standard deviations."""
    return lambda parameters, since, level: scale(parameters, level.factor(deviations))


def shift_down(parameters: Parameters, since: int, level: Level) -> None:
    """Divides by what the shift of DOWN standard deviations multiplies with: a norm cannot fall below 0."""
    scale(parameters, 1 / level.factor(DOWN))


def ramp(parameters: Parameters, since: int, level: Level) -> None:
    """Multiplies by RAMP once more at every step."""
    scale(parameters, RAMP ** (since + 1))


def missing(parameters: Parameters, since: int, level: Level) -> None:
    """Removes the gradients."""
    for parameter in parameters:
        parameter.grad = None


FAULTS = (
    Fault("control", "control: one step left out", 1, missing),
    Fault("nan", "NaN in one element", 1, element(math.nan)),
    Fault("inf", "+inf in one element", 1, element(math.inf)),
    Fault("-inf", "-inf in one element", 1, element(-math.inf)),
    Fault("spike_1e2", "spike, x 100", 1, multiple(1e2)),
    Fault("spike_1e6", "spike, x 1,000,000", 1, multiple(1e6)),
    Fault("burst", f"{BURST} spikes in a row, x {BURST_FACTOR:g}", BURST, multiple(BURST_FACTOR)),
    *(Fault(f"shift_{k}", f"level shift, {k} sigma up", math.inf, shift(k)) for k in (6, 10, 100, 1000)),
    Fault("shift_down", f"level shift down, 1 / ({DOWN:g} sigma up)", math.inf, shift_down),
    Fault("ramp", f"ramp, +{RAMP - 1:.0%} a step", math.inf, ramp),
    Fault("zero", f"zero gradients, {GAP} steps", GAP, multiple(0.0)),
    Fault("missing", f"missing gradients, {GAP} steps", GAP, missing),
)
