"""The published implementation (PyPI `zclip` 1.0.0) as a peer: the same run, step by step, where both mean the same."""

import pytest
import torch
from zclip import ZClip as PublishedZClip

from zclip_optim import ZClip, ZClipOptimizer

# clip_factor stays 1, where both agree on what it multiplies; "max" exists only here.
CASES = [
    {},
    {"clip_option": "mean"},
    {"mode": "percentile"},
    {"skip_update_on_spike": True},
    {"alpha": 0.9, "z_thresh": 2.0, "warmup_steps": 10},
]


def batches(steps=300):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(16, 8, generator=generator)
        y = x.sum(1, keepdim=True).sin() + 0.1 * torch.randn(16, 1, generator=generator)
        yield x, y + (30.0 if step % 41 == 40 else 0.0)  # outliers in the data


def train(make_step, dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(dtype)
    step = make_step(model)
    for x, y in batches():
        model.zero_grad()
        # A loss of this size keeps ordinary norms, and the thresholds, well under the published cap of 1.
        (0.1 * torch.nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))).backward()
        step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_parity_with_the_published_implementation(options):
    clipped = []

    def ours(model):
        optimizer = ZClipOptimizer(adamw(model), max_grad_norm=1.0, patience=None, **options)

        def step():
            optimizer.step()
            clipped.append(optimizer.metrics.clipped and optimizer.metrics.threshold < 1)

        return step

    def published(model):
        optimizer, clipper = adamw(model), PublishedZClip(max_grad_norm=1.0, **options)

        def step():
            clipper.step(model)
            optimizer.step()

        return step

    torch.testing.assert_close(train(ours), train(published), rtol=1e-6, atol=1e-6)
    assert sum(clipped) >= 5


def test_moving_over_is_one_line():
    def with_engine(model):
        optimizer, clipper = adamw(model), ZClip()

        def step():
            clipper.step(model)
            optimizer.step()

        return step

    assert torch.equal(train(with_engine), train(lambda model: ZClipOptimizer(adamw(model)).step))
