"""Trains a small language model without clipping, with fixed clipping and with ZClip, and compares the runs.

The text is real (by default the source of Python's standard library), and a few of its batches are corrupted.
Writes a figure (compare.png), every step of every run (METHOD.jsonl) and a summary (compare.json).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from benchmarks import UserError
from benchmarks.data import Corpus, load_corpus
from benchmarks.methods import METHODS, Method
from benchmarks.plots import compare_figure
from benchmarks.report import Summary, finite, format_table, machine, notes, strict_json, summarize
from benchmarks.train import Run, StepRecord, TrainConfig

MAX_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison."""
    parser.add_argument("--steps", type=positive_int, default=500, help="training steps of each run")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=seed, default=0, help="fixes the weights and the order of the data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for the results")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files or folders of them, instead of the standard library",
    )


def bounded(convert: Callable[[str], float], accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: `convert`, then `accept`, and a message that says what is wanted."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


positive_int = bounded(int, lambda value: value >= 1, "a whole number >= 1")
positive_float = bounded(float, lambda value: 0 < value < math.inf, "a finite number > 0")
seed = bounded(int, lambda value: 0 <= value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")


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


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and finds out now whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from error


def train_method(method: Method, config: TrainConfig, corpus: Corpus, out: Path) -> tuple[list[StepRecord], Summary]:
    """One run: a progress bar while it trains, a line of JSON per step, its row of the table."""
    run = Run(method, config, corpus)
    records: list[StepRecord] = []
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines than a terminal
    with (
        (out / f"{method.name}.jsonl").open("w") as lines,
        tqdm(total=config.steps, desc=f"{method.label:21}", unit="step", mininterval=interval) as progress,
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
    summary = {
        "name": "compare",
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "zclip_optim")},
        "seeds": [config.seed],
        "data": corpus.source,
        "config": asdict(config) | {"model": asdict(config.model)},
        "corrupted": {str(step + 1): kind for step, kind in sorted(config.schedule.items())},
        "notes": notes(config).splitlines(),
        "rows": [asdict(row) for row in summaries],
    }
    path.write_text(json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
