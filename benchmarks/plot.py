"""Draws runs from their JSON lines, as `train`, `sweep` and `compare` write them.

Writes to --out overview.png, the loss of all and the gradient norm of each, and normality.png, whether the norms are
normally distributed, which a z-score takes them to be; prints the tests of that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import UserError
from benchmarks.options import add_out_option, prepare_folder
from benchmarks.report.figures import FIGURES, labelled, normality_table, save
from benchmarks.report.records import read_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs, and where the figures go."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.jsonl", help="one line of JSON per step")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run, instead of its method's name")
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Reads the runs and draws them."""
    if args.labels is not None and len(args.labels) != len(args.runs):
        raise UserError(f"--labels: {len(args.labels)} for {len(args.runs)} runs")
    runs = labelled([read_records(path) for path in args.runs], args.labels)
    prepare_folder(args.out)
    for name, draw in FIGURES.items():
        save(draw, runs, args.out / f"{name}.png")
    print(normality_table(runs))
    print(f"\nwritten to {args.out}: {', '.join(f'{name}.png' for name in FIGURES)}")
