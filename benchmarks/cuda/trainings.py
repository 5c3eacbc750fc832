"""Trainings of one preset with several methods and seeds, as many as a time holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.cuda.attempts import LeftOut, attempt
from benchmarks.paper.cells import CLEAN, Cell, run_cell, training
from benchmarks.report.pages import restored
from benchmarks.report.summary import Summary, notes
from benchmarks.training.presets import PRESETS

TRAINED = ("none", "fixed", "published", "zclip_optim")
PRESET = "small"
SEEDS = 3
PROBED = 40  # steps, from which the time of the first run is foretold


def cells(preset: str = PRESET) -> list[Cell]:
    """All runs, seeds outermost, so that what there is time for is whole pairs."""
    size = PRESETS[preset]
    return [
        Cell("llama", method, size.lr, seed, CLEAN, size.steps, size.batch, preset=preset)
        for seed in range(SEEDS)
        for method in TRAINED
    ]


def described(cell: Cell) -> dict[str, Any]:
    """What the page says of all runs."""
    config = cell.config
    return {
        "config": asdict(config) | {"model": asdict(config.shape.model)},
        "data": config.open().source,
        "notes": notes(config).splitlines(),
    }


def trained(wanted: Sequence[Cell], deadline: float, folder: Path, left_out: list[LeftOut]) -> Iterator[dict[str, Any]]:
    """A row for each run that ends in time: a run takes what the last one took, the first what a few steps foretell.

    Args:
        wanted: the runs, in order; once one does not fit no later one is tried.
        deadline: on the clock of time.monotonic.
        folder: gets the steps of every run.
        left_out: is given the others.
    """
    seconds = attempt("trainings", lambda: foretold(wanted[0]), left_out)
    for cell in wanted if seconds is not None else ():
        remaining = deadline - time.monotonic()
        if seconds > remaining:
            left_out.append(LeftOut(title(cell), f"takes some {seconds:.0f} s, {max(0, remaining):.0f} s were left"))
            continue
        figures = attempt(title(cell), lambda cell=cell: run_cell(cell, folder), left_out)
        if figures is not None:
            seconds = figures["seconds"]
            yield asdict(replace(restored(Summary, figures), label=title(cell)))


def title(cell: Cell) -> str:
    """Of its row."""
    return f"{cell.clipping.label}, seed {cell.seed}"


def foretold(cell: Cell) -> float:
    """Seconds of a run, from the first steps of one."""
    _, figures = training(replace(cell, steps=min(PROBED, cell.steps)), ())
    return cell.steps * figures["ms_per_step"] / 1e3
