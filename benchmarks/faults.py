"""Injects faults into the gradients of a small language model and shows how each clipping method comes out of them.

The model and the text are the comparison's, without corrupted batches. Each method trains once up to the fault; from
there one copy of the run goes on without a fault and one with each fault. And how long does one bad norm at the start
blind a method? Writes faults.json and faults.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product

import torch
from tqdm import tqdm

from benchmarks import UserError
from benchmarks.options import add_training_options, prepare_folder
from benchmarks.report.pages import Result, bullets, document, restored, setup, write_result
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import heading, markdown, mean_loss
from benchmarks.training.data import Batches
from benchmarks.training.injection import FAULTS, Fault, Level, multiple
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.run import Run, StepRecord, TrainConfig
from zclip_optim import ZClipWarning

BATCH = 4  # windows per step, a quarter of the comparison's
THREADS = 1  # a model of this size gains little from a second one, and loses much when it has to share the cores
BESIDE_THE_PAPER: tuple[dict[str, float], ...] = (
    {"lookback": 0.1},
    {"lookback": 0.1, "alpha_down": 0.9},
    {"lookback": 0.1, "alpha_down": 0.9, "z_skip": 10},
    {"patience": 200},
)


def with_label(method: Method, options: Mapping[str, float]) -> Method:
    """The method with options, which are its name in the tables."""
    label = ", ".join(f"{name}={value:g}" for name, value in options.items())
    return replace(method.with_options(options), label=label)


PEERS = (
    *(METHODS[name] for name in ("none", "fixed", "published", "autoclip", "paper")),
    *(with_label(METHODS["paper"], options) for options in BESIDE_THE_PAPER),
)
MIN_STEPS = 2
FAULT_SHARE = 0.4  # of the steps, before the fault
LEVEL_STEPS = 50  # before the fault, whose norms give its level
LAST = 50  # steps at the end, of the final loss and the share of clipped steps
BAND = 0.05  # nats per byte
SMOOTH = 10  # steps
BAD_STEPS, BAD_FACTORS = (1, 6, 21), (1e2, 1e4, 1e6)  # where one bad norm stands, and how large it is
PROBE, PROBE_EVERY = 20.0, 25  # times the gradients; steps
CHECKED = 3  # steps in which a copied run must equal the original
NO_FAULT = "no fault"

NOTES = (
    "methods: zclip 1.0.0 is the published package with its defaults but max_grad_norm=None, so that its own rule is "
    "seen and not its cap of 1.0; autoclip is QuantileClip(global_threshold=True) with its defaults, the 90th "
    "percentile of the last 1,000 norms; paper is ZClipOptimizer as in the paper, the rest that with these options",
    "survived: all parameters and the last loss are finite",
    f"steps to recover: from the fault's first step to the last one at which the mean of {SMOOTH} batch losses is more "
    f"than {BAND} nats per byte above that of the same method's run without a fault, on the same batches; 0 if it "
    "never is; '-' if it still is at the end",
    "control: a single step is left out; what it changes is the noise that every other difference must be held against",
    f"sigma: of the same method's last {LEVEL_STEPS} norms before the fault; a shift multiplies all later gradients by "
    "one factor",
)


@dataclass(frozen=True)
class Branch:
    """A run from the fault on."""

    records: list[StepRecord]
    finite: bool  # all parameters, at the end


@dataclass(frozen=True)
class Cell:
    """A method under a fault: losses in nats per byte."""

    method: str
    fault: str
    survived: bool
    steps_to_recover: int | None
    final_loss: float
    final_loss_difference: float  # from the same method's run without a fault
    clipped_share: float  # of the last steps
    skipped_steps: int
    steps: int  # from the fault on; fewer than the others if the loss stayed non-finite


@dataclass(frozen=True)
class BadStart:
    """A method after one bad norm: the first step tried at which one of PROBE times the gradients is clipped."""

    method: str
    step: int  # from 1, of the bad norm
    factor: float
    clipped_at: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the faults."""
    add_training_options(parser, steps=350)


def run(args: argparse.Namespace) -> None:
    """Checks what was given, trains under every fault with every method, and writes and prints the tables."""
    if args.steps < MIN_STEPS:
        raise UserError(f"--steps must be at least {MIN_STEPS}, one before the fault and one with it, got {args.steps}")
    start = time.perf_counter()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore", ZClipWarning)  # about the faults
    config = TrainConfig(steps=args.steps, lr=args.lr, seed=args.seed, batch=BATCH, corrupt=False)
    batches = config.open(args.data)
    prepare_folder(args.out)
    print(f"text: {batches.source}")
    cells: list[Cell] = []
    starts: list[BadStart] = []
    levels: dict[str, Level] = {}
    for method in PEERS:
        levels[method.label], column = train_method(method, config, batches)
        cells += column
        starts += [bad_start(method, config, batches, *where) for where in product(BAD_STEPS, BAD_FACTORS)]
    seconds = round(time.perf_counter() - start, 1)
    result = summary(config, batches, levels, cells, starts) | {"seconds": seconds}
    write_result(args.out / "faults.json", result, page)
    print("", *tables(cells, last_steps(config)), *start_table(starts), "\n".join(NOTES), sep="\n\n")
    print(f"\nwritten to {args.out}: faults.json, faults.md, in {seconds} s")


def summary(
    config: TrainConfig,
    batches: Batches,
    levels: Mapping[str, Level],
    cells: Sequence[Cell],
    starts: Sequence[BadStart],
) -> dict[str, object]:
    """What ran, on what, and what came out."""
    return heading("faults", [config.seed], "zclip", "autoclip") | {
        "data": batches.source,
        "config": asdict(config) | {"model": asdict(config.shape.model)},
        "fault_step": fault_step(config) + 1,
        "last_steps": last_steps(config),
        "notes": NOTES,
        "levels": {name: level._asdict() for name, level in levels.items()},
        "rows": [asdict(cell) for cell in cells],
        "starts": [asdict(start) for start in starts],
    }


def fault_step(config: TrainConfig) -> int:
    """The step (from 0) of the fault."""
    return max(1, round(FAULT_SHARE * config.steps))


def last_steps(config: TrainConfig) -> int:
    """How many steps at the end are looked at: LAST, or half of those after the fault."""
    return min(LAST, max(1, (config.steps - fault_step(config)) // 2))


def train_method(method: Method, config: TrainConfig, batches: Batches) -> tuple[Level, list[Cell]]:
    """One run up to the fault, and from there one per fault; the level of the norm, and a cell per fault."""
    first = fault_step(config)
    with tqdm(
        total=len(FAULTS) + 1, desc=f"{method.label:13}", unit="run", mininterval=progress_interval()
    ) as progress:
        original = Run(method, config, batches)
        before = list(original.steps(stop=first))
        level = Level.of([record.grad_norm for record in before[-LEVEL_STEPS:]])
        base = original.fork()
        reference = checked_reference(original, base.fork())
        progress.update()
        cells = [compare(method, NO_FAULT, reference, reference, config)]
        for fault in FAULTS:
            progress.set_postfix_str(fault.label)
            cells.append(compare(method, fault.name, branch(base, fault, level), reference, config))
            progress.update()
    return level, cells


def checked_reference(original: Run, copy: Run) -> Branch:
    """The run without a fault, having checked that a copy of it goes on to the same bits."""
    start = list(islice(original.steps(), CHECKED))
    losses = [record.loss for record in islice(copy.steps(), CHECKED)]
    pairs = zip(original.model.parameters(), copy.model.parameters(), strict=True)
    if losses != [record.loss for record in start] or not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError(f"a copy of the run with {original.method.label} does not go on as the original does")
    return finished(original, start + list(original.steps()))


def branch(base: Run, fault: Fault, level: Level) -> Branch:
    """A copy of `base` trained on, under a fault from its next step on."""
    copy = base.fork()
    return finished(copy, list(copy.steps(injection=fault.at(copy.taken, level))))


def finished(run: Run, records: list[StepRecord]) -> Branch:
    """A run that has ended."""
    return Branch(records, all(bool(p.isfinite().all()) for p in run.model.parameters()))


def bad_start(method: Method, config: TrainConfig, batches: Batches, step: int, factor: float) -> BadStart:
    """A run whose gradients are so many times as large at one of its first steps, tried every PROBE_EVERY steps."""
    run = Run(method, config, batches)
    bad, probe = (Fault("", "", 1, multiple(times)) for times in (factor, PROBE))
    nothing = Level(0.0, 0.0)
    for stop in range(PROBE_EVERY, config.steps, PROBE_EVERY):
        deque(run.steps(stop, bad.at(step - 1, nothing)), maxlen=0)
        (record,) = run.fork().steps(stop + 1, probe.at(stop, nothing))
        if record.clipped:
            return BadStart(method.label, step, factor, stop + 1)
    return BadStart(method.label, step, factor, None)


def compare(method: Method, fault: str, branch: Branch, reference: Branch, config: TrainConfig) -> Cell:
    """A cell of the table."""
    last = last_steps(config)
    final_loss, final_reference = (mean_loss(records[-last:]) for records in (branch.records, reference.records))
    return Cell(
        method=method.label,
        fault=fault,
        survived=branch.finite and math.isfinite(branch.records[-1].loss),
        steps_to_recover=steps_to_recover(branch.records, reference.records),
        final_loss=final_loss,
        final_loss_difference=final_loss - final_reference,
        clipped_share=statistics.fmean(record.clipped for record in branch.records[-last:]),
        skipped_steps=sum(record.skipped for record in branch.records),
        steps=len(branch.records),
    )


def steps_to_recover(records: Sequence[StepRecord], reference: Sequence[StepRecord]) -> int | None:
    """Steps up to the last one with a mean loss out of the band; None if the run ends there."""
    gaps = [record.loss - other.loss for record, other in zip(records, reference, strict=False)]
    means = [statistics.fmean(gaps[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(gaps))]
    outside = [i for i, mean in enumerate(means, start=1) if not mean <= BAND]  # NaN is outside
    recovered = max(outside, default=0)
    return recovered if recovered < len(reference) and math.isfinite(records[-1].loss) else None


def page(result: Result) -> str:
    """The three tables and what their words mean."""
    cells = [restored(Cell, row) for row in result["rows"]]
    sigmas = (f"{label} {level['std'] / level['mean']:.2f}" for label, level in result["levels"].items())
    return document(
        "faults: what one fault in the gradients does to a run",
        result,
        f"{setup(result)} The fault begins at step {result['fault_step']}.",
        *tables(cells, result["last_steps"]),
        *start_table([restored(BadStart, row) for row in result.get("starts", ())]),  # a result of before has none
        bullets([*result["notes"], f"sigma, as a share of the mean: {', '.join(sigmas)}"]),
    )


def tables(cells: Sequence[Cell], last: int) -> tuple[str, ...]:
    """The three tables, each after its title."""
    return (
        "Survived, and steps to recover:",
        table(cells, outcome),
        f"Mean loss of the last {last} steps; under a fault, its difference from the run without one (nats per byte):",
        table(cells, loss),
        f"Share of the last {last} steps clipped:",
        table(cells, lambda cell: f"{cell.clipped_share:.0%}" if cell.survived else "-"),
    )


def start_table(starts: Sequence[BadStart]) -> tuple[str, ...]:
    """After its title: bad norms down, methods across."""
    rows: dict[tuple[int, float], dict[str, str]] = {}
    for start in starts:
        where = {"one bad norm": f"x {start.factor:,.0f} at step {start.step}"}
        clipped_at = "-" if start.clipped_at is None else str(start.clipped_at)
        rows.setdefault((start.step, start.factor), where)[start.method] = clipped_at
    title = f"After one bad norm, the first step at which gradients x {PROBE:g} are clipped; tried every {PROBE_EVERY}:"
    return (title, markdown(list(rows.values()))) if rows else ()


def table(cells: Sequence[Cell], entry: Callable[[Cell], str]) -> str:
    """Faults down, methods across."""
    labels = {NO_FAULT: NO_FAULT} | {fault.name: fault.label for fault in FAULTS}
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(cell.fault, {"fault": labels[cell.fault]})[cell.method] = entry(cell)
    return markdown(list(rows.values()))


def outcome(cell: Cell) -> str:
    """Whether it survived, and the steps to recover."""
    if not cell.survived:
        return "**no**"
    return "yes, -" if cell.steps_to_recover is None else f"yes, {cell.steps_to_recover}"


def loss(cell: Cell) -> str:
    """The final loss, or what a fault has added to it."""
    if not cell.survived:
        return "-"
    return f"{cell.final_loss:.3f}" if cell.fault == NO_FAULT else f"{cell.final_loss_difference:+.3f}"
