"""Every scheduler gives the wrapper the learning rates that it gives the bare optimizer, also after loading."""

import math

import pytest
import torch
from pytorch_optimizer import SAM, Lookahead
from torch.optim import lr_scheduler as lrs
from training import backward, make_model, train

from zclip_optim import ZClipOptimizer

STEPS = 24

SCHEDULERS = {
    "StepLR": lambda o: lrs.StepLR(o, 5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [3, 9]),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.95),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=9),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 7),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.1, step_size_up=4),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 4), lrs.ExponentialLR(o, 0.9)], [5]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 4), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=8),
}


def trace(wrap, make_scheduler, reload_at=None):
    """Learning rate and momentum at every step; at `reload_at` all state goes through fresh objects."""

    def build():
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03}]
        optimizer = wrap(torch.optim.SGD(groups, lr=0.02, momentum=0.9))
        return model, optimizer, make_scheduler(optimizer)

    model, optimizer, scheduler = build()
    rates = []
    for step in range(STEPS):
        if step == reload_at:
            saved = [x.state_dict() for x in (model, optimizer, scheduler)]
            model, optimizer, scheduler = build()
            for x, state in zip((model, optimizer, scheduler), saved, strict=True):
                x.load_state_dict(state)
        train(model, optimizer, [step])
        scheduler.step(1.0) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
        rates.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("reload_at", [None, 8])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_the_trace_is_that_of_the_bare_optimizer(make_scheduler, reload_at):
    bare = trace(lambda inner: inner, make_scheduler, reload_at)
    assert trace(ZClipOptimizer, make_scheduler, reload_at) == bare
    assert len({rate for rates in bare for rate in rates}) > 2
    if reload_at:
        assert bare == trace(lambda inner: inner, make_scheduler)


def test_a_loaded_learning_rate_is_the_one_that_steps():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = lrs.StepLR(optimizer, 1, gamma=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [0])
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.05


def bad(model):
    backward(model, 0)
    model[0].weight.grad[0, 0] = math.nan


class TestAFirstStepThatIsLeftOut:
    """A scheduler on the base optimizer sees no step then, and torch would warn of the wrong order of calls."""

    @pytest.mark.parametrize("with_closure", [False, True])
    @pytest.mark.parametrize("is_held", [False, True])
    def test_it_counts_for_a_scheduler_on_the_base_optimizer(self, is_held, with_closure):
        model = make_model()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ZClipOptimizer(Lookahead(inner) if is_held else inner)
        scheduler = lrs.StepLR(inner, 1, gamma=0.5)
        if with_closure:
            optimizer.step(lambda: bad(model))
        else:
            bad(model)
            optimizer.step()
        scheduler.step()
        assert optimizer.step_was_skipped
        assert inner.param_groups[0]["lr"] == 0.05

    def test_for_one_on_a_part_of_a_list(self):
        model = make_model()
        parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)]
        optimizer = ZClipOptimizer(parts)
        schedulers = [lrs.StepLR(part, 1) for part in parts]
        bad(model)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    def test_for_one_on_what_sam_steps_in_its_second_stage(self):
        model = make_model()
        sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        optimizer = ZClipOptimizer(sam)
        scheduler = lrs.StepLR(sam.base_optimizer, 1)
        bad(model)
        optimizer.first_step(zero_grad=True)
        bad(model)
        optimizer.second_step(zero_grad=True)
        scheduler.step()
        assert optimizer.step_was_skipped

    def test_a_step_that_was_forgotten_is_still_warned_of(self):
        base = torch.optim.SGD(make_model().parameters(), lr=0.1)
        ZClipOptimizer(base)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            lrs.StepLR(base, 1).step()
        assert not hasattr(base, "_opt_called")

    def test_nothing_is_set_where_there_is_no_scheduler(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        bad(model)
        optimizer.step()
        assert not hasattr(optimizer.base_optimizer, "_opt_called")
