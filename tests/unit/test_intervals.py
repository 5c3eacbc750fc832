"""What metrics tell of the steps since they were last read, on the host and on the path of accelerators."""

import copy
import math
import pickle

import pytest
import torch
from training import set_gradients

import zclip_optim.gradients
from zclip_optim import ZClip, ZClipOptimizer
from zclip_optim.integrations import LOGGED, ShareLog, metrics_to_log

CALM = [1.0, 1.1, 0.9, 1.05] * 2
NAMES = ("steps", "max_norm", "min_coef", "spikes", "skips")


@pytest.fixture(params=[False, True], ids=["host", "device"], autouse=True)
def anywhere(request, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: request.param)


def make(n_groups=1, **options):
    """A clipper after an ordinary start that was read, and the param groups that it clips."""
    clipper = ZClip(warmup_steps=4, scope="group" if n_groups > 1 else "global", **options)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]} for _ in range(n_groups)]
    take(clipper, groups, *CALM)
    _ = clipper.metrics
    return clipper, groups


def take(clipper, groups, *norms):
    """A step at each of the norms; one for all groups, or one for each."""
    for norm in norms:
        for i, group in enumerate(groups):
            set_gradients(group["params"], norm[i] if isinstance(norm, tuple) else norm)
        clipper.step(groups)


def interval(metrics):
    return tuple(getattr(metrics, f"interval_{name}") for name in NAMES)


def approx(*values):
    return pytest.approx(values, nan_ok=True)


def test_of_the_steps_since_the_last_reading():
    clipper, groups = make()
    take(clipper, groups, 1.0, 30.0)
    coef = copy.deepcopy(clipper).metrics.clip_coef
    assert coef < 0.1
    take(clipper, groups, 1.1, 1.0)
    metrics = clipper.metrics
    assert not metrics.clipped
    assert interval(metrics) == approx(4, 30.0, coef, 1, 0)
    take(clipper, groups, 1.1, 1.0)
    assert interval(clipper.metrics) == approx(2, 1.1, 1.0, 0, 0)


def test_the_first_one_begins_with_the_first_step():
    clipper, p = ZClip(max_grad_norm=1.0), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert interval(clipper.metrics) == approx(0, math.nan, 1.0, 0, 0)
    take(clipper, [{"params": [p]}], 0.5, 4.0, 2.0)
    assert interval(clipper.metrics) == approx(3, 4.0, 0.25, 0, 0)  # the cap makes no spike


def test_reading_again_at_the_same_step_gives_the_same():
    clipper, groups = make()
    take(clipper, groups, 30.0, 1.0)
    first = clipper.metrics.as_dict()
    assert first["zclip/interval_spikes"] == 1
    for read in (lambda: clipper.metrics, lambda: clipper.group_metrics[0]):
        assert read().as_dict() == first
    clipper.state_dict()
    assert clipper.metrics.as_dict() == first


def test_nothing_but_metrics_ends_an_interval():
    clipper, groups = make()
    take(clipper, groups, 30.0)
    for look in (
        lambda: clipper.step_was_skipped,
        clipper.state_dict,
        lambda: clipper.norms_by_parameter(groups),
        lambda: repr(clipper),
        lambda: copy.deepcopy(clipper).metrics,
        lambda: pickle.loads(pickle.dumps(clipper)).metrics,
        lambda: metrics_to_log(clipper),
    ):
        look()
        take(clipper, groups, 1.0)
    assert interval(clipper.metrics)[:2] == approx(8, 30.0)


def test_a_log_has_an_interval_of_its_own():
    clipper, groups = make()
    metrics_to_log(clipper)
    for norm in (1.0, 30.0, 1.1, math.nan, 1.0):
        take(clipper, groups, norm)
        assert clipper.metrics.interval_steps == 1
    logged = metrics_to_log(clipper)
    assert [logged[f"zclip/interval_{name}"] for name in NAMES] == approx(
        5, 30.0, logged["zclip/interval_min_coef"], 1, 1
    )
    assert logged["zclip/interval_min_coef"] < 0.1
    assert metrics_to_log(clipper) == logged
    take(clipper, groups, 1.0)
    assert metrics_to_log(clipper)["zclip/interval_steps"] == 1
    take(clipper, groups, 1.0)
    assert interval(clipper.metrics)[:2] == approx(2, 1.0)  # the log has read in between


def test_looking_for_shares_ends_none():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=4)
    ShareLog(optimizer, model, 1)
    for norm in (*CALM, 30.0, 1.0):
        set_gradients(model.parameters(), norm)
        optimizer.step()
    assert interval(optimizer.metrics)[:2] == pytest.approx((10, 30.0))


def test_norms_that_are_no_numbers_or_none():
    clipper, groups = make()
    take(clipper, groups, math.nan, 0.0, math.inf)
    metrics = clipper.metrics
    assert interval(metrics) == approx(3, math.nan, 1.0, 0, 2)
    assert "zclip/interval_max_norm" not in metrics.as_dict()
    take(clipper, groups, math.inf, 1.0, 0.0, math.nan)
    assert interval(clipper.metrics) == approx(4, 1.0, 1.0, 0, 2)
    take(clipper, groups, 1e200, 1.1)  # its square overflows
    assert interval(clipper.metrics) == approx(2, 1.1, 1.0, 0, 1)


def test_steps_that_move_no_counter_begin_one():
    clipper, groups = make(nonfinite="pass")
    take(clipper, groups, 30.0)
    assert clipper.metrics.interval_spikes == 1
    for norm in (0.0, 0.0, math.nan, math.nan):
        take(clipper, groups, norm)
        assert interval(clipper.metrics) == approx(1, math.nan, 1.0, 0, 0)


def test_skipped_spikes():
    clipper, groups = make(z_skip=6.0)
    take(clipper, groups, 50.0, 1.0)
    steps, norm, coef, spikes, skips = interval(clipper.metrics)
    assert (steps, norm, spikes, skips) == approx(2, 50.0, 1, 1)
    assert coef < 0.1


class TestClosures:
    def make(self, **options):
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        base = torch.optim.LBFGS([p], lr=0.1, max_iter=3, tolerance_grad=0, tolerance_change=0)
        return ZClipOptimizer(base, warmup_steps=4, **options), p

    def step(self, optimizer, p, *norms, look=lambda: None):
        left = iter(norms)

        def closure():
            look()
            set_gradients([p], next(left))
            return torch.zeros(())

        optimizer.step(closure)
        return [*left]

    def test_further_evaluations_are_no_steps(self):
        optimizer, p = self.make()
        for norm in CALM:
            assert self.step(optimizer, p, norm, 1.1, 50.0) == []
        assert interval(optimizer.metrics) == approx(8, 1.1, 1.0, 0, 0)

    def test_a_step_that_one_of_them_breaks_is_skipped_once(self):
        optimizer, p = self.make()
        self.step(optimizer, p, 1.0, math.nan, math.nan)
        assert interval(optimizer.metrics) == approx(1, 1.0, 1.0, 0, 1)

    def test_not_even_a_look_from_within_hides_that(self):
        optimizer, p = self.make()
        self.step(optimizer, p, 1.0, math.nan, 1.0, look=lambda: optimizer.metrics)
        assert interval(optimizer.metrics)[-1] == 1


class TestGroups:
    def test_each_has_its_own_and_all_have_one(self):
        clipper, groups = make(2)
        take(clipper, groups, (1.0, 30.0), (1.0, 1.0), (40.0, 1.0), (1.0, 0.0))
        first, second = clipper.group_metrics
        assert interval(first) == approx(4, 40.0, first.interval_min_coef, 1, 0)
        assert interval(second) == approx(4, 30.0, second.interval_min_coef, 1, 0)
        assert first.interval_min_coef < second.interval_min_coef < 0.1
        assert interval(clipper.metrics) == approx(4, 50.0, first.interval_min_coef, 1, 0)

    def test_one_without_a_norm_adds_nothing(self):
        clipper, groups = make(2)
        take(clipper, groups, (3.0, 0.0))
        assert clipper.metrics.interval_max_norm == pytest.approx(3.0)
        take(clipper, groups, (0.0, 0.0))
        assert math.isnan(clipper.metrics.interval_max_norm)

    def test_a_norm_that_is_not_finite_skips_the_step_of_all(self):
        clipper, groups = make(2)
        take(clipper, groups, (3.0, math.nan), 1.0)
        assert [interval(each) for each in clipper.group_metrics] == [approx(2, 1.0, 1.0, 0, 1)] * 2

    def test_it_follows_its_group(self):
        clipper, groups = make(3)
        take(clipper, groups, (1.0, 1.0, 30.0))
        metrics_to_log(clipper)  # what it has read is kept for metrics
        take(clipper, groups, (1.0, 20.0, 1.0))
        del groups[0]
        groups.reverse()
        groups.append({"params": [torch.nn.Parameter(torch.zeros(3))]})
        take(clipper, groups, 1.0)
        assert [m.interval_spikes for m in clipper.group_metrics] == [1, 1, 0]
        assert [m.interval_max_norm for m in clipper.group_metrics] == pytest.approx([30.0, 20.0, 1.0])
        assert [m.interval_steps for m in clipper.group_metrics] == [3, 3, 1]
        assert metrics_to_log(clipper)["zclip/interval_steps"] == 2


class TestSavedState:
    def test_a_load_begins_a_new_one(self):
        clipper, groups = make()
        take(clipper, groups, 30.0, 1.0)
        assert "interval" not in repr(clipper.state_dict())
        assert metrics_to_log(clipper)["zclip/interval_spikes"] == 1
        take(clipper, groups, 30.0)
        clipper.load_state_dict(clipper.state_dict())
        assert interval(clipper.metrics) == approx(0, math.nan, 1.0, 0, 0)
        take(clipper, groups, 1.1)
        assert interval(clipper.metrics) == approx(1, 1.1, 1.0, 0, 0)
        assert metrics_to_log(clipper)["zclip/interval_steps"] == 1

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda clipper: pickle.loads(pickle.dumps(clipper))])
    def test_a_copy_goes_on_with_it(self, copied):
        clipper, groups = make()
        take(clipper, groups, 30.0)
        twin = copied(clipper)
        take(twin, groups, 1.0)
        assert interval(twin.metrics)[:2] == approx(2, 30.0)
        assert interval(clipper.metrics)[:2] == approx(1, 30.0)

    def test_it_moves_to_an_accelerator(self, monkeypatch):
        clipper, groups = make()
        take(clipper, groups, 30.0)
        for stays in (True, False):
            monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor, stays=stays: stays)
            take(clipper, groups, 1.0)
        assert interval(clipper.metrics)[:2] == approx(3, 30.0)


def test_they_are_logged_with_the_counters():
    assert {*(f"interval_{name}" for name in NAMES), "clipped_steps", "spike_steps", "skipped_steps"} <= {*LOGGED}
