"""Callbacks for trainers. Nothing here is imported by `zclip_optim`: each module needs the extra of its name."""

from zclip_optim.optimizer import ZClipOptimizer

LOGGED = ("grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate")


def metrics_to_log(optimizer: ZClipOptimizer, prefix: str = "zclip/") -> dict[str, float]:
    """The metrics of the last step that a trainer's loggers get. On accelerators this waits for the device.

    Args:
        optimizer: any, stepped or not.
        prefix: put before every name.

    Returns:
        One float for each of `LOGGED`; nothing before the optimizer's first step with a gradient.

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
    metrics = optimizer.metrics
    if not metrics.step and not metrics.skipped_steps:
        return {}
    values = metrics.as_dict(prefix)
    return {prefix + name: values[prefix + name] for name in LOGGED}


def missing_extra(extra: str) -> str:
    """The message of the ImportError where the package of an extra is missing."""
    return f"{extra} is not installed; install it with: pip install 'zclip_optim[{extra}]'"
