"""The figures of runs, one for each question, by name in FIGURES, and the table of the tests of normality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.plots import COLORS, STYLE, corrupted_steps, loss_panel, mark_corrupted, norm_panel, running_mean
from benchmarks.report.summary import FINAL, final_loss, markdown, steps_to_loss
from benchmarks.training.methods import METHODS
from benchmarks.training.run import StepRecord

Runs = Mapping[str, Sequence[StepRecord]]  # by label
Draw = Callable[[Runs], Figure]

WINDOW = 100  # steps: of the share of clipped steps, and of each sample of norms
SAMPLE_STARTS = {"early": 0.2, "mid": 0.5}  # share of the run at which a sample of norms starts
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
    first = None
    for column, (color, (label, records)) in enumerate(zip(cycle(COLORS), runs.items(), strict=False)):
        axes = figure.add_subplot(grid[1, column], sharey=first)
        first = first or axes
        norm_panel(axes, label, records, color)
    return figure


def loss_figure(runs: Runs) -> Figure:
    """The training loss of all runs (Figure 1)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_panel(figure.subplots(), runs)
    return figure


def norm_figure(runs: Runs) -> Figure:
    """Each run's norm before and after clipping, with the threshold (Figures 5 to 7)."""
    figure = Figure(figsize=(10, 2.6 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, color, (label, records) in zip(panels, cycle(COLORS), runs.items(), strict=False):
        norm_panel(axes, label, records, color)
    return figure


def tokens_figure(runs: Runs) -> Figure:
    """The loss over the tokens seen, and where each run gets down to the baseline's final loss (Figure 4)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    baseline = next(iter(runs))
    target = final_loss(runs[baseline])
    axes.axhline(target, color="black", linewidth=0.9, linestyle="--", label=f"final loss of {baseline}")
    for color, (label, records) in zip(cycle(COLORS), runs.items(), strict=False):
        clean = [r for r in records if r.corrupted is None]
        means = running_mean([r.loss for r in clean], FINAL)[FINAL - 1 :]
        reached = tokens_to_loss(records, target)
        told = f"{label}: {reached:,.0f} tokens" if math.isfinite(reached) else f"{label}: not reached"
        axes.plot([r.tokens for r in clean[FINAL - 1 :]], means, color=color, linewidth=1.5, label=told)
        axes.plot(reached, target, "o", color=color, markersize=6)
    axes.set(
        title=f"Tokens to the final loss of {baseline}",
        xlabel="tokens",
        ylabel=f"loss (nats), mean of {FINAL}",
    )
    axes.legend(frameon=False)
    return figure


def tokens_to_loss(records: Sequence[StepRecord], target: float) -> float:
    """Tokens seen when the mean of FINAL losses is down at `target` for good; NaN if it never is."""
    step = steps_to_loss(records, target)
    return next((float(r.tokens) for r in records if r.step == step), math.nan)


def clipped_figure(runs: Runs) -> Figure:
    """The share of the last WINDOW steps that were clipped."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    for color, (label, records) in zip(cycle(COLORS), runs.items(), strict=False):
        shares = running_mean([100.0 * r.clipped for r in records], WINDOW)
        axes.plot([r.step for r in records], shares, color=color, linewidth=1.5, label=label)
    mark_corrupted(axes, corrupted_steps(runs))
    axes.set(title=f"Clipped steps among the last {WINDOW}", xlabel="step", ylabel="percent")
    axes.legend(frameon=False, ncols=len(runs) + 1)
    return figure


def statistics_figure(runs: Runs) -> Figure:
    """The running mean and standard deviation, of the methods that keep them."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("mean", "std"), strict=True):
        for color, (label, records) in zip(cycle(COLORS), runs.items(), strict=False):
            values = [getattr(r, name) for r in records]
            if any(map(math.isfinite, values)):
                axes.semilogy([r.step for r in records], values, color=color, linewidth=1.2, label=label)
        axes.set(title=f"Running {name} of the norm", xlabel="step", ylabel="gradient norm (L2)")
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def normality_figure(runs: Runs) -> Figure:
    """Histogram and Q-Q plot of two samples of each run's norms, with Shapiro-Wilk's test (Figure 9)."""
    figure = Figure(figsize=(10, 2.4 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 2 * len(SAMPLE_STARTS), squeeze=False)
    for row, color, (label, records) in zip(panels, cycle(COLORS), runs.items(), strict=False):
        for index, (when, norms) in enumerate(samples(records).items()):
            row[2 * index].hist(norms, bins=20, color=color)
            row[2 * index].set_title(f"{label}, {when}: norms", fontsize=8)
            quantile_panel(row[2 * index + 1], norms, color)
    return figure


def quantile_panel(axes: Axes, norms: Sequence[float], color: str) -> None:
    """The norms against the quantiles of a normal distribution; a straight line means normal."""
    from scipy import stats

    if len(norms) < SMALLEST_SAMPLE:
        return
    (theory, ordered), (slope, intercept, _) = stats.probplot(norms)
    axes.plot(theory, ordered, ".", color=color, markersize=3)
    axes.plot(theory, slope * theory + intercept, color="black", linewidth=0.8)
    w, p = shapiro_wilk(norms)
    axes.set_title(f"Q-Q, W = {w:.3f}, p = {p:.2g}", fontsize=8)


def samples(records: Sequence[StepRecord]) -> dict[str, list[float]]:
    """The finite norms of clean batches in WINDOW steps, early and in the middle of the run."""
    found = {}
    for when, share in SAMPLE_STARTS.items():
        start = round(share * len(records))
        part = [r for r in records[start : start + WINDOW] if r.corrupted is None]
        found[when] = [r.grad_norm for r in part if math.isfinite(r.grad_norm)]
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


def throughput_figure(runs: Runs) -> Figure:
    """Tokens per second of each run: the median step, and the middle half of the steps."""
    figure = Figure(figsize=(10, 0.6 * len(runs) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (color, (label, records)) in enumerate(zip(cycle(COLORS), runs.items(), strict=False)):
        rates = sorted(tokens_per_second(records))
        low, middle, high = (rates[int(share * (len(rates) - 1))] for share in (0.25, 0.5, 0.75))
        axes.barh(place, middle, color=color, xerr=[[middle - low], [high - middle]], label=label)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(
        title="Throughput with all that a record takes (overhead has the cost alone): median step, and the middle half",
        xlabel="tokens per second",
    )
    return figure


def tokens_per_second(records: Sequence[StepRecord]) -> list[float]:
    """Of every step."""
    pairs = pairwise(records) if len(records) > 1 else [(records[0], records[0])]
    return [1e3 * (after.tokens - before.tokens) / after.ms for before, after in pairs]


FIGURES: dict[str, Draw] = {
    "overview": overview_figure,
    "loss": loss_figure,
    "norms": norm_figure,
    "tokens": tokens_figure,
    "clipped": clipped_figure,
    "statistics": statistics_figure,
    "normality": normality_figure,
    "throughput": throughput_figure,
}
