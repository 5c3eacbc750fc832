"""From the squared norms in this process to norms over the gradients of all ranks."""

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from zclip_optim.algorithm import Scalar
from zclip_optim.gradients import Gradients, ParamGroups, local_tensor, named_params
from zclip_optim.norm import wide_dtype

ProcessGroups: TypeAlias = (
    "dist.ProcessGroup | Sequence[dist.ProcessGroup] | Mapping[dist.ProcessGroup, nn.Module | Iterable[Tensor]] | None"
)
Parameters: TypeAlias = nn.Module | Tensor | Iterable[Tensor] | Iterable[dict[str, Any]]
Groups: TypeAlias = tuple[Any, ...]  # of ProcessGroups, a class that not every build of torch has
AVAILABLE = dist.is_available()  # a property of the build of torch
PLAIN = {Parameter, Tensor, type(None)}
NOT_SEEN = "keeps the gradients in buffers of its own, so their norm cannot be seen here"
ON_DEEPSPEED = "zclip_optim.integrations.deepspeed.attach(engine)"


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
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


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
    params = _as_list(value.parameters() if isinstance(value, nn.Module) else value) if is_iterable else [value]
    wrong = _kinds_of_others(params)
    if wrong:
        raise TypeError(f"{name} must be a module or an iterable of parameters, got {wrong}")
    for p in params:
        if _is_on_mesh(p):
            raise ValueError(
                f"{name} holds a DTensor of shape {tuple(p.shape)}, which is summed over its own mesh already: leave "
                "it out"
            )
    return params


def _is_on_mesh(value: Tensor) -> bool:
    return getattr(value, "device_mesh", None) is not None


def gradients_of(param_groups: ParamGroups, scope: str, process_groups: ShardGroups) -> Gradients:
    """The gradients of param groups, wherever they are."""
    if in_use():
        return ShardedGradients(param_groups, scope, process_groups)
    return Gradients(param_groups, scope)


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
        param_groups: as in an optimizer; "shard_groups" in one of them holds the groups of some of its parameters.
        process_groups: what was said about the shards of parameters.

    Returns:
        A part for every layout of a parameter, also if this process has no gradient for it, and for every combination
        of groups, also if this process has no parameter for it.

    Raises:
        ValueError: FSDP1 parameters or experts whose groups are unknown, or a process group that a mesh covers already.
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
        params, known = group["params"], process_groups.of_some
        found = group.get("shard_groups") if process_groups.of_all is None else None
        if found:
            known = {p: tuple(dict.fromkeys(found.get(p, ()) + known.get(p, ()))) for p in {**found, **known}}
        refuse_unknown_shards(params, process_groups._replace(of_some=known) if found else process_groups)
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
    place = device if device.type in types else types[0]
    if any(isinstance(value, Tensor) for value in values):
        sums = torch.stack([torch.as_tensor(value, dtype=wide_dtype(device), device=device) for value in values])
        sums = sums.to(place)
        dist.all_reduce(sums, group=group)
        return list(sums.to(device).unbind())
    sums = torch.tensor(values, dtype=torch.float64, device=place)
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


def fsdp_groups(model: nn.Module) -> dict[Tensor, Groups]:
    """For each parameter that FSDP1 has flattened, the groups of ranks that hold its shards."""
    flattened = [p for p in model.parameters() if getattr(p, "_fsdp_flattened", False)]
    if not flattened:
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    groups: dict[Tensor, Groups] = {}
    for module in model.modules():  # outer modules before inner ones, whose parameters are their own
        if isinstance(module, FullyShardedDataParallel):
            whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            groups.update(dict.fromkeys(module.parameters(), () if whole else (module.process_group,)))
    return {p: groups[p] for p in flattened}


def as_param_groups(model_or_parameters: Parameters, process_groups: ShardGroups) -> ParamGroups:
    """A model, parameters or param groups as param groups, those of FSDP1 with the groups that hold their shards.

    Raises:
        TypeError: there is something else among them.
        ValueError: see `refuse_parameters_of_others`.
    """
    groups = _as_param_groups(model_or_parameters)
    refuse_parameters_of_others(process_groups, (p for group in groups for p in group["params"]))
    return groups


def _as_param_groups(model_or_parameters: Any) -> ParamGroups:
    if isinstance(model_or_parameters, nn.Module):
        named = dict(model_or_parameters.named_parameters())
        shard_groups = fsdp_groups(model_or_parameters) if in_use() else {}
        return [{"params": list(named.values()), "param_names": list(named), "shard_groups": shard_groups}]
    items = _as_list(model_or_parameters)
    groups = items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
    groups = [{**group, "params": _as_list(group["params"])} for group in groups]
    wrong = _kinds_of_others(p for group in groups for p in group["params"])
    if wrong:
        raise TypeError(f"model_or_parameters must be a module, parameters or param groups, got {wrong} among them")
    return groups


def _kinds_of_others(params: Iterable[Any]) -> str:
    """The types of what is no tensor."""
    return ", ".join(sorted({type(p).__name__ for p in params if not isinstance(p, Tensor)}))


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def refuse_unknown_shards(params: Iterable[Tensor], groups: ShardGroups) -> None:
    """Refuse shards of parameters if nothing is known about the other ones: the norm would be wrong.

    Raises:
        ValueError: there are parameters of FSDP1, and no process group was given; or, in a distributed run, experts
            (plain tensors with `allreduce` False, as Megatron and DeepSpeed mark them) that no mapping covers, and
            process_group is not ().
    """
    if groups.of_all == ():
        return
    # One look at the attributes of each parameter, in a pass that every step takes.
    marked = [p for p in params if (own := p.__dict__) and ("_fsdp_flattened" in own or "allreduce" in own)]
    unknown = [p for p in marked if p not in groups.of_some]
    if groups.of_all is None and any(getattr(p, "_fsdp_flattened", False) for p in unknown):
        raise ValueError(
            "these are FSDP's shards of parameters: pass process_group=model.process_group so that the norm covers "
            "all of them (process_group=() for ShardingStrategy.NO_SHARD)"
        )
    experts = [p for p in unknown if getattr(p, "allreduce", None) is False and not _is_on_mesh(p)]
    if experts and in_use() and dist.get_world_size() > 1:
        raise ValueError(
            f"a parameter of shape {tuple(experts[0].shape)} has allreduce=False, the mark of an expert, and "
            "process_group does not say which ranks hold the other ones: pass process_group={group: parameters}, the "
            "experts and the group of ranks over which they are distributed (process_group=() if every rank holds all "
            "of them)"
        )


def refuse_parameters_of_others(groups: ShardGroups, params: Iterable[Tensor]) -> None:
    """Refuse a mapping with parameters that are not among these: nothing would be summed over their groups.

    Raises:
        ValueError: there is such a parameter, and it requires gradients.
    """
    held = set(params) if groups.of_some else set()
    others = [p for p in groups.of_some if p.requires_grad and p not in held]
    if others:
        raise ValueError(
            f"process_group maps {len(others)} of {len(groups.of_some)} parameters, one of shape "
            f"{tuple(others[0].shape)}, that are not among those to be clipped: of another model, or replaced since? "
            "Pass the parameters that the optimizer holds"
        )


def refuse_foreign_gradients(base_optimizer: object, params: Iterable[Tensor]) -> None:
    """Refuse what keeps its gradients elsewhere than in `p.grad`, where no wrapper sees them.

    Raises:
        ValueError: an optimizer or parameters of DeepSpeed ZeRO or Megatron.
    """
    package, _, module = type(base_optimizer).__module__.partition(".")
    params = list(params)
    if (package == "deepspeed" and not module.startswith("ops.")) or any(hasattr(p, "ds_id") for p in params):
        owner, instead = "DeepSpeed ZeRO", ON_DEEPSPEED
    elif package == "megatron" or any(hasattr(p, "main_grad") for p in params):
        owner, instead = "Megatron", "zclip_optim.integrations.megatron.attach(optimizer)"
    else:
        return
    raise ValueError(f"{owner} {NOT_SEEN}: use {instead} with the optimizer unwrapped")


def most_dimensions(params: Iterable[Tensor]) -> int:
    """The dimensions of the parameter that has the most; 0 for those of lazy modules, which have none yet."""
    return max((0 if is_lazy(p) else p.dim() for p in params), default=0)


def refuse_a_part_of_the_parameters(groups: ShardGroups) -> None:
    """Refuse to be made by an optimizer that gives each rank a part of the parameters: the norm would be of that part.

    Raises:
        ValueError: ZeroRedundancyOptimizer is making it, and no process group of all parameters was given.
    """
    frame = sys._getframe(1) if groups.of_all is None and in_use() else None
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer gives each rank some of the parameters, and the norm would be that of these: "
                "put it inside, ZClipOptimizer(ZeroRedundancyOptimizer(parameters, optimizer_class, ...)), or pass "
                "process_group, the group over which it shards"
            )
        frame = frame.f_back


def refuse_flat_shards(params: Iterable[Tensor], dimensions: int | None) -> None:
    """Refuse what DeepSpeed has put into an optimizer in place of the parameters that it was made with.

    Args:
        params: of the optimizer at its first step.
        dimensions: `most_dimensions` of those that it was made with.

    Raises:
        ValueError: DeepSpeed is loaded, and there are flat parameters only where there were others.
    """
    if "deepspeed" in sys.modules and dimensions is not None and most_dimensions(params) == 1 < dimensions:
        raise ValueError(
            f"DeepSpeed has replaced the parameters by flat shards and {NOT_SEEN}. Hand deepspeed.initialize the "
            f"optimizer without ZClipOptimizer, then call {ON_DEEPSPEED}"
        )
