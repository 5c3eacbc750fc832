"""The running state of a clipper in its two homes: numbers on the host, or one tensor on an accelerator.

Both take a step by the same function, `advance`, which is written once for numbers and tensors as `decide` is, and both
have the same four methods: `step`, `read`, `write` and `begin_interval`.
"""

import functools
import math
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zclip_optim.algorithm import Decision, Scalar, ZClipConfig, decide, where
from zclip_optim.checks import refuse_meta, refuse_to_look, refuse_to_read
from zclip_optim.health import ZClipWarning
from zclip_optim.intervals import Interval
from zclip_optim.norm import wide_dtype
from zclip_optim.state import Counters, StepRecord, was_skipped

COMPILED_ON = ("cuda", "xpu")  # where torch.compile makes one kernel of what are some hundred tiny ones


def advance(
    records: Sequence[StepRecord],
    norms: Sequence[Scalar],
    total: Scalar,
    any_of: Callable[[Sequence[Scalar]], Scalar],
    config: ZClipConfig,
    new_step: bool,
) -> tuple[list[StepRecord], list[Scalar], Scalar]:
    """Take one step, or one further evaluation of a closure within it.

    Args:
        records: of the step before, one per scope; or a single one of tensors with an element per scope.
        norms: of the same kinds.
        total: the norm over all scopes.
        any_of: whether a flag of any scope is set, of flags like `records`.
        config: hyperparameters.
        new_step: False for a further evaluation: it is decided on by the statistics that the step began with, is
            never skipped as a spike, and changes nothing but what is known of norms that are not finite.

    Returns:
        The records of this step, the coefficients, both like `records`, and whether the optimizer must not step.
    """
    square = total * total
    zero = square - square  # NaN, unless it is finite, as `decide` has it
    failed = zero != 0
    refused = failed & (config.nonfinite != "pass")
    coefs, decisions, skips = [], [], []
    for i, record in enumerate(records):  # neither `zip` nor a comprehension, which take longer
        norm = norms[i]
        # If the norm of one scope is not finite, the step is not taken and the statistics of none move.
        seen = norm if failed is False else where(failed, total, norm)
        decision = decide(seen, record.decision.stats if new_step else record.before, config)
        coefs.append(decision.clip_coef)
        skips.append(decision.skip)
        decisions.append(decision)
    if not new_step:
        return [_went_on(record, refused) for record in records], coefs, refused
    skip = any_of(skips)
    begun = []
    for i, decision in enumerate(decisions):
        begun.append(_begun(records[i], norms[i], decision, skip, refused, zero))
    return begun, coefs, skip


def _begun(
    before: StepRecord, norm: Scalar, decided: Decision, skip: Scalar, refused: Scalar, zero: Scalar
) -> StepRecord:
    """The record of a step after its first evaluation; `zero` is NaN if its norm is not finite."""
    _, _, last, failed, counters, steps, max_norm, min_coef, spikes, skips = before
    coef, clipped_norm, threshold, z_score, is_spike, skip_alone, stats = decided
    if skip is not skip_alone:
        decided = Decision(coef, clipped_norm, threshold, z_score, is_spike, skip, stats)
    skipped_steps, streak = counters
    if not (skip is False and refused is False and streak == 0):
        counters = Counters(skipped_steps + skip, streak * (failed != 0) + refused)
    is_largest, is_smallest = norm + zero > max_norm, coef < min_coef
    if is_largest is not False:
        max_norm = where(is_largest, norm, max_norm)
    if is_smallest is not False:
        min_coef = where(is_smallest, coef, min_coef)
    return StepRecord(
        last.stats, norm, decided, refused, counters, steps + 1, max_norm, min_coef, spikes + is_spike, skips + skip
    )


def _went_on(record: StepRecord, refused: Scalar) -> StepRecord:
    """The record after a further evaluation; what is not finite counts once per step."""
    before, norm, decision, failed, (skipped_steps, streak), steps, max_norm, min_coef, spikes, skips = record
    skip = refused & (was_skipped(record) == 0)
    counters = Counters(skipped_steps + skip, streak + (refused & (failed == 0)))
    failed = refused | (failed != 0)
    return StepRecord(before, norm, decision, failed, counters, steps, max_norm, min_coef, spikes, skips + skip)


class HostState:
    """One `StepRecord` per scope, as numbers."""

    device: torch.device | None = None

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self.records, self.n_scopes = list(records), len(records)
        self.unscaled = [1.0] * len(records)  # the coefficients of a step that is not clipped

    def step(self, norms: Sequence[float], config: ZClipConfig, new_step: bool) -> tuple[list[float], bool]:
        """The coefficients, a number for each scope, and whether the optimizer must not step; see `advance`."""
        total = norms[0] if len(norms) == 1 else math.hypot(*norms)
        self.records, coefs, skip = advance(self.records, norms, total, any, config, new_step)
        return coefs, skip

    def read(self) -> list[StepRecord]:
        """The records, one per scope."""
        return self.records

    def write(self, records: Sequence[StepRecord]) -> None:
        """Go on from other records of as many scopes."""
        self.records = list(records)

    def begin_interval(self) -> None:
        """Count from 0 again: somebody has what was counted."""
        _begin_interval_of(self.records)


class DeviceState:
    """One `StepRecord` per scope, in one tensor of shape (values, scopes).

    What a step costs here is kernel launches, as many for one scope as for a hundred; nothing is read back. The tensor
    keeps its place in memory, so a CUDA graph captured around the step goes on from its own results.

    Args:
        records: where to start, one per scope, on the host.
        device: of the gradients.

    Attributes:
        last_read: the records as the host knows them, without waiting.
    """

    def __init__(self, records: Sequence[StepRecord], device: torch.device) -> None:
        self.device, self.n_scopes = device, len(records)
        with torch.inference_mode(False):  # else later steps could not write to it
            self.values = _packed(records).to(device, wide_dtype(device))
            self._nothing = torch.tensor([Interval()], dtype=self.values.dtype, device="cpu").t().to(device)
        self.last_read = list(records)
        self._is_behind = False  # what was read last is not what the device has
        self._was_captured = False  # so there may be steps that nobody here hears of

    @torch.no_grad()
    def step(self, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
        """The same for a tensor of norms: the coefficients in one, and a flag in one of one element."""
        self._was_captured = self._was_captured or self.is_being_captured()
        self._is_behind = True
        return _advance_on(self.device.type, config, len(norms))(self.values, norms, config, new_step)

    def read(self) -> list[StepRecord]:
        """The records on the host, one per scope; waits for the device, but not twice for one step."""
        if self._is_behind:
            refuse_to_read(self.is_being_captured())
            self.last_read = [StepRecord.unpack_numbers(row) for row in self.values.t().tolist()]
            self._is_behind = self._was_captured
        return self.last_read

    def write(self, records: Sequence[StepRecord]) -> None:
        """Go on from other records of as many scopes."""
        self.values.copy_(_packed(records))
        self.last_read = list(records)
        self._is_behind = self._was_captured

    def begin_interval(self) -> None:
        """Count from 0 again: somebody has what was counted, and read. Nothing waits for the device."""
        self.values[-len(self._nothing) :].copy_(self._nothing)
        _begin_interval_of(self.last_read)

    def is_being_captured(self) -> bool:
        """Whether what is done now goes into a CUDA graph, so that nothing can be read."""
        return _is_capturing(self.values)

    def must_skip(self, flag: Tensor) -> bool:
        """Whether the step must be left out: the one thing that is ever read back in a step."""
        refuse_meta(self.device)
        refuse_to_look(self.is_being_captured())
        if flag.item():
            return True
        self.last_read = [record._replace(failed=False) for record in self.last_read]  # that much of them is known
        return False


def _begin_interval_of(records: list[StepRecord]) -> None:
    """In place, so that `Health` takes the list for the one that it has checked."""
    records[:] = [record.with_new_interval() for record in records]


def _is_capturing(values: Tensor) -> bool:
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def _packed(records: Sequence[StepRecord]) -> Tensor:
    rows = [record.pack() for record in records]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").t().contiguous()  # whatever the default device is


Advance = Callable[[Tensor, Tensor, ZClipConfig, bool], tuple[Tensor, Tensor]]


def _advance_in_place(values: Tensor, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
    total = norms if len(norms) == 1 else torch.linalg.vector_norm(norms, keepdim=True)
    records = [StepRecord.unpack(values.unbind())]
    (record,), (coefs,), skip = advance(records, [norms], total, _any_of_tensors, config, new_step)
    zeros = torch.zeros_like(norms)
    values.copy_(torch.stack([zeros + value for value in record.pack()]))
    return coefs, skip


def _any_of_tensors(flags: Sequence[Tensor]) -> Tensor:
    return flags[0].any(0, keepdim=True)


@functools.cache
def _advance_on(device_type: str, config: ZClipConfig, n_scopes: int) -> Advance:
    """`_advance_in_place` as it is fastest on a kind of device; how that is, its first call finds out."""
    return _FirstCompiled() if device_type in COMPILED_ON else _advance_in_place


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as torch.compile leaves it alone, wherever it is called."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function  # type: ignore[no-untyped-call]


class _FirstCompiled:
    """Compiled, or as it is where the first call shows that torch cannot compile it; later errors are the caller's."""

    def __init__(self) -> None:
        # Of a code object of its own: torch compiles each a few times, then gives up.
        own = types.FunctionType(_advance_in_place.__code__.replace(), _advance_in_place.__globals__)
        self._compiled: Advance = torch.compile(own, fullgraph=True, dynamic=False)
        self._chosen: Advance | None = None

    def __call__(self, values: Tensor, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
        if self._chosen is not None:
            return self._chosen(values, norms, config, new_step)
        try:
            result = self._compiled(values, norms, config, new_step)
            self._chosen = self._compiled
        except Exception as error:  # no Triton, no C compiler, an old driver: whatever keeps torch from compiling
            self._chosen = _advance_in_place
            warnings.warn(
                f"the decision runs as many small kernels, torch.compile cannot make it one here: {error}",
                ZClipWarning,
                stacklevel=2,
            )
            result = self._chosen(values, norms, config, new_step)
        return result
