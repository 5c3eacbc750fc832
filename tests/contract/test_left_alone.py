"""A param group with ``zclip=False`` is out of the norm and of scaling."""

import copy
import math
import pickle
import re

import pytest
import torch
from pytorch_optimizer import SAM
from training import make_model, parameters, set_gradients

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer

NORMS = (3.0, 4.0)


def sgd(model, *choices, **options):
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    for group, choice in zip(groups, choices, strict=True):
        group.update({} if choice is None else {"zclip": choice})
    return torch.optim.SGD(groups, lr=0.1, **options)


def make(*choices, **options):
    model = make_model()
    return model, ZClipOptimizer(sgd(model, *choices), **options)


def give_gradients(model, norms=NORMS):
    for layer, norm in zip((model[0], model[2]), norms, strict=True):
        set_gradients(layer.parameters(), norm)


def norms_of(model):
    return [math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters())) for layer in (model[0], model[2])]


def published(optimizer):
    return [group["zclip"] for group in optimizer.state_dict()["param_groups"]]


def test_it_is_in_neither_norm_nor_scaling():
    model, optimizer = make(False, None, max_grad_norm=1.0)
    give_gradients(model)
    untouched = [p.grad.clone() for p in model[0].parameters()]
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(4.0)
    assert norms_of(model) == pytest.approx([3.0, 1.0])
    assert all(torch.equal(p.grad, g) for p, g in zip(model[0].parameters(), untouched, strict=True))


def test_it_steps_as_ever_and_a_nan_in_it_is_not_seen():
    model, optimizer = make(False, True, max_grad_norm=1e-9)
    give_gradients(model)
    model[0].bias.grad[0] = math.nan
    weight, other = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    optimizer.step()
    assert not optimizer.step_was_skipped
    assert torch.allclose(model[0].weight, weight - 0.1 * model[0].weight.grad)
    assert torch.allclose(model[2].weight, other, atol=1e-8)


def test_a_nan_elsewhere_skips_it_too():
    model, optimizer = make(False, True)
    start = parameters(model)
    give_gradients(model, (1.0, math.nan))
    optimizer.step()
    assert optimizer.step_was_skipped
    assert torch.equal(parameters(model), start)


def test_with_a_scope_per_group_it_has_no_statistics_and_the_others_keep_their_place():
    model, optimizer = make(False, True, scope="group")
    for _ in range(3):
        give_gradients(model)
        optimizer.step()
    left_alone, clipped = optimizer.group_metrics
    assert (left_alone.step, left_alone.grad_norm) == (0, 0.0)
    assert (clipped.step, clipped.grad_norm) == (3, pytest.approx(4.0))
    assert [group["zclip_step"] for group in optimizer.state_dict()["param_groups"]] == [0, 3]


@pytest.mark.parametrize("scope", ["global", "group"])
def test_it_may_change_during_the_run(scope):
    model, optimizer = make(True, True, max_grad_norm=1.0, scope=scope)
    optimizer.param_groups[1]["zclip"] = False
    give_gradients(model)
    optimizer.step()
    assert norms_of(model) == pytest.approx([1.0, 4.0])


@pytest.mark.parametrize("fused", [False, True])
def test_on_the_device_path(fused, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
    model = make_model()
    optimizer = ZClipOptimizer(sgd(model, False, True, fused=fused), max_grad_norm=1.0)
    start = model[0].weight.detach().clone()
    give_gradients(model)
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(4.0)
    assert norms_of(model) == pytest.approx([3.0, 1.0])
    assert torch.allclose(model[0].weight, start - 0.1 * model[0].weight.grad)
    give_gradients(model, (1.0, math.nan))
    optimizer.step()
    assert optimizer.step_was_skipped


def test_the_engine_takes_such_groups():
    model = make_model()
    give_gradients(model)
    groups = sgd(model, False, True).param_groups
    assert ZClip(max_grad_norm=1.0).step(groups) == pytest.approx(4.0)
    assert norms_of(model) == pytest.approx([3.0, 1.0])


def test_it_is_not_among_the_parameters_whose_norms_are_asked_for_and_others_keep_their_position():
    model, optimizer = make(False, True)
    give_gradients(model)
    assert {each.name.split("[")[1] for each in optimizer.norms_by_parameter()} == {"1]"}
    model[2].bias.grad[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=re.escape("elements: param_groups[1]['params'][1] (1,)")):
        ZClip(nonfinite="raise").step(optimizer.param_groups)


def test_if_all_are_left_alone_that_is_warned_of():
    model, optimizer = make(False, False)
    with pytest.warns(zclip_optim.ZClipWarning, match="no parameter of this optimizer had a gradient"):
        for _ in range(20):
            give_gradients(model)
            optimizer.step()


class TestSaved:
    def test_every_group_says_it_from_the_start(self):
        _, optimizer = make(False, None)
        assert [group["zclip"] for group in optimizer.param_groups] == [False, True]
        assert published(optimizer) == [False, True]
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "zclip": False})
        assert published(optimizer) == [False, True, True, False]

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_it_is_copied(self, copier):
        assert published(copier(make(False, True)[1])) == [False, True]

    @pytest.mark.parametrize("by_itself", [False, True])
    @pytest.mark.parametrize(("then", "now"), [((True, True), (False, True)), ((False, True), (True, None))])
    def test_as_all_options_of_ours_it_stays_what_was_said_here(self, then, now, by_itself):
        """An old checkpoint would clip again what is to be left alone from now on."""
        saved = make(*then)[1].state_dict()
        model, optimizer = make(*now)
        (optimizer.base_optimizer if by_itself else optimizer).load_state_dict(saved)
        expected = [choice is not False for choice in now]
        assert [group["zclip"] for group in optimizer.param_groups] == published(optimizer) == expected
        give_gradients(model)
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(5.0 if all(expected) else 4.0)

    def test_what_was_said_after_construction_stays_too(self):
        saved = make(True, True)[1].state_dict()
        _, optimizer = make(True, True)
        optimizer.param_groups[1]["zclip"] = False
        optimizer.load_state_dict(saved)
        assert published(optimizer) == [True, False]

    def test_in_a_list_of_optimizers_too(self):
        def several(choice):
            model = make_model()
            groups = [{"params": model[0].parameters(), "zclip": choice}]
            return ZClipOptimizer([torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)])

        saved = several(True).state_dict()
        optimizer = several(False)
        optimizer.load_state_dict(saved)
        assert published(optimizer) == [False, True]
        optimizer.parts[0].load_state_dict(several(True).parts[0].state_dict())
        assert published(optimizer) == [False, True]

    def test_a_checkpoint_that_does_not_say_leaves_it(self):
        bare = sgd(make_model(), None, None).state_dict()
        optimizer = make(False, True)[1]
        optimizer.load_state_dict(bare)
        assert published(optimizer) == [False, True]

    def test_nor_does_one_that_the_base_optimizer_loads_itself(self):
        model, optimizer = make(False, True)
        optimizer.base_optimizer.load_state_dict(sgd(make_model(), None, None).state_dict())
        give_gradients(model)
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(4.0)
        assert published(optimizer) == [False, True]

    def test_a_scheduler_does_not_mind(self):
        _, optimizer = make(False, True)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
        assert published(optimizer) == [False, True]

    def test_only_what_is_left_alone_shows(self):
        assert re.findall("zclip.*", repr(make(False, True)[1])) == ["zclip: False"]


class TestNeitherTrueNorFalse:
    match = re.escape("'zclip' in param_groups[1] must be True or False, got 'no'")

    def test_at_construction(self):
        with pytest.raises(ValueError, match=self.match):
            make(True, "no")

    def test_in_a_checkpoint(self):
        _, optimizer = make(False, True)
        saved = make(True, True)[1].state_dict()
        saved["param_groups"][0]["lr"], saved["param_groups"][1]["zclip"] = 7.0, "no"
        with pytest.raises(ValueError, match=self.match):
            optimizer.load_state_dict(saved)
        assert published(optimizer) == [False, True]
        assert optimizer.param_groups[0]["lr"] == 0.1

    def test_in_a_group_that_is_added(self):
        _, optimizer = make(True, True)
        with pytest.raises(ValueError, match="must be True or False, got 1"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "zclip": 1})
        assert len(optimizer.param_groups) == 2

    @pytest.mark.parametrize("scope", ["global", "group"])
    @pytest.mark.parametrize("choice", [0, 1, "no", None, torch.tensor(False)])
    def test_given_late_it_is_refused_in_the_step(self, scope, choice):
        model, optimizer = make(True, True, scope=scope, max_grad_norm=1.0)
        give_gradients(model)
        optimizer.step()
        give_gradients(model)
        before, norms, metrics = parameters(model), norms_of(model), optimizer.metrics
        optimizer.param_groups[1]["zclip"] = choice
        match = re.escape(f"'zclip' in param_groups[1] must be True or False, got {choice!r}")
        for take in (optimizer.step, lambda: optimizer.step(lambda: give_gradients(model))):
            with pytest.raises(ValueError, match=match):
                take()
        with pytest.raises(ValueError, match=match):
            ZClip(scope=scope).step(optimizer.param_groups)
        assert torch.equal(parameters(model), before)
        assert norms_of(model) == norms
        assert optimizer.metrics == metrics
        optimizer.param_groups[1]["zclip"] = False
        optimizer.step()
        assert published(optimizer) == [True, False]

    @pytest.mark.parametrize("in_stages", [False, True])
    def test_nor_does_sam_move_for_it(self, in_stages):
        model = make_model()
        optimizer = ZClipOptimizer(SAM(model.parameters(), torch.optim.SGD, lr=0.1))
        optimizer.param_groups[0]["zclip"] = 0
        give_gradients(model)
        before = parameters(model)
        with pytest.raises(ValueError, match="must be True or False, got 0"):
            optimizer.first_step() if in_stages else optimizer.step(lambda: give_gradients(model))
        assert torch.equal(parameters(model), before)
