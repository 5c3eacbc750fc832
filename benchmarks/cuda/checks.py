"""What must hold on the path of accelerators: checks with names, each of which raises where it does not hold.

They know no device by name, but for the two that torch.cuda has to be asked about: waiting, and graphs.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from benchmarks.cuda.attempts import NotTriedError, reason
from benchmarks.overhead import NEVER, Size, with_gradients
from zclip_optim import ZClipOptimizer, ZClipWarning, running
from zclip_optim.algorithm import NormStats, ZClipConfig
from zclip_optim.running import DeviceState, HostState
from zclip_optim.state import Counters, SavedState, StepRecord, fresh_records

SHAPES = ((64, 48), (48,), ())
RATE = 0.1
OPTIONS = {"warmup_steps": 4, "z_skip": 100.0}  # one set: each is compiled anew
WARM_UP, ORDINARY, SPIKE, HUGE = (1.0, 1.1, 0.9, 1.05), 1.02, 3.0, 50.0  # norms, to be decided on in this order
STEPS = (
    *(("warm-up", norm) for norm in WARM_UP),
    ("ordinary", ORDINARY),
    ("clipped", SPIKE),
    ("skipped spike", HUGE),
    ("skipped NaN", math.nan),
    ("ordinary", ORDINARY),
)
COUNTED = {"step": 8, "clipped_steps": 2, "skipped_steps": 2}  # after STEPS
AFTER_SPIKE = {"interval_steps": 3, "interval_spikes": 1, "interval_skips": 2}
STEADY = (*WARM_UP, ORDINARY)
BEFORE_CAPTURE = 3  # steps
DECIDED = (  # options, scopes
    ({}, 1),
    ({"z_skip": 6.0, "patience": 3, "alpha_down": 0.8, "max_grad_norm": 2.0}, 3),
)
FUSED = (AdamW, Adam, SGD, Adagrad)
LARGE = 1e5  # a norm that float16 cannot hold
OVERFLOW = 1e38  # times a scaled loss is infinite

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"

Check = Callable[[torch.device], None]
Base = Callable[[Any], Optimizer]  # of parameters


@dataclass(frozen=True)
class Outcome:
    """Of one check; the text says what failed, or why it is left out."""

    check: str
    result: str
    text: str = ""


def outcome(name: str, check: Check, device: torch.device) -> Outcome:
    """What comes of a check; the warnings are about the norms that it makes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZClipWarning)
            check(device)
    except NotTriedError as error:
        return Outcome(name, LEFT_OUT, str(error))
    except Exception as error:  # whatever is wrong is what was asked for
        return Outcome(name, FAILED, reason(error))
    return Outcome(name, PASSED)


def expect(holds: bool, otherwise: str) -> None:
    """Raises AssertionError with this text unless it holds."""
    if not holds:
        raise AssertionError(otherwise)


def small_model(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    """The same parameters every time."""
    return with_gradients(Size("small", SHAPES, dtype), device)


def set_gradients(model: nn.Module, norm: float, seed: int) -> None:
    """Random gradients of this norm, where the ones before were in memory."""
    torch.manual_seed(seed)
    gradients = [p.grad.normal_() for p in model.parameters()]
    torch._foreach_mul_(gradients, norm / torch.nn.utils.get_total_norm(gradients).item())


def expect_metrics(optimizer: ZClipOptimizer, **expected: float) -> None:
    """That the metrics of the last step have these values."""
    found = {name: getattr(optimizer.metrics, name) for name in expected}
    expect(found == expected, f"the metrics are {found}, not {expected}")


def host_never_waits(model: nn.Module) -> None:
    """No step of any kind reads anything back, by torch's own detector; the first compiles."""
    optimizer = ZClipOptimizer(AdamW(model.parameters(), fused=True), **OPTIONS)
    for seed, (kind, norm) in enumerate(STEPS):
        set_gradients(model, norm, seed)
        try:
            with waiting_is_an_error() if seed else nullcontext():
                optimizer.step()
        except RuntimeError as error:
            raise AssertionError(f"a step of the kind {kind!r}: {error}") from error
    expect_metrics(optimizer, **COUNTED)
    with waiting_is_an_error():
        optimizer.clipper._records.state.begin_interval()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """What replays a step, captured in a CUDA graph after BEFORE_CAPTURE ordinary ones."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(BEFORE_CAPTURE):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def replays_are_steps(device: torch.device) -> None:
    """Replays of a captured step count, clip and skip as steps do, also within the interval since metrics were read."""
    replayed, stepped = small_model(device), small_model(device)
    ours, eager = (ZClipOptimizer(capturable(model), **OPTIONS) for model in (replayed, stepped))
    for model in (replayed, stepped):
        set_gradients(model, WARM_UP[0], 0)
    replay = captured(ours.step)
    for _ in range(BEFORE_CAPTURE):
        eager.step()
    for seed, (_, norm) in enumerate(STEPS[1:]):
        for model in (replayed, stepped):
            set_gradients(model, norm, seed)
        replay()
        eager.step()
        if norm == SPIKE:
            for optimizer in (eager, ours):
                _ = optimizer.metrics  # ends an interval
    expected = COUNTED | AFTER_SPIKE | {"step": COUNTED["step"] - 1 + BEFORE_CAPTURE}
    for optimizer in (eager, ours):
        expect_metrics(optimizer, **expected)
    torch.testing.assert_close(list(replayed.parameters()), list(stepped.parameters()))


def capturable(model: nn.Module) -> AdamW:
    """An optimizer whose step can be captured."""
    return AdamW(model.parameters(), fused=True, capturable=True)


def norm_series(n_scopes: int) -> list[list[float]]:
    """Norms of every kind, for so many scopes: spikes alone and in a row, none, not finite, huge and tiny."""
    rng = random.Random(0)
    ordinary = [rng.gauss(1, 0.05) for _ in range(8)]
    norms = [*ordinary, 30.0, 1.0, math.nan, 1.02, 0.0, 1.1, math.inf, 1e30, 0.95, *[5.0] * 9, 1.1, 1e-30, 1.0]
    return [[norm * (1 + scope) for scope in range(n_scopes)] for norm in norms]


def new_records(n_scopes: int) -> list[StepRecord]:
    """Before any step."""
    return fresh_records(SavedState([NormStats()] * n_scopes, Counters()))


def compiled_is_eager(device: torch.device) -> None:
    """The decision as it runs here, compiled on accelerators, is the one taken operator by operator."""
    for options, n_scopes in DECIDED:
        config = ZClipConfig(warmup_steps=3, **options)
        ours, eager = (DeviceState(new_records(n_scopes), device) for _ in range(2))
        for values in norm_series(n_scopes):
            norms = torch.tensor(values, dtype=torch.float64, device=device)
            for new_step in (True, False):
                with warnings.catch_warnings():
                    warnings.simplefilter("error", ZClipWarning)  # that it cannot be compiled
                    decided = ours.step(norms, config, new_step)
                expected = running._advance_in_place(eager.values, norms, config, new_step)
                torch.testing.assert_close((*decided, ours.values), (*expected, eager.values), equal_nan=True)


def decision_is_the_hosts(device: torch.device) -> None:
    """The state on the device decides and records as the one on the host does, in Python's numbers."""
    for options, n_scopes in DECIDED:
        config = ZClipConfig(warmup_steps=3, **options)
        ours, host = DeviceState(new_records(n_scopes), device), HostState(new_records(n_scopes))
        for values in norm_series(n_scopes):
            coefs, skip = ours.step(torch.tensor(values, dtype=torch.float64, device=device), config, True)
            expected = host.step(values, config, True)
            torch.testing.assert_close((coefs.tolist(), bool(skip)), expected)
            torch.testing.assert_close(packed(ours), packed(host), equal_nan=True)


def packed(state: DeviceState | HostState) -> list[list[float]]:
    """The records as plain numbers."""
    return [list(map(float, record.pack())) for record in state.read()]


def refuse_missing_kernel(make_base: Base, device: torch.device) -> None:
    """Raises NotTriedError if the bare optimizer cannot step on this device."""
    try:
        make_base(small_model(device).parameters()).step()
    except RuntimeError as error:
        raise NotTriedError(f"without ZClip neither: {error}") from error


def told(base: Optimizer) -> list[dict[str, Tensor]]:
    """What the kernels were told at each step from now on."""
    names = ("grad_scale", "found_inf")
    seen: list[dict[str, Tensor]] = []
    base.register_step_pre_hook(
        lambda optimizer, *_: seen.append({name: vars(optimizer)[name] for name in names if name in vars(optimizer)})
    )
    return seen


def clipping_is_folded(kind: Callable[..., Optimizer], device: torch.device) -> None:
    """A clipped step of the fused kernel is that of the plain optimizer after scaling by hand."""
    make_base = partial(kind, lr=RATE, fused=True)
    refuse_missing_kernel(make_base, device)
    model, by_hand = small_model(device), small_model(device)
    optimizer = ZClipOptimizer(make_base(model.parameters()), **OPTIONS)
    plain = kind(by_hand.parameters(), lr=RATE)
    seen = told(optimizer.base_optimizer)
    for seed, norm in enumerate((*STEADY, SPIKE)):
        for each in (model, by_hand):
            set_gradients(each, norm, seed)
        optimizer.step()
        torch._foreach_mul_([p.grad for p in by_hand], optimizer.metrics.clip_coef)
        plain.step()
    expect_metrics(optimizer, clipped=True, clipped_steps=1, skipped_steps=0)
    expect(all("grad_scale" in each for each in seen), "the kernel was not told to scale")
    expect("grad_scale" not in vars(optimizer.base_optimizer), "what the kernel was told was left behind")
    torch.testing.assert_close([p.grad for p in model], [p.grad for p in by_hand])
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()))


def step_is_left_out(make_base: Base, norm: float, in_kernel: bool, device: torch.device) -> None:
    """A step at this norm changes neither parameters nor the optimizer's state, and counts once.

    Args:
        make_base: the optimizer.
        norm: at which the step must be skipped.
        in_kernel: whether the kernel has to do it, told by found_inf.
        device: of the parameters.
    """
    refuse_missing_kernel(make_base, device)
    model = small_model(device)
    optimizer = ZClipOptimizer(make_base(model.parameters()), **OPTIONS)
    seen = told(optimizer.base_optimizer)
    for seed, ordinary in enumerate(STEADY):
        set_gradients(model, ordinary, seed)
        optimizer.step()
    before = state_of(model, optimizer)
    set_gradients(model, norm, 0)
    optimizer.step()
    torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
    expect_metrics(optimizer, skipped=True, skipped_steps=1)
    if in_kernel:
        flags = [each["found_inf"].item() if "found_inf" in each else None for each in seen]
        expect(flags == [0] * len(STEADY) + [1], f"found_inf at each step was {flags}")
    set_gradients(model, ORDINARY, 0)
    optimizer.step()
    expect_metrics(optimizer, skipped=False, skipped_steps=1)
    expect(not torch.equal(model[0], before[0][0]), "the step after it was left out too")


def state_of(model: nn.Module, optimizer: ZClipOptimizer) -> tuple[list[Tensor], Any]:
    """Copies of the parameters, and of the base optimizer's state."""
    return copy.deepcopy(([p.detach() for p in model.parameters()], optimizer.base_optimizer.state_dict()["state"]))


def sixteen_bits(dtype: torch.dtype, device: torch.device) -> None:
    """The norm of 16-bit gradients is exact above what float16 can hold, and they are clipped to it."""
    model = small_model(device, dtype)
    optimizer = ZClipOptimizer(AdamW(model.parameters(), fused=True), **OPTIONS)
    for seed, norm in enumerate((*STEADY, SPIKE)):
        set_gradients(model, LARGE * norm, seed)
        expected = exact_norm(model)
        optimizer.step()
        torch.testing.assert_close(optimizer.metrics.grad_norm, expected, rtol=1e-5, atol=0)
    expect_metrics(optimizer, clipped=True, clipped_steps=1)
    torch.testing.assert_close(exact_norm(model), optimizer.metrics.clipped_norm, rtol=1e-2, atol=0)
    expect(all(p.isfinite().all() for p in model), "a parameter is not finite")


def exact_norm(model: nn.Module) -> float:
    """Of the gradients, in float64."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()


def scaled_run(wrap: Callable[[Any], Any], device: torch.device) -> tuple[Any, list[float], list[Tensor], float]:
    """Steps under a GradScaler, one of which overflows.

    Returns:
        The optimizer, the scale after each step, the parameters, and the norm of the last gradients without the scale.
    """
    torch.manual_seed(0)
    inputs, model = torch.randn(8, 6).to(device), nn.Linear(6, 4).to(device)
    optimizer = wrap(AdamW(model.parameters(), lr=1e-4, fused=True))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
    scales = []
    for factor in (*WARM_UP, OVERFLOW, ORDINARY, SPIKE):
        optimizer.zero_grad()
        loss = factor * model(inputs).square().mean()
        unscaled = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    norm = torch.nn.utils.get_total_norm(unscaled).item()
    return optimizer, scales, [p.detach() for p in model.parameters()], norm


def works_under_a_scaler(device: torch.device) -> None:
    """GradScaler's run is the bare optimizer's where nothing is clipped; a spike is seen without the scale."""
    _, scales, parameters, _ = scaled_run(lambda base: base, device)
    unclipped, our_scales, our_parameters, norm = scaled_run(partial(ZClipOptimizer, z_thresh=NEVER), device)
    torch.testing.assert_close((our_parameters, our_scales), (parameters, scales))
    torch.testing.assert_close(unclipped.metrics.grad_norm, norm, rtol=1e-5, atol=0)
    clipping = scaled_run(partial(ZClipOptimizer, **OPTIONS), device)[0]
    expect_metrics(unclipped, step=6, skipped_steps=0, clipped=False)
    expect_metrics(clipping, step=6, skipped_steps=0, clipped=True, clipped_steps=1)


CHECKS: dict[str, Check] = {
    "the host never waits": lambda device: host_never_waits(small_model(device)),
    "replays of a captured step count, clip and skip": replays_are_steps,
    "the compiled decision is the eager one": compiled_is_eager,
    "the decision on the device is the host's": decision_is_the_hosts,
    **{f"clipping in the kernel, {kind.__name__}": partial(clipping_is_folded, kind) for kind in FUSED},
    **{
        f"z_skip in the kernel, {kind.__name__}": partial(
            step_is_left_out, partial(kind, lr=RATE, fused=True), HUGE, True
        )
        for kind in FUSED
    },
    "a NaN in the kernel, AdamW": partial(step_is_left_out, partial(AdamW, fused=True), math.nan, True),
    "a NaN, SGD with momentum": partial(step_is_left_out, partial(SGD, lr=RATE, momentum=0.9), math.nan, False),
    "bfloat16 gradients": partial(sixteen_bits, torch.bfloat16),
    "float16 gradients": partial(sixteen_bits, torch.float16),
    "GradScaler": works_under_a_scaler,
}
