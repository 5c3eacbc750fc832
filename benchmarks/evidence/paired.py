"""Differences of runs that share a seed, and their standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """Mean over the seeds of a measure's difference, its standard error, and the one in units of the other."""

    mean: float
    error: float
    pairs: int

    @property
    def units(self) -> float:
        """0 where no pair differs, NaN where the error is not known."""
        if self.mean == 0 and self.error == 0:
            return 0.0
        return self.mean / self.error if self.error > 0 else math.nan

    @property
    def normal(self) -> float:
        """The normal deviate that is as improbable as `units` is with so few pairs (Student's t)."""
        if math.isnan(self.units):
            return math.nan
        return math.copysign(float(stats.norm.isf(stats.t.sf(abs(self.units), self.pairs - 1))), self.units)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}" if math.isfinite(self.error) else f"{self.mean:+.3f}"


def difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """values - others for the first seeds, which both have; pairs in which one is not known are left out."""
    both = min(len(values), len(others))
    pairs = np.asarray(values[:both], float) - np.asarray(others[:both], float)
    pairs = pairs[np.isfinite(pairs)]
    if not len(pairs):
        return Difference(math.nan, math.nan, 0)
    error = float(stats.sem(pairs)) if len(pairs) > 1 else math.nan
    return Difference(float(pairs.mean()), error, len(pairs))


def combined(units: Sequence[float]) -> float:
    """Their sum over the square root of their number: again of variance 1 if each is."""
    known = [value for value in units if math.isfinite(value)]
    return math.fsum(known) / math.sqrt(len(known)) if known else math.nan
