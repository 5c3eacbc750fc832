"""Warnings about the failures that people meet, each kind once per run and without a word in between."""

import math
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from zclip_optim.state import StepRecord
from zclip_optim.zclip import NormStats, ZClipConfig

WINDOW = 200  # steps
HIGH_CLIP_RATE = 0.2
NO_SPREAD = 1e-5  # relative; below it norms are equal but for rounding


class ZClipWarning(UserWarning):
    """Something about the gradients or the settings makes adaptive clipping less useful than it could be."""


class Health:
    """Watches the statistics go by: of every step, or, on an accelerator, of those after which they were read."""

    def __init__(self, config: ZClipConfig) -> None:
        self.config = config
        self._patience = math.inf if config.patience is None else config.patience
        self._warmup = config.warmup_steps
        self._said: set[str] = set()
        self._window_starts: dict[int, NormStats] = {}

    def check(self, before: Sequence[StepRecord], after: Sequence[StepRecord]) -> None:
        """Warn if what has happened between two steps, one record per scope, gives reason to."""
        for scope, (old_record, new_record) in enumerate(zip(before, after, strict=True)):
            old, new = old_record.decision.stats, new_record.decision.stats
            if new.step // WINDOW > old.step // WINDOW or old.step < self._warmup or new.streak > self._patience:
                self._check_scope(scope, old, new)

    def _check_scope(self, scope: int, old: NormStats, new: NormStats) -> None:
        if old.step < self._warmup <= new.step:
            self._check_warm_up(new, self._where(scope))
        if old.streak <= self._patience < new.streak:
            self._warn_of_regime(new, self._where(scope))
        self._check_clip_rate(scope, old, new)

    def _where(self, scope: int) -> str:
        return f" in param group {scope}" if self.config.scope == "group" else ""

    def _check_warm_up(self, stats: NormStats, where: str) -> None:
        if self._warmup > 1 and stats.var**0.5 <= NO_SPREAD * stats.mean:
            self.warn(
                "warm-up",
                f"all {self._warmup} gradient norms of the warm-up{where} were {stats.mean:.4g}: probably they were "
                "clipped before they got here, which hides every spike. Turn that clipping off (a trainer's "
                "max_grad_norm or gradient_clip_val, clip_grad_norm_ in a loop)",
            )

    def _warn_of_regime(self, stats: NormStats, where: str) -> None:
        self.warn(
            "regime",
            f"more than patience={self.config.patience} spikes in a row{where}: a new regime of the gradient norm was "
            f"accepted at step {stats.step}, and its mean, now {stats.mean:.4g}, follows. If the run is diverging, "
            "lower the learning rate; a larger patience waits longer, patience=None for ever",
        )

    def _check_clip_rate(self, scope: int, old: NormStats, new: NormStats) -> None:
        start = self._window_starts.setdefault(scope, old)
        steps, clipped = new.step - start.step, new.clipped_steps - start.clipped_steps
        if steps < 0:  # another checkpoint was loaded
            self._window_starts[scope] = new
        if steps >= WINDOW:
            if clipped > HIGH_CLIP_RATE * steps:
                self.warn(
                    "clip rate",
                    f"{clipped} of the last {steps} steps{self._where(scope)} were clipped, at step {new.step}: the "
                    f"learning rate may be too high, or z_thresh={self.config.z_thresh:.3g} too low for the spread of "
                    f"these norms (mean {new.mean:.4g}, std {new.var**0.5:.4g})",
                )
            self._window_starts[scope] = new

    def check_nonfinite(self, streak: int) -> None:
        """Warn if a streak of norms that are not finite has come half way to the limit."""
        limit = self.config.max_consecutive_nonfinite
        if self.config.nonfinite == "skip" and limit is not None and limit > 1 and streak >= (limit + 1) // 2:
            self.warn(
                "nonfinite",
                f"the gradient norm was NaN or infinite for {streak} steps in a row, which were skipped; at "
                f"max_consecutive_nonfinite={limit} NonFiniteGradientError is raised and names the parameters",
            )

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, ZClipWarning, stacklevel=_level_of_the_user())


def _level_of_the_user() -> int:
    """The stacklevel, as seen from the caller, of the first frame that is neither this package's nor torch's."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
