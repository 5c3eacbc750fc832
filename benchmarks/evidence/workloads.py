"""What is trained and what clips it, in `instability` and `regret`, and the runs that the two make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.paper.cells import BAD_SHARD, CARTPOLE, CLEAN, Cell
from benchmarks.paper.tables import CARTPOLE_LR, EPISODES
from benchmarks.training.contenders import (
    ADAGC,
    AUTOCLIP,
    CAPPED,
    FALLING,
    FALLING_CAPPED,
    FALLING_LOWER,
    FALLING_SKIPPING_CAPPED,
    NONE,
    PAPER,
    PATIENT,
    PUBLISHED,
    Contender,
    fixed,
    ours,
)
from benchmarks.training.presets import PRESETS
from benchmarks.training.problems import PROBLEMS


@dataclass(frozen=True)
class Workload:
    """Everything of a cell but the method and the seed, and how many seeds it has."""

    label: str
    architecture: str
    lr: float
    steps: int
    batch: int
    seeds: int
    condition: str = CLEAN
    preset: str = "pico"

    def cell(self, contender: Contender, seed: int) -> Cell:
        """One of its runs."""
        where = (self.condition, self.steps, self.batch)
        return Cell(self.architecture, contender.method, self.lr, seed, *where, contender.options, self.preset)

    @property
    def scale_free(self) -> bool:
        """Whether its optimizer is of Adam's kind."""
        return self.cell(NONE, 0).scale_free

    def suits(self, contender: Contender) -> bool:
        """Whether a method is run on it."""
        return self.scale_free or not contender.scale_free


@dataclass(frozen=True)
class Comparison:
    """Workloads, and the methods that are compared on them."""

    workloads: tuple[Workload, ...]
    contenders: tuple[Contender, ...]

    def pairs(self) -> list[tuple[Workload, Contender]]:
        """What is run."""
        return [(w, c) for w in self.workloads for c in self.contenders if w.suits(c)]

    def cells(self) -> list[Cell]:
        """Its runs."""
        return [w.cell(c, seed) for w, c in self.pairs() for seed in range(w.seeds)]

    def resized(self, seeds: int | None, steps: int | None) -> Comparison:
        """With other numbers of seeds and steps for all workloads."""
        changes = {"seeds": seeds, "steps": steps}
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, workloads=tuple(replace(workload, **given) for workload in self.workloads))

    def of(self, architectures: Sequence[str] | None, labels: Sequence[str] | None) -> Comparison:
        """With these alone; None for all."""
        return Comparison(
            tuple(w for w in self.workloads if architectures is None or w.architecture in architectures),
            tuple(c for c in self.contenders if labels is None or c.label in labels),
        )


REGRESSION_SEEDS, SUM_SEEDS = 8, 4
REGRESSIONS = tuple(
    Workload(f"regression, lr {lr:g}", "regression", lr, 5_000, 50, REGRESSION_SEEDS) for lr in (0.003, 0.01, 0.03)
)
SUMS = tuple(
    Workload(PROBLEMS[name].label, name, 0.01, steps, 512, SUM_SEEDS)
    for name, steps in (("sums-0.95", 3_000), ("sums-0.98", 3_000), ("sums-transformer", 2_500))
)

INSTABILITY = Comparison(
    (*REGRESSIONS, *SUMS),
    (
        NONE,
        *map(fixed, (0.01, 0.1, 1, 10)),
        AUTOCLIP,
        PUBLISHED,
        PAPER,
        Contender("patience=25, winsorised", "former"),
        PATIENT,
        FALLING,
        ours(z_skip=6),
        ours(z_skip=10),
        ours(alpha_down=0.8, z_skip=6),
        ours(alpha_down=0.8, z_skip=10),
        FALLING_LOWER,
        ours(alpha_down=0.8, z_skip=10, patience=200),
    ),
)


def with_bad_shard(workload: Workload) -> tuple[Workload, Workload]:
    """Clean, and with the bad shard."""
    return workload, replace(workload, label=f"{workload.label}, {BAD_SHARD}", condition=BAD_SHARD)


def transformer(label: str, architecture: str, seeds: int) -> Workload:
    """A language model of the small preset."""
    preset = PRESETS["pico"]
    return Workload(label, architecture, preset.lr, preset.steps, preset.batch, seeds)


REGRET = Comparison(
    (
        *with_bad_shard(transformer("LLaMA", "llama", 4)),
        *with_bad_shard(transformer("GPT-2", "gpt2", 4)),
        *with_bad_shard(Workload("ViT", "vit", 2e-3, 300, 16, 3)),
        *with_bad_shard(Workload("digits, SGD", "digits-sgd", 0.1, 600, 32, 10)),
        *with_bad_shard(Workload("digits, SGD, summed loss", "digits-sgd-sum", 0.1 / 32, 600, 32, 10)),
        Workload("CartPole", CARTPOLE, CARTPOLE_LR, EPISODES, 1, 20, preset="nano"),
        REGRESSIONS[1],
        SUMS[1],
    ),
    (
        NONE,
        *map(fixed, (0.01, 0.1, 1, 10, 100)),
        AUTOCLIP,
        ADAGC,
        PUBLISHED,
        PAPER,
        CAPPED,
        FALLING,
        FALLING_CAPPED,
        ours(alpha_down=0.8, z_skip=6),
        ours(alpha_down=0.8, z_skip=10),
        FALLING_SKIPPING_CAPPED,
        FALLING_LOWER,
    ),
)
