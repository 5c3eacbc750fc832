"""Trains a small language model without clipping, with fixed clipping and with ZClip, and compares the runs.

The text is real (by default the source of Python's standard library), and a few of its batches are corrupted.
Writes a figure (compare.png), every step of every run (METHOD.jsonl) and a summary (compare.json, compare.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.options import add_training_options, prepare_folder
from benchmarks.report.figures import overview_figure, save
from benchmarks.report.pages import Result, bullets, document, restored, setup, write_result
from benchmarks.report.progress import StepProgress
from benchmarks.report.records import line
from benchmarks.report.summary import (
    START,
    Summary,
    format_table,
    heading,
    notes,
    summarize,
)
from benchmarks.training.data import Batches
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.run import Run, StepRecord, TrainConfig

COMPARED = ("none", "fixed", "zclip_optim")
ABOUT_BETA2 = (
    "beta2 is 0.95, which language models are trained with; [methods](methods.md) and [regret](regret.md) have torch's "
    "default, 0.999."
)
ABOUT_THE_START = (
    "That is won at the start: norms fall fastest there, Adam's second moment lags behind them and shortens its steps, "
    "and a cap that is always at work keeps them long. It acts as a higher rate at the start and fades over a long run."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    add_training_options(parser, steps=500)


def run(args: argparse.Namespace) -> None:
    """Checks what was given, trains once per method, and writes and prints the comparison."""
    config = TrainConfig(steps=args.steps, lr=args.lr, seed=args.seed)
    batches = config.open(args.data)
    prepare_folder(args.out)
    print(f"text: {batches.source}")
    runs: dict[str, list[StepRecord]] = {}
    summaries = []
    for method in (METHODS[name] for name in COMPARED):
        runs[method.label], summary = train_method(method, config, batches, args.out)
        summaries.append(summary)
    save(overview_figure, runs, args.out / "compare.png")
    write_summary(args.out / "compare.json", config, batches, summaries)
    print(f"\n{format_table(summaries)}\n\n{notes(config)}")
    print(f"written to {args.out}: compare.png, compare.json, compare.md, *.jsonl")


def train_method(method: Method, config: TrainConfig, batches: Batches, out: Path) -> tuple[list[StepRecord], Summary]:
    """One run: a progress bar while it trains, a line of JSON per step, its row of the table."""
    run = Run(method, config, batches)
    records: list[StepRecord] = []
    with (
        (out / f"{method.name}.jsonl").open("w") as lines,
        StepProgress(f"{method.label:11}", config.steps) as progress,
    ):
        for record in run.steps():
            records.append(record)
            lines.write(line(record))
            progress.show(record)
    return records, summarize(method.name, method.label, records, run.held_out_loss(), config.warmup_steps)


def write_summary(path: Path, config: TrainConfig, batches: Batches, summaries: list[Summary]) -> None:
    """What ran, on what, and what came out."""
    summary = heading("compare", [config.seed]) | {
        "data": batches.source,
        "config": asdict(config) | {"model": asdict(config.shape.model)},
        "corrupted": {str(step + 1): kind for step, kind in sorted(config.schedule.items())},
        "notes": notes(config).splitlines(),
        "rows": [asdict(row) for row in summaries],
    }
    write_result(path, summary, page)


def page(result: Result) -> str:
    """The table, the figure and what their words mean."""
    return document(
        "compare: no clipping, fixed clipping and ZClip",
        result,
        setup(result),
        format_table([restored(Summary, row) for row in result["rows"]]),
        f"{standing(result['rows'])} {ABOUT_BETA2}",
        "![Loss of all runs, and the gradient norm of each before and after clipping](compare.png)",
        bullets(result["notes"]),
    )


def standing(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far ours is from fixed clipping, over the whole run and its parts, and why if it is behind."""
    ours, fixed = ({row["method"]: row for row in rows}[name] for name in ("zclip_optim", "fixed"))
    names = ("held_out_loss", "loss_of_start", "loss_after_start")
    whole, start, rest = ((ours[name] or math.nan) - (fixed[name] or math.nan) for name in names)
    where = "behind" if whole > 0 else "ahead of"
    text = (
        f"By validation loss zclip_optim is {abs(whole):.3f} {where} fixed clipping at 1.0; its mean loss differs by "
        f"{start:+.3f} in the first {START:.0%} of the run and by {rest:+.3f} after them."
    )
    return f"{text} {ABOUT_THE_START}" if whole > 0 else text
