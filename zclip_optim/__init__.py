"""Adaptive gradient clipping for any PyTorch optimizer: ZClip (arXiv:2504.02507) as a drop-in wrapper.

>>> import torch
>>> from zclip_optim import ZClipOptimizer
>>> model = torch.nn.Linear(4, 1)
>>> optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4))
"""

from zclip_optim.algorithm import NormStats, ZClipConfig, decide
from zclip_optim.clipper import ZClip
from zclip_optim.health import NonFiniteGradientError, ZClipWarning
from zclip_optim.metrics import ClipMetrics, ParameterNorm
from zclip_optim.optimizer import ZClipOptimizer
from zclip_optim.replay import replay

__version__ = "0.3.0"

__all__ = [
    "ClipMetrics",
    "NonFiniteGradientError",
    "NormStats",
    "ParameterNorm",
    "ZClip",
    "ZClipConfig",
    "ZClipOptimizer",
    "ZClipWarning",
    "__version__",
    "decide",
    "replay",
]
