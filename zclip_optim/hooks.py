"""torch's hooks of an optimizer, for one that does not go through the methods of torch's base class that call them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

KINDS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


def make_hook_dicts(optimizer: Optimizer) -> None:
    """What Optimizer.__init__ makes and the inherited register_*_hook methods fill."""
    for kind in KINDS:
        setattr(optimizer, f"_optimizer_{kind}_hooks", OrderedDict())


def step_within_hooks(optimizer: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `step` with the arguments as the hooks before it leave them, then the hooks after it."""
    args = (optimizer, *args)
    for pre_hook in optimizer._optimizer_step_pre_hooks.values():
        args, kwargs = replaced((args, kwargs), pre_hook(optimizer, args, kwargs))
    result = step(*args[1:], **kwargs)
    for post_hook in optimizer._optimizer_step_post_hooks.values():
        post_hook(optimizer, args, kwargs)
    return result


def replaced(value: Any, by: Any) -> Any:
    """What a hook returned, if it returned something."""
    return value if by is None else by
