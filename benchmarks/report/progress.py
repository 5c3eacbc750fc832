"""Progress bars."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from benchmarks.training.run import StepRecord


def progress_interval() -> float:
    """Seconds between two looks of a progress bar; a log file needs fewer lines than a terminal."""
    return 0.5 if sys.stderr.isatty() else 10.0


class StepProgress:
    """A bar over the steps of a run with the last loss and norm, and the share of steps clipped so far."""

    def __init__(self, label: str, steps: int, taken: int = 0, quiet: bool = False) -> None:
        self.bar = tqdm(
            total=steps, initial=taken, desc=label, unit="step", mininterval=progress_interval(), disable=quiet
        )
        self.seen = self.clipped = 0

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def show(self, record: StepRecord) -> None:
        """One step more."""
        self.seen += 1
        self.clipped += record.clipped
        text = f"loss {record.loss:.2f}, norm {record.grad_norm:.2f}, clipped {self.clipped / self.seen:.1%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
