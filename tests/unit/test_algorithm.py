"""The algorithm against the oracle, on Python floats and on 0-d tensors, and the validation of its arguments."""

import math
import random
import statistics

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ReferenceZClip
from thoroughness import thorough

from zclip_optim.algorithm import NormStats, ZClipConfig, decide

OPTIONS = {
    "defaults": {},
    "mean": {"clip_option": "mean"},
    "max": {"clip_option": "max"},
    "reciprocal": {"clip_option": "reciprocal"},
    "percentile": {"mode": "percentile"},
    "percentile 0.99": {"mode": "percentile", "percentile": 0.99},
    "clip_factor 0.3": {"clip_factor": 0.3},
    "clip_factor 3": {"clip_factor": 3.0},
    "cap": {"max_grad_norm": 1.05},
    "cap and mean": {"max_grad_norm": 1.02, "clip_option": "mean"},
    "skip_update_on_spike": {"skip_update_on_spike": True},
    "skip_update_on_spike, patience": {"skip_update_on_spike": True, "patience": 15},
    "warmup 1": {"warmup_steps": 1},
    "warmup 3": {"warmup_steps": 3},
    "warmup 100": {"warmup_steps": 100},
    "patience 1": {"patience": 1},
    "patience 5, mean": {"patience": 5, "clip_option": "mean"},
    "patience 20": {"patience": 20},
    "alpha_down": {"alpha_down": 0.8},
    "alpha_down 0, warmup 100": {"alpha_down": 0.0, "warmup_steps": 100},
    "alpha_down, patience": {"alpha_down": 0.8, "patience": 15},
    "z_skip": {"z_skip": 6.0},
    "z_skip, alpha_down, cap": {"z_skip": 10.0, "alpha_down": 0.8, "max_grad_norm": 1.02},
    "lookback": {"lookback": 0.1},
    "lookback 0.05, alpha_down": {"lookback": 0.05, "alpha_down": 0.9},
    "lookback, warmup 1": {"lookback": 0.2, "warmup_steps": 1},
    "lookback 1, warmup 3": {"lookback": 1.0, "warmup_steps": 3, "alpha": 0.99},
    "lookback, warmup 100": {"lookback": 0.5, "warmup_steps": 100},
    "lookback, all others": {
        "lookback": 0.1,
        "alpha_down": 0.8,
        "patience": 15,
        "z_skip": 6.0,
        "max_grad_norm": 1.02,
    },
    "lookback, skip_update_on_spike": {"lookback": 0.1, "skip_update_on_spike": True, "clip_option": "mean"},
    "alpha 0": {"alpha": 0.0},
    "alpha 0.9, z 1.5": {"alpha": 0.9, "z_thresh": 1.5},
    "eps 0": {"eps": 0.0},
    "eps 0.1": {"eps": 0.1},
}


def norm_sequence(kind, seed, steps=300):
    rng = random.Random(f"{kind}{seed}")
    norms = [max(0.05, rng.gauss(1.0, 0.05)) for _ in range(steps)]
    if kind == "single spikes":
        for i in rng.sample(range(steps), 12):
            norms[i] *= 10 ** rng.uniform(0.1, 3)
    elif kind == "bursts":
        for start in rng.sample(range(30, steps - 40), 3):
            for i in range(start, start + rng.randrange(2, 40)):
                norms[i] *= 8
    elif kind == "level shifts":
        level = 1.0
        for i in range(steps):
            level *= rng.choice([0.2, 1.5, 10.0]) if i % 75 == 74 else 1.0
            norms[i] *= level
    elif kind == "zeros and non-finite":
        for i in rng.sample(range(steps), 30):
            norms[i] = rng.choice([0.0, math.inf, math.nan, 1e200])
    return norms


KINDS = ["plain", "single spikes", "bursts", "level shifts", "zeros and non-finite"]


def scaled_options(options, scale):
    return {name: value * scale if name == "max_grad_norm" else value for name, value in options.items()}


def assert_close(actual, expected):
    assert float(actual) == pytest.approx(float(expected), rel=1e-9, abs=0, nan_ok=True)


@pytest.mark.parametrize("scale", [1.0, thorough(1e-7), thorough(1e5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_follows_the_oracle(options, kind, scale):
    options = scaled_options(options, scale)
    reference, config, stats = ReferenceZClip(**options), ZClipConfig(**options), NormStats()
    spikes = clipped = 0
    for norm in norm_sequence(kind, seed=1):
        expected = reference.step(norm * scale)
        decision = decide(norm * scale, stats, config)
        stats = decision.stats
        assert decision.is_spike == reference.spike
        assert decision.skip == (reference.skip or not norm < 1e200)
        assert_close(decision.clipped_norm, expected)
        assert_close(decision.clip_coef, expected / (norm * scale) if 0 < norm < 1e200 else 1.0)
        assert_close(stats.mean, reference.mean)
        assert_close(stats.var, reference.var)
        assert stats.streak == reference.streak
        assert stats.spike_steps == reference.spike_steps
        clipped += decision.clip_coef < 1
        assert stats.clipped_steps == clipped
        spikes += decision.is_spike
    if kind in ("single spikes", "bursts") and options.get("warmup_steps", 25) == 25:
        assert spikes > 0


@pytest.mark.parametrize("kind", ["bursts", "zeros and non-finite", *map(thorough, KINDS[:2] + KINDS[3:4])])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tensors_decide_as_floats_do(options, kind):
    config, on_floats = ZClipConfig(**options), NormStats()
    on_tensors = NormStats(
        *(torch.tensor(x, dtype=torch.float64 if i < 2 else torch.int64) for i, x in enumerate(NormStats()))
    )
    for norm in norm_sequence(kind, seed=2, steps=150):
        floats = decide(norm, on_floats, config)
        tensors = decide(torch.tensor(norm, dtype=torch.float64), on_tensors, config)
        on_floats, on_tensors = floats.stats, tensors.stats
        for ours, theirs in zip((*tensors[:-1], *on_tensors), (*floats[:-1], *on_floats), strict=True):
            assert isinstance(ours, torch.Tensor)
            assert ours.shape == ()
            assert_close(ours, theirs)


def run(norms, stats=None, **options):
    config, stats, decisions = ZClipConfig(**options), stats or NormStats(), []
    for norm in norms:
        decisions.append(decide(norm, stats, config))
        stats = decisions[-1].stats
    return decisions


finite_norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=80)
some_options = st.fixed_dictionaries(
    {
        "clip_option": st.sampled_from(["adaptive_scaling", "mean", "max"]),
        "mode": st.sampled_from(["zscore", "percentile"]),
        "z_thresh": st.floats(0.5, 5),
        "alpha": st.floats(0, 0.999),
        "clip_factor": st.floats(0.1, 10),
        "warmup_steps": st.integers(1, 10),
        "skip_update_on_spike": st.booleans(),
        "alpha_down": st.none() | st.just(0.0),
        "lookback": st.none() | st.floats(0.01, 1),
        "z_skip": st.none() | st.floats(5.1, 20),
        "patience": st.none() | st.integers(1, 30),
    }
)


@given(finite_norms, some_options, st.none() | st.floats(1e-3, 1e3))
def test_nothing_is_scaled_up_or_left_above_threshold_and_cap(norms, options, cap):
    for norm, decision in zip(norms, run(norms, max_grad_norm=cap, **options), strict=True):
        assert 0 < decision.clip_coef <= 1
        clipped = decision.clip_coef * norm
        assert clipped <= min(decision.threshold, math.inf if cap is None else cap) * (1 + 1e-12)
        assert clipped == pytest.approx(decision.clipped_norm)
        if not decision.is_spike and (cap is None or norm <= cap):
            assert decision.clip_coef == 1


@given(finite_norms, some_options, st.integers(-60, 60))
def test_scale_free(norms, options, exponent):
    c = 2.0**exponent  # a power of two: every rounding is the same, so no decision can flip
    for one, scaled in zip(run(norms, **options), run([c * norm for norm in norms], **options), strict=True):
        assert (scaled.is_spike, scaled.skip) == (one.is_spike, one.skip)
        assert scaled.threshold == pytest.approx(c * one.threshold)
        assert scaled.clipped_norm == pytest.approx(c * one.clipped_norm)
        assert scaled.z_score == pytest.approx(one.z_score, nan_ok=True)


@given(finite_norms, some_options, st.floats(1e-3, 1e3))
def test_scaling_all_norms_scales_every_threshold(norms, options, c):
    margin = [abs(decision.z_score - options["z_thresh"]) for decision in run(norms, **options)]
    if min((m for m in margin if not math.isnan(m)), default=1.0) < 1e-6:
        return  # so close to the threshold that rounding may decide
    for one, scaled in zip(run(norms, **options), run([c * norm for norm in norms], **options), strict=True):
        assert scaled.is_spike == one.is_spike
        assert scaled.threshold == pytest.approx(c * one.threshold, rel=1e-6)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e155, 1e308])
@pytest.mark.parametrize("before", [0, 10, 30])
def test_zero_and_nonfinite_norms_leave_the_statistics_alone(bad, before):
    stats = run([1.0, 1.1] * (before // 2), max_grad_norm=0.5)[-1].stats if before else NormStats()
    decision = decide(bad, stats, ZClipConfig(max_grad_norm=0.5))
    assert decision.stats == stats
    assert decision.clip_coef == 1
    assert not decision.is_spike


@pytest.mark.parametrize(("dtype", "last"), [(torch.float64, 1e154), (torch.float32, 1.8e19)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_norm_is_so_large_that_the_statistics_overflow(options, dtype, last):
    config, stats = ZClipConfig(**options), NormStats(*torch.zeros(len(NormStats._fields), dtype=dtype))
    norms = [last * 1e-3, last, last * 1.1, last * 0.9, last * 1e-3, last * 10, *[last, last * 0.99] * 20] * 4
    for norm in torch.tensor(norms, dtype=dtype):
        decision = decide(norm, stats, config)
        assert bool(decision.skip) == (not (norm * norm).isfinite()) or "z_skip" in options
        stats = decision.stats
        assert stats.mean.isfinite()
        assert 0 <= stats.var < math.inf
    assert stats.step == sum(norm < last * 10 for norm in norms if dtype is torch.float64 or norm < 1.83e19)


def shifted(noise, shift, steps, before=500):
    rng = random.Random(0)
    return [math.exp(rng.gauss(0, noise)) * (shift if i >= before else 1) for i in range(before + steps)]


@pytest.mark.parametrize("alpha_down", [None, 0.8])
@pytest.mark.parametrize("noise", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("shift", [1.5, 4, 20])
def test_a_lasting_shift_ends_with_patience(shift, noise, alpha_down):
    grace = int(200 + 1000 * math.log2(shift))
    norms = shifted(noise, shift, steps=grace + 2000)
    spikes = [d.is_spike for d in run(norms, patience=200, alpha_down=alpha_down)]
    ordinary = [d.is_spike for d in run(shifted(noise, 1, steps=2000), alpha_down=alpha_down)]
    assert sum(spikes[-2000:]) <= 1.5 * sum(ordinary[-2000:]) + 5


@pytest.mark.parametrize("alpha_down", [None, 0.8])
@pytest.mark.parametrize("shift", [4, 20, 1000])
def test_a_lasting_shift_never_ends_by_the_paper(shift, alpha_down):
    assert all(d.is_spike for d in run(shifted(0.05, shift, steps=3000), alpha_down=alpha_down)[501:])


@pytest.mark.parametrize("patience", [15, 200])
@pytest.mark.parametrize("options", [{}, {"clip_option": "mean"}, {"skip_update_on_spike": True}, {"eps": 1e-3}])
def test_after_patience_the_statistics_double_in_1000_steps(options, patience):
    stats = [d.stats for d in run([1.0, 1.1] * 50 + [1e6] * (patience + 1000), patience=patience, **options)]
    before, after = stats[100 + patience - 1], stats[-1]
    assert after.mean == pytest.approx(2 * before.mean)
    assert after.var**0.5 == pytest.approx(2 * before.var**0.5)


@given(finite_norms, some_options, st.floats(1e3, 1e30), st.integers(1, 80))
def test_in_a_streak_past_patience_no_statistic_rises_faster(norms, options, level, length):
    before = run(norms, **options)[-1].stats
    decisions = run([norm * level for norm in [1e6] * length], before, **options)
    for old, new in zip([before, *(d.stats for d in decisions)], decisions, strict=False):
        if options["patience"] is not None and new.is_spike and old.streak >= options["patience"]:
            assert new.stats.mean <= old.mean * 2**0.001 * (1 + 1e-12)
            assert new.stats.var <= old.var * 2**0.002 * (1 + 1e-12)


def test_patience_reaches_a_level_after_a_warm_up_without_any_spread():
    spikes = [d.is_spike for d in run([1.0] * 25 + shifted(0.05, 1.5, steps=1000, before=0), patience=50)]
    assert all(spikes[25:75])
    assert sum(spikes[-200:]) < 10


@pytest.mark.parametrize("options", [{}, {"clip_option": "mean"}, {"skip_update_on_spike": True}, {"alpha_down": 0.8}])
def test_bursts_of_ten_spikes_change_nothing(options):
    norms = [1.0, 1.1] * 20 + [50.0] * 10 + [1.0, 1.1] * 20
    patient, paper = run(norms, patience=10, **options), run(norms, **options)
    assert patient == paper
    assert [d.is_spike for d in paper] == [40 <= i < 50 for i in range(len(norms))]


def test_a_falling_norm_is_followed_at_once():
    norms = [10.0 * 0.98**i + 1 for i in range(400)]
    slow, fast = ([d.stats.mean for d in run(norms, alpha_down=alpha_down)] for alpha_down in (None, 0.8))
    assert slow[100] > 1.3 * norms[100]
    assert fast[100] < 1.1 * norms[100]


def test_alpha_down_of_alpha_is_the_paper_after_warm_up():
    stats = run([1.0, 1.1] * 20)[-1].stats
    norms = shifted(0.3, 1, steps=500)
    ours, paper = run(norms, stats, alpha_down=0.97), run(norms, stats)
    assert [d.is_spike for d in ours] == [d.is_spike for d in paper]
    assert ours[-1].stats.mean == pytest.approx(paper[-1].stats.mean)


def test_lookback_leaves_the_rule_to_alpha_bit_for_bit():
    norms = norm_sequence("single spikes", seed=3, steps=400)
    before = run(norms[:324], lookback=0.1)[-1].stats
    assert run(norms[324:], before, lookback=0.1) == run(norms[324:], before)
    young = run(norms[:322], lookback=0.1)[-1].stats
    assert run([1.0], young, lookback=0.1) != run([1.0], young)


@given(finite_norms, st.integers(1, 10))
def test_lookback_1_has_the_exact_mean_and_variance_of_what_enters(norms, warmup_steps):
    entered, stats = [], NormStats()
    for decision in run(norms, lookback=1.0, alpha=0.999, warmup_steps=warmup_steps):
        is_common = decision.is_spike and decision.stats.spike_steps > (stats.step - warmup_steps + 11) / 5
        entered.append(stats.mean + 2.5 * stats.var**0.5 if is_common else decision.clipped_norm)
        stats = decision.stats
        assert stats.mean == pytest.approx(statistics.fmean(entered))
        assert stats.var == pytest.approx(statistics.pvariance(entered), rel=1e-6, abs=1e-9 * max(norms) ** 2)


@pytest.mark.parametrize("where", [0, 5, 12, 20, 24])
@pytest.mark.parametrize("alpha_down", [None, 0.9])
def test_one_norm_at_the_start_does_not_blind_lookback(where, alpha_down):
    norms = norm_sequence("plain", seed=4, steps=600)
    norms[where] *= 1e4

    def first_caught(**options):
        stats = [NormStats(), *(d.stats for d in run(norms, alpha_down=alpha_down, **options))]
        return next((i for i, each in enumerate(stats) if decide(20.0, each, ZClipConfig(**options)).is_spike), 600)

    assert first_caught(lookback=0.1) <= 150
    assert first_caught() > 300


def test_what_is_common_widens_the_spread_until_it_is_inside():
    rng = random.Random(5)
    norms = [max(0.05, rng.gauss(1.0, 0.05)) * (20 if i % 2 and i > 24 else 1) for i in range(324)]
    spikes = [d.is_spike for d in run(norms, lookback=0.1)]
    assert all(spikes[25:31:2])
    assert not any(spikes[100:])
    assert sum(d.is_spike for d in run(norms)) > 100  # the paper: every other step


def test_spikes_above_z_skip_are_skipped_three_times_in_a_row_and_count_as_clipped():
    norms = [1.0, 1.1] * 20 + [1.2] + [1.05] + [50.0] * 5 + [1.05] + [50.0]
    skipping, clipping = run(norms, z_skip=6.0), run(norms)
    assert [i for i, d in enumerate(skipping) if d.skip] == [42, 43, 44, 48]
    assert [d._replace(skip=False) for d in skipping] == clipping
    assert not skipping[40].skip  # a spike, of a z-score below z_skip
    assert skipping[40].is_spike


BAD = {
    "alpha": ([-0.1, 1, 1.5, math.nan, "0.9", None, True], "0 <= alpha < 1"),
    "z_thresh": ([0, -1, math.inf, math.nan, "2", None, False], "finite number > 0"),
    "mode": (["z", None, 3], "one of 'zscore', 'percentile'"),
    "clip_option": (["min", None, 1], "one of 'adaptive_scaling', 'reciprocal', 'mean', 'max'"),
    "percentile": ([0.5, 1, 0.2, 99, math.nan, "0.9"], "0.5 < percentile < 1"),
    "clip_factor": ([0, -1, math.inf, None, "1"], "finite number > 0"),
    "max_grad_norm": ([0, -1.0, math.inf, math.nan, "1", True], "finite number > 0 or None"),
    "warmup_steps": ([0, -1, 2.5, 25.0, "25", None, True], "integer >= 1"),
    "eps": ([-1e-9, math.inf, math.nan, None, "0"], "finite number >= 0"),
    "skip_update_on_spike": ([0, 1, None, "yes"], "True or False"),
    "patience": ([0, -1, 1.5, "5", True], "integer >= 1 or None"),
    "lookback": ([0, -0.1, 1.01, math.nan, "0.1", True], "0 < lookback <= 1 or None"),
    "alpha_down": ([-0.1, math.nan, "0.8", True], "0 <= alpha_down <= alpha or None"),
    "z_skip": ([0, -1, math.inf, "6", True], "finite number > z_thresh or None"),
    "nonfinite": (["ignore", None, 0], "one of 'skip', 'raise', 'pass'"),
    "max_consecutive_nonfinite": ([0, -3, 2.0, "5", False], "integer >= 1 or None"),
    "scope": (["layer", None, 1], "one of 'global', 'group'"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in BAD.items() for value in values])
def test_bad_arguments_are_refused_by_name_value_and_range(name, value):
    with pytest.raises(ValueError, match="must be") as error:
        ZClipConfig(**{"mode": "percentile", name: value} if name == "percentile" else {name: value})
    assert str(error.value).startswith(f"{name} must be ")
    assert BAD[name][1] in str(error.value)
    assert str(error.value).endswith(f"got {value!r}")


def test_numbers_too_large_for_a_float_are_out_of_range():
    with pytest.raises(ValueError, match="z_thresh must be a finite number > 0"):
        ZClipConfig(z_thresh=10**400)


@pytest.mark.parametrize("z_thresh", [1e200, 1.7e308])
def test_a_threshold_out_of_reach_never_clips(z_thresh):
    decisions = run([1.0, 1.1, 0.9] * 10 + [1e30], z_thresh=z_thresh)
    assert not any(d.is_spike for d in decisions)
    assert decisions[-1].clip_coef == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_down": 0.98}, r"alpha_down must be at most alpha=0\.97, got 0\.98"),
        ({"alpha": 0.5, "alpha_down": 0.6}, r"alpha_down must be at most alpha=0\.5, got 0\.6"),
        ({"z_skip": 2.5}, r"z_skip must be above z_thresh=2\.5, got 2\.5"),
        ({"mode": "percentile", "percentile": 0.9999, "z_skip": 3}, r"z_skip must be above z_thresh=3\.7"),
    ],
)
def test_arguments_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        ZClipConfig(**options)


def test_percentile_needs_its_mode():
    with pytest.raises(ValueError, match=r'percentile must be None unless mode="percentile", got 0\.99'):
        ZClipConfig(percentile=0.99)


def test_numbers_of_other_libraries_are_taken():
    config = ZClipConfig(alpha=numpy.float32(0.5), warmup_steps=numpy.int64(7))
    assert (config.alpha, config.warmup_steps) == (0.5, 7)
    assert type(config.warmup_steps) is int


@pytest.mark.parametrize("number", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["floats", "tensors"])
def test_no_spread_and_no_floor(number):
    config = ZClipConfig(warmup_steps=1, eps=0.0)
    stats = decide(number(2.0), NormStats(*map(number, (0.0,) * 5)), config).stats
    assert not decide(number(2.0), stats, config).is_spike
    higher = decide(number(2.1), stats, config)
    assert higher.is_spike
    assert float(higher.clipped_norm) == 2.0
