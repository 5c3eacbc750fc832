"""Runs every cell of one of the tables, several at a time, and writes and prints the table.

A cell is one training: a row of the table, a condition (clean data, or with a bad shard) and a seed. Cells that have
ended are kept in OUT/cells and not run again, so that a sweep goes on where it was stopped; tables share the cells that
they have in common, and share theirs with `regret`. Writes OUT/TABLE.json and OUT/TABLE.md, with a --preset other than
the default OUT/PRESET-TABLE.json and .md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.options import positive_int
from benchmarks.paper.cells import CARTPOLE, Cell
from benchmarks.paper.runner import add_runner_options, load_finished, prepare, rerun, run_cells
from benchmarks.paper.tables import DEFAULT_PRESET, TABLES, Size, Table, format_rows, result_name, summarize_rows
from benchmarks.report.pages import Result, bullets, document, write_result
from benchmarks.report.summary import SPIKE_DEFINITION, heading
from benchmarks.training.presets import PRESETS

NOTES = (
    "each figure: mean ± standard deviation over the seeds that did not diverge; losses in nats per byte (ViT: per "
    "image), of clean batches only; training loss: of the last 50; clipped: share of the steps, '-' for a method that "
    "does not tell",
    "diverged: ended early by losses or gradients that stayed non-finite, or with a validation loss not below that of "
    "a model that knows only how often each byte (each digit) occurs",
    SPIKE_DEFINITION,
    "differences (... - paper's): from the run under the paper's rule with the same seed, mean ± standard error; below "
    "zero is better; a run that diverged counts with the loss of a model that knows only how often each byte (digit) "
    "occurs, one that did not solve its task with all its episodes",
    "none: the bare optimizer; fixed N: clip_grad_norm_ at N; autoclip: the 90th percentile, the package's default, "
    "and the 10th, its paper's; paper: ZClipOptimizer as in the paper (z_thresh=2.5, alpha=0.97, reciprocal, no cap); "
    "named by options: the paper's rule with these",
    "columns that begin with 'paper:' are published figures, of 1 B parameters and 50 B tokens; its rates stand beside "
    "ours in order, not in size; downstream scores have no meaning at our size: validation loss and spikes stand in "
    "for them",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a sweep."""
    parser.add_argument("table", choices=TABLES, help="which table")
    parser.add_argument("--preset", choices=PRESETS, default=DEFAULT_PRESET, help="size of the language models")
    parser.add_argument("--seeds", type=positive_int, help="of each cell, instead of the table's")
    parser.add_argument("--steps", type=positive_int, help="of each run (episodes for rl), instead of the table's")
    parser.add_argument("--batch", type=positive_int, help="examples per step, instead of the table's")
    add_runner_options(parser)


def run(args: argparse.Namespace) -> None:
    """Runs what has not ended yet, and writes and prints the table."""
    table, size = TABLES[args.table], Size(args.preset, args.steps, args.batch)
    folder = prepare(args)
    cells = list(dict.fromkeys(cell for _, _, cell in table.cells(size, args.seeds)))
    if args.cell is not None:
        rerun(f"the table {table.name}", cells, args)
        return
    start = time.perf_counter()
    run_cells(table.name, cells, args)
    outcomes = {cell: load_finished(cell, folder) for cell in cells}
    rows = summarize_rows(table, size, args.seeds, outcomes.__getitem__)
    seconds = sum(outcome["seconds"] for outcome in outcomes.values())
    name = result_name(table.name, args.preset)
    found = result(table, size, cells, args) | {"cell_seconds": seconds, "rows": rows}
    write_result(args.out / f"{name}.json", found, page)
    print(f"\n{table.title}\n\n{format_rows(table, rows)}\n\n" + "\n".join(found["notes"]))
    took = time.perf_counter() - start
    print(f"written to {args.out}: {name}.json, {name}.md; ", end="")
    print(f"{len(cells)} cells took {seconds:.0f} s, {took:.0f} s of them now")


def result(table: Table, size: Size, cells: Sequence[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """What ran, on what, and how to run one cell again."""
    preset = "" if size.preset == DEFAULT_PRESET else f" --preset {size.preset}"
    packages = ("zclip", "autoclip", "pytorch_optimizer", "scikit-learn", "gymnasium")
    return heading(f"sweep {table.name}", sorted({cell.seed for cell in cells}), *packages) | {
        "title": table.title,
        "size": asdict(size),
        "workers": args.workers,
        "data": [str(path) for path in args.data] or "what comes with the architecture",
        "cell_command": f"python -m benchmarks sweep {table.name}{preset} --cell NAME",
        "notes": (*NOTES, *table.notes),
    }


def page(result: Result) -> str:
    """The table under each condition, and what its words mean."""
    table = TABLES[result["name"].removeprefix("sweep ")]
    runs = sum(len(row["cells"]) for row in result["rows"])
    return document(
        f"{table.name}: {result['title']}",
        result,
        format_rows(table, result["rows"]),
        bullets(result["notes"]),
        f"Preset {result['size']['preset']}, {per_run(result['rows'])}. {runs} runs, {result['workers']} at a time, "
        f"{result['cell_seconds']:,.0f} s of one thread. One of them again: `{result['cell_command']}`, with a NAME "
        "from the JSON.",
    )


def per_run(rows: Sequence[Mapping[str, Any]]) -> str:
    """Length and batch of the runs."""
    sizes = dict.fromkeys((row["architecture"], row["steps"], row["batch"]) for row in rows)
    return ", ".join(
        f"{name}: at most {steps:,} episodes" if name == CARTPOLE else f"{name}: {steps:,} steps of {batch} examples"
        for name, steps, batch in sizes
    )
