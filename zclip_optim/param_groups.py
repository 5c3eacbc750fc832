"""Param groups: from what `ZClip.step` takes, and which of them are which of those before."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from zclip_optim.checks import refuse_parameters_of_others
from zclip_optim.gradients import ParamGroups
from zclip_optim.layout import SHARD_GROUPS, ShardGroups, in_use
from zclip_optim.process_groups import as_list, groups_in_model, kinds_of_others

Group: TypeAlias = Mapping[str, Any]
Places: TypeAlias = list[int | None]


def as_param_groups(model_or_parameters: Any, process_groups: ShardGroups) -> ParamGroups:
    """What `ZClip.step` takes as param groups, those of FSDP1 with the groups that hold their shards."""
    if isinstance(model_or_parameters, nn.Module):
        named = dict(model_or_parameters.named_parameters())
        known = groups_in_model(model_or_parameters, process_groups) if in_use() else {}
        groups: list[Any] = [{"params": list(named.values()), "param_names": list(named), SHARD_GROUPS: known}]
    else:
        items = as_list(model_or_parameters)
        groups = items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
        groups = [
            group if type(group["params"]) is list else {**group, "params": as_list(group["params"])}
            for group in groups
        ]
        wrong = kinds_of_others(p for group in groups for p in group["params"])
        if wrong:
            raise TypeError(f"model_or_parameters must be a module, parameters or param groups, got {wrong} among them")
    refuse_parameters_of_others(process_groups, (p for group in groups for p in group["params"]))
    return groups


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


def _itself(group: Group) -> list[int]:
    return [id(group)]


def _first_parameter(group: Group) -> list[int]:
    return [id(p) for p in group["params"][:1]]


def _parameters(group: Group) -> list[int]:
    return [id(p) for p in group["params"]]
