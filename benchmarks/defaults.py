"""Decides the defaults from the results, by a rule that was written before the runs: its second version.

The rule. On every workload the differences of the paired runs, on seeds that nobody had looked at, are taken as a
normal deviate of the same probability as their Student's t, and combined by their sum over the square root of their
number. A value becomes the default if it is in favour by more than 3 combined and no workload vetoes. One vetoes if it
is worse by more than 3 deviates and by more than matters to anybody: 0.01 nats; 0.05 in the logarithm of the episodes;
0.1 in a log loss if both have learned the task (their mean loss of the last fifth lies below the problem's level), and
if one of them has not, whatever the difference is.

The questions, in this order, each with what was decided before: `lookback` None or 0.1; `alpha_down` None or 0.9; on
the language models alone whether README's first example for them has `max_grad_norm=1.0`, which is advice and no
default, so that it is not carried on; and on digits under SGD whose inputs are three times as large from the middle of
the run on, whether `patience` is None or 200 for a wrapped SGD or ASGD. The measure of each workload is part of the
rule: the validation loss, or for problems whose held-out data say nothing of the optimizer the logarithm of the mean
loss of the last fifth, on CartPole that of the number of episodes; a run that diverged counts with the loss of a model
that knows only how often each target occurs. A workload that stands in several files counts once, with the most seeds
that it has in one; the digits with a summed loss, which cannot differ from those with a mean one, do not count again;
where no pair differs the deviate is 0. Every workload has at least 8 seeds, the digits and CartPole 20, modular
division, whose runs are long, 3. Other values are run for information.

Beside each verdict stands what the first version of the rule would have said (differences in units of their standard
errors, combined by more than 2 in favour, and no workload worse by more than 3), and what the values do to real
histories, replayed by `detector`.

Reads what `instability`, `regret`, `sweep` and `detector` have written to --results, writes defaults.json and
defaults.md to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.evidence.histories import HISTORY_NOTES, history_line
from benchmarks.evidence.paired import Difference, combined
from benchmarks.evidence.results import Row, difference_of, known
from benchmarks.options import add_out_option, prepare_folder
from benchmarks.paper.cells import FIRST_SEED, LOG_EPISODES, LOG_LOSS, NATS, TRIPLED
from benchmarks.paper.tables import TABLES
from benchmarks.report.pages import Result, document, write_result
from benchmarks.report.summary import heading, markdown
from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.methods import METHODS
from benchmarks.training.problems import PROBLEMS

IN_FAVOUR, WORSE = 3.0, 3.0  # normal deviates
FIRST_IN_FAVOUR, FIRST_WORSE = 2.0, 3.0  # standard errors, of the rule's first version
MATTERS = {NATS: 0.01, LOG_LOSS: 0.1, LOG_EPISODES: 0.05}
RULE = (__doc__ or "").split("\n\n")[1:-1]  # what stands above, for the page

Settings = dict[str, Any]  # of ZClipOptimizer
Entry = dict[str, Any]  # a line of a table: a workload's difference


def is_counted(row: Row) -> bool:
    """Not what cannot differ from another workload."""
    return row["architecture"] != "digits-sgd-sum"


def is_language_model(row: Row) -> bool:
    """Whether it is one."""
    return row["architecture"] in ARCHITECTURES and ARCHITECTURES[row["architecture"]].is_text


def is_shifted_for_sgd(row: Row) -> bool:
    """Whether the norms rise for good, under an optimizer whose steps are as long as its gradients."""
    return row["condition"] == TRIPLED


@dataclass(frozen=True)
class Question:
    """An option whose value is None in the paper, what may take its place, and where that is judged."""

    option: str
    values: tuple[float, ...]
    where: Callable[[Row], bool] = is_counted
    is_default: bool = True  # and so carried on to the questions that follow


QUESTIONS = (
    Question("lookback", (0.1,)),
    Question("alpha_down", (0.9,)),
    Question("max_grad_norm", (1.0,), is_language_model, is_default=False),
    Question("patience", (200,), is_shifted_for_sgd),
)
PAPER: Settings = METHODS["paper"].settings


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one value, in normal deviates, positive ones in favour, and what its first version would.

    combined, least: over the workloads. vetoes: the workloads that do. first_*: the first version, in standard errors.
    """

    combined: float
    least: float
    vetoes: list[str]
    passes: bool
    first_combined: float
    first_least: float
    first_passes: bool


def judge(entries: Sequence[Entry]) -> Verdict:
    """The rule, and its first version."""
    deviates = finite([each["as_normal"] for each in entries])
    units = finite([each["in_favour"] for each in entries])
    total, least, first, first_least = (
        *(combined(deviates), min(deviates, default=math.nan)),
        *(combined(units), min(units, default=math.nan)),
    )
    vetoes = [each["workload"] for each in entries if is_vetoed_by(each)]
    first_passes = first > FIRST_IN_FAVOUR and first_least >= -FIRST_WORSE
    return Verdict(total, least, vetoes, total > IN_FAVOUR and not vetoes, first, first_least, first_passes)


def is_vetoed_by(entry: Entry) -> bool:
    """Whether a workload is worse by more than chance, and by more than matters."""
    enough = MATTERS[entry["unit"]] if entry["learned"] else 0.0
    return entry["as_normal"] < -WORSE and entry["mean"] > enough


def finite(values: Iterable[float]) -> list[float]:
    """Without those that are not known."""
    return [value for value in values if math.isfinite(value)]


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
        if question.is_default:
            decided[question.option] = answers[-1]["decided"]
    seeds = range(FIRST_SEED, FIRST_SEED + max(len(row["values"]["measure"]) for row in rows))
    found = {"rule": RULE, "files": files, "answers": answers, "histories": read_histories(args.results)}
    result = heading("defaults", seeds) | found
    write_result(args.out / "defaults.json", result, page)
    print(*map(section, answers), sep="\n\n")
    print(f"\nwritten to {args.out}: defaults.json, defaults.md")


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of ZClipOptimizer in all files that there are, each with the most seeds that it has in one."""
    found: dict[str, Row] = {}
    files = [path for path in (folder / f"{name}.json" for name in ("instability", "regret", *TABLES)) if path.exists()]
    if not files:
        raise UserError(f"--results {folder}: no instability.json, regret.json or result of a sweep there")
    for path in files:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if row.get("settings"):  # of ZClipOptimizer; files from before this rule have none
                name = row["cells"][0]
                found[name] = max(found.get(name, row), row, key=lambda each: len(each["cells"]))
    return list(found.values()), [path.name for path in files]


def read_histories(folder: Path) -> list[dict[str, Any]]:
    """What `detector` found on real histories, if it was run."""
    path = folder / "detector.json"
    return json.loads(path.read_text()).get("histories", []) if path.exists() else []


def answer(question: Question, decided: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """The rule's verdict on each value of an option, and what follows."""
    by_settings = {(workload_of(row), frozenset(settings_of(row).items())): row for row in rows if question.where(row)}
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
    pairs = [(rows[w, after], row) for (w, s), row in rows.items() if s == before and (w, after) in rows]
    entries = [difference_entry(row, other, difference_of(row, other)) for row, other in pairs]
    return {"value": value, "differences": entries, "verdict": vars(judge(entries))}


def difference_entry(row: Row, other: Row, each: Difference) -> Entry:
    """A line of the table; positive is in favour."""
    return {
        "workload": name_of(row),
        "unit": row["unit"],
        "learned": row["unit"] != LOG_LOSS or (has_learned(row) and has_learned(other)),
        **each._asdict(),
        "in_favour": -each.units,
        "as_normal": -each.normal,
    }


def has_learned(row: Row) -> bool:
    """Whether the loss of the last fifth lies below the level of its problem."""
    losses = known(row["values"]["last_loss"])
    return bool(losses) and statistics.geometric_mean(losses) < PROBLEMS[row["architecture"]].level


def settings_of(row: Row) -> Settings:
    """All of them."""
    settings: Settings = row["settings"]
    return settings


def workload_of(row: Row) -> tuple[Any, ...]:
    """What a cell has besides method and seed."""
    preset = None if row["architecture"] in PROBLEMS else row["preset"]
    return (preset, *(row[name] for name in ("architecture", "condition", "lr", "steps", "batch", "beta2", "muon")))


def name_of(row: Row) -> str:
    """The workload in words."""
    preset, architecture, condition, lr, steps, batch, beta2, muon = workload_of(row)
    how = f", beta2 {beta2:g}" * is_language_model(row) + ", Muon" * muon
    return f"{preset + ' ' if preset else ''}{architecture}{how}, lr {lr:g}, {condition}, {steps} x {batch}"


def page(result: Result) -> str:
    """Every question with its table and verdict."""
    return document(
        "defaults: what the rule says",
        result,
        *result["rule"],
        *(text for each in result["answers"] for text in (f"## {each['option']}", section(each))),
        *real_histories(result["histories"]),
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
    vetoes = "; ".join(verdict["vetoes"]) or "none"
    summary = (
        f"Combined {number(verdict['combined'])} deviates, least {number(verdict['least'])}, vetoes: {vetoes}; "
        f"{outcome(verdict['passes'])}. The first version of the rule: combined {number(verdict['first_combined'])}, "
        f"least {number(verdict['first_least'])}; {outcome(verdict['first_passes'])}."
    )
    return f"{markdown([line_of(each) for each in value['differences']])}\n\n{summary}"


def outcome(passes: bool) -> str:
    """In words."""
    return "passes" if passes else "does not pass"


def real_histories(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the values do to real histories, if they were replayed."""
    return ("## Real histories", markdown(list(map(history_line, rows))), *HISTORY_NOTES) if rows else ()


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
    return "-" if value is None or math.isnan(value) else f"{value + 0.0:+.{digits}f}"
