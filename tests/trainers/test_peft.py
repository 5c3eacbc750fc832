"""PEFT changes a model that an optimizer was made for."""

import peft
import pytest
import torch
from torch import nn
from training import make_batch

from zclip_optim import ZClipOptimizer, ZClipWarning


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def with_adapters(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def train(model, optimizer, steps):
    for step in range(steps):
        x, y = make_batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_adapters_that_came_after_the_optimizer_are_not_trained_and_that_is_said():
    model = make()
    optimizer = ZClipOptimizer(adamw(model))
    model = with_adapters(model)
    with pytest.warns(ZClipWarning, match=r"no parameter of this optimizer had a gradient .*PEFT") as caught:
        train(model, optimizer, 40)
    assert len(caught) == 1
    assert optimizer.metrics.step == 0


def test_adapters_first():
    model = with_adapters(make())
    optimizer = ZClipOptimizer(adamw(model))
    train(model, optimizer, 40)
    assert optimizer.metrics.step == 40
