"""ZClip, the engine: measuring, applying, metrics, scopes, non-finite norms, state."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ReferenceZClip
from torch import nn
from training import backward, make_model, set_gradients

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer, ZClipWarning


def feed(clipper, norms, params=None):
    """One step per norm; returns the metrics of each."""
    params = params or [nn.Parameter(torch.zeros(50))]
    history = []
    for norm in norms:
        set_gradients(params, norm)
        clipper.step(params)
        history.append(clipper.metrics)
    return history


NORMS = [1.0, 1.1, 0.9, 1.05, 1.0, 0.95, 30.0, 1.0, 1.1, 2.0]


def test_follows_the_oracle_through_real_gradients():
    reference = ReferenceZClip(warmup_steps=5)
    for norm, metrics in zip(NORMS, feed(ZClip(warmup_steps=5), NORMS), strict=True):
        assert metrics.clipped_norm == pytest.approx(reference.step(norm), rel=1e-5)
        assert metrics.mean == pytest.approx(reference.mean, rel=1e-5)
        assert metrics.std == pytest.approx(math.sqrt(reference.var), rel=1e-4, abs=1e-6)
        assert metrics.clipped == metrics.is_spike == reference.spike


def test_gradients_are_scaled_to_the_clipped_norm():
    params = [nn.Parameter(torch.zeros(30)), nn.Parameter(torch.zeros(4, 5))]
    clipper = ZClip(warmup_steps=5)
    feed(clipper, NORMS[:6], params)
    set_gradients(params, 30.0)
    before = [p.grad.clone() for p in params]
    assert clipper.step(params) == pytest.approx(30.0)
    metrics = clipper.metrics
    assert metrics.clipped
    assert torch.sqrt(sum(p.grad.square().sum() for p in params)) == pytest.approx(metrics.clipped_norm)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.grad, old * metrics.clip_coef)


def test_a_step_that_is_not_clipped_leaves_every_gradient_bit_identical():
    params = [nn.Parameter(torch.zeros(50))]
    clipper = ZClip(warmup_steps=5)
    feed(clipper, NORMS[:6], params)
    set_gradients(params, 1.02)
    before = params[0].grad.clone()
    clipper.step(params)
    assert torch.equal(params[0].grad, before)
    assert clipper.metrics.clip_coef == 1


def test_a_further_evaluation_is_clipped_by_the_statistics_that_its_step_began_with():
    params = [nn.Parameter(torch.zeros(50))]
    clipper = ZClip(warmup_steps=5, clip_option="max")
    feed(clipper, NORMS[:6], params)
    for new_step in (True, False):
        set_gradients(params, 30.0)
        clipper._clip([{"params": params}], new_step=new_step)
        assert params[0].grad.norm().item() == pytest.approx(clipper.metrics.threshold)
    assert clipper.metrics.step == 7
    assert clipper.metrics.clipped_steps == 1


def test_the_cap_acts_during_warm_up_and_is_clipping_without_a_spike():
    first, second = feed(ZClip(max_grad_norm=0.5), [2.0, 0.4])
    assert first.clipped_norm == 0.5
    assert first.clip_coef == pytest.approx(0.25)
    assert (first.clipped, second.clipped) == (True, False)
    assert (first.clipped_steps, second.clipped_steps) == (1, 1)
    assert (first.clip_rate, second.clip_rate) == (1.0, 0.5)
    assert not first.is_spike
    assert second.spike_steps == second.spike_rate == 0
    assert first.mean == pytest.approx(2.0)


def test_a_spike_that_clip_factor_leaves_as_it_is_is_not_clipped():
    metrics = feed(ZClip(warmup_steps=4, clip_factor=100.0), [1.0, 1.1, 0.9, 1.0, 1.4])[-1]
    assert metrics.is_spike
    assert not metrics.clipped
    assert (metrics.spike_steps, metrics.clipped_steps) == (1, 0)


def test_accepts_a_module_parameters_or_groups():
    torch.manual_seed(0)
    model = make_model()
    backward(model, 0)
    norms = [
        ZClip().step(what)
        for what in (model, model.parameters(), list(model.parameters()), [{"params": list(model.parameters())}])
    ]
    assert len(set(norms)) == 1
    assert ZClip().step(model[0].weight) < norms[0]
    assert ZClip().step(nn.Identity()) == 0


def test_metrics_before_the_first_step():
    metrics = ZClip().metrics
    assert math.isnan(metrics.grad_norm)
    assert metrics.clip_coef == 1
    assert metrics.step == metrics.clipped_steps == metrics.spike_steps == metrics.skipped_steps == 0
    assert metrics.clip_rate == metrics.spike_rate == 0
    assert not metrics.clipped
    assert not metrics.is_spike
    assert not metrics.skipped


def test_metrics_count_spikes_and_their_share_of_the_steps_after_warm_up():
    history = feed(ZClip(warmup_steps=4), [1.0, 1.1, 0.9, 1.0, 50.0, 50.0, 1.0, 1.0])
    assert [m.is_spike for m in history] == [False] * 4 + [True, True, False, False]
    assert [m.consecutive_spikes for m in history] == [0, 0, 0, 0, 1, 2, 0, 0]
    assert history[-1].step == 8
    assert history[-1].spike_steps == history[-1].clipped_steps == 2
    assert history[-1].spike_rate == pytest.approx(2 / 4)
    assert history[-1].clip_rate == pytest.approx(2 / 8)
    assert all(math.isinf(m.threshold) for m in history[:4])
    assert all(m.threshold < 2 for m in history[4:])


def test_zero_gradients_leave_the_statistics_alone():
    clipper = ZClip(warmup_steps=3)
    before = feed(clipper, [1.0, 1.2])[-1]
    after = feed(clipper, [0.0])[-1]
    assert (after.mean, after.std, after.step) == (before.mean, before.std, before.step)
    assert after.grad_norm == 0
    assert not after.skipped
    assert ZClip().step([nn.Parameter(torch.ones(3))]) == 0  # no gradient at all


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_skip_leaves_gradients_and_statistics_alone(self, bad):
        clipper, p = ZClip(warmup_steps=3), nn.Parameter(torch.zeros(4))
        before = feed(clipper, [1.0, 1.1, 1.2, 1.0], [p])[-1]
        p.grad = torch.tensor([1.0, bad, 2.0, 3.0])
        assert not math.isfinite(clipper.step([p]))
        assert torch.equal(p.grad.nan_to_num(7.0), torch.tensor([1.0, bad, 2.0, 3.0]).nan_to_num(7.0))
        after = clipper.metrics
        assert clipper.step_was_skipped
        assert after.skipped
        assert (after.mean, after.std, after.step) == (before.mean, before.std, before.step)
        assert after.skipped_steps == 1
        feed(clipper, [1.0], [p])
        assert not clipper.step_was_skipped

    @pytest.mark.parametrize("scope", ["global", "group"])
    @pytest.mark.parametrize("nonfinite", ["skip", "pass"])
    def test_a_norm_whose_square_overflows_is_one(self, nonfinite, scope):
        params = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
        clipper, groups = ZClip(warmup_steps=3, nonfinite=nonfinite, scope=scope), [{"params": [p]} for p in params]
        for norm in (1.0, 1.1, 1.2, 1.0):
            set_gradients(params, norm)
            clipper.step(groups)
        before = [(m.mean, m.std, m.step) for m in clipper.group_metrics]
        params[1].grad.mul_(1e160)
        assert clipper.step(groups) == pytest.approx(1e160, rel=1)
        assert clipper.step_was_skipped == (nonfinite == "skip")
        assert (clipper.metrics.clip_coef, clipper.metrics.is_spike) == (1, False)
        assert [(m.mean, m.std, m.step) for m in clipper.group_metrics] == before
        other = ZClip(warmup_steps=3, scope=scope)
        other.load_state_dict(clipper.state_dict())
        set_gradients(params, 1.1)
        other.step(groups)
        assert other.metrics.step == 5

    def test_it_is_told_from_elements_that_are_not_finite(self):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = torch.full_like(p, 1e200)
        with pytest.raises(NonFiniteGradientError, match=r"norm is 1\.41.*e\+200, .*; its square overflows$"):
            ZClip(nonfinite="raise").step([p])

    def test_raise_names_the_parameters(self):
        model = make_model()
        backward(model, 0)
        model[2].bias.grad.fill_(math.inf)
        with pytest.raises(NonFiniteGradientError, match=r"gradient norm is inf, .* 2\.bias \(1,\)$"):
            ZClip(nonfinite="raise").step(model)

    def test_pass_leaves_the_step_unscaled_and_the_statistics_alone(self):
        clipper, p = ZClip(nonfinite="pass", max_grad_norm=0.1), nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([math.inf, 1.0])
        for _ in range(30):
            clipper.step([p])
        assert p.grad.tolist() == [math.inf, 1.0]
        assert not clipper.step_was_skipped
        assert clipper.metrics.step == 0

    def test_too_many_in_a_row_raise(self):
        clipper, p = ZClip(max_consecutive_nonfinite=3), nn.Parameter(torch.zeros(2))
        with pytest.warns(ZClipWarning, match="for 2 steps in a row"):
            feed(clipper, [math.nan, math.nan, 1.0, math.nan, math.nan], [p])
        set_gradients([p], math.nan)
        with pytest.raises(NonFiniteGradientError, match="is nan, after 1 finite steps, for 3 in a row"):
            clipper.step([p])
        assert clipper.metrics.skipped_steps == 5
        with pytest.raises(NonFiniteGradientError, match="for 4 in a row"):
            clipper.step([p])

    def test_never_raises_when_told_so(self):
        clipper = ZClip(max_consecutive_nonfinite=None)
        assert feed(clipper, [math.nan] * 60)[-1].skipped_steps == 60


class TestGroupScope:
    def make(self):
        groups = [{"params": [nn.Parameter(torch.zeros(20))]}, {"params": [nn.Parameter(torch.zeros(20))]}]
        return ZClip(scope="group", warmup_steps=4), groups

    def step(self, clipper, groups, *norms):
        for group, norm in zip(groups, norms, strict=True):
            set_gradients(group["params"], norm)
        clipper.step(groups)

    def test_only_the_group_with_the_spike_is_clipped(self):
        clipper, groups = self.make()
        for i in range(6):
            self.step(clipper, groups, 1.0 + 0.1 * (i % 2), 100.0 + 10 * (i % 2))
        self.step(clipper, groups, 5.0, 105.0)
        first, second = clipper.group_metrics
        assert first.clipped
        assert not second.clipped
        assert first.clipped_norm < 2
        assert second.clip_coef == 1
        assert first.mean < 2 < second.mean
        whole = clipper.metrics
        assert whole.clipped
        assert whole.grad_norm == pytest.approx(math.hypot(5, 105))
        assert whole.clipped_norm == pytest.approx(math.hypot(first.clipped_norm, 105))
        assert whole.clip_coef == first.clip_coef
        assert whole.z_score == first.z_score
        assert math.isnan(whole.threshold)

    def test_a_nonfinite_group_skips_the_step_for_all(self):
        clipper, groups = self.make()
        self.step(clipper, groups, 1.0, 2.0)
        before = clipper.state_dict()["groups"]
        self.step(clipper, groups, 3.0, math.nan)
        assert clipper.step_was_skipped
        for old, new in zip(before, clipper.state_dict()["groups"], strict=True):
            assert (old["zclip_mean"], old["zclip_step"]) == (new["zclip_mean"], new["zclip_step"])

    def test_the_groups_norms_are_told_also_when_one_is_not_finite(self):
        clipper, groups = self.make()
        self.step(clipper, groups, 3.0, math.nan)
        assert clipper.group_metrics[0].grad_norm == pytest.approx(3.0)
        assert math.isnan(clipper.group_metrics[1].grad_norm)

    def test_groups_may_come_and_go(self):
        clipper, groups = self.make()
        self.step(clipper, groups[:1], 1.0)
        self.step(clipper, groups, 1.0, 2.0)
        self.step(clipper, groups[:1], 1.0)
        assert [m.step for m in clipper.group_metrics] == [3]

    def test_a_group_without_gradients_is_left_out(self):
        clipper, groups = self.make()
        self.step(clipper, groups, 1.0, 1.0)
        groups[1]["params"][0].grad = None
        clipper.step(groups)
        assert [m.step for m in clipper.group_metrics] == [2, 1]


class TestSkippedSpikes:
    def test_metrics_tell_the_reason(self):
        clipper = ZClip(warmup_steps=4, z_skip=6.0)
        *_, spike, bad, spikes = (
            feed(clipper, norms)[-1] for norms in ([1.0, 1.1] * 4, [50.0], [math.nan], [50.0, 50.0, 50.0])
        )
        assert (spike.skipped, spike.is_spike, spike.skipped_steps, spike.step) == (True, True, 1, 9)
        assert (bad.skipped, bad.is_spike, bad.skipped_steps, bad.step) == (True, False, 2, 9)
        assert (spikes.skipped, spikes.is_spike, spikes.skipped_steps) == (False, True, 4)
        assert spike.as_dict()["zclip/skipped"] == spike.as_dict()["zclip/is_spike"] == 1.0

    def test_spikes_are_not_counted_among_norms_that_are_not_finite(self):
        clipper = ZClip(warmup_steps=4, z_skip=6.0, max_consecutive_nonfinite=2, nonfinite="raise")
        feed(clipper, [1.0, 1.1] * 4 + [50.0] * 5)
        assert clipper.metrics.skipped_steps == 3
        assert clipper.state_dict()["groups"][0]["zclip_nonfinite_streak"] == 0

    @pytest.mark.parametrize("nonfinite", ["skip", "raise", "pass"])
    def test_whatever_is_done_about_nan(self, nonfinite):
        clipper = ZClip(warmup_steps=4, z_skip=6.0, nonfinite=nonfinite)
        feed(clipper, [1.0, 1.1] * 4)
        assert not clipper.step_was_skipped
        feed(clipper, [50.0])
        assert clipper.step_was_skipped

    def test_one_group_is_enough(self):
        groups = [{"params": [nn.Parameter(torch.zeros(3))]} for _ in range(2)]
        clipper = ZClip(warmup_steps=4, z_skip=6.0, scope="group")
        for second in (1.0, 1.1, 1.0, 1.1, 1.0, 50.0):
            set_gradients(groups[0]["params"], min(second, 1.1))
            set_gradients(groups[1]["params"], second)
            clipper.step(groups)
        assert clipper.step_was_skipped
        assert [m.skipped for m in clipper.group_metrics] == [True, True]
        assert [m.is_spike for m in clipper.group_metrics] == [False, True]
        assert clipper.metrics.is_spike
        assert [m.step for m in clipper.group_metrics] == [6, 6]
        assert clipper.metrics.skipped_steps == 1


class TestState:
    @pytest.mark.filterwarnings("ignore:.*spikes in a row:zclip_optim.ZClipWarning")
    @given(
        st.integers(0, 60),
        st.sampled_from(
            [
                {},
                {"clip_option": "mean"},
                {"patience": 2},
                {"alpha_down": 0.8, "z_skip": 6.0},
                {"scope": "group"},
                {"max_grad_norm": 1.05},
            ]
        ),
    )
    def test_resume_at_any_step_equals_the_uninterrupted_run(self, cut, options):
        norms = ([1.0, 1.1, 0.9, 1.2] * 3 + [40.0, 41.0, 42.0, math.nan, 0.0, 1.3, 1.0, 1.1]) * 3
        torch.manual_seed(0)
        whole = ZClip(warmup_steps=10, **options)
        reference = feed(whole, norms)
        torch.manual_seed(0)
        first, second = ZClip(warmup_steps=10, **options), ZClip(warmup_steps=10, **options)
        history = feed(first, norms[:cut])
        second.load_state_dict(first.state_dict())
        history += feed(second, norms[cut:])
        assert list(map(repr, history)) == list(map(repr, reference))  # repr: bit for bit, and NaN equals NaN
        assert second.state_dict() == whole.state_dict()

    def test_metrics_after_loading_show_what_was_restored(self):
        clipper = ZClip(warmup_steps=3)
        last = feed(clipper, [1.0, 1.1, 1.0, 9.0, math.nan])[-1]
        other = ZClip(warmup_steps=3)
        other.load_state_dict(clipper.state_dict())
        metrics = other.metrics
        counted = ("step", "clipped_steps", "spike_steps", "skipped_steps", "consecutive_spikes")
        names = ("mean", "std", *counted, "clip_rate", "spike_rate")
        assert [getattr(metrics, name) for name in names] == [getattr(last, name) for name in names]

    def test_hyperparameters_are_not_restored(self):
        clipper, stricter = ZClip(), ZClip(z_thresh=1.0)
        stricter.load_state_dict(clipper.state_dict())
        assert stricter.config.z_thresh == 1.0

    def test_a_state_of_the_wrapper_is_told_from_its_own(self):
        with pytest.raises(ValueError, match=r"must be what ZClip\.state_dict\(\) returned"):
            ZClip().load_state_dict(ZClipOptimizer(torch.optim.SGD(make_model().parameters())).state_dict())

    @pytest.mark.parametrize("state", [{}, {"groups": []}, {"groups": [{}]}])
    def test_what_is_not_a_state_is_refused(self, state):
        with pytest.raises(ValueError, match=r"what ZClip\.state_dict|list of dicts"):
            ZClip().load_state_dict(state)


@pytest.mark.parametrize(
    "give", [lambda p: {"params": p}, lambda p: {"params": [p]}, lambda p: {"params": (q for q in [p])}]
)
def test_groups_take_what_torch_takes(give):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 100.0)
    assert ZClip(max_grad_norm=1.0).step([give(p)]) == pytest.approx(100 * 3**0.5)
    assert p.grad.norm().item() == pytest.approx(1.0)
    p.grad.fill_(math.nan)
    with pytest.raises(NonFiniteGradientError, match=r"param_groups\[0\]\['params'\]\[0\] \(3,\)"):
        ZClip(nonfinite="raise").step([give(p)])


@pytest.mark.parametrize("things", [[1.0], make_model().named_parameters(), ["weight"]])
def test_other_things_than_parameters_are_refused(things):
    with pytest.raises(TypeError, match="must be a module, parameters or param groups"):
        ZClip().step(things)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(3))]), r"got SGD; give it optimizer\.param_groups"),
        (
            ZClipOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(3))])),
            r"got ZClipOptimizer; give it optimizer\.param_gr",
        ),
        (None, "got NoneType"),
        (3.0, "got float"),
        ({"params": [nn.Parameter(torch.ones(3))]}, "got dict; param groups come in a list"),
        ({"weight": nn.Parameter(torch.ones(3))}, r"got dict; give it its values\(\)"),
        ([{"lr": 0.1}], "got dict among them"),
    ],
)
@pytest.mark.parametrize("use", [ZClip.step, ZClip.norms_by_parameter])
def test_what_is_to_be_given_instead(use, thing, message):
    with pytest.raises(TypeError, match=f"model_or_parameters must be a module, parameters or param groups, {message}"):
        use(ZClip(), thing)


@pytest.mark.parametrize(
    "given",
    [
        lambda params: iter(params),
        lambda params: [{"params": iter(params)}, {"params": []}],
        lambda params: iter([{"params": params}]),
    ],
)
def test_an_iterator_that_is_gone_through_is_warned_of(given):
    params = list(make_model().parameters())
    set_gradients(params, 1.0)
    clipper, once = ZClip(), given(params)
    assert clipper.step(once) == pytest.approx(1.0)
    with pytest.warns(ZClipWarning, match="an iterator, .* that is gone through by now: nothing"):
        assert clipper.step(once) == 0


def test_no_parameters_at_all_are_nothing_to_warn_of():
    for nothing in ([], nn.ReLU(), [{"params": []}]):
        assert ZClip().step(nothing) == 0


def test_spike_rate_after_resuming_with_a_longer_warm_up():
    clipper, longer = ZClip(warmup_steps=4), ZClip(warmup_steps=100)
    feed(clipper, [1.0, 1.1, 0.9, 1.0, 50.0, 1.0])
    longer.load_state_dict(clipper.state_dict())
    assert longer.metrics.spike_steps == 1
    assert longer.metrics.spike_rate == 0
    assert longer.metrics.clip_rate == pytest.approx(1 / 6)


def test_the_public_names_are_these():
    public = {name for name in (*dir(ZClip), *vars(ZClip())) if not name.startswith("_")}
    methods = {"step", "decide", "state_dict", "load_state_dict", "norms_by_parameter"}
    assert public == methods | {"metrics", "group_metrics", "step_was_skipped", "config"}


def test_arguments_are_validated():
    with pytest.raises(ValueError, match="z_thresh must be a finite number > 0, got -1"):
        ZClip(z_thresh=-1)
    with pytest.raises(TypeError, match="zthresh"):
        ZClip(zthresh=2)
    with pytest.raises(ValueError, match="process_group must be"):
        ZClip(process_group="world")


def test_repr_shows_the_hyperparameters():
    assert repr(ZClip(z_thresh=3)).startswith("ZClip(alpha=0.97, z_thresh=3.0, mode='zscore'")


class TestReportedNorm:
    """`decide`, for gradients that somebody else has."""

    NORMS = (*[1.0, 1.1] * 15, 9.0, 1.05, math.nan, 1.0, 0.0, 1.1, math.inf, 1.0, 30.0)

    @pytest.mark.parametrize("options", [{}, {"z_skip": 50.0}, {"max_grad_norm": 1.02}, {"nonfinite": "pass"}])
    def test_it_is_the_step_of_gradients_of_this_norm(self, options):
        stepping, deciding = ZClip(**options), ZClip(**options)
        p = torch.nn.Parameter(torch.zeros(1))
        for norm in self.NORMS:
            p.grad = torch.tensor([norm], dtype=torch.float32)
            stepping.step(p)
            norm = torch.tensor(norm, dtype=torch.float32).item()
            factor = deciding.decide(norm)
            assert factor == deciding.metrics.clip_coef
            assert repr(deciding.metrics) == repr(stepping.metrics)
            assert deciding.step_was_skipped == stepping.step_was_skipped
        assert deciding.state_dict() == stepping.state_dict()
        assert deciding.metrics.clipped_steps > 0

    def test_on_an_accelerator_nothing_is_read(self, monkeypatch):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        on_host, on_device = ZClip(), ZClip()
        factors = [on_device.decide(torch.tensor(norm)) for norm in self.NORMS]
        monkeypatch.undo()
        expected = [on_host.decide(torch.tensor(norm)) for norm in self.NORMS]
        assert all(isinstance(factor, torch.Tensor) for factor in factors)
        assert [float(factor) for factor in factors] == pytest.approx(expected, nan_ok=True)
        assert on_device.metrics.skipped_steps == on_host.metrics.skipped_steps == 2
        assert ZClip().decide(torch.ones((), device="meta")).device.type == "meta"

    def test_what_is_not_finite_raises_if_told_to(self):
        with pytest.raises(NonFiniteGradientError, match="the gradient norm is nan"):
            ZClip(nonfinite="raise").decide(math.nan)
        clipper = ZClip(max_consecutive_nonfinite=2)
        with pytest.warns(ZClipWarning, match="for 1 steps in a row"):
            clipper.decide(math.inf)
        with pytest.raises(NonFiniteGradientError, match=r"for 2 in a row; .* not known where only a norm"):
            clipper.decide(math.inf)

    @pytest.mark.parametrize("norm", [-1.0, torch.tensor(-1.0), torch.tensor([-1], dtype=torch.int64)])
    def test_a_mark_of_an_overflow_is_no_norm(self, norm, monkeypatch):
        clipper = ZClip()
        with pytest.raises(ValueError, match=r"norm must be >= 0, got -1.0; give math.inf where gradients"):
            clipper.decide(norm)
        assert clipper.state_dict() == ZClip().state_dict()
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        if isinstance(norm, torch.Tensor):  # which cannot be looked at
            clipper.decide(norm)
            assert clipper.step_was_skipped

    @pytest.mark.parametrize("norm", [torch.ones(3), torch.ones(0), torch.ones(2, 2, device="meta"), [1.0], None, "1"])
    def test_other_things_than_a_norm_are_refused(self, norm):
        clipper = ZClip()
        with pytest.raises(TypeError, match="norm must be a number or a tensor of one element, got"):
            clipper.decide(norm)
        assert clipper.state_dict() == ZClip().state_dict()

    def test_a_norm_that_autograd_knows(self):
        assert ZClip(max_grad_norm=1.0).decide(torch.tensor(4.0, requires_grad=True)) == 0.25

    def test_it_is_one_norm(self):
        with pytest.raises(ValueError, match="scope must be 'global', not 'group'"):
            ZClip(scope="group").decide(1.0)


@pytest.mark.parametrize("before", [None, 0.1])
def test_lookback_goes_on_from_a_checkpoint_of_any_rule(before):
    p = torch.nn.Parameter(torch.zeros(3))
    norms = [1.0, 1.1, 0.9, 1.05] * 15

    def trained(clipper, norms):
        for norm in norms:
            set_gradients([p], norm)
            clipper.step([p])
        return clipper

    state = trained(ZClip(lookback=before), norms).state_dict()
    resumed = ZClip(lookback=0.1)
    resumed.load_state_dict(state)
    metrics = trained(resumed, [30.0]).metrics
    assert metrics.clipped_norm < 1.5
    if before == 0.1:
        assert metrics.clipped_norm == pytest.approx(trained(ZClip(lookback=0.1), [*norms, 30.0]).metrics.clipped_norm)
