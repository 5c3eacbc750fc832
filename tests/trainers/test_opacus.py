"""Opacus makes the gradients in its own step: what is clipped there has to be inside of it."""

import opacus
import pytest
import torch
from torch import nn

from zclip_optim import ZClipOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:.*Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:.*Optimal order is the largest alpha"),
]


def private(wrap, noise=0.0):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4))
    model, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=wrap(torch.optim.SGD(model.parameters(), lr=1.0)),
        data_loader=torch.utils.data.DataLoader(data, batch_size=8),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(8, 4)).sum().backward()
    optimizer.step()


def test_outside_is_refused_with_the_order_that_works():
    _, optimizer = private(lambda inner: inner)
    with pytest.raises(TypeError, match=r"Wrap first, then prepare: make_private\(module=model, optimizer=ZClip"):
        ZClipOptimizer(optimizer, max_grad_norm=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_inside_the_private_gradients_are_clipped(noise):
    model, optimizer = private(lambda inner: ZClipOptimizer(inner, max_grad_norm=1e-3), noise)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    step(model, optimizer)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert 5e-4 < (after - before).norm() <= 1.001e-3
    inner = optimizer.original_optimizer
    assert inner.metrics.step == 1
    assert inner.metrics.clipped_norm == pytest.approx(1e-3)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["zclip_step"] == 1
