"""Trains a small language model without clipping, with fixed clipping and with ZClip, and compares the runs.

The text is real (by default the source of Python's standard library), and a few of its batches are corrupted.
Writes a figure (compare.png), every step of every run (METHOD.jsonl) and a summary (compare.json).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.data import Corpus, load_corpus
from benchmarks.methods import METHODS, Method
from benchmarks.options import add_training_options, prepare_folder
from benchmarks.plots import compare_figure
from benchmarks.report import (
    Summary,
    format_table,
    heading,
    notes,
    progress_interval,
    strict_json,
    summarize,
    write_json,
)
from benchmarks.train import Run, StepRecord, TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    add_training_options(parser, steps=500)


def run(args: argparse.Namespace) -> None:
    """Checks what was given, trains once per method, and writes and prints the comparison."""
    config = TrainConfig(steps=args.steps, lr=args.lr, seed=args.seed)
    corpus = load_corpus(args.data, config.model.context)
    prepare_folder(args.out)
    print(f"text: {corpus.source}")
    runs: dict[str, list[StepRecord]] = {}
    summaries = []
    for method in METHODS:
        runs[method.label], summary = train_method(method, config, corpus, args.out)
        summaries.append(summary)
    compare_figure(runs, config, args.out / "compare.png")
    write_summary(args.out / "compare.json", config, corpus, summaries)
    print(f"\n{format_table(summaries)}\n\n{notes(config)}\nwritten to {args.out}: compare.png, compare.json, *.jsonl")


def train_method(method: Method, config: TrainConfig, corpus: Corpus, out: Path) -> tuple[list[StepRecord], Summary]:
    """One run: a progress bar while it trains, a line of JSON per step, its row of the table."""
    run = Run(method, config, corpus)
    records: list[StepRecord] = []
    with (
        (out / f"{method.name}.jsonl").open("w") as lines,
        tqdm(total=config.steps, desc=f"{method.label:21}", unit="step", mininterval=progress_interval()) as progress,
    ):
        for record in run.steps():
            records.append(record)
            lines.write(strict_json(asdict(record)) + "\n")
            progress.set_postfix_str(postfix(records), refresh=False)
            progress.update()
    return records, summarize(method.name, method.label, records, run.held_out_loss(), config.warmup_steps)


def postfix(records: list[StepRecord]) -> str:
    """The progress bar's figures: the last loss and norm, and the share of steps clipped so far."""
    last = records[-1]
    clip_rate = sum(record.clipped for record in records) / len(records)
    return f"loss {last.loss:.2f}, norm {last.grad_norm:.2f}, clipped {clip_rate:.1%}"


def write_summary(path: Path, config: TrainConfig, corpus: Corpus, summaries: list[Summary]) -> None:
    """What ran, on what, and what came out."""
    summary = heading("compare", [config.seed]) | {
        "data": corpus.source,
        "config": asdict(config) | {"model": asdict(config.model)},
        "corrupted": {str(step + 1): kind for step, kind in sorted(config.schedule.items())},
        "notes": notes(config).splitlines(),
        "rows": [asdict(row) for row in summaries],
    }
    write_json(path, summary)
