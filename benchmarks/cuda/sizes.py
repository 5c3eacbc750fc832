"""What clipping costs on models up to 1 B parameters, and what else a step does: waiting, graphs, bandwidth, memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import AdamW

from benchmarks.cuda import checks
from benchmarks.cuda.attempts import LeftOut, NotTriedError, attempt
from benchmarks.overhead import OURS, Row, Size, Step, measure, timed, transformer, with_gradients
from benchmarks.report.pages import Result, restored
from benchmarks.report.summary import markdown
from zclip_optim import ZClipOptimizer

COPIED = 2**30  # bytes of the copy that measures bandwidth
REPEATS = 20
REPLAYS = 10
COPIES = 6  # of the parameters: with gradients and two moments there are 4, the rest is for what others allocate

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
    captured_steps: int  # counted by the statistics after REPLAYS of a captured step
    gradient_bandwidth: float  # bytes of gradients over our own cost, as a share of a copy's bandwidth
    extra_memory: int  # bytes at the peak of a step above the bare step's peak


def measured(
    sizes: Sequence[Size], seconds: float, deadline: float, device: torch.device, left_out: list[LeftOut]
) -> Iterator[dict[str, Any]]:
    """A row for each size that the device holds, without its checks where they fail.

    Args:
        sizes: of the models.
        seconds: of timing for each.
        deadline: after which none is begun, on the clock of time.monotonic.
        device: to measure on.
        left_out: is given what fails.
    """
    bandwidth = attempt("bandwidth of a copy", lambda: copy_bandwidth(device), left_out)
    for size in sizes:
        row = attempt(size.name, lambda size=size: measure_held(size, seconds, deadline, device), left_out)
        if row is None:
            continue
        found = attempt(
            f"{size.name}, what a step does besides",
            lambda size=size, row=row: check(size, row, bandwidth or math.nan, device),
            left_out,
        )
        yield asdict(row) | (asdict(found) if found else {})


def measure_held(size: Size, seconds: float, deadline: float, device: torch.device) -> Row:
    """The costs, if time and memory will do."""
    if time.monotonic() > deadline:
        raise NotTriedError("the time for this part was over")
    needed, free = COPIES * size.parameters * size.dtype.itemsize, free_memory(device)
    if needed > free:
        raise NotTriedError(f"it takes some {needed / 1e9:.1f} GB of the device, {free / 1e9:.1f} GB are free")
    return measure(size, seconds, device)


def free_memory(device: torch.device) -> float:
    """Bytes, those that torch keeps for later included; not asked for on the CPU."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def table_of_checks(rows: Sequence[Result]) -> str:
    """Of the sizes that have them."""
    return markdown([{"model": row["size"]} | shown(restored(Checks, row)) for row in rows])


def shown(found: Checks) -> dict[str, str]:
    """The columns of the table of found."""
    return {
        "the host never waits": "yes" if found.reads_nothing_back else "**no**",
        f"steps counted in {REPLAYS} replays": str(found.captured_steps),
        "gradients read, share of a copy's bandwidth": f"{found.gradient_bandwidth:.0%}",
        "extra memory, bytes": f"{found.extra_memory:,}",
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
    """Whether torch's own detector finds no synchronisation in steps of any kind."""
    try:
        checks.host_never_waits(with_gradients(size, device))
    except AssertionError as error:
        print(f"{size.name}: {error}")
        return False
    return True


def captured_steps(size: Size, device: torch.device) -> int:
    """The steps that the statistics have counted when a captured step was replayed REPLAYS times."""
    model = with_gradients(size, device)
    optimizer = ZClipOptimizer(AdamW(model.parameters(), fused=True, capturable=True))
    replay = checks.captured(optimizer.step)
    before = optimizer.metrics.step
    for _ in range(REPLAYS):
        replay()
    return optimizer.metrics.step - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy on the device, read and written ones."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / fastest(lambda: target.copy_(source), device)


def fastest(work: Step, device: torch.device) -> float:
    """Seconds, the least of a few."""
    return min(timed(work, device) for _ in range(REPEATS)) * 1e-6


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
