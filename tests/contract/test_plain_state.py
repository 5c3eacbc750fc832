"""`__getstate__` and `__setstate__` of a plain optimizer, which people call to look into one and to reset it."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from training import make_model, parameters, train

from zclip_optim import ZClipOptimizer


def single(model):
    return ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))


def several(model):
    sgd = torch.optim.SGD(model[0].parameters(), lr=1e-2, momentum=0.9)
    return ZClipOptimizer([sgd, torch.optim.AdamW(model[2].parameters(), lr=1e-2)])


both = pytest.mark.parametrize("make", [single, several])


@both
def test_it_has_the_entries_of_a_plain_one(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(2))
    state = optimizer.__getstate__()
    assert [id(group) for group in state["param_groups"]] == [id(group) for group in optimizer.param_groups]
    assert state["state"].keys() == set(model.parameters())
    assert "lr" in state["defaults"]


def test_torch_xlas_way_to_the_gradients():
    """`reduce_gradients` of torch_xla looks for them there."""
    model = make_model()
    optimizer = single(model)
    train(model, optimizer, [0])
    groups = optimizer.__getstate__()["param_groups"]
    assert [id(p.grad) for group in groups for p in group["params"]] == [id(p.grad) for p in model.parameters()]


@both
def test_a_reset_is_that_of_the_bare_optimizer_and_leaves_the_statistics(make):
    model, by_hand = make_model(), make_model()
    optimizer, reference = make(model), make(by_hand)
    train(model, optimizer, range(30))
    train(by_hand, reference, range(30))
    optimizer.__setstate__({"state": defaultdict(dict)})
    for part in reference.parts:
        part.__setstate__({"state": defaultdict(dict)})
    assert len(optimizer.state) == 0
    assert optimizer.metrics.step == 30
    assert all(len(part.state) == 0 for part in optimizer.parts)
    train(model, optimizer, range(30, 35))
    train(by_hand, reference, range(30, 35))
    assert torch.equal(parameters(model), parameters(by_hand))
    assert optimizer.metrics == reference.metrics


@both
def test_groups_of_a_bare_one_get_the_statistics(make):
    model = make_model()
    optimizer = make(model)
    optimizer.param_groups[0]["zclip"] = False
    train(model, optimizer, range(5))
    groups = [
        {key: value for key, value in group.items() if "zclip" not in key} | {"lr": 7.0}
        for group in optimizer.param_groups
    ]
    optimizer.__setstate__({"param_groups": groups})
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [7.0] * len(groups)
    assert {group["zclip_step"] for group in optimizer.param_groups} == {optimizer.metrics.step}
    assert optimizer.param_groups[0]["zclip"] is False


def test_hooks_stay():
    model = make_model()
    optimizer, calls = single(model), []
    optimizer.register_step_post_hook(lambda *_: calls.append("ours"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base's"))
    optimizer.__setstate__({"state": defaultdict(dict)})
    train(model, optimizer, [0])
    assert calls == ["base's", "ours"]


def test_groups_that_do_not_fit_several_change_nothing():
    model = make_model()
    optimizer = several(model)
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="1 param groups for optimizers that have"):
        optimizer.__setstate__({"state": defaultdict(dict), "param_groups": [dict(optimizer.param_groups[0])]})
    assert len(optimizer.state) == 4
    assert len(optimizer.param_groups) == 2


class Bare:
    """An optimizer without torch's base class, which has no state of its own either."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self):
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


def test_a_base_that_lacks_some_of_it():
    model = make_model()
    optimizer = ZClipOptimizer(Bare(model.parameters()))
    state = optimizer.__getstate__()
    assert "param_groups" in state
    assert not {"state", "defaults"} & state.keys()
    assert copy.deepcopy(optimizer).metrics == optimizer.metrics


@both
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_each_once(make, copier):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin_model, twin = copier((model, optimizer))
    assert not {"param_groups", "state", "defaults"} & vars(twin).keys()
    assert [id(p) for group in twin.param_groups for p in group["params"]] == list(map(id, twin_model.parameters()))
    assert len(pickle.dumps(optimizer)) < len(pickle.dumps(optimizer.parts)) + 20_000
    train(model, optimizer, range(3, 6))
    train(twin_model, twin, range(3, 6))
    assert torch.equal(parameters(model), parameters(twin_model))


def test_a_frozen_pickle_of_before_is_taken():
    """Of a version that had its own entries alone."""
    model = make_model()
    optimizer = single(model)
    state = {k: v for k, v in optimizer.__getstate__().items() if k not in ("param_groups", "state", "defaults")}
    twin = ZClipOptimizer.__new__(ZClipOptimizer)
    twin.__setstate__(state)
    assert twin.base_optimizer is optimizer.base_optimizer
    train(model, twin, [0])
    assert twin.metrics.step == 1
