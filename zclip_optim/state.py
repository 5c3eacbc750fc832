"""What is known after a step, and its saved form: flat Python scalars, which every checkpoint library carries.

A streak of norms that are not finite is seen to be over by the first step *after* a finite one: within a step a further
evaluation of a closure may still be not finite and goes on with the streak. So a record holds both, the streak as the
step found it and whether the step `failed`; only of a step that did is the streak alive, and saved.
"""

import math
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zclip_optim.algorithm import Decision, NormStats, Scalar
from zclip_optim.intervals import Interval

VERSION = 2  # counts of spikes and of clipped steps; version 1 had one of spikes, called clipped_steps
LARGEST_COUNT = 2**63 - 1
OTHER_SCOPE = " (statistics of one scope mean nothing to the other; without the zclip_ keys they start afresh)"


class Counters(NamedTuple):
    """Steps counted for the optimizer as a whole, whatever the scope of the statistics."""

    skipped_steps: Scalar = 0
    nonfinite_streak: Scalar = 0


class StepRecord(NamedTuple):
    """What is known after a step: of one scope as numbers, or of all scopes as tensors with an element for each.

    before: the statistics that the step began with. norm: over all ranks. decision: with the statistics it led to; its
    `skip` is that of all scopes together. failed: whether the optimizer was kept from stepping because a norm, in any
    scope or evaluation, was NaN or infinite. counters: of the optimizer as a whole. interval_*: an `Interval`, of the
    steps since somebody read; not a tuple of its own, which would cost a step more time than all that it counts.
    """

    before: NormStats
    norm: Scalar
    decision: Decision
    failed: Scalar
    counters: Counters
    interval_steps: Scalar = 0
    interval_max_norm: Scalar = 0.0
    interval_min_coef: Scalar = 1.0
    interval_spikes: Scalar = 0
    interval_skips: Scalar = 0

    @classmethod
    def before_any(cls, stats: NormStats, counters: Counters) -> "StepRecord":
        """Before the first step, here or since a checkpoint."""
        nothing = Decision(1.0, math.nan, math.nan, math.nan, False, False, stats)
        return cls(stats, math.nan, nothing, counters.nonfinite_streak > 0, counters)

    @property
    def interval(self) -> Interval:
        """The steps since somebody read."""
        return Interval(*self[-len(Interval._fields) :])

    def with_new_interval(self) -> "StepRecord":
        """The same step, after which an interval begins."""
        return StepRecord(self.before, self.norm, self.decision, self.failed, self.counters)

    @property
    def skipped(self) -> Scalar:
        """Whether the optimizer was kept from stepping."""
        return was_skipped(self)

    @property
    def nonfinite_streak(self) -> Scalar:
        """How many steps in a row, up to this one, were skipped because their norm was not finite."""
        return self.counters.nonfinite_streak * (self.failed != 0)

    def pack(self) -> list[Scalar]:
        """All values in a row, in the order of `FIELDS`."""
        return _leaves(self)

    @classmethod
    def unpack(cls, row: Sequence[Scalar]) -> "StepRecord":
        """The inverse of `pack`."""
        record: StepRecord = _rebuilt(_EXAMPLE, iter(row))
        return record

    @classmethod
    def unpack_numbers(cls, row: Sequence[float]) -> "StepRecord":
        """The same with counts as the integers that they are, and flags as booleans."""
        return cls.unpack([kind(value) for kind, value in zip(FIELDS.values(), row, strict=True)])


def was_skipped(record: StepRecord) -> Scalar:
    """Whether the optimizer was kept from stepping; a function, as torch 2.6 cannot compile properties of a tuple."""
    return (record.decision.skip != 0) | (record.failed != 0)


def _leaves(values: tuple[Any, ...]) -> list[Any]:
    return [leaf for value in values for leaf in (_leaves(value) if isinstance(value, tuple) else [value])]


def _names(record: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, value in zip(record._fields, record, strict=True):
        names += _names(value, f"{prefix}{name}.") if isinstance(value, tuple) else [prefix + name]
    return names


def _rebuilt(like: Any, row: Iterator[Any]) -> Any:
    """A tuple of the kind of `like` with the next values of a row; torch 2.6 cannot compile `_make` or `_fields`."""
    return type(like)(*[_rebuilt(value, row) if isinstance(value, tuple) else next(row) for value in like])


_EXAMPLE = StepRecord.before_any(NormStats(), Counters())
FIELDS = dict(zip(_names(_EXAMPLE), map(type, _leaves(_EXAMPLE)), strict=True))  # "decision.stats.step": int, ...


class SavedState(NamedTuple):
    """All that a checkpoint restores: one `NormStats` per param group with scope="group", else a single one."""

    stats: list[NormStats]
    counters: Counters

    @classmethod
    def of(cls, records: Sequence[StepRecord]) -> "SavedState":
        """What a checkpoint after these records, one per scope, restores."""
        counters = Counters(records[0].counters.skipped_steps, records[0].nonfinite_streak)
        return cls([record.decision.stats for record in records], counters)


def fresh_records(saved: SavedState | None) -> list[StepRecord]:
    """One per scope, where a run goes on, or begins."""
    saved = saved or SavedState([NormStats()], Counters())
    return [StepRecord.before_any(stats, saved.counters) for stats in saved.stats]


def to_flat(saved: SavedState, scope: str) -> list[dict[str, Any]]:
    """What param groups carry, one for each of the statistics: those, and the counters."""
    shared = {"version": VERSION, "scope": scope, **saved.counters._asdict()}
    return [{f"zclip_{name}": value for name, value in {**shared, **stats._asdict()}.items()} for stats in saved.stats]


def from_state_dict(state_dict: Any, scope: str) -> SavedState:
    """The state in what `ZClip.state_dict` returned.

    Raises:
        ValueError: it is malformed; names the key.
    """
    is_one = isinstance(state_dict, Mapping) and "groups" in state_dict
    saved = from_flat(state_dict["groups"], scope) if is_one else None
    if saved is None:
        raise ValueError("state_dict must be what ZClip.state_dict() returned: a dict with 'groups' of statistics")
    return saved


def find_param_groups(state_dict: Any) -> list[dict[str, Any]]:
    """All param groups in a state dict; some wrappers nest state dicts in dicts or lists."""
    if isinstance(state_dict, Mapping):
        if "param_groups" in state_dict:
            groups = state_dict["param_groups"]
            return groups if isinstance(groups, list) else [groups]
        nested = [value for key, value in state_dict.items() if key != "state"]  # which may be as large as the model
    else:
        nested = list(state_dict) if isinstance(state_dict, (list, tuple)) else []
    return [group for value in nested for group in find_param_groups(value)]


def from_flat(groups: Any, scope: str) -> SavedState | None:
    """The state that `groups`, a list of dicts from a checkpoint, carry; None if they carry none.

    Raises:
        ValueError: a value is missing or malformed, of another version or scope, or differs between groups that share
            it; names the key.
    """
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"the param groups of a checkpoint must be a list of dicts, got {_show(groups)}")
    if not any(str(key).startswith("zclip_") for group in groups for key in group):
        return None
    parsed = [_parse_group(group, i, scope) for i, group in enumerate(groups)]
    shared = [{**counters._asdict(), **(stats._asdict() if scope == "global" else {})} for stats, counters in parsed]
    for i, values in enumerate(shared):
        for name, value in values.items():
            if value != shared[0][name]:
                _refuse(name, i, value, f"{shared[0][name]!r} as in param_groups[0]")
    stats = [group_stats for group_stats, _ in parsed]
    return SavedState(stats if scope == "group" else stats[:1], parsed[0][1])


def _parse_group(group: Mapping[str, Any], index: int, scope: str) -> tuple[NormStats, Counters]:
    def take(name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        if f"zclip_{name}" not in group:
            raise ValueError(f"saved param_groups[{index}] has no zclip_{name}, though there are zclip_ keys beside it")
        value = group[f"zclip_{name}"]
        if not is_valid(value):
            _refuse(name, index, value, expected)
        return value

    def number(name: str) -> float:
        return float(take(name, _is_number, "a finite number >= 0"))

    def count(name: str) -> int:
        return int(take(name, _is_count, "an integer >= 0"))

    version = take("version", lambda v: _is_count(v) and 1 <= v <= VERSION, f"1 to {VERSION}, which this one reads")
    take("scope", lambda v: isinstance(v, str) and v == scope, f"{scope!r} as here{OTHER_SCOPE}")
    clipped_steps = count("clipped_steps")
    spike_steps = count("spike_steps") if version > 1 else clipped_steps
    stats = NormStats(number("mean"), number("var"), count("step"), count("streak"), spike_steps, clipped_steps)
    return stats, Counters(*(count(name) for name in Counters._fields))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value <= sys.float_info.max


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _refuse(name: str, index: int, value: object, expected: str) -> None:
    raise ValueError(f"zclip_{name} in saved param_groups[{index}] must be {expected}; got {_show(value)}")


def _show(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of too many digits to print
        return f"a huge {type(value).__name__}"
