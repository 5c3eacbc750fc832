"""Several optimizers in one wrapper: one norm, one decision, one state dict."""

import copy
import io
import math
import pickle
import re

import pytest
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import backward, make_batch, parameters, set_gradients, train
from versions import Muon

import zclip_optim.gradients
from zclip_optim import ZClip, ZClipOptimizer, ZClipWarning

OUTLIERS = (30, 45)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


def others(model):
    return [p for p in model.parameters() if p.ndim != 2]


def muon_and_adamw(model):
    return [Muon(matrices(model), lr=0.02), torch.optim.AdamW(others(model), lr=1e-2)]


def sgd_and_adamw(model, **options):
    return [
        torch.optim.SGD(matrices(model), lr=1e-2, **options),
        torch.optim.AdamW(others(model), lr=1e-2, **options),
    ]


def make(make_parts=muon_and_adamw, seed=0, **options):
    model = make_model(seed)
    return model, ZClipOptimizer(make_parts(model), **options)


def trained(steps, make_parts=muon_and_adamw, **options):
    model, optimizer = make(make_parts, **options)
    train(model, optimizer, range(steps), OUTLIERS)
    return model, optimizer


def assert_goes_on_like(model, optimizer, make_parts=muon_and_adamw):
    """It has done 35 steps."""
    whole, reference = trained(60, make_parts)
    train(model, optimizer, range(35, 60), OUTLIERS)
    assert torch.equal(parameters(model), parameters(whole))
    assert optimizer.metrics == reference.metrics
    assert optimizer.metrics.clipped_steps > 0


class TestOneNorm:
    def test_it_is_that_of_all_gradients(self):
        model, optimizer = make()
        alone = [ZClipOptimizer(part) for part in muon_and_adamw(model)]
        backward(model, 0)
        for one in alone:
            one.step()
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(math.hypot(*(one.metrics.grad_norm for one in alone)))

    @pytest.mark.parametrize("make_parts", [muon_and_adamw, sgd_and_adamw])
    def test_it_is_the_engine_and_then_a_step_of_each_bit_for_bit(self, make_parts):
        model, optimizer = trained(60, make_parts)
        by_hand, clipper = make_model(), ZClip()
        parts = make_parts(by_hand)
        for step in range(60):
            backward(by_hand, step, step in OUTLIERS)
            clipper.step([group for part in parts for group in part.param_groups])
            for part in parts:
                part.step()
        assert torch.equal(parameters(model), parameters(by_hand))
        assert optimizer.metrics == clipper.metrics
        assert optimizer.metrics.clipped_steps > 0

    def test_a_skip_skips_all(self):
        model, optimizer = make()
        train(model, optimizer, range(3))
        start = parameters(model)
        backward(model, 3)
        model[0].bias.grad[0] = math.nan
        optimizer.step()
        assert optimizer.step_was_skipped
        assert torch.equal(parameters(model), start)

    def test_a_group_of_one_of_them_can_be_left_alone(self):
        model, optimizer = make()
        optimizer.parts[0].param_groups[0]["zclip"] = False
        backward(model, 0)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in others(model)))
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(norm)

    def test_with_a_scope_per_group(self):
        model, optimizer = make(scope="group")
        backward(model, 0)
        optimizer.step()
        assert [m.step for m in optimizer.group_metrics] == [1, 1]

    @pytest.mark.parametrize("norm", [1e6, math.nan])
    def test_fused_parts_scale_and_skip_in_their_kernels(self, monkeypatch, norm):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        model, optimizer = make(lambda model: sgd_and_adamw(model, fused=True), max_grad_norm=1.0)
        train(model, optimizer, range(3))
        start = parameters(model)
        set_gradients(model.parameters(), norm)
        before, told = [p.grad.clone() for p in model.parameters()], []

        def look(part, *_):
            assert part.grad_scale.item() == (1.0 if math.isnan(norm) else pytest.approx(norm))
            assert part.found_inf.item() == math.isnan(norm)
            for p, gradient in zip(model.parameters(), before, strict=True):
                told.append(torch.allclose(p.grad, gradient, rtol=0, atol=0, equal_nan=True))

        optimizer.parts[0].register_step_pre_hook(look)
        optimizer.step()
        assert len(told) == len(before)
        assert all(told)
        assert torch.equal(parameters(model), start) == math.isnan(norm)
        assert optimizer.step_was_skipped == math.isnan(norm)
        assert not any(hasattr(part, name) for part in optimizer.parts for name in ("grad_scale", "found_inf"))

    def test_with_one_part_that_is_not_fused_all_are_scaled_first(self, monkeypatch):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        model, optimizer = make(max_grad_norm=1e-6)
        set_gradients(model.parameters(), 1e3)
        optimizer.step()
        assert math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())) == pytest.approx(1e-6)


class TestAsOneOptimizer:
    def test_the_groups_are_those_of_all(self):
        _, optimizer = make()
        muon, adamw = optimizer.parts
        assert [id(g) for g in optimizer.param_groups] == [id(g) for g in muon.param_groups + adamw.param_groups]
        optimizer.param_groups[1]["lr"] = 7.0
        assert adamw.param_groups[0]["lr"] == 7.0

    def test_a_single_optimizer_is_a_list_of_one(self):
        inner = torch.optim.SGD(make_model().parameters())
        assert ZClipOptimizer(inner).parts == (inner,)
        assert ZClipOptimizer([inner]).parts == (inner,)

    @pytest.mark.parametrize("given", [lambda optimizer: optimizer, lambda optimizer: [optimizer]])
    def test_one_that_is_added_later_is_not_lost_in_silence(self, given):
        optimizer = ZClipOptimizer(given(torch.optim.SGD(make_model().parameters())))
        with pytest.raises(AttributeError, match="append"):
            optimizer.parts.append(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
        with pytest.raises(AttributeError, match="parts"):
            optimizer.parts = [*optimizer.parts, torch.optim.SGD([nn.Parameter(torch.ones(1))])]

    def test_schedulers(self):
        _, optimizer = make()
        scheduler = LambdaLR(optimizer, [lambda step: 1 / (step + 1), lambda step: 1.0])
        optimizer.step()
        scheduler.step()
        assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.01, 1e-2]

    def test_one_cycle_moves_the_rate_of_each(self):
        model, optimizer = make()
        scheduler = OneCycleLR(optimizer, max_lr=[0.1, 0.3], total_steps=10, cycle_momentum=False)
        for step in range(9):
            train(model, optimizer, [step])
            scheduler.step()
            if step == 2:
                assert scheduler.get_last_lr() == pytest.approx([0.1, 0.3], rel=0.2)
        assert [part.param_groups[0]["lr"] for part in optimizer.parts] == pytest.approx([4e-7, 1.2e-6])

    def test_one_cycle_says_that_momentum_is_not_common_to_them(self):
        with pytest.raises(ValueError, match="momentum or beta1"):
            OneCycleLR(make()[1], max_lr=0.1, total_steps=10)

    def test_defaults_are_what_they_have_in_common(self):
        defaults = make()[1].defaults
        assert {"lr", "weight_decay"} <= defaults.keys()
        assert not {"momentum", "betas"} & defaults.keys()

    def test_a_closure_is_evaluated_once_for_all(self):
        model, optimizer = make()
        by_hand, reference = make()
        calls = []
        for step in range(40):
            loss = optimizer.step(lambda step=step: calls.append(step) or backward(model, step, step in OUTLIERS))
            assert torch.equal(loss, backward(by_hand, step, step in OUTLIERS))
            reference.step()
        assert calls == list(range(40))
        assert torch.equal(parameters(model), parameters(by_hand))
        assert optimizer.metrics == reference.metrics
        assert optimizer.metrics.clipped_steps > 0

    def test_a_closure_that_ends_in_nan_steps_none(self):
        model, optimizer = make()
        start = parameters(model)

        def closure():
            loss = backward(model, 0)
            model[0].bias.grad[0] = math.nan
            return loss

        assert torch.isfinite(optimizer.step(closure))
        assert torch.equal(parameters(model), start)

    def test_hooks_fire_once_per_part_and_ours_once(self):
        model, optimizer = make()
        fired = []
        for part in optimizer.parts:
            part.register_step_post_hook(lambda part, args, kwargs: fired.append(type(part).__name__))
        optimizer.register_step_post_hook(lambda part, args, kwargs: fired.append(type(part).__name__))
        handle = register_optimizer_step_post_hook(lambda *_: fired.append("global"))
        train(model, optimizer, [0])
        handle.remove()
        assert sorted(fired) == ["AdamW", "Muon", "ZClipOptimizer", "global", "global"]

    def test_state_is_that_of_the_part_that_holds_the_parameter(self):
        model, optimizer = trained(2)
        muon, adamw = optimizer.parts
        weight, bias = model[0].weight, model[0].bias
        assert optimizer.state[weight] is muon.state[weight]
        assert optimizer.state[bias] is adamw.state[bias]
        assert len(optimizer.state) == len(list(optimizer.state)) == 6
        assert torch.ones(1) not in optimizer.state
        entry = optimizer.state.pop(bias)
        assert bias not in optimizer.state
        assert bias not in adamw.state
        optimizer.state[bias] = entry
        assert adamw.state[bias] is entry
        with pytest.raises(KeyError):
            optimizer.state[torch.ones(1)]
        optimizer.state = dict(optimizer.state)
        assert (len(muon.state), len(adamw.state)) == (3, 3)

    def test_groups_that_are_assigned_are_shared_out(self):
        _, optimizer = make()
        groups = [dict(group) for group in optimizer.param_groups]
        optimizer.param_groups = groups
        assert [part.param_groups[0] for part in optimizer.parts] == groups
        with pytest.raises(ValueError, match=re.escape("3 param groups for optimizers that have [1, 1]")):
            optimizer.param_groups = [*groups, groups[0]]

    def test_zero_grad_reaches_all(self):
        model, optimizer = make()
        backward(model, 0)
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad.eq(0).all() for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_train_and_eval_reach_schedulefree(self):
        def parts(model):
            return [torch.optim.SGD(matrices(model)), schedulefree.AdamWScheduleFree(others(model))]

        _, optimizer = make(parts)
        optimizer.train()
        assert optimizer.parts[1].param_groups[0]["train_mode"]
        optimizer.eval()
        assert not optimizer.parts[1].param_groups[0]["train_mode"]
        assert not hasattr(make()[1], "train")

    def test_repr_shows_each(self):
        assert re.findall(r"^(\w+) ?\(", repr(make()[1]), re.MULTILINE) == ["ZClipOptimizer", "ZClip", "Muon", "AdamW"]

    def test_grad_scaler(self):
        model, optimizer = make(lambda model: sgd_and_adamw(model, fused=True))
        by_hand, reference = make(lambda model: sgd_and_adamw(model, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for step in range(40):
            x, y = make_batch(step, step in OUTLIERS)
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if step == 7:
                model[0].bias.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if step != 7:
                train(by_hand, reference, [step], OUTLIERS)
        assert torch.allclose(parameters(model), parameters(by_hand), rtol=1e-5, atol=1e-6)
        assert optimizer.metrics.step == reference.metrics.step == 39
        assert optimizer.metrics.clipped_steps == reference.metrics.clipped_steps > 0


def around_lookahead(model):
    """The first one nests its state dict."""
    import pytorch_optimizer

    inner = torch.optim.SGD(matrices(model), lr=1e-2)
    return [pytorch_optimizer.Lookahead(inner, k=2), torch.optim.AdamW(others(model), lr=1e-2)]


class Container:
    """A part that saves nothing of its groups."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self):
        self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return {"momenta": [entry["momentum_buffer"] for entry in self.inner.state.values()]}

    def load_state_dict(self, state_dict):
        params = self.inner.param_groups[0]["params"]
        for p, momentum in zip(params, state_dict["momenta"], strict=True):
            self.inner.state[p]["momentum_buffer"] = momentum.clone()


def around_container(model):
    sgd = torch.optim.SGD(matrices(model), lr=1e-2, momentum=0.9)
    return [Container(sgd), torch.optim.AdamW(others(model), lr=1e-2)]


class TestSaved:
    @pytest.mark.parametrize("make_parts", [muon_and_adamw, sgd_and_adamw, around_lookahead, around_container])
    def test_torch_save_resumes(self, make_parts):
        model, optimizer = trained(35, make_parts)
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        model, optimizer = make(make_parts, seed=1)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert optimizer.metrics.step == 35
        assert_goes_on_like(model, optimizer, make_parts)

    def test_it_has_the_form_of_a_single_optimizer(self):
        _, optimizer = trained(2)
        saved = optimizer.state_dict()
        assert saved.keys() == {"state", "param_groups"}
        assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
        assert ["momentum_buffer" in saved["state"][i] for i in range(6)] == [True] * 3 + [False] * 3

    @pytest.mark.parametrize(
        "options",
        [
            StateDictOptions(),
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(full_state_dict=True, cpu_offload=True),
        ],
        ids=["nested", "flat", "full"],
    )
    @pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed.*:FutureWarning")
    def test_dcp_resumes(self, options, tmp_path):
        model, optimizer = trained(35)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        dcp.save(states, checkpoint_id=tmp_path)
        model, optimizer = make(seed=1)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
        dcp.load(states, checkpoint_id=tmp_path)
        set_state_dict(
            model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
        )
        assert_goes_on_like(model, optimizer)

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_goes_on(self, copier):
        model, optimizer = copier(trained(35))
        assert_goes_on_like(model, optimizer)

    def test_those_of_the_bare_parts_are_theirs_to_load(self):
        model = make_model()
        parts = muon_and_adamw(model)
        backward(model, 0)
        for part in parts:
            part.step()
        optimizer = ZClipOptimizer(muon_and_adamw(model))
        for part, bare in zip(optimizer.parts, parts, strict=True):
            part.load_state_dict(bare.state_dict())
        optimizer.step()
        assert optimizer.metrics.step == 1
        assert len(optimizer.state) == 6

    def test_what_does_not_fit_changes_nothing(self):
        _, optimizer = trained(2)
        before = copy.deepcopy(optimizer.state_dict())
        one = ZClipOptimizer(torch.optim.AdamW(make_model().parameters())).state_dict()
        with pytest.raises(ValueError, match=re.escape("1 param groups for optimizers that have [1, 1]")):
            optimizer.load_state_dict(one)
        fewer = make()[1].state_dict()
        fewer["param_groups"][1]["params"].pop()
        with pytest.raises(ValueError, match="a param group of the state dict has 2 parameters, the one here 3"):
            optimizer.load_state_dict(fewer)
        nested = make(around_lookahead)[1].state_dict()
        nested["parts"].pop()
        with pytest.raises(ValueError, match="of 1 optimizers, this is a list of 2"):
            optimizer.load_state_dict(nested)
        assert repr(optimizer.state_dict()) == repr(before)

    def test_nor_does_what_does_not_fit_the_last_part_change_the_first(self):
        """Where each part loads its own form."""
        _, optimizer = trained(2, around_lookahead)
        before = copy.deepcopy(optimizer.state_dict())
        for change, says in (
            (lambda groups: groups[0]["params"].pop(), "has 2 parameters, the one here 3"),
            (lambda groups: groups.append(groups[0]), "has 2 param groups, the one here 1"),
        ):
            saved = copy.deepcopy(before)
            saved["parts"][0]["base_optimizer"]["param_groups"][0]["lr"] = 7.0
            change(saved["parts"][1]["param_groups"])
            with pytest.raises(ValueError, match=says):
                optimizer.load_state_dict(saved)
            assert repr(optimizer.state_dict()) == repr(before)


class TestRefused:
    def test_an_empty_list(self):
        with pytest.raises(ValueError, match="got an empty list"):
            ZClipOptimizer([])

    def test_a_parameter_of_two(self):
        params = matrices(make_model())
        parts = [Muon(params), torch.optim.AdamW(params[-1:])]
        with pytest.raises(ValueError, match=re.escape("Muon and AdamW hold the same parameter, of shape (1, 16)")):
            ZClipOptimizer(parts)

    def test_a_wrapped_one(self):
        muon, adamw = muon_and_adamw(make_model())
        with pytest.raises(TypeError, match="a ZClipOptimizer already"):
            ZClipOptimizer([ZClipOptimizer(muon), adamw])

    def test_a_class(self):
        with pytest.raises(TypeError, match="got the class SGD"):
            ZClipOptimizer([torch.optim.SGD])

    def test_one_that_needs_a_closure(self):
        model = make_model()
        with pytest.raises(TypeError, match="LBFGS cannot be one of several optimizers"):
            ZClipOptimizer([torch.optim.LBFGS(matrices(model)), torch.optim.AdamW(others(model))])

    def test_a_group_for_nobody(self):
        with pytest.raises(TypeError, match=re.escape("optimizer.parts[i]")):
            make()[1].add_param_group({"params": [nn.Parameter(torch.ones(2))]})

    def test_a_name_that_only_a_part_has(self):
        with pytest.raises(AttributeError, match=re.escape("see optimizer.parts")):
            make()[1].consolidate_state_dict()


def test_a_group_that_was_added_to_a_part_is_clipped_and_saved():
    model, optimizer = make(max_grad_norm=1e-6)
    extra = nn.Parameter(torch.ones(2))
    optimizer.parts[1].add_param_group({"params": [extra]})
    backward(model, 0)
    extra.grad = torch.ones(2)
    optimizer.step()
    assert extra.grad.norm() < 1e-6
    assert [group["zclip_step"] for group in optimizer.state_dict()["param_groups"]] == [1, 1, 1]


def test_no_gradients_are_warned_of():
    _, optimizer = make()
    with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient"):
        for _ in range(20):
            optimizer.step()
