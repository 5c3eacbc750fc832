"""Warnings: each failure that people meet, once per run, with its numbers and the argument to change."""

import copy
import gc
import math
import pickle
import random
import warnings
import weakref

import pytest
import torch
from torch import nn
from training import set_gradients

import zclip_optim.gradients
from zclip_optim import ZClip, ZClipOptimizer, ZClipWarning
from zclip_optim.health import Health


def messages(norms, clipper=None, **options):
    """The warnings of a run over these norms."""
    clipper, p = clipper or ZClip(**options), nn.Parameter(torch.zeros(30))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in norms:
            set_gradients([p], norm)
            clipper.step([p])
    assert all(warning.category is ZClipWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def noise(steps, spread=0.05, level=1.0):
    rng = random.Random(0)
    return [level * (1 + rng.gauss(0, spread)) for _ in range(steps)]


def test_an_ordinary_run_warns_of_nothing():
    norms = noise(1000)
    norms[100] = norms[500] = 50.0
    norms[300:320] = [30.0] * 20
    assert messages(norms) == []


def test_many_clipped_steps():
    norms = [norm * (10.0 if i % 4 == 3 and i > 30 else 1.0) for i, norm in enumerate(noise(900))]
    (message,) = messages(norms, z_thresh=2.0, alpha=0.99)
    assert "of the last 200 steps were clipped, at step 400" in message or "at step 200" in message
    assert "z_thresh=2" in message
    assert "learning rate" in message


def test_as_many_as_a_fifth_of_the_steps_is_no_reason():
    norms = [norm * (10.0 if i % 5 == 4 and i > 200 else 1.0) for i, norm in enumerate(noise(900))]
    assert messages(norms, z_thresh=5.0, alpha=0.99) == []


class TestTheParametersOfManyClippedSteps:
    """In the first 200 steps; the last of them is clipped or not."""

    def message(self, last=40.0):
        params = [(name, nn.Parameter(torch.zeros(1))) for name in ("a", "b", "c", "d")]
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for norm in noise(60) + noise(139, level=40.0) + [last] + noise(400, level=40.0):
                for size, (_, p) in zip((5.0, 3.0, 1.0, 0.9), params, strict=True):
                    p.grad = torch.tensor([size * norm])
                optimizer.step()
        return [str(warning.message) for warning in caught]

    def test_are_named_if_the_step_is_clipped(self):
        (message,) = self.message()
        assert "at step 200" in message
        assert "); largest in this step: a 70%, b 25%, c 3%. Or they have risen" in message

    def test_are_those_of_the_group(self):
        groups = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(2)]} for _ in range(2)]
        clipper, first, second = ZClip(scope="group"), noise(200), noise(60) + noise(140, level=40.0)
        with pytest.warns(ZClipWarning, match="in param group 1 were clipped") as caught:
            for norms in zip(first, second, strict=True):
                for group, norm in zip(groups, norms, strict=True):
                    for size, p in zip((1.0, 3.0), group["params"], strict=True):
                        p.grad = torch.tensor([size * norm])
                clipper.step(groups)
        expected = "; largest in this step: param_groups[1]['params'][1] 90%, param_groups[1]['params'][0] 10%. Or"
        assert expected in str(caught[0].message)

    def test_are_to_be_asked_for_if_the_step_is_not_clipped(self):
        (message,) = self.message(last=1.0)
        assert "; norms_by_parameter() after a clipped step names the parameters with the largest norms. Or" in message

    def test_are_to_be_asked_for_on_an_accelerator(self, monkeypatch):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        p = nn.Parameter(torch.zeros(30))
        optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.0))
        for norm in noise(60) + noise(140, level=40.0):
            set_gradients([p], norm)
            optimizer.step()
        with pytest.warns(ZClipWarning, match=r"; norms_by_parameter\(\) after a clipped step names"):
            assert optimizer.metrics.clipped

    def test_are_to_be_asked_for_where_only_a_norm_is_reported(self):
        clipper = ZClip()
        with pytest.warns(ZClipWarning, match=r"; norms_by_parameter\(\) after a clipped step names"):
            for norm in noise(60) + noise(140, level=40.0):
                clipper.decide(norm)
        assert clipper.metrics.clipped

    def test_are_measured_once_and_only_for_the_warning(self, monkeypatch):
        asked, norms_here = [], zclip_optim.gradients.Gradients.norms_here
        monkeypatch.setattr(
            zclip_optim.gradients.Gradients, "norms_here", lambda *args: asked.append(1) or norms_here(*args)
        )
        assert len(self.message()) == 1
        assert len(asked) == 1
        messages(noise(1000))
        messages([norm * (10.0 if i % 5 == 4 and i > 200 else 1.0) for i, norm in enumerate(noise(900))], z_thresh=5.0)
        assert len(asked) == 1


def test_a_streak_longer_than_patience():
    message, *_ = messages(noise(60) + noise(50, level=40.0), patience=25)
    assert message.startswith(
        "more than patience=25 spikes in a row, at step 86: until a step is none, mean and std, now"
    )
    assert "rise twofold in 1,000 steps, and gradients are still clipped" in message
    assert "lower the learning rate" in message
    assert messages(noise(60) + [40.0] * 25 + noise(60), patience=25) == []


def test_without_patience_many_clipped_steps_tell_what_it_is_for():
    (message,) = messages(noise(60) + noise(140, level=40.0))
    assert "clipped, at step 200" in message
    assert "patience=200 lets the statistics follow slowly" in message
    assert all("patience=200" not in text for text in messages(noise(60) + noise(140, level=40.0), patience=25))


def test_a_start_that_blinds_the_test_is_warned_of_once_and_names_what_mends_it():
    norms = noise(300)
    norms[5] = 1e4
    (message,) = messages(norms)
    assert "norms of the warm-up differ by more than their mean (mean 401, std 1959)" in message
    assert "lookback=0.1" in message
    assert messages(norms, lookback=0.1) == []


def test_a_warm_up_of_equal_norms_which_were_clipped_before():
    (message,) = messages([1.0] * 30)
    assert message.startswith("all 25 gradient norms of the warm-up were 1: probably they were clipped before")
    assert "max_grad_norm" in message
    assert messages([1.0, 1.0], warmup_steps=1) == []
    assert messages([1.0] * 24 + [1.01] * 10) == []


@pytest.mark.parametrize("max_norm", [1.0, 0.3])
def test_clip_grad_norm_in_front_is_noticed(max_norm):
    p, clipper = nn.Parameter(torch.zeros(30)), ZClip()
    with pytest.warns(ZClipWarning, match="clipped before they got here"):
        for norm in noise(25, spread=0.3, level=3.0):
            set_gradients([p], norm)
            torch.nn.utils.clip_grad_norm_([p], max_norm)
            clipper.step([p])


def test_half_way_to_the_limit_of_nonfinite_steps():
    nan = float("nan")
    (message,) = messages([1.0] + [nan] * 13 + [1.0] + [nan] * 20)
    assert "for 13 steps in a row" in message
    assert "max_consecutive_nonfinite=25" in message
    assert messages([nan] * 30, max_consecutive_nonfinite=None) == []
    assert messages([nan] * 30, nonfinite="pass") == []


def test_each_kind_once_per_run():
    shifts = [norm for k in range(4) for norm in noise(120, level=30.0**k)]
    said = messages(shifts, patience=25)
    assert len([message for message in said if "spikes in a row" in message]) == 1


def test_a_warning_points_at_the_line_of_the_user():
    p, clipper = nn.Parameter(torch.zeros(3)), ZClip(warmup_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            p.grad = torch.ones(3)
            clipper.step([p])
    assert caught[0].filename == __file__


def test_groups_are_named():
    groups = [{"params": [nn.Parameter(torch.zeros(30))]} for _ in range(2)]
    clipper = ZClip(scope="group")
    with pytest.warns(ZClipWarning, match="of the warm-up in param group 1 were 7"):
        for norm in noise(25):
            set_gradients(groups[0]["params"], norm)
            set_gradients(groups[1]["params"], 7.0)
            clipper.step(groups)


def test_a_resumed_run_does_not_judge_a_window_that_it_did_not_see():
    first, second = ZClip(), ZClip()
    messages(noise(150), first)
    second.load_state_dict(first.state_dict())
    assert messages([norm * (10.0 if i % 2 else 1.0) for i, norm in enumerate(noise(60))], second) == []


class TestNoGradients:
    """What people do to a model after its optimizer was made."""

    def make(self, **options):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        return model, ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), **options)

    def run(self, model, optimizer, steps, then=lambda: None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(steps):
                optimizer.zero_grad()
                model(torch.full((1, 3), 1.0 + 0.1 * (i % 3))).square().sum().backward()
                then()
                optimizer.step()
        return [str(warning.message) for warning in caught]

    def replaced(self, model):
        for layer in model:
            layer.weight, layer.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())

    def emptied(self, model):
        model.to("meta").to_empty(device="cpu")
        torch.nn.init.ones_(model[0].weight)

    def grown(self, model):
        model[0], model[1] = nn.Linear(3, 8), nn.Linear(8, 1)

    def frozen(self, model):
        model.requires_grad_(False)
        model.append(nn.Linear(1, 1))  # an adapter

    @pytest.mark.parametrize("how", ["replaced", "emptied", "grown", "frozen"])
    def test_parameters_that_are_not_trained_any_more(self, how):
        model, optimizer = self.make()
        self.run(model, optimizer, 5)
        optimizer.zero_grad()
        getattr(self, how)(model)
        assert self.run(model, optimizer, 19) == []
        (message,) = self.run(model, optimizer, 1000)
        assert "no parameter of this optimizer had a gradient at the last 20 steps" in message
        for cause in ("PEFT", "to_empty", "LOMO", "None before step()", "make and wrap it after that"):
            assert cause in message

    def test_gradients_that_are_used_up_within_backward(self):
        model, optimizer = self.make()
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        (message,) = self.run(model, optimizer, 30)
        assert "at the last 20 steps" in message

    def test_a_single_gradient_is_enough_and_starts_the_count_again(self):
        model, optimizer = self.make()
        for _ in range(3):
            assert self.run(model, optimizer, 19, optimizer.zero_grad) == []
            assert self.run(model, optimizer, 1, lambda: setattr(model[0].weight, "grad", None)) == []

    def test_gradients_of_zero_are_gradients(self):
        model, optimizer = self.make()
        assert self.run(model, optimizer, 50, lambda: optimizer.zero_grad(set_to_none=False)) == []

    def test_each_evaluation_of_a_closure_is_not_a_step(self):
        p = nn.Parameter(torch.ones(3))
        optimizer = ZClipOptimizer(torch.optim.LBFGS([p], max_iter=30))
        optimizer.step(lambda: p.sum())
        assert optimizer.clipper._health.missing == 1

    def test_it_is_in_no_checkpoint(self):
        model, optimizer = self.make()
        self.run(model, optimizer, 15, optimizer.zero_grad)
        optimizer.load_state_dict(optimizer.state_dict())
        assert self.run(model, optimizer, 15, optimizer.zero_grad) == []
        assert len(self.run(model, optimizer, 5, optimizer.zero_grad)) == 1

    def test_the_engine_alone_says_it_too(self):
        clipper, p = ZClip(), nn.Parameter(torch.ones(3))
        with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient"):
            for _ in range(20):
                clipper.step([p])


@pytest.mark.parametrize("restart", ["load_state_dict", "of the engine"])
def test_another_run_begins_with_a_load_and_every_warning_can_come_again(restart):
    """As after an LR finder, which trains, then puts everything back."""
    clipper, p = ZClip(patience=25), nn.Parameter(torch.zeros(30))
    optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.0), patience=25)
    clipper = optimizer.clipper
    holder = optimizer if restart == "load_state_dict" else clipper
    before = holder.state_dict()
    run = noise(60) + noise(50, level=40.0)
    assert len([m for m in messages(run, clipper) if "spikes in a row" in m]) == 1
    holder.load_state_dict(before)
    assert len([m for m in messages(run, clipper) if "spikes in a row" in m]) == 1
    assert [m for m in messages(noise(120, level=900.0), clipper) if "spikes in a row" in m] == []


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_clipping_in_front_that_binds_now_and_then_is_noticed(share):
    """Most people clip at 1.0 without a second thought; then no norm is ever larger, and no spike is seen."""
    norms = sorted(noise(400, spread=0.3, level=3.0))
    maximum = norms[int((1 - share) * len(norms))]
    p, clipper = nn.Parameter(torch.zeros(30)), ZClip()
    rng = random.Random(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in rng.sample(norms, len(norms)):
            set_gradients([p], norm)
            torch.nn.utils.clip_grad_norm_([p], maximum)
            clipper.step([p])
    (message,) = [str(warning.message) for warning in caught]
    assert f"of the last 200 gradient norms were {maximum:.4g}, and none was larger: probably they were" in message
    assert "clipped before they got here" in message


def test_a_norm_that_is_often_the_same_but_not_the_largest_is_none():
    norms = noise(800, spread=0.2)
    norms[::2] = [1.0] * 400
    assert messages(norms) == []


def test_without_norms_there_is_nothing_to_be_equal():
    assert messages([1.0, 1.1, *[0.0] * 500, *noise(300)]) == []
    assert messages([*noise(100), *[math.inf, math.nan] * 150, *noise(300)], nonfinite="pass") == []


class TestOneClipperForTwoNetworks:
    """Their norms are of two kinds, and a spike of one is none among those of the other."""

    def take(self, steps, clipper=None):
        """The warnings of this kind in steps, each with what `ZClip.step` is given."""
        clipper = clipper or ZClip()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for given in steps:
                clipper.step(given() if callable(given) and not isinstance(given, nn.Module) else given)
        return [str(warning.message) for warning in caught if "in turn" in str(warning.message)]

    def network(self, layers=3):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
        for p in model.parameters():
            p.grad = torch.rand_like(p) + 0.5
        return model

    @pytest.mark.parametrize("turns", ["gd", "dg", "dddddg", "gggd", "gdc", "g" * 7 + "d" * 7])
    @pytest.mark.parametrize("give", [lambda model: model, lambda model: list(model.parameters())])
    def test_is_warned_of_once_and_soon(self, turns, give):
        networks = {name: self.network() for name in "gdc"}
        (message,) = self.take([give(networks[name]) for name in turns] * 60)
        assert "Make a ZClip for each of them" in message
        steps = [give(networks[name]) for name in turns]
        assert self.take((steps * 60)[: max(24, 4 * len(steps))])

    def test_as_param_groups_of_two_optimizers(self):
        first, second = (torch.optim.SGD(self.network().parameters()) for _ in range(2))
        assert len(self.take([first.param_groups, second.param_groups] * 15)) == 1

    def test_again_after_a_checkpoint(self):
        clipper, networks = ZClip(), [self.network(), self.network()]
        assert len(self.take(networks * 30, clipper)) == 1
        clipper.load_state_dict(clipper.state_dict())
        assert len(self.take(networks * 30, clipper)) == 1

    def test_a_copy_looks_for_itself(self):
        clipper, networks = ZClip(), [self.network(), self.network()]
        self.take(networks * 2, clipper)
        for twin in (copy.deepcopy(clipper), pickle.loads(pickle.dumps(clipper))):
            assert len(self.take(networks * 30, twin)) == 1

    def check_silent(self, steps, clipper=None):
        assert self.take(steps, clipper) == []

    def test_not_one_network_in_another_order(self):
        params = list(self.network().parameters())
        rng = random.Random(0)
        self.check_silent([rng.sample(params, len(params)) for _ in range(100)])
        self.check_silent([params, params[::-1]] * 50)

    def test_not_micro_batches(self):
        model = self.network()
        self.check_silent([model] * 100)

    def test_not_layers_that_are_frozen_and_unfrozen(self):
        model = self.network(6)
        params = list(model.parameters())
        self.check_silent([params[(step // 10) % 12 :] for step in range(300)])  # one more every ten steps, then all
        self.check_silent([params[11 - (step // 10) % 12 :] for step in range(300)])
        self.check_silent([params, params[4:]] * 50)  # which has norms of two kinds too, but is one network

    def test_not_layers_that_are_added(self):
        models = [self.network() for _ in range(5)]
        self.check_silent([[p for m in models[-1 - step // 20 :] for p in m.parameters()] for step in range(100)])

    def test_not_networks_one_after_the_other(self):
        self.check_silent([model for model in [self.network() for _ in range(40)] for _ in range(3)])

    def test_not_blocks_of_a_network_by_turns_that_last(self):
        blocks = [list(block.parameters()) for block in self.network(4)]
        self.check_silent([blocks[(step // 50) % 4] for step in range(1200)])

    def test_not_parameters_that_are_replaced(self):
        model = self.network()

        def replaced():
            for module in model:
                for name, p in list(module.named_parameters()):
                    new = nn.Parameter(p.detach().clone())
                    new.grad = p.grad
                    setattr(module, name, new)
            return model

        self.check_silent([replaced, model, model] * 40)

    def test_costs_no_work_per_parameter(self):
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)

        class Groups(list):
            def __iter__(self):
                raise AssertionError("looked at every parameter")

        health = Health(ZClip().config, ZClip()._records.state.read())
        for _ in range(50):
            health.check_given([p], [{"params": Groups([p])}])

    def test_keeps_no_network_alive(self):
        clipper, model = ZClip(), self.network()
        clipper.step(model)
        p = weakref.ref(model[0].weight)
        del model
        gc.collect()
        assert p() is None


def test_a_norm_whose_square_overflows_is_not_the_largest_of_a_window():
    clipper, p = ZClip(), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.warns(ZClipWarning, match="and none was larger: probably they were clipped before"):
        for step, norm in enumerate(noise(300, spread=0.3)):
            set_gradients([p], 1e170 if step == 250 else min(norm, 1.1))
            clipper.step([p])
            if step == 225:
                clipper._health.restart(clipper._records.state.read())
        for norm in noise(300, spread=0.3):
            set_gradients([p], min(norm, 1.1))
            clipper.step([p])
