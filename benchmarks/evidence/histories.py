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

from zclip_optim.algorithm import ZClipConfig, decide
from zclip_optim.metrics import ClipMetrics
from zclip_optim.replay import step_records
from zclip_optim.replay.report import LOCKED_IN, is_locked_in, longest_streak

FOLDER = Path(__file__).with_name("norms")
WINDOW = 51  # norms before, whose median is the ordinary norm
FIRST = 25  # steps, of which nothing is counted: all rules warm up
SPIKE = 3.0  # medians
CAUGHT = 1.5  # medians that are left of what was caught
PROBE = 10.0  # medians, of the norm that is tried at every step
APART = 10  # steps between isolated spikes

HISTORY_NOTES = (
    f"spike: a norm over {SPIKE:g} times the median of the {WINDOW} before it; isolated: none of the {APART} before it "
    f"is one; caught: cut to below {CAUGHT:g} medians; tenfold norm caught: the share of the steps at which a norm of "
    f"{PROBE:g} medians would be; ordinary steps clipped: of all that are no spikes; longest streak: spikes of the "
    f"rule in a row; locked in: the history ends in a streak of at least {LOCKED_IN}; the first {FIRST} do not count",
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
    config, medians = ZClipConfig(**options), running_medians(history.norms)
    metrics: list[ClipMetrics] = []
    tenfold_caught: list[bool] = []
    for record, median in zip(step_records(history.norms, config), medians, strict=True):
        metrics.append(ClipMetrics.of(record, config.warmup_steps))
        tenfold_caught.append(decide(PROBE * median, record.before, config).clipped_norm < CAUGHT * median)
    return summarized(history.name, metrics, medians, tenfold_caught)


def running_medians(norms: Sequence[float]) -> list[float]:
    """Before each step, of the last WINDOW norms that were usable; NaN before there is one."""
    seen: list[float] = []
    medians = []
    for norm in norms:
        medians.append(statistics.median(seen[-WINDOW:]) if seen else math.nan)
        if 0 < norm < math.inf:
            seen.append(norm)
    return medians


def summarized(
    name: str, metrics: Sequence[ClipMetrics], medians: Sequence[float], tenfold_caught: Sequence[bool]
) -> Replayed:
    """The counts."""
    spiked = [m.grad_norm > SPIKE * median for m, median in zip(metrics, medians, strict=True)]
    counted = [i for i, m in enumerate(metrics) if i >= FIRST and 0 < m.grad_norm < math.inf]
    isolated = [i for i in counted if spiked[i] and not any(spiked[max(0, i - APART) : i])]
    others = [i for i in counted if spiked[i] and any(spiked[max(0, i - APART) : i])]
    ordinary = [i for i in counted if not spiked[i]]

    def caught(indices: Sequence[int]) -> int:
        return sum(metrics[i].clipped_norm < CAUGHT * medians[i] for i in indices)

    return Replayed(
        history=name,
        steps=len(counted),
        isolated=len(isolated),
        isolated_caught=caught(isolated),
        others=len(others),
        others_caught=caught(others),
        tenfold_caught=sum(tenfold_caught[i] for i in counted),
        ordinary=len(ordinary),
        ordinary_clipped=sum(metrics[i].clipped for i in ordinary),
        longest_streak=longest_streak(metrics),
        locked_in=is_locked_in(metrics),
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
