"""Measures what clipping costs beside the step of fused AdamW, here and in other packages, on models of many sizes.

A method's own cost is the time of its step minus that of the bare optimizer's step, both measured in the same round;
the methods of a round run in shuffled order on the same gradients, none of which is clipped. Figures are medians over
rounds. For the models of the first table also what a wrapped step with a closure adds, as Lightning takes it, what it
costs to read the metrics, and the memory at the peak. Writes overhead.json, overhead.md and overhead.png.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, cycle, pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.options import add_out_option, positive_float, positive_int, prepare_folder
from benchmarks.report.pages import Result, bullets, document, restored, write_result
from benchmarks.report.plots import COLORS, STYLE, plottable
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import heading, markdown
from zclip_optim import ZClipOptimizer

BARE, READ, OURS, AUTOCLIP = "bare", "read once", "zclip_optim", "autoclip"
PEERS = ("zclip 1.0.0", "clip_grad_norm_", AUTOCLIP)
NEVER = 1e9  # a norm, and a z-score, that no gradient here reaches
LEAST_ROUNDS = 7
READ_SHOWN = 1_000_000  # parameters from which on one read of the gradients is memory's limit, not Python's

NOTES = (
    "own cost: a method's step minus the bare step of the same round; methods run in shuffled order, on the same "
    "gradients, of which none is clipped; figures are medians over rounds",
    "zclip 1.0.0 is the published package with max_grad_norm=None; clip_grad_norm_ has a maximum that no norm reaches",
    "autoclip has rounds of its own: what runs after its quantiles starts with cold caches",
    f"one read: from {READ_SHOWN:,} parameters on",
    "a step with a closure: more than the bare one's with a closure that evaluates nothing; memory: in tensors, at the "
    "peak of a step, above the bare step's peak",
    "16-bit gradients: zclip_optim accumulates in float32; the norms of the others are rounded to 16 bits",
)

CPU = torch.device("cpu")

Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """A model to measure on: the shapes of its parameters and their dtype."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        """Elements over all tensors."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Row:
    """What was measured on one size; microseconds, medians over `rounds`."""

    size: str
    tensors: int
    parameters: int
    dtype: str
    rounds: int
    bare_us: float
    read_us: float  # one `sum` over every gradient
    own_us: dict[str, float]  # method -> its step minus the bare step


@dataclass(frozen=True)
class Besides:
    """What else a wrapped step costs on one size."""

    closure_us: float  # a step with a closure minus the bare optimizer's with the same one
    as_dict_us: float  # reading `metrics.as_dict()`
    extra_memory: int  # bytes in tensors at the peak of a step above the bare step's peak


def perceptron(*widths: int) -> list[tuple[int, ...]]:
    """The shapes of linear layers from each width to the next."""
    return [shape for before, after in pairwise(widths) for shape in ((after, before), (after,))]


def resnet18() -> list[tuple[int, ...]]:
    """The shapes of torchvision's."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    for before, width in pairwise((64, 64, 128, 256, 512)):
        norm = [(width,)] * 2
        shapes += [(width, before, 3, 3), *norm, (width, width, 3, 3), *norm]
        if before != width:
            shapes += [(width, before, 1, 1), *norm]
        shapes += [(width, width, 3, 3), *norm] * 2
    return [*shapes, (1000, 512), (1000,)]


def vision_transformer(hidden: int, layers: int) -> list[tuple[int, ...]]:
    """The shapes of one with patches of 16 x 16 of an image of 224 x 224, such as ViT-S (384, 12)."""
    norm = [(hidden,)] * 2
    attention = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    layer = [*norm, *attention, *norm, *perceptron(hidden, 4 * hidden, hidden)]
    patches = [(1, 1, hidden), (1, 197, hidden), (hidden, 3, 16, 16), (hidden,)]
    return [*patches, *layer * layers, *norm, (1000, hidden), (1000,)]


def transformer(hidden: int, feed_forward: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The shapes of a LLaMA-like model with untied embeddings."""
    square, up, down = (hidden, hidden), (feed_forward, hidden), (hidden, feed_forward)
    layer = [square] * 4 + [up, up, down] + [(hidden,)] * 2
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


SIZES = (
    Size("4 tensors, 1.4 k", perceptron(32, 32, 10)),
    Size("RL, 17-64-64-6", perceptron(17, 64, 64, 6)),
    Size("RL, 17-256-256-6", perceptron(17, 256, 256, 6)),
    Size("LoRA, 50 pairs of 8 x 1024", [(8, 1024), (1024, 8)] * 50),
    Size("8 tensors of 64 x 128", [(64, 128)] * 8),
    Size("tabular, 100-512-512-512-1", perceptron(100, 512, 512, 512, 1)),
    Size("100 tensors of 64 x 64", [(64, 64)] * 100),
    Size("600 tensors of 32 x 32", [(32, 32)] * 600),
    Size("ResNet-18", resnet18()),
    Size("ViT-S", vision_transformer(384, 12)),
    Size("29 M, transformer", transformer(512, 1376, 6, 10_000)),
    Size("29 M, transformer, bf16", transformer(512, 1376, 6, 10_000), torch.bfloat16),
    Size("110 M, transformer", transformer(768, 2048, 12, 16_000)),
)
BY_TENSORS = tuple(Size(f"{n} tensors of 1,024", [(1024,)] * n) for n in (4, 16, 64, 250, 1000, 4000))
BY_PARAMETERS = tuple(
    Size(f"8 tensors of {n:.0e}", [(n // 8,)] * 8) for n in (1_000, 10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8)
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--seconds", type=positive_float, default=10.0, help="time for each size, at least 7 rounds")
    parser.add_argument("--max-parameters", type=positive_int, default=2 * 10**8, help="leave out larger models")
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Measures every size and writes the results."""
    prepare_folder(args.out)
    fits = [s for s in (*SIZES, *BY_TENSORS, *BY_PARAMETERS) if s.parameters <= args.max_parameters]
    progress = tqdm(fits, unit="size", mininterval=progress_interval())
    rows = {size.name: measure(size, args.seconds) for size in progress}
    print(format_tables(rows))
    found = {size.name: besides(size, args.seconds) for size in SIZES if size in fits}
    print(table_of_besides(found))
    together = [asdict(row) | (asdict(found[name]) if name in found else {}) for name, row in rows.items()]
    result = heading("overhead", [0], "zclip", "autoclip") | {"rows": together}
    write_result(args.out / "overhead.json", result, page)
    growth = [[rows[s.name] for s in sizes if s.name in rows] for sizes in (BY_TENSORS, BY_PARAMETERS)]
    overhead_figure(*growth, args.out / "overhead.png")
    print(f"wrote {args.out / 'overhead.json'}, {args.out / 'overhead.md'} and {args.out / 'overhead.png'}")


def page(result: Result) -> str:
    """The ratios, the microseconds of every size, and what the words mean."""
    rows = [restored(Row, row) for row in result["rows"]]
    return document(
        "overhead: what clipping costs beside a step of fused AdamW",
        result,
        "Our own cost over that of the others, and over one plain `sum` over every gradient:",
        ratios([row for row in rows if row.size in {size.name for size in SIZES}]),
        "Own costs as they are, medians:",
        microseconds(rows),
        "What else a wrapped step costs:",
        table_of_besides({r["size"]: restored(Besides, r) for r in result["rows"] if "closure_us" in r}),
        "![Own cost against the number of tensors and of parameters](overhead.png)",
        bullets(NOTES),
    )


def measure(size: Size, seconds: float, device: torch.device = CPU) -> Row:
    """Times every method on one size."""
    model = with_gradients(size, device)
    steps = methods(model)
    # autoclip sorts a history of norms: what runs after that starts with cold caches, so it has rounds of its own.
    alone = rounds({BARE: steps[BARE], AUTOCLIP: steps.pop(AUTOCLIP)}, model, 0.2 * seconds, device)
    times = rounds(steps, model, 0.8 * seconds, device)
    return Row(
        size=size.name,
        tensors=len(size.shapes),
        parameters=size.parameters,
        dtype=str(size.dtype).removeprefix("torch."),
        rounds=len(times[BARE]),
        bare_us=statistics.median(times[BARE]),
        read_us=statistics.median(times[READ]),
        own_us={name: median_difference(times[name], times[BARE]) for name in (OURS, *PEERS[:-1])}
        | {AUTOCLIP: median_difference(alone[AUTOCLIP], alone[BARE])},
    )


def besides(size: Size, seconds: float) -> Besides:
    """Measures what else a wrapped step costs."""
    model = with_gradients(size, CPU)
    base = AdamW(model.parameters(), lr=1e-6, fused=True)
    optimizer, loss = ZClipOptimizer(base, z_thresh=NEVER), torch.zeros(())
    steps = {BARE: lambda: base.step(lambda: loss), OURS: lambda: optimizer.step(lambda: loss)}
    times = rounds(steps, model, 0.1 * seconds, CPU)
    reads = [timed(lambda: optimizer.metrics.as_dict(), CPU) for _ in times[BARE]]
    return Besides(
        median_difference(times[OURS], times[BARE]),
        statistics.median(reads),
        peak_memory(optimizer.step) - peak_memory(base.step),
    )


def peak_memory(step: Step) -> int:
    """Bytes in tensors on the CPU that a step makes, at its peak."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def rounds(
    steps: dict[str, Step], model: nn.ParameterList, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Microseconds of each step, in rounds of shuffled order until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for step in 3 * list(steps.values()):  # first steps allocate, and compile
        step()
    start = time.perf_counter()
    while time.perf_counter() < start + seconds or len(times[BARE]) < LEAST_ROUNDS:
        model[0].grad.normal_(std=order.uniform(0.2, 2.0))  # equal norms would be something to warn of
        for name in order.sample(list(steps), len(steps)):
            times[name].append(timed(steps[name], device))
    return times


def with_gradients(size: Size, device: torch.device) -> nn.ParameterList:
    """Parameters of these shapes, with gradients."""
    torch.manual_seed(0)
    kind = {"dtype": size.dtype, "device": device}
    model = nn.ParameterList([nn.Parameter(0.02 * torch.randn(shape, **kind)) for shape in size.shapes])
    for p in model:
        p.grad = torch.randn_like(p)
    return model


def methods(model: nn.Module) -> dict[str, Step]:
    """The step of every method, on one optimizer; the bare step and one plain read of the gradients are among them."""
    from autoclip.torch import QuantileClip
    from zclip import ZClip

    params = list(model.parameters())
    base = AdamW(params, lr=1e-6, fused=True)
    published = ZClip(max_grad_norm=None, z_thresh=NEVER)
    quantile = QuantileClip(params, quantile=1.0, global_threshold=True)
    return {
        BARE: base.step,
        READ: lambda: [p.grad.sum() for p in params],
        OURS: ZClipOptimizer(base, z_thresh=NEVER).step,
        "zclip 1.0.0": lambda: (published.step(model), base.step()),
        "clip_grad_norm_": lambda: (nn.utils.clip_grad_norm_(params, NEVER), base.step()),
        AUTOCLIP: lambda: (quantile.step(), base.step()),
    }


def timed(step: Step, device: torch.device) -> float:
    """Microseconds of one call, until the device is done with it."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter_ns()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter_ns() - start) / 1e3


def median_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of what the first took longer than the second."""
    return statistics.median(value - other for value, other in zip(values, others, strict=True))


def format_tables(rows: dict[str, Row]) -> str:
    """The table of ratios, and that of microseconds."""
    return "\n\n".join((ratios([rows[s.name] for s in SIZES if s.name in rows]), microseconds(list(rows.values()))))


def ratios(rows: Sequence[Row]) -> str:
    """Our own cost over that of each peer, and over one read of the gradients."""
    return markdown(
        [
            {"model": row.size}
            | {f"vs {peer}": f"{row.own_us[OURS] / row.own_us[peer]:.2f}" for peer in row.own_us if peer != OURS}
            | {"vs one read": f"{row.own_us[OURS] / row.read_us:.2f}" if row.parameters >= READ_SHOWN else "-"}
            for row in rows
        ]
    )


def microseconds(rows: Sequence[Row]) -> str:
    """Own costs as they are."""
    return markdown(
        [
            {"own cost, us": row.size}
            | {name: f"{us:,.1f}" for name, us in row.own_us.items()}
            | {READ: f"{row.read_us:,.1f}", "bare step": f"{row.bare_us:,.1f}", "rounds": row.rounds}
            for row in rows
        ]
    )


def table_of_besides(found: Mapping[str, Besides]) -> str:
    """Of the sizes that have it."""
    return markdown(
        [
            {
                "model": name,
                "step with a closure, us": f"{row.closure_us:,.1f}",
                "metrics.as_dict(), us": f"{row.as_dict_us:.1f}",
                "memory, MB": f"{row.extra_memory / 1e6:.2f}",
            }
            for name, row in found.items()
        ]
    )


def overhead_figure(by_tensors: Sequence[Row], by_parameters: Sequence[Row], path: Path) -> None:
    """Every method's own cost against the number of tensors, and of parameters with the limit of one read.

    Args:
        by_tensors: rows of models that differ in the number of tensors.
        by_parameters: rows of models that differ in the size of the tensors.
        path: the PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        growth_panel(left, by_tensors, [row.tensors for row in by_tensors], "tensors of 1,024 elements")
        growth_panel(right, by_parameters, [row.parameters for row in by_parameters], "parameters, in 8 tensors")
        figure.savefig(path, dpi=100)


def growth_panel(axes: Axes, rows: Sequence[Row], sizes: Sequence[int], label: str) -> None:
    """Own cost of every method, and the time of one read, on log-log axes."""
    for color, method in zip(cycle(COLORS[2:]), rows[0].own_us if rows else (), strict=False):
        axes.loglog(sizes, plottable(row.own_us[method] for row in rows), "o-", color=color, markersize=3, label=method)
    axes.loglog(
        sizes, [row.read_us for row in rows], "--", color="black", linewidth=1, label="one sum over each gradient"
    )
    axes.set(title="Clipping's own cost per step", xlabel=label, ylabel="microseconds")
    axes.legend(frameon=False, fontsize=8)
