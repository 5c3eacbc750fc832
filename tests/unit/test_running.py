"""The path of accelerators, run on CPU tensors: the same results as on the host, and nothing read back."""

import copy
import gc
import itertools
import math
import pickle
import random
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from reference import ReferenceZClip
from test_algorithm import OPTIONS
from thoroughness import thorough
from torch.utils._python_dispatch import TorchDispatchMode
from training import backward, make_model, parameters, set_gradients, train

import zclip_optim.algorithm
import zclip_optim.clipper
import zclip_optim.gradients
import zclip_optim.norm
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer, ZClipWarning, running
from zclip_optim.fused import Kernels
from zclip_optim.gradients import scale_gradients_
from zclip_optim.norm import SMALL, device_norm, gradient_norm, wide_dtype
from zclip_optim.running import DeviceState

READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
CPU = torch.device("cpu")


@pytest.fixture
def on_device(monkeypatch):
    """CPU tensors are taken for an accelerator's."""
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func._schema.name in READS
        return func(*args, **(kwargs or {}))


FUSED = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "AdamW, amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, fused=True),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, fused=True),
}


def sgd(params):
    return torch.optim.SGD(params, lr=0.01)


def adam_and_sgd(params):
    adam, rest = torch.optim.Adam(params[:1], lr=0.01, fused=True), params[1:]
    return [adam, torch.optim.SGD(rest, lr=0.01, fused=True)] if rest else [adam]


SKIPS_IN_THE_KERNEL = {name: make for name, make in FUSED.items() if name != "SGD, momentum"}
SKIPS_IN_THE_KERNEL["Adam and SGD"] = adam_and_sgd
NORMS = [1.0, 1.1, 0.9, 1.05, 30.0, 1.0, math.nan, 1.02, 0.0, 1.1, math.inf, 1e30, 0.95, *[5.0] * 9, 1.1, 1e-30]


def make_steps(seed=0, steps=120):
    rng = random.Random(seed)
    norms = [rng.gauss(1, 0.05) * rng.choice([1] * 12 + [3, 20]) for _ in range(steps)]
    return norms[:40] + [math.nan, 0.0] + norms[40:80] + [math.inf, math.nan] + norms[80:] + [4.0] * 40


def run(make_base, norms, dtype=torch.float32, **options):
    """The metrics of every step, and the parameters at the end."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(3, 4), (5,), ()]]
    optimizer = ZClipOptimizer(make_base(params), **options)
    metrics = []
    for norm in norms:
        set_gradients(params, norm)
        optimizer.step()
        metrics.append(optimizer.metrics)
    return metrics, torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("nonfinite", ["skip", thorough("pass")])
def test_every_step_is_that_of_the_host_and_of_the_oracle(options, nonfinite, monkeypatch):
    norms = make_steps()
    on_host, at_the_end = run(sgd, norms, torch.float64, nonfinite=nonfinite, **options)
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
    metrics, parameters = run(sgd, norms, torch.float64, nonfinite=nonfinite, **options)
    oracle = ReferenceZClip(**{k: "adaptive_scaling" if v == "reciprocal" else v for k, v in options.items()})
    for ours, host in zip(metrics, on_host, strict=True):
        assert ours.as_dict() == pytest.approx(host.as_dict(), rel=1e-9, nan_ok=True)
        clipped_norm = oracle.step(host.grad_norm)
        if math.isfinite(host.grad_norm):
            assert (ours.clipped_norm, ours.is_spike) == (pytest.approx(clipped_norm, rel=1e-9), oracle.spike)
    torch.testing.assert_close(parameters, at_the_end, equal_nan=True)


@pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
@pytest.mark.parametrize("make_base", SKIPS_IN_THE_KERNEL.values(), ids=SKIPS_IN_THE_KERNEL.keys())
def test_a_fused_step_reads_nothing_back(make_base, on_device):
    params = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(3))]
    optimizer = ZClipOptimizer(make_base(params), warmup_steps=3, max_consecutive_nonfinite=None)
    for norm in NORMS:
        set_gradients(params, norm)
        with CountReads() as mode:
            optimizer.step()
        assert mode.reads == 0
    with CountReads():
        metrics = optimizer.metrics
    assert (metrics.step, metrics.skipped_steps) == (len(NORMS) - 3, 2)


@pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
@pytest.mark.parametrize(("nonfinite", "reads"), [("pass", 0), ("skip", 1)])
def test_any_other_optimizer_costs_one_read_if_steps_may_be_skipped(nonfinite, reads, on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(sgd([p]), warmup_steps=3, nonfinite=nonfinite)
    for norm in (1.0, 1.1, 1.2, 1.15, 40.0, 1.1):
        set_gradients([p], norm)
        with CountReads() as mode:
            optimizer.step()
        assert mode.reads == reads


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_device_that_nothing_can_be_read_from(scope):
    params = [torch.nn.Parameter(torch.empty(3, 4, device="meta")), torch.nn.Parameter(torch.empty(4, device="meta"))]
    optimizer = ZClipOptimizer(torch.optim.SGD([{"params": [p]} for p in params]), nonfinite="pass", scope=scope)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    with pytest.raises(RuntimeError, match="on the meta device"):
        _ = optimizer.metrics


class WithoutFloat64(TorchDispatchMode):
    """The meta device is taken for one that has no float64, as Intel Arc and MPS have none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype is torch.float64:
                raise RuntimeError("Required aspect fp64 is not supported on the device")
        return result


@pytest.fixture
def without_float64():
    wide_dtype.cache_clear()
    with WithoutFloat64():
        yield
    wide_dtype.cache_clear()


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_device_without_float64_is_asked_once(scope, without_float64):
    params = [torch.nn.Parameter(torch.empty(3, 4, device="meta")), torch.nn.Parameter(torch.empty(4, device="meta"))]
    groups = [{"params": [p]} for p in params]
    optimizer = ZClipOptimizer(torch.optim.SGD(groups), nonfinite="pass", max_grad_norm=1.0, scope=scope)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.step(lambda: None)
    assert wide_dtype.cache_info().misses == 1
    assert ZClip().decide(torch.ones((), device="meta")).dtype is torch.float32
    assert wide_dtype(CPU) is torch.float64


@pytest.mark.parametrize("shape", [(512,), (8192,), (8, 1024)])
def test_nor_is_it_asked_of_one_whose_gradients_the_host_reads(shape, without_float64):
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        gradient_norm([torch.ones(shape, device="meta")] * 9)


def test_a_device_without_memory_is_not_one_without_float64(monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("out of memory")

    wide_dtype.cache_clear()
    monkeypatch.setattr(torch, "ones", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        wide_dtype(CPU)
    monkeypatch.undo()
    assert wide_dtype(CPU) is torch.float64


@pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
@pytest.mark.parametrize("make_base", FUSED.values(), ids=FUSED.keys())
def test_spikes_above_z_skip_are_skipped_as_on_the_host(make_base, nonfinite, monkeypatch):
    norms = [norm for norm in make_steps() if math.isfinite(norm)]
    options = {"z_skip": 6.0, "alpha_down": 0.8, "nonfinite": nonfinite}
    on_host, at_the_end = run(make_base, norms, **options)
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
    metrics, parameters = run(make_base, norms, **options)
    assert [m.skipped for m in metrics] == [m.skipped for m in on_host]
    assert 2 < metrics[-1].skipped_steps < metrics[-1].clipped_steps
    torch.testing.assert_close(parameters, at_the_end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
@pytest.mark.parametrize("make_base", SKIPS_IN_THE_KERNEL.values(), ids=SKIPS_IN_THE_KERNEL.keys())
def test_the_kernel_skips_a_spike_unseen(make_base, nonfinite, on_device):
    p = torch.nn.Parameter(torch.randn(50))
    optimizer = ZClipOptimizer(make_base([p]), warmup_steps=3, z_skip=6.0, nonfinite=nonfinite)
    for norm in (1.0, 1.1, 1.2, 1.1):
        set_gradients([p], norm)
        optimizer.step()
    before, state = p.detach().clone(), repr(optimizer.base_optimizer.state_dict()["state"])
    set_gradients([p], 50.0)
    with CountReads() as mode:
        optimizer.step()
    assert mode.reads == 0
    assert torch.equal(p, before)
    assert repr(optimizer.base_optimizer.state_dict()["state"]) == state
    assert optimizer.step_was_skipped


class CountOperations(TorchDispatchMode):
    """Counts whatever is done with tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_metrics_are_transferred_once_per_step_and_only_if_read(on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(FUSED["AdamW"]([p]))
    for norm in (1.0, 1.1, 1.2):
        set_gradients([p], norm)
        optimizer.step()
    for step in (3, 4):
        with CountOperations() as unread:
            assert "AdamW" in repr(optimizer)
        with CountOperations() as first:
            assert optimizer.metrics.step == step
        with CountOperations() as later:
            assert optimizer.metrics == optimizer.metrics
            assert not optimizer.step_was_skipped
            optimizer.state_dict()
        assert unread.count == later.count == 0
        assert 0 < first.count < 4
        set_gradients([p], 1.0)
        optimizer.step()


@pytest.mark.parametrize("rollback", [False, True])
def test_a_captured_step_is_read_anew_every_time(rollback, on_device, monkeypatch):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(FUSED["AdamW"]([p]))
    set_gradients([p], 1.0)
    with monkeypatch.context() as capturing:
        capturing.setattr(running, "_is_capturing", lambda values: True)
        optimizer.step()
    assert optimizer.metrics.step == 1
    if rollback:
        optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.clipper._records.state
    state.step(torch.ones(1, dtype=torch.float64), optimizer.clipper.config, True)  # a replay: none of our code runs
    assert optimizer.metrics.step == 2


def test_the_interval_of_replays_is_in_the_memory_of_the_graph(on_device, monkeypatch):
    clipper = ZClip(warmup_steps=4, nonfinite="pass")
    with monkeypatch.context() as capturing:
        capturing.setattr(running, "_is_capturing", lambda values: True)
        clipper.decide(torch.ones(()))
    values = clipper._records.state.values
    place = values.data_ptr()

    def replay(*norms):  # none of our code on the host runs
        for norm in norms:
            running._advance_in_place(values, torch.tensor([norm], dtype=torch.float64), clipper.config, True)

    def interval():
        metrics = clipper.metrics
        return metrics.interval_steps, metrics.interval_max_norm, metrics.interval_spikes

    assert interval() == (1, 1.0, 0)
    replay(1.0, 1.1, 1.0, 1.1, 30.0, 1.0)
    assert interval() == interval() == (6, 30.0, 1)
    replay(1.1)
    assert interval() == (1, 1.1, 0)
    assert clipper._records.state.values.data_ptr() == place


def test_the_end_of_an_interval_costs_no_read(on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(FUSED["AdamW"]([p]))
    set_gradients([p], 1.0)
    optimizer.step()
    with CountReads() as mode:
        optimizer.clipper._records.state.begin_interval()
    assert mode.reads == 0


class TestCapture:
    """A step that is captured in a CUDA graph reads nothing: it says so before torch does, and what to do."""

    @pytest.fixture(autouse=True)
    def warmed_up(self, on_device, monkeypatch):
        self.p = torch.nn.Parameter(torch.randn(5))
        set_gradients([self.p], 1.0)
        self.capture = lambda: monkeypatch.setattr(running, "_is_capturing", lambda values: True)

    @pytest.mark.parametrize(
        ("make_base", "options"),
        [
            (sgd, {}),
            (sgd, {"nonfinite": "pass", "z_skip": 6.0}),
            (FUSED["SGD, momentum"], {}),
            (FUSED["AdamW"], {"nonfinite": "raise"}),
            (FUSED["AdamW"], {"scope": "group"}),
            (FUSED["AdamW"], {"max_consecutive_nonfinite": 1}),
        ],
    )
    def test_what_must_look_whether_to_skip_is_refused(self, make_base, options):
        other = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(make_base([{"params": [self.p]}, {"params": [other]}]), **options)
        optimizer.step()
        self.capture()
        with (
            CountReads() as mode,
            pytest.raises(RuntimeError, match=r"nonfinite='pass' without z_skip, or a fused"),
        ):
            optimizer.step()
        assert mode.reads == 0

    @pytest.mark.parametrize(
        ("make_base", "options"),
        [(sgd, {"nonfinite": "pass"}), (FUSED["AdamW"], {}), (FUSED["AdamW"], {"z_skip": 6.0})],
    )
    def test_what_need_not_is_captured(self, make_base, options):
        optimizer = ZClipOptimizer(make_base([self.p]), **options)
        optimizer.step()
        self.capture()
        with CountReads() as mode:
            optimizer.step()
        assert mode.reads == 0

    def test_the_engine_has_decide_for_it(self):
        clipper = ZClip(nonfinite="pass")
        self.capture()
        assert clipper.decide(torch.ones(())) == 1
        with CountReads() as mode, pytest.raises(RuntimeError, match=r"ZClip.step\(\), metrics and state_dict"):
            clipper.step([self.p])
        assert mode.reads == 0

    def test_nothing_is_read_in_between(self):
        optimizer = ZClipOptimizer(FUSED["AdamW"]([self.p]))
        optimizer.step()
        self.capture()
        for read in (lambda: optimizer.metrics, lambda: optimizer.step_was_skipped, optimizer.state_dict):
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                read()


@pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
def test_a_streak_that_is_over_costs_no_further_reads(on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(FUSED["AdamW"]([p]), max_consecutive_nonfinite=3)
    for norm in (math.nan, math.nan):
        set_gradients([p], norm)
        optimizer.step()
    assert optimizer.metrics.skipped_steps == 2
    set_gradients([p], 1.0)
    reads = []
    for _ in range(4):
        with CountReads() as mode:
            optimizer.step()
        reads.append(mode.reads)
    assert reads == [1, 0, 0, 0]


@pytest.mark.parametrize("every", [50, 150, 190, 199, 450])
def test_the_clip_rate_is_seen_however_seldom_metrics_are_read(every, on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(sgd([p]), nonfinite="pass")
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(ZClipWarning, match="steps were clipped"):
        for step in range(1, 901):
            set_gradients([p], 1 + 0.01 * torch.rand((), generator=generator).item() + (step > 30 and step % 3 == 0))
            optimizer.step()
            if step % every == 0:
                _ = optimizer.metrics


def test_warnings_come_with_the_first_reading(on_device):
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = ZClipOptimizer(FUSED["AdamW"]([p]), warmup_steps=10, patience=5)
    set_gradients([p], 1.0)
    for _ in range(50):
        optimizer.step()
    with pytest.warns(ZClipWarning, match="norms of the warm-up were 1"):
        assert optimizer.metrics.step == 50
    for growth in range(2, 250):
        set_gradients([p], 2.0**growth)
        optimizer.step()
    with pytest.warns(ZClipWarning) as caught:
        assert optimizer.metrics.consecutive_spikes > 5
    messages = [str(warning.message) for warning in caught]
    assert any("more than patience=5 spikes in a row" in message for message in messages)
    assert any("of the last 298 steps were clipped, at step 298" in message for message in messages)


class TestFusedKernels:
    @pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
    @pytest.mark.parametrize("make_base", FUSED.values(), ids=FUSED.keys())
    def test_scaling_in_the_kernel_is_scaling_before_it(self, make_base, monkeypatch):
        _, at_the_end = run(make_base, NORMS, warmup_steps=3)
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        metrics, folded = run(make_base, NORMS, warmup_steps=3)
        assert sum(m.clipped for m in metrics) > 3
        torch.testing.assert_close(folded, at_the_end, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("make_base", FUSED.values(), ids=FUSED.keys())
    def test_the_kernel_scales_and_leaves_no_trace(self, make_base, on_device, monkeypatch):
        p = torch.nn.Parameter(torch.randn(50))
        base = make_base([p])
        optimizer = ZClipOptimizer(base, warmup_steps=2)
        seen = []
        step = base.step
        monkeypatch.setattr(base, "step", lambda: seen.append((base.grad_scale.item(), p.grad.norm())) or step())
        for norm in (1.0, 1.1, 40.0):
            set_gradients([p], norm)
            optimizer.step()
        assert seen[1] == (1, pytest.approx(1.1))
        assert seen[2] == (pytest.approx(40 / optimizer.metrics.clipped_norm), pytest.approx(40))  # not scaled yet
        assert p.grad.norm() == pytest.approx(optimizer.metrics.clipped_norm)
        assert not {"grad_scale", "found_inf"} & vars(base).keys()

    def test_nothing_is_left_behind_by_a_step_that_fails(self, on_device, monkeypatch):
        p = torch.nn.Parameter(torch.randn(5))
        base = FUSED["AdamW"]([p])
        monkeypatch.setattr(base, "step", lambda: 1 / 0)
        set_gradients([p], 1.0)
        with pytest.raises(ZeroDivisionError):
            ZClipOptimizer(base).step()
        assert not {"grad_scale", "found_inf"} & vars(base).keys()

    @pytest.mark.parametrize("make_base", FUSED.values(), ids=FUSED.keys())
    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_a_skipped_step_changes_nothing(self, make_base, steps_before, on_device):
        p = torch.nn.Parameter(torch.randn(50))
        base = make_base([p])
        optimizer = ZClipOptimizer(base)
        for _ in range(steps_before):
            set_gradients([p], 1.0)
            optimizer.step()
        before = copy.deepcopy((p.detach(), base.state_dict()["state"]))
        set_gradients([p], math.nan)
        optimizer.step()
        assert optimizer.step_was_skipped
        assert torch.equal(p, before[0])
        if steps_before:
            assert repr(base.state_dict()["state"]) == repr(before[1])
        set_gradients([p], 1.0)
        optimizer.step()
        reference = make_base([torch.nn.Parameter(before[0].clone())])
        reference.load_state_dict({**reference.state_dict(), "state": before[1]})
        reference.param_groups[0]["params"][0].grad = p.grad.clone()
        reference.step()
        assert torch.equal(p, reference.param_groups[0]["params"][0])

    def test_a_gradient_of_two_parameters_is_scaled_once(self, monkeypatch):
        def after_a_spike():
            p, q = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
            optimizer = ZClipOptimizer(FUSED["SGD"]([p, q]), max_grad_norm=0.5)
            p.grad = torch.ones(5)
            q.grad = p.grad
            optimizer.step()
            return torch.stack([p.detach(), q.detach()])

        on_host = after_a_spike()
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        torch.testing.assert_close(after_a_spike(), on_host)

    def test_exact_types_only(self, on_device):
        class Own(torch.optim.AdamW):
            def step(self):
                assert "grad_scale" not in vars(self)
                super().step()

        p = torch.nn.Parameter(torch.randn(50))
        optimizer = ZClipOptimizer(Own([p], fused=True), warmup_steps=1)
        for norm in (1.0, 30.0):
            set_gradients([p], norm)
            optimizer.step()
        assert p.grad.norm() == pytest.approx(optimizer.metrics.clipped_norm)

    @pytest.mark.parametrize("steps_with_closures", [False, True])
    def test_grad_scaler_on_top(self, steps_with_closures, monkeypatch):
        def run_scaled():
            model = make_model()
            optimizer = ZClipOptimizer(FUSED["AdamW"](model.parameters()), warmup_steps=5)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
            for step in range(40):
                model.zero_grad()
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
                loss = model(x).square().mean() * (1e38 if step == 20 else 50 if step % 9 == 8 else 1)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            return optimizer.metrics, scaler.get_scale(), parameters(model)

        on_host = run_scaled()
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        metrics, scale, params = run_scaled()
        assert metrics.clipped_steps > 0
        assert scale == on_host[1]
        assert metrics.as_dict() == pytest.approx(on_host[0].as_dict(), rel=1e-4)
        torch.testing.assert_close(params, on_host[2])

    def test_a_closure_is_folded_too(self, monkeypatch):
        def run_with_closures():
            model = make_model()
            optimizer = ZClipOptimizer(FUSED["AdamW"](model.parameters()), warmup_steps=5)
            for step in range(30):
                with CountReads() as mode:
                    optimizer.step(lambda step=step: backward(model, step, outlier=step == 20))
            return optimizer, mode.reads, parameters(model)

        at_the_end = run_with_closures()[-1]
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
        told = []
        scale = Kernels.scale
        monkeypatch.setattr(Kernels, "scale", lambda kernels, coef: told.append(scale(kernels, coef)) or told[-1])
        optimizer, reads, folded = run_with_closures()
        assert told == [True] * 30
        assert reads == 0
        assert "grad_scale" not in vars(optimizer.base_optimizer)
        torch.testing.assert_close(folded, at_the_end)


def test_every_evaluation_of_a_closure_is_clipped(monkeypatch):
    def run_lbfgs():
        model = make_model(dtype=torch.float64)
        optimizer = ZClipOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4), warmup_steps=3)
        for step in range(12):
            optimizer.step(lambda step=step: backward(model, step, outlier=step == 8))
        return optimizer.metrics.as_dict(), parameters(model)

    metrics, at_the_end = run_lbfgs()
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
    on_device_metrics, on_device_end = run_lbfgs()
    assert on_device_metrics == pytest.approx(metrics, rel=1e-4)
    torch.testing.assert_close(on_device_end, at_the_end)


class TestNonFinite:
    def test_too_many_in_a_row_raise(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]), max_consecutive_nonfinite=3)
        set_gradients([p], math.nan)
        with pytest.warns(ZClipWarning, match="NaN or infinite"):
            optimizer.step(), optimizer.step()
        with pytest.raises(NonFiniteGradientError, match=r"norm is nan, after 0 finite steps, for 3 in a row.*params"):
            optimizer.step()

    def test_inside_fused_kernels_they_raise_once_metrics_were_read(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(FUSED["AdamW"]([p]), max_consecutive_nonfinite=3)
        set_gradients([p], math.nan)
        for _ in range(5):
            optimizer.step()  # nobody knows
        with pytest.warns(ZClipWarning, match="NaN or infinite"):
            assert optimizer.metrics.skipped_steps == 5
        with pytest.raises(NonFiniteGradientError, match="for 6 in a row"):
            optimizer.step()

    def test_raise(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        base = FUSED["AdamW"]([p])
        optimizer = ZClipOptimizer(base, nonfinite="raise")
        set_gradients([p], math.inf)
        with pytest.raises(NonFiniteGradientError, match="norm is inf"):
            optimizer.step()
        assert not {"grad_scale", "found_inf"} & vars(base).keys()


@pytest.mark.parametrize("scope", ["global", "group"])
def test_where_statistics_are_float32_a_norm_whose_square_overflows_is_not_finite(scope, on_device, monkeypatch):
    for module in (zclip_optim.norm, zclip_optim.gradients, running):
        monkeypatch.setattr(module, "wide_dtype", lambda device: torch.float32)
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = ZClipOptimizer(sgd([{"params": [p]} for p in params]), warmup_steps=3, scope=scope)
    for norm in (1.0, 1.1, 1.2, 2.5e19, 1.0):
        set_gradients(params, norm)
        optimizer.step()
        assert optimizer.step_was_skipped == (norm > 1e19)
    other = ZClipOptimizer(sgd([{"params": [p]} for p in params]), scope=scope)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.metrics.step == 4
    assert all(0 < metrics.std < 2 for metrics in other.group_metrics)


class TwoEvaluations(torch.optim.SGD):
    """Like SAM: moves the parameters, and asks for the gradients there."""

    def step(self, closure=None):
        closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
        closure()
        super().step()


@pytest.mark.parametrize("stays", [False, True], ids=["host", "device"])
def test_later_evaluations_that_are_not_finite_count_too(stays, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: stays)
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(TwoEvaluations([p], lr=0.1), max_consecutive_nonfinite=3)
    norms = iter([1.0, math.nan, 1.0, math.nan, 1.0, 1.0, 1.0, math.nan, 1.0, math.nan, 1.0, math.nan])
    with pytest.warns(ZClipWarning, match="NaN or infinite"):
        for _ in range(5):
            optimizer.step(lambda: set_gradients([p], next(norms)))
    with pytest.raises(NonFiniteGradientError, match="for 3 in a row"):
        optimizer.step(lambda: set_gradients([p], next(norms)))
    assert optimizer.metrics.skipped_steps == 5


@pytest.mark.parametrize("stays", [False, True], ids=["host", "device"])
def test_evaluations_of_one_step_count_once(stays, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: stays)
    p = torch.nn.Parameter(torch.randn(5))
    clipper = ZClip()
    for norm, new_step in ((1.0, True), (math.nan, False), (math.nan, False), (math.inf, True), (math.nan, False)):
        set_gradients([p], norm)
        clipper._clip([{"params": [p]}], new_step=new_step)
    assert clipper.metrics.skipped_steps == 2
    assert clipper.state_dict()["groups"][0]["zclip_nonfinite_streak"] == 2


@pytest.mark.parametrize("stays", [False, True], ids=["host", "device"])
def test_a_streak_survives_a_checkpoint_and_ends_with_a_finite_step(stays, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: stays)

    def streak_after(optimizer, norms):
        for norm in norms:
            set_gradients([p], norm)
            optimizer.step()
        return optimizer.state_dict()["param_groups"][0]["zclip_nonfinite_streak"]

    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(sgd([p]))
    assert streak_after(optimizer, [1.0, math.nan, math.nan]) == 2
    resumed = ZClipOptimizer(sgd([p]))
    resumed.load_state_dict(optimizer.state_dict())
    assert streak_after(resumed, [math.nan]) == 3
    assert streak_after(resumed, [1.0]) == 0
    assert streak_after(resumed, [math.nan, 1.0, math.nan]) == 1


class TestState:
    @pytest.mark.parametrize("scope", ["global", "group"])
    @pytest.mark.parametrize(("saved_on", "loaded_on"), [(True, False), (False, True), (True, True)])
    def test_a_checkpoint_moves_between_host_and_device(self, saved_on, loaded_on, scope, monkeypatch):
        def stay(on):
            monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: on)

        def make():
            model = make_model()
            groups = [{"params": [p]} for p in model.parameters()]
            return model, ZClipOptimizer(torch.optim.SGD(groups, lr=0.01), warmup_steps=4, scope=scope)

        outliers = {10, 17}
        stay(False)
        model, optimizer = make()
        expected = parameters(train(model, optimizer, range(25), outliers))
        stay(saved_on)
        model, optimizer = make()
        train(model, optimizer, range(15), outliers)
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        stay(loaded_on)
        model, optimizer = make()
        train(model, optimizer, range(3))
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        torch.testing.assert_close(parameters(train(model, optimizer, range(15, 25), outliers)), expected)

    def test_moving_to_the_host_takes_the_statistics_along(self, monkeypatch):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]))
        for on_device in (True, False, True, True, False, False):
            monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient, on=on_device: on)
            set_gradients([p], 1.0 + on_device)
            optimizer.step()
        assert optimizer.metrics.step == 6
        assert optimizer.metrics.mean == pytest.approx(1.5)

    def test_a_step_without_gradients_stays_there(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]))
        set_gradients([p], 1.0)
        optimizer.step()
        p.grad = None
        with CountReads() as mode:
            optimizer.step()
        assert mode.reads == 1  # whether to skip, as in every step
        assert (optimizer.metrics.step, optimizer.metrics.grad_norm) == (1, 0.0)

    def test_it_keeps_its_place_in_memory(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(FUSED["AdamW"]([p]))
        set_gradients([p], 1.0)
        optimizer.step()
        place = optimizer.clipper._records.state.values.data_ptr()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert optimizer.clipper._records.state.values.data_ptr() == place
        assert optimizer.metrics.step == 2

    def test_it_may_be_made_in_inference_mode(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]))
        set_gradients([p], 1.0)
        with torch.inference_mode():
            optimizer.step()
        optimizer.step()
        assert optimizer.metrics.step == 2

    def test_a_copy_goes_its_own_way(self, on_device):
        p = torch.nn.Parameter(torch.randn(5))
        clipper = ZClip()
        set_gradients([p], 1.0)
        clipper.step([p])
        twin = copy.deepcopy(clipper)
        twin.step([p])
        assert (clipper.metrics.step, twin.metrics.step) == (1, 2)

    def test_added_groups_start_afresh(self, on_device):
        p, q = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
        optimizer = ZClipOptimizer(sgd([p]), scope="group")
        set_gradients([p], 1.0)
        optimizer.step()
        optimizer.add_param_group({"params": [q]})
        set_gradients([p, q], 1.0)
        optimizer.step()
        assert [m.step for m in optimizer.group_metrics] == [2, 1]


GRADIENTS = {
    "float32": lambda: [torch.randn(SMALL + 3), torch.randn(7)],
    "float64": lambda: [torch.randn(100, dtype=torch.float64)],
    "bfloat16": lambda: [torch.randn(1000).bfloat16(), torch.randn(3).bfloat16()],
    "mixed": lambda: [torch.randn(1000).half(), torch.randn(3), torch.randn(8).bfloat16()],
    "complex": lambda: [torch.randn(1000, dtype=torch.complex64), torch.randn(4).to(torch.complex64).conj()],
    "sparse": lambda: [
        torch.sparse_coo_tensor([[0, 1, 1]], torch.randn(3, 4), (5, 4), check_invariants=True),
        torch.randn(3),
    ],
    "squares overflow": lambda: [torch.randn(50) * 1e30, torch.randn(9) * 1e-30],
    "squares vanish": lambda: [torch.randn(50) * 1e-30],
    "empty": lambda: [torch.randn(0), torch.randn(3)],
    "none": list,
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_the_norm_is_that_of_the_host(make):
    gradients = make()
    norm = device_norm(gradients, CPU)
    assert norm.dim() == 0
    assert norm.item() == pytest.approx(gradient_norm(gradients), rel=1e-6)


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("coef", [1.0, 0.5, 0.3])
def test_scaling_by_a_tensor(make, coef):
    gradients = make()
    before = copy.deepcopy(gradients)
    scale_gradients_(gradients, torch.tensor(coef, dtype=torch.float64))
    for ours, original in zip(gradients, before, strict=True):
        factor = torch.tensor(coef, dtype=torch.float64).to(original.dtype)
        assert torch.equal(elements(ours), elements(original) * factor)


def elements(gradient):
    return gradient._values() if gradient.is_sparse else gradient


class TestCompiling:
    @pytest.mark.parametrize("backend", [thorough("eager"), "aot_eager"])
    @pytest.mark.parametrize("n_scopes", [thorough(1), 3])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"z_skip": 6.0, "patience": 3, "alpha_down": 0.8, "max_grad_norm": 2.0, "lookback": 0.1},
            {"nonfinite": "pass", "skip_update_on_spike": True, "clip_option": "mean"},
        ],
        ids=["defaults", "options", "pass"],
    )
    def test_the_compiled_decision_is_the_eager_one(self, backend, n_scopes, options):
        """Torch 2.6 compiles of a named tuple that it is built and unpacked, and nothing else that it can do."""
        config = zclip_optim.algorithm.ZClipConfig(warmup_steps=3, **options)
        torch.compiler.reset()
        compiled = torch.compile(running._advance_in_place, fullgraph=True, dynamic=False, backend=backend)
        states = [DeviceState(ZClip()._records.state.read() * n_scopes, CPU) for _ in range(2)]
        for norm in NORMS:
            norms = norm * torch.linspace(1, 2, n_scopes, dtype=torch.float64)
            for new_step in (True, False):
                eager = running._advance_in_place(states[0].values, norms, config, new_step)
                ours = compiled(states[1].values, norms, config, new_step)
                torch.testing.assert_close((*ours, states[1].values), (*eager, states[0].values), equal_nan=True)

    def test_any_number_of_configurations(self, on_device, monkeypatch):
        compile_ = torch.compile
        monkeypatch.setattr(running, "COMPILED_ON", ("cpu",))
        monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options, backend="eager"))
        running._advance_on.cache_clear()
        p = torch.nn.Parameter(torch.randn(5))
        try:
            for i in range(12):  # more than torch compiles of one function
                optimizer = ZClipOptimizer(sgd([p]), z_thresh=2.0 + i)
                set_gradients([p], 1.0)
                optimizer.step()
                assert optimizer.metrics.step == 1
        finally:
            running._advance_on.cache_clear()

    def test_what_fails_later_is_not_taken_for_a_failure_to_compile(self, on_device, monkeypatch):
        calls = []

        def compile_(function, **options):
            def compiled(*args):
                calls.append(1)
                if len(calls) > 1:
                    raise RuntimeError("an illegal memory access was encountered")
                return function(*args)

            return compiled

        monkeypatch.setattr(running, "COMPILED_ON", ("cpu",))
        monkeypatch.setattr(torch, "compile", compile_)
        running._advance_on.cache_clear()
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]))
        try:
            set_gradients([p], 1.0)
            optimizer.step()
            with pytest.raises(RuntimeError, match="illegal memory access"):
                optimizer.step()
        finally:
            running._advance_on.cache_clear()

    def test_where_compiling_fails_it_runs_as_it_is(self, on_device, monkeypatch):
        def cannot_compile(*args, **kwargs):
            def compiled(*args):
                raise RuntimeError("no Triton here")

            return compiled

        monkeypatch.setattr(running, "COMPILED_ON", ("cpu",))
        monkeypatch.setattr(torch, "compile", cannot_compile)
        running._advance_on.cache_clear()
        p = torch.nn.Parameter(torch.randn(5))
        optimizer = ZClipOptimizer(sgd([p]))
        try:
            set_gradients([p], 1.0)
            with pytest.warns(ZClipWarning, match="no Triton here"):
                optimizer.step()
            optimizer.step()
        finally:
            running._advance_on.cache_clear()
        assert optimizer.metrics.step == 2


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in tensors that were made under it and still existed."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if is_tensor(x) and x.untyped_storage()._cdata not in inputs | self.known:
                self.add(x)
        return result

    def add(self, tensor):
        size, key = tensor.untyped_storage().nbytes(), tensor.untyped_storage()._cdata
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.live -= size


def is_tensor(x):
    return isinstance(x, torch.Tensor)


class TestMemory:
    @pytest.mark.parametrize(
        ("shapes", "dtype", "limit"),
        [
            ([(5000, 4000)], torch.float32, 400_000),  # of 80 MB
            ([(1000, 1000)] * 20, torch.float32, 400_000),
            ([(5000, 4000)], torch.bfloat16, 6_000_000),  # of 40 MB: a chunk in float32
            ([(64, 64)] * 2000, torch.float32, 1_500_000),  # of 33 MB: a batch
        ],
    )
    def test_gradients_are_not_copied_on_the_host(self, shapes, dtype, limit):
        gradients = [torch.ones(shape, dtype=dtype) for shape in shapes]
        with LiveBytes() as mode:
            gradient_norm(gradients)
            scale_gradients_(gradients, 0.5)
        assert 0 < mode.peak < limit

    @pytest.mark.parametrize(
        "gradient",
        [
            torch.ones(4000, 10_000)[:, :5000],
            torch.ones(4000, 10_000, dtype=torch.bfloat16)[:, :5000],
            torch.ones(2000, 5000, dtype=torch.complex64).conj(),
            torch.ones(4000, 5000).t(),
            torch.ones(1).expand(20_000_000),
        ],
        ids=["columns", "columns of 16 bits", "conjugate", "transposed", "expanded"],
    )
    def test_nor_are_those_that_lie_in_memory_otherwise(self, gradient):
        with LiveBytes() as mode:
            norm = gradient_norm([gradient])
        assert norm == pytest.approx(math.sqrt(gradient.numel()))
        assert 0 < mode.peak < 9_000_000  # of 40 to 80 MB

    def test_a_scalar_per_tensor_on_the_device(self, on_device):
        params = [torch.nn.Parameter(torch.ones(100, 100)) for _ in range(50)]
        optimizer = ZClipOptimizer(FUSED["AdamW"](params))
        set_gradients(params, 1.0)
        optimizer.step()
        with LiveBytes() as mode:
            optimizer.clipper._clip(optimizer.param_groups, kernels=Kernels(optimizer.parts))
        assert 0 < mode.peak < 50 * 8 * 2 + 4000

    @pytest.mark.parametrize("stays", [False, True])
    def test_what_is_kept_from_step_to_step_is_small_and_does_not_grow(self, stays, monkeypatch):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: stays)
        p = torch.nn.Parameter(torch.ones(5))
        clipper = ZClip(warmup_steps=2)
        sizes = []
        for norm in (1.0, 1.1, 1.2, 1.3) * 40:
            set_gradients([p], norm)
            clipper.step([p])
            sizes.append(len(pickle.dumps(clipper)))
        assert 100 < sizes[3] < 6000
        assert sizes[-1] < sizes[3] + 100

    @pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
    def test_steps_leave_nothing_behind(self):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = ZClipOptimizer(sgd([p]))
        set_gradients([p], 1.0)
        steps = 1500
        tracemalloc.start()
        try:
            kept = [self.traced(optimizer, steps) for _ in range(8)]
        finally:
            tracemalloc.stop()
        # One object left by each step is 24 bytes or more. Bare `torch._foreach_norm` and SGD fill what Python 3.10
        # keeps of freed objects by up to 2 bytes a step, less each time.
        assert min(after - before for before, after in itertools.pairwise(kept)) < steps

    @staticmethod
    def traced(optimizer, steps):
        for _ in range(steps):
            optimizer.step()
        gc.collect()
        ours = tracemalloc.Filter(True, f"{Path(zclip_optim.clipper.__file__).parent}/*")
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces)


@pytest.mark.parametrize("make_base", SKIPS_IN_THE_KERNEL.values(), ids=SKIPS_IN_THE_KERNEL.keys())
def test_that_no_parameter_has_a_gradient_is_known_without_a_read(make_base, on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(make_base([p]))
    with CountReads() as mode:
        for _ in range(19):
            optimizer.step()
        with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient at the last 20 steps"):
            optimizer.step()
    assert mode.reads == 0


def test_the_default_device_is_not_asked(on_device):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ZClipOptimizer(sgd([p]))
    set_gradients([p], 3.0)
    with torch.device("meta"):
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.metrics.mean == pytest.approx(3.0)
