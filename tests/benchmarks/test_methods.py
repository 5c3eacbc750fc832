"""The benchmarks' methods: what each records, and that its state is all it needs to go on."""

import json
import random

import pytest
import torch
from torch import nn

from benchmarks.training.methods import METHODS, total_norm

CLIPPERS = ("published", "autoclip", "zclip_optim", "paper", "capped")


def started(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return METHODS[name].start(model, torch.optim.SGD(model.parameters(), lr=0.0))


def step(stepper, norm):
    for parameter in stepper.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scale = norm / total_norm(stepper.model)
    for parameter in stepper.model.parameters():
        parameter.grad.mul_(scale)
    return stepper.step()


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_method_goes_on_from_its_state_and_its_optimizers(name):
    draw = random.Random(0)
    original, copy = started(name), started(name)
    for _ in range(40):
        step(original, draw.gauss(0.5, 0.02))
    copy.optimizer.load_state_dict(original.optimizer.state_dict())
    copy.load(json.loads(json.dumps(original.state())))
    for norm in (0.51, 3.0, 0.5, 0.7):
        assert str(step(copy, norm)) == str(step(original, norm))  # NaN is not equal to itself
    assert step(copy, 3.0).clipped
    assert not step(started(name), 0.9).clipped  # the state is what makes the difference


@pytest.mark.parametrize("name", [name for name in METHODS if name != "adagc"])
def test_what_is_recorded_is_what_happened(name):
    draw = random.Random(1)
    stepper = started(name)
    for index in range(60):
        norm = 10.0 if index == 50 else draw.gauss(0.5, 0.02)
        clipping = step(stepper, norm)
        assert clipping.grad_norm == pytest.approx(norm, rel=1e-4)
        assert clipping.clipped_norm == pytest.approx(total_norm(stepper.model), rel=1e-4)
        assert clipping.clipped == (clipping.clipped_norm < 0.999 * clipping.grad_norm)
