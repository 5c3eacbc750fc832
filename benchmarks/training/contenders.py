"""A method with its options, under the name that it has in every table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Contender:
    """A method with one setting for all that it is run on."""

    label: str
    method: str  # of METHODS
    options: Options = ()
    scale_free: bool = False  # only for optimizers of Adam's kind
    special: bool = False  # only for the workloads that name it
    informs: bool = False  # decides nothing: fewer seeds are enough


def fixed(threshold: float) -> Contender:
    """Clipping at a norm; at 1.0 it has no option."""
    return Contender(f"fixed {threshold:g}", "fixed", () if threshold == 1 else (("max_norm", threshold),))


def ours(scale_free: bool = False, special: bool = False, **options: Any) -> Contender:
    """The paper's rule with these options; which of them are defaults changes nothing here."""
    return Contender(", ".join(written(options.items())), "paper", tuple(options.items()), scale_free, special)


def written(options: Iterable[tuple[str, Any]]) -> list[str]:
    """Each as name=value."""
    return [f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}" for name, value in options]


def informing(contender: Contender) -> Contender:
    """The same, shown for information."""
    return replace(contender, informs=True)


NONE, PAPER = Contender("none", "none"), Contender("paper", "paper")
AUTOCLIP, PUBLISHED = Contender("autoclip", "autoclip"), Contender("zclip 1.0.0", "published")
AUTOCLIP_LOW = Contender("autoclip, 10th percentile", "autoclip", (("quantile", 0.1),))
CAPPED = ours(scale_free=True, max_grad_norm=1)
PATIENT = ours(patience=200)
FALLING = ours(alpha_down=0.8)
FALLING_LESS = ours(alpha_down=0.9)
LOOKING_BACK = ours(lookback=0.1)
FOLLOWING = ours(lookback=0.1, alpha_down=0.9)
FOLLOWING_CAPPED = ours(scale_free=True, lookback=0.1, alpha_down=0.9, max_grad_norm=1)
FOR_INFORMATION = (
    ours(lookback=0.05),
    ours(lookback=0.2),
    ours(lookback=0.1, alpha_down=0.8),
)
