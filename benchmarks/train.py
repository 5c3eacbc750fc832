"""One training run with one clipping method: the paper's AdamW settings and learning-rate schedule."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.data import Batches, Corpus, bad_shard
from benchmarks.methods import Method
from benchmarks.model import PRESETS, LanguageModel, ModelConfig

DIVERGED_AFTER = 10  # non-finite losses in a row that end a run

# Called between backward and the method's step with the step (from 0) and the parameters, to change their gradients.
Injection = Callable[[int, Sequence[nn.Parameter]], None]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that two compared runs share."""

    steps: int
    lr: float  # peak
    seed: int
    preset: str = "nano"
    batch: int = 16  # windows per step
    warmup_share: float = 0.1  # of the steps
    final_lr_share: float = 0.1  # of the peak
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-7
    weight_decay: float = 0.01
    held_out_batches: int = 64
    corrupt: bool = True  # whether some batches are

    @property
    def model(self) -> ModelConfig:
        """The preset's shape."""
        return PRESETS[self.preset]

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, at least one."""
        return max(1, round(self.warmup_share * self.steps))

    @property
    def schedule(self) -> dict[int, str]:
        """The corrupted steps, none of them in the warm-up."""
        return bad_shard(self.steps, first=self.warmup_steps) if self.corrupt else {}

    def optimizer(self, model: nn.Module) -> AdamW:
        """The paper's AdamW."""
        return AdamW(model.parameters(), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def lr_factor(self, step: int) -> float:
        """Share of the peak rate at `step` (from 0): linear up, then a cosine down to `final_lr_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr_share + (1 - self.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class StepRecord:
    """One line of a run's JSON lines: norms in gradient-norm units, loss in nats per byte, time in milliseconds."""

    method: str
    step: int  # from 1
    loss: float
    lr: float
    corrupted: str | None  # the kind of corruption
    grad_norm: float
    clipped_norm: float
    threshold: float
    clipped: bool
    skipped: bool
    z_score: float
    mean: float
    std: float
    ms: float


class Run:
    """A model, its optimizer and a clipping method, started from the config's seed."""

    def __init__(self, method: Method, config: TrainConfig, corpus: Corpus) -> None:
        torch.manual_seed(config.seed)
        self.method, self.config = method, config
        self.batches = Batches(corpus, config.batch, config.model.context, config.seed, config.schedule)
        self.model = LanguageModel(config.model)
        self.stepper = method.start(self.model, config.optimizer(self.model))
        self.scheduler = LambdaLR(self.stepper.optimizer, config.lr_factor)
        self.taken = 0  # steps

    def steps(self, stop: int | None = None, injection: Injection | None = None) -> Iterator[StepRecord]:
        """Trains on, one record per step; ends early when the loss stays non-finite.

        Args:
            stop: steps taken in all when it ends; None for all of the config's.
            injection: changes the gradients before the method sees them.
        """
        broken = 0
        for step in range(self.taken, self.config.steps if stop is None else stop):
            record = self._step(step, injection)
            self.taken = step + 1
            yield record
            broken = 0 if math.isfinite(record.loss) else broken + 1
            if broken == DIVERGED_AFTER:
                return

    def fork(self) -> Run:
        """A copy that goes its own way from here: model, optimizer, method and scheduler, but not the data."""
        shared = (self.method, self.config, self.batches)
        return copy.deepcopy(self, {id(one): one for one in shared})

    def _step(self, step: int, injection: Injection | None) -> StepRecord:
        window = self.batches.train(step)
        lr = self.scheduler.get_last_lr()[0]
        start = time.perf_counter()
        loss = self.model.loss(window)
        self.stepper.optimizer.zero_grad()
        loss.backward()
        if injection is not None:
            injection(step, list(self.model.parameters()))
        clipping = self.stepper.step()
        ms = 1e3 * (time.perf_counter() - start)
        self.scheduler.step()
        return StepRecord(
            method=self.method.name,
            step=step + 1,
            loss=loss.item(),
            lr=lr,
            corrupted=self.batches.schedule.get(step),
            **vars(clipping),
            ms=ms,
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss, in nats per byte, on the held-out text."""
        losses = [
            self.model.loss(window).item()
            for window in self.batches.held_out(min(self.config.held_out_batches, self.config.steps))
        ]
        return math.fsum(losses) / len(losses)
