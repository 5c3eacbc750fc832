"""What it costs not to tune: every method with one setting for all workloads, against the best threshold for each.

People set one number, 1.0, for everything; the right number differs by orders of magnitude between workloads. Regret
is the measure of a method on a workload (validation loss, in nats) minus that of the best fixed threshold there, of
0.01, 0.1, 1, 10 and 100. The best is chosen with hindsight on the seeds shown, so that its own regret is zero and that
of every other a little too high. Where held-out data say nothing of the optimizer (regression, modular addition), the
measure is the logarithm of the mean loss of the last fifth; on CartPole that of the episodes to a mean return of 195:
those workloads count in the ranks, and not in the mean and the worst in nats. Cells that have ended are kept in
OUT/cells and not run again; `instability` and `sweep` share those that they have in common. A threshold above every
norm of the unclipped run is that run, and takes its outcome. Writes regret.json and regret.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.stats import rankdata

from benchmarks import UserError
from benchmarks.evidence.paired import Difference
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
from benchmarks.evidence.workloads import REGRET
from benchmarks.paper.cells import NATS, Cell, load_outcome, write_outcome
from benchmarks.paper.runner import prepare, rerun, run_cells
from benchmarks.report.pages import Result, bullets, document, write_result
from benchmarks.report.summary import markdown
from benchmarks.training.contenders import NONE

FIXED = [contender.label for contender in REGRET.contenders if contender.method == "fixed"]
CLOSE = 0.02  # nats
EPS = 1e-5  # clip_grad_norm_ adds 1e-6 to a norm, in float32
NOTES = (
    "regret: measure minus that of the best fixed threshold on the workload, mean over the seeds; below zero is better "
    "than every fixed threshold; ± standard error of the paired differences",
    f"mean and worst: over the workloads in nats that a method was run on; within {CLOSE:g}: on how many of them its "
    "regret is at most that many nats; rank: 1 is best, mean over all workloads, of the methods run on all of them",
    "a run that diverged, or whose validation loss is above that of a model that knows only how often each target "
    "occurs, counts with the loss of that model",
    "differences are over the seeds that both have: methods that decide nothing were run with fewer",
    "-: max_grad_norm=1 is advice for optimizers of Adam's kind alone; some workloads have some methods alone",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    add_comparison_options(parser, REGRET)


def run(args: argparse.Namespace) -> None:
    """Runs what has not ended yet, and writes and prints the tables."""
    comparison = chosen(args, REGRET)
    if not any(contender.label in FIXED for contender in comparison.contenders):
        raise UserError(f"--methods: regret is against the best of {', '.join(FIXED)}; give one of them at least")
    folder = prepare(args)
    if args.cell is not None:
        rerun("regret", comparison.cells(), args)
        return
    cells = comparison.cells()
    run_cells("regret, unclipped", [cell for cell in cells if cell.method == NONE.method], args)
    for cell in cells:
        take_over(cell, folder)
    run_cells("regret", cells, args)
    result = result_of("regret", comparison, args, rows_of(comparison, folder)) | {"notes": NOTES}
    write_result(args.out / "regret.json", result, page)
    print(*tables(result["rows"]), sep="\n\n")
    print(f"\nwritten to {args.out}: regret.json, regret.md")


def take_over(cell: Cell, folder: Path) -> None:
    """Writes the outcome of a run with a threshold that its unclipped twin never reached: it is that run."""
    if cell.method != "fixed" or load_outcome(cell, folder) is not None:
        return
    unclipped = replace(cell, method=NONE.method, options=())
    twin = load_outcome(unclipped, folder)
    if twin is not None and twin["largest_norm"] + EPS < dict(cell.options).get("max_norm", 1.0):
        figures = {name: value for name, value in twin.items() if name != "cell"}
        write_outcome(cell, folder, figures | {"clipped_share": 0.0, "seconds": 0.0, "same_as": unclipped.name})


def page(result: Result) -> str:
    """The tables, and what their words mean."""
    rows = result["rows"]
    return document(
        "regret: what it costs not to tune",
        result,
        *tables(rows),
        bullets(result["notes"]),
        f"{sum(len(row['cells']) for row in rows)} runs, {result['cell_seconds']:,.0f} s of one thread. One of them "
        f"again: `{result['cell_command']}`, with a NAME from the JSON.",
    )


def tables(rows: Sequence[Row]) -> tuple[str, ...]:
    """The methods over all workloads, their regret on each, and the measures themselves."""
    workloads = by_workload(rows)
    best = {name: best_fixed(methods) for name, methods in workloads.items()}
    whole, regrets = compared(rows)
    conditions = dict.fromkeys(row["condition"] for row in rows)
    return (
        f"Over the {len(whole)} workloads that every threshold was run on:",
        markdown([summary_line(name, whole, regrets) for name in dict.fromkeys(row["method"] for row in rows)]),
        *(
            section
            for condition in conditions
            for section in (
                f"Regret, {condition} (in brackets the best threshold):",
                markdown(regret_lines([row for row in rows if row["condition"] == condition], best, regrets)),
            )
        ),
        "Measure, mean ± standard deviation over the seeds (in brackets the ordinary norm without clipping):",
        markdown(measure_lines(rows, workloads)),
    )


def compared(rows: Sequence[Row]) -> tuple[dict[str, dict[str, Row]], dict[str, dict[str, Difference]]]:
    """The workloads that every threshold was run on, and the regret of each method on every workload."""
    workloads = by_workload(rows)
    tried = [name for name in FIXED if any(name in methods for methods in workloads.values())]
    whole = {name: methods for name, methods in workloads.items() if methods.keys() >= set(tried)}
    return whole, {name: regrets_on(methods, best_fixed(methods)) for name, methods in workloads.items()}


def best_fixed(methods: Mapping[str, Row]) -> str:
    """The threshold with the lowest mean."""
    means = mean_measures([row for name, row in methods.items() if name in FIXED])
    return min(means, key=means.__getitem__)


def mean_measures(rows: Sequence[Row]) -> dict[str, float]:
    """Of each method, over the seeds that all of these have."""
    seeds = min(len(row["values"]["measure"]) for row in rows)
    found = {row["method"]: known(row["values"]["measure"][:seeds]) for row in rows}
    return {name: statistics.fmean(values) if values else math.inf for name, values in found.items()}


def regrets_on(methods: Mapping[str, Row], best: str) -> dict[str, Difference]:
    """Of every method on one workload."""
    return {name: difference_of(row, methods[best]) for name, row in methods.items()}


def summary_line(
    name: str, workloads: Mapping[str, Mapping[str, Row]], regrets: Mapping[str, Mapping[str, Difference]]
) -> dict[str, str]:
    """One method over all workloads."""
    in_nats = [
        regrets[workload][name].mean
        for workload, methods in workloads.items()
        if name in methods and methods[name]["unit"] == NATS
    ]
    return {
        "method": name,
        "mean regret": f"{statistics.fmean(in_nats):+.3f}" if in_nats else "-",
        "worst": f"{max(in_nats):+.3f}" if in_nats else "-",
        f"within {CLOSE:g}": f"{sum(regret <= CLOSE for regret in in_nats)} of {len(in_nats)}",
        "mean rank": mean_rank(name, workloads),
    }


def mean_rank(name: str, workloads: Mapping[str, Mapping[str, Row]]) -> str:
    """Among the methods that were run everywhere."""
    everywhere = [other for other in next(iter(workloads.values())) if all(other in m for m in workloads.values())]
    if name not in everywhere:
        return "-"
    means = [mean_measures([methods[other] for other in everywhere]) for methods in workloads.values()]
    ranks = [rankdata(list(each.values()))[everywhere.index(name)] for each in means]
    return f"{statistics.fmean(ranks):.1f}"


def regret_lines(
    rows: Sequence[Row], best: Mapping[str, str], regrets: Mapping[str, Mapping[str, Difference]]
) -> list[dict[str, str]]:
    """A line for each method, a column for each workload with its unit and best threshold."""
    return method_lines(
        rows,
        lambda row: str(regrets[row["workload"]][row["method"]]),
        lambda row: f"{row['workload']}, {row['unit']} ({best[row['workload']].removeprefix('fixed ')})",
    )


def measure_lines(rows: Sequence[Row], workloads: Mapping[str, Mapping[str, Row]]) -> list[dict[str, str]]:
    """A line for each method, a column for each workload with its ordinary norm."""
    norms = {name: ordinary_norm(methods.get(NONE.label)) for name, methods in workloads.items()}
    return method_lines(
        rows,
        lambda row: mean_and_spread(row["values"]["measure"]),
        lambda row: f"{row['workload']} ({norms[row['workload']]})",
    )


def ordinary_norm(unclipped: Row | None) -> str:
    """The median over the seeds of a run's median norm."""
    norms = known(unclipped["values"]["median_norm"]) if unclipped else []
    return f"{statistics.median(norms):.1g}" if norms else "-"
