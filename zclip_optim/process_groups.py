"""What `process_group` says about who holds the other elements of parameters, and what FSDP1's modules say."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from zclip_optim.layout import AVAILABLE, Groups, ShardGroups, is_on_mesh

ProcessGroups: TypeAlias = (
    "dist.ProcessGroup | Sequence[dist.ProcessGroup] | Mapping[dist.ProcessGroup, nn.Module | Iterable[Tensor]] | None"
)
Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[dict[str, Any]]


def as_groups(process_group: ProcessGroups) -> ShardGroups:
    """What `process_group` says about who holds the other elements of which parameters.

    Raises:
        ValueError: there is something else than process groups, a mapping that says nothing, or one with DTensors.
        TypeError: a value of a mapping is no parameters.
    """
    if isinstance(process_group, Mapping):
        return _as_groups_of_some(process_group)
    if process_group is None:
        return ShardGroups()
    groups = tuple(process_group) if isinstance(process_group, Sequence) else (process_group,)
    if not all(map(_is_group, groups)):
        raise ValueError(
            "process_group must be a ProcessGroup, a sequence of them, a mapping {group: parameters}, or None, got "
            f"{process_group!r}"
        )
    return ShardGroups(groups, in_order=groups)


def _is_group(value: Any) -> bool:
    return AVAILABLE and isinstance(value, dist.ProcessGroup)


def _as_groups_of_some(mapping: Mapping[Any, Any]) -> ShardGroups:
    if not mapping:
        raise ValueError("process_group={} names no group: give a mapping {group: parameters}, or leave it out")
    of_some: dict[Tensor, Groups] = {}
    for group, value in mapping.items():
        if not _is_group(group):
            raise ValueError(
                f"process_group must be a mapping {{group: parameters}} from a ProcessGroup that this rank is in, got "
                f"{group!r} for one"
            )
        name = f"process_group[<group {group.group_name}>]"
        params = _params_of(value, name)
        if not params:
            raise ValueError(
                f"{name} holds no parameters, so none would be summed over this group: an iterator that was gone "
                "through before? Pass a list or a module. A rank without any gives an empty one, "
                "torch.nn.Parameter(torch.empty(0), requires_grad=False)"
            )
        of_some.update((p, (*of_some.get(p, ()), group)) for p in dict.fromkeys(params))
    return ShardGroups(None, of_some, tuple(mapping), tuple(dict.fromkeys(of_some.values())))


def _params_of(value: Any, name: str) -> list[Tensor]:
    is_iterable = isinstance(value, (nn.Module, Iterable))
    params = as_list(value.parameters() if isinstance(value, nn.Module) else value) if is_iterable else [value]
    wrong = kinds_of_others(params)
    if wrong:
        raise TypeError(f"{name} must be a module or an iterable of parameters, got {wrong}")
    for p in params:
        if is_on_mesh(p):
            raise ValueError(
                f"{name} holds a DTensor of shape {tuple(p.shape)}, which is summed over its own mesh already: leave "
                "it out"
            )
    return params


def kinds_of_others(params: Iterable[Any]) -> str:
    """The types of what is no tensor."""
    return ", ".join(sorted({type(p).__name__ for p in params if not isinstance(p, Tensor)}))


def as_list(params: Any) -> list[Any]:
    """A single one in a list of its own."""
    return [params] if isinstance(params, Tensor) else list(params)


def groups_in_model(model: nn.Module, said: ShardGroups) -> Mapping[Tensor, Groups]:
    """What was said about single parameters, with the groups that hold the shards of those that FSDP1 has flattened."""
    flattened = [p for p in model.parameters() if getattr(p, "_fsdp_flattened", False)]
    if not flattened or said.of_all is not None:
        return said.of_some
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    found: dict[Tensor, Groups] = {}
    for module in model.modules():  # outer modules before inner ones, whose parameters are their own
        if isinstance(module, FullyShardedDataParallel):
            whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            found.update(dict.fromkeys(module.parameters(), () if whole else (module.process_group,)))
    own = {p: dict.fromkeys((*found[p], *said.of_some.get(p, ()))) for p in flattened}
    return {**said.of_some, **{p: tuple(groups) for p, groups in own.items()}}
