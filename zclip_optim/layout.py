"""Which ranks hold what of a tensor; from squared norms in this process to norms over the gradients of all ranks."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from zclip_optim.algorithm import Scalar
from zclip_optim.gradients import Gradients, ParamGroups, local_tensor, named_params
from zclip_optim.norm import wide_dtype

Groups: TypeAlias = tuple[Any, ...]  # of ProcessGroups, a class that not every build of torch has
AVAILABLE = dist.is_available()  # a property of the build of torch
SHARD_GROUPS = "shard_groups"  # the key of a param group that comes with the groups of some of its parameters
PLAIN = {Parameter, Tensor, type(None)}


class Part(NamedTuple):
    """Gradients in this process whose squared norm, divided by `copies`, is summed over `groups`, one after the other.

    copies: how many of the ranks in `groups` together hold each element.
    """

    groups: Groups
    copies: int
    gradients: list[Tensor]


class ShardGroups(NamedTuple):
    """What was said about who holds the other elements of parameters that are plain tensors here.

    of_all: the groups that do, of every parameter; None if nothing was said about every parameter.
    of_some: the groups that do, of these parameters; empty unless `of_all` is None.
    in_order: each group once, as they are summed over, one after the other.
    combinations: the values of `of_some`, each once.
    """

    of_all: Groups | None = None
    of_some: Mapping[Tensor, Groups] = {}
    in_order: Groups = ()
    combinations: tuple[Groups, ...] = ()

    def of_each(self, param_group: Mapping[str, Any]) -> Mapping[Tensor, Groups]:
        """`of_some`, for one param group: those of FSDP1's modules are found anew and come with it."""
        known: Mapping[Tensor, Groups] = param_group.get(SHARD_GROUPS, self.of_some)
        return known


Reduced: TypeAlias = Sequence[tuple[Any, list[Scalar]]]  # groups, and the sums over their ranks


class _Layout(NamedTuple):
    """How a tensor lies on the ranks: a mesh with a placement per dimension, or the groups that hold its shards."""

    groups: Groups = ()
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    def sharded_dims(self) -> list[int]:
        """The mesh dimensions along which the ranks hold different elements."""
        dims = enumerate(self.placements)
        return [dim for dim, placement in dims if not placement.is_replicate() and self.mesh.size(dim) > 1]


def in_use() -> bool:
    """Whether this process is one of several, or was started as if."""
    return AVAILABLE and dist.is_initialized()


def is_on_mesh(value: Tensor) -> bool:
    """Whether it is a DTensor."""
    return getattr(value, "device_mesh", None) is not None


class ShardedGradients(Gradients):
    """The gradients of param groups, elements of which may be on other ranks.

    The collectives follow from the layout of the parameters, so that a rank whose gradients are missing or whose shards
    are empty joins them: one all-reduce of a number per scope for each mesh of DTensors (per sharded dimension of a
    mesh of several dimensions that leaves ranks out) and for each group in `process_groups`.

    Args:
        process_groups: what was said about the shards of parameters.
    """

    are_all_here = False

    def __init__(self, param_groups: ParamGroups, scope: str, process_groups: ShardGroups) -> None:
        super().__init__(param_groups, scope)
        self.local = [[local_tensor(gradient) for gradient in gradients] for gradients in self.local]
        self._process_groups = process_groups
        self._reduced: Reduced = ()

    def norms(self) -> Any:
        """The L2 norm of each scope over all ranks, the same bits on each of them.

        Raises:
            ValueError: see `split_gradients`.
        """
        squares: defaultdict[tuple[int, Groups], Scalar] = defaultdict(float)
        for i, groups in enumerate(self.scopes):
            for part in split_gradients(groups, self._process_groups):
                norm = self._norm_of(part.gradients)
                squares[i, part.groups] += norm * norm / part.copies
        sums, self._reduced = sum_over_groups(squares, self._process_groups.in_order, _device_of(self.param_groups))
        norms = [sums[i] ** 0.5 for i in range(len(self.scopes))]
        return norms if self.device is None else torch.stack(norms)

    def norms_by_parameter(self) -> list[tuple[str, float]]:
        """The same over all ranks, for parameters that have a gradient on any of them; every rank must call it.

        One all-reduce for each mesh, or group of FSDP1's, that holds shards, of two numbers per parameter: its squared
        norm, and on how many ranks it has a gradient. The ranks of `process_groups` may hold other parameters: what is
        added up there goes by name.
        """
        of_each, in_order = self._process_groups._replace(combinations=()), self._process_groups.in_order
        named = list(named_params(self.param_groups))
        squares: defaultdict[tuple[int, Groups], Scalar] = defaultdict(float)
        by_name: list[tuple[int, ...]] = []
        seen: set[int] = set()
        for i, (_, p, group) in enumerate(named):
            is_new = p.grad is not None and id(p.grad) not in seen  # a rank where it is not joins with zeros
            seen.add(id(p.grad))
            parts = split_gradients([{**group, "params": [p]}], of_each)
            for part in parts:
                groups = tuple(each for each in part.groups if each not in in_order)
                norm = self._norm_of(part.gradients)
                squares[2 * i, groups] += norm * norm / part.copies if is_new else 0.0
                squares[2 * i + 1, groups] += float(is_new)
            by_name.append(tuple(k for k, each in enumerate(in_order) if any(each in part.groups for part in parts)))
        sums, _ = sum_over_groups(squares, (), _device_of(self.param_groups))
        numbers = iter(self._read([sums[i] for i in range(2 * len(named))]))
        found: defaultdict[tuple[str, tuple[int, ...]], float] = defaultdict(float)
        for (name, _, _), positions, square, held in zip(named, by_name, numbers, numbers, strict=True):
            if held:
                found[name, positions] += square
        return [(name, math.sqrt(square)) for (name, _), square in add_by_name(found, in_order).items()]

    def are_missing(self, norms: Any) -> bool | None:
        """The same; None if none has one here and only the device knows of the others."""
        if any(self.local) or not self._reduced:
            return not any(self.local)
        return not any(norms) if self.device is None else None

    def describe_nonfinite(self, *, ask_others: bool) -> str:
        """The same over all ranks of the groups whose sum was not finite, and that therefore are here now."""
        here = super().describe_nonfinite(ask_others=ask_others)
        groups = groups_that_know(self._reduced) if ask_others else ()
        return join_descriptions(here, groups) if groups else here


def split_gradients(param_groups: ParamGroups, process_groups: ShardGroups) -> list[Part]:
    """The gradients in this process, those of tied parameters once, by the groups that hold the rest of them.

    Args:
        param_groups: as in an optimizer.
        process_groups: what was said about the shards of parameters.

    Returns:
        A part for every layout of a parameter, also if this process has no gradient for it, and for every combination
        of groups, also if this process has no parameter for it.

    Raises:
        ValueError: a mesh covers one of the process groups already.
    """
    whole: dict[int, Tensor] = {}
    layouts = {_Layout(): whole, **{_Layout(groups): {} for groups in process_groups.combinations}}
    for p, groups in _params_with_groups(param_groups, process_groups):
        if not groups and type(p) in PLAIN and type(p.grad) in PLAIN:  # as with DDP: nothing to find out
            if p.grad is not None:
                whole[id(p.grad)] = p.grad
            continue
        gradient = None if p.grad is None else _without_partial(p.grad)
        gradients = layouts.setdefault(_layout(p if gradient is None else gradient, groups), {})
        if p.grad is not None and gradient is not None:
            gradients[id(p.grad)] = local_tensor(gradient)
    meshes: defaultdict[Any, set[int]] = defaultdict(set)
    for layout in layouts:
        if layout.mesh is not None:
            meshes[layout.mesh].update(layout.sharded_dims())
    return [
        Part(*_reduction(layout, meshes[layout.mesh], process_groups.of_all or ()), list(gradients.values()))
        for layout, gradients in layouts.items()
    ]


def _params_with_groups(param_groups: ParamGroups, process_groups: ShardGroups) -> Iterator[tuple[Tensor, Groups]]:
    for group in param_groups:
        params, known = group["params"], process_groups.of_each(group)
        yield from ((p, known.get(p, ())) for p in params) if known else zip(params, itertools.repeat(()))


def _layout(value: Tensor, groups: Groups) -> _Layout:
    mesh: Any = getattr(value, "device_mesh", None)
    if mesh is None:
        return _Layout(groups)
    return _Layout(mesh=mesh, placements=value.placements)  # type: ignore[attr-defined]


def _without_partial(gradient: Tensor) -> Tensor:
    """The sum of a gradient that the ranks hold as terms of a sum: a shard of it on each, if it can be sharded."""
    placements = list(getattr(gradient, "placements", ()))
    if not any(placement.is_partial() for placement in placements):
        return gradient
    from torch.distributed.tensor import Replicate, Shard

    taken = {getattr(placement, "dim", None) for placement in placements}
    free = sorted(set(range(gradient.dim())) - taken, key=lambda dim: gradient.shape[dim])
    for i, placement in enumerate(placements):
        if placement.is_partial():
            placements[i] = Shard(free.pop()) if free else Replicate()
    return gradient.redistribute(placements=placements)  # type: ignore[attr-defined,no-any-return]


def _reduction(layout: _Layout, mesh_dims: set[int], process_groups: Groups) -> tuple[Groups, int]:
    """The groups to sum over, and how many of their ranks hold each element.

    All tensors of a mesh are summed over the same dimensions, which any of them shards: one collective serves all.
    """
    if layout.mesh is None:
        return layout.groups + process_groups, 1
    if layout.mesh.get_coordinate() is None:  # this rank is not in the mesh
        return process_groups, 1
    if len(mesh_dims) > 1 and layout.mesh.size() == dist.get_world_size():
        mesh_dims, groups = set(range(layout.mesh.ndim)), (dist.group.WORLD,)
    else:
        groups = tuple(layout.mesh.get_group(dim) for dim in sorted(mesh_dims))
    if not set(groups).isdisjoint(process_groups):
        raise ValueError(
            f"process_group holds the group over which the DTensors of {layout.mesh} are summed already: leave it out"
        )
    copies = math.prod(layout.mesh.size(dim) for dim in mesh_dims - set(layout.sharded_dims()))
    return groups + process_groups, copies


def sum_over_groups(
    squares: Mapping[tuple[int, Groups], Scalar], last: Groups, device: torch.device
) -> tuple[defaultdict[int, Scalar], Reduced]:
    """Sum squared norms over groups of ranks; what is to be summed over the same group goes into one all-reduce.

    With expert parameters sharded over A, dense ones over A and then B, and pipeline stages P last (one scope), this
    process starts from {(0, (A, P)): 4.0, (0, (A, B, P)): 9.0}. A is reduced first, both numbers at once, and leaves
    {(0, (P,)): sum of the 4.0 over A, (0, (B, P)): sum of the 9.0 over A}; then B, which leaves {(0, (P,)): the two
    added up}; then P. What is left, {(0, ()): ...}, is the squared norm of scope 0.

    Args:
        squares: for a scope and the groups to sum over, in any order, the squared norm in this process.
        last: the groups that are summed over after all others, in this order.
        device: where to reduce, if the group can.

    Returns:
        The sum of each scope, and the sums over each group.
    """
    squares, reduced = dict(squares), []
    # In one order on all ranks, that of the parameters: no names of groups, which differ along a dimension of a mesh.
    others = dict.fromkeys(group for _, groups in squares for group in groups if group not in last)
    for group in (*others, *last):
        keys = [key for key in squares if group in key[1]]
        sums = _all_reduce([squares.pop(key) for key in keys], group, device)
        for (scope, groups), total in zip(keys, sums, strict=True):
            left = scope, tuple(other for other in groups if other is not group)
            squares[left] = squares.get(left, 0.0) + total
        reduced.append((group, sums))
    return defaultdict(float, {scope: total for (scope, _), total in squares.items()}), reduced


def _all_reduce(values: list[Scalar], group: Any, device: torch.device) -> list[Scalar]:
    """Sums over the ranks of a group, which come out with the same bits on each of them."""
    types = [possible.type for possible in group._device_types]
    place = device if device.type in types else torch.device(types[0])
    if any(isinstance(value, Tensor) for value in values):
        sums = torch.stack([torch.as_tensor(value, dtype=wide_dtype(device), device=device) for value in values])
        sums = sums.to(place)
        dist.all_reduce(sums, group=group)
        return list(sums.to(device).unbind())
    sums = torch.tensor(values, dtype=wide_dtype(place), device=place)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def add_by_name(
    values: Mapping[tuple[str, tuple[int, ...]], float], groups: Groups
) -> Mapping[tuple[str, tuple[int, ...]], float]:
    """Add values of the same name over ranks. Every rank of these groups must call it.

    Args:
        values: for a name and the positions in `groups` of those over which to add.
        groups: one after the other.
    """
    for i, group in enumerate(groups):
        sums = {key: value for key, value in values.items() if i not in key[1]}
        here = {key: value for key, value in values.items() if i in key[1]}
        for there in _gather(here, group):
            for key, value in there.items():
                sums[key] = sums.get(key, 0.0) + value
        values = sums
    return values


def groups_that_know(reduced: Reduced) -> Groups:
    """The groups over which a sum was not finite, all of whose ranks have therefore seen that it was not."""
    return tuple(group for group, sums in reduced if not all(map(math.isfinite, sums)))


def _device_of(param_groups: ParamGroups) -> torch.device:
    return next((p.device for group in param_groups for p in group["params"]), torch.device("cpu"))


def join_descriptions(description: str, groups: Groups) -> str:
    """What the ranks of `groups` have to say, by rank. Every rank of these groups must call it."""
    said = {dist.get_rank(): description} if description else {}
    for group in groups:
        said = {rank: text for ranks in _gather(said, group) for rank, text in ranks.items()}
    return "; ".join(f"rank {rank}: {text}" for rank, text in sorted(said.items()))


def _gather(value: Any, group: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
