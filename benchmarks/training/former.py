"""The first default of this project, `patience=25` as it was, for the record of what it cost."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA, Z_THRESH, WARMUP, PATIENCE, EPS = 0.97, 2.5, 25, 25, 1e-6


@dataclass
class FormerDefault:
    """The paper's rule, but from the spike after PATIENCE in a row on the averages are fed the winsorised norm.

    fed = mu + z_thresh * max(sigma, eps * mu)
    """

    mean: float = 0.0
    var: float = 0.0
    step: int = 0
    streak: int = 0

    def clip(self, norm: float) -> float:
        """What a finite norm is clipped to; the statistics move."""
        if norm == 0:
            return norm
        self.step += 1
        if self.step <= WARMUP:
            return self._collect(norm)
        std, floor = self.var**0.5, EPS * self.mean
        z = (norm - self.mean) / (std + floor)
        if z <= Z_THRESH:
            self.streak = 0
            return self._feed(norm)
        clipped = min(norm, self.mean + Z_THRESH**2 / z * std)
        self._feed(clipped if self.streak < PATIENCE else self.mean + Z_THRESH * max(std, floor))
        self.streak += 1
        return clipped

    def _collect(self, norm: float) -> float:
        """Mean and population variance of the norms so far."""
        before = self.mean
        self.mean += (norm - before) / self.step
        self.var += ((norm - before) * (norm - self.mean) - self.var) / self.step
        return norm

    def _feed(self, norm: float) -> float:
        """mu <- alpha mu + (1 - alpha) fed; the same for sigma^2, with the new mu."""
        self.mean = ALPHA * self.mean + (1 - ALPHA) * norm
        self.var = ALPHA * self.var + (1 - ALPHA) * (norm - self.mean) ** 2
        return norm
