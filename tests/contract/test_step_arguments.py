"""A step that takes more than a closure gets what it takes, beside clipping, and what it does not take is refused."""

import math
import re

import pytest
import torch
from pytorch_optimizer import AdaHessian, MuonClip, SophiaH
from torch import nn
from torch.optim.lr_scheduler import StepLR
from training import make_batch, make_model, parameters, set_gradients, train

from zclip_optim import ZClipOptimizer


class Momo(torch.optim.SGD):
    """Stands for MoMo's: the loss may be given beside the closure, or by position after it."""

    def step(self, closure=None, loss=None, *, lb=0.0):
        loss = closure() if closure is not None else loss
        self.seen = (loss, lb)
        super().step()
        return loss


class L4(torch.optim.SGD):
    """Stands for those whose step takes the loss, and no closure."""

    def step(self, loss):
        self.seen = loss
        super().step()
        return "stepped"


class TakesNone(torch.optim.SGD):
    def step(self):
        super().step()


def make(*kinds, **options):
    model = make_model()
    layers = [model] if len(kinds) == 1 else [model[0], model[2]]
    parts = [kind(layer.parameters(), lr=1e-2) for kind, layer in zip(kinds, layers, strict=True)]
    return model, ZClipOptimizer(parts[0] if len(parts) == 1 else parts, **options)


def closure_of(model, norm, loss=7.0):
    def closure():
        set_gradients(model.parameters(), norm)
        return loss

    return closure


def norm_of(model):
    return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))


def snapshot(model, optimizer):
    gradients = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    return parameters(model), gradients, repr(optimizer.state_dict())


def assert_unchanged(model, optimizer, before):
    assert all(torch.equal(a, b) for a, b in zip(before[:2], snapshot(model, optimizer)[:2], strict=True))
    assert repr(optimizer.state_dict()) == before[2]


@pytest.mark.parametrize("kind", [SophiaH, AdaHessian])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_hessian_is_handed_on(kind, with_closure):
    runs = []
    for wrap in (lambda o: o, lambda o: ZClipOptimizer(o, z_thresh=1e9)):
        model = make_model()
        optimizer = wrap(kind(model.parameters(), lr=1e-2))
        for step in range(3):
            x, y = make_batch(step)
            hessian = [torch.full_like(p, 1.0 + step) for p in model.parameters()]

            def closure(x=x, y=y, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            if with_closure:
                assert optimizer.step(closure, hessian=hessian).item() > 0
            else:
                closure()
                assert optimizer.step(hessian=hessian) is None
        runs.append(parameters(model))
    assert torch.equal(*runs)


def test_logits_are_handed_on():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    group = {"params": model.parameters(), "use_muon": True, "qk_clip": "query", "attention_name": "a"}
    optimizer = ZClipOptimizer(MuonClip([group]))
    set_gradients(model.parameters(), 1e-12)
    before = parameters(model)
    optimizer.step(attention_max_logits={"a": torch.tensor([1e4, 1e4])})
    assert parameters(model).norm() < 0.5 * before.norm()


def test_as_given_by_name_and_by_position():
    model, optimizer = make(Momo, max_grad_norm=1.0)
    set_gradients(model.parameters(), 5.0)
    assert optimizer.step(loss=3.0, lb=0.5) == 3.0
    assert optimizer.base_optimizer.seen == (3.0, 0.5)
    assert norm_of(model) == pytest.approx(1.0)
    set_gradients(model.parameters(), 5.0)
    assert optimizer.step(None, 4.0) == 4.0
    assert norm_of(model) == pytest.approx(1.0)
    assert optimizer.step(closure_of(model, 5.0), None, lb=2.0) == 7.0
    assert optimizer.base_optimizer.seen == (7.0, 2.0)
    assert norm_of(model) == pytest.approx(1.0)
    assert optimizer.metrics.step == 3


def test_a_first_argument_that_is_no_closure():
    model, optimizer = make(L4, max_grad_norm=1.0)
    set_gradients(model.parameters(), 5.0)
    loss = torch.tensor(3.0)
    assert optimizer.step(loss) == "stepped"
    assert optimizer.base_optimizer.seen is loss
    assert norm_of(model) == pytest.approx(1.0)


def test_any_name():
    class Names(torch.optim.SGD):
        def step(self, closure=None, base=None, kernels=None, args=None, step=None):
            return closure and closure(), base, kernels, args, step

    model, optimizer = make(Names)
    names = {"base": 1, "kernels": 2, "args": 3, "step": 4}
    assert optimizer.step(**names) == (None, 1, 2, 3, 4)
    assert optimizer.step(closure_of(model, 1.0), **names) == (7.0, 1, 2, 3, 4)


def test_a_step_that_is_left_out_gets_nothing():
    model, optimizer = make(Momo)
    set_gradients(model.parameters(), math.nan)
    assert optimizer.step(loss=3.0) is None
    assert not hasattr(optimizer.base_optimizer, "seen")


def test_through_step_hooks():
    model, optimizer = make(Momo)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((args, dict(kwargs))))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append((args, dict(kwargs))))
    set_gradients(model.parameters(), 1.0)
    assert optimizer.step(loss=3.0) == 3.0
    assert seen == [((optimizer,), {"loss": 3.0})] * 2
    seen.clear()
    assert optimizer.step(None, 4.0, lb=1.0) == 4.0
    assert seen == [((optimizer, None, 4.0), {"lb": 1.0})] * 2
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "loss": 9.0}))
    assert optimizer.step() == 9.0


def test_through_a_grad_scaler_and_a_scheduler():
    model, optimizer = make(Momo)
    StepLR(optimizer, 5)
    StepLR(optimizer.base_optimizer, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = make_batch(0)
    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
    assert scaler.step(optimizer, loss=3.0) == 3.0
    assert optimizer.step(None, 4.0) == 4.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'los'"):
        optimizer.step(los=4.0)
    with pytest.raises(TypeError, match="too many positional arguments"):
        optimizer.step(None, 4.0, 5.0)


class TestSeveral:
    def test_each_part_gets_them_and_the_closure_is_evaluated_once(self):
        model, optimizer = make(Momo, Momo, max_grad_norm=1.0)
        set_gradients(model.parameters(), 5.0)
        optimizer.step(loss=3.0, lb=0.5)
        assert [part.seen for part in optimizer.parts] == [(3.0, 0.5)] * 2
        calls = []
        assert optimizer.step(lambda: calls.append(1) or closure_of(model, 5.0)(), 4.0) == 7.0
        assert calls == [1]
        assert [part.seen for part in optimizer.parts] == [(4.0, 0.0)] * 2
        assert norm_of(model) == pytest.approx(1.0)

    def test_a_first_argument_that_is_no_closure(self):
        model, optimizer = make(L4, L4)
        set_gradients(model.parameters(), 5.0)
        optimizer.step(3.0)
        assert [part.seen for part in optimizer.parts] == [3.0] * 2

    def test_what_one_of_them_does_not_take_is_refused(self):
        model, optimizer = make(Momo, TakesNone)
        train(model, optimizer, range(2))
        before = snapshot(model, optimizer)
        match = re.escape("since TakesNone.step() does not take them: got an unexpected keyword argument 'loss'")
        with pytest.raises(TypeError, match=match):
            optimizer.step(loss=3.0)
        assert_unchanged(model, optimizer, before)


class TestRefused:
    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize(
        ("args", "kwargs", "says"),
        [
            ((), {"hessian": 1}, r"since SGD\.step\(closure.*\).* does not take them: .* keyword argument 'hessian'"),
            ((None, 3), {}, "does not take them: too many positional arguments"),
            ((lambda: 1.0,), {"hessian": 1}, "does not take them"),
            ((3.0,), {}, "closure must be None or a function to call, got a float"),
        ],
    )
    def test_what_the_base_does_not_take_changes_nothing(self, args, kwargs, says, hooked):
        model, optimizer = make(torch.optim.SGD, max_grad_norm=1e-3)
        train(model, optimizer, range(2))
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        set_gradients(model.parameters(), 1.0)
        before = snapshot(model, optimizer)
        with pytest.raises(TypeError, match=says):
            optimizer.step(*args, **kwargs)
        assert_unchanged(model, optimizer, before)

    def test_a_step_whose_signature_is_not_known_gets_all(self):
        model, told = make_model(), {}
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        base.step = told.update
        set_gradients(model.parameters(), 1.0)
        ZClipOptimizer(base).step(loss=3)
        assert told == {"loss": 3}
