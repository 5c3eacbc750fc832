"""Spikes that come by themselves: no corrupted data, only Adam at a constant rate on problems that it fits ever better.

A full-batch regression at three rates, sums modulo 59 learned by a network with one hidden layer (beta2 0.95 and 0.98)
and by a transformer of one layer, and quotients modulo 97 by one of two layers at an ordinary rate. Whoever learns less
spikes less by a definition relative to the losses before, so that the absolute figures count as much: the mean and the
worst loss of the last fifth of the run, and the steps over a level. Cells that have ended are kept in OUT/cells and not
run again; `regret` shares those that it has in common.
Writes instability.json, instability.md and instability.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.results import (
    Row,
    add_comparison_options,
    by_workload,
    chosen,
    difference_of,
    known,
    mean_and_spread,
    method_lines,
    result_of,
    rows_of,
)
from benchmarks.evidence.workloads import INSTABILITY
from benchmarks.paper.cells import FIRST_SEED, FLOOR
from benchmarks.paper.runner import prepare, rerun, run_cells
from benchmarks.report.pages import Result, bullets, document, write_result
from benchmarks.report.spike import save_spike
from benchmarks.report.summary import markdown
from benchmarks.training.contenders import NONE, PAPER
from benchmarks.training.problems import PROBLEMS

DRAWN = "regression, lr 0.003"
NOTES = (
    "each figure: mean ± standard deviation over the seeds; mean loss of the last fifth: the geometric mean over the "
    f"seeds, each at least {FLOOR:g}, below which float32 rounds; worst loss: the median over the seeds",
    "log loss, paired: the logarithm of the mean loss of the last fifth minus that of the other method with the same "
    "seed, mean ± standard error; below zero is better",
    "none: the bare optimizer; fixed N: clip_grad_norm_ at N; zclip 1.0.0: the published package without its cap; "
    "paper: ZClipOptimizer as in the paper; the rest: the paper with these options; autoclip: the 90th "
    "percentile, the package's default, and the 10th, its paper's",
    *(
        f"{problem.label}: a spike is {problem.spike}; level: {problem.level:g}, after {problem.settled:.0%} of the run"
        for problem in PROBLEMS.values()
        if problem.by_training
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    add_comparison_options(parser, INSTABILITY)


def run(args: argparse.Namespace) -> None:
    """Runs what has not ended yet, and writes and prints the tables."""
    comparison = chosen(args, INSTABILITY)
    folder = prepare(args)
    if args.cell is not None:
        rerun("instability", comparison.cells(), args)
        return
    run_cells("instability", comparison.cells(), args)
    result = result_of("instability", comparison, args, rows_of(comparison, folder))
    write_result(args.out / "instability.json", result | {"notes": NOTES}, page)
    pictures = draw(result["rows"], folder, args.out)
    print(*overview(result["rows"]), sep="\n\n")
    print(f"\nwritten to {args.out}: {', '.join(('instability.json', 'instability.md', *pictures))}")


def page(result: Result) -> str:
    """The tables, the figure, and what their words mean."""
    rows = result["rows"]
    return document(
        "instability: spikes that come by themselves",
        result,
        *picture(rows),
        *overview(rows),
        *(section for name, methods in by_workload(rows).items() for section in (f"## {name}", detail(methods))),
        bullets(result["notes"]),
        f"{sum(len(row['cells']) for row in rows)} runs, {result['cell_seconds']:,.0f} s of one thread. One of them "
        f"again: `{result['cell_command']}`, with a NAME from the JSON.",
    )


def overview(rows: Sequence[Row]) -> tuple[str, ...]:
    """The two figures that matter most, of every method on every workload."""
    return (
        "Spikes per run:",
        markdown(method_lines(rows, lambda row: mean_and_spread(row["values"]["spikes"], "{:.1f}"))),
        "Mean loss of the last fifth of the run:",
        markdown(method_lines(rows, lambda row: f"{geometric_mean(row['values']['last_loss']):.1e}")),
    )


def detail(methods: Mapping[str, Row]) -> str:
    """Everything about one workload."""
    return markdown([detail_line(row, methods) for row in methods.values()])


def detail_line(row: Row, methods: Mapping[str, Row]) -> dict[str, str]:
    """One method's figures, and its paired differences from no clipping and from the paper."""
    values = row["values"]
    line = {
        "method": row["method"],
        "spikes": mean_and_spread(values["spikes"], "{:.1f}"),
        "mean loss, last fifth": f"{geometric_mean(values['last_loss']):.1e}",
        "worst loss, last fifth": f"{median(values['worst_last_loss']):.1e}",
        "steps over the level": mean_and_spread(values["steps_above"], "{:.1f}"),
        "clipped": mean_and_spread([100 * v for v in known(values["clipped_share"])], "{:.1f}") + "%",
        "skipped": f"{statistics.fmean(values['skipped_steps']):.1f}",
    }
    against = {f"log loss - {name}": methods.get(name) for name in (NONE.label, PAPER.label)}
    return line | {title: str(difference_of(row, other)) for title, other in against.items() if other is not None}


def geometric_mean(values: Sequence[float | None]) -> float:
    """Of the known values; NaN if there are none."""
    return statistics.geometric_mean(known(values) or [math.nan])


def median(values: Sequence[float | None]) -> float:
    """An unknown one, which was not finite, is the largest."""
    return statistics.median([math.inf if value is None else value for value in values])


def spiked(rows: Sequence[Row]) -> tuple[Row, Row, int] | None:
    """What is drawn: the rows without clipping and with ZClip, and the place of the first seed that spikes without."""
    methods = by_workload(rows).get(DRAWN, {})
    if not {NONE.label, PAPER.label} <= methods.keys():
        return None
    without, zclip = methods[NONE.label], methods[PAPER.label]
    return next(((without, zclip, index) for index, spikes in enumerate(without["values"]["spikes"]) if spikes), None)


def draw(rows: Sequence[Row], folder: Path, out: Path) -> list[str]:
    """The figure of that seed's first spike, if there is one; the names of its files."""
    found = spiked(rows)
    if found is None:
        return []
    without, zclip, index = found
    runs = [dict(np.load(folder / f"{row['cells'][index]}.npz")) for row in (without, zclip)]
    first = PROBLEMS[without["architecture"]].spike.steps(runs[0]["losses"])[0]
    return save_spike(*runs, first, "mean squared error", out)


def picture(rows: Sequence[Row]) -> list[str]:
    """The figure on the page, and what it shows."""
    found = spiked(rows)
    if found is None:
        return []
    without, zclip, index = found
    calm, kept = (f"{row['values']['spikes'].count(0)} of {len(row['cells'])}" for row in (without, zclip))
    share = zclip["values"]["clipped_share"][index]
    return [
        "![Loss and gradient norm around a spike, without clipping and with ZClip](spike-light.png)",
        f"{DRAWN}, seed {FIRST_SEED + index}, the first one that spikes without clipping: every step around the first "
        f"spike, norms before clipping. ZClip (the row {PAPER.label}) scales down {share:.1%} of this run's steps. "
        f"Without clipping {calm} seeds have no spike, with ZClip {kept}.",
    ]
