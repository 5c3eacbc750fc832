"""Rows of a comparison: for each workload and method the figures of every seed, as they stand in NAME.json."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.evidence.paired import Difference, difference
from benchmarks.evidence.workloads import Comparison, Workload
from benchmarks.options import positive_int
from benchmarks.paper.runner import add_runner_options, load_finished
from benchmarks.report.summary import heading
from benchmarks.training.contenders import Contender
from benchmarks.training.methods import METHODS

PACKAGES = ("zclip", "autoclip", "pytorch_optimizer", "scikit-learn", "gymnasium", "numpy", "scipy")

Row = Mapping[str, Any]


def add_comparison_options(parser: argparse.ArgumentParser, comparison: Comparison) -> None:
    """What both commands take."""
    architectures = list(dict.fromkeys(workload.architecture for workload in comparison.workloads))
    parser.add_argument("--workloads", nargs="+", choices=architectures, help="these alone, instead of all")
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="these alone, named as in the tables")
    parser.add_argument("--seeds", type=positive_int, help="of each workload, instead of its own number")
    parser.add_argument("--steps", type=positive_int, help="of each run, instead of the workload's")
    add_runner_options(parser)


def chosen(args: argparse.Namespace, comparison: Comparison) -> Comparison:
    """The comparison that the options ask for."""
    labels = {contender.label for contender in comparison.contenders}
    for label in args.methods or ():
        if label not in labels:
            raise UserError(f"--methods {label!r}: not one of {', '.join(map(repr, sorted(labels)))}")
    return comparison.of(args.workloads, args.methods).resized(args.seeds, args.steps)


def rows_of(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """A row for each workload and method."""
    return [row_of(workload, contender, folder) for workload, contender in comparison.pairs()]


def row_of(workload: Workload, contender: Contender, folder: Path) -> dict[str, Any]:
    """Its cells and their figures: every number in their outcomes."""
    cells = [workload.cell(contender, seed) for seed in workload.seeds_of(contender)]
    outcomes = [load_finished(cell, folder) for cell in cells]
    names = [name for name, value in outcomes[0].items() if isinstance(value, int | float)]
    return {
        "workload": workload.label,
        "method": contender.label,
        "unit": cells[0].unit,
        "scale_free": workload.scale_free,
        "architecture": workload.architecture,
        "condition": workload.condition,
        "lr": workload.lr,
        "steps": workload.steps,
        "batch": workload.batch,
        "preset": workload.preset,
        "beta2": workload.beta2,
        "muon": workload.muon,
        "settings": METHODS[contender.method].with_options(dict(contender.options)).settings,
        "cells": [cell.name for cell in cells],
        "values": {name: [outcome[name] for outcome in outcomes] for name in names},
    }


def result_of(name: str, comparison: Comparison, args: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """What ran, on what, and how to run one cell again."""
    seeds = sorted({seed for w, c in comparison.pairs() for seed in w.seeds_of(c)})
    return heading(name, seeds, *PACKAGES) | {
        "workers": args.workers,
        "data": [str(path) for path in args.data] or "what comes with the workload",
        "cell_command": f"python -m benchmarks {name} --cell NAME",
        "cell_seconds": math.fsum(second for row in rows for second in row["values"]["seconds"]),
        "rows": list(rows),
    }


def known(values: Sequence[float | None]) -> list[float]:
    """The values that are finite numbers; JSON has null for the others."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def mean_and_spread(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """Mean and standard deviation over the seeds."""
    found = known(values)
    if not found:
        return "-"
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{form.format(statistics.fmean(found))} ± {form.format(spread)}"


def difference_of(row: Row, other: Row, key: str = "measure") -> Difference:
    """Of two rows of one workload."""
    values, others = ([math.nan if v is None else v for v in each["values"][key]] for each in (row, other))
    return difference(values, others)


def by_workload(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows of each workload by method, in order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row["method"]] = row
    return found


def method_lines(
    rows: Sequence[Row], show: Callable[[Row], str], title: Callable[[Row], str] = itemgetter("workload")
) -> list[dict[str, str]]:
    """A line for each method, a column for each workload; "-" where it was not run."""
    titles = dict.fromkeys(map(title, rows))
    lines = {row["method"]: {"method": row["method"]} | dict.fromkeys(titles, "-") for row in rows}
    for row in rows:
        lines[row["method"]][title(row)] = show(row)
    return list(lines.values())
