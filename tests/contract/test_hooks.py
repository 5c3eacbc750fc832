"""Hooks, facades and copies, as trainers use them."""

import copy

import pytest
import torch
from torch.optim import optimizer as torch_optimizer_module
from training import backward, make_model, parameters, set_gradients, train

from zclip_optim import ZClipOptimizer


def make(**options):
    model = make_model()
    return model, ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), **options)


@pytest.fixture
def global_calls():
    """Calls of torch's global optimizer hooks, which see every optimizer of the process."""
    calls = []
    handles = [
        torch_optimizer_module.register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        torch_optimizer_module.register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("post")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_global_hooks_fire_once_per_step(global_calls):
    model, optimizer = make()
    train(model, optimizer, range(3))
    assert global_calls == ["pre", "post"] * 3


def test_global_hooks_fire_once_after_copies_and_subclasses(global_calls):
    class Subclass(ZClipOptimizer):
        def step(self, closure=None):
            return super().step(closure)

    model = make_model()
    optimizer = copy.deepcopy(Subclass(torch.optim.SGD(model.parameters(), lr=0.1)))
    set_gradients(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    assert global_calls == ["pre", "post"]


def test_global_hooks_fire_once_also_if_something_has_torch_patch_the_class(global_calls):
    model, optimizer = make()
    optimizer._patch_step_function()  # what Optimizer.__init__ and Optimizer.__setstate__ call
    train(model, optimizer, [0])
    assert global_calls == ["pre", "post"]


def test_global_hooks_do_not_fire_for_a_skipped_step(global_calls):
    model, optimizer = make()
    backward(model, 0)
    model[0].weight.grad.fill_(float("nan"))
    optimizer.step()
    assert global_calls == []


def test_all_six_kinds_fire_exactly_once_and_can_be_removed():
    model, optimizer = make()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("step_pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("step_post")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict_post")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load_pre")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load_post")),
    ]
    for _ in range(2):
        train(model, optimizer, [0])
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
    assert calls == ["step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_pre", "load_post"]


def test_hooks_of_the_base_optimizer_fire_once_too():
    model, optimizer = make()
    calls = []
    base = optimizer.base_optimizer
    base.register_step_pre_hook(lambda *_: calls.append("step_pre"))
    base.register_step_post_hook(lambda *_: calls.append("step_post"))
    base.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    base.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    train(model, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step_pre", "step_post", "state_dict", "load"]


class Facade:
    """How Lightning and Fabric dress an optimizer: a new class, a copied __dict__, a step of their own."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step", "zero_grad")}
        self.__class__ = type("Facade" + type(optimizer).__name__, (Facade, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


def test_a_facade_that_copies_the_dict_sees_the_live_statistics():
    model, optimizer = make()
    facade = Facade(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(facade, 1, gamma=0.5)
    train(model, facade, range(30))
    scheduler.step()
    assert facade.metrics == optimizer.metrics
    assert facade.metrics.step == 30
    assert facade.param_groups is optimizer.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.005
    facade.load_state_dict(facade.state_dict())
    assert optimizer.metrics.step == 30
    train(model, facade, [30])
    assert optimizer.metrics.step == 31


def test_assigned_param_groups_are_the_ones_that_step():
    model, optimizer = make()
    train(model, optimizer, range(3))
    other = torch.nn.Parameter(torch.ones(3))
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [other]}]
    before = parameters(model)
    set_gradients([other], 1.0)
    optimizer.step()
    assert not torch.equal(other, torch.ones(3))
    assert torch.equal(parameters(model), before)
    assert optimizer.metrics.step == 4


def test_named_parameters_keep_their_names_through_a_checkpoint():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2))
    train(model, optimizer, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer.add_param_group({"params": [("extra", torch.nn.Parameter(torch.ones(2)))]})
    assert optimizer.param_groups[1]["param_names"] == ["extra"]
