"""What a replay says: of the log, of all steps, and of the largest spikes. Each function gives lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from zclip_optim.logs import NormLog
from zclip_optim.metrics import ClipMetrics

LOCKED_IN = 20  # spikes in a row at the end
LISTED = 10  # spikes
CAVEAT = (
    "A replay cannot show how the run would have gone on: once a spike had been clipped, the norms after it would have "
    "been others."
)


def longest_streak(metrics: Sequence[ClipMetrics]) -> int:
    """The most spikes in a row."""
    return max(m.consecutive_spikes for m in metrics)


def is_locked_in(metrics: Sequence[ClipMetrics]) -> bool:
    """Whether the run ends in a streak of spikes, as after a rise of the norm that the statistics do not follow."""
    return metrics[-1].consecutive_spikes >= LOCKED_IN


def about_log(log: NormLog) -> Iterator[str]:
    """What was found, and what was not: norms that are no numbers, rows without one, steps without a row."""
    where = f", steps {_plain(log.steps[0])} to {_plain(log.steps[-1])}" if log.has_steps else ""
    yield f"{len(log.norms):,} norms under {log.column!r}{where}"
    broken = sum(not math.isfinite(norm) for norm in log.norms)
    if broken:
        yield f"- NaN or infinite: {broken:,}{', with null taken for NaN' if log.nulls else ''}"
    if 0.0 in log.norms:
        yield f"- zero: {log.norms.count(0.0):,}, which move no statistics"
    if log.rows_without:
        yield f"- rows without a norm: {log.rows_without:,}, which are no steps: something else was logged there"
    if log.has_steps:
        yield from _about_steps(log)
    else:
        yield "- no step was logged: steps are the numbers of the norms, from 1 on"


def _about_steps(log: NormLog) -> Iterator[str]:
    steps, interval = log.steps, log.interval
    differences = [after - before for before, after in itertools.pairwise(steps)]
    if interval > 1:
        every = _plain(interval)
        yield (
            f"- logged every {every} steps: a spike between two rows is not seen, and the statistics move {every} "
            "times as slowly"
        )
        if log.interval_max_norm > max(filter(math.isfinite, log.norms)):
            yield f"- between the rows norms reach {log.interval_max_norm:.4g}, by interval_max_norm"
    missing = sum(round(d / interval) - 1 for d in differences if d > interval)
    if missing:
        yield f"- rows that are missing in between, by the steps: {missing:,}"
    back = [i for i, d in enumerate(differences) if d <= 0]
    if back:
        first = f"{_plain(steps[back[0]])} to {_plain(steps[back[0] + 1])}"
        yield (
            f"- steps that go back or repeat: {len(back):,}, first from {first}, as in a run that was resumed; rows "
            "are taken as they come"
        )


def about_steps(metrics: Sequence[ClipMetrics], fixed: float) -> Iterator[str]:
    """Counts over the run, beside those of `clip_grad_norm_` at `fixed`, in gradient-norm units."""
    last = metrics[-1]
    over = sum(fixed < m.grad_norm < math.inf for m in metrics)
    spikes_skipped = sum(m.skipped and m.is_spike for m in metrics)
    skipped = {"NaN or infinite": last.skipped_steps - spikes_skipped, "above z_skip": spikes_skipped}
    scaled = f"{last.clipped_steps:,} ({last.clip_rate:.1%} of the finite norms)"
    spikes = f"{last.spike_steps:,} ({last.spike_rate:.1%} of the norms after warm-up)"
    streak = f"the last {last.consecutive_spikes:,} norms are spikes"
    rows = {
        "steps": f"{len(metrics):,} logged",
        "scaled": f"{scaled}; by clip_grad_norm_ at {fixed:g}: {over:,} ({over / max(1, last.step):.1%})",
        "spikes": "0, as all norms are warm-up" if last.threshold == math.inf else spikes,
        "skipped": ", ".join(f"{why}: {count:,}" for why, count in skipped.items() if count) or "0",
        "longest streak": f"{longest_streak(metrics):,} (spikes in a row)",
        "ends locked in": f"yes: {streak}" if is_locked_in(metrics) else "no",
    }
    yield from (f"{name:<16}{value}" for name, value in rows.items())


def about_spikes(metrics: Sequence[ClipMetrics], steps: Sequence[float], fixed: float) -> Iterator[str]:
    """A table of the largest, those first that would have been scaled down the most."""
    spikes = [(step, m) for step, m in zip(steps, metrics, strict=True) if m.is_spike]
    if not spikes:
        yield "No spikes."
        return
    largest = sorted(spikes, key=lambda spike: spike[1].clip_coef)[:LISTED]
    yield f"The {len(largest)} largest of {len(spikes):,} spikes, by how far they would have been scaled down:"
    rows = [("step", "norm", "z", "clipped to", f"by clip_grad_norm_ at {fixed:g}")]
    for step, m in largest:
        clipped = "skipped" if m.skipped else f"{m.clipped_norm:.4g}"
        rows.append((_plain(step), f"{m.grad_norm:.4g}", _z(m.z_score), clipped, f"{min(m.grad_norm, fixed):.4g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ("   ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def _plain(step: float) -> str:
    return f"{step:,.10g}"


def _z(score: float) -> str:
    return f"{score:,.1f}" if score < 1e5 else f"{score:.1e}"
