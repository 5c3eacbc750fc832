"""The clipper's state on an accelerator: a tensor that every step updates in place and the host reads when asked."""

import functools
import types
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zclip_optim.gradients import wide_dtype
from zclip_optim.health import ZClipWarning
from zclip_optim.state import Counters, StepRecord
from zclip_optim.zclip import NormStats, ZClipConfig, decide

COMPILED_ON = ("cuda", "xpu")  # where torch.compile makes one kernel of what are some hundred tiny ones


class DeviceState:
    """One `StepRecord` per scope, in one tensor of shape (numbers, scopes).

    What a step costs here is kernel launches, as many for one scope as for a hundred; nothing is read back. The tensor
    keeps its place in memory, so a CUDA graph captured around the step goes on from its own results.

    Args:
        records: where to start, one per scope, on the host.
        device: of the gradients.

    Attributes:
        replayed: a step was captured, so there may be further ones that nobody here hears of.
    """

    def __init__(self, records: Sequence[StepRecord], device: torch.device) -> None:
        self.values = _packed(records).to(device, wide_dtype(device))
        self.replayed = False

    def write(self, records: Sequence[StepRecord]) -> None:
        """Go on from other records of as many scopes."""
        self.values.copy_(_packed(records))

    def step(self, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
        """Decide on the norms of all scopes.

        Args:
            norms: one per scope.
            config: hyperparameters.
            new_step: as for `ZClip.clip_`.

        Returns:
            The coefficients, one per scope, and whether the norm of any is NaN or infinite, in one element.
        """
        self.replayed = self.replayed or _is_capturing(self.values)
        return _advance_on(self.values.device.type, config, len(norms))(self.values, norms, config, new_step)

    def read(self) -> list[StepRecord]:
        """The records on the host, one per scope, in one transfer."""
        return [_with_counts(StepRecord.unpack(row)) for row in self.values.t().tolist()]


def _is_capturing(values: Tensor) -> bool:
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


Advance = Callable[[Tensor, Tensor, ZClipConfig, bool], tuple[Tensor, Tensor]]


def _advance(values: Tensor, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
    record = StepRecord.unpack(values.unbind())
    before = record.decision.stats if new_step else record.before
    total = norms if len(norms) == 1 else torch.linalg.vector_norm(norms, keepdim=True)
    failed = ~(total < torch.inf)
    decision = decide(norms.where(~failed, total), before, config)
    if new_step:
        streak = record.counters.nonfinite_streak * (record.skipped != 0)
        counters = record.counters._replace(nonfinite_streak=streak)
        record = StepRecord(before, norms, decision, torch.zeros_like(norms), counters)
    record = _count_failure(record, failed, skips=config.nonfinite != "pass")
    values.copy_(torch.stack([row.expand_as(norms) for row in record.pack()]))
    return decision.clip_coef, failed


def _count_failure(record: StepRecord, failed: Tensor, skips: bool) -> StepRecord:
    """Counts a norm that is not finite, once per step."""
    first = failed & (record.skipped == 0)
    skipped_steps, streak = record.counters
    return record._replace(
        skipped=record.skipped + (first & skips), counters=Counters(skipped_steps + (first & skips), streak + first)
    )


@functools.cache
def _advance_on(device_type: str, config: ZClipConfig, n_scopes: int) -> Advance:
    """`_advance` as it is fastest on a kind of device."""
    if device_type not in COMPILED_ON:
        return _advance
    # Of a code object of its own: torch compiles each a few times, then gives up.
    own = types.FunctionType(_advance.__code__.replace(), _advance.__globals__, _advance.__name__)
    compiled: Advance = torch.compile(own, fullgraph=True, dynamic=False)
    works = True

    def advance(values: Tensor, norms: Tensor, config: ZClipConfig, new_step: bool) -> tuple[Tensor, Tensor]:
        nonlocal works
        if works:
            try:
                return compiled(values, norms, config, new_step)
            except Exception as error:  # no Triton, no C compiler, an old driver: whatever keeps torch from compiling
                works = False
                warnings.warn(
                    f"the decision runs as many small kernels, torch.compile cannot make it one here: {error}",
                    ZClipWarning,
                    stacklevel=2,
                )
        return _advance(values, norms, config, new_step)

    return advance


def _packed(records: Sequence[StepRecord]) -> Tensor:
    return torch.tensor([record.pack() for record in records], dtype=torch.float64).t().contiguous()


def _with_counts(record: StepRecord) -> StepRecord:
    """Counts as the integers that they are, flags as booleans."""
    decision = record.decision
    return StepRecord(
        _with_integers(record.before),
        record.norm,
        decision._replace(is_spike=bool(decision.is_spike), stats=_with_integers(decision.stats)),
        bool(record.skipped),
        Counters(*map(int, record.counters)),
    )


def _with_integers(stats: NormStats) -> NormStats:
    return NormStats(stats.mean, stats.var, *map(int, stats[2:]))
