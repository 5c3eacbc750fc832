"""From local norms to global ones."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

ProcessGroups: TypeAlias = "dist.ProcessGroup | Sequence[dist.ProcessGroup] | None"


def as_groups(process_group: ProcessGroups) -> tuple[Any, ...] | None:
    """The groups over which squared norms are summed; None if nothing was said about it.

    Raises:
        ValueError: something else than process groups was given.
    """
    if process_group is None:
        return None
    groups = tuple(process_group) if isinstance(process_group, Sequence) else (process_group,)
    if not (dist.is_available() and all(isinstance(group, dist.ProcessGroup) for group in groups)):
        raise ValueError(f"process_group must be a ProcessGroup, a sequence of them, or None, got {process_group!r}")
    return groups


def global_norms(norms: list[float], groups: Iterable[Any] | None, device: torch.device) -> list[float]:
    """Norms over the gradients of all ranks: one all-reduce of `len(norms)` squares for each group."""
    if not groups:
        return norms
    squares = torch.tensor([norm * norm for norm in norms], dtype=torch.float64, device=device)
    for group in groups:
        dist.all_reduce(squares, group=group)
    return [math.sqrt(square) for square in squares.tolist()]


def refuse_unknown_shards(params: Iterable[Tensor], groups: tuple[Any, ...] | None) -> None:
    """Refuse parameters that are shards of something this process does not see: their norm would be wrong.

    Raises:
        ValueError: FSDP1 parameters, and no process group was given.
        NotImplementedError: DTensors.
    """
    for p in params:
        if groups is None and getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                "these are FSDP's shards of parameters: pass process_group=model.process_group so that the norm covers "
                "all of them (process_group=() for ShardingStrategy.NO_SHARD)"
            )
        if type(p) is not Parameter and hasattr(p, "device_mesh"):
            raise NotImplementedError("DTensor parameters (FSDP2, tensor parallel) are not supported yet")
