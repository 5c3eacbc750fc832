"""One cell of a table: a run with everything that fixes it, and the two files that it leaves behind.

NAME.jsonl has every step; NAME.json, written last, what the tables need of it, so that a sweep knows what is done.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.records import write_records
from benchmarks.report.summary import summarize, write_json
from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.cartpole import CartPoleRun, EpisodeRecord
from benchmarks.training.distributed import default_device
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.presets import PRESETS
from benchmarks.training.run import Run, StepRecord, TrainConfig
from zclip_optim import NonFiniteGradientError, ZClipWarning

CARTPOLE = "cartpole"
CLEAN, BAD_SHARD = "clean", "bad shard"


@dataclass(frozen=True)
class Cell:
    """What fixes a run."""

    architecture: str  # of ARCHITECTURES, or CARTPOLE
    method: str  # of METHODS
    lr: float  # peak
    seed: int
    condition: str  # CLEAN or BAD_SHARD
    steps: int  # at most; episodes for CARTPOLE
    batch: int  # examples per step
    options: tuple[tuple[str, float], ...] = ()  # of ZClipOptimizer, besides the method's own
    preset: str = "nano"

    @property
    def name(self) -> str:
        """Names the files."""
        options = [f"{key}={value:g}" for key, value in self.options]
        size = [f"steps{self.steps}", f"batch{self.batch}"]
        parts = [self.preset, self.architecture, self.method, *options, f"lr{self.lr:g}"]
        return "_".join([*parts, self.condition.replace(" ", "-"), *size, f"seed{self.seed}"])

    @property
    def clipping(self) -> Method:
        """The method with this cell's options."""
        return METHODS[self.method].with_options(dict(self.options))


def run_cell(cell: Cell, folder: Path, paths: Sequence[Path] = ()) -> dict[str, Any]:
    """Trains, writes both files and returns what the tables need: the cell, its figures and the seconds it took."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZClipWarning)  # about the norms that it is there to make
        records, figures = cartpole(cell) if cell.architecture == CARTPOLE else training(cell, paths)
    write_records(folder / f"{cell.name}.jsonl", records)
    outcome = {"cell": asdict(cell), **figures, "seconds": round(time.perf_counter() - start, 1)}
    unfinished = folder / f"{cell.name}.json.part"
    write_json(unfinished, outcome)
    unfinished.rename(folder / f"{cell.name}.json")
    return outcome


def load_outcome(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """What `run_cell` returned, None if it has not ended yet; null has become NaN again."""
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return None
    outcome: dict[str, Any] = json.loads(path.read_text())
    return {key: math.nan if value is None else value for key, value in outcome.items()}


def training(cell: Cell, paths: Sequence[Path]) -> tuple[list[StepRecord], dict[str, Any]]:
    """A run of one of ARCHITECTURES, up to its end or to where a method gave up."""
    config = TrainConfig(
        steps=cell.steps,
        lr=cell.lr,
        seed=cell.seed,
        preset=cell.preset,
        architecture=cell.architecture,
        batch=cell.batch,
        warmup_share=PRESETS[cell.preset].warmup_share,
        corrupt=cell.condition == BAD_SHARD,
    )
    batches = config.open(paths if ARCHITECTURES[cell.architecture].is_text else ())
    run = Run(cell.clipping, config, batches, default_device())
    records: list[StepRecord] = []
    with suppress(NonFiniteGradientError):  # the run ends there, as a user's would
        records.extend(run.steps())
    held_out_loss = run.held_out_loss()
    summary = asdict(summarize(cell.method, cell.clipping.label, records, held_out_loss, config.warmup_steps))
    ended_early = len(records) < cell.steps
    return records, summary | {
        "diverged": ended_early or not held_out_loss < batches.chance,
        "clipped_share": share_of_clipped(records),
    }


def cartpole(cell: Cell) -> tuple[list[EpisodeRecord], dict[str, Any]]:
    """A run of REINFORCE, up to where it is solved, a method gave up, or its last episode."""
    run = CartPoleRun(cell.clipping, cell.lr, cell.seed)
    records: list[EpisodeRecord] = []
    with suppress(NonFiniteGradientError):
        records.extend(run.episodes(cell.steps))
    norms = [record.grad_norm for record in records]
    return records, {
        "solved": run.solved,
        "episodes": len(records),
        "episodes_to_solve": len(records) if run.solved else math.nan,
        "largest_to_median_norm": max(norms) / statistics.median(norms) if norms else math.nan,
        "clipped_share": share_of_clipped(records),
    }


def share_of_clipped(records: Sequence[StepRecord]) -> float:
    """Of the steps; NaN for a method that does not tell."""
    if not records or all(math.isnan(record.clipped_norm) for record in records if math.isfinite(record.grad_norm)):
        return math.nan
    return sum(record.clipped for record in records) / len(records)
