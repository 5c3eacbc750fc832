"""A method with its options, under the name that it has in every table."""

from __future__ import annotations

from dataclasses import dataclass

Options = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Contender:
    """A method with one setting for all that it is run on."""

    label: str
    method: str  # of METHODS
    options: Options = ()
    scale_free: bool = False  # only for optimizers of Adam's kind


def fixed(threshold: float) -> Contender:
    """Clipping at a norm; at 1.0 it has no option."""
    return Contender(f"fixed {threshold:g}", "fixed", () if threshold == 1 else (("max_norm", threshold),))


def ours(scale_free: bool = False, **options: float) -> Contender:
    """The paper's rule with these options; which of them are defaults changes nothing here."""
    label = ", ".join(f"{name}={value:g}" for name, value in options.items())
    return Contender(label, "paper", tuple(options.items()), scale_free)


NONE, PAPER = Contender("none", "none"), Contender("paper", "paper")
AUTOCLIP, PUBLISHED = Contender("autoclip", "autoclip"), Contender("zclip 1.0.0", "published")
ADAGC = Contender("AdaGC", "adagc", scale_free=True)
CAPPED = ours(scale_free=True, max_grad_norm=1)
FALLING = ours(alpha_down=0.8)
FALLING_CAPPED = ours(scale_free=True, alpha_down=0.8, max_grad_norm=1)
FALLING_SKIPPING_CAPPED = ours(scale_free=True, alpha_down=0.8, z_skip=10, max_grad_norm=1)
FALLING_LOWER = ours(alpha_down=0.8, z_thresh=2)
PATIENT = ours(patience=200)
