"""The look that all figures share, their panels, and the figure of `overhead`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overhead import Row
from benchmarks.run import StepRecord

SMOOTH = 15  # clean steps in the running mean of the loss
COLORS = ("#7f7f7f", "#e07b00", "#1769c2", "#2a9d4a", "#c0392b", "#7d4fb3")
BEFORE, BAD = "#d9a6a6", "#f7e3e3"
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
    """One run's gradient norm before and after clipping, and the threshold."""
    steps = [r.step for r in records]
    axes.semilogy(steps, plottable(r.grad_norm for r in records), color=BEFORE, linewidth=1, label="before clipping")
    axes.semilogy(steps, plottable(r.clipped_norm for r in records), color=color, linewidth=1, label="after clipping")
    thresholds = plottable(r.threshold for r in records)
    if any(map(math.isfinite, thresholds)):
        axes.semilogy(steps, thresholds, color="black", linewidth=0.9, label="threshold")
    mark_corrupted(axes, [r.step for r in records if r.corrupted], label=None)
    axes.margins(y=0.2)  # room for the legend
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


def overhead_figure(by_tensors: Sequence[Row], by_parameters: Sequence[Row], path: Path) -> None:
    """Every method's own cost against the number of tensors, and of parameters with the limit of one read.

    Args:
        by_tensors: rows of models that differ in the number of tensors.
        by_parameters: rows of models that differ in the size of the tensors.
        path: the PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        growth_panel(left, by_tensors, [row.tensors for row in by_tensors], "tensors of 1,024 elements")
        growth_panel(right, by_parameters, [row.parameters for row in by_parameters], "parameters, in 8 tensors")
        figure.savefig(path, dpi=100)


def growth_panel(axes: Axes, rows: Sequence[Row], sizes: Sequence[int], label: str) -> None:
    """Own cost of every method, and the time of one read, on log-log axes."""
    for color, method in zip(cycle(COLORS[2:]), rows[0].own_us if rows else (), strict=False):
        axes.loglog(sizes, plottable(row.own_us[method] for row in rows), "o-", color=color, markersize=3, label=method)
    axes.loglog(
        sizes, [row.read_us for row in rows], "--", color="black", linewidth=1, label="one sum over each gradient"
    )
    axes.set(title="Clipping's own cost per step", xlabel=label, ylabel="microseconds")
    axes.legend(frameon=False, fontsize=8)
