"""Spikes of a loss that goes on falling by orders of magnitude: against the median of the losses just before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 50  # losses before


@dataclass(frozen=True)
class SpikeRule:
    """A loss above `factor` times the median of the WINDOW before it and above `floor`, or one that is not finite.

    Of two that are less than `gap` steps apart the first alone counts.
    """

    factor: float
    floor: float = 0.0
    gap: int = 20

    def __str__(self) -> str:
        floor = f" and over {self.floor:g}" if self.floor else ""
        return f"a loss over {self.factor:g} times the median of the {WINDOW} before{floor}, {self.gap} steps apart"

    def steps(self, losses: Sequence[float]) -> list[int]:
        """The indices of the spikes."""
        values = np.nan_to_num(np.asarray(losses, dtype=float), nan=np.inf, posinf=np.inf)
        if len(values) <= WINDOW:
            return []
        median = np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW)[:-1], axis=1)
        ordinary = np.isfinite(values[WINDOW:]) & (values[WINDOW:] <= np.maximum(self.factor * median, self.floor))
        found: list[int] = []
        for index in (WINDOW + np.flatnonzero(~ordinary)).tolist():
            if not found or index - found[-1] >= self.gap:
                found.append(index)
        return found
