"""The clipping methods: one row each in METHODS, one small class each that takes the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zclip_optim import ZClip, ZClipOptimizer

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


class Stepper:
    """A method at work on one model; `optimizers` are what learning-rate schedulers are given."""

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.model, self.optimizers = model, optimizers

    @property
    def optimizer(self) -> Optimizer:
        """The first one, where there are no others."""
        return self.optimizers[0]

    def step(self) -> Clipping:
        """Clips the gradients and steps the optimizers."""
        raise NotImplementedError

    def step_optimizers(self) -> None:
        """Steps each of them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the optimizer's own state: numbers and lists of them."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""


@dataclass(frozen=True)
class Method:
    """A row of a comparison; `options` are for its stepper: of ZClipOptimizer, or the threshold of fixed clipping."""

    name: str
    label: str
    stepper: Callable[..., Stepper]
    options: Mapping[str, Any] = field(default_factory=dict)

    def start(self, model: nn.Module, *optimizers: Optimizer) -> Stepper:
        """The method at work on `model`."""
        return self.stepper(model, *optimizers, **self.options)

    @property
    def ours(self) -> bool:
        """Whether it is ZClipOptimizer, with whatever options."""
        return self.stepper is ZClipped

    @property
    def settings(self) -> dict[str, Any]:
        """All options of ZClipOptimizer, with today's defaults for those not given; empty for other methods."""
        return asdict(ZClip(**self.options).config) if self.ours else {}

    def with_options(self, options: Mapping[str, Any]) -> Method:
        """The same with more options."""
        return replace(self, options={**self.options, **options})


class Unclipped(Stepper):
    """The bare optimizer; the norm is measured for the record only."""

    def step(self) -> Clipping:
        """Measures, and steps."""
        grad_norm = total_norm(self.model)
        self.step_optimizers()
        return Clipping(grad_norm, grad_norm)


class FixedClipping(Stepper):
    """torch.nn.utils.clip_grad_norm_ at `max_norm`, in gradient-norm units; 1.0 is the usual setting."""

    def __init__(self, model: nn.Module, *optimizers: Optimizer, max_norm: float = 1.0) -> None:
        super().__init__(model, *optimizers)
        self.max_norm = max_norm

    def step(self) -> Clipping:
        """Clips at `max_norm`, and steps."""
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm).item()
        self.step_optimizers()
        return Clipping(grad_norm, min(grad_norm, self.max_norm), self.max_norm, grad_norm > self.max_norm)


class ZClipped(Stepper):
    """ZClipOptimizer with its defaults, but for `options`."""

    optimizer: ZClipOptimizer

    def __init__(self, model: nn.Module, *optimizers: Optimizer, **options: Any) -> None:
        super().__init__(model, ZClipOptimizer(optimizers if len(optimizers) > 1 else optimizers[0], **options))

    def step(self) -> Clipping:
        """Steps, and reads the metrics."""
        self.optimizer.step()
        m = self.optimizer.metrics
        return Clipping(m.grad_norm, m.clipped_norm, m.threshold, m.clipped, m.skipped, m.z_score, m.mean, m.std)


class PublishedZClip(Stepper):
    """The package `zclip` with its defaults, but for the cap at norm 1.0, which would hide its own rule."""

    kept = ("initialized", "buffer", "mean", "var")

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        from zclip import ZClip

        super().__init__(model, *optimizers)
        self.clipper = ZClip(max_grad_norm=None)

    def step(self) -> Clipping:
        """Clips, and steps; what it did is measured."""
        grad_norm = self.clipper.step(self.model)
        clipping = measured(grad_norm, total_norm(self.model))
        self.step_optimizers()
        return clipping

    def state(self) -> dict[str, Any]:
        """The package's own attributes; it has no state dict."""
        return {name: getattr(self.clipper, name) for name in self.kept}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        vars(self.clipper).update(state)


class AutoClip(Stepper):
    """The package `autoclip`: a quantile of the last 1,000 global norms, 0.9 by its default, 0.1 in its paper."""

    def __init__(self, model: nn.Module, *optimizers: Optimizer, quantile: float = 0.9) -> None:
        from autoclip.torch import QuantileClip

        super().__init__(model, *optimizers)
        self.clipper = QuantileClip(model.parameters(), quantile=quantile, global_threshold=True)

    def step(self) -> Clipping:
        """Clips, and steps; what it did is measured."""
        grad_norm = total_norm(self.model)
        self.clipper.step()
        clipping = measured(grad_norm, total_norm(self.model))
        self.step_optimizers()
        return clipping

    def state(self) -> dict[str, Any]:
        """The past norms."""
        history = self.clipper.state["global_history"]
        return {"history": history.tolist() if len(history) else []}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        if state["history"]:
            device = next(self.model.parameters()).device
            self.clipper.state["global_history"] = torch.tensor(state["history"], device=device)


class AdaGC(Stepper):
    """The optimizer AdaGC of pytorch_optimizer in place of AdamW: it clips each tensor by an average of its own norms.

    It takes AdamW's settings and keeps its defaults otherwise, 100 steps of warm-up with a global norm of at most 1.0
    among them. What it does to the gradients stays inside it, so that there is nothing to record but the norm before.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        import pytorch_optimizer

        shared = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        super().__init__(model, pytorch_optimizer.AdaGC(model.parameters(), **shared))

    def step(self) -> Clipping:
        """Measures, and steps."""
        grad_norm = total_norm(self.model)
        self.optimizer.step()
        return Clipping(grad_norm, math.nan)


def total_norm(model: nn.Module) -> float:
    """The L2 norm of all gradients of a model."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def measured(grad_norm: float, clipped_norm: float) -> Clipping:
    """For a method that does not tell whether it clipped: it did if the norm is smaller by more than rounding."""
    return Clipping(grad_norm, clipped_norm, clipped=clipped_norm < (1 - ROUNDING) * grad_norm)


PAPER = {
    "alpha": 0.97,
    "lookback": None,
    "z_thresh": 2.5,
    "alpha_down": None,
    "z_skip": None,
    "max_grad_norm": None,
    "patience": None,
}  # whatever the defaults are

METHODS = {
    method.name: method
    for method in (
        Method("none", "no clipping", Unclipped),
        Method("fixed", "fixed 1.0", FixedClipping),
        Method("published", "zclip 1.0.0", PublishedZClip),
        Method("autoclip", "autoclip", AutoClip),
        Method("adagc", "AdaGC", AdaGC),
        Method("zclip_optim", "zclip_optim", ZClipped),
        Method("mean", "paper, mean", ZClipped, PAPER | {"clip_option": "mean"}),
        Method("max", "paper, max", ZClipped, PAPER | {"clip_option": "max"}),
        Method("paper", "paper", ZClipped, PAPER),
        Method("capped", "max_grad_norm=1.0", ZClipped, {"max_grad_norm": 1.0}),
    )
}
