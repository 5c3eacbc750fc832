"""The paper: configuration, running statistics and the decision for one step. Numbers in, numbers out.

Nothing here knows of gradients, parameters, optimizers or devices, so the module also serves people who have a gradient
norm of their own (DeepSpeed and Megatron report one):

>>> config, stats = ZClipConfig(warmup_steps=2), NormStats()
>>> for norm in (1.0, 1.2, 9.0):
...     decision = decide(norm, stats, config)
...     stats = decision.stats
>>> decision.is_spike, round(decision.clipped_norm, 3)
(True, 1.108)

The same lines run on Python floats and on tensors; they differ in how a branch is taken alone (`_branch`, `_where`): on
tensors both sides are computed and selected from, so that on an accelerator the host never reads a value back.

References:
    Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

Scalar: TypeAlias = Any  # a Python number, or a tensor on the gradients' device with one element per scope
T = TypeVar("T")

TINY = 2.0**-126  # stands in for a z-score denominator of 0; a normal number in float32 too


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


@dataclass(frozen=True, kw_only=True)
class ZClipConfig:
    """The hyperparameters of ZClip, validated; `ZClipOptimizer` documents each of them.

    After construction `clip_option` holds no alias and `z_thresh` is what a `percentile` stands for.

    Raises:
        ValueError: an argument is out of its range; names the argument, the value and the range.

    >>> ZClipConfig(mode="percentile", percentile=0.99).z_thresh
    2.3263478740408408
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    mode: str = "zscore"
    clip_option: str = "adaptive_scaling"
    percentile: float | None = None
    clip_factor: float = 1.0
    max_grad_norm: float | None = None
    warmup_steps: int = 25
    eps: float = 1e-6
    skip_update_on_spike: bool = False
    patience: int | None = 25
    nonfinite: str = "skip"
    max_consecutive_nonfinite: int | None = 25
    scope: str = "global"

    def __post_init__(self) -> None:
        self._check_real("alpha", lambda x: 0 <= x < 1, "a number with 0 <= alpha < 1")
        self._check_real("z_thresh", lambda x: x > 0, "a finite number > 0")
        self._check_choice("mode", "zscore", "percentile")
        self._check_choice("clip_option", "adaptive_scaling", "reciprocal", "mean", "max")
        self._check_real("percentile", lambda x: 0.5 < x < 1, "a number with 0.5 < percentile < 1", optional=True)
        self._check_real("clip_factor", lambda x: x > 0, "a finite number > 0")
        self._check_real("max_grad_norm", lambda x: x > 0, "a finite number > 0", optional=True)
        self._check_count("warmup_steps")
        self._check_real("eps", lambda x: x >= 0, "a finite number >= 0")
        self._check("skip_update_on_spike", isinstance(self.skip_update_on_spike, bool), "True or False")
        self._check_count("patience", optional=True)
        self._check_choice("nonfinite", "skip", "raise", "pass")
        self._check_count("max_consecutive_nonfinite", optional=True)
        self._check_choice("scope", "global", "group")
        if self.clip_option == "reciprocal":
            object.__setattr__(self, "clip_option", "adaptive_scaling")
        if self.percentile is not None:
            self._check("percentile", self.mode == "percentile", 'None unless mode="percentile"')
            object.__setattr__(self, "z_thresh", NormalDist().inv_cdf(self.percentile))

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _check_real(self, name: str, in_range: Callable[[float], bool], expected: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        is_real = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
        self._check(name, is_real and in_range(value), expected + (" or None" if optional else ""))
        object.__setattr__(self, name, float(value))

    def _check_count(self, name: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        is_count = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
        self._check(name, is_count, "an integer >= 1" + (" or None" if optional else ""))
        object.__setattr__(self, name, int(value))

    def _check_choice(self, name: str, *choices: str) -> None:
        value = getattr(self, name)
        self._check(name, isinstance(value, str) and value in choices, "one of " + ", ".join(map(repr, choices)))


class NormStats(NamedTuple):
    """Running statistics of the gradient norm.

    mean, var: mu (gradient-norm units) and sigma^2 (squared); exact during warm-up, exponential averages after it.
    step: finite, non-zero norms seen. streak: consecutive spikes up to now. clipped_steps: all spikes up to now.
    """

    mean: Scalar = 0.0
    var: Scalar = 0.0
    step: Scalar = 0
    streak: Scalar = 0
    clipped_steps: Scalar = 0


class Decision(NamedTuple):
    """What to do with the gradients of one step.

    clip_coef: factor in (0, 1] for every gradient; exactly 1 on a step that is not clipped.
    clipped_norm: the norm once `clip_coef` is applied.
    threshold: on a spike the norm that replaces it; otherwise the norm above which it would have been one (infinite
        during warm-up).
    z_score: z_t of the norm; NaN during warm-up and for a norm that is zero or not finite.
    is_spike: z_t > z_thresh, once warm-up is over.
    stats: the statistics for the next step.
    """

    clip_coef: Scalar
    clipped_norm: Scalar
    threshold: Scalar
    z_score: Scalar
    is_spike: Scalar
    stats: NormStats


def decide(norm: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """Decide whether `norm` is a spike, what it is clipped to, and what the statistics become.

        z_t = (g_t - mu) / (sigma + eps mu),   spike: z_t > z_thresh

    A norm that is zero, infinite or NaN is left alone (coefficient 1) and never enters the statistics.

    Args:
        norm: global gradient norm g_t, >= 0; a float, or a floating-point tensor.
        stats: statistics of the steps before; of the same kind, device and shape as `norm`.
        config: hyperparameters.

    Returns:
        The `Decision`, of the same kind, device and shape as `norm`.
    """
    usable = (norm > 0) & (norm < math.inf)
    return _branch(usable, _decide_usable, _leave_alone, norm, stats, config)


def _decide_usable(g: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    return _branch(stats.step >= config.warmup_steps, _test, _collect, g, stats, config)


def _leave_alone(norm: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    limit = _branch(stats.step >= config.warmup_steps, _largest_ordinary, _infinite, stats, config)
    return Decision(1.0, norm, limit, math.nan, False, stats)


def _collect(g: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """Warm-up: the exact mean and population variance of the norms so far; nothing is clipped but by the cap."""
    mean, var, step, _, clipped_steps = stats
    count = step + 1
    new_mean = mean + (g - mean) / count
    new_var = var + ((g - mean) * (g - new_mean) - var) / count
    capped = _capped(g, config)
    return Decision(
        capped / g, capped, math.inf, math.nan, False, NormStats(new_mean, new_var, count, 0, clipped_steps)
    )


def _test(g: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    # z_t = (g_t - mu) / (sigma + eps mu)
    scale = stats.var**0.5 + config.eps * stats.mean
    z = (g - stats.mean) / _where(scale > 0, scale, TINY)
    return _branch(z > config.z_thresh, _clip, _pass, g, z, stats, config)


def _pass(g: Scalar, z: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """Not a spike: g*_t = g_t."""
    mean, var = _averaged(g, stats, config)
    after = NormStats(mean, var, stats.step + 1, 0, stats.clipped_steps)
    capped = _capped(g, config)
    return Decision(capped / g, capped, _largest_ordinary(stats, config), z, False, after)


def _clip(g: Scalar, z: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """A spike: g*_t is the threshold, or g_t if `clip_factor` > 1 lifts the threshold over it."""
    mean, var, step, streak, clipped_steps = stats
    std, floor = var**0.5, config.eps * mean
    threshold = _spike_threshold(z, mean, std, config)
    g_star = _where(threshold < g, threshold, g)
    # From the spike after `patience` in a row on, the averages are fed the winsorised norm.
    impatient = streak >= (math.inf if config.patience is None else config.patience)
    fed = _where(impatient, mean + config.z_thresh * _where(std > floor, std, floor), g_star)
    new_mean, new_var = _averaged(fed, stats, config)
    if config.skip_update_on_spike:
        new_mean, new_var = _where(impatient, new_mean, mean), _where(impatient, new_var, var)
    after = NormStats(new_mean, new_var, step + 1, streak + 1, clipped_steps + 1)
    capped = _capped(g_star, config)
    return Decision(capped / g, capped, threshold, z, True, after)


def _spike_threshold(z: Scalar, mean: Scalar, std: Scalar, config: ZClipConfig) -> Scalar:
    if config.mode == "percentile" or config.clip_option == "max":
        return mean + config.z_thresh * std
    if config.clip_option == "mean":
        return mean
    xi = config.z_thresh * (config.z_thresh / z)
    return mean + config.clip_factor * xi * std


def _averaged(g_star: Scalar, stats: NormStats, config: ZClipConfig) -> tuple[Scalar, Scalar]:
    # mu <- alpha mu + (1 - alpha) g*_t;   sigma^2 <- alpha sigma^2 + (1 - alpha) (g*_t - mu)^2 with the new mu
    beta = 1 - config.alpha
    mean = config.alpha * stats.mean + beta * g_star
    return mean, config.alpha * stats.var + beta * (g_star - mean) * (g_star - mean)


def _capped(g_star: Scalar, config: ZClipConfig) -> Scalar:
    cap = config.max_grad_norm
    return g_star if cap is None else _where(g_star < cap, g_star, cap)


def _largest_ordinary(stats: NormStats, config: ZClipConfig) -> Scalar:
    """The norm above which a step is a spike."""
    return stats.mean + config.z_thresh * (stats.var**0.5 + config.eps * stats.mean)


def _infinite(stats: NormStats, config: ZClipConfig) -> Scalar:
    return math.inf


def _branch(condition: Any, if_true: Callable[..., T], if_false: Callable[..., T], *args: Any) -> T:
    """What the one function returns or the other; on tensors both run, and each element is selected."""
    if isinstance(condition, torch.Tensor):
        selected: T = _where(condition, if_true(*args), if_false(*args))
        return selected
    return if_true(*args) if condition else if_false(*args)


def _where(condition: Any, x: Any, y: Any) -> Any:
    """`torch.where` for numbers and tensors, and for tuples of them."""
    if not isinstance(condition, torch.Tensor):
        return x if condition else y
    if isinstance(x, tuple):
        return type(x)(*[_where(condition, *pair) for pair in zip(x, y, strict=True)])
    return torch.where(condition, x, y)
