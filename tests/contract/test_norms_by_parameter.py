"""Which parameters the norm comes from: names, order, shares, and that they are those of the gradients at hand."""

import math
import re

import pytest
import torch
from torch import nn
from training import make_model, set_gradients

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ParameterNorm, ZClip, ZClipOptimizer


@pytest.fixture(params=["on the CPU", "as on an accelerator"])
def place(request, monkeypatch):
    if request.param != "on the CPU":
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)


def parameter(*gradient):
    p = nn.Parameter(torch.zeros(len(gradient)))
    p.grad = torch.tensor(gradient)
    return p


def optimizer_of(params, **options):
    return ZClipOptimizer(torch.optim.SGD(params, lr=0.1), **options)


def as_tuples(norms):
    return [(name, pytest.approx(norm), pytest.approx(share)) for name, norm, share in norms]


def names(norms):
    return [each.name for each in norms]


@pytest.mark.usefixtures("place")
class TestTheList:
    def test_names_norms_and_shares_the_largest_first(self):
        model = make_model()
        set_gradients(model.parameters(), 3.0)
        norms = optimizer_of(model.named_parameters()).norms_by_parameter()
        expected = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        assert {each.name: each.norm for each in norms} == pytest.approx(expected)
        assert {each.name: each.share for each in norms} == pytest.approx({k: v**2 / 9 for k, v in expected.items()})
        assert names(norms) == sorted(expected, key=expected.get, reverse=True) != list(expected)
        assert math.fsum(each.share for each in norms) == pytest.approx(1, abs=1e-12)
        assert all(type(each) is ParameterNorm and type(each.norm) is type(each.share) is float for each in norms)

    def test_positions_where_there_are_no_names(self):
        groups = [{"params": [parameter(1.0)]}, {"params": [parameter(2.0), parameter(3.0)]}]
        assert as_tuples(optimizer_of(groups).norms_by_parameter()) == [
            ("param_groups[1]['params'][1]", 3.0, 9 / 14),
            ("param_groups[1]['params'][0]", 2.0, 4 / 14),
            ("param_groups[0]['params'][0]", 1.0, 1 / 14),
        ]

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_all_groups_together_whatever_the_scope(self, scope):
        groups = [{"params": [("a", parameter(3.0))]}, {"params": [("b", parameter(4.0))]}]
        assert as_tuples(optimizer_of(groups, scope=scope).norms_by_parameter()) == [("b", 4.0, 0.64), ("a", 3.0, 0.36)]

    def test_limit(self):
        optimizer = optimizer_of([(str(i), parameter(1.0 + i)) for i in range(12)])
        assert names(optimizer.norms_by_parameter()) == [str(i) for i in range(11, 1, -1)]
        assert names(optimizer.norms_by_parameter(2)) == ["11", "10"]
        assert optimizer.norms_by_parameter(2)[0].share == pytest.approx(12**2 / sum(i**2 for i in range(1, 13)))
        assert len(optimizer.norms_by_parameter(None)) == len(optimizer.norms_by_parameter(limit=100)) == 12

    @pytest.mark.parametrize("limit", [0, -1, 2.5, True, "3"])
    def test_a_limit_out_of_range_is_refused(self, limit):
        with pytest.raises(ValueError, match=rf"^limit must be an integer >= 1 or None, got {limit!r}$"):
            optimizer_of([parameter(1.0)]).norms_by_parameter(limit)

    def test_tied_gradients_come_once_and_parameters_without_one_not_at_all(self):
        a, tied, without = parameter(3.0), parameter(0.0), parameter(0.0)
        tied.grad, without.grad = a.grad, None
        optimizer = optimizer_of([("a", a), ("tied", tied), ("without", without), ("zero", parameter(0.0))])
        assert as_tuples(optimizer.norms_by_parameter()) == [("a", 3.0, 1.0), ("zero", 0.0, 0.0)]

    def test_nothing(self):
        p = parameter(1.0)
        p.grad = None
        assert optimizer_of([p]).norms_by_parameter() == []
        assert optimizer_of([("a", parameter(0.0)), ("b", parameter(0.0))]).norms_by_parameter() == [
            ("a", 0.0, 0.0),
            ("b", 0.0, 0.0),
        ]

    def test_those_that_are_not_finite_come_first(self):
        values = {"a": 3.0, "inf": math.inf, "b": 4.0, "nan": math.nan}
        norms = optimizer_of([(name, parameter(1.0 * value)) for name, value in values.items()]).norms_by_parameter()
        assert names(norms) == ["inf", "nan", "b", "a"]
        assert norms[0].norm == math.inf
        assert math.isnan(norms[1].norm)
        assert all(math.isnan(each.share) for each in norms[:2])
        assert [each.share for each in norms[2:]] == pytest.approx([0.64, 0.36])

    @pytest.mark.parametrize("scale", [1e30, 1e-30])
    def test_norms_far_from_one(self, scale):
        norms = optimizer_of([("a", parameter(3 * scale)), ("b", parameter(4 * scale))]).norms_by_parameter()
        assert as_tuples(norms) == [("b", pytest.approx(4 * scale), 0.64), ("a", pytest.approx(3 * scale), 0.36)]


def test_squares_that_overflow_float64():
    p, q = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    p.grad, q.grad = torch.tensor([3e200], dtype=torch.float64), torch.tensor([4e200], dtype=torch.float64)
    assert [each.share for each in optimizer_of([p, q]).norms_by_parameter()] == pytest.approx([0.64, 0.36])


@pytest.mark.usefixtures("place")
def test_after_a_clipped_step_they_are_the_scaled_ones():
    model = make_model()
    optimizer = optimizer_of(model.named_parameters(), warmup_steps=5)
    for norm in (1.0, 1.1, 0.9, 1.0, 1.05):
        set_gradients(model.parameters(), norm)
        optimizer.step()
    set_gradients(model.parameters(), 40.0)
    before = optimizer.norms_by_parameter(None)
    optimizer.step()
    after, metrics = optimizer.norms_by_parameter(None), optimizer.metrics
    assert metrics.clipped
    assert math.hypot(*(each.norm for each in before)) == pytest.approx(40.0)
    assert math.hypot(*(each.norm for each in after)) == pytest.approx(metrics.clipped_norm)
    assert names(after) == names(before)
    assert [each.share for each in after] == pytest.approx([each.share for each in before])
    assert [each.norm for each in after] == pytest.approx([each.norm * metrics.clip_coef for each in before])


@pytest.mark.usefixtures("place")
def test_nothing_changes_by_asking():
    model = make_model()
    optimizer = optimizer_of(model.named_parameters())
    set_gradients(model.parameters(), 2.0)
    optimizer.step()
    before, gradients = optimizer.metrics, [p.grad.clone() for p in model.parameters()]
    optimizer.norms_by_parameter()
    assert optimizer.metrics == before
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))


class TestTheEngine:
    def test_a_module_gives_its_names(self):
        model = make_model()
        set_gradients(model.parameters(), 1.0)
        assert ZClip().norms_by_parameter(model) == optimizer_of(model.named_parameters()).norms_by_parameter()
        assert len(ZClip().norms_by_parameter(model, limit=1)) == 1

    def test_parameters_and_groups(self):
        p, q = parameter(3.0), parameter(4.0)
        first, second = ("param_groups[0]['params'][0]", "param_groups[0]['params'][1]")
        assert names(ZClip().norms_by_parameter(iter([p, q]))) == [second, first]
        assert names(ZClip().norms_by_parameter(p)) == [first]
        groups = [{"params": [p]}, {"params": [q], "param_names": ["q"]}]
        assert names(ZClip().norms_by_parameter(groups)) == ["q", first]
        with pytest.raises(ValueError, match="limit must be"):
            ZClip().norms_by_parameter(p, 0)


class TestGroupsThatWereEditedByHand:
    """The names of an optimizer made with `named_parameters()` are those of the parameters that it was made with."""

    def make(self, **options):
        model = make_model()
        return model, ZClipOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), **options)

    def test_a_parameter_without_a_name(self):
        model, optimizer = self.make(nonfinite="raise")
        extra = nn.Parameter(torch.ones(2))
        optimizer.param_groups[0]["params"].append(extra)
        set_gradients([*model.parameters(), extra], 1.0)
        names = {each.name for each in optimizer.norms_by_parameter()}
        assert names == {f"param_groups[0]['params'][{i}]" for i in range(5)}
        extra.grad.fill_(math.nan)
        with pytest.raises(NonFiniteGradientError, match=re.escape("param_groups[0]['params'][4] (2,)")):
            optimizer.step()

    def test_names_of_others(self):
        model, optimizer = self.make()
        del optimizer.param_groups[0]["params"][0]
        set_gradients(model.parameters(), 1.0)
        names = {each.name for each in optimizer.norms_by_parameter()}
        assert names == {f"param_groups[0]['params'][{i}]" for i in range(3)}
        del optimizer.param_groups[0]["param_names"][0]
        assert {each.name for each in optimizer.norms_by_parameter()} == {"0.bias", "2.weight", "2.bias"}
