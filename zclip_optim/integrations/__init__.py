"""Callbacks for trainers. Nothing here is imported by `zclip_optim`: each module needs the extra of its name."""

from zclip_optim.optimizer import ZClipOptimizer

LOGGED = ("grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate")


def metrics_to_log(optimizer: ZClipOptimizer, prefix: str = "zclip/") -> dict[str, float]:
    """The metrics of the last step that a trainer's loggers get. On accelerators this waits for the device.

    Args:
        optimizer: has stepped.
        prefix: put before every name.

    >>> import torch
    >>> optimizer = ZClipOptimizer(torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1))
    >>> list(metrics_to_log(optimizer))[:2]
    ['zclip/grad_norm', 'zclip/clipped_norm']
    """
    values = optimizer.metrics.as_dict(prefix)
    return {prefix + name: values[prefix + name] for name in LOGGED}


def missing_extra(extra: str) -> str:
    """The message of the ImportError where the package of an extra is missing."""
    return f"{extra} is not installed; install it with: pip install 'zclip_optim[{extra}]'"
