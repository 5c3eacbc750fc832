"""ClipMetrics as loggers take it."""

import json
import math

import torch
from training import make_model, set_gradients, train

from zclip_optim import ZClip, ZClipOptimizer
from zclip_optim.metrics import ClipMetrics


def test_as_dict_is_flat_and_all_floats():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), warmup_steps=2)
    train(model, optimizer, range(4))
    values = optimizer.metrics.as_dict()
    assert list(values) == [f"zclip/{name}" for name in ClipMetrics.__dataclass_fields__]
    assert all(type(value) is float for value in values.values())
    assert values["zclip/step"] == 4.0
    assert "clip/step" in ZClip().metrics.as_dict(prefix="clip/")


def test_as_dict_is_strict_json_from_the_first_step_on():
    """What is no number, or not yet, is left out, of steps of every kind."""
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = ZClip(warmup_steps=2)
    left_out = [set(ClipMetrics.__dataclass_fields__) - {key[6:] for key in clipper.metrics.as_dict()}]
    for norm in (1.0, 1.1, 1.2, math.nan, math.inf, 0.0):
        set_gradients([p], norm)
        clipper.step([p])
        values = clipper.metrics.as_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
        left_out.append({name for name in ClipMetrics.__dataclass_fields__ if f"zclip/{name}" not in values})
    tests, no_norm = {"threshold", "z_score"}, {"z_score", "interval_max_norm"}
    not_finite = {"grad_norm", "clipped_norm"} | no_norm
    assert left_out == [not_finite | tests, tests, tests, set(), not_finite, not_finite, no_norm]


def test_repr_is_one_line_of_a_few_digits():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert repr(optimizer.metrics).startswith("ClipMetrics(grad_norm=nan, clipped_norm=nan, threshold=nan")
    set_gradients(model.parameters(), 1 / 3)
    optimizer.step()
    assert repr(optimizer.metrics) == (
        "ClipMetrics(grad_norm=0.3333, clipped_norm=0.3333, threshold=inf, z_score=nan, clip_coef=1, mean=0.3333, "
        "std=0, clipped=False, is_spike=False, skipped=False, step=1, clipped_steps=0, spike_steps=0, "
        "skipped_steps=0, clip_rate=0, spike_rate=0, consecutive_spikes=0, interval_steps=1, "
        "interval_max_norm=0.3333, interval_min_coef=1, interval_spikes=0, interval_skips=0)"
    )


def test_records_of_the_same_step_are_equal():
    """As tuples, which Python 3.12 compares, and field by field, as 3.13 does: NaN differs from itself only there."""

    def after_one_step(norm):
        model = make_model()
        clipper = ZClip()
        set_gradients(model.parameters(), norm)
        clipper.step(model)
        return clipper.metrics

    metrics, twin, other = after_one_step(1.0), after_one_step(1.0), after_one_step(2.0)
    assert math.isnan(metrics.z_score)
    assert metrics == metrics
    assert metrics == twin
    assert {metrics, twin} == {metrics}
    assert metrics != other
    values = {name: getattr(metrics, name) for name in ClipMetrics.__dataclass_fields__}
    for name, value in values.items():
        again = float("nan") if value != value else value  # another NaN, as a device's are
        assert ClipMetrics(**values | {name: again}) == metrics
        is_same = name.startswith("interval_")  # which depends on who has read when
        assert (ClipMetrics(**values | {name: -1.0}) == metrics) == is_same
    assert metrics != tuple(values.values())


def test_counters_survive_resume():
    def make():
        model = make_model()
        return model, ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), warmup_steps=10, max_grad_norm=2.0)

    def run(model, optimizer, steps):
        for step in steps:
            train(model, optimizer, [step], outliers=[20, 21, 40])
            if step in (15, 45):
                model[0].weight.grad[0, 0] = math.nan
                optimizer.step()

    (whole, reference), (half, optimizer), (resumed, again) = make(), make(), make()
    run(whole, reference, range(50))
    run(half, optimizer, range(22))
    resumed.load_state_dict(half.state_dict())
    again.load_state_dict(optimizer.state_dict())
    run(resumed, again, range(22, 50))
    assert again.metrics == reference.metrics
    assert again.metrics.skipped_steps == 2
    assert again.metrics.clipped_steps > again.metrics.spike_steps > optimizer.metrics.spike_steps > 0
    assert again.metrics.spike_rate == again.metrics.spike_steps / 40
    assert again.metrics.clip_rate == again.metrics.clipped_steps / 50
