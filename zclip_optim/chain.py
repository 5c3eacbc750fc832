"""Several optimizers as one."""

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import torch

from zclip_optim.state import find_param_groups

PARTS = "parts"  # the entry of a state dict that holds those of the parts as they are
SWITCHES = ("train", "eval")  # of ScheduleFree, for every part that has them


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is any kind of list, such as Hydra's, and not an optimizer that is one."""
    return isinstance(value, Sequence) and not hasattr(type(value), "step")


def given(closure: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments of a step; none where none were given, as some optimizers' take none."""
    return (closure, *args) if args or closure is not None else ()


class Chain:
    """Optimizers of one model that step one after the other, each over parameters of its own.

    The state dict has the form of a single optimizer's, with the parameters of all parts numbered in a row, so that
    checkpoint libraries take it; if a part saves something else, it holds the parts' state dicts as they are.

    Args:
        parts: the optimizers.

    Raises:
        TypeError: a part cannot step without a closure.
        ValueError: there is none, or a parameter belongs to two of them.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        if not parts:
            raise ValueError("base_optimizer must be an optimizer or a list of optimizers, got an empty list")
        owners: dict[int, Any] = {}
        for i, part in enumerate(parts):
            _refuse_closure(part)
            if any(part is other for other in parts[:i]):
                raise ValueError(
                    f"base_optimizer: the list has the same {type(part).__name__} twice, which would be stepped twice"
                )
            for p in _params(part):
                if owners.setdefault(id(p), part) is not part:
                    names = f"{type(owners[id(p)]).__name__} and {type(part).__name__}"
                    raise ValueError(
                        f"base_optimizer: {names} hold the same parameter, of shape {tuple(p.shape)}, which would be "
                        "stepped twice: give each parameter to one of them"
                    )
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of all parts in a row, the same dicts; a list that can be edited in place, as far as it is
        clear which part is meant.
        """
        groups = _Groups([group for part in self.parts for group in part.param_groups])
        groups.chain = self
        return groups

    @param_groups.setter
    def param_groups(self, value: Sequence[dict[str, Any]]) -> None:
        for part, groups in zip(self.parts, self.shares(value), strict=True):
            part.param_groups = groups

    def shares(self, groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """What each part has of these groups: its own, those that are left of them; or new ones in their places.

        Raises:
            ValueError: it is not clear whose they are.
        """
        owners = {id(group): i for i, part in enumerate(self.parts) for group in part.param_groups}
        whose = [owners.get(id(group), -1) for group in groups]
        if -1 not in whose and whose == sorted(whose) and len(set(map(id, groups))) == len(groups):
            pairs = list(zip(whose, groups, strict=True))
            return [[group for owner, group in pairs if owner == i] for i in range(len(self.parts))]
        shares = self._shared_out(groups, ". To add one, call add_param_group of the one meant, optimizer.parts[i]")
        for i, (part, share) in enumerate(zip(self.parts, shares, strict=True)):
            others = [owners[id(group)] for group in share if owners.get(id(group), i) != i]
            if others:
                raise ValueError(
                    f"a param group of optimizer.parts[{others[0]}] stands in the place of one of "
                    f"optimizer.parts[{i}], {type(part).__name__}: the groups must stay in the order of the parts"
                )
        return shares

    @property
    def state(self) -> "_States":
        """The per-parameter state of all parts."""
        return _States(self.parts)

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        for part in self.parts:
            part.state = defaultdict(dict, {p: value[p] for p in _params(part) if p in value})

    @property
    def defaults(self) -> dict[str, Any]:
        """The default hyperparameters that all parts have, with the values of the first one."""
        first, *others = [getattr(part, "defaults", {}) for part in self.parts]
        return {name: value for name, value in first.items() if all(name in defaults for defaults in others)}

    @defaults.setter
    def defaults(self, value: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.defaults.update(value)

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the closure, if there is one, once for all parts, and step each; the closure's loss.

        Args:
            closure: as of any optimizer.
            *args, **kwargs: what each part's step gets as well.
        """
        loss = None
        if callable(closure):
            loss, closure = closure(), None
        positional = given(closure, args)
        for part in self.parts:
            part.step(*positional, **kwargs)
        return loss

    def zero_grad(self, **options: Any) -> None:
        """Reset the gradients of all parts."""
        for part in self.parts:
            part.zero_grad(**options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, since only its caller knows which part is to have it.

        Raises:
            TypeError: always.
        """
        raise TypeError("there are several optimizers: call add_param_group of the one meant, optimizer.parts[i]")

    def state_dict(self) -> dict[str, Any]:
        """Of all parts."""
        state_dicts = [part.state_dict() for part in self.parts]
        if not all(map(_is_plain, state_dicts)):
            return {PARTS: state_dicts}
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        count = itertools.count()
        for state_dict in state_dicts:
            numbers = dict(zip(_numbers(state_dict["param_groups"]), count, strict=False))
            state.update((numbers[number], entry) for number, entry in state_dict["state"].items())
            groups += _renumbered(state_dict["param_groups"], numbers)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: it is of other parts or groups. Nothing has changed then.
        """
        for part, own in zip(self.parts, self._split(state_dict), strict=True):
            part.load_state_dict(own)

    def _split(self, state_dict: Mapping[str, Any]) -> list[Any]:
        """The state dict of each part."""
        if PARTS in state_dict:
            if len(state_dict[PARTS]) != len(self.parts):
                raise ValueError(
                    f"the state dict is of {len(state_dict[PARTS])} optimizers, this is a list of {len(self.parts)}"
                )
            for part, saved in zip(self.parts, state_dict[PARTS], strict=True):
                _refuse_other_sizes(find_param_groups(saved), find_param_groups(part.state_dict()))
            return list(state_dict[PARTS])
        shares = self._shared_out(state_dict["param_groups"])
        _refuse_other_sizes(list(itertools.chain(*shares)), self.param_groups)
        own_dicts = []
        for groups in shares:
            numbers = {number: i for i, number in enumerate(_numbers(groups))}
            state = {numbers[number]: entry for number, entry in state_dict["state"].items() if number in numbers}
            own_dicts.append({"state": state, "param_groups": _renumbered(groups, numbers)})
        return own_dicts

    def _shared_out(self, groups: Sequence[dict[str, Any]], instead: str = "") -> list[list[dict[str, Any]]]:
        """As many of these groups as each part has."""
        sizes = [len(part.param_groups) for part in self.parts]
        if len(groups) != sum(sizes):
            raise ValueError(f"there are {len(groups)} param groups for optimizers that have {sizes}{instead}")
        rest = iter(groups)
        return [list(itertools.islice(rest, size)) for size in sizes]

    def __getattr__(self, name: str) -> Any:
        methods = [getattr(part, name) for part in self.parts if hasattr(part, name)] if name in SWITCHES else []
        if not methods:
            raise AttributeError(f"several optimizers have no {name!r} together: see optimizer.parts")

        def switch_all() -> None:
            for method in methods:
                method()

        return switch_all

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.parts))


class _Groups(list[dict[str, Any]]):
    """The param groups of several optimizers at the time of a look: an edit in place is one of theirs, or is refused.

    Attributes:
        chain: the optimizers.
    """

    chain: Chain

    def edit(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do with the parts' groups what a method of `list` would do with this."""
        chain, edited = self.chain, list(self)
        if list(map(id, chain.param_groups)) != list(map(id, self)):
            raise ValueError("these param groups are of an earlier look: edit optimizer.param_groups itself")
        result = method(edited, *args, **kwargs)
        for part, share in zip(chain.parts, chain.shares(edited), strict=True):
            if part.param_groups is part.param_groups:
                part.param_groups[:] = share
            else:  # made anew at every look
                part.param_groups = share
        super().__setitem__(slice(None), edited)
        return self if result is edited else result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is a plain list."""
        return list, (list(self),)


def _edit_by(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self.edit(method, *args, **kwargs)


for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"):
    setattr(_Groups, _name, _edit_by(getattr(list, _name)))
for _name in ("delitem", "iadd", "imul", "setitem"):
    setattr(_Groups, f"__{_name}__", _edit_by(getattr(list, f"__{_name}__")))


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one: what is written for a parameter goes to the one that holds it."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts

    def _of(self, p: Any) -> Any:
        for part in self._parts:
            if p in part.state:
                return part.state
        for part in self._parts:
            if any(p is other for other in _params(part)):
                return part.state
        raise KeyError(p)

    def __getitem__(self, p: Any) -> Any:
        return self._of(p)[p]

    # The inherited ones ask with [], which makes an entry where there is none.

    def get(self, p: Any, default: Any = None) -> Any:
        """The state of a parameter, if it has one."""
        return self._of(p).get(p, default) if p in self else default

    def pop(self, p: Any, *default: Any) -> Any:
        """Take the state of a parameter out."""
        if p in self:
            return super().pop(p)
        if not default:
            raise KeyError(p)
        return default[0]

    def setdefault(self, p: Any, default: Any = None) -> Any:
        """The state of a parameter, which is `default` from now on if it has none."""
        if p not in self:
            self[p] = default
        return self[p]

    def __setitem__(self, p: Any, value: Any) -> None:
        self._of(p)[p] = value

    def __delitem__(self, p: Any) -> None:
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(part.state for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


def _params(part: Any) -> Iterator[torch.Tensor]:
    return (p for group in part.param_groups for p in group["params"])


def _refuse_closure(part: Any) -> None:
    closure = inspect.signature(part.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optimizer: {type(part).__name__} cannot be one of several optimizers, since its step() needs a "
            "closure, to evaluate it where it has moved its own parameters"
        )


def _refuse_other_sizes(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Before the first part loads: a later one would refuse them when that has loaded."""
    if len(saved) != len(own):
        raise ValueError(f"a part of the state dict has {len(saved)} param groups, the one here {len(own)}")
    for there, here in zip(saved, own, strict=True):
        if len(there["params"]) != len(here["params"]):
            raise ValueError(
                f"a param group of the state dict has {len(there['params'])} parameters, the one here "
                f"{len(here['params'])}"
            )


def _is_plain(state_dict: Any) -> bool:
    """Whether it has torch's form and nothing else: parameters by number."""
    if not isinstance(state_dict, Mapping) or set(state_dict) != {"state", "param_groups"}:
        return False
    numbers = set(_numbers(state_dict["param_groups"]))
    return all(number in numbers for number in state_dict["state"])


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [number for group in groups for number in group["params"]]


def _renumbered(groups: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int]) -> list[dict[str, Any]]:
    return [{**group, "params": [numbers[number] for number in group["params"]]} for group in groups]


def with_those_inside(optimizer: Any) -> list[Any]:
    """An optimizer and those that it holds, as attributes or in a list or dict that is one."""
    found = [optimizer]
    for holder in found:  # which grows meanwhile
        inside = (value for value in _held(holder) if looks_like_optimizer(value))
        found += [value for value in inside if all(value is not other for other in found)]
    return found


def _held(holder: Any) -> Iterator[Any]:
    for value in list(attributes_of(holder).values()):
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from list(value.values())


def attributes_of(holder: Any) -> dict[str, Any]:
    """Its own."""
    attributes: dict[str, Any] = getattr(holder, "__dict__", {})
    return attributes


def looks_like_optimizer(value: Any) -> bool:
    """Whether it is one, of torch's class or not."""
    kind = type(value)
    return isinstance(value, torch.optim.Optimizer) or (hasattr(kind, "step") and hasattr(kind, "zero_grad"))
