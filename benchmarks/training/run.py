"""One training run with one clipping method, step by step, with the paper's AdamW and learning-rate schedule."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.data import Batches, bad_shard
from benchmarks.training.distributed import mean_over_ranks, rank_and_count
from benchmarks.training.methods import Method
from benchmarks.training.presets import PRESETS, Preset

DIVERGED_AFTER = 10  # non-finite losses in a row that end a run
MUON_LR = 10.0  # in units of AdamW's rate

# Called between backward and the method's step with the step (from 0) and the parameters, to change their gradients.
Injection = Callable[[int, Sequence[nn.Parameter]], None]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that two compared runs share."""

    steps: int
    lr: float  # peak
    seed: int
    preset: str = "nano"
    architecture: str = "llama"
    batch: int = 16  # examples per step, of all processes together
    warmup_share: float = 0.1  # of the steps
    final_lr_share: float = 0.1  # of the peak
    betas: tuple[float, float] = (0.9, 0.95)  # what language models are trained with
    eps: float = 1e-7
    weight_decay: float = 0.01
    muon: bool = False  # for the matrices, beside AdamW
    held_out_batches: int = 64
    corrupt: bool = True  # whether some batches are

    @property
    def shape(self) -> Preset:
        """What the preset fixes."""
        return PRESETS[self.preset]

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, at least one."""
        return max(1, round(self.warmup_share * self.steps))

    @property
    def schedule(self) -> dict[int, str]:
        """The corrupted steps, none of them in the warm-up."""
        kinds = ARCHITECTURES[self.architecture].corruptions
        return bad_shard(self.steps, self.warmup_steps, kinds) if self.corrupt else {}

    def open(self, paths: Sequence[Path] = ()) -> Batches:
        """The data: `paths`, or what comes with the architecture."""
        architecture = ARCHITECTURES[self.architecture]
        return architecture.open(paths, self.shape, self.batch, self.seed, self.schedule)

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        """The paper's AdamW; with Muon, first that one for the matrices between embedding and head."""
        everything = dict(model.named_parameters())
        matrices = {name: p for name, p in everything.items() if self.muon and is_hidden_matrix(name, p)}
        adamw = AdamW(
            [p for name, p in everything.items() if name not in matrices],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=self.shape.fused,
        )
        if not matrices:
            return [adamw]
        from torch.optim import Muon  # since torch 2.9

        return [Muon(matrices.values(), lr=MUON_LR * self.lr, weight_decay=self.weight_decay), adamw]

    def lr_factor(self, step: int) -> float:
        """Share of the peak rate at `step` (from 0): linear up, then a cosine down to `final_lr_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_lr_share + (1 - self.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for it."""
    return parameter.dim() == 2 and not name.startswith(("embedding", "head", "position"))


@dataclass(frozen=True)
class StepRecord:
    """One line of a run's JSON lines: norms in gradient-norm units, loss in nats per token, time in milliseconds."""

    method: str
    step: int  # from 1
    tokens: int  # predicted up to here: bytes of text, images, or actions
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
    """A model, its optimizer and a clipping method, started from the config's seed.

    Args:
        method: the clipping.
        config: the rest.
        batches: the data (`config.open()`), of which every process takes its part.
        device: where the model is.
        spread: wraps the model for several processes.
    """

    def __init__(
        self,
        method: Method,
        config: TrainConfig,
        batches: Batches,
        device: torch.device | None = None,
        spread: Callable[[Any], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(config.seed)
        self.method, self.config, self.batches = method, config, batches
        self.device = device or torch.device("cpu")
        model = ARCHITECTURES[config.architecture].model(config.shape)
        self.model = spread(model.to(self.device))
        self.stepper = method.start(self.model, *config.optimizers(self.model))
        self.schedulers = [LambdaLR(optimizer, config.lr_factor) for optimizer in self.stepper.optimizers]
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
        batch = self.batches.train(step)
        inputs, targets = self._part(*batch)
        lr = self.schedulers[-1].get_last_lr()[-1]
        start = time.perf_counter()
        loss = self._backward(inputs, targets)
        if injection is not None:
            injection(step, list(self.model.parameters()))
        clipping = self.stepper.step()
        loss = mean_over_ranks(loss).item()
        ms = 1e3 * (time.perf_counter() - start)
        for scheduler in self.schedulers:
            scheduler.step()
        return StepRecord(
            method=self.method.name,
            step=step + 1,
            tokens=(step + 1) * batch[1].numel(),
            loss=loss,
            lr=lr,
            corrupted=self.batches.schedule.get(step),
            **vars(clipping),
            ms=ms,
        )

    def _part(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of a batch, on its device."""
        rank, count = rank_and_count()
        return inputs.chunk(count)[rank].to(self.device), targets.chunk(count)[rank].to(self.device)

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Leaves the batch's mean gradient, micro-batch by micro-batch; returns its mean loss."""
        for optimizer in self.stepper.optimizers:
            optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for loss in self._micro_losses(inputs, targets):
            loss.backward()
            total += loss.detach()
        return total

    def _micro_losses(self, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """What each micro-batch adds to the batch's mean loss."""
        size = self.config.shape.micro_batch or len(inputs)
        for some_inputs, some_targets in zip(inputs.split(size), targets.split(size), strict=True):
            yield self._loss(some_inputs, some_targets) * (len(some_inputs) / len(inputs))

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.shape.bf16):
            logits = self.model(inputs)
        return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss, in nats per token, on the held-out data, whole on every process."""
        batches = self.batches.held_out(min(self.config.held_out_batches, self.config.steps))
        losses = [
            math.fsum(loss.item() for loss in self._micro_losses(inputs.to(self.device), targets.to(self.device)))
            for inputs, targets in batches
        ]
        return math.fsum(losses) / len(losses)
