"""What is trained and what clips it, in `instability` and `regret`, and the runs that the two make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.paper.cells import BAD_SHARD, CARTPOLE, CLEAN, FIRST_SEED, TRIPLED, Cell
from benchmarks.paper.tables import CARTPOLE_LR, EPISODES
from benchmarks.training.contenders import (
    AUTOCLIP,
    AUTOCLIP_LOW,
    CAPPED,
    FALLING,
    FALLING_LESS,
    FOLLOWING,
    FOLLOWING_CAPPED,
    FOR_INFORMATION,
    LOOKING_BACK,
    NONE,
    PAPER,
    PATIENT,
    PUBLISHED,
    Contender,
    fixed,
    informing,
    ours,
)
from benchmarks.training.presets import PRESETS
from benchmarks.training.problems import PROBLEMS

FEW = 4  # seeds, of a method that decides nothing
BETAS = (0.95, 0.999)  # beta2 of language models: what they are trained with, and torch's default


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
    beta2: float = 0.999
    muon: bool = False
    contenders: tuple[str, ...] | None = None  # labels, of those that are run on it; None: all

    def cell(self, contender: Contender, seed: int) -> Cell:
        """One of its runs."""
        where = (self.condition, self.steps, self.batch)
        how = (contender.options, self.preset, self.beta2, self.muon)
        return Cell(self.architecture, contender.method, self.lr, seed, *where, *how)

    def seeds_of(self, contender: Contender) -> range:
        """Of a method's runs on it."""
        return range(FIRST_SEED, FIRST_SEED + (min(FEW, self.seeds) if contender.informs else self.seeds))

    @property
    def scale_free(self) -> bool:
        """Whether its optimizer is of Adam's kind."""
        return self.cell(NONE, 0).scale_free

    def suits(self, contender: Contender) -> bool:
        """Whether a method is run on it."""
        if self.contenders is not None:
            return contender.label in self.contenders
        return (self.scale_free or not contender.scale_free) and not contender.special


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
        return [w.cell(c, seed) for w, c in self.pairs() for seed in w.seeds_of(c)]

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


SEEDS, MANY_SEEDS, DIVISION_SEEDS = 8, 20, 3
REGRESSIONS = tuple(
    Workload(f"regression, lr {lr:g}", "regression", lr, 5_000, 50, SEEDS) for lr in (0.003, 0.01, 0.03)
)
SUMS = tuple(
    Workload(PROBLEMS[name].label, name, 0.01, steps, 512, SEEDS)
    for name, steps in (("sums-0.95", 3_000), ("sums-0.98", 3_000), ("sums-transformer", 2_500))
)
DIVISION = Workload(
    PROBLEMS["division"].label,
    "division",
    1e-3,
    20_000,
    128,
    DIVISION_SEEDS,
    contenders=tuple(each.label for each in (NONE, fixed(1), PAPER, LOOKING_BACK, FOLLOWING)),
)

INSTABILITY = Comparison(
    (*REGRESSIONS, *SUMS, DIVISION),
    (
        NONE,
        fixed(1),
        PAPER,
        LOOKING_BACK,
        FOLLOWING,
        FALLING_LESS,
        *map(informing, (fixed(0.1), AUTOCLIP, AUTOCLIP_LOW, PUBLISHED, PATIENT, FALLING, *FOR_INFORMATION)),
    ),
)


def with_bad_shard(workload: Workload) -> tuple[Workload, Workload]:
    """Clean, and with the bad shard."""
    return workload, replace(workload, label=f"{workload.label}, {BAD_SHARD}", condition=BAD_SHARD)


def language_model(label: str, architecture: str, beta2: float, steps: int | None = None) -> Workload:
    """Of the small preset."""
    preset = PRESETS["pico"]
    label = f"{label}, beta2 {beta2:g}"
    return Workload(label, architecture, preset.lr, steps or preset.steps, preset.batch, SEEDS, beta2=beta2)


LONG = replace(
    language_model("LLaMA, 3,000 steps", "llama", 0.95, 3_000),
    batch=4,
    contenders=tuple(each.label for each in (fixed(1), PAPER, LOOKING_BACK, FOLLOWING, FALLING_LESS)),
)
BY_GROUP = ours(special=True, lookback=0.1, alpha_down=0.9, scope="group")
MUON = replace(
    language_model("LLaMA, Muon", "llama", 0.95),
    muon=True,
    contenders=tuple(
        each.label
        for each in (NONE, *map(fixed, (0.01, 0.1, 1)), PAPER, LOOKING_BACK, FOLLOWING, FALLING_LESS, BY_GROUP)
    ),
)
ON_SHIFTED_DIGITS = (
    NONE,
    fixed(1),
    PAPER,
    LOOKING_BACK,
    FOLLOWING,
    FALLING_LESS,
    ours(special=True, patience=200),
    ours(special=True, alpha_down=0.9, patience=200),
    ours(special=True, lookback=0.1, patience=200),
    ours(special=True, lookback=0.1, alpha_down=0.9, patience=200),
)
SHIFTED_DIGITS = Workload(
    f"digits, SGD, {TRIPLED}",
    "digits-sgd",
    0.1,
    3_000,
    32,
    MANY_SEEDS,
    TRIPLED,
    contenders=tuple(each.label for each in ON_SHIFTED_DIGITS),
)

REGRET = Comparison(
    (
        *with_bad_shard(language_model("LLaMA", "llama", 0.95)),
        *with_bad_shard(language_model("GPT-2", "gpt2", 0.95)),
        *with_bad_shard(Workload("digits, SGD", "digits-sgd", 0.1, 600, 32, MANY_SEEDS)),
        SHIFTED_DIGITS,
        REGRESSIONS[1],
        SUMS[1],
        *with_bad_shard(Workload("ViT", "vit", 2e-3, 300, 16, SEEDS)),
        *with_bad_shard(language_model("GPT-2", "gpt2", 0.999)),
        *with_bad_shard(language_model("LLaMA", "llama", 0.999)),
        Workload("CartPole", CARTPOLE, CARTPOLE_LR, EPISODES, 1, MANY_SEEDS, preset="nano"),
        *with_bad_shard(Workload("digits, SGD, summed loss", "digits-sgd-sum", 0.1 / 32, 600, 32, MANY_SEEDS)),
        *with_bad_shard(MUON),
        LONG,
    ),
    (
        fixed(1),
        PAPER,
        LOOKING_BACK,
        FOLLOWING,
        NONE,
        FOLLOWING_CAPPED,
        FALLING_LESS,
        CAPPED,
        *(each for each in ON_SHIFTED_DIGITS if each.special),
        *map(informing, (*map(fixed, (0.01, 0.1, 10, 100)), AUTOCLIP, AUTOCLIP_LOW, BY_GROUP)),
    ),
)
