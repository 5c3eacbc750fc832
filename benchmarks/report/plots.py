"""The look that all figures share, and the panels of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes

from benchmarks.training.run import StepRecord

SMOOTH = 15  # clean steps in the running mean of the loss
COLORS = ("#7f7f7f", "#e07b00", "#1769c2", "#2a9d4a", "#c0392b", "#7d4fb3")
BEFORE, BAD = "#c27a7a", "#faeaea"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


def loss_panel(axes: Axes, runs: Mapping[str, Sequence[StepRecord]]) -> None:
    """Every run's loss on clean batches: each step thin, the running mean bold."""
    for color, (label, records) in zip(cycle(COLORS), runs.items(), strict=False):
        clean = [r for r in records if r.corrupted is None]
        steps, losses = [r.step for r in clean], [r.loss for r in clean]
        axes.plot(steps, losses, color=color, linewidth=0.6, alpha=0.45)
        axes.plot(steps, running_mean(losses, SMOOTH), color=color, linewidth=1.8, label=label)
    mark_corrupted(axes, corrupted_steps(runs))
    axes.set(
        title=f"Training loss on clean batches (thin: every step; bold: mean of {SMOOTH})",
        xlabel="step",
        ylabel="loss (nats)",
        xlim=step_range(runs.values()),
    )
    axes.legend(frameon=False, ncols=len(runs) + 1)


def norm_panel(axes: Axes, label: str, records: Sequence[StepRecord], color: str) -> None:
    """One run's gradient norm before and after clipping, and the threshold of the steps that are no spikes."""
    steps = [r.step for r in records]
    axes.semilogy(steps, plottable(r.grad_norm for r in records), color=BEFORE, linewidth=1, label="before clipping")
    axes.semilogy(steps, plottable(r.clipped_norm for r in records), color=color, linewidth=1, label="after clipping")
    ordinary = [r for r in records if not (r.clipped and math.isfinite(r.z_score))]  # a spike's is what it was cut to
    thresholds = plottable(r.threshold for r in ordinary)
    if any(map(math.isfinite, thresholds)):
        axes.semilogy([r.step for r in ordinary], thresholds, color="black", linewidth=0.9, label="threshold")
    mark_corrupted(axes, [r.step for r in records if r.corrupted], label=None)
    axes.set(title=f"{label}: gradient norm", xlabel="step", ylabel="gradient norm (L2)", xlim=step_range([records]))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def mark_corrupted(axes: Axes, steps: Sequence[int], label: str | None = "corrupted batch") -> None:
    """A light band at each corrupted step, one entry in the legend."""
    for index, step in enumerate(steps):
        axes.axvspan(step - 0.5, step + 0.5, color=BAD, linewidth=1, zorder=0, label=None if index else label)


def corrupted_steps(runs: Mapping[str, Sequence[StepRecord]]) -> list[int]:
    """The steps at which any run's batch was corrupted."""
    return sorted({r.step for records in runs.values() for r in records if r.corrupted})


def step_range(runs: Iterable[Sequence[StepRecord]]) -> tuple[int, int]:
    """The steps that some runs have, with one to spare on each side."""
    steps = [r.step for records in runs for r in (records[0], records[-1])]
    return min(steps) - 1, max(steps) + 1


def plottable(values: Iterable[float]) -> list[float]:
    """The values with a gap (NaN) where there is nothing to draw on a log axis."""
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values up to each one."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
