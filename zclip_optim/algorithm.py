"""The paper: configuration, running statistics and the decision for one step. Numbers in, numbers out.

Nothing here knows of gradients, parameters, optimizers or devices, so the module also serves people who have a gradient
norm of their own (DeepSpeed and Megatron report one):

>>> config, stats = ZClipConfig(warmup_steps=2), NormStats()
>>> for norm in (1.0, 1.2, 9.0):
...     decision = decide(norm, stats, config)
...     stats = decision.stats
>>> decision.is_spike, round(decision.clipped_norm, 3)
(True, 1.108)

The paper beside the names here; with `lookback`, `alpha_down`, `z_skip` and `patience`, which are not in it, left at
None, the code is the paper line by line:

    g_t                                        grad_norm     L2 norm of all gradients, in float32 or wider
    mu, sigma^2                                mean, std^2   exact over the first `warmup_steps` norms, then as below
    z_t = (g_t - mu) / (sigma + eps mu)        z_score       a spike is z_t > z_thresh
    mu + clip_factor (z_thresh^2 / z_t) sigma  threshold     what a spike is clipped to, with "adaptive_scaling"
    g*_t                                       clipped_norm  the threshold on a spike, else g_t; then `max_grad_norm`
    g*_t / g_t                                 clip_coef     multiplies every gradient; on other steps 1, no bit changed
    mu <- alpha mu + (1 - alpha) g*_t                        without the cap of `max_grad_norm`
    sigma^2 <- alpha sigma^2 + (1 - alpha) (g*_t - mu)^2     with the new mu

The same lines run on Python floats and on tensors: instead of a branch both sides are computed and selected from, so
that on an accelerator the host never reads a value back. Branches depend on the configuration, or leave out what the
flag of a number, which is True or False and no tensor, says will not be selected.

References:
    Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
"""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import torch

Scalar: TypeAlias = Any  # a Python number, or a tensor: of one value without dimensions, of all scopes with one

TINY = 2.0**-126  # stands in for a z-score denominator of 0; a normal number in float32 too
SKIPS_IN_A_ROW = 3  # spikes of a streak that `z_skip` may leave out: a lasting shift must not stop the training
STEADY_AFTER = 10  # spikes in a row, after which, with `patience`, a spike no longer narrows the spread
COMMON, FEW = 5, 11  # steps; with `lookback`, more than a spike in so many steps, and these many more, is no anomaly
RISE = 2 ** (1 / 1000)  # of mu and sigma with every spike after `patience` in a row: twofold in 1,000 steps


def _option(default: Any, expected: str, parse: Callable[[Any], Any]) -> Any:
    """A field of `ZClipConfig`: `parse` returns the value to keep, or raises ValueError if it is not `expected`."""
    return dataclasses.field(default=default, metadata={"expected": expected, "parse": parse})


def _real(default: float | None, expected: str, in_range: Callable[[float], bool], optional: bool = False) -> Any:
    def parse(value: Any) -> float | None:
        if value is None and optional:
            return None
        if not isinstance(value, Real) or isinstance(value, bool) or not _is_finite(value):
            raise ValueError
        if not in_range(float(value)):
            raise ValueError
        return float(value)

    return _option(default, expected + (" or None" if optional else ""), parse)


def _count(default: int | None, optional: bool = False) -> Any:
    def parse(value: Any) -> int | None:
        if value is None and optional:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
            raise ValueError
        return int(value)

    return _option(default, "an integer >= 1" + (" or None" if optional else ""), parse)


def _choice(*choices: str) -> Any:
    """One of these, the first by default."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return _option(choices[0], "one of " + ", ".join(map(repr, choices)), parse)


def _flag() -> Any:
    def parse(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return _option(False, "True or False", parse)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZClipConfig:
    """The hyperparameters of ZClip, validated; `ZClipOptimizer` documents each of them.

    After construction `clip_option` holds no alias and `z_thresh` is what a `percentile` stands for.

    Raises:
        ValueError: an argument is out of its range; names the argument, the value and the range.

    >>> ZClipConfig(mode="percentile", percentile=0.99).z_thresh
    2.3263478740408408
    """

    alpha: float = _real(0.97, "a number with 0 <= alpha < 1", lambda x: 0 <= x < 1)
    z_thresh: float = _real(2.5, "a finite number > 0", lambda x: x > 0)
    mode: str = _choice("zscore", "percentile")
    clip_option: str = _choice("adaptive_scaling", "reciprocal", "mean", "max")
    percentile: float | None = _real(None, "a number with 0.5 < percentile < 1", lambda x: 0.5 < x < 1, optional=True)
    clip_factor: float = _real(1.0, "a finite number > 0", lambda x: x > 0)
    max_grad_norm: float | None = _real(None, "a finite number > 0", lambda x: x > 0, optional=True)
    warmup_steps: int = _count(25)
    lookback: float | None = _real(None, "a number with 0 < lookback <= 1", lambda x: 0 < x <= 1, optional=True)
    eps: float = _real(1e-6, "a finite number >= 0", lambda x: x >= 0)
    alpha_down: float | None = _real(None, "a number with 0 <= alpha_down <= alpha", lambda x: x >= 0, optional=True)
    skip_update_on_spike: bool = _flag()
    z_skip: float | None = _real(None, "a finite number > z_thresh", lambda x: x > 0, optional=True)
    patience: int | None = _count(None, optional=True)
    nonfinite: str = _choice("skip", "raise", "pass")
    max_consecutive_nonfinite: int | None = _count(25, optional=True)
    scope: str = _choice("global", "group")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError:
                raise ValueError(f"{field.name} must be {field.metadata['expected']}, got {value!r}") from None
        if self.clip_option == "reciprocal":
            object.__setattr__(self, "clip_option", "adaptive_scaling")
        if self.percentile is not None:
            if self.mode != "percentile":
                raise ValueError(f'percentile must be None unless mode="percentile", got {self.percentile!r}')
            object.__setattr__(self, "z_thresh", NormalDist().inv_cdf(self.percentile))
        if self.alpha_down is not None and self.alpha_down > self.alpha:
            raise ValueError(f"alpha_down must be at most alpha={self.alpha!r}, got {self.alpha_down!r}")
        if self.z_skip is not None and self.z_skip <= self.z_thresh:
            raise ValueError(f"z_skip must be above z_thresh={self.z_thresh!r}, got {self.z_skip!r}")

    @property
    def can_skip(self) -> bool:
        """Whether there are norms at which the optimizer must not step."""
        return self.nonfinite != "pass" or self.z_skip is not None


class NormStats(NamedTuple):
    """Running statistics of the gradient norm.

    mean, var: mu (gradient-norm units) and sigma^2 (squared); averages whose window grows with the run, in warm-up or
        with `lookback`, then exponential ones.
    step: finite, non-zero norms seen. streak: consecutive spikes up to now. spike_steps: all spikes up to now.
    clipped_steps: all steps so far whose gradients were scaled, for a spike or by `max_grad_norm`.
    """

    mean: Scalar = 0.0
    var: Scalar = 0.0
    step: Scalar = 0
    streak: Scalar = 0
    spike_steps: Scalar = 0
    clipped_steps: Scalar = 0


class Decision(NamedTuple):
    """What to do with the gradients of one step.

    clip_coef: factor in (0, 1] for every gradient; exactly 1 on a step that is not clipped.
    clipped_norm: the norm once `clip_coef` is applied.
    threshold: on a spike the norm that replaces it; otherwise the norm above which it would have been one (infinite
        during warm-up).
    z_score: z_t of the norm; NaN during warm-up and for a norm that is zero or not finite.
    is_spike: z_t > z_thresh, once warm-up is over.
    skip: the optimizer must not step: because the norm is not finite, unless ``nonfinite="pass"``, or for a spike with
        z_t > z_skip, unless three or more spikes came right before it.
    stats: the statistics for the next step.
    """

    clip_coef: Scalar
    clipped_norm: Scalar
    threshold: Scalar
    z_score: Scalar
    is_spike: Scalar
    skip: Scalar
    stats: NormStats


def decide(norm: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """Decide whether `norm` is a spike, what it is clipped to, and what the statistics become.

        z_t = (g_t - mu) / (sigma + eps mu),   spike: z_t > z_thresh

    A norm that is zero or not finite is left alone (coefficient 1) and never enters the statistics. One whose square
    overflows (1e155; 2e19 in float32) counts as infinite, since its variance would be.

    Args:
        norm: global gradient norm g_t, >= 0; a float, or a floating-point tensor.
        stats: statistics of the steps before; of the same kind, device and shape as `norm`.
        config: hyperparameters.

    Returns:
        The `Decision`, of the same kind, device and shape as `norm`.
    """
    mean, var, step, streak, spikes, clipped_steps = stats
    std, warm = var**0.5, step >= config.warmup_steps
    square = norm * norm
    usable = (norm > 0) & (square < math.inf)
    g = norm if usable is True else where(usable, norm, 1.0)  # some number to go on with, where the norm is left alone
    # z_t = (g_t - mu) / (sigma + eps mu)
    scale = std + config.eps * mean
    z = (g - mean) / (scale + (scale == 0) * TINY)
    is_spike = warm & (z > config.z_thresh)
    ordinary, z_score = mean + config.z_thresh * scale, z
    if warm is not True:
        ordinary, z_score = where(warm, ordinary, math.inf), where(warm, z, math.nan)
    g_star, limit, too_far = g, ordinary, False
    if is_spike is not False:
        # g*_t is the threshold on a spike, unless `clip_factor` > 1 lifts that over g_t, and g_t otherwise
        threshold = _spike_threshold(where(is_spike, z, config.z_thresh), mean, std, config)
        g_star, limit = where(is_spike & (threshold < g), threshold, g), where(is_spike, threshold, ordinary)
        if config.z_skip is not None:
            too_far = is_spike & (z > config.z_skip) & (streak < SKIPS_IN_A_ROW)
    cap = config.max_grad_norm
    capped = g_star if cap is None else where(g_star < cap, g_star, cap)
    new_mean, new_var = _updated(g_star, is_spike, std, stats, config)
    streak = (streak + 1) * is_spike
    after = NormStats(new_mean, new_var, step + 1, streak, spikes + is_spike, clipped_steps + (capped < g))
    clipped = Decision(capped / g, capped, limit, z_score, is_spike, too_far, after)
    if usable is True:
        return clipped
    broken = (square - square != 0) & (config.nonfinite != "pass")  # NaN, unless the square is finite
    left_alone = Decision(1.0, norm, ordinary, math.nan, False, broken, stats)
    decision: Decision = where(usable, clipped, left_alone)
    return decision


def _spike_threshold(z: Scalar, mean: Scalar, std: Scalar, config: ZClipConfig) -> Scalar:
    if config.mode == "percentile" or config.clip_option == "max":
        return mean + config.z_thresh * std
    if config.clip_option == "mean":
        return mean
    xi = config.z_thresh * (config.z_thresh / z)
    return mean + config.clip_factor * xi * std


def _entering(g_star: Scalar, is_early_spike: Scalar, std: Scalar, stats: NormStats, config: ZClipConfig) -> Scalar:
    """What the averages take: g*_t, but for spikes that are common while `lookback` has a growing window.

    x = mu + z_thresh sigma, so that the spread grows until what is no anomaly is inside
    """
    is_common = COMMON * (stats.spike_steps + 1) > stats.step - config.warmup_steps + FEW
    return where(is_early_spike & is_common, stats.mean + config.z_thresh * std, g_star)


def _updated(
    g_star: Scalar, is_spike: Scalar, std: Scalar, stats: NormStats, config: ZClipConfig
) -> tuple[Scalar, Scalar]:
    """Mean and variance of the next step."""
    mean, var, step, *_ = stats
    x = g_star
    # Whether the averages still have a window that grows, and its length in steps, the one at hand included:
    # a_n = L n / (1 + L n) until that is `alpha`;   the paper: L = 1, until the warm-up is over.   n: norms seen before
    if config.lookback is None:
        growing, window = step < config.warmup_steps, step + 1
    else:
        window = 1 + config.lookback * (step + 0 * mean)  # in the precision of the norm, though steps be integers
        growing = window - 1 < config.alpha * window
        x = _entering(g_star, is_spike & growing, std, stats, config)
    # mu <- alpha mu + (1 - alpha) x;   before, over a window that grows,   mu <- a_n mu + (1 - a_n) x
    alpha, beta = config.alpha, 1 - config.alpha
    new_mean = alpha * mean + beta * x
    if growing is not False:
        new_mean = where(growing, mean + (x - mean) / window, new_mean)
    if config.alpha_down is not None:
        # below mu with the smaller factor:   mu <- alpha_down mu + (1 - alpha_down) x
        lower = config.alpha_down * mean + (1 - config.alpha_down) * x
        new_mean = where((x < mean) & (lower < new_mean), lower, new_mean)
    # sigma^2 <- alpha sigma^2 + (1 - alpha) (x - new mu)^2;
    # before   a_n sigma^2 + (1 - a_n) (x - mu) (x - new mu), Welford's form
    deviation = x - new_mean
    new_var = alpha * var + beta * deviation * deviation
    if growing is not False:
        new_var = where(growing, var + ((x - mean) * deviation - var) / window, new_var)
    return (new_mean, new_var) if is_spike is False else _after_spike(new_mean, new_var, is_spike, stats, config)


def _after_spike(
    new_mean: Scalar, new_var: Scalar, is_spike: Scalar, stats: NormStats, config: ZClipConfig
) -> tuple[Scalar, Scalar]:
    """The same after a spike, by `skip_update_on_spike` and `patience`."""
    mean, var, _, streak, *_ = stats
    if config.patience is not None:
        # from the 11th spike in a row on:   sigma^2 <- max(sigma^2, what the update gives)
        new_var = where(is_spike & (streak >= STEADY_AFTER) & (new_var < var), var, new_var)
    if config.skip_update_on_spike:
        new_mean, new_var = where(is_spike, mean, new_mean), where(is_spike, var, new_var)
    if config.patience is not None:
        # from the spike after `patience` in a row on:   mu <- 2^(1/1000) mu,   sigma <- 2^(1/1000) sigma
        rising = is_spike & (streak >= config.patience)
        new_mean, new_var = where(rising, RISE * mean, new_mean), where(rising, RISE**2 * var, new_var)
    return new_mean, new_var


def where(condition: Any, x: Any, y: Any) -> Any:
    """One of two values, or of two tuples of them, by a flag, or by a tensor of flags."""
    if not isinstance(condition, torch.Tensor):
        return x if condition else y
    if isinstance(x, tuple):
        return type(x)(*[where(condition, *pair) for pair in zip(x, y, strict=True)])
    return torch.where(condition, x, y)
