"""Accelerate needs no code of ours: prepared, the wrapper does what it does in plain torch."""

import math

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from training import make_batch, make_model, parameters, train_accumulating
from versions import Muon

from zclip_optim import ZClipOptimizer, ZClipWarning

OPTIONS = {"warmup_steps": 8, "z_thresh": 2.0}
STEPS, OUTLIERS = 40, (18, 19, 26, 27, 33)


def batches():
    return [make_batch(step, step in OUTLIERS) for step in range(STEPS)]


def make(make_inner=lambda params: torch.optim.AdamW(params, lr=1e-2)):
    """Model, optimizer, scheduler."""
    model = make_model()
    optimizer = ZClipOptimizer(make_inner(model.parameters()), **OPTIONS)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def accelerated(accelerate_options, **options):
    accelerator = Accelerator(cpu=True, **accelerate_options)
    return accelerator, *accelerator.prepare(*make(**options))


def run(accelerator, model, optimizer, scheduler, steps=range(STEPS)):
    data = batches()
    loader = DataLoader([data[step] for step in steps], batch_size=None)
    for x, y in accelerator.prepare(loader):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def plain(accumulate=1, **options):
    """The same run in plain torch."""
    parts = make(**options)
    train_accumulating(*parts, batches(), accumulate)
    return parts


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_that_of_plain_torch(accumulate):
    parts = accelerated({"gradient_accumulation_steps": accumulate})
    run(*parts)
    model, optimizer, scheduler = plain(accumulate)
    assert torch.equal(parameters(parts[1]), parameters(model))
    assert parts[2].optimizer.metrics == optimizer.metrics
    assert optimizer.metrics.step == STEPS // accumulate
    assert optimizer.metrics.clipped_steps > 0
    assert parts[3].get_last_lr() == scheduler.get_last_lr()


def muon_and_adamw(params):
    params = list(params)
    matrices = Muon([p for p in params if p.ndim == 2], lr=0.02)
    return [matrices, torch.optim.AdamW([p for p in params if p.ndim != 2], lr=1e-2)]


@pytest.mark.parametrize("options", [{}, {"make_inner": muon_and_adamw}], ids=["one", "several"])
def test_save_state_and_load_state(tmp_path, options):
    half, resumed = accelerated({}, **options), accelerated({}, **options)
    run(*half, steps=range(22))
    half[0].save_state(tmp_path)
    resumed[0].load_state(tmp_path)
    run(*resumed, steps=range(22, STEPS))
    model, optimizer, _ = plain(**options)
    assert torch.equal(parameters(resumed[1]), parameters(model))
    assert resumed[2].optimizer.metrics == optimizer.metrics
    assert optimizer.metrics.clipped_steps > half[2].optimizer.metrics.clipped_steps > 0


def test_a_nan_step_is_skipped_and_said_so():
    _, model, optimizer, _ = accelerated({})
    before = parameters(model)
    model(torch.full((1, 6), math.nan)).sum().backward()
    optimizer.step()
    assert optimizer.optimizer.step_was_skipped
    assert not optimizer.step_was_skipped  # which asks the scaler alone
    assert torch.equal(parameters(model), before)


def test_an_overflow_under_a_scaler_is_accelerates_to_skip():
    """Accelerate refuses mixed_precision="fp16" on the CPU; its optimizer and torch's scaler run there."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=5)
    _, optimizer, scheduler = parts = accelerator.prepare(*make())
    model, (reference, expected, schedule) = parts[0], make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=5)
    skipped = []
    for x, y in batches():
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(reference(x), y)
        scaler.scale(loss).backward()
        scaler.step(expected)
        scaler.update()
        if not skipped[-1]:
            schedule.step()
        expected.zero_grad()
    assert any(skipped)
    assert optimizer.optimizer.metrics.step == STEPS - sum(skipped)
    assert optimizer.optimizer.metrics.skipped_steps == 0
    assert optimizer.optimizer.metrics == expected.metrics
    assert torch.equal(parameters(model), parameters(reference))


def test_train_and_eval_reach_schedulefree():
    _, model, optimizer, _ = accelerated({}, make_inner=lambda params: schedulefree.AdamWScheduleFree(params, lr=1e-2))
    optimizer.train()
    for x, y in batches()[:3]:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    training = parameters(model)
    optimizer.eval()
    assert not torch.equal(parameters(model), training)
    optimizer.train()
    torch.testing.assert_close(parameters(model), training)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_set_to_none(set_to_none):
    _, model, optimizer, _ = accelerated({})
    model(torch.ones(1, 6)).sum().backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_wrapping_what_prepare_returned_is_refused(accumulate):
    """Its step() does nothing while gradients accumulate: 8 steps would be counted for 2."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = nn.Linear(4, 1)
    model, inner = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(TypeError, match=r"Wrap first, then prepare: accelerator\.prepare\(model, ZClipOptimizer"):
        ZClipOptimizer(inner)
    assert not any(key.startswith("zclip_") for key in inner.param_groups[0])


def test_parameters_that_were_replaced_are_warned_of():
    accelerator, model, optimizer, _ = accelerated({})
    for layer in (model[0], model[2]):
        layer.weight, layer.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
    with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient") as caught:
        for x, y in batches()[:30]:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
