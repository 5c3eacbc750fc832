"""Param groups: from what `ZClip.step` takes, and which of them are which of those before."""

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from zclip_optim.checks import refuse_parameters_of_others
from zclip_optim.gradients import ParamGroups
from zclip_optim.layout import SHARD_GROUPS, ShardGroups, in_use
from zclip_optim.process_groups import as_list, groups_in_model, kinds_of_others

Group: TypeAlias = Mapping[str, Any]
Places: TypeAlias = list[int | None]
EXPECTED = "model_or_parameters must be a module, parameters or param groups"
RETURNS = 6  # to sets of parameters that were there before, after which they are there in turn
LONG_TURN = 20  # steps of a turn; longer ones are stages of a training
SETS = 8  # that are known at a time
ORDERS = 100  # of the same set, after which nothing is looked at any more


def as_param_groups(model_or_parameters: Any, process_groups: ShardGroups) -> ParamGroups:
    """What `ZClip.step` takes as param groups, those of FSDP1 with the groups that hold their shards.

    Raises:
        TypeError: it is something else.
        ValueError: `process_groups` are of other parameters.
    """
    if isinstance(model_or_parameters, nn.Module):
        named = dict(model_or_parameters.named_parameters())
        known = groups_in_model(model_or_parameters, process_groups) if in_use() else {}
        groups: list[Any] = [{"params": list(named.values()), "param_names": list(named), SHARD_GROUPS: known}]
    else:
        _refuse_unless_parameters(model_or_parameters)
        items = as_list(model_or_parameters)
        groups = items if items and all(map(_is_group, items)) else [{"params": items}]
        groups = [g if type(g["params"]) is list else {**g, "params": as_list(g["params"])} for g in groups]
        wrong = kinds_of_others(p for group in groups for p in group["params"])
        if wrong:
            raise TypeError(f"{EXPECTED}, got {wrong} among them")
    refuse_parameters_of_others(process_groups, (p for group in groups for p in group["params"]))
    return groups


def _is_group(item: Any) -> bool:
    return isinstance(item, dict) and "params" in item


def _refuse_unless_parameters(thing: Any) -> None:
    if isinstance(thing, (list, tuple)) or (isinstance(thing, Iterable) and not isinstance(thing, Mapping)):
        return
    instead = ""
    if hasattr(thing, "param_groups"):
        instead = "; give it optimizer.param_groups"
    elif isinstance(thing, Mapping):
        instead = "; param groups come in a list" if "params" in thing else "; give it its values()"
    raise TypeError(f"{EXPECTED}, got {type(thing).__name__}{instead}")


def is_gone_through(given: Any, groups: ParamGroups) -> bool:
    """Whether there was an iterator in what `as_param_groups` was given that had no parameter left.

    Args:
        groups: that it has made of it.
    """
    if all([group["params"] for group in groups]):
        return False
    if isinstance(given, Iterator):
        return not any(group["params"] for group in groups)
    pairs = zip(given, groups, strict=False) if isinstance(given, (list, tuple)) else ()
    return any(isinstance(each["params"], Iterator) and not group["params"] for each, group in pairs)


class KnownGroups:
    """The param groups that statistics belong to, in the order of these.

    A group is the dict that it is in an optimizer, though its parameters be others (FSDP2 and Accelerate swap the
    tensors, layers are frozen). Where the dicts are others too, as those of a base optimizer that has loaded a
    checkpoint, or such as are written for each step, it is the one that has its parameters. Where all of that is new,
    as in a copy, it is the one in its place. Copies and pickles know none, and hold no parameters.
    """

    def __init__(self) -> None:
        self._groups: list[Group] | None = None  # the dicts, whose ids would be given to others if they were gone

    def know(self, groups: Sequence[Group]) -> None:
        """Take these for the groups of the statistics."""
        self._groups = list(groups)

    def are(self, groups: Sequence[Group]) -> bool:
        """Whether these are, dict by dict."""
        known = self._groups
        return known is not None and len(known) == len(groups) and all(map(operator.is_, known, groups))

    def places_of(self, groups: Sequence[Group]) -> Places:
        """The place of the statistics of each of these groups; None: it has none."""
        here: Places = list(range(len(groups)))
        if self._groups is None or self.are(groups):
            return here
        left = dict(enumerate(self._groups))
        found: dict[int, int] = {}
        for keys_of in (_itself, _first_parameter, _parameters):
            self._find(groups, keys_of, left, found)
            if len(found) == len(groups) or not left:
                break
        if not found and len(groups) >= len(self._groups):
            return here
        return [found.get(i) for i in range(len(groups))]

    @staticmethod
    def _find(
        groups: Sequence[Group], keys_of: Callable[[Group], list[int]], left: dict[int, Group], found: dict[int, int]
    ) -> None:
        """Move what is left to what is found, where a key is the same."""
        held = {key: place for place, group in left.items() for key in keys_of(group)}
        for i, group in enumerate(groups):
            place = None if i in found else next((held[key] for key in keys_of(group) if held.get(key) in left), None)
            if place is not None:
                found[i] = place
                del left[place]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Turns:
    """Whether steps are for several sets of parameters in turn, such as two networks.

    A set is known by its first parameter, so that a step costs one comparison. Only where that is another one than in
    the step before are all looked at, and seldom if it turns out to be the same set in another order.
    """

    def __init__(self) -> None:
        self._firsts: list[weakref.ref[Any]] = []  # of sets without a parameter in common, the last one at the end
        self._steps = 0  # of this turn
        self._returns = 0  # to a set that was there before, in a row
        self._orders = 0  # in which the same set was seen

    def has_come_back(self, groups: ParamGroups) -> bool:
        """Whether a step for these parameters makes it plain that there are several sets."""
        params = groups[0]["params"]
        self._steps += 1
        if not params or self._orders > ORDERS or (self._firsts and self._firsts[-1]() is params[0]):
            return False
        return self._change(params[0], groups)

    def _change(self, first: Any, groups: ParamGroups) -> bool:
        firsts = [p for each in self._firsts if (p := each()) is not None]
        steps, self._steps = self._steps, 0
        if firsts and any(p is firsts[-1] for group in groups for p in group["params"]):
            self._orders += 1
            self._firsts, self._returns = [weakref.ref(first)], 0
            return False
        others = [p for p in firsts if p is not first]
        self._firsts = [weakref.ref(p) for p in (*others[-SETS:], first)]
        self._returns = self._returns + (len(others) < len(firsts)) if steps <= LONG_TURN else 0
        return self._returns >= RETURNS

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _itself(group: Group) -> list[int]:
    return [id(group)]


def _first_parameter(group: Group) -> list[int]:
    return [id(p) for p in group["params"][:1]]


def _parameters(group: Group) -> list[int]:
    return [id(p) for p in group["params"]]
