"""The tables of arXiv:2504.02507 and four more: which runs each row stands for, and what its columns show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from benchmarks.paper import published
from benchmarks.paper.cells import BAD_SHARD, CARTPOLE, CLEAN, Cell
from benchmarks.report.summary import markdown
from benchmarks.training.methods import METHODS
from benchmarks.training.presets import PRESETS
from zclip_optim import ZClip

BATCH = {"nano": 8}  # examples per step, where not the preset's: more steps in the same time
EPISODES, CARTPOLE_LR = 1_000, 1e-2
RATES = (1 / 8, 1 / 2, 1, 4, 64, 512, 2048)  # in units of the preset's learning rate
ABLATION_RATE = 1  # in the same units
EXTREME_RATES = RATES[-3:]

Outcome = Mapping[str, Any]  # of one cell


@dataclass(frozen=True)
class Size:
    """What the command line can change about all runs of a table; None for the table's own."""

    preset: str = "nano"
    steps: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Row:
    """A row: everything of a cell but seed and condition; `rate` in units of the preset's learning rate."""

    label: str  # "{lr:g}" in it stands for the peak learning rate
    method: str
    rate: float = ABLATION_RATE
    options: tuple[tuple[str, float], ...] = ()
    architecture: str = "llama"
    batch: int | None = None  # examples per step, whatever the preset
    paper: tuple[str, ...] = ()  # what the paper has for it, in the order of the table's `paper`

    def cell(self, size: Size, condition: str, seed: int) -> Cell:
        """One of its runs."""
        if self.architecture == CARTPOLE:
            steps = size.steps or EPISODES
            return Cell(CARTPOLE, self.method, CARTPOLE_LR, seed, condition, steps, 1, self.options, size.preset)
        preset = PRESETS[size.preset]
        return Cell(
            architecture=self.architecture,
            method=self.method,
            lr=float(f"{self.rate * preset.lr:.6g}"),
            seed=seed,
            condition=condition,
            steps=size.steps or preset.steps,
            batch=size.batch or self.batch or BATCH.get(size.preset, preset.batch),
            options=self.options,
            preset=size.preset,
        )


@dataclass(frozen=True)
class Column:
    """A figure of each run, shown as its mean over the runs that have it and did not diverge, and their deviation."""

    title: str
    key: str  # in a cell's outcome
    form: str = "{:.3f}"

    def show(self, values: Sequence[float]) -> str:
        """Mean and standard deviation; "-" if there is nothing to show."""
        mean, std = over_finite(statistics.fmean, values), over_finite(spread, values)
        finite = sum(map(math.isfinite, values))
        some = "" if finite == len(values) else f" ({finite} of {len(values)})"
        return f"{self.form.format(mean)} ± {self.form.format(std)}{some}" if finite else "-"


@dataclass(frozen=True)
class Count:
    """In how many of the seeds something happened."""

    title: str
    key: str

    def show(self, values: Sequence[float]) -> str:
        """As "1 of 3"."""
        return f"{sum(map(bool, values))} of {len(values)}"


CLIPPED = Column("clipped", "clipped_share", "{:.1%}")
LANGUAGE = (
    Column("training loss", "final_loss"),
    Column("validation loss", "held_out_loss"),
    Column("spikes", "loss_spikes", "{:.1f}"),
    CLIPPED,
    Count("diverged", "diverged"),
)
CONDITIONS = (CLEAN, BAD_SHARD)


@dataclass(frozen=True)
class Table:
    """A table; its rows are run under every condition with seeds 0, 1, ..."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column | Count, ...] = LANGUAGE
    paper: tuple[str, ...] = ()  # titles of the columns that the paper's figures fill
    conditions: tuple[str, ...] = CONDITIONS
    seeds: int = 3

    def cells(self, size: Size, seeds: int | None = None) -> Iterator[tuple[Row, str, Cell]]:
        """Every row, condition and run."""
        for row in self.rows:
            for condition in self.conditions:
                for seed in range(seeds or self.seeds):
                    yield row, condition, row.cell(size, condition, seed)


def by_rate(
    methods: Sequence[str], rates: Sequence[float], published: Sequence[Mapping[str, tuple[str, ...]]] = ()
) -> tuple[Row, ...]:
    """Every method at every rate, with what the paper has for its rates, in order."""
    return tuple(
        Row(f"{{lr:g}}, {METHODS[method].label}", method, rate=rate, paper=figures.get(method, ()))
        for rate, figures in zip_longest(rates, published, fillvalue={})
        for method in methods
    )


def by_option(option: str, published: Mapping[float, tuple[str, ...]]) -> tuple[Row, ...]:
    """zclip_optim with each value of an option; its default is the run without it, which other tables share."""
    default = getattr(ZClip().config, option)
    return tuple(
        Row(f"{option}={value:g}", "zclip_optim", options=() if value == default else ((option, value),), paper=figures)
        for value, figures in published.items()
    )


COMPARED = ("none", "fixed", "zclip_optim")
ALL = ("none", "fixed", "autoclip", "adagc", "published", "paper", "zclip_optim", "capped")

TABLES = {
    table.name: table
    for table in (
        Table(
            "lr",
            "Learning rates (paper: Table 2)",
            by_rate(("fixed", "zclip_optim", "capped"), RATES, published.RATES),
            paper=published.RATE_COLUMNS,
        ),
        Table(
            "methods",
            "Methods (paper: Table 3)",
            tuple(Row(METHODS[name].label, name, paper=published.METHODS.get(name, ())) for name in ALL),
            paper=published.TEST_COLUMNS,
        ),
        Table(
            "options",
            "What a spike is clipped to (paper: Table 5)",
            tuple(
                Row(METHODS[name].options.get("clip_option", "reciprocal"), name, paper=figures)
                for name, figures in published.OPTIONS.items()
            ),
            paper=published.TEST_COLUMNS,
        ),
        Table(
            "z_thresh",
            "Threshold (paper: Table 6)",
            by_option("z_thresh", published.Z_THRESH),
            paper=published.TRAIN_COLUMNS,
        ),
        Table(
            "alpha",
            "Decay of the statistics (paper: Table 7)",
            by_option("alpha", published.ALPHA),
            paper=published.TRAIN_COLUMNS,
        ),
        Table("extreme", "Rates where norms stay high", by_rate(("paper", "zclip_optim"), EXTREME_RATES)),
        Table(
            "arch",
            "Other architectures",
            tuple(
                Row(f"{label}, {METHODS[method].label}", method, architecture=architecture, batch=batch)
                for architecture, label, batch in (("gpt2", "GPT-2", None), ("vit", "ViT", 32))
                for method in COMPARED
            ),
        ),
        Table(
            "rl",
            "REINFORCE on CartPole",
            tuple(Row(METHODS[method].label, method, architecture=CARTPOLE) for method in COMPARED),
            columns=(
                Column("episodes to a mean return of 195", "episodes_to_solve", "{:.0f}"),
                Count("solved", "solved"),
                Column("largest norm / median", "largest_to_median_norm", "{:.1f}"),
                CLIPPED,
            ),
            conditions=(CLEAN,),
            seeds=5,
        ),
    )
}


def summarize_rows(
    table: Table, size: Size, seeds: int | None, outcome: Callable[[Cell], Outcome]
) -> list[dict[str, Any]]:
    """For each row and condition the figures of every seed, their mean and their standard deviation."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row, condition, cell in table.cells(size, seeds):
        entry = rows.setdefault((cell_label(row, cell), condition), new_entry(table, row, condition, cell))
        figures = outcome(cell)
        entry["cells"].append(cell.name)
        entry["counted"].append(not figures.get("diverged", False))
        entry["values"]["measure"].append(figures["measure"])
        for column in table.columns:
            entry["values"][column.key].append(figures[column.key])
    for entry in rows.values():
        entry["mean"] = {column.key: over_finite(statistics.fmean, counted(entry, column)) for column in table.columns}
        entry["std"] = {column.key: over_finite(spread, counted(entry, column)) for column in table.columns}
    return list(rows.values())


def new_entry(table: Table, row: Row, condition: str, cell: Cell) -> dict[str, Any]:
    """A row of the results without its figures."""
    return {
        "row": cell_label(row, cell),
        "condition": condition,
        "architecture": row.architecture,
        "method": row.method,
        "options": dict(row.options),
        "settings": cell.clipping.settings,
        "preset": cell.preset,
        "unit": cell.unit,
        "scale_free": cell.scale_free,
        "lr": cell.lr,
        "steps": cell.steps,
        "batch": cell.batch,
        "paper": dict(zip(table.paper, row.paper, strict=False)),
        "cells": [],
        "counted": [],  # whether the run did not diverge
        "values": {column.key: [] for column in table.columns} | {"measure": []},
    }


def cell_label(row: Row, cell: Cell) -> str:
    """The row's label with the learning rate of its cells."""
    return row.label.format(lr=cell.lr)


def over_finite(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> float:
    """Of the finite values; NaN if there are none."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return statistic(finite) if finite else math.nan


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def format_rows(table: Table, rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, a table for each condition; the paper's figures beside ours for clean data, which its data were."""
    sections = []
    for condition in table.conditions:
        lines = [
            {table.name: entry["row"]}
            | {column.title: column.show(counted(entry, column)) for column in table.columns}
            | {f"paper: {title}": entry["paper"].get(title, "-") for title in table.paper if condition == CLEAN}
            for entry in rows
            if entry["condition"] == condition
        ]
        heading = f"{condition.capitalize()}:\n\n" if len(table.conditions) > 1 else ""
        sections.append(heading + markdown(lines))
    return "\n\n".join(sections)


def counted(entry: Mapping[str, Any], column: Column | Count) -> list[float]:
    """The values of a row that its column is about: NaN for a run that diverged and for what JSON has as null."""
    pairs = zip(entry["values"][column.key], entry["counted"], strict=True)
    everything = isinstance(column, Count)
    return [value if value is not None and (everything or counts) else math.nan for value, counts in pairs]
