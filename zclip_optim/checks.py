"""What a ZClipOptimizer cannot wrap, and the sentences that say what to do instead.

Clipping before an optimizer's step() takes gradients that lie in `p.grad` by then, as the step will use them, and a
step that is taken when it is called. Trainers hand out optimizers of which one or the other is not true. They are known
by the names of their classes, so that no package is imported for it, also where another optimizer holds them.
"""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch.optim import Optimizer

INTERFACE = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")


class Foreign(NamedTuple):
    """A class of optimizers, by its name and the packages that have it, what they are and how to clip all the same."""

    name: str
    packages: tuple[str, ...]
    what: str
    instead: str


LATE = "may do nothing, or make or unscale the gradients first"
FIRST = "Wrap first, then prepare: "
CALLBACK = "zclip_optim.integrations.lightning.ZClipCallback"
FOREIGN = (
    Foreign(
        "AcceleratedOptimizer",
        ("accelerate",),
        f"what Accelerate's prepare returned, whose step() {LATE}",
        f"{FIRST}accelerator.prepare(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "_FabricOptimizer",
        ("lightning", "lightning_fabric"),
        f"what Fabric's setup returned, whose step() {LATE}",
        f"{FIRST}fabric.setup(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "LightningOptimizer",
        ("lightning", "pytorch_lightning"),
        f"Lightning's own wrapper, whose step() {LATE}",
        f"{FIRST}return ZClipOptimizer(optimizer) from configure_optimizers, or use {CALLBACK}",
    ),
    Foreign(
        "DPOptimizer",
        ("opacus",),
        f"what Opacus' make_private returned, whose step() {LATE}",
        f"{FIRST}make_private(module=model, optimizer=ZClipOptimizer(optimizer), ...)",
    ),
    Foreign(
        "_WrappedOptimizer",
        ("ray",),
        f"what Ray's prepare_optimizer returned, whose step() {LATE}",
        f"{FIRST}prepare_optimizer(ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "OptimizerWrapper",
        ("colossalai",),
        f"what ColossalAI's boost returned, whose step() {LATE}",
        f"{FIRST}booster.boost(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "LayerWiseDummyOptimizer",
        ("transformers",),
        "the Trainer's for layer-wise updates, which are made within backward and not in its step()",
        "Choose an optim that is not layer-wise",
    ),
    Foreign(
        "CPUOffloadOptimizer",
        ("torchao",),
        "torchao's, which copies the gradients to the host while backward runs and waits for them only in its step()",
        "Use fully_shard with CPUOffloadPolicy, or torchao's optimizers of 8 or 4 bits, which can be wrapped",
    ),
)

UPDATES = re.compile(r"step_.+|.+_step|fused_backward|fused_back_pass")  # methods that stand in for step()
QUESTIONS = re.compile(r"(get|has|is|set|init|reset|validate|load|save|log)_.+|step_(size|count).*")  # that do not


def check_base_optimizer(base_optimizer: Any, wrapper: type) -> None:
    """Refuse what `wrapper`, the class of a ZClipOptimizer, cannot wrap.

    Raises:
        TypeError: it is a class or no optimizer, or it is or holds an optimizer that is wrapped already or whose step()
            changes the gradients first.
        ValueError: it is differentiable.
    """
    if isinstance(base_optimizer, type):
        raise TypeError(
            f"base_optimizer must be an optimizer instance, got the class {base_optimizer.__name__}; "
            f"write ZClipOptimizer({base_optimizer.__name__}(model.parameters(), ...))"
        )
    missing = [name for name in INTERFACE if not hasattr(base_optimizer, name)]
    if missing:  # not isinstance: ScheduleFreeWrapper, for one, is an optimizer without torch's base class
        kind = type(base_optimizer).__name__
        raise TypeError(f"base_optimizer must be an optimizer, got {kind}, which has no {', '.join(missing)}")
    for optimizer in _with_those_inside(base_optimizer):
        reason = _why_not(optimizer, wrapper)
        if reason:
            raise TypeError(f"base_optimizer {'is' if optimizer is base_optimizer else 'holds'} {reason}")
    if any(group.get("differentiable") for group in base_optimizer.param_groups):
        raise ValueError("base_optimizer must not have differentiable=True: clipping writes to the gradients in place")


def _with_those_inside(optimizer: Any) -> list[Any]:
    """An optimizer and those that it holds, as attributes or in a list or dict that is one."""
    found = [optimizer]
    for holder in found:  # which grows meanwhile
        inside = (value for value in _held(holder) if _looks_like_optimizer(value))
        found += [value for value in inside if all(value is not other for other in found)]
    return found


def _held(holder: Any) -> Iterator[Any]:
    for value in list(_attributes(holder).values()):
        yield value
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from list(value.values())


def _attributes(holder: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = getattr(holder, "__dict__", {})
    return attributes


def _looks_like_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or (hasattr(type(value), "step") and hasattr(type(value), "zero_grad"))


def _why_not(optimizer: Any, wrapper: type) -> str | None:
    """What keeps this optimizer from being wrapped, and what to do instead; None if nothing does."""
    bases = type(optimizer).__mro__
    for foreign in FOREIGN:
        if any(cls.__name__ == foreign.name and _package(cls) in foreign.packages for cls in bases):
            return f"{foreign.what}, so that the norm of the gradients cannot be measured before. {foreign.instead}"
    if isinstance(optimizer, wrapper):
        return "a ZClipOptimizer already; wrapping it again would clip twice"
    if hasattr(type(optimizer), "skip_synchronize"):
        return (
            "Horovod's, which waits for the gradients of the other ranks in its step() only. Clip in the loop: "
            "optimizer.synchronize(), then zclip_optim.ZClip().step(model), then the step in skip_synchronize()"
        )
    for name, value in _attributes(optimizer).items():
        if _is_active_scaler(value):
            return (
                f"an optimizer with a loss scaler of its own, {name}: its step() {LATE}. Use torch.amp.GradScaler "
                "around it: scaler.step(ZClipOptimizer(optimizer))"
            )
    return None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_active_scaler(value: Any) -> bool:
    """Whether it is a GradScaler, a DynamicLossScaler or another one, and switched on."""
    if not any(cls.__name__.endswith("Scaler") for cls in type(value).__mro__):
        return False
    is_enabled = getattr(value, "is_enabled", None)
    return bool(is_enabled()) if callable(is_enabled) else True


def refuse_unexpected(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keyword arguments that are none of ZClip's, such as those of the optimizer to wrap.

    Raises:
        TypeError: there are such arguments; shows what to pass where a class is asked for.
    """
    known = list(known)
    for name in names:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if close:
            raise TypeError(f"ZClipOptimizer got an unexpected keyword argument {name!r}; did you mean {close[0]!r}?")
        raise TypeError(
            f"ZClipOptimizer got an unexpected keyword argument {name!r}: it takes an optimizer, made with arguments "
            "of its own. Where a class is asked for, to be called with parameters and such arguments, pass one like\n\n"
            "    class ClippedAdamW(ZClipOptimizer):\n"
            "        def __init__(self, params, **options):\n"
            "            super().__init__(torch.optim.AdamW(params, **options))"
        )


def refuse_unclipped_update(name: str, value: Any) -> None:
    """Refuse a method that updates parameters and is not step().

    Raises:
        AttributeError: it is one; so code that asks with `hasattr` goes on with step().
    """
    if inspect.ismethod(value) and UPDATES.fullmatch(name) and not QUESTIONS.fullmatch(name):
        raise AttributeError(
            f"{name} of {type(value.__self__).__name__} updates parameters without step(), where nothing would be "
            f"clipped: use step(), or base_optimizer.{name} to go without clipping"
        )
