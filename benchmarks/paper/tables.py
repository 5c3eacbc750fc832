"""The tables of arXiv:2504.02507 and four more: which runs each row stands for, and what its columns show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from benchmarks.evidence.paired import difference
from benchmarks.paper import published
from benchmarks.paper.cells import BAD_SHARD, CARTPOLE, CLEAN, FIRST_SEED, LOG_EPISODES, NATS, Cell
from benchmarks.report.summary import markdown
from benchmarks.training.contenders import (
    AUTOCLIP,
    AUTOCLIP_LOW,
    FOLLOWING,
    FOLLOWING_CAPPED,
    LOOKING_BACK,
    NONE,
    PAPER,
    Contender,
    fixed,
    ours,
)
from benchmarks.training.methods import METHODS
from benchmarks.training.presets import PRESETS

DEFAULT_PRESET = "pico"
BATCH = {"nano": 8}  # examples per step, where not the preset's: more steps in the same time
EPISODES, CARTPOLE_LR = 1_000, 1e-2
RATES = (1 / 8, 1 / 2, 1, 4, 64, 512, 2048)  # in units of the preset's learning rate
ABLATION_RATE = 1  # in the same units
SEEDS = 4

NO_FIGURES: Mapping[str, tuple[str, ...]] = {}

Outcome = Mapping[str, Any]  # of one cell


@dataclass(frozen=True)
class Size:
    """What the command line can change about all runs of a table; None for the table's own."""

    preset: str = DEFAULT_PRESET
    steps: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Row:
    """A row: everything of a cell but seed and condition; `rate` in units of the preset's learning rate."""

    label: str  # "{lr:g}" in it stands for the peak learning rate
    contender: Contender
    rate: float = ABLATION_RATE
    architecture: str = "llama"
    steps: int | None = None  # whatever the preset
    batch: int | None = None  # examples per step, whatever the preset
    beta2: float = 0.95  # of AdamW for a language model, which is what they are trained with
    paper: tuple[str, ...] = ()  # what the paper has for it, in the order of the table's `paper`

    def cell(self, size: Size, condition: str, seed: int) -> Cell:
        """One of its runs."""
        method, options = self.contender.method, self.contender.options
        if self.architecture == CARTPOLE:  # of one size
            return Cell(CARTPOLE, method, CARTPOLE_LR, seed, condition, size.steps or EPISODES, 1, options)
        preset = PRESETS[size.preset]
        return Cell(
            architecture=self.architecture,
            method=method,
            lr=float(f"{self.rate * preset.lr:.6g}"),
            seed=seed,
            condition=condition,
            steps=size.steps or self.steps or preset.steps,
            batch=size.batch or self.batch or BATCH.get(size.preset, preset.batch),
            options=options,
            preset=size.preset,
            beta2=self.beta2,
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
SKIPPED = Column("skipped", "skipped_steps", "{:.1f}")
CONDITIONS = (CLEAN, BAD_SHARD)
FROM_PAPER = {NATS: "validation loss - paper's", LOG_EPISODES: "log episodes - paper's"}  # a difference, by its unit


@dataclass(frozen=True)
class Table:
    """A table; its rows are run under every condition with seeds FIRST_SEED, FIRST_SEED + 1, ..."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column | Count, ...] = LANGUAGE
    paper: tuple[str, ...] = ()  # titles of the columns that the paper's figures fill
    conditions: tuple[str, ...] = CONDITIONS
    seeds: int = SEEDS
    notes: tuple[str, ...] = ()  # besides those of all tables

    def cells(self, size: Size, seeds: int | None = None) -> Iterator[tuple[Row, str, Cell]]:
        """Every row, condition and run."""
        for row in self.rows:
            for condition in self.conditions:
                for seed in range(FIRST_SEED, FIRST_SEED + (seeds or self.seeds)):
                    yield row, condition, row.cell(size, condition, seed)


def rows_of(
    contenders: Sequence[Contender], figures: Mapping[str, tuple[str, ...]] = NO_FIGURES, before: str = "", **where: Any
) -> tuple[Row, ...]:
    """A row for each method, with what the paper has for its label."""
    return tuple(Row(before + each.label, each, paper=figures.get(each.label, ()), **where) for each in contenders)


def by_rate(
    contenders: Sequence[Contender],
    rates: Sequence[float],
    figures: Sequence[Mapping[str, tuple[str, ...]]] = (),
) -> tuple[Row, ...]:
    """Every method at every rate, with what the paper has for its rates, in order."""
    pairs = zip_longest(rates, figures, fillvalue=NO_FIGURES)
    return tuple(row for rate, found in pairs for row in rows_of(contenders, found, "{lr:g}, ", rate=rate))


def by_option(option: str, figures: Mapping[float, tuple[str, ...]]) -> tuple[Row, ...]:
    """The paper's rule with each value of an option; its own value is the run that other tables share."""
    own = METHODS[PAPER.method].options[option]
    found = {value: ours(**{option: value}) for value in figures}
    return tuple(
        Row(f"{each.label} (paper)", PAPER, paper=figures[value])
        if value == own
        else Row(each.label, each, paper=figures[value])
        for value, each in found.items()
    )


FIXED = fixed(1)
ALL = (NONE, FIXED, AUTOCLIP, AUTOCLIP_LOW, PAPER, LOOKING_BACK, FOLLOWING, FOLLOWING_CAPPED)
OPTIONS = (
    Contender("max", "max"),
    Contender("mean", "mean"),
    replace(PAPER, label="reciprocal (paper)"),
    ours(z_skip=10),
)
ARCHITECTURES = (NONE, FIXED, PAPER, LOOKING_BACK, FOLLOWING, FOLLOWING_CAPPED)
THE_PAPERS_CAP = (
    "paper: clipped: read off by eye from a figure in the authors' public repository that shows the share of all steps "
    "up to a point: 100% during the first 0.5 B tokens for every threshold, about 20% at 5 B, and this column at the "
    "end of 50 B. The rule alone clips every step only where a lasting rise of the norm has locked it in; the "
    "published default max_grad_norm=1.0 does so as long as norms are above it, whatever z_thresh is. So the paper's "
    "runs are in all likelihood the rule and a cap that matters while norms are large: that start alone is one "
    "percentage point of each share at the end. Ours have no cap"
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "lr",
            "Learning rates (paper: Table 2)",
            by_rate((FIXED, PAPER, FOLLOWING), RATES, published.RATES),
            paper=published.RATE_COLUMNS,
        ),
        Table(
            "methods",
            "Methods (paper: Table 3)",
            rows_of(ALL, published.METHODS) + rows_of(ARCHITECTURES, before="beta2 0.999, ", beta2=0.999),
            columns=(*LANGUAGE, SKIPPED),
            paper=published.TEST_COLUMNS,
        ),
        Table(
            "options",
            "What a spike is clipped to, or left out (paper: Table 5)",
            rows_of(OPTIONS, published.OPTIONS),
            columns=(*LANGUAGE, SKIPPED),
            paper=published.TEST_COLUMNS,
        ),
        Table(
            "z_thresh",
            "Threshold (paper: Table 6)",
            by_option("z_thresh", published.Z_THRESH),
            paper=published.THRESHOLD_COLUMNS,
            notes=(THE_PAPERS_CAP,),
        ),
        Table(
            "alpha",
            "Decay of the statistics (paper: Table 7)",
            by_option("alpha", published.ALPHA),
            paper=published.TRAIN_COLUMNS,
        ),
        Table(
            "arch",
            "Other architectures",
            rows_of(ARCHITECTURES, before="GPT-2, beta2 0.95, ", architecture="gpt2")
            + rows_of(ARCHITECTURES, before="GPT-2, beta2 0.999, ", architecture="gpt2", beta2=0.999)
            + rows_of(ARCHITECTURES, before="ViT, ", architecture="vit", steps=300, batch=16, beta2=0.999),
        ),
        Table(
            "rl",
            "REINFORCE on CartPole",
            rows_of((NONE, FIXED, PAPER, LOOKING_BACK, FOLLOWING), architecture=CARTPOLE),
            columns=(
                Column("episodes to a mean return of 195", "episodes_to_solve", "{:.0f}"),
                Count("solved", "solved"),
                Column("largest norm / median", "largest_to_median_norm", "{:.1f}"),
                CLIPPED,
            ),
            conditions=(CLEAN,),
            seeds=20,
        ),
    )
}


def result_name(table: str, preset: str) -> str:
    """Of the files that a table is written to."""
    return table if preset == DEFAULT_PRESET else f"{preset}-{table}"


def summarize_rows(
    table: Table, size: Size, seeds: int | None, outcome: Callable[[Cell], Outcome]
) -> list[dict[str, Any]]:
    """For each row and condition the figures of every seed, their mean and their standard deviation."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row, condition, cell in table.cells(size, seeds):
        entry = rows.setdefault((cell_label(row, cell), condition), new_entry(table, row, condition, cell))
        add_run(table, entry, cell.name, outcome(cell), outcome(papers_twin(cell)))
    for entry in rows.values():
        entry["mean"] = {column.key: over_finite(statistics.fmean, counted(entry, column)) for column in table.columns}
        entry["std"] = {column.key: over_finite(spread, counted(entry, column)) for column in table.columns}
    return list(rows.values())


def papers_twin(cell: Cell) -> Cell:
    """The same run under the paper's rule, which every table has."""
    return replace(cell, method=PAPER.method, options=PAPER.options)


def add_run(table: Table, entry: dict[str, Any], name: str, figures: Outcome, papers: Outcome) -> None:
    """The next seed's figures."""
    entry["cells"].append(name)
    entry["counted"].append(not figures.get("diverged", False))
    entry["values"]["measure"].append(figures["measure"])
    entry["values"]["papers_measure"].append(papers["measure"])
    for column in table.columns:
        entry["values"][column.key].append(figures[column.key])


def new_entry(table: Table, row: Row, condition: str, cell: Cell) -> dict[str, Any]:
    """A row of the results without its figures."""
    return {
        "row": cell_label(row, cell),
        "condition": condition,
        "architecture": row.architecture,
        "method": cell.method,
        "options": dict(cell.options),
        "settings": cell.clipping.settings,
        "preset": cell.preset,
        "unit": cell.unit,
        "scale_free": cell.scale_free,
        "lr": cell.lr,
        "steps": cell.steps,
        "batch": cell.batch,
        "beta2": cell.beta2,
        "muon": cell.muon,
        "paper": dict(zip(table.paper, row.paper, strict=False)),
        "cells": [],
        "counted": [],  # whether the run did not diverge
        "values": {column.key: [] for column in table.columns} | {"measure": [], "papers_measure": []},
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
    known = [title for title in table.paper if any(title in entry["paper"] for entry in rows)]
    sections = []
    for condition in table.conditions:
        titles = known if condition == CLEAN else []
        lines = [line_of(table, entry, titles) for entry in rows if entry["condition"] == condition]
        heading = f"{condition.capitalize()}:\n\n" if len(table.conditions) > 1 else ""
        sections.append(heading + markdown(lines))
    return "\n\n".join(sections)


def line_of(table: Table, entry: Mapping[str, Any], titles: Sequence[str]) -> dict[str, str]:
    """A row's figures, as far as its file has them, what the paired runs say, and the paper's figures."""
    columns = [column for column in table.columns if column.key in entry["values"]]
    return (
        {table.name: entry["row"]}
        | {column.title: column.show(counted(entry, column)) for column in columns}
        | from_paper(entry)
        | {f"paper: {title}": entry["paper"].get(title, "-") for title in titles}
    )


def from_paper(entry: Mapping[str, Any]) -> dict[str, str]:
    """The measure minus that of the paper's rule; "-" for that rule, nothing in a file from before."""
    if "papers_measure" not in entry["values"]:
        return {}
    is_paper = entry["method"] == PAPER.method and not entry["options"]
    found = difference(entry["values"]["measure"], entry["values"]["papers_measure"])
    return {FROM_PAPER[entry["unit"]]: "-" if is_paper else str(found)}


def counted(entry: Mapping[str, Any], column: Column | Count) -> list[float]:
    """The values of a row that its column is about: NaN for a run that diverged and for what JSON has as null."""
    pairs = zip(entry["values"][column.key], entry["counted"], strict=True)
    everything = isinstance(column, Count)
    return [value if value is not None and (everything or counts) else math.nan for value, counts in pairs]
