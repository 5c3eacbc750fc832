"""The wrapper's contract with torch: each test says what breaks for users if it fails."""

import copy
import math
import pickle
import warnings

import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn
from training import backward, make_batch, make_model, parameters, set_gradients, train

from zclip_optim import NonFiniteGradientError, ZClipOptimizer, ZClipWarning
from zclip_optim.algorithm import ZClipConfig
from zclip_optim.chain import Chain
from zclip_optim.evaluations import STAY_PUT

HOOK_DICTS = [
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
]


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def wrapped(model, **options):
    return ZClipOptimizer(adamw(model), **options)


class Extragradient(torch.optim.SGD):
    """Steps from where it is with the gradient of where that step leads to (Korpelevich, 1976)."""

    def step(self, closure):
        loss = closure()
        start = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step()
        closure()
        with torch.no_grad():
            for p, value in zip(self.param_groups[0]["params"], start, strict=True):
                p.copy_(value)
        super().step()
        return loss


class TestStep:
    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
    def test_unclipped_run_is_bit_identical_to_the_bare_optimizer(self, options):
        bare, ours = make_model(), make_model()
        train(bare, adamw(bare, **options), range(60))
        optimizer = ZClipOptimizer(adamw(ours, **options), z_thresh=1e9)
        train(ours, optimizer, range(60))
        assert torch.equal(parameters(ours), parameters(bare))
        assert optimizer.metrics.step == 60

    def test_outliers_are_clipped(self):
        bare, ours = make_model(), make_model()
        train(bare, torch.optim.SGD(bare.parameters(), lr=0.01), range(60), outliers=[50])
        optimizer = ZClipOptimizer(torch.optim.SGD(ours.parameters(), lr=0.01))
        train(ours, optimizer, range(50))
        before = parameters(ours)
        train(ours, optimizer, [50], outliers=[50])
        metrics = optimizer.metrics
        assert metrics.clipped
        assert metrics.clip_coef < 0.2
        torch.testing.assert_close(
            (parameters(ours) - before).norm().item(), 0.01 * metrics.clipped_norm, rtol=1e-4, atol=0
        )

    def test_parameters_and_groups_are_read_at_every_step(self):
        model = make_model()
        optimizer = wrapped(model)
        train(model, optimizer, [0])
        swapped = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        optimizer.param_groups[0]["params"] = swapped
        set_gradients(swapped, 3.0)
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(3.0)

    def test_a_group_swapped_by_the_base_optimizer_is_the_one_that_is_clipped(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=0.5)
        train(model, optimizer, [0])
        p = nn.Parameter(torch.zeros(4))
        optimizer.base_optimizer.param_groups = [{**optimizer.param_groups[0], "params": [p]}]
        set_gradients([p], 3.0)
        optimizer.step()
        assert p.detach().norm().item() == pytest.approx(0.5)

    def test_zero_gradients_still_step(self):
        model = make_model()
        optimizer = wrapped(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert len(optimizer.state) == 4  # a checkpoint library initialises the state this way
        assert optimizer.metrics.step == 0

    def test_nonfinite_step_is_skipped_and_leaves_no_trace(self):
        clean, ours = make_model(), make_model()
        train(clean, wrapped(clean), range(40))
        optimizer = wrapped(ours)
        train(ours, optimizer, range(20))
        backward(ours, 0)
        ours[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        assert optimizer.step_was_skipped
        assert math.isnan(ours[0].weight.grad[0, 0])
        train(ours, optimizer, range(20, 40))
        assert not optimizer.step_was_skipped
        assert torch.equal(parameters(ours), parameters(clean))
        assert optimizer.metrics.skipped_steps == 1

    def test_nonfinite_raise_names_the_parameter(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), nonfinite="raise")
        backward(model, 0)
        model[2].weight.grad[0, 3] = math.inf
        before = parameters(model)
        with pytest.raises(NonFiniteGradientError, match=r"2\.weight \(1, 16\)"):
            optimizer.step()
        assert torch.equal(parameters(model), before)

    def test_nonfinite_pass_steps(self):
        model = make_model()
        optimizer = wrapped(model, nonfinite="pass")
        backward(model, 0)
        model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        assert parameters(model).isnan().any()
        assert not optimizer.step_was_skipped

    def test_the_inner_step_gets_no_argument_without_a_closure(self):
        class TakesNone(torch.optim.SGD):
            def step(self):
                self.stepped = True

        inner = TakesNone(make_model().parameters(), lr=0.1)
        ZClipOptimizer(inner).step()
        assert inner.stepped

    def test_returns_what_the_inner_step_returns(self):
        class Returns(torch.optim.SGD):
            def step(self, closure=None):
                return "something" if closure is None else (closure(), "more")

        model = make_model()
        optimizer = ZClipOptimizer(Returns(model.parameters(), lr=0.1))
        assert optimizer.step() == "something"
        assert optimizer.step(lambda: 3.0) == (3.0, "more")

    def test_scope_group(self):
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
        optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.01), scope="group")
        train(model, optimizer, range(30))
        assert len(optimizer.group_metrics) == 2
        assert optimizer.group_metrics[0].mean != optimizer.group_metrics[1].mean


class TestClosure:
    def closure(self, model, optimizer, step=0):
        x, y = make_batch(step)

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return closure

    def test_returns_the_loss_and_counts_one_step(self):
        model = make_model()
        optimizer = wrapped(model)
        with torch.no_grad():
            loss = optimizer.step(self.closure(model, optimizer))
        assert loss.item() > 0
        assert optimizer.metrics.step == 1

    def test_lbfgs_clips_each_evaluation_and_counts_one_step(self):
        class Recording(torch.optim.LBFGS):
            def step(self, closure):
                def recorded():
                    loss = closure()
                    norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
                    return loss

                return super().step(recorded)

        model, norms = make_model(), []
        optimizer = ZClipOptimizer(Recording(model.parameters(), max_iter=5), max_grad_norm=1e-3)
        optimizer.step(self.closure(model, optimizer))
        assert len(norms) > 1
        assert max(norms) == pytest.approx(1e-3, rel=1e-4)
        assert optimizer.metrics.step == 1

    def test_a_closure_that_writes_to_parameters_is_not_taken_for_the_optimizer(self):
        p = nn.Parameter(torch.ones(3))
        optimizer = ZClipOptimizer(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5))

        def closure():
            with torch.no_grad():
                p.clamp_(max=1.0)
            p.grad = torch.full_like(p, math.nan)
            return torch.tensor(0.0)

        optimizer.step(closure)
        assert optimizer.step_was_skipped
        assert torch.equal(p, torch.ones(3))
        assert not optimizer.state

    def test_the_closure_runs_with_grad_enabled_also_where_the_inner_optimizer_does_not_see_to_it(self):
        class NoGrad(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure=None):
                return closure()

        model = make_model()
        optimizer = ZClipOptimizer(NoGrad(model.parameters(), lr=0.1))
        assert optimizer.step(self.closure(model, optimizer)).requires_grad

    def test_same_run_with_and_without_a_closure(self):
        plain, closed = make_model(), make_model()
        train(plain, wrapped(plain), range(40))
        optimizer = wrapped(closed)
        for step in range(40):
            optimizer.step(self.closure(closed, optimizer, step))
        assert torch.equal(parameters(plain), parameters(closed))

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
    def test_a_nonfinite_evaluation_skips_the_step(self, kind):
        model = make_model()
        optimizer = ZClipOptimizer(kind(model.parameters()))
        optimizer.step(self.closure(model, optimizer))
        before, state = parameters(model), copy.deepcopy(optimizer.state_dict()["state"])

        def poisoned():
            loss = self.closure(model, optimizer)()
            model[0].bias.grad.fill_(math.nan)
            return loss

        assert optimizer.step(poisoned).item() > 0
        assert optimizer.step_was_skipped
        assert torch.equal(parameters(model), before)
        if kind is not torch.optim.LBFGS:  # which counts its evaluations
            assert repr(optimizer.state_dict()["state"]) == repr(state)

    @pytest.mark.parametrize("nonfinite", ["skip", "raise"])
    def test_a_nonfinite_evaluation_of_sam_leaves_the_parameters_where_they_were(self, nonfinite):
        model = make_model()
        sgd = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = ZClipOptimizer(pytorch_optimizer.SAM(model.parameters(), **sgd), nonfinite=nonfinite)
        closure = self.closure(model, optimizer)
        for _ in range(3):
            closure()
            optimizer.step(closure)
        before = parameters(model)
        closure()

        def poisoned():
            loss = closure()
            assert not torch.equal(parameters(model), before)
            model[0].bias.grad.fill_(math.nan)
            return loss

        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError, match="is nan"):
                optimizer.step(poisoned)
        else:
            optimizer.step(poisoned)
        assert optimizer.step_was_skipped
        assert torch.equal(parameters(model), before)
        closure()
        optimizer.step(closure)  # the momentum, too, must have been left clean
        assert parameters(model).isfinite().all()
        assert not torch.equal(parameters(model), before)

    @pytest.mark.parametrize("search", [None, "strong_wolfe"])
    @pytest.mark.parametrize("nonfinite", ["skip", "raise", "pass"])
    def test_a_later_evaluation_that_is_not_finite(self, nonfinite, search):
        model = make_model()
        lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn=search)
        optimizer = ZClipOptimizer(lbfgs, nonfinite=nonfinite)
        before, evaluations = parameters(model), []

        def closure():
            loss = self.closure(model, optimizer)()
            evaluations.append(loss)
            if len(evaluations) == 2:
                model[0].bias.grad.fill_(math.nan)
            return loss

        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError, match="is nan"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        if nonfinite != "pass":
            assert torch.equal(parameters(model), before)
            assert optimizer.metrics.skipped_steps == 1
            optimizer.step(self.closure(model, optimizer))
            assert parameters(model).isfinite().all()
            assert not torch.equal(parameters(model), before)
            assert not optimizer.step_was_skipped

    def test_a_spike_that_is_skipped_leaves_the_step_at_its_first_evaluation(self):
        model = make_model()
        optimizer = ZClipOptimizer(Extragradient(model.parameters(), lr=0.01), warmup_steps=4, z_skip=6.0)
        for first, second in [(1.0, 1.0), (1.1, 1.0)] * 3 + [(1.0, 50.0), (50.0, 1.0)]:
            before = parameters(model)
            norms = iter([first, second])
            optimizer.step(lambda norms=norms: set_gradients(model.parameters(), next(norms)))
            assert optimizer.step_was_skipped == (first == 50.0) == torch.equal(parameters(model), before)
            assert len(list(norms)) == (first == 50.0)  # a further evaluation is clipped at most
        assert optimizer.metrics.skipped_steps == 1

    @pytest.mark.parametrize("bad_step", [0, 1, 3])
    def test_a_second_evaluation_that_is_not_finite_puts_the_parameters_back(self, bad_step):
        model = make_model()
        optimizer = ZClipOptimizer(Extragradient(model.parameters(), lr=0.01))
        for step in range(5):
            before = parameters(model)
            norms = iter([1.0, math.nan if step == bad_step else 1.0])
            optimizer.step(lambda norms=norms: set_gradients(model.parameters(), next(norms)))
            assert optimizer.step_was_skipped == (step == bad_step)
            assert torch.equal(parameters(model), before) == (step == bad_step)

    class Unknown(torch.optim.SGD):
        """Not of torch.optim, so that only its steps show what it does."""

    @pytest.mark.parametrize(
        ("kind", "options", "expected"),
        [
            (torch.optim.SGD, {}, [0, 0, 0]),
            (torch.optim.SGD, {"nonfinite": "raise"}, [0, 0, 0]),
            (Unknown, {}, [4, 4, 4]),
            (Unknown, {"nonfinite": "pass", "z_skip": 9.0}, [4, 4, 4]),
            (Unknown, {"nonfinite": "pass"}, [0, 0, 0]),
            (Extragradient, {}, [8, 16, 24]),  # with its own copy
            (Extragradient, {"nonfinite": "pass"}, [4, 8, 12]),
        ],
    )
    def test_parameters_are_copied_only_if_they_may_have_to_be_put_back(self, kind, options, expected, monkeypatch):
        model = make_model()
        optimizer = ZClipOptimizer(kind(model.parameters(), lr=0.1), **options)
        clones = []
        clone = torch.Tensor.clone
        monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: clones.append(1) or clone(tensor))
        counts = []
        for _ in range(3):
            optimizer.step(self.closure(model, optimizer))
            counts.append(len(clones))
        assert counts == expected

    @pytest.mark.parametrize("kind", sorted(STAY_PUT - {Chain}, key=lambda cls: cls.__name__))
    def test_torchs_optimizers_leave_the_parameters_alone_until_their_closure_has_returned(self, kind):
        """So none of theirs is copied."""
        p = nn.Parameter(torch.ones(3, 3))
        optimizer = kind([p])
        seen = []

        def closure():
            seen.append(p.detach().clone())
            p.grad = torch.ones_like(p) if kind is not torch.optim.SparseAdam else torch.ones_like(p).to_sparse()
            return torch.tensor(0.0)

        for _ in range(2):
            before = p.detach().clone()
            optimizer.step(closure)
            assert torch.equal(seen.pop(), before)
            assert not seen
            assert not torch.equal(p, before)

    def test_parameters_that_cannot_be_put_back_are_told_of(self):
        class LateExtragradient(Extragradient):
            """Extrapolates from its second step on."""

            def step(self, closure):
                return super().step(closure) if self.state else self.state.update(begun=True) or closure()

        model = make_model()
        optimizer = ZClipOptimizer(LateExtragradient(model.parameters(), lr=0.01))
        norms = iter([1.0, 1.0, math.nan])
        optimizer.step(lambda: set_gradients(model.parameters(), next(norms)))
        with pytest.warns(ZClipWarning, match="LateExtragradient .* there is no copy, and they stay there"):
            optimizer.step(lambda: set_gradients(model.parameters(), next(norms)))

    def test_an_inner_optimizer_that_ignores_its_closure_is_told_of(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch_optimizer.Ranger(model.parameters(), lr=1e-2))
        backward(model, 0)
        with (
            pytest.warns(ZClipWarning, match="Ranger did not call the closure"),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "This overload of addcmul_")
            optimizer.step(lambda: backward(model, 0))

    def test_parameters_swapped_between_steps_do_not_count_as_moved(self):
        model = make_model()
        optimizer = wrapped(model)
        optimizer.step(self.closure(model, optimizer))
        model[0].weight = nn.Parameter(torch.ones(16, 6))
        optimizer.param_groups[0]["params"] = list(model.parameters())
        before = parameters(model)

        def poisoned():
            loss = self.closure(model, optimizer)()
            model[0].bias.grad.fill_(math.nan)
            return loss

        optimizer.step(poisoned)
        assert torch.equal(parameters(model), before)
        assert math.isnan(model[0].bias.grad[0])


class TestIsAnOptimizer:
    def test_isinstance_and_hook_dictionaries(self):
        optimizer = wrapped(make_model())
        assert isinstance(optimizer, torch.optim.Optimizer)
        for name in HOOK_DICTS:
            assert len(optimizer.__dict__[name]) == 0

    def test_wrapping_a_trained_optimizer_loses_no_state(self):
        model, same = make_model(), make_model()
        inner, bare = adamw(model), adamw(same)
        train(model, inner, range(5))
        train(same, bare, range(10))
        train(model, ZClipOptimizer(inner, z_thresh=1e9), range(5, 10))
        assert torch.equal(parameters(model), parameters(same))

    def test_groups_state_and_defaults_are_those_of_the_base_optimizer(self):
        optimizer = wrapped(make_model())
        inner = optimizer.base_optimizer
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(inner, name)
            assert name not in optimizer.__dict__
            replacement = copy.copy(getattr(inner, name))
            setattr(optimizer, name, replacement)
            assert getattr(inner, name) is replacement
            replacement = copy.copy(replacement)
            setattr(inner, name, replacement)
            assert getattr(optimizer, name) is replacement
        state_dict = optimizer.state_dict()
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups is inner.param_groups

    def test_add_param_group_reaches_the_base_optimizer_and_gets_the_keys(self):
        model, more = make_model(), nn.Parameter(torch.zeros(3))
        optimizer = wrapped(model)
        train(model, optimizer, range(5))
        optimizer.add_param_group({"params": [more], "lr": 0.5})
        assert optimizer.base_optimizer.param_groups[1]["params"] == [more]
        assert optimizer.param_groups[1]["zclip_step"] == 5
        train(model, optimizer, [5])
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.metrics.step == 6

    def test_zero_grad(self):
        model = make_model()
        optimizer = wrapped(model)
        backward(model, 0)
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad.eq(0).all() for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_repr_shows_both(self):
        text = repr(wrapped(make_model()))
        assert text.startswith("ZClipOptimizer (")
        assert "ZClip(alpha=0.97" in text
        assert "AdamW (" in text

    @pytest.mark.parametrize(
        "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
    )
    def test_copies_own_their_inner_optimizer_and_step(self, copier):
        model = make_model()
        optimizer = wrapped(model)
        torch.optim.lr_scheduler.StepLR(optimizer, 5)  # patches step() on the instance
        train(model, optimizer, range(30))
        original = parameters(model)
        twin = copier(optimizer)
        assert "step" not in twin.__dict__
        assert twin.metrics == optimizer.metrics
        params = [p for group in twin.param_groups for p in group["params"]]
        before = params[0].detach().clone()
        set_gradients(params, 1.0)
        twin.step()
        assert twin.metrics.step == 31
        assert optimizer.metrics.step == 30
        assert not torch.equal(params[0], before)
        assert torch.equal(parameters(model), original)

    def test_copies_keep_the_attributes_of_subclasses(self):
        class Tagged(ZClipOptimizer):
            pass

        optimizer = Tagged(adamw(make_model()))
        optimizer.tag = "mine"
        assert copy.deepcopy(optimizer).tag == "mine"

    def test_a_deepcopied_run_goes_on_bit_for_bit(self):
        model = make_model()
        optimizer = wrapped(model)
        train(model, optimizer, range(30))
        twin_model, twin = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(30, 60), outliers=[40])
        train(twin_model, twin, range(30, 60), outliers=[40])
        assert torch.equal(parameters(model), parameters(twin_model))
        assert twin.metrics == optimizer.metrics


class TestAttributes:
    class Inner(torch.optim.SGD):
        grad_scale = 3
        found_inf = 4
        _secret = 5
        hello = "world"

        def train(self):
            return "training"

    def test_public_names_are_forwarded(self):
        optimizer = ZClipOptimizer(self.Inner(make_model().parameters(), lr=0.1))
        assert optimizer.train() == "training"
        assert optimizer.hello == "world"
        assert not hasattr(optimizer, "eval")
        assert not hasattr(wrapped(make_model()), "train")

    @pytest.mark.parametrize("name", ["_secret", "grad_scale", "found_inf"])
    def test_private_and_scaler_names_are_not(self, name):
        optimizer = ZClipOptimizer(self.Inner(make_model().parameters(), lr=0.1))
        with pytest.raises(AttributeError, match=f"'ZClipOptimizer' object has no attribute '{name}'"):
            getattr(optimizer, name)

    def test_setting_an_attribute_stays_on_the_wrapper(self):
        optimizer = wrapped(make_model())
        optimizer.note = 1
        assert not hasattr(optimizer.base_optimizer, "note")

    def test_an_error_inside_a_property_surfaces_as_itself(self):
        class Broken(ZClipOptimizer):
            @property
            def train(self):
                return self.base_optimizer.no_such_thing

        optimizer = Broken(self.Inner(make_model().parameters(), lr=0.1))
        with pytest.raises(AttributeError, match="no_such_thing"):
            getattr(optimizer, "train")  # noqa: B009

    def test_a_half_built_object_does_not_recurse(self):
        with pytest.raises(AttributeError, match="base_optimizer"):
            hasattr(ZClipOptimizer.__new__(ZClipOptimizer).base_optimizer, "train")


class TestConstruction:
    def test_a_class_is_refused_with_the_way_to_write_it(self):
        with pytest.raises(TypeError, match=r"got the class AdamW; write ZClipOptimizer\(AdamW\(model.parameters"):
            ZClipOptimizer(torch.optim.AdamW)

    @pytest.mark.parametrize("thing", [None, nn.Linear(1, 1), [nn.Parameter(torch.ones(1))]])
    def test_other_things_are_refused(self, thing):
        with pytest.raises(TypeError, match=r"must be an optimizer, got .*, which has no .*step"):
            ZClipOptimizer(thing)

    def test_wrapping_twice_is_refused(self):
        with pytest.raises(TypeError, match="ZClipOptimizer already"):
            ZClipOptimizer(wrapped(make_model()))

    def test_differentiable_is_refused(self):
        with pytest.raises(ValueError, match="differentiable=True"):
            ZClipOptimizer(torch.optim.SGD(make_model().parameters(), lr=0.1, differentiable=True))

    def test_options_are_keyword_only_and_validated_and_nothing_changes(self):
        inner = adamw(make_model())
        with pytest.raises(TypeError):
            ZClipOptimizer(inner, 0.9)
        with pytest.raises(ValueError, match=r"alpha must be a number with 0 <= alpha < 1, got 2"):
            ZClipOptimizer(inner, alpha=2)
        assert not any(key.startswith("zclip") for key in inner.param_groups[0])

    def test_every_option_reaches_the_engine(self):
        options = {
            "alpha": 0.5,
            "z_thresh": 3.5,
            "mode": "percentile",
            "clip_option": "mean",
            "clip_factor": 0.5,
            "max_grad_norm": 7.0,
            "warmup_steps": 3,
            "eps": 0.5,
            "skip_update_on_spike": True,
            "patience": 4,
            "nonfinite": "pass",
            "max_consecutive_nonfinite": 9,
            "scope": "group",
        }
        assert wrapped(make_model(), **options).clipper.config == ZClipConfig(**options)
        assert wrapped(make_model()).clipper.config == ZClipConfig()
        percentile = {"mode": "percentile", "percentile": 0.9}
        assert wrapped(make_model(), **percentile).clipper.config == ZClipConfig(**percentile)


class TestHooks:
    def test_step_hooks_of_wrapper_and_base_fire_once_each(self):
        model = make_model()
        optimizer, calls = wrapped(model), []
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o)))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append(("post", o)))
        optimizer.base_optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("inner", o)))
        train(model, optimizer, [0])
        assert calls == [("pre", optimizer), ("inner", optimizer.base_optimizer), ("post", optimizer)]

    def test_a_pre_hook_can_replace_the_arguments(self):
        model = make_model()
        optimizer = wrapped(model)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), kwargs))
        backward(model, 0)
        assert optimizer.step() == 7.0

    def test_state_dict_hooks_fire_once_and_may_replace_the_state_dict(self):
        model = make_model()
        optimizer, calls = wrapped(model), []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
        optimizer.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "extra"})
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
        state_dict = optimizer.state_dict()
        assert state_dict["extra"] == 1
        optimizer.load_state_dict(state_dict)
        assert calls == ["pre", "loaded"]
