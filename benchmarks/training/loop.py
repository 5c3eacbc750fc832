"""The training loop of small problems: nothing in it but the step, since its own cost would be most of a run."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.training.data import Batches
from benchmarks.training.methods import Method, Stepper
from benchmarks.training.problems import Problem
from benchmarks.training.run import DIVERGED_AFTER
from zclip_optim import NonFiniteGradientError


@dataclass
class Trace:
    """What happened, step by step: losses as the problem has them, norms in gradient-norm units."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    clipped_norms: list[float] = field(default_factory=list)
    clipped: int = 0  # steps
    skipped: int = 0


def train(
    problem: Problem, method: Method, lr: float, seed: int, batches: Batches, steps: int
) -> tuple[nn.Module, Trace]:
    """Trains a new model at a constant rate; ends early where the loss stays non-finite or the method gives up."""
    torch.manual_seed(seed)
    model, trace = problem.model(), Trace()
    stepper = method.start(model, problem.optimizer(model.parameters(), lr=lr))
    broken = 0
    with suppress(NonFiniteGradientError):
        for step in range(steps):
            if step <= problem.warmup_steps:
                warm_up(stepper, lr, step, problem.warmup_steps)
            take_step(problem, model, stepper, batches, step, trace)
            broken = 0 if math.isfinite(trace.losses[-1]) else broken + 1
            if broken == DIVERGED_AFTER:
                break
    return model, trace


def warm_up(stepper: Stepper, lr: float, step: int, steps: int) -> None:
    """The learning rate, linear up to `lr`."""
    for group in stepper.optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(1, steps))


def take_step(problem: Problem, model: nn.Module, stepper: Stepper, batches: Batches, step: int, trace: Trace) -> None:
    """Forward, backward, the method's step, and its line of the trace."""
    inputs, targets = batches.train(step)
    for parameter in model.parameters():
        parameter.grad = None
    loss = problem.loss(model(inputs), targets)
    loss.backward()
    clipping = stepper.step()
    trace.losses.append(loss.item())
    trace.grad_norms.append(clipping.grad_norm)
    trace.clipped_norms.append(clipping.clipped_norm)
    trace.clipped += clipping.clipped
    trace.skipped += clipping.skipped


@torch.no_grad()
def held_out_loss(problem: Problem, model: nn.Module, batches: Batches) -> float:
    """The mean loss on all held-out data."""
    ((inputs, targets),) = batches.held_out(1)
    return problem.held_out_loss(model(inputs), targets).item()
