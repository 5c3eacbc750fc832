"""Faults injected into the gradients of several inner optimizers, at every phase of the statistics' life."""

import math
import random

import pytest
import torch
from reference import ReferenceZClip
from thoroughness import cases
from torch import nn
from zclip import ZClip as PublishedZClip

from zclip_optim import ZClipOptimizer

pytestmark = pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")

STEPS = 300
PHASES = {"first step": 0, "inside warm-up": 10, "last warm-up step": 24, "right after": 25, "later": 120}
INNER = {
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-3),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=1e-3, max_iter=1),
}
SIGMA = 0.05  # of the ordinary norms, whose mean is 1

# Each fault: (how many steps it lasts, the factor on the norm as a function of the steps since it began)
PASSING = {
    "hundredfold spike": (1, lambda i: 1e2),
    "millionfold spike": (1, lambda i: 1e6),
    "burst of 20": (20, lambda i: 30.0),
    "zero gradients": (30, lambda i: 0.0),
}
LASTING = {
    "shift down by 6 sigma": lambda i: 1 - 6 * SIGMA,
    "shift down by 10 sigma": lambda i: 1 - 10 * SIGMA,
    "shift down hundredfold": lambda i: 0.01,
    "slow ramp down": lambda i: 1 / (1 + 0.02 * i),
}
SHIFTS_UP = {"10 sigma": 1 + 10 * SIGMA, "100 sigma": 1 + 100 * SIGMA}


def ordinary_gradients(seed=0, steps=STEPS):
    """Directions are random, norms are 1 with a standard deviation of SIGMA."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        direction = torch.randn(40, generator=generator)
        yield direction / direction.norm() * rng.gauss(1.0, SIGMA)


class Run:
    """One parameter and its wrapped optimizer, fed with gradients of our making."""

    def __init__(self, make_inner, **options):
        self.p = nn.Parameter(torch.zeros(40))
        self.optimizer = ZClipOptimizer(make_inner([self.p]), **options)
        self.clipped = []

    def step(self, gradient):
        def closure():
            self.p.grad = None if gradient is None else gradient.clone()
            return torch.ones((), requires_grad=True)

        if isinstance(self.optimizer.base_optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        self.clipped.append(self.optimizer.metrics.clipped)

    def statistics(self):
        metrics = self.optimizer.metrics
        return metrics.mean, metrics.std, metrics.step, metrics.clipped_steps


every_inner = pytest.mark.parametrize("make_inner", cases(INNER, common=["AdamW fused"]))
every_phase = pytest.mark.parametrize("start", PHASES.values(), ids=PHASES.keys())


@pytest.mark.parametrize("make_inner", cases(INNER, common=["AdamW fused", "LBFGS"]))
@every_phase
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("times", [1, 5])
def test_after_nan_or_inf_the_run_is_the_one_without_those_steps(make_inner, start, bad, times):
    clean, faulty = Run(make_inner), Run(make_inner)
    for i, gradient in enumerate(ordinary_gradients(steps=160)):
        for _ in range(times if i == start else 0):
            poisoned = gradient.clone()
            poisoned[7] = bad
            before = faulty.p.detach().clone()
            faulty.step(poisoned)
            assert faulty.optimizer.step_was_skipped
            assert torch.equal(faulty.p, before)
        clean.step(gradient)
        faulty.step(gradient)
    assert torch.equal(faulty.p, clean.p)
    assert faulty.statistics() == clean.statistics()
    assert faulty.optimizer.metrics.skipped_steps == times


@every_inner
@every_phase
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_after_a_passing_fault_nothing_is_stuck(make_inner, start, fault):
    length, factor = fault
    run = Run(make_inner)
    for i, gradient in enumerate(ordinary_gradients()):
        run.step(gradient * factor(i - start) if start <= i < start + length else gradient)
    assert run.p.isfinite().all()
    assert not any(run.clipped[:25])
    if start >= 25 and factor(0) > 1:
        assert all(run.clipped[start : start + min(length, 20)])
        assert run.optimizer.metrics.mean == pytest.approx(1.0, abs=0.1)  # the fault has left no trace in the mean
    assert sum(run.clipped[start + 150 :]) < 0.05 * len(run.clipped[start + 150 :])


@every_inner
@every_phase
@pytest.mark.parametrize("factor", LASTING.values(), ids=LASTING.keys())
def test_after_a_lasting_fault_hardly_a_step_is_clipped_within_150(make_inner, start, factor):
    run = Run(make_inner)
    gradients = ordinary_gradients(steps=start + 350)
    for i, gradient in enumerate(gradients):
        run.step(gradient * factor(i - start) if i >= start else gradient)
    after = run.clipped[start + 150 :]
    assert sum(after) < 0.05 * len(after)
    assert run.p.isfinite().all()


@every_inner
@pytest.mark.parametrize("start", [25, 120])
@pytest.mark.parametrize("factor", SHIFTS_UP.values(), ids=SHIFTS_UP.keys())
@pytest.mark.parametrize("patience", [None, 20])
def test_a_shift_up_is_clipped_for_ever_or_until_patience_has_followed_it(make_inner, start, factor, patience):
    run = Run(make_inner, patience=patience)
    end = start + 20 + int(1000 * math.log2(factor))
    for i, gradient in enumerate(ordinary_gradients(steps=end + 200)):
        run.step(gradient * factor if i >= start else gradient)
    assert all(run.clipped[start : start + 100])
    assert run.p.isfinite().all()
    assert share(run.clipped[end:]) == pytest.approx(0.0 if patience else 1.0, abs=0.05)


@every_inner
@every_phase
def test_missing_gradients_leave_the_statistics_alone(make_inner, start):
    clean, faulty = Run(make_inner), Run(make_inner)
    for i, gradient in enumerate(ordinary_gradients(steps=160)):
        for _ in range(20 if i == start else 0):
            faulty.step(None)
        clean.step(gradient)
        faulty.step(gradient)
    assert faulty.statistics() == clean.statistics()
    assert faulty.optimizer.metrics.skipped_steps == 0


def clipped_by_the_published_package(norms):
    model = nn.Linear(1, 1, bias=False)
    clipper, clipped = PublishedZClip(max_grad_norm=None), []
    for norm in norms:
        model.weight.grad = torch.full((1, 1), norm)
        clipper.step(model)
        clipped.append(model.weight.grad.item() < norm * (1 - 1e-6))
    return clipped


def clipped_by_the_oracle(norms, **options):
    reference = ReferenceZClip(**options)
    clipped = []
    for norm in norms:
        reference.step(norm)
        clipped.append(reference.spike)
    return clipped


def share(clipped):
    return sum(clipped) / len(clipped)


@pytest.mark.parametrize("sigmas", [10, 100, 1000])
def test_twenty_seeds_of_a_shift_side_by_side(sigmas):
    end = 400 + int(1000 * math.log2(1 + sigmas * SIGMA))
    for seed in range(20):
        rng = random.Random(seed)
        norms = [rng.gauss(1.0, SIGMA) * (1 + (sigmas * SIGMA if i >= 200 else 0.0)) for i in range(end + 500)]
        assert share(clipped_by_the_oracle(norms, patience=200)[end:]) < 0.05
        assert share(clipped_by_the_oracle(norms)[350:]) == 1.0
        assert share(clipped_by_the_published_package(norms[:800])[350:]) == 1.0
