"""The paper: configuration, running statistics and the decision for one step. Numbers in, numbers out.

Nothing here knows of gradients, parameters, optimizers or devices, so the module also serves people who have a gradient
norm of their own (DeepSpeed and Megatron report one):

>>> config, stats = ZClipConfig(warmup_steps=2), NormStats()
>>> for norm in (1.0, 1.2, 9.0):
...     decision = decide(norm, stats, config)
...     stats = decision.stats
>>> decision.is_spike, round(decision.clipped_norm, 3)
(True, 1.108)

The same lines run on Python floats and on 0-d tensors of one device; they differ in how a value is selected alone
(`_select_number`, `_select_tensor`), so that on an accelerator the host never reads a value back.

References:
    Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import torch

Scalar: TypeAlias = Any  # a Python number, or a 0-d tensor on the gradients' device
Select: TypeAlias = Callable[[Any, Any, Any], Any]

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


def _select_number(condition: bool, if_true: Any, if_false: Any) -> Any:
    """`torch.where` for Python numbers, and for `NormStats` of them."""
    return if_true if condition else if_false


def _select_tensor(condition: torch.Tensor, if_true: Any, if_false: Any) -> Any:
    """`torch.where`, also for `NormStats` of 0-d tensors."""
    if isinstance(if_true, NormStats):
        return NormStats(*(torch.where(condition, x, y) for x, y in zip(if_true, if_false, strict=True)))
    return torch.where(condition, if_true, if_false)


def decide(norm: Scalar, stats: NormStats, config: ZClipConfig) -> Decision:
    """Decide whether `norm` is a spike, what it is clipped to, and what the statistics become.

        z_t = (g_t - mu) / (sigma + eps mu),   spike: z_t > z_thresh

    A norm that is zero, infinite or NaN is left alone (coefficient 1) and never enters the statistics.

    Args:
        norm: global gradient norm g_t, >= 0; a float, or a 0-d floating-point tensor.
        stats: statistics of the steps before; of the same kind and device as `norm`.
        config: hyperparameters.

    Returns:
        The `Decision`, of the same kind and device as `norm`.
    """
    select: Select = _select_tensor if isinstance(norm, torch.Tensor) else _select_number
    mean, var = stats.mean, stats.var
    usable = (norm > 0) & (norm < math.inf)
    adaptive = stats.step >= config.warmup_steps
    g = select(usable, norm, 1.0)  # every line below is computed on every step: no 0 / 0

    # z_t = (g_t - mu) / (sigma + eps mu)
    std = var**0.5
    scale = std + config.eps * mean
    z = (g - mean) / select(scale > 0, scale, TINY)
    is_spike = usable & adaptive & (z > config.z_thresh)

    # g*_t is the threshold on a spike, else g_t; clip_factor > 1 can lift the threshold over g_t: nothing is scaled up
    spike_threshold = _spike_threshold(select(is_spike, z, config.z_thresh), mean, std, config)
    g_star = select(is_spike & (spike_threshold < g), spike_threshold, g)
    cap = math.inf if config.max_grad_norm is None else config.max_grad_norm
    capped = select(g_star < cap, g_star, cap)

    return Decision(
        clip_coef=select(usable, capped / g, 1.0),
        clipped_norm=select(usable, capped, norm),
        threshold=select(is_spike, spike_threshold, select(adaptive, mean + config.z_thresh * scale, math.inf)),
        z_score=select(usable & adaptive, z, math.nan),
        is_spike=is_spike,
        stats=select(
            usable, select(adaptive, _ema(g_star, is_spike, stats, config, select), _welford(g, stats)), stats
        ),
    )


def _spike_threshold(z: Scalar, mean: Scalar, std: Scalar, config: ZClipConfig) -> Scalar:
    if config.mode == "percentile" or config.clip_option == "max":
        return mean + config.z_thresh * std
    if config.clip_option == "mean":
        return mean
    xi = config.z_thresh * (config.z_thresh / z)
    return mean + config.clip_factor * xi * std


def _welford(g: Scalar, stats: NormStats) -> NormStats:
    """Warm-up: the exact mean and population variance of the norms so far."""
    count = stats.step + 1
    mean = stats.mean + (g - stats.mean) / count
    var = stats.var + ((g - stats.mean) * (g - mean) - stats.var) / count
    return NormStats(mean, var, count, 0, stats.clipped_steps)


def _ema(g_star: Scalar, is_spike: Scalar, stats: NormStats, config: ZClipConfig, select: Select) -> NormStats:
    """After warm-up: averages of g*_t; from the spike after `patience` in a row on, of the winsorised norm."""
    mean, var, step, streak, clipped_steps = stats
    std, floor = var**0.5, config.eps * mean
    impatient = is_spike & (streak >= (math.inf if config.patience is None else config.patience))
    fed = select(impatient, mean + config.z_thresh * select(std > floor, std, floor), g_star)

    # mu <- alpha mu + (1 - alpha) g*_t;   sigma^2 <- alpha sigma^2 + (1 - alpha) (g*_t - mu)^2 with the new mu
    beta = 1 - config.alpha
    new_mean = config.alpha * mean + beta * fed
    new_var = config.alpha * var + beta * (fed - new_mean) * (fed - new_mean)
    new_streak = select(is_spike, streak + 1, 0)
    if config.skip_update_on_spike:
        learns = impatient | (new_streak == 0)
        new_mean, new_var = select(learns, new_mean, mean), select(learns, new_var, var)
    return NormStats(new_mean, new_var, step + 1, new_streak, clipped_steps + is_spike)
