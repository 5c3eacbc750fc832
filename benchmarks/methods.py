"""The clipping methods: one row each in METHODS, one small class each that takes the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from zclip_optim import ZClipOptimizer


@dataclass(frozen=True)
class Clipping:
    """What a method did to one step's gradients; a statistic that it does not keep is NaN."""

    grad_norm: float
    clipped_norm: float
    threshold: float = math.inf
    clipped: bool = False
    skipped: bool = False
    z_score: float = math.nan
    mean: float = math.nan
    std: float = math.nan


class Stepper(Protocol):
    """A method at work on one model; `optimizer` is what a learning-rate scheduler is given."""

    optimizer: Optimizer

    def step(self) -> Clipping:
        """Clips the gradients and steps the optimizer."""


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    name: str
    label: str
    start: Callable[[nn.Module, Optimizer], Stepper]


class Unclipped:
    """The bare optimizer; the norm is measured for the record only."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self) -> Clipping:
        """Measures, and steps."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients).item()
        self.optimizer.step()
        return Clipping(grad_norm, grad_norm)


class FixedClipping:
    """torch.nn.utils.clip_grad_norm_ at 1.0, the usual setting."""

    max_norm = 1.0

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self) -> Clipping:
        """Clips at `max_norm`, and steps."""
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        return Clipping(grad_norm, min(grad_norm, self.max_norm), self.max_norm, grad_norm > self.max_norm)


class ZClipped:
    """ZClipOptimizer with its defaults."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = ZClipOptimizer(optimizer)

    def step(self) -> Clipping:
        """Steps, and reads the metrics."""
        self.optimizer.step()
        m = self.optimizer.metrics
        return Clipping(m.grad_norm, m.clipped_norm, m.threshold, m.clipped, m.skipped, m.z_score, m.mean, m.std)


METHODS = (
    Method("none", "no clipping", Unclipped),
    Method("fixed", "fixed clipping at 1.0", FixedClipping),
    Method("zclip", "ZClip", ZClipped),
)
