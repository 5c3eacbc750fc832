"""Feeds sequences of norms to ZClip's spike test and counts the steps that it clips. No model, no training.

Two questions: does it find its way back after the level of the norm has shifted for good, and how often does it clip
norms that come from one distribution all the time? Writes detector.json and
detector.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.options import add_out_option, positive_int, prepare_folder
from benchmarks.report.pages import Result, bullets, document, restored, write_result
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import heading, markdown
from zclip_optim.algorithm import NormStats, ZClipConfig, decide

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
    "paper: zclip_optim with alpha_down=None, patience=None; the rest: with these options; zclip 1.0.0: the published "
    "package with max_grad_norm=None, shown a module with one parameter whose gradient is the norm",
    "AR(1): its tail is that of its stationary distribution",
)

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
    result = heading("detector", range(args.seeds), "zclip") | {
        "seconds": round(time.perf_counter() - start, 1),
        "steps": args.steps,
        "noise": NOISE,
        "steps_before_shift": BEFORE,
        "steps_not_counted_after_shift": {norms.name: norms.ignored - BEFORE for norms in SHIFTED},
        "stuck_above": STUCK,
        "rows": [asdict(row) for row in rows],
    }
    write_result(args.out / "detector.json", result, page)
    print("", *tables(rows, args.steps), sep="\n\n")
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
    config, stats, spikes = ZClipConfig(**options), NormStats(), []
    for norm in norms:
        decision = decide(norm, stats, config)
        stats = decision.stats
        spikes.append(bool(decision.is_spike))
    return spikes


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


PAPER = {"patience": None, "alpha_down": None, "z_thresh": Z_THRESH}
DETECTORS: dict[str, Detector] = {
    "zclip 1.0.0": published,
    "paper": partial(zclip_optim, **PAPER),
    "patience=200": partial(zclip_optim, **PAPER | {"patience": PATIENCE}),
    "alpha_down=0.8": partial(zclip_optim, **PAPER | {"alpha_down": 0.8}),
    "alpha_down=0.8, patience=200": partial(zclip_optim, **PAPER | {"alpha_down": 0.8, "patience": PATIENCE}),
}


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
    return document(title, result, *tables(rows, result["steps"]), bullets(NOTES))


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
