"""The figures of runs, one for each question, by name in FIGURES, and the table of the tests of normality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.plots import COLORS, STYLE, loss_panel, norm_panel
from benchmarks.report.summary import markdown
from benchmarks.training.methods import METHODS
from benchmarks.training.run import StepRecord

Runs = Mapping[str, Sequence[StepRecord]]  # by label
Draw = Callable[[Runs], Figure]

LEGEND = 0.35  # of a norm panel's height, free for the legend
SAMPLE = 100  # steps, of each sample of norms
SAMPLE_STARTS = (0.2, 0.5)  # share of the run at which one begins
SMALLEST_SAMPLE = 3  # norms, that can be tested
SIGNIFICANT = 0.05


def save(draw: Draw, runs: Runs, path: Path) -> None:
    """Draws and writes one figure as a PNG."""
    with mpl.rc_context(STYLE):
        draw(runs).savefig(path, dpi=100)


def labelled(runs: Sequence[Sequence[StepRecord]], labels: Sequence[str] | None) -> dict[str, Sequence[StepRecord]]:
    """The runs by their labels, or by their methods'; a label that comes again gets a number."""
    found: dict[str, Sequence[StepRecord]] = {}
    for index, records in enumerate(runs):
        name = records[0].method
        label = labels[index] if labels else METHODS[name].label if name in METHODS else name
        found[f"{label} ({index + 1})" if label in found else label] = records
    return found


def overview_figure(runs: Runs) -> Figure:
    """The loss of all runs in one panel; below it each run's gradient norm before and after clipping."""
    figure = Figure(figsize=(max(10, 3.2 * len(runs)), 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(runs))
    loss_panel(figure.add_subplot(grid[0, :]), runs)
    axes = None
    for column, (color, (label, records)) in enumerate(zip(cycle(COLORS), runs.items(), strict=False)):
        axes = figure.add_subplot(grid[1, column], sharey=axes)
        norm_panel(axes, label, records, color)
        axes.label_outer()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** LEGEND)
    return figure


def normality_figure(runs: Runs) -> Figure:
    """Two samples of each run's norms against the quantiles of a normal distribution (Figure 9)."""
    figure = Figure(figsize=(3.4 * len(runs), 3.2 * len(SAMPLE_STARTS)), layout="constrained")
    panels = figure.subplots(len(SAMPLE_STARTS), len(runs), squeeze=False)
    for column, color, (label, records) in zip(panels.T, cycle(COLORS), runs.items(), strict=False):
        for axes, (when, norms) in zip(column, samples(records).items(), strict=False):
            axes.set_title(f"{label}, {when}")
            quantile_panel(axes, norms, color)
    return figure


def quantile_panel(axes: Axes, norms: Sequence[float], color: str) -> None:
    """The norms as points, which lie on the line if they are normal, and Shapiro-Wilk's test."""
    from scipy import stats

    axes.set(xlabel="normal quantile (standard deviations)", ylabel="gradient norm (L2)")
    if len(norms) < SMALLEST_SAMPLE:
        return
    (theory, ordered), (slope, intercept, _) = stats.probplot(norms)
    axes.plot(theory, ordered, ".", color=color, markersize=4)
    axes.plot(theory, slope * theory + intercept, color="black", linewidth=0.8)
    w, p = shapiro_wilk(norms)
    axes.text(0.05, 0.95, f"W = {w:.2f}\np = {p:.0e}", transform=axes.transAxes, va="top")


def samples(records: Sequence[StepRecord]) -> dict[str, list[float]]:
    """The finite norms of clean batches, by the steps that they are of."""
    found = {}
    for share in SAMPLE_STARTS:
        start = round(share * len(records))
        part = records[start : start + SAMPLE]
        norms = [r.grad_norm for r in part if r.corrupted is None and math.isfinite(r.grad_norm)]
        found[f"steps {part[0].step} to {part[-1].step}"] = norms
    return found


def shapiro_wilk(norms: Sequence[float]) -> tuple[float, float]:
    """The statistic W and its p-value; NaN for too few norms, or equal ones."""
    from scipy import stats

    if len(norms) < SMALLEST_SAMPLE or min(norms) == max(norms):
        return math.nan, math.nan
    result = stats.shapiro(norms)
    return float(result.statistic), float(result.pvalue)


def normality_table(runs: Runs) -> str:
    """Shapiro-Wilk's test of every sample, in Markdown."""
    rows: list[dict[str, Any]] = []
    for label, records in runs.items():
        for when, norms in samples(records).items():
            w, p = shapiro_wilk(norms)
            verdict = "-" if math.isnan(p) else "rejected" if p < SIGNIFICANT else "not rejected"
            rows.append(
                {"run": f"{label}, {when}", "norms": len(norms), "W": f"{w:.3f}", "p": f"{p:.2g}", "normal": verdict}
            )
    return markdown(rows)


FIGURES: dict[str, Draw] = {"overview": overview_figure, "normality": normality_figure}
