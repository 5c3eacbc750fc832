"""What one step did, and where its norm comes from, as plain Python numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from zclip_optim.intervals import Interval
from zclip_optim.state import StepRecord


@dataclass(frozen=True, repr=False, eq=False)
class ClipMetrics:
    """One optimizer step, as ZClip saw it. Norms are in gradient-norm units, counters in steps.

    Args:
        grad_norm: norm of the gradients before clipping; NaN before the first step.
        clipped_norm: norm after clipping, the cap of `max_grad_norm` included.
        threshold: on a spike the norm that replaced it, otherwise the norm above which the step would have been one;
            infinite during warm-up.
        z_score: standard deviations above the running mean; NaN in warm-up and for a norm that is zero or not finite.
        clip_coef: factor applied to every gradient, in (0, 1]; 1 when nothing was clipped.
        mean: running mean of the norm, this step included.
        std: running standard deviation of the norm, this step included.
        clipped: the gradients were scaled (`clip_coef` < 1), for a spike or by `max_grad_norm`.
        is_spike: the z-score was above `z_thresh`, after the warm-up.
        skipped: the wrapped optimizer did not step: with `is_spike` for a spike above `z_skip`, without it because the
            norm was NaN or infinite.
        step: finite, non-zero norms seen.
        clipped_steps: steps so far whose gradients were scaled.
        spike_steps: spikes so far.
        skipped_steps: skipped steps so far.
        clip_rate: share of the finite, non-zero norms seen that were scaled, in [0, 1].
        spike_rate: share of the steps after warm-up that were spikes, in [0, 1].
        consecutive_spikes: spikes in a row up to this step.
        interval_steps: steps in the interval, which are those since `metrics` was read at an earlier step, or since the
            first step or a load of a checkpoint; skipped ones count, further evaluations of a closure do not.
        interval_max_norm: largest finite norm in the interval, before clipping; NaN if none was above 0.
        interval_min_coef: smallest `clip_coef` in the interval.
        interval_spikes: spikes in the interval.
        interval_skips: skipped steps in the interval.

    So who reads `metrics` every 50 steps sees the spikes in between. `metrics` and `group_metrics` share one interval:
    a loop that reads one of them at every step has intervals of one step. The callbacks for trainers have another one,
    and their logs miss no spike whoever reads `metrics`.

    Two of them are equal if all values but those of the interval are, which depend on when they were read; NaN is equal
    to NaN here, as both say that there is no number.

    With ``scope="group"`` the metrics of the whole step have the total norms and, of all groups, the smallest
    coefficients and the largest `z_score` and counters; `threshold`, `mean` and `std` are NaN, as only groups have
    them. `interval_max_norm` is then made of the groups' largest norms, though they be of several steps: no total norm
    in the interval is larger.

    Example:
        >>> import torch
        >>> from zclip_optim import ZClip
        >>> clipper, p = ZClip(max_grad_norm=1.0), torch.nn.Parameter(torch.zeros(4))
        >>> p.grad = torch.full((4,), 2.0)
        >>> norm = clipper.step(p)
        >>> clipper.metrics.grad_norm, clipper.metrics.clipped_norm, clipper.metrics.clipped
        (4.0, 1.0, True)
    """

    grad_norm: float
    clipped_norm: float
    threshold: float
    z_score: float
    clip_coef: float
    mean: float
    std: float
    clipped: bool
    is_spike: bool
    skipped: bool
    step: int
    clipped_steps: int
    spike_steps: int
    skipped_steps: int
    clip_rate: float
    spike_rate: float
    consecutive_spikes: int
    interval_steps: int = field(compare=False)
    interval_max_norm: float = field(compare=False)
    interval_min_coef: float = field(compare=False)
    interval_spikes: int = field(compare=False)
    interval_skips: int = field(compare=False)

    @classmethod
    def of(cls, record: StepRecord, warmup_steps: int, interval: Interval | None = None) -> "ClipMetrics":
        """Of one scope; None: with the interval of the record itself."""
        interval = interval or record.interval
        decision, stats = record.decision, record.decision.stats
        steps = stats.step - warmup_steps  # fewer than the spikes, if it was resumed with a longer warm-up
        return cls(
            grad_norm=record.norm,
            clipped_norm=decision.clipped_norm,
            threshold=decision.threshold,
            z_score=decision.z_score,
            clip_coef=decision.clip_coef,
            mean=stats.mean,
            std=stats.var**0.5,
            clipped=decision.clip_coef < 1,
            is_spike=decision.is_spike,
            skipped=record.skipped,
            step=stats.step,
            clipped_steps=stats.clipped_steps,
            spike_steps=stats.spike_steps,
            skipped_steps=record.counters.skipped_steps,
            clip_rate=stats.clipped_steps / stats.step if stats.step else 0.0,
            spike_rate=min(1.0, stats.spike_steps / steps) if steps > 0 else 0.0,
            consecutive_spikes=stats.streak,
            interval_steps=interval.steps,
            interval_max_norm=interval.max_norm or math.nan,
            interval_min_coef=interval.min_coef,
            interval_spikes=interval.spikes,
            interval_skips=interval.skips,
        )

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, ClipMetrics) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        """All that are compared in a row, with None for NaN, which is not equal to itself."""
        values = [getattr(self, each.name) for each in fields(self) if each.compare]
        return tuple(None if value != value else value for value in values)

    def __repr__(self) -> str:
        values = (f"{name}={v:.4g}" if type(v) is float else f"{name}={v}" for name, v in vars(self).items())
        return f"ClipMetrics({', '.join(values)})"

    def as_dict(self, prefix: str = "zclip/") -> dict[str, float]:
        """The metrics for a logger and for strict JSON, flags and counters as floats too.

        Args:
            prefix: put before every name.

        Returns:
            One finite float for each of the names above. What is no number is left out: threshold and z-score in
            warm-up, norms that are NaN or infinite, and all that is not known before the first step.

        Example:
            >>> from zclip_optim import ZClip
            >>> metrics = ZClip().metrics.as_dict("train/")
            >>> metrics["train/clip_coef"], "train/grad_norm" in metrics
            (1.0, False)
        """
        return {prefix + name: float(value) for name, value in vars(self).items() if math.isfinite(value)}


def combine(groups: Sequence[ClipMetrics]) -> ClipMetrics:
    """The metrics of a whole step from those of its scopes."""
    if len(groups) == 1:
        return groups[0]
    return ClipMetrics(
        grad_norm=math.hypot(*(m.grad_norm for m in groups)),
        clipped_norm=math.hypot(*(m.clipped_norm for m in groups)),
        threshold=math.nan,
        z_score=max((m.z_score for m in groups if not math.isnan(m.z_score)), default=math.nan),
        clip_coef=min(m.clip_coef for m in groups),
        mean=math.nan,
        std=math.nan,
        clipped=any(m.clipped for m in groups),
        is_spike=any(m.is_spike for m in groups),
        skipped=groups[0].skipped,
        step=max(m.step for m in groups),
        clipped_steps=max(m.clipped_steps for m in groups),
        spike_steps=max(m.spike_steps for m in groups),
        skipped_steps=groups[0].skipped_steps,
        clip_rate=max(m.clip_rate for m in groups),
        spike_rate=max(m.spike_rate for m in groups),
        consecutive_spikes=max(m.consecutive_spikes for m in groups),
        interval_steps=max(m.interval_steps for m in groups),
        interval_max_norm=math.hypot(*(m.interval_max_norm for m in groups if m.interval_max_norm > 0)) or math.nan,
        interval_min_coef=min(m.interval_min_coef for m in groups),
        interval_spikes=max(m.interval_spikes for m in groups),
        interval_skips=max(m.interval_skips for m in groups),
    )


class ParameterNorm(NamedTuple):
    """The gradient norm of one parameter.

    Args:
        name: of the parameter, or its position in the param groups.
        norm: L2 norm of its gradient, in gradient-norm units, >= 0; NaN or infinite if the gradient is not finite.
        share: of the squared norm of all parameters, in [0, 1]; they sum to 1. NaN if `norm` is not finite; the shares
            of the others are then those among themselves.

    Example:
        >>> norms = [ParameterNorm("weight", 3.0, 0.9), ParameterNorm("bias", 1.0, 0.1)]
        >>> {each.name: each.share for each in norms}
        {'weight': 0.9, 'bias': 0.1}
    """

    name: str
    norm: float
    share: float


def ranked(norms: Sequence[tuple[str, float]], limit: int | None) -> list[ParameterNorm]:
    """The first `limit` of parameters: those whose norm is not finite before the others, the largest first."""
    largest = max((norm for _, norm in norms if math.isfinite(norm)), default=0.0) or 1.0  # whose square may overflow
    total = math.fsum((norm / largest) ** 2 for _, norm in norms if math.isfinite(norm)) or 1.0
    found = [
        ParameterNorm(name, norm, (norm / largest) ** 2 / total if math.isfinite(norm) else math.nan)
        for name, norm in norms
    ]
    found.sort(key=lambda each: each.norm if math.isfinite(each.norm) else math.inf, reverse=True)
    return found[:limit]
