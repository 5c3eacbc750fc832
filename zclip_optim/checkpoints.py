"""The way of the statistics into checkpoints of the base optimizer, and back.

They stand in every param group, from where every checkpoint library carries them; if the base optimizer saves nothing
of its param groups, in an entry of their own. The way back is one, whoever loads: the wrapper, or the base optimizer by
itself, of which torch tells hooks. These write what is valid now into the param groups before, so that what stands
there after is valid too, whether the base optimizer has replaced them, all or some, or not.
"""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from zclip_optim.chain import with_those_inside
from zclip_optim.clipper import ZClip
from zclip_optim.gradients import CHOICE, choices
from zclip_optim.state import SavedState, find_param_groups, from_flat, from_state_dict, to_flat

PLAIN_STATE = ("param_groups", "state", "defaults")  # what the `__getstate__` of torch's optimizers has
PLACES = "_places"  # of a pickle
OWN_ENTRY = "zclip"  # of a state dict whose base optimizer saves nothing of the param groups


class Checkpoints:
    """Saves and restores the statistics with a base optimizer.

    Args:
        base: the optimizer, whose param groups get the statistics, or give those that it has loaded.
        parts: the optimizers that it consists of, each of which may load a checkpoint by itself.
        clipper: has the statistics.
    """

    def __init__(self, base: Any, parts: tuple[Any, ...], clipper: ZClip) -> None:
        self.base, self.parts, self.clipper = base, parts, clipper
        self._chosen = choices(base.param_groups)  # before a checkpoint is loaded
        self._are_told = True  # the hooks, of a checkpoint that is loaded
        saved = self._found_in(base.param_groups, "start afresh")
        if saved is not None:
            clipper._records.restore(saved, base.param_groups)
        publish(clipper, base.param_groups)
        self._listen()

    def save(self) -> Any:
        """The state dict of the base optimizer, with the statistics."""
        publish(self.clipper, self.base.param_groups)
        state_dict = self.base.state_dict()
        if self._are_in(find_param_groups(state_dict)):
            return state_dict
        if isinstance(state_dict, MutableMapping):
            state_dict = copy.copy(state_dict)
            state_dict[OWN_ENTRY] = self.clipper.state_dict()
        else:  # which no optimizer of torch's kind should do
            self.clipper._health.warn(
                "unsaved",
                f"the statistics are not saved: the state_dict() of {type(self.base).__name__} has no param groups and "
                "is no dict. Save optimizer.clipper.state_dict() beside it",
            )
        return state_dict

    def load(self, state_dict: Any) -> None:
        """Have the base optimizer load what `save` returned, a copy of which this is, and restore the statistics.

        Raises:
            ValueError: they are malformed. Nothing has changed then.
        """
        scope = self.clipper.config.scope
        if isinstance(state_dict, MutableMapping) and OWN_ENTRY in state_dict:
            saved: SavedState | None = from_state_dict(state_dict.pop(OWN_ENTRY), scope)
        else:
            groups = find_param_groups(state_dict)
            saved = from_flat(groups, scope)
            choices(groups)
        with self.loading(saved):
            self.base.load_state_dict(state_dict)

    @contextlib.contextmanager
    def loading(self, saved: SavedState | None) -> Iterator[None]:
        """While the base optimizer loads a checkpoint with these statistics, which are valid after; None: none are."""
        self._chosen = choices(self.base.param_groups)
        self._are_told = False
        try:
            yield
        finally:
            self._are_told = True
        self.clipper._records.restore(saved, self.base.param_groups)
        self._write()

    def before_load(self, _: int) -> None:
        """A part is about to load a checkpoint."""
        if self._are_told:
            self._chosen = choices(self.base.param_groups)
            publish(self.clipper, self.base.param_groups)

    def after_load(self, part: int) -> None:
        """A part has loaded a checkpoint: go on from the statistics in its param groups, if there are any."""
        if not self._are_told:
            return
        valid = self.clipper._records.to_save(self.base.param_groups)
        found = self._found_in(self.parts[part].param_groups, "go on as they were")
        if found is not None and self.clipper.config.scope == "group":
            start = sum(len(other.param_groups) for other in self.parts[:part])
            end = start + len(found.stats)
            found = found._replace(stats=[*valid.stats[:start], *found.stats, *valid.stats[end:]])
        if found is not None and found != valid:
            self.clipper._records.restore(found, self.base.param_groups)
        else:
            self.clipper._records.follow(self.base.param_groups)
        self._write()

    def put_into_base(self, state: Mapping[str, Any]) -> None:
        """Hand entries of a plain optimizer's `__getstate__` to the base optimizer, as if it had loaded them."""
        self.before_load(0)
        if hasattr(self.base, "__setstate__"):
            self.base.__setstate__(state)
        else:
            for name in filter(state.__contains__, PLAIN_STATE):
                setattr(self.base, name, state[name])
        for part in range(len(self.parts)):
            self.after_load(part)

    def _write(self) -> None:
        for group, choice in zip(self.base.param_groups, self._chosen, strict=False):
            group[CHOICE] = choice  # as it was: what is clipped is no more restored than other options of ours are
        publish(self.clipper, self.base.param_groups)

    def _found_in(self, param_groups: Sequence[Any], otherwise: str) -> SavedState | None:
        """The statistics in live param groups, which nobody checked."""
        try:
            return from_flat(param_groups, self.clipper.config.scope)
        except ValueError as error:
            if any(map(_has_counted, param_groups)):
                self.clipper._health.warn(
                    "stale",
                    f"the statistics {otherwise}: those in the param groups of base_optimizer are no whole ({error}). "
                    "A load_state_dict restores those of a checkpoint",
                )
            return None

    def _are_in(self, param_groups: Sequence[Any]) -> bool:
        """Whether they can be restored from these param groups of a state dict."""
        with contextlib.suppress(ValueError):
            found = from_flat(param_groups, self.clipper.config.scope)
            return found is not None and found == self.clipper._records.to_save(self.base.param_groups)
        return False

    def _listen(self) -> None:
        for i, part in enumerate(self.parts):
            for optimizer in filter(_tells, with_those_inside(part)):
                optimizer.register_load_state_dict_pre_hook(_Hook(self.before_load, i))
                optimizer.register_load_state_dict_post_hook(_Hook(self.after_load, i))

    def __getstate__(self) -> dict[str, Any]:
        """With the places of the statistics of the param groups, by which a copy knows its own."""
        return {**self.__dict__, PLACES: self.clipper._records.places_of(self.base.param_groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, around a copy of the base optimizer, which has no hooks, or silent ones."""
        places = state.pop(PLACES, None)
        self.__dict__.update(state)
        self.clipper._records.follow(self.base.param_groups, places)
        self._listen()


def publish(clipper: ZClip, param_groups: Sequence[dict[str, Any]]) -> None:
    """Write the statistics into param groups, from where `from_flat` reads them after a checkpoint.

    Raises:
        ValueError: a group's ``zclip`` is neither True nor False. Nothing has changed then.
    """
    flats = itertools.cycle(to_flat(clipper._records.to_save(param_groups), clipper.config.scope))
    for group, choice, flat in zip(param_groups, choices(param_groups), flats, strict=False):
        group.update(flat, **{CHOICE: choice})


class _Hook:
    """Calls a method of what may be gone, with a number. A copy, on a copy of the optimizer, calls nothing."""

    def __init__(self, method: Callable[[int], None] | None = None, number: int = 0) -> None:
        self.method = None if method is None else weakref.WeakMethod(method)
        self.number = number

    def __call__(self, *_: Any) -> None:
        method = self.method and self.method()
        if method:
            method(self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _tells(optimizer: Any) -> bool:
    """Whether it calls hooks when it loads a checkpoint, as torch's do."""
    return isinstance(getattr(optimizer, "_optimizer_load_state_dict_post_hooks", None), dict)


def _has_counted(group: Mapping[str, Any]) -> bool:
    """Whether a wrapped optimizer with these statistics has stepped, or they are something else."""
    step = group.get("zclip_step", 0)
    return type(step) is not int or step != 0
