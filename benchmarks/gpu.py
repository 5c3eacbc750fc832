"""Measures on a CUDA device what `overhead` measures on the CPU, and what only a device has.

Own costs beside fused AdamW as ratios to other packages and to one read of the gradients; whether a step makes the
host wait (`torch.cuda.set_sync_debug_mode("error")`) and can be captured in a CUDA graph; the bandwidth at which the
gradients are read, against a copy's; peak memory. With --all it first checks what must hold on a device, and then
trains the preset "small" with several methods and seeds, all of it within --minutes; what there is no time or memory
for, or fails, is named in the page and costs nothing else. Writes gpu.json and gpu.md, anew when something has ended.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import UserError
from benchmarks.cuda import checks, sizes, trainings
from benchmarks.cuda.attempts import LeftOut, attempt, one_line
from benchmarks.options import add_out_option, positive_float, positive_int, prepare_folder
from benchmarks.overhead import NOTES, Row, microseconds, ratios
from benchmarks.report.pages import Result, bullets, document, restored, setup, write_result
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import Summary, format_table, heading, markdown

MINUTES, SECONDS = 10.0, 10.0
SIZES_SHARE = 0.2  # of --minutes: timing of all sizes together
SIZES_END = 0.5  # of --minutes: no size is begun later
ROOT = Path(__file__).parents[1]

Part = Iterator[tuple[str, dict[str, Any]]]  # list in the result, and what is added to it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--all", action="store_true", help="check and train too")
    parser.add_argument("--minutes", type=positive_float, help=f"for everything, with --all ({MINUTES:g})")
    parser.add_argument("--seconds", type=positive_float, help=f"for each size, without --all ({SECONDS:g})")
    parser.add_argument("--max-parameters", type=positive_int, default=2 * 10**9, help="leave out larger models")
    add_out_option(parser)


def run(args: argparse.Namespace) -> None:
    """Checks what was given, measures, and writes the results as they come."""
    if args.all and args.seconds is not None:
        raise UserError(f"--seconds {args.seconds:g}: with --all the time is --minutes, of which each size has a share")
    if args.minutes is not None and not args.all:
        raise UserError(f"--minutes {args.minutes:g}: only with --all; without it each size has --seconds")
    if not torch.cuda.is_available():
        raise UserError("gpu: torch finds no CUDA device here; `python -m benchmarks overhead` measures on the CPU")
    prepare_folder(args.out)
    run_on(torch.device("cuda"), args)


def run_on(device: torch.device, args: argparse.Namespace) -> None:
    """The same, on a device that is there."""
    begin, left_out = time.monotonic(), list[LeftOut]()
    result = about(args) | (described(left_out) if args.all else {})

    def write() -> None:
        now = {"left_out": list(map(asdict, left_out)), "seconds": time.monotonic() - begin}
        write_result(args.out / "gpu.json", result | now, page)

    try:
        for name, row in everything(begin, device, args, left_out) if args.all else costs_alone(device, args, left_out):
            result[name] = [*result.get(name, ()), row]
            write()
    finally:
        write()
    print((args.out / "gpu.md").read_text(encoding="utf8"))
    print(f"wrote {args.out / 'gpu.json'} and {args.out / 'gpu.md'}")


def described(left_out: list[LeftOut]) -> dict[str, Any]:
    """What is trained."""
    return attempt("the text to train on", lambda: trainings.described(trainings.cells()[0]), left_out) or {}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What runs, with which versions; the device's own are part of them."""
    found = heading("gpu", range(trainings.SEEDS) if args.all else [0], "zclip", "autoclip")
    found["versions"] |= {
        "CUDA": torch.version.cuda,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    }
    return found


def said(*command: str) -> str:
    """The first line that a program prints; "unknown" where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.splitlines()), "unknown")


def everything(begin: float, device: torch.device, args: argparse.Namespace, left_out: list[LeftOut]) -> Part:
    """Checks, costs and trainings."""
    seconds, folder = 60 * (args.minutes or MINUTES), args.out / "cells"
    for name, check in tqdm(checks.CHECKS.items(), unit="check", mininterval=progress_interval()):
        yield "checks", asdict(checks.outcome(name, check, device))
    of_a_size, end_of_sizes = SIZES_SHARE * seconds / len(sizes.SIZES), begin + SIZES_END * seconds
    yield from costs(of_a_size, end_of_sizes, device, args, left_out)
    prepare_folder(folder)
    for row in trainings.trained(trainings.cells(), begin + seconds, folder, left_out):
        yield "trainings", row


def costs_alone(device: torch.device, args: argparse.Namespace, left_out: list[LeftOut]) -> Part:
    """Without a deadline."""
    return costs(args.seconds or SECONDS, math.inf, device, args, left_out)


def costs(
    seconds: float, deadline: float, device: torch.device, args: argparse.Namespace, left_out: list[LeftOut]
) -> Part:
    """A row for each size, timed for so many seconds."""
    fits = [size for size in sizes.SIZES if size.parameters <= args.max_parameters]
    rows = sizes.measured(fits, seconds, deadline, device, left_out)
    for row in tqdm(rows, total=len(fits), unit="size", mininterval=progress_interval()):
        yield "rows", row


def page(result: Result) -> str:
    """What held, what it cost, what was trained, and what is missing."""
    return document(
        "gpu: clipping on a CUDA device",
        result,
        *checks_section(result.get("checks", ())),
        *costs_section(result.get("rows", ())),
        *trainings_section(result),
        *left_out_section(result.get("left_out", ())),
    )


def checks_section(outcomes: Sequence[Result]) -> list[str]:
    """How many held, and each."""
    if not outcomes:
        return []
    counts = Counter(each["result"] for each in outcomes)
    rows = [{"check": each["check"], "": shown(each), "what was found": one_line(each["text"])} for each in outcomes]
    return [f"What must hold on a device: {', '.join(f'{n} {name}' for name, n in counts.items())}.", markdown(rows)]


def shown(outcome: Result) -> str:
    """A failure stands out."""
    return f"**{checks.FAILED}**" if outcome["result"] == checks.FAILED else outcome["result"]


def costs_section(result_rows: Sequence[Result]) -> list[str]:
    """The ratios, the microseconds and the checks of every size."""
    if not result_rows:
        return []
    rows = [restored(Row, row) for row in result_rows]
    checked = [row for row in result_rows if "captured_steps" in row]
    return [
        "What clipping costs beside a step of fused AdamW: our own cost over that of the others, and over one plain "
        "`sum` over every gradient:",
        ratios(rows),
        "Own costs as they are, medians:",
        microseconds(rows),
        *(["What a step does besides:", sizes.table_of_checks(checked)] if checked else []),
        bullets(NOTES),
    ]


def trainings_section(result: Result) -> list[str]:
    """A row for each run."""
    rows = [restored(Summary, row) for row in result.get("trainings", ())]
    return [f"Trainings. {setup(result)}", format_table(rows), bullets(result["notes"])] if rows else []


def left_out_section(left_out: Sequence[Result]) -> list[str]:
    """What is missing, and why."""
    lines = [f"{each['what']}: {one_line(each['why'])}" for each in left_out]
    return ["Left out:", bullets(lines)] if lines else []
