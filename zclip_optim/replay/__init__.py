"""The gradient norms of a run that there is already, through the rule: what it would have clipped.

    python -m zclip_optim.replay metrics.csv

This is a package, so that its command may be called as its function, `zclip_optim.replay`, is.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from zclip_optim.algorithm import ZClipConfig
from zclip_optim.metrics import ClipMetrics
from zclip_optim.running import HostState
from zclip_optim.state import StepRecord, fresh_records


def replay(norms: Iterable[float], **options: Any) -> list[ClipMetrics]:
    """What ZClip would have done at each step of a run with these gradient norms.

    They are those of a run that went its own way: once a spike had been clipped, the norms after it would have been
    others. A replay tells of norms that are not finite and never stops at them: no warning, and no
    `NonFiniteGradientError` where training would raise it. ``python -m zclip_optim.replay LOG`` prints a summary of
    it; ``zclip_optim.logs.read_norms(path).norms`` are those of a log.

    Args:
        norms: the global gradient norm before clipping of each step, in gradient-norm units, >= 0; NaN or infinite
            where the gradients were.
        **options: the keyword arguments of `ZClipOptimizer`, with the same meaning and defaults, but for
            `process_group`; `scope` must be "global".

    Returns:
        The `ClipMetrics` that training would have had, one for each norm.

    Raises:
        TypeError: a norm is no number; names its index. Or there is no such option.
        ValueError: a norm is below 0; names its index. Or an option is out of its range.

    Example:
        >>> metrics = replay([1.0, 1.1, 0.9, 20.0, 1.0], warmup_steps=3)
        >>> [round(m.clipped_norm, 2) for m in metrics if m.is_spike]
        [1.0]
    """
    config = ZClipConfig(**options)
    return [ClipMetrics.of(record, config.warmup_steps) for record in step_records(norms, config)]


def step_records(norms: Iterable[float], config: ZClipConfig) -> Iterator[StepRecord]:
    """The same, each step as it is recorded.

    Raises:
        TypeError, ValueError: see `replay`.
    """
    if config.scope != "global":
        raise ValueError(f"a replay has the norm of all gradients: scope must be 'global', not {config.scope!r}")
    state = HostState(fresh_records(None))
    for index, norm in enumerate(norms):
        state.step([_checked(norm, index)], config, new_step=True)
        yield state.records[0]
        state.begin_interval()  # as for who reads `metrics` at every step


def _checked(norm: Any, index: int) -> float:
    if not hasattr(norm, "__float__"):
        raise TypeError(f"norms[{index}] must be a number, got {norm!r}")
    value = float(norm)
    if value < 0:
        raise ValueError(f"norms[{index}] must be >= 0, or NaN or infinite where the gradients were, got {value}")
    return value
