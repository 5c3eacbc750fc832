"""What README says of the results, made of the results: its table, and its sentences that have a number.

Prints them, each with the file that it is from, and says which README does not have. With --write the numbers are put
into README.md, and into DESCRIPTION.md where it has the sentence; the words stay as they are. Where other words are
needed, since a sign has changed for one, README has to be written anew, and so has the sentence here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import UserError
from benchmarks.defaults import is_language_model
from benchmarks.evidence.paired import Difference, difference
from benchmarks.evidence.results import Row, by_workload, difference_of, known
from benchmarks.overhead import OURS, SIZES
from benchmarks.paper.cells import BAD_SHARD, CARTPOLE, NATS
from benchmarks.regret import CLOSE, FIXED, compared, summary_line
from benchmarks.training.contenders import AUTOCLIP, AUTOCLIP_LOW, CAPPED, FOLLOWING, LOOKING_BACK, NONE, PAPER, PATIENT

ROOT = Path(__file__).parents[1]
README, DESCRIPTION = ROOT / "README.md", ROOT / "DESCRIPTION.md"
CLIPPED_AT_1 = "fixed 1"
ROWS = {
    "no clipping": NONE.label,
    "`clip_grad_norm_` at 1.0": CLIPPED_AT_1,
    "autoclip, its default": AUTOCLIP.label,
    "autoclip, 10th percentile": AUTOCLIP_LOW.label,
    "`ZClipOptimizer`, the paper's rule": PAPER.label,
    "with `lookback=0.1, alpha_down=0.9`": FOLLOWING.label,
}
NUMBER = r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?"
TABLE = r"^\| \| mean regret.*?(?=\n\n)"
UNMEASURED = (
    r"^```.*?^```|`[^`]*`|^ {4}.*?$|^>.*?$|arXiv:\S+|\(http\S+\)|(?:Python|PyTorch) \d\.\d+|\d+\.\d+\.\d+|\b1\.0\b"
)


class Claim(NamedTuple):
    """Some words of README with their numbers, and the result that these are from."""

    text: str
    source: str

    def pattern(self) -> str:
        """Finds the words with whatever numbers, and wherever the lines break."""
        words = re.split(NUMBER, self.text)
        return f"({NUMBER})".join(re.escape(part).replace(r"\ ", r"\s+") for part in words)

    def is_in(self, page: str) -> bool:
        """Whether the page has it, numbers and all."""
        found = re.search(self.pattern(), page)
        return found is not None and list(found.groups()) == re.findall(NUMBER, self.text)

    def put_into(self, page: str) -> str:
        """The page with these numbers, if it has the words."""
        numbers = re.findall(NUMBER, self.text)

        def with_numbers(found: re.Match[str]) -> str:
            left = iter(numbers)
            return re.sub(NUMBER, lambda _: next(left), found[0])

        return re.sub(self.pattern(), with_numbers, page)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the results are, and whether to write."""
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the NAME.json")
    parser.add_argument("--write", action="store_true", help="put table and numbers into README.md and DESCRIPTION.md")


def run(args: argparse.Namespace) -> None:
    """Prints what README says, or should say; writes it if told to."""
    made, claims = table(args.results), claims_of(args.results)
    if args.write:
        for path in (README, DESCRIPTION):
            path.write_text(with_all(path.read_text(encoding="utf8"), made, claims), encoding="utf8")
    readme = README.read_text(encoding="utf8")
    print(f"regret.json, instability.json:\n\n{made}\n")
    for claim in claims:
        print(f"{claim.source}: {claim.text}")
    left = problems(readme, made, claims)
    if left:
        raise UserError("README.md: " + "; ".join(left))


def with_all(page: str, made: str, claims: Iterable[Claim]) -> str:
    """The page with the table and the numbers."""
    page = re.sub(TABLE, lambda _: made, page, flags=re.DOTALL | re.MULTILINE)
    for claim in claims:
        page = claim.put_into(page)
    return page


def problems(readme: str, made: str, claims: Sequence[Claim]) -> list[str]:
    """What README lacks of these, and the measured numbers in it that none of these has."""
    missing = [f"does not say: {claim.text}" for claim in claims if not claim.is_in(readme)]
    if made not in readme:
        missing.append("has another table")
    rest, _, after = readme.partition("\n## Arguments")  # whose numbers are defaults
    rest = re.sub(TABLE, "", rest + after.partition("\n## ")[2], flags=re.DOTALL | re.MULTILINE)
    for claim in claims:
        rest = re.sub(claim.pattern(), "", rest)
    rest = re.sub(UNMEASURED, "", rest, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?<![\w.])\d+(?:\.\d+)?%|(?<![\w.])\d+\.\d+(?![\d.])", rest)
    return missing + [f"has {number}, and it is not known from where" for number in found]


def load(results: Path, name: str) -> Any:
    """A result."""
    path = results / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"--results: {path}: {error.strerror}") from error


def table(results: Path) -> str:
    """Every method over all workloads: what it costs not to tune, and the spikes that come by themselves."""
    workloads, regrets = compared(load(results, "regret")["rows"])
    bad = {name: methods for name, methods in workloads.items() if is_bad(methods)}
    spikes = spikes_of(load(results, "instability")["rows"])
    lines = []
    for title, label in ROWS.items():
        line = summary_line(label, workloads, regrets)
        lines.append(
            {
                "": title,
                "mean regret": line["mean regret"],
                "worst": line["worst"],
                f"within {CLOSE:g}": line[f"within {CLOSE:g}"].replace("0 of 0", "-"),
                "mean, bad data": summary_line(label, bad, regrets)["mean regret"],
                "spikes a run": f"{spikes[label]:.1f}",
            }
        )
    return narrow(lines)


def narrow(lines: Sequence[dict[str, str]]) -> str:
    """As a table without the blanks that align the cells, nor the signs of what is above zero."""
    rows = [[f" {cell.removeprefix('+')} ".replace("  ", " ") for cell in line] for line in map(dict.values, lines)]
    titles = [f" {title} ".replace("  ", " ") for title in lines[0]]
    return "\n".join(f"|{'|'.join(row)}|" for row in (titles, ["---", *["---:"] * (len(titles) - 1)], *rows))


def is_bad(methods: Mapping[str, Row]) -> bool:
    """Whether the workload has bad data."""
    return next(iter(methods.values()))["condition"] == BAD_SHARD


def spikes_of(rows: Sequence[Row]) -> dict[str, float]:
    """The mean over the workloads that all of the table's methods were run on, of the spikes per run."""
    workloads = common_of(rows).values()
    return {label: statistics.fmean(spikes_in(methods[label]) for methods in workloads) for label in ROWS.values()}


def spikes_in(row: Row) -> float:
    """Spikes per run, the mean over the seeds."""
    return statistics.fmean(known(row["values"]["spikes"]))


def common_of(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The workloads that all of the table's methods were run on."""
    return {name: methods for name, methods in by_workload(rows).items() if methods.keys() >= set(ROWS.values())}


def claims_of(results: Path) -> list[Claim]:
    """All of them."""
    return [
        *of_regret(load(results, "regret")["rows"]),
        *of_defaults(load(results, "defaults")["answers"]),
        *of_detector(load(results, "detector")),
        *of_instability(load(results, "instability")["rows"]),
        *of_overhead(load(results, "overhead")["rows"]),
    ]


def of_regret(rows: Sequence[Row]) -> list[Claim]:
    """What the cap of 1.0 does, and how many workloads there are."""
    workloads, _ = compared(rows)
    in_nats = [methods for methods in workloads.values() if methods[PAPER.label]["unit"] == NATS]
    text = [m for m in by_workload(rows).values() if CAPPED.label in m and is_language_model(m[CAPPED.label])]
    gap = max(abs(difference_of(m[CAPPED.label], m[CLIPPED_AT_1]).mean) for m in text)
    vit = [m for m in in_nats if m[PAPER.label]["architecture"] == "vit"]
    cap = pooled(vit, CAPPED.label, PAPER.label)
    verdict = "no verdict: " if abs(cap.units) < 2 else ""
    (cartpole,) = (m for m in workloads.values() if m[PAPER.label]["architecture"] == CARTPOLE)
    times = math.exp(difference_of(cartpole[PAPER.label], cartpole[CLIPPED_AT_1]).mean)
    return [
        Claim(text, "regret.json")
        for text in (
            f"the best of {len(FIXED)} fixed thresholds",
            f"The {len(in_nats)} workloads are",
            f"within {math.ceil(1e3 * gap) / 1e3:.3f} nats of what you have on {len(text)} of {len(text)} of those",
            f"{verdict}that cap moves the loss of a small ViT by {cap.mean:+.2f} ± {cap.error:.2f} nats",
            f"CartPole takes it {times:.2f} times the episodes of 1.0",
        )
    ]


def pooled(workloads: Sequence[Mapping[str, Row]], one: str, other: str) -> Difference:
    """The paired differences of some workloads together."""
    values: tuple[list[float], list[float]] = [], []
    for methods in workloads:
        pair = [methods[label]["values"]["measure"] for label in (one, other)]
        both = min(map(len, pair))
        for into, measures in zip(values, pair, strict=True):
            into.extend(math.nan if value is None else value for value in measures[:both])
    return difference(*values)


def of_defaults(answers: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The cap on language models."""
    (answer,) = (each for each in answers if each["option"] == "max_grad_norm")
    ahead = [-each["mean"] for each in answer["values"][0]["differences"]]
    won = [gain for gain in ahead if gain > 0]
    text = f"beats no cap on {len(won)} of {len(ahead)} small ones, by {min(won):.3f} to {max(won):.3f} nats"
    return [Claim(text, "defaults.json")]


def of_detector(result: Mapping[str, Any]) -> list[Claim]:
    """What the rule does to histories of real runs, after a shift, and after a bad start."""
    rules = {(row["history"], row["rule"]): row for row in result["histories"]}
    dpo, back = (rules["dpo-rises-for-good", rule] for rule in (PAPER.label, LOOKING_BACK.label))
    grpo = rules["grpo-two-levels", PAPER.label]
    missed = grpo["isolated"] - grpo["isolated_caught"]
    scaled, after = (f"{100 * row['ordinary_clipped'] / row['ordinary']:.1f}%" for row in (dpo, back))
    blind = {
        rule: max(max(row["steps"]) for row in result["blind"] if row["rule"] == rule and row["factor"] == 1e4)
        for rule in (PAPER.label, LOOKING_BACK.label)
    }
    shares = {row["detector"]: row["mean"] for row in result["rows"] if row["sequence"] == "shift_10"}
    stuck, freed = (f"{100 * shares[each.label]:.1f}%" for each in (PAPER, PATIENT))
    return [
        Claim(text, "detector.json")
        for text in (
            f"in a DPO log {scaled} of the usual steps are scaled, with it {after}",
            f"`lookback` catches {back['isolated_caught']} of {back['isolated']} lone spikes of that DPO log, "
            f"the rule alone {dpo['isolated_caught']}",
            f"the rule misses {missed} of {grpo['isolated']} lone spikes of a GRPO log",
            f"long after a shift {stuck} of the steps are scaled, with it {freed}",
            f"one norm x 10,000 hides spikes up to step {blind[PAPER.label]}, with it to {blind[LOOKING_BACK.label]}",
        )
    ]


def of_instability(rows: Sequence[Row]) -> list[Claim]:
    """The problem on which the rule is no help."""
    (methods,) = (m for m in by_workload(rows).values() if m[PAPER.label]["architecture"] == "sums-transformer")
    ours, none = (spikes_in(methods[each.label]) for each in (PAPER, NONE))
    return [
        Claim(text, "instability.json")
        for text in (
            f"the mean of {len(common_of(rows))} problems",
            f"the rule has {ours:.1f} spikes a run, no clipping {none:.1f}",
        )
    ]


def of_overhead(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The cost of a step beside plain clipping's."""
    models = {size.name for size in SIZES}
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["size"] in models:
            ratios[row["dtype"]].append(row["own_us"][OURS] / row["own_us"]["clip_grad_norm_"])
    least, most, half = min(ratios["float32"]), max(ratios["float32"]), max(ratios["bfloat16"])
    models_in_float32 = f"{least:.1f} to {most:.1f} of `clip_grad_norm_` on {len(ratios['float32'])} models"
    text = f"On a CPU it costs {models_in_float32}, bfloat16 {half:.1f}"
    return [Claim(text, "overhead.json")]
