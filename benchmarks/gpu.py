"""Measures on a CUDA device what `overhead` measures on the CPU, and what only a device has.

Own costs beside fused AdamW as ratios to other packages and to one read of the gradients; whether a step makes the
host wait (`torch.cuda.set_sync_debug_mode("error")`) and can be captured in a CUDA graph; the bandwidth at which the
gradients are read, against a copy's; peak memory. Writes gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.optim import AdamW
from tqdm import tqdm

from benchmarks import UserError
from benchmarks.options import add_out_option, positive_float, positive_int, prepare_folder
from benchmarks.overhead import NOTES, OURS, Row, Size, measure, microseconds, ratios, transformer, with_gradients
from benchmarks.report.pages import Result, bullets, document, restored, write_result
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import heading, markdown
from zclip_optim import ZClipOptimizer

COPIED = 2**30  # bytes of the copy that measures bandwidth
REPEATS = 20

SIZES = tuple(
    Size(f"{name}, {str(dtype).removeprefix('torch.')}", shapes, dtype)
    for name, shapes in (
        ("29 M", transformer(512, 1376, 6, 10_000)),
        ("110 M", transformer(768, 2048, 12, 16_000)),
        ("350 M", transformer(1024, 2736, 24, 16_000)),
        ("1 B", transformer(2048, 5440, 16, 65_536)),
    )
    for dtype in (torch.float32, torch.bfloat16)
)


@dataclass(frozen=True)
class Checks:
    """What a step does on the device, beside taking time."""

    reads_nothing_back: bool
    captured_steps: int  # counted by the statistics after 10 replays of a captured step
    gradient_bandwidth: float  # bytes of gradients over our own cost, as a share of a copy's bandwidth
    extra_memory: int  # bytes at the peak of a step above the bare step's peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--seconds", type=positive_float, default=10.0, help="time for each size, at least 7 rounds")
    parser.add_argument("--max-parameters", type=positive_int, default=2 * 10**9, help="leave out larger models")
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Measures every size and writes the results."""
    if not torch.cuda.is_available():
        raise UserError("gpu: torch finds no CUDA device here; `python -m benchmarks overhead` measures on the CPU")
    prepare_folder(args.out)
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    fits = [size for size in SIZES if size.parameters <= args.max_parameters]
    progress = tqdm(fits, unit="size", mininterval=progress_interval())
    rows = [measure(size, args.seconds, device) for size in progress]
    checks = [check(size, row, bandwidth, device) for size, row in zip(fits, rows, strict=True)]
    print(ratios(rows), microseconds(rows), sep="\n\n")
    result = heading("gpu", [0], "zclip", "autoclip") | {
        "device": torch.cuda.get_device_name(),
        "copy_bandwidth": bandwidth,
        "rows": [asdict(row) | asdict(checked) for row, checked in zip(rows, checks, strict=True)],
    }
    write_result(args.out / "gpu.json", result, page)
    print(f"wrote {args.out / 'gpu.json'} and {args.out / 'gpu.md'}")


def page(result: Result) -> str:
    """The ratios, the microseconds and the checks of every size."""
    rows = [restored(Row, row) for row in result["rows"]]
    return document(
        "gpu: what clipping costs beside a step of fused AdamW on a CUDA device",
        result,
        "Our own cost over that of the others, and over one plain `sum` over every gradient:",
        ratios(rows),
        "Own costs as they are, medians:",
        microseconds(rows),
        "What a step does besides:",
        markdown([{"model": row["size"]} | shown(restored(Checks, row)) for row in result["rows"]]),
        bullets(NOTES),
    )


def shown(checks: Checks) -> dict[str, str]:
    """The columns of the table of checks."""
    return {
        "the host never waits": "yes" if checks.reads_nothing_back else "**no**",
        "steps counted in 10 replays": str(checks.captured_steps),
        "gradients read, share of a copy's bandwidth": f"{checks.gradient_bandwidth:.0%}",
        "extra memory, bytes": f"{checks.extra_memory:,}",
    }


def check(size: Size, row: Row, bandwidth: float, device: torch.device) -> Checks:
    """What a step does besides."""
    n_bytes = size.parameters * size.dtype.itemsize
    return Checks(
        reads_nothing_back(size, device),
        captured_steps(size, device),
        n_bytes / (row.own_us[OURS] * 1e-6) / bandwidth,
        peak_memory(size, device, wrap=True) - peak_memory(size, device, wrap=False),
    )


def reads_nothing_back(size: Size, device: torch.device) -> bool:
    """Whether torch's own detector finds no synchronisation in warm-up, ordinary, clipped and skipped steps."""
    model = with_gradients(size, device)
    step = ZClipOptimizer(AdamW(model.parameters(), fused=True), warmup_steps=2).step
    step()  # compiles
    try:
        for factor in (1.01, 0.99, 1.0, 50.0, torch.nan):
            model[0].grad.mul_(factor)
            torch.cuda.set_sync_debug_mode("error")
            step()
            torch.cuda.set_sync_debug_mode("default")
    except RuntimeError as error:
        print(f"{size.name}: {error}")
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def captured_steps(size: Size, device: torch.device) -> int:
    """The steps that the statistics have counted when a captured step was replayed 10 times."""
    model = with_gradients(size, device)
    optimizer = ZClipOptimizer(AdamW(model.parameters(), fused=True, capturable=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    before = optimizer.metrics.step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(10):
        graph.replay()
    return optimizer.metrics.step - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device, read and written ones."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source))
    return 2 * COPIED / seconds


def fastest(work: Callable[[], object]) -> float:
    """Seconds, the least of a few."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory(size: Size, device: torch.device, wrap: bool) -> int:
    """Bytes at the peak of a second step."""
    model = with_gradients(size, device)
    base = AdamW(model.parameters(), fused=True)
    optimizer = ZClipOptimizer(base) if wrap else base
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    return torch.cuda.max_memory_allocated()
