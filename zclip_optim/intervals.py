"""What has happened since somebody last read, for each reader, though the running state counts once for all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from zclip_optim.algorithm import Scalar

METRICS, LOG = "metrics", "log"  # the readers: whoever reads `metrics`, and a trainer's callback when it logs


class Interval(NamedTuple):
    """Steps one after the other, in one scope.

    steps: all of them. max_norm: the largest norm of those whose total norm was finite; 0 if there is none. min_coef:
    the smallest `clip_coef`. spikes, skips: how many of the steps were spikes, and how many were skipped.
    """

    steps: Scalar = 0
    max_norm: Scalar = 0.0
    min_coef: Scalar = 1.0
    spikes: Scalar = 0
    skips: Scalar = 0

    def followed_by(self, later: "Interval") -> "Interval":
        """Both together, of numbers."""
        return Interval(
            self.steps + later.steps,
            max(self.max_norm, later.max_norm),
            min(self.min_coef, later.min_coef),
            self.spikes + later.spikes,
            self.skips + later.skips,
        )


class Intervals:
    """The interval of each reader, one `Interval` per scope. Reading ends that of the reader alone."""

    def __init__(self) -> None:
        self.restart(1)

    def restart(self, n_scopes: int) -> None:
        """Begin with no step, for all readers."""
        self._of = {reader: [Interval()] * n_scopes for reader in (METRICS, LOG)}
        self._ended = set(self._of)

    def add(self, new: list[Interval]) -> None:
        """Take over the steps that the running state has counted; where a reader has ended one, they begin the next."""
        for reader, before in self._of.items():
            if reader in self._ended:
                self._of[reader] = new
            else:
                self._of[reader] = [old.followed_by(later) for old, later in zip(before, new, strict=True)]
        self._ended.clear()

    def end(self, reader: str) -> list[Interval]:
        """The interval of a reader up to now, and the same again until there are other steps."""
        self._ended.add(reader)
        return self._of[reader]

    def arrange(self, places: Sequence[int | None]) -> None:
        """Bring the scopes into another order; see `arranged`."""
        self._of = {reader: arranged(values, places, Interval()) for reader, values in self._of.items()}


def arranged(values: Sequence[Any], places: Sequence[int | None], new: Any) -> list[Any]:
    """The values from these places, one per scope; `new` for a scope that has none, and if there is no scope at all."""
    return [new if place is None or place >= len(values) else values[place] for place in places] or [new]
