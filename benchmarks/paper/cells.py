"""One cell of a table: a run with everything that fixes it, and the two files that it leaves behind.

NAME.jsonl has every step (NAME.npz for a small problem); NAME.json, written last, what the tables need of it, so that
a command knows what is done. Every outcome has a `measure`, lower is better, by which runs of one workload are compared
over all tables: the validation loss in nats, but at most that of a model that knows only how often each target occurs,
which a run that diverged counts with; for a problem whose held-out data say nothing of the optimizer the logarithm of
the mean loss of the last fifth; for CartPole the logarithm of the number of episodes that it took.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report.records import write_records
from benchmarks.report.summary import summarize, write_json
from benchmarks.training import digits
from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.cartpole import CartPoleRun, EpisodeRecord
from benchmarks.training.contenders import Options, written
from benchmarks.training.data import Batches, bad_shard
from benchmarks.training.distributed import default_device
from benchmarks.training.loop import Trace, held_out_loss, train
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.presets import PRESETS
from benchmarks.training.problems import PROBLEMS, Problem
from benchmarks.training.run import Run, StepRecord, TrainConfig
from zclip_optim import NonFiniteGradientError, ZClipWarning

CARTPOLE = "cartpole"
CLEAN, BAD_SHARD, TRIPLED = "clean", "bad shard", "inputs x 3 from the middle on"
FIRST_SEED = 100  # those below have been looked at
WARMUP_SHARE = 0.1  # of a small problem's steps, without a corrupted batch
LAST = 5  # the last fifth of a run
FLOOR = 1e-8  # a mean loss below it is rounding in float32
NATS, LOG_LOSS, LOG_EPISODES = "nats", "log loss", "log episodes"  # units of a measure

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What fixes a run."""

    architecture: str  # of ARCHITECTURES or PROBLEMS, or CARTPOLE
    method: str  # of METHODS
    lr: float  # peak
    seed: int
    condition: str  # CLEAN, BAD_SHARD, or TRIPLED for the digits
    steps: int  # at most; episodes for CARTPOLE
    batch: int  # examples per step
    options: Options = ()  # of the method, besides its own
    preset: str = "nano"
    beta2: float = 0.999  # of AdamW, in one of ARCHITECTURES
    muon: bool = False  # for the matrices of a language model

    @property
    def name(self) -> str:
        """Names the files."""
        size = [f"steps{self.steps}", f"batch{self.batch}"]
        optimizer = ["muon"] * self.muon + [f"beta2-{self.beta2:g}"] * self.is_text
        parts = [self.architecture, *optimizer, self.method, *written(self.options), f"lr{self.lr:g}"]
        preset = [] if self.architecture in PROBLEMS else [self.preset]
        return "_".join([*preset, *parts, self.condition.replace(" ", "-"), *size, f"seed{self.seed}"])

    @property
    def is_text(self) -> bool:
        """Whether it trains a language model."""
        return self.architecture in ARCHITECTURES and ARCHITECTURES[self.architecture].is_text

    @property
    def unit(self) -> str:
        """Of its measure."""
        if self.architecture == CARTPOLE:
            return LOG_EPISODES
        problem = PROBLEMS.get(self.architecture)
        return LOG_LOSS if problem is not None and problem.by_training else NATS

    @property
    def scale_free(self) -> bool:
        """Whether its optimizer is of Adam's kind."""
        return self.architecture not in PROBLEMS or PROBLEMS[self.architecture].scale_free

    @property
    def clipping(self) -> Method:
        """The method with this cell's options."""
        return METHODS[self.method].with_options(dict(self.options))

    @property
    def config(self) -> TrainConfig:
        """What a run of one of ARCHITECTURES shares with those that it is compared with."""
        return TrainConfig(
            steps=self.steps,
            lr=self.lr,
            seed=self.seed,
            preset=self.preset,
            architecture=self.architecture,
            batch=self.batch,
            warmup_share=PRESETS[self.preset].warmup_share,
            corrupt=self.condition == BAD_SHARD,
            betas=(0.9, self.beta2),
            muon=self.muon,
        )


def run_cell(cell: Cell, folder: Path, paths: Sequence[Path] = ()) -> Figures:
    """Trains, writes both files and returns what the tables need: the cell, its figures and the seconds it took."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZClipWarning)  # about the norms that it is there to make
        write_steps, figures = run_of(cell, paths)
    write_steps(folder / cell.name)
    return write_outcome(cell, folder, figures | {"seconds": round(time.perf_counter() - start, 1)})


def write_outcome(cell: Cell, folder: Path, figures: Figures) -> Figures:
    """NAME.json, all at once."""
    outcome = {"cell": asdict(cell), **figures}
    unfinished = folder / f"{cell.name}.json.part"
    write_json(unfinished, outcome)
    unfinished.rename(folder / f"{cell.name}.json")
    return outcome


def run_of(cell: Cell, paths: Sequence[Path]) -> tuple[Callable[[Path], None], Figures]:
    """The run: what writes its steps to a path without an ending, and its figures."""
    if cell.architecture in PROBLEMS:
        trace, figures = small_problem(cell)
        return partial(write_trace, trace), figures
    records, figures = cartpole(cell) if cell.architecture == CARTPOLE else training(cell, paths)
    return lambda path: write_records(path.with_name(f"{path.name}.jsonl"), records), figures


def write_trace(trace: Trace, path: Path) -> None:
    """Losses and norms as arrays; the name has dots in it."""
    steps = {name: np.asarray(values, np.float32) for name, values in vars(trace).items() if isinstance(values, list)}
    np.savez_compressed(path.with_name(f"{path.name}.npz"), **steps)


def load_outcome(cell: Cell, folder: Path) -> Figures | None:
    """What `run_cell` returned, None if it has not ended yet; null has become NaN again."""
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return None
    outcome: Figures = json.loads(path.read_text())
    return {key: math.nan if value is None else value for key, value in outcome.items()}


def training(cell: Cell, paths: Sequence[Path]) -> tuple[list[StepRecord], Figures]:
    """A run of one of ARCHITECTURES, up to its end or to where a method gave up."""
    config = cell.config
    batches = config.open(paths if ARCHITECTURES[cell.architecture].is_text else ())
    run = Run(cell.clipping, config, batches, default_device())
    records: list[StepRecord] = []
    with suppress(NonFiniteGradientError):  # the run ends there, as a user's would
        records.extend(run.steps())
    held_out_loss = run.held_out_loss()
    summary = asdict(summarize(cell.method, cell.clipping.label, records, held_out_loss, config.warmup_steps))
    diverged = len(records) < cell.steps or not held_out_loss < batches.chance
    return records, summary | {
        "diverged": diverged,
        "clipped_share": share_of_clipped(records),
        **norm_figures([record.grad_norm for record in records]),
        "measure": batches.chance if diverged else held_out_loss,
    }


def small_problem(cell: Cell) -> tuple[Trace, Figures]:
    """A run of one of PROBLEMS."""
    problem = PROBLEMS[cell.architecture]
    batches = problem.open(cell.batch, cell.seed, schedule_of(cell, problem))
    model, trace = train(problem, cell.clipping, cell.lr, cell.seed, batches, cell.steps)
    held_out = held_out_loss(problem, model, batches)
    diverged = len(trace.losses) < cell.steps or not (problem.by_training or held_out < batches.chance)
    figures = loss_figures(problem, trace, cell.steps, batches)
    return trace, figures | {
        "held_out_loss": held_out,
        "diverged": diverged,
        "measure": figures["log_last_loss"] if problem.by_training else batches.chance if diverged else held_out,
        "clipped_share": math.nan if math.isnan(trace.clipped_norms[-1]) else trace.clipped / len(trace.losses),
        "skipped_steps": trace.skipped,
        **norm_figures(trace.grad_norms),
    }


def schedule_of(cell: Cell, problem: Problem) -> dict[int, str]:
    """Which steps of a small problem get another batch, and of which kind."""
    if cell.condition == TRIPLED:
        return dict.fromkeys(range(cell.steps // 2, cell.steps), digits.TRIPLED)
    if cell.condition == BAD_SHARD:
        return bad_shard(cell.steps, round(WARMUP_SHARE * cell.steps), problem.corruptions)
    return {}


def loss_figures(problem: Problem, trace: Trace, steps: int, batches: Batches) -> Figures:
    """Spikes, and the absolute figures that a running median cannot flatter; steps not taken count as lost."""
    losses = np.full(steps, math.inf)
    losses[: len(trace.losses)] = trace.losses
    last = losses[-max(1, steps // LAST) :]
    mean = max(FLOOR, float(last.mean())) if np.isfinite(last).all() else batches.chance
    return {
        "spikes": len(problem.spike.steps(trace.losses)),
        "last_loss": mean,
        "log_last_loss": math.log(mean),
        "worst_last_loss": float(last.max()),
        "steps_above": int((~(losses[round(problem.settled * steps) :] <= problem.level)).sum()),
    }


def cartpole(cell: Cell) -> tuple[list[EpisodeRecord], Figures]:
    """A run of REINFORCE, up to where it is solved, a method gave up, or its last episode."""
    run = CartPoleRun(cell.clipping, cell.lr, cell.seed)
    records: list[EpisodeRecord] = []
    with suppress(NonFiniteGradientError):
        records.extend(run.episodes(cell.steps))
    norms = [record.grad_norm for record in records]
    episodes = len(records) if run.solved else cell.steps
    return records, {
        "solved": run.solved,
        "episodes": len(records),
        "episodes_to_solve": len(records) if run.solved else math.nan,
        "largest_to_median_norm": max(norms) / statistics.median(norms) if norms else math.nan,
        "clipped_share": share_of_clipped(records),
        **norm_figures(norms),
        "measure": math.log(episodes),
    }


def norm_figures(norms: Sequence[float]) -> Figures:
    """The largest is NaN if one is not a number."""
    largest = math.nan if any(map(math.isnan, norms)) else max(norms, default=math.nan)
    return {"median_norm": statistics.median(norms) if norms else math.nan, "largest_norm": largest}


def share_of_clipped(records: Sequence[StepRecord]) -> float:
    """Of the steps; NaN for a method that does not tell."""
    if not records or all(math.isnan(record.clipped_norm) for record in records if math.isfinite(record.grad_norm)):
        return math.nan
    return sum(record.clipped for record in records) / len(records)
