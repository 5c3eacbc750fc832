"""Callbacks for trainers. Nothing here is imported by `zclip_optim`: each module needs the extra of its name."""

from typing import Any

from torch import nn

from zclip_optim.clipper import ZClip
from zclip_optim.intervals import LOG
from zclip_optim.metrics import ParameterNorm, combine
from zclip_optim.optimizer import ZClipOptimizer

OF_STEP = ("grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate", "spike_rate")
COUNTERS = ("clipped_steps", "spike_steps", "skipped_steps")
OF_INTERVAL = ("interval_steps", "interval_max_norm", "interval_min_coef", "interval_spikes", "interval_skips")
LOGGED = (*OF_STEP, *COUNTERS, *OF_INTERVAL)


def metrics_to_log(optimizer: ZClipOptimizer | ZClip, prefix: str = "zclip/") -> dict[str, float]:
    """The metrics of the last step that a trainer's loggers get, and of the interval since they got the ones before.

    Reading `metrics` in between changes nothing of that interval. On accelerators this waits for the device.

    Args:
        optimizer: any, stepped or not; or a `ZClip`.
        prefix: put before every name.

    Returns:
        One float for each of `LOGGED`, NaN or infinite where there is no number; nothing before the optimizer's first
        step with a gradient.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.1))
        >>> metrics_to_log(optimizer)
        {}
        >>> p.grad = torch.full((4,), 2.0)
        >>> optimizer.step()
        >>> metrics_to_log(optimizer)["zclip/grad_norm"]
        4.0
    """
    clipper = optimizer.clipper if isinstance(optimizer, ZClipOptimizer) else optimizer
    metrics = combine(clipper._metrics_for(LOG))
    if not metrics.step and not metrics.skipped_steps:
        return {}
    return {prefix + name: float(getattr(metrics, name)) for name in LOGGED}


class ShareLog:
    """Keeps the largest shares of the last spike until a trainer logs: by then gradients may be gone.

    Args:
        optimizer: is asked for its metrics after each step, which on accelerators waits for the device.
        model: names the parameters where the optimizer does not.
        limit: how many parameters, >= 1.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=2)
        >>> log = ShareLog(optimizer, model, limit=5)
        >>> for scale in (1.0, 1.1, 100.0):
        ...     model.weight.grad = torch.full((1, 2), scale)
        ...     optimizer.step()
        >>> log.take("zclip/"), log.take("zclip/")
        ({'zclip/share/weight': 1.0}, {})
    """

    def __init__(self, optimizer: ZClipOptimizer, model: nn.Module, limit: int) -> None:
        self.model, self.limit = model, limit
        self._norms: list[ParameterNorm] = []
        self._hook = optimizer.register_step_post_hook(self._look)

    def _look(self, optimizer: Any, *_: Any) -> None:
        if any(record.decision.is_spike for record in optimizer.clipper._records.read()):  # which ends no interval
            groups = _with_names(optimizer.param_groups, self.model)
            self._norms = optimizer.clipper.norms_by_parameter(groups, self.limit)

    def take(self, prefix: str) -> dict[str, float]:
        """The shares by ``<prefix>share/<name>``, once; empty if there was no spike since the last time."""
        norms, self._norms = self._norms, []
        return {f"{prefix}share/{each.name}": each.share for each in norms}

    def end(self) -> None:
        """Ask the optimizer no more."""
        self._hook.remove()


def _with_names(param_groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The groups with the model's names of their parameters, where they have none; of others the position."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {
            "param_names": [
                names.get(id(p), f"param_groups[{i}]['params'][{j}]") for j, p in enumerate(group["params"])
            ],
            **group,
        }
        for i, group in enumerate(param_groups)
    ]


def missing_extra(extra: str) -> str:
    """The message of the ImportError where the package of an extra is missing."""
    return f"{extra} is not installed; install it with: pip install 'zclip_optim[{extra}]'"
