"""The figure of a spike: the loss and the gradient norm of one run, without clipping and with ZClip."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.report.plots import STYLE
from benchmarks.training.methods import METHODS
from zclip_optim import NormStats, ZClipConfig, decide

BEFORE, SHOWN = 300, 700  # steps: before the spike, and in all
LENGTH = 50  # steps after a spike's first one, among which is its peak
DPI, PALETTE = 200, 64  # twice what a page of 800 pixels shows; colors, few of which make a small file
RULE = ZClipConfig(**METHODS["paper"].options)

Steps = Mapping[str, Sequence[float]]  # losses and grad_norms, one for each step


@dataclass(frozen=True)
class Theme:
    """Colors for pages of one brightness; its two lines are told apart by the colour-blind too."""

    background: str
    ink: str
    without: str
    zclip: str

    @property
    def style(self) -> dict[str, object]:
        """For matplotlib, with type that can be read on a phone."""
        grounds = dict.fromkeys(("figure.facecolor", "axes.facecolor"), self.background)
        inks = dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), self.ink)
        return STYLE | grounds | inks | {"font.size": 14, "axes.xmargin": 0.01, "ytick.minor.size": 0}


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d55e00", "#0072b2"),
    "dark": Theme("#0d1117", "#d1d7e0", "#f0883e", "#58a6ff"),
}


def save_spike(without: Steps, zclip: Steps, spike: int, unit: str, folder: Path) -> list[str]:
    """Writes `spike_figure` in every theme and returns the names: spike-light.png, spike-dark.png."""
    names = []
    for name, theme in THEMES.items():
        names.append(f"spike-{name}.png")
        with mpl.rc_context(theme.style), io.BytesIO() as png:
            spike_figure(without, zclip, spike, unit, theme).savefig(png, dpi=DPI)
            Image.open(png).convert("RGB").quantize(PALETTE).save(folder / names[-1], optimize=True)
    return names


def spike_figure(without: Steps, zclip: Steps, spike: int, unit: str, theme: Theme) -> Figure:
    """The losses above; below the norms, and the threshold above which ZClip scales a step down.

    Args:
        without: the run without clipping.
        zclip: the same run with ZClip, by RULE.
        spike: the index of the step around which they are shown.
        unit: of the losses.
        theme: the colors.
    """
    start = max(RULE.warmup_steps, spike - BEFORE)
    shown = slice(start, start + SHOWN)
    steps = np.arange(len(without["losses"])) + 1
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    losses, norms = figure.subplots(2, sharex=True)
    for axes, key in ((losses, "losses"), (norms, "grad_norms")):
        axes.semilogy(steps[shown], without[key][shown], color=theme.without, linewidth=1.6)
        axes.semilogy(steps[shown], zclip[key][shown], color=theme.zclip, linewidth=1.6)
    thresholds = spike_thresholds(zclip["grad_norms"])
    norms.semilogy(steps[shown], thresholds[shown], color=theme.ink, linewidth=1.6, linestyle="--")

    peak = spike + int(np.argmax(without["losses"][spike : spike + LENGTH]))
    beside = {"textcoords": "offset points", "fontweight": "bold"}
    at_peak, at_start = (steps[peak], without["losses"][peak]), (steps[start], zclip["losses"][start])
    losses.annotate("without\nclipping", at_peak, (10, 0), va="top", color=theme.without, **beside)
    losses.annotate("with ZClip", at_start, (0, 10), color=theme.zclip, **beside)
    text, at_start = "threshold:\nnorms above it\nare scaled down", (steps[start], thresholds[start])
    norms.annotate(text, at_start, (0, 10), color=theme.ink, **beside)
    losses.set_ylabel(f"training loss\n({unit})")
    norms.set(ylabel="gradient norm\n(L2)", xlabel="step")
    return figure


def spike_thresholds(norms: Sequence[float]) -> list[float]:
    """The norm above which each step is a spike; NaN in warm-up."""
    stats, found = NormStats(), []
    for norm in norms:
        sigma = math.sqrt(stats.var) + RULE.eps * stats.mean
        found.append(stats.mean + RULE.z_thresh * sigma if stats.step >= RULE.warmup_steps else math.nan)
        stats = decide(float(norm), stats, RULE).stats
    return found
