"""Feeds sequences of norms to ZClip's spike test and counts the steps that it clips. No model, no training.

Four questions: does it find its way back after the level of the norm has shifted for good; how often does it clip norms
that come from one distribution all the time; how long does one bad norm at the start blind it; and what would it have
done to the norms of real runs, from their public logs? Writes detector.json and detector.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.evidence.histories import HISTORY_NOTES, history_line, load_histories, replayed_rows
from benchmarks.options import add_out_option, positive_int, prepare_folder
from benchmarks.report.pages import Result, bullets, document, restored, write_result
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import heading, markdown
from benchmarks.training.contenders import Contender, ours
from benchmarks.training.methods import METHODS
from zclip_optim import ZClipConfig, decide, replay
from zclip_optim.replay import step_records

NOISE = 0.05  # standard deviation of the norm, in units of its mean
BEFORE = 200  # steps before the level shifts
PATIENCE = 200  # spikes in a row, of the detectors that have any
SHIFTS = (6, 10, 100, 1000)  # standard deviations
LOGNORMAL = (0.3, 0.6)  # sigma of the logarithm
AUTOREGRESSIVE = (0.9, 0.99)  # phi
STUCK = 0.05  # share of clipped steps above which a seed has not recovered
WARMUP = 25  # steps, both implementations' default
Z_THRESH = 2.5  # and this one

NOTES = (
    f"shift: {BEFORE} norms around 1 with Gaussian noise of {NOISE:.0%}, then the level rises by so many standard "
    "deviations for good",
    "paper: zclip_optim as in the paper; the rest: with these options; zclip 1.0.0: the published package with "
    "max_grad_norm=None, shown a module with one parameter whose gradient is the norm",
    "AR(1): its tail is that of its stationary distribution",
)

BAD_STEPS, BAD_FACTORS = (1, 6, 21), (1e2, 1e4, 1e6)  # where one bad norm stands, and how large it is
PROBE, PROBED = 20.0, 2_000  # ordinary norms, and steps up to which it is tried
BLIND_SEEDS = 3

Detector = Callable[[Sequence[float]], list[bool]]


@dataclass(frozen=True)
class Norms:
    """A kind of sequence: `draw` takes a generator and the number of steps that are counted."""

    name: str
    label: str
    draw: Callable[[torch.Generator, int], Tensor]
    ignored: int  # steps at the start that are not counted
    tail: float | None = None  # probability of a norm above mean + Z_THRESH standard deviations


@dataclass(frozen=True)
class Row:
    """The share of counted steps that a detector clipped, per seed."""

    sequence: str
    detector: str
    mean: float
    worst: float
    stuck_seeds: int
    tail_probability: float | None
    shares: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the detector."""
    parser.add_argument("--steps", type=positive_int, default=5000, help="steps of each sequence that are counted")
    parser.add_argument("--seeds", type=positive_int, default=20, help="sequences of each kind, with seeds from 0 on")
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Counts, and writes and prints the two tables."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    prepare_folder(args.out)
    with tqdm(total=len(SEQUENCES) * args.seeds, unit="sequence", mininterval=progress_interval()) as progress:
        rows = [row for norms in SEQUENCES for row in count(norms, args.steps, args.seeds, progress)]
    blind, histories = blind_rows(min(args.seeds, BLIND_SEEDS)), replayed_rows(RULES)
    result = heading("detector", range(args.seeds), "zclip") | {
        "seconds": round(time.perf_counter() - start, 1),
        "steps": args.steps,
        "noise": NOISE,
        "steps_before_shift": BEFORE,
        "steps_not_counted_after_shift": {norms.name: norms.ignored - BEFORE for norms in SHIFTED},
        "stuck_above": STUCK,
        "rows": [asdict(row) for row in rows],
        "blind": blind,
        "histories": histories,
    }
    write_result(args.out / "detector.json", result, page)
    print("", *tables(rows, args.steps), *blind_table(blind), *history_table(histories), sep="\n\n")
    print(f"\nwritten to {args.out}: detector.json, detector.md, in {result['seconds']} s")


def count(norms: Norms, steps: int, seeds: int, progress: tqdm) -> list[Row]:
    """One kind of sequence: a row per detector."""
    shares: dict[str, list[float]] = {name: [] for name in DETECTORS}
    for seed in range(seeds):
        sequence = norms.draw(torch.Generator().manual_seed(seed), steps).tolist()
        for name, detector in DETECTORS.items():
            shares[name].append(statistics.fmean(detector(sequence)[norms.ignored :]))
        progress.update()
    return [row(norms, name, shares[name]) for name in DETECTORS]


def row(norms: Norms, detector: str, shares: list[float]) -> Row:
    """The mean and the worst of the seeds."""
    stuck = sum(share > STUCK for share in shares)
    return Row(norms.name, detector, statistics.fmean(shares), max(shares), stuck, norms.tail, shares)


def zclip_optim(norms: Sequence[float], **options: object) -> list[bool]:
    """Which norms `zclip_optim` takes for spikes."""
    return [m.is_spike for m in replay(norms, **options)]


def published(norms: Sequence[float]) -> list[bool]:
    """Which norms the published package clips: it is shown a module with one parameter whose gradient is the norm."""
    from zclip import ZClip

    clipper, module = ZClip(max_grad_norm=None), nn.Linear(1, 1, bias=False, dtype=torch.float64)
    spikes = []
    for norm in norms:
        module.weight.grad = torch.full_like(module.weight, norm)
        clipper.step(module)
        spikes.append(module.weight.grad.item() < norm)
    return spikes


PAPER = METHODS["paper"].options
RULES: dict[str, Mapping[str, Any]] = {
    each.label: PAPER | dict(each.options)
    for each in (
        Contender("paper", "paper"),
        ours(patience=PATIENCE),
        ours(alpha_down=0.8),
        ours(lookback=0.1),
        ours(lookback=0.1, alpha_down=0.9),
        ours(lookback=0.1, alpha_down=0.9, patience=PATIENCE),
    )
}
DETECTORS: dict[str, Detector] = {"zclip 1.0.0": published} | {
    name: partial(zclip_optim, **options) for name, options in RULES.items()
}


def blind_rows(seeds: int) -> list[dict[str, Any]]:
    """A row for each place and size of one bad norm, and each rule: for every seed when PROBE would be clipped."""
    return [
        {
            "step": step,
            "factor": factor,
            "rule": rule,
            "steps": [steps_blind(step, factor, seed, options) for seed in range(seeds)],
        }
        for step in BAD_STEPS
        for factor in BAD_FACTORS
        for rule, options in RULES.items()
    ]


def steps_blind(bad_step: int, factor: float, seed: int, options: Mapping[str, Any]) -> int | None:
    """The first step (from 1) at which a norm of PROBE would be clipped; None if there is none up to PROBED."""
    norms = normal(torch.Generator().manual_seed(seed), PROBED - WARMUP).tolist()
    norms[bad_step - 1] *= factor
    config = ZClipConfig(**options)
    for step, record in enumerate(step_records(norms, config), start=1):
        if decide(PROBE, record.before, config).is_spike:
            return step
    return None


def noise(generator: torch.Generator, steps: int) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(steps, generator=generator, dtype=torch.float64)


def shifted(generator: torch.Generator, steps: int, deviations: float) -> Tensor:
    """BEFORE norms around 1, then `grace` and `steps` ones around a level so many standard deviations higher."""
    level = torch.ones(BEFORE + grace(deviations) + steps, dtype=torch.float64)
    level[BEFORE:] += deviations * NOISE
    return level * (1 + NOISE * noise(generator, len(level)))


def grace(deviations: float) -> int:
    """Steps after a shift that are not counted: after PATIENCE the statistics double in 1,000; and 100 to settle."""
    return PATIENCE + round(1000 * math.log2(1 + deviations * NOISE)) + 100


def normal(generator: torch.Generator, steps: int) -> Tensor:
    """Norms around 1, independent."""
    return 1 + NOISE * noise(generator, WARMUP + steps)


def lognormal(generator: torch.Generator, steps: int, sigma: float) -> Tensor:
    """Norms whose logarithm is normal with mean 0, independent."""
    return (sigma * noise(generator, WARMUP + steps)).exp()


def autoregressive(generator: torch.Generator, steps: int, phi: float) -> Tensor:
    """Norms around 1 with a memory, of the same distribution as `normal`.

    x_t = phi x_(t-1) + sqrt(1 - phi^2) e_t,   norm = 1 + NOISE x_t
    """
    shocks = noise(generator, WARMUP + steps).tolist()
    values = shocks[:1]
    for shock in shocks[1:]:
        values.append(phi * values[-1] + math.sqrt(1 - phi**2) * shock)
    return 1 + NOISE * torch.tensor(values, dtype=torch.float64)


def normal_tail() -> float:
    """P(x > mean + z std) of a normal distribution."""
    return 1 - NormalDist().cdf(Z_THRESH)


def lognormal_tail(sigma: float) -> float:
    """P(x > mean + z std) of a lognormal distribution with parameters 0 and sigma."""
    mean = math.exp(sigma**2 / 2)
    std = mean * math.sqrt(math.expm1(sigma**2))
    return 1 - NormalDist(0, sigma).cdf(math.log(mean + Z_THRESH * std))


SHIFTED = tuple(
    Norms(f"shift_{k}", f"{k} sigma", partial(shifted, deviations=k), ignored=BEFORE + grace(k)) for k in SHIFTS
)
STATIONARY = (
    Norms("normal", f"normal, mean 1, std {NOISE}", normal, WARMUP, normal_tail()),
    *(
        Norms(f"lognormal_{s}", f"lognormal, sigma {s}", partial(lognormal, sigma=s), WARMUP, lognormal_tail(s))
        for s in LOGNORMAL
    ),
    *(
        Norms(f"ar1_{p}", f"AR(1), phi {p}, std {NOISE}", partial(autoregressive, phi=p), WARMUP, normal_tail())
        for p in AUTOREGRESSIVE
    ),
)
SEQUENCES = SHIFTED + STATIONARY


def page(result: Result) -> str:
    """The two tables and what their words mean."""
    rows = [restored(Row, row) for row in result["rows"]]
    title = "detector: how often the spike test clips, without a model"
    more = *blind_table(result["blind"]), *history_table(result["histories"])
    return document(title, result, *tables(rows, result["steps"]), *more, bullets((*NOTES, *HISTORY_NOTES)))


def blind_table(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """After its title: the worst of the seeds for each bad norm and rule."""
    found: dict[tuple[int, float], dict[str, str]] = {}
    for row in rows:
        place = {"one bad norm": f"{row['factor']:,.0f} times the others, at step {row['step']}"}
        steps = "-" if None in row["steps"] else str(max(row["steps"]))
        found.setdefault((row["step"], row["factor"]), place)[row["rule"]] = steps
    title = f"The first step at which a norm {PROBE:g} times the others is clipped (worst seed; -: not by {PROBED:,}):"
    return title, markdown(list(found.values()))


def history_table(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """After its title: what each rule did to each history."""
    kinds = {each.name: f"{each.kind}, every {each.logging_steps} steps" for each in load_histories()}
    sources = "; ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return f"Norms of real runs, as they were logged ({sources}):", markdown(list(map(history_line, rows)))


def tables(rows: Sequence[Row], steps: int) -> tuple[str, ...]:
    """The two tables, each after its title."""
    shifts = [row for row in rows if row.tail_probability is None]
    others = [row for row in rows if row.tail_probability is not None]
    tails = {row.sequence: {"tail": f"{row.tail_probability:.2%}"} for row in others}
    return (
        f"Share of {steps:,} steps clipped after a lasting shift of the level, from {PATIENCE + 100} steps and 1,000 "
        f"for each doubling on, mean (worst seed); in brackets the seeds with more than {STUCK:.0%}:",
        markdown(list(lines(shifts, "shift up", regime_entry).values())),
        f"Share of {steps:,} steps clipped after warm-up, of norms from one distribution, mean (worst seed):",
        markdown([line | tails[name] for name, line in lines(others, "norms", rate_entry).items()]),
        f"tail: probability of a norm above mean + {Z_THRESH:g} standard deviations of that distribution",
    )


def lines(rows: Sequence[Row], head: str, entry: Callable[[Row], str]) -> dict[str, dict[str, str]]:
    """The lines of a table by sequence: one entry per detector."""
    labels = {norms.name: norms.label for norms in SEQUENCES}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row.sequence, {head: labels[row.sequence]})[row.detector] = entry(row)
    return found


def regime_entry(row: Row) -> str:
    """Shares in whole per cents would hide what is small: one decimal."""
    return f"{row.mean:.1%} ({row.worst:.1%}) [{row.stuck_seeds} of {len(row.shares)}]"


def rate_entry(row: Row) -> str:
    """Two decimals, as the tail probability has."""
    return f"{row.mean:.2%} ({row.worst:.2%})"
