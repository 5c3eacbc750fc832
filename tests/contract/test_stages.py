"""SAM's first_step() and second_step(), with a backward before each: clipped as step(closure) is."""

import copy
import gc
import math
import pickle

import pytest
import pytorch_optimizer
import torch
from torch import nn
from training import make_batch, make_model, parameters, set_gradients

from zclip_optim import NonFiniteGradientError, ZClipOptimizer, ZClipWarning


class SAM(torch.optim.Optimizer):
    """The widespread one of davda54: second_step() goes back to `old_p`, which it never forgets."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for p in self._params()]).norm()
        for p in self._params():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self._params():
            p.data = self.state[p]["old_p"]
        self.base.step()
        if zero_grad:
            self.zero_grad()

    def _params(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


SAMS = {
    "davda54": lambda params, **options: SAM(params, torch.optim.SGD, **options),
    "SAM": lambda params, **options: pytorch_optimizer.SAM(params, torch.optim.SGD, **options),
    "SAM foreach": lambda params, **options: pytorch_optimizer.SAM(params, torch.optim.SGD, foreach=True, **options),
    "LookSAM": lambda params, **options: pytorch_optimizer.LookSAM(params, torch.optim.SGD, **options),
    "FriendlySAM": lambda params, **options: pytorch_optimizer.FriendlySAM(params, torch.optim.SGD, **options),
}
sams = pytest.mark.parametrize("make_sam", SAMS.values(), ids=SAMS.keys())


def make(make_sam, lr=0.05, momentum=0.0, **options):
    model = make_model()
    return model, ZClipOptimizer(make_sam(model.parameters(), lr=lr, momentum=momentum), **options)


def backward(model, step, poison=False):
    x, y = make_batch(step)
    nn.functional.mse_loss(model(x), y).backward()
    if poison:
        model[0].bias.grad.fill_(math.nan)


def two_steps(model, optimizer, step, first=False, second=False):
    backward(model, step, first)
    optimizer.first_step(zero_grad=True)
    backward(model, step, second)
    optimizer.second_step(zero_grad=True)


@sams
def test_they_are_clipped_and_count_as_one_step(make_sam):
    model, optimizer = make(make_sam, lr=1.0, max_grad_norm=1e-3)
    before = parameters(model)
    two_steps(model, optimizer, 0)
    assert 1e-4 < (parameters(model) - before).norm() <= 1.001e-3
    assert optimizer.metrics.step == 1
    assert optimizer.metrics.clipped_norm == pytest.approx(1e-3)


def test_a_parameter_at_zero_moves_by_no_more_than_the_cap():
    p = nn.Parameter(torch.zeros(4))
    sam = pytorch_optimizer.SAM([p], torch.optim.SGD, lr=1.0, rho=1e-3)
    optimizer = ZClipOptimizer(sam, max_grad_norm=1e-9)
    for stage in (optimizer.first_step, optimizer.second_step):
        set_gradients([p], 1.0)
        stage(zero_grad=True)
    assert p.detach().norm().item() == pytest.approx(1e-9, rel=1e-5)


@sams
def test_unclipped_they_are_the_bare_ones(make_sam):
    model, optimizer = make(make_sam, momentum=0.9, z_thresh=1e9)
    bare_model = make_model()
    bare = make_sam(bare_model.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        two_steps(model, optimizer, step)
        two_steps(bare_model, bare, step)
    assert torch.equal(parameters(model), parameters(bare_model))
    assert optimizer.metrics.step == 10


@sams
def test_a_nan_at_the_first_leaves_out_both(make_sam):
    model, optimizer = make(make_sam, momentum=0.9)
    other, reference = make(make_sam, momentum=0.9)
    for step in range(8):
        two_steps(model, optimizer, step, first=step == 4)
        if step == 4:
            assert optimizer.step_was_skipped
            assert all(p.grad is None for p in model.parameters())  # as was asked for
        else:
            two_steps(other, reference, step)
    assert torch.equal(parameters(model), parameters(other))
    assert optimizer.metrics.skipped_steps == 1
    assert optimizer.metrics.step == 7


@sams
def test_a_nan_at_the_second_puts_the_parameters_back(make_sam):
    model, optimizer = make(make_sam, momentum=0.9)
    for step in range(8):
        before = parameters(model)
        two_steps(model, optimizer, step, second=step == 4)
        assert torch.equal(parameters(model), before) == (step == 4)
        assert optimizer.step_was_skipped == (step == 4)
    assert parameters(model).isfinite().all()
    assert optimizer.metrics.skipped_steps == 1
    assert optimizer.metrics.step == 8  # the first norm of each was finite, as with a closure


@sams
@pytest.mark.parametrize("at", ["first", "second"])
def test_raising_leaves_the_parameters_where_they_were(make_sam, at):
    model, optimizer = make(make_sam, nonfinite="raise")
    for step in range(3):
        two_steps(model, optimizer, step)
    before = parameters(model)
    with pytest.raises(NonFiniteGradientError, match="is nan"):
        two_steps(model, optimizer, 3, **{at: True})
    assert torch.equal(parameters(model), before)
    optimizer.zero_grad()
    two_steps(model, optimizer, 4)
    assert parameters(model).isfinite().all()
    assert not torch.equal(parameters(model), before)


def test_the_gradients_stay_if_nobody_asks_to_zero_them():
    model, optimizer = make(SAMS["SAM"])
    backward(model, 0, poison=True)
    optimizer.first_step()
    assert model[0].bias.grad.isnan().all()
    optimizer.second_step()
    assert model[0].bias.grad.isnan().all()
    assert optimizer.metrics.skipped_steps == 1


def test_a_spike_above_z_skip_leaves_out_both():
    p = nn.Parameter(torch.zeros(4))
    optimizer = ZClipOptimizer(SAMS["SAM"]([p], lr=0.1), warmup_steps=4, z_skip=6.0)
    for norm in (1.0, 1.1, 1.0, 1.1, 1.05, 100.0):
        before = p.detach().clone()
        for stage in (optimizer.first_step, optimizer.second_step):
            set_gradients([p], norm)
            stage(True)
        assert torch.equal(p, before) == (norm == 100.0)
    assert optimizer.metrics.skipped_steps == 1


def test_a_spike_is_clipped_at_both():
    model, optimizer = make(SAMS["SAM"], warmup_steps=4)
    seen = []
    inner = optimizer.base_optimizer.base_optimizer
    inner.register_step_pre_hook(lambda *_: seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    for norm in (1.0, 1.1, 1.0, 1.1, 1.05, 100.0):
        for stage in (optimizer.first_step, optimizer.second_step):
            set_gradients(model.parameters(), norm)
            stage()
    assert optimizer.metrics.clipped
    assert seen[-2].item() == pytest.approx(1.05, rel=1e-4)
    assert seen[-1].item() < 1.5


def test_three_stages():
    model = make_model()
    optimizer = ZClipOptimizer(pytorch_optimizer.BSAM(model.parameters(), num_data=1000, lr=0.01))
    for step in range(6):
        before = parameters(model)
        for i, stage in enumerate((optimizer.first_step, optimizer.second_step, optimizer.third_step)):
            optimizer.zero_grad()
            backward(model, step, poison=(step, i) in ((2, 0), (3, 1), (4, 2)))
            stage()
        assert torch.equal(parameters(model), before) == (step in (2, 3, 4))
    assert optimizer.metrics.skipped_steps == 3
    assert parameters(model).isfinite().all()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_between_the_stages_is_on_its_own(copier):
    p = nn.Parameter(torch.zeros(4))
    optimizer = ZClipOptimizer(Staged([p], lr=1.0))
    set_gradients([p], 1.0)
    optimizer.first_step()
    twin = copier(optimizer)
    (q,) = twin.param_groups[0]["params"]
    set_gradients([q], 1.0)
    twin.second_step()
    assert torch.equal(p, torch.ones(4))
    assert not torch.equal(q, p)
    assert twin.metrics.step == optimizer.metrics.step == 1


class Idle(torch.optim.SGD):
    """Keeps nothing of its own between its stages."""

    def first_step(self, zero_grad=False): ...

    def second_step(self, zero_grad=False): ...


@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
def test_the_copy_of_the_parameters_lives_as_long_as_the_step_and_is_in_no_pickle(nonfinite):
    def tensors():
        gc.collect()
        return sum(1 for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (10_001,))

    p = nn.Parameter(torch.zeros(10_001))
    optimizer = ZClipOptimizer(Idle([p]), nonfinite=nonfinite)
    size, alive = len(pickle.dumps(optimizer)), tensors()
    for last in (1.0, math.nan):
        set_gradients([p], 1.0)
        optimizer.first_step()
        held = tensors() - alive - 1  # the gradient
        assert held == (nonfinite == "skip")
        assert len(pickle.dumps(optimizer)) < size + 5_000
        set_gradients([p], last)
        optimizer.second_step()
        assert tensors() - alive - 1 == 0
        p.grad = None
    set_gradients([p], math.nan)
    optimizer.first_step()
    assert tensors() - alive - 1 == 0 or nonfinite == "pass"


def test_a_copy_of_the_optimizer_between_the_stages_cannot_go_back_and_says_so():
    p = nn.Parameter(torch.zeros(4))
    optimizer = ZClipOptimizer(Staged([p], lr=1.0))
    set_gradients([p], 1.0)
    optimizer.first_step()
    twin = pickle.loads(pickle.dumps(optimizer))
    set_gradients(twin.param_groups[0]["params"], math.nan)
    with pytest.warns(ZClipWarning, match=r"Staged .* copied in the middle of the step, so there is no copy"):
        twin.second_step()
    assert twin.step_was_skipped


def test_second_steps_alone_are_steps():
    """As of those who take the first one at some steps only."""
    model, optimizer = make(SAMS["SAM"])
    two_steps(model, optimizer, 0)
    for step in range(1, 4):
        backward(model, step)
        optimizer.base_optimizer.first_step()
        backward(model, step)
        optimizer.second_step(zero_grad=True)
        assert optimizer.metrics.step == step + 1


class Staged(torch.optim.SGD):
    """One that can be copied even when bare."""

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            p.add_(1.0)

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(1.0)
        self.step()


def test_an_optimizer_without_them_has_none():
    optimizer = ZClipOptimizer(torch.optim.SGD(make_model().parameters(), lr=0.1))
    assert not hasattr(optimizer, "first_step")
    assert not hasattr(ZClipOptimizer(SAMS["SAM"](make_model().parameters(), lr=0.1)), "third_step")
