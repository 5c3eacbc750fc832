"""Gradient norms of real runs, from their public logs, and what a rule would have done to them.

A replay shows what would have been clipped, not how the run would have gone on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zclip_optim.algorithm import Decision, NormStats, ZClipConfig, decide

FOLDER = Path(__file__).with_name("norms")
WINDOW = 51  # norms before, whose median is the ordinary norm
FIRST = 25  # steps, of which nothing is counted: all rules warm up
SPIKE = 3.0  # medians
CAUGHT = 1.5  # medians that are left of what was caught
PROBE = 10.0  # medians, of the norm that is tried at every step
APART = 10  # steps between isolated spikes
STREAK = 20  # steps

HISTORY_NOTES = (
    f"spike: a norm over {SPIKE:g} times the median of the {WINDOW} before it; isolated: none of the {APART} before it "
    f"is one; caught: cut to below {CAUGHT:g} medians; tenfold norm caught: the share of the steps at which a norm of "
    f"{PROBE:g} medians would be; ordinary steps clipped: of all that are no spikes; longest streak: spikes of the "
    f"rule in a row; locked in: the history ends in a streak of at least {STREAK}; the first {FIRST} do not count",
)


@dataclass(frozen=True)
class History:
    """The norms of a run as they were logged, every so many steps; NaN where one was not finite."""

    name: str
    kind: str
    logging_steps: int
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Replayed:
    """What a rule did to a history: counts of steps."""

    history: str
    steps: int
    isolated: int  # spikes
    isolated_caught: int
    others: int  # spikes
    others_caught: int
    tenfold_caught: int
    ordinary: int
    ordinary_clipped: int
    longest_streak: int
    locked_in: bool


@cache
def load_histories() -> tuple[History, ...]:
    """All of them."""
    return tuple(map(load_history, sorted(FOLDER.glob("*.json"))))


def load_history(path: Path) -> History:
    """One of them; null has become NaN."""
    found = json.loads(path.read_text())
    norms = tuple(math.nan if norm is None else float(norm) for norm in found["grad_norm"])
    return History(path.stem, found["kind"], found["logging_steps"], norms)


def replayed(history: History, options: Mapping[str, Any]) -> Replayed:
    """What ZClip with these options does to it."""
    config, stats = ZClipConfig(**options), NormStats()
    medians = running_medians(history.norms)
    steps: list[tuple[float, float, Decision, bool]] = []  # norm, median, decision, whether a tenfold one is caught
    for norm, median in zip(history.norms, medians, strict=True):
        decision = decide(norm, stats, config)
        caught = decide(PROBE * median, stats, config).clipped_norm < CAUGHT * median
        steps.append((norm, median, decision, caught))
        stats = decision.stats
    return summarized(history.name, steps)


def running_medians(norms: Sequence[float]) -> list[float]:
    """Before each step, of the last WINDOW norms that were usable; NaN before there is one."""
    seen: list[float] = []
    medians = []
    for norm in norms:
        medians.append(statistics.median(seen[-WINDOW:]) if seen else math.nan)
        if 0 < norm < math.inf:
            seen.append(norm)
    return medians


def summarized(name: str, steps: Sequence[tuple[float, float, Decision, bool]]) -> Replayed:
    """The counts."""
    spiked = [norm > SPIKE * median for norm, median, *_ in steps]
    streaks = [int(decision.stats.streak) for *_, decision, _ in steps]
    counted = [i for i, (norm, *_) in enumerate(steps) if i >= FIRST and 0 < norm < math.inf]
    isolated = [i for i in counted if spiked[i] and not any(spiked[max(0, i - APART) : i])]
    others = [i for i in counted if spiked[i] and any(spiked[max(0, i - APART) : i])]
    ordinary = [i for i in counted if not spiked[i]]

    def caught(indices: Sequence[int]) -> int:
        return sum(steps[i][2].clipped_norm < CAUGHT * steps[i][1] for i in indices)

    return Replayed(
        history=name,
        steps=len(counted),
        isolated=len(isolated),
        isolated_caught=caught(isolated),
        others=len(others),
        others_caught=caught(others),
        tenfold_caught=sum(steps[i][3] for i in counted),
        ordinary=len(ordinary),
        ordinary_clipped=sum(steps[i][2].clip_coef < 1 for i in ordinary),
        longest_streak=max(streaks),
        locked_in=streaks[-1] >= STREAK,
    )


def replayed_rows(rules: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each history and rule, as `detector` writes them."""
    return [{"rule": rule, **asdict(replayed(h, options))} for h in load_histories() for rule, options in rules.items()]


def history_line(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""
    return {
        "history": row["history"],
        "rule": row["rule"],
        "isolated spikes caught": f"{row['isolated_caught']} of {row['isolated']}",
        "other spikes caught": f"{row['others_caught']} of {row['others']}",
        "tenfold norm caught": f"{row['tenfold_caught'] / row['steps']:.0%}",
        "ordinary steps clipped": f"{row['ordinary_clipped'] / max(1, row['ordinary']):.1%}",
        "longest streak": str(row["longest_streak"]),
        "locked in": "yes" if row["locked_in"] else "no",
    }
