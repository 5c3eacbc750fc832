"""From a run's records to the numbers of the table, and to strict JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.training.run import StepRecord, TrainConfig

FINAL = 50  # clean steps that the final loss is the mean of
START = 0.3  # of the run, in which norms fall fastest
WINDOW = 50  # clean steps before, that a loss is compared with
HISTORY = 10  # clean steps needed before anything can be called a spike
DEVIATIONS = 5.0
MAD_TO_STD = 1.4826  # of a normal distribution

SPIKE_DEFINITION = (
    f"loss spike: a clean batch whose loss is more than {DEVIATIONS:g} robust standard deviations "
    f"({MAD_TO_STD} x median absolute deviation) above the median of the {WINDOW} clean losses before it, or "
    "not finite; neighbouring ones count as one"
)


@dataclass(frozen=True)
class Summary:
    """A row of the table: losses in nats per byte, over clean batches only."""

    method: str
    label: str
    final_loss: float
    held_out_loss: float
    worst_loss: float  # after the learning rate's warm-up
    loss_spikes: int
    spiked_steps: int
    clipped_steps: int
    clipped_corrupted_steps: int
    corrupted_steps: int
    skipped_steps: int
    steps: int
    ms_per_step: float  # median
    loss_of_start: float  # mean over the first START of the run
    loss_after_start: float  # and over the rest


def summarize(method: str, label: str, records: Sequence[StepRecord], held_out_loss: float, warmup: int) -> Summary:
    """The row of one run."""
    clean = [r for r in records if r.corrupted is None]
    spiked = spiked_steps([r.loss for r in clean])
    return Summary(
        method=method,
        label=label,
        final_loss=final_loss(records),
        held_out_loss=held_out_loss,
        worst_loss=worst([r.loss for r in clean if r.step > warmup]),
        loss_spikes=events(spiked),
        spiked_steps=sum(spiked),
        clipped_steps=sum(r.clipped for r in records),
        clipped_corrupted_steps=sum(r.clipped for r in records if r.corrupted),
        corrupted_steps=len(records) - len(clean),
        skipped_steps=sum(r.skipped for r in records),
        steps=len(records),
        ms_per_step=statistics.median(r.ms for r in records) if records else math.nan,
        loss_of_start=mean_loss([r for r in clean if r.step <= START * len(records)]),
        loss_after_start=mean_loss([r for r in clean if r.step > START * len(records)]),
    )


def final_loss(records: Sequence[StepRecord]) -> float:
    """The mean of the last FINAL clean losses; NaN if there are none."""
    return mean_loss([r for r in records if r.corrupted is None][-FINAL:])


def mean_loss(records: Sequence[StepRecord]) -> float:
    """The mean of the losses; NaN if there are none."""
    return statistics.fmean(r.loss for r in records) if records else math.nan


def worst(losses: Sequence[float]) -> float:
    """The highest loss; NaN if one is not finite or there is none."""
    return max(losses) if losses and all(map(math.isfinite, losses)) else math.nan


def spiked_steps(losses: Sequence[float]) -> list[bool]:
    """Which losses are spikes by SPIKE_DEFINITION."""
    return [is_spike(loss, losses[max(0, i - WINDOW) : i]) for i, loss in enumerate(losses)]


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """loss > median + 5 * 1.4826 * median absolute deviation, of the finite losses before."""
    finite = [x for x in before if math.isfinite(x)]
    if not math.isfinite(loss) or len(finite) < HISTORY:
        return not math.isfinite(loss)
    median = statistics.median(finite)
    deviation = MAD_TO_STD * statistics.median(abs(x - median) for x in finite)
    return loss > median + DEVIATIONS * deviation


def events(flags: Sequence[bool]) -> int:
    """How many runs of True there are."""
    return sum(flag and not before for flag, before in zip(flags, [False, *flags], strict=False))


def format_table(summaries: Sequence[Summary]) -> str:
    """The table, in Markdown."""
    rows = [
        {
            "method": s.label,
            f"final loss (last {FINAL})": f"{s.final_loss:.3f}",
            "validation loss": f"{s.held_out_loss:.3f}",
            f"mean loss, first {START:.0%} / rest": f"{s.loss_of_start:.3f} / {s.loss_after_start:.3f}",
            "worst loss": f"{s.worst_loss:.3f}",
            "loss spikes": s.loss_spikes,
            "clipped steps": f"{s.clipped_steps} of {s.steps}",
            "corrupted ones clipped": f"{s.clipped_corrupted_steps} of {s.corrupted_steps}",
            "ms per step": f"{s.ms_per_step:.1f}",
        }
        for s in summaries
    ]
    return markdown(rows)


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a table: the first column names the row, the others are figures."""
    right = ("right",) * (len(rows[0]) - 1)
    return tabulate(rows, headers="keys", tablefmt="github", colalign=("left", *right), disable_numparse=True)


def notes(config: TrainConfig) -> str:
    """What the table's words mean."""
    return "\n".join(
        (
            "losses: nats per byte, of clean batches only; worst loss: after the learning rate's warm-up; "
            "ms per step: median, forward, backward and step",
            SPIKE_DEFINITION,
            f"corrupted: {len(config.schedule)} of {config.steps} batches, the same ones for every method",
        )
    )


def heading(name: str, seeds: Iterable[int], *packages: str) -> dict[str, object]:
    """How every result file begins: the command, the machine, the versions (of `packages` too) and the seeds."""
    versions = {package: version(package) for package in ("torch", "zclip_optim", *packages)}
    return {
        "name": name,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | versions,
        "seeds": list(seeds),
    }


def machine() -> dict[str, str | int | None]:
    """What the run ran on."""
    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def strict_json(value: object) -> str:
    """`value` as strict JSON on one line: what is not finite becomes null."""
    return json.dumps(finite(value), allow_nan=False)


def write_json(path: Path, value: object) -> None:
    """`value` as strict JSON, indented."""
    path.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """`value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
