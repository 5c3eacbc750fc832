"""Decides the defaults from the results, by a rule that was written before the runs.

The rule. `alpha_down=0.8` becomes the default if, over the workloads of `instability`, `regret` and the sweeps, the
paired differences from None, each in units of its standard error, are in favour by more than 2 when combined (their sum
over the square root of their number), and on no workload is it worse by more than 3 (with some 25 comparisons one at 2
comes by chance). The measure of each workload is part of the rule: validation loss, or for instability the logarithm of
the mean loss of the last fifth. The same rule decides `z_skip` (None, 6, 10) and `z_thresh` (2.5, 2.0), the paper's
value kept in doubt, and on the workloads whose optimizer is of Adam's kind whether README's first example carries
`max_grad_norm=1.0`.

What it leaves open is settled so: the questions are asked in this order, each with what was decided before; of two
values that pass the one further in favour is taken; a run that diverged counts with the loss of a model that knows only
how often each target occurs; CartPole's measure is the logarithm of the number of episodes; a workload that stands in
several files counts once, with the most seeds that it has in one; where no pair differs the difference is 0 units. With
3 or 4 pairs a difference in units of its standard error has Student's distribution and not the normal one, in which 3
would be rare: the table has the normal deviate of the same probability beside it, for information; the verdict does not
use it.

Reads what `instability`, `regret` and `sweep` have written to --results, writes defaults.json and defaults.md to --out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.evidence.paired import Difference, combined
from benchmarks.evidence.results import Row, difference_of
from benchmarks.options import add_out_option, prepare_folder
from benchmarks.paper.tables import TABLES, result_name
from benchmarks.report.pages import Result, document, write_result
from benchmarks.report.summary import heading, markdown
from benchmarks.training.methods import METHODS
from benchmarks.training.presets import PRESETS
from benchmarks.training.problems import PROBLEMS

IN_FAVOUR, WORSE = 2.0, 3.0  # standard errors
RULE = (__doc__ or "").split("\n\n")[1:-1]  # what stands above, for the page

Settings = dict[str, Any]  # of ZClipOptimizer


@dataclass(frozen=True)
class Question:
    """An option, the paper's value first in doubt, and what may take its place."""

    option: str
    values: tuple[float, ...]
    scale_free: bool = False  # asked on optimizers of Adam's kind alone


QUESTIONS = (
    Question("alpha_down", (0.8,)),
    Question("z_skip", (6, 10)),
    Question("z_thresh", (2.0,)),
    Question("max_grad_norm", (1.0,), scale_free=True),
)
PAPER: Settings = {question.option: None for question in QUESTIONS} | METHODS["paper"].settings


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one value: differences in units of their standard errors, positive ones in favour."""

    combined: float
    least: float
    passes: bool


def judge(differences: Iterable[Difference]) -> Verdict:
    """The rule, for measures of which a lower one is better."""
    favour = [-each.units for each in differences if math.isfinite(each.units)]
    total, least = combined(favour), min(favour, default=math.nan)
    return Verdict(total, least, total > IN_FAVOUR and least >= -WORSE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the results are, and where the verdict goes."""
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/out"), help="folder with what the other commands have written"
    )
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Answers every question, and writes and prints the tables."""
    prepare_folder(args.out)
    rows, files = read_rows(args.results)
    decided, answers = dict(PAPER), []
    for question in QUESTIONS:
        answers.append(answer(question, decided, rows))
        decided[question.option] = answers[-1]["decided"]
    seeds = range(max(len(row["values"]["measure"]) for row in rows))
    result = heading("defaults", seeds) | {"rule": RULE, "files": files, "answers": answers}
    write_result(args.out / "defaults.json", result, page)
    print(*map(section, answers), sep="\n\n")
    print(f"\nwritten to {args.out}: defaults.json, defaults.md")


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of ZClipOptimizer in all files that there are, each with the most seeds that it has in one."""
    sweeps = [result_name(name, preset) for preset in PRESETS for name in TABLES]
    found: dict[str, Row] = {}
    files = [path for path in (folder / f"{name}.json" for name in ("instability", "regret", *sweeps)) if path.exists()]
    if not files:
        raise UserError(f"--results {folder}: no instability.json, regret.json or result of a sweep there")
    for path in files:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if row.get("settings"):  # of ZClipOptimizer; files from before this rule have none
                name = row["cells"][0]
                found[name] = max(found.get(name, row), row, key=lambda each: len(each["cells"]))
    return list(found.values()), [path.name for path in files]


def answer(question: Question, decided: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """The rule's verdict on each value of an option, and what follows."""
    by_settings = {(workload_of(row), frozenset(settings_of(row).items())): row for row in rows}
    values = [judged(question, value, decided, by_settings) for value in question.values]
    passed = [each for each in values if each["verdict"]["passes"]]
    best = max(passed, key=lambda each: each["verdict"]["combined"], default={"value": PAPER[question.option]})
    return {
        "option": question.option,
        "beside": {name: value for name, value in decided.items() if value != PAPER[name]},
        "values": values,
        "decided": best["value"],
    }


def judged(question: Question, value: float, decided: Settings, rows: Mapping[Any, Row]) -> dict[str, Any]:
    """The differences that a value makes on every workload that has both, and the verdict."""
    before, after = (frozenset((decided | {question.option: each}).items()) for each in (PAPER[question.option], value))
    pairs = {w: (rows[w, after], row) for (w, s), row in rows.items() if s == before and (w, after) in rows}
    differences = {
        name: difference_of(*pair) for name, pair in pairs.items() if pair[0]["scale_free"] or not question.scale_free
    }
    lines = [difference_entry(pairs[name][0], each) for name, each in differences.items()]
    return {"value": value, "differences": lines, "verdict": vars(judge(differences.values()))}


def difference_entry(row: Row, each: Difference) -> dict[str, Any]:
    """A line of the table; positive is in favour."""
    return {
        "workload": name_of(row),
        "unit": row["unit"],
        **each._asdict(),
        "in_favour": -each.units,
        "as_normal": -each.normal,
    }


def settings_of(row: Row) -> Settings:
    """All of them; the paper's for options that are younger than the file."""
    return PAPER | row["settings"]


def workload_of(row: Row) -> tuple[Any, ...]:
    """What a cell has besides method and seed."""
    preset = None if row["architecture"] in PROBLEMS else row["preset"]
    return (preset, *(row[name] for name in ("architecture", "condition", "lr", "steps", "batch")))


def name_of(row: Row) -> str:
    """The workload in words."""
    preset, architecture, condition, lr, steps, batch = workload_of(row)
    return f"{preset + ' ' if preset else ''}{architecture}, lr {lr:g}, {condition}, {steps} x {batch}"


def page(result: Result) -> str:
    """Every question with its table and verdict."""
    return document(
        "defaults: what the rule says",
        result,
        *result["rule"],
        *(text for each in result["answers"] for text in (f"## {each['option']}", section(each))),
        f"From {', '.join(result['files'])}.",
    )


def section(each: Mapping[str, Any]) -> str:
    """The tables of an option's values, and the verdict."""
    beside = ", ".join(f"{name}={value:g}" for name, value in each["beside"].items()) or "nothing else"
    tables = [f"{each['option']}={value['value']:g} beside {beside}:\n\n{table_of(value)}" for value in each["values"]]
    decided = "the paper's value stays" if each["decided"] == PAPER[each["option"]] else f"{each['decided']:g} it is"
    return "\n\n".join((*tables, f"**{each['option']}: {decided}.**"))


def table_of(value: Mapping[str, Any]) -> str:
    """The differences and what they come to."""
    if not value["differences"]:
        return "No workload has both."
    verdict = value["verdict"]
    outcome = "passes" if verdict["passes"] else "does not pass"
    summary = f"Combined {number(verdict['combined'])}, least {number(verdict['least'])}: {outcome}."
    return f"{markdown([line_of(each) for each in value['differences']])}\n\n{summary}"


def line_of(each: Mapping[str, Any]) -> dict[str, str]:
    """A workload's line."""
    return {
        "workload": each["workload"],
        "measure": each["unit"],
        "pairs": str(each["pairs"]),
        "difference": number(each["mean"], 4),
        "standard error": number(each["error"], 4).lstrip("+"),
        "in favour": number(each["in_favour"]),
        "as a normal deviate": number(each["as_normal"]),
    }


def number(value: float | None, digits: int = 2) -> str:
    """With its sign; "-" for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:+.{digits}f}"
