"""The clipping methods: one row each in METHODS, one small class each that takes the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from zclip_optim import ZClipOptimizer

ROUNDING = 1e-5  # relative; both packages divide by a norm plus 1e-6, in float32


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
        grad_norm = total_norm(self.model)
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
    """ZClipOptimizer with its defaults, but for `options`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> None:
        self.optimizer = ZClipOptimizer(optimizer, **options)

    def step(self) -> Clipping:
        """Steps, and reads the metrics."""
        self.optimizer.step()
        m = self.optimizer.metrics
        return Clipping(m.grad_norm, m.clipped_norm, m.threshold, m.clipped, m.skipped, m.z_score, m.mean, m.std)


class PublishedZClip:
    """The package `zclip` with its defaults, but for the cap at norm 1.0, which would hide its own rule."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        from zclip import ZClip

        self.model, self.optimizer, self.clipper = model, optimizer, ZClip(max_grad_norm=None)

    def step(self) -> Clipping:
        """Clips, and steps; what it did is measured."""
        grad_norm = self.clipper.step(self.model)
        clipping = measured(grad_norm, total_norm(self.model))
        self.optimizer.step()
        return clipping


class AutoClip:
    """The package `autoclip`: the 90th percentile of the last 1,000 global norms, its defaults."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        from autoclip.torch import QuantileClip

        self.model, self.optimizer = model, optimizer
        self.clipper = QuantileClip(model.parameters(), global_threshold=True)

    def step(self) -> Clipping:
        """Clips, and steps; what it did is measured."""
        grad_norm = total_norm(self.model)
        self.clipper.step()
        clipping = measured(grad_norm, total_norm(self.model))
        self.optimizer.step()
        return clipping


def total_norm(model: nn.Module) -> float:
    """The L2 norm of all gradients of a model."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def measured(grad_norm: float, clipped_norm: float) -> Clipping:
    """For a method that does not tell whether it clipped: it did if the norm is smaller by more than rounding."""
    return Clipping(grad_norm, clipped_norm, clipped=clipped_norm < (1 - ROUNDING) * grad_norm)


METHODS = (
    Method("none", "no clipping", Unclipped),
    Method("fixed", "fixed clipping at 1.0", FixedClipping),
    Method("zclip", "ZClip", ZClipped),
)

PEERS = (
    Method("none", "no clipping", Unclipped),
    Method("fixed", "fixed 1.0", FixedClipping),
    Method("published", "zclip 1.0.0", PublishedZClip),
    Method("autoclip", "autoclip", AutoClip),
    Method("zclip_optim", "zclip_optim", ZClipped),
    Method("paper", "patience=None", partial(ZClipped, patience=None)),
)
