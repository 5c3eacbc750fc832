"""GradScaler, autocast and accumulation: the wrapper sees what the bare optimizer sees."""

import pytest
import torch
from torch import nn
from training import make_batch, make_model, parameters

from zclip_optim import ZClipOptimizer

INNER = {
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, foreach=False),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True),
}
OVERFLOWS = (3, 4, 17)
STEPS = 40


def bare(inner):
    return inner


def without_clipping(inner):
    return ZClipOptimizer(inner, z_thresh=1e9)


def run(wrap, make_inner, dtype, unscale=False, accumulate=1, outliers=()):
    model = make_model()
    optimizer = wrap(make_inner(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
    scales, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = make_batch(100 * step + part, step in outliers)
            with torch.autocast("cpu", dtype):
                loss = nn.functional.mse_loss(model(x), y) / accumulate
            scaler.scale(loss).backward()
        if step in OVERFLOWS:
            model[0].weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scale = 1.0 if unscale else scaler.get_scale()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() / scale)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if isinstance(optimizer, ZClipOptimizer) and step not in OVERFLOWS:
            assert optimizer.metrics.grad_norm == pytest.approx(norms[-1], rel=1e-5)
    return parameters(model), scales, optimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_grad_scaler_run_is_that_of_the_bare_optimizer(make_inner, unscale, dtype):
    expected, scales, _ = run(bare, make_inner, dtype, unscale)
    ours, our_scales, optimizer = run(without_clipping, make_inner, dtype, unscale)
    assert torch.equal(ours, expected)
    assert our_scales == scales
    assert len(set(scales)) > 3
    assert optimizer.metrics.step == STEPS - len(OVERFLOWS)
    assert optimizer.metrics.skipped_steps == 0  # the scaler skips before the wrapper is called


@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_spikes_are_found_under_a_scaler(make_inner):
    _, _, optimizer = run(ZClipOptimizer, make_inner, torch.bfloat16, outliers=(33,))
    _, _, calm = run(ZClipOptimizer, make_inner, torch.bfloat16)
    assert optimizer.metrics.clipped_steps > calm.metrics.clipped_steps


@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_accumulation(unscale):
    expected, scales, _ = run(bare, INNER["AdamW foreach"], torch.bfloat16, unscale, accumulate=3)
    ours, our_scales, optimizer = run(without_clipping, INNER["AdamW foreach"], torch.bfloat16, unscale, accumulate=3)
    assert torch.equal(ours, expected)
    assert our_scales == scales
    assert optimizer.metrics.step == STEPS - len(OVERFLOWS)


def test_a_fused_inner_is_given_no_scaler_flags():
    _, _, optimizer = run(without_clipping, INNER["AdamW fused"], torch.float16)
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(optimizer, name)
        assert not hasattr(optimizer.base_optimizer, name)
