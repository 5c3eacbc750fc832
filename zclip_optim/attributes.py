"""Attributes that are set on a ZClipOptimizer: which are those of the base optimizer, and which are refused."""

from typing import Any

from zclip_optim.chain import Chain

FIXED = ("base_optimizer", "clipper")  # the evaluations and the checkpoints of a wrapper belong to these two


def is_set(optimizer: Any, name: str) -> bool:
    """Whether it has an attribute that is no method or property; CPython reads all of them slower once a look at its
    `__dict__` has made that.
    """
    try:
        object.__getattribute__(optimizer, name)
    except AttributeError:
        return False
    return True


def set_on_base(base: Any, name: str, value: Any) -> bool:
    """Set an attribute of a base optimizer that has it; whether it has.

    Raises:
        AttributeError: it is several, and one of them has it.
    """
    if isinstance(base, Chain):
        for i, part in enumerate(base.parts):
            if hasattr(part, name):
                raise AttributeError(f"several optimizers have no {name!r} together: set it on optimizer.parts[{i}]")
        return False
    if not hasattr(base, name):
        return False
    setattr(base, name, value)
    return True


def refuse_another(name: str) -> None:
    """Refuse another base optimizer or clipper in a wrapper that is made already.

    Raises:
        AttributeError: that is the name.
    """
    if name not in FIXED:
        return
    raise AttributeError(
        f"{name} of a ZClipOptimizer cannot be replaced, since its checkpoints are those of the first one. Wrap the "
        "other optimizer, new = ZClipOptimizer(other, ...); new.clipper.load_state_dict(old.clipper.state_dict()) "
        "hands on the statistics"
    )


def refuse_late_option(clipper: Any, name: str, value: Any) -> None:
    """Refuse to set an option of ZClip on a wrapper that is made already, where nothing would look for it.

    Raises:
        AttributeError: it is one, and the value is not the one that holds.
    """
    options = vars(clipper.config)
    if name in options and options[name] != value:
        raise AttributeError(
            f"{name} is {options[name]!r}, as the ZClipOptimizer was made. To change it, call optimizer.state_dict(), "
            f"then make another, ZClipOptimizer(optimizer.base_optimizer, {name}={value!r}, ...), which goes on from "
            "the statistics so far"
        )
