"""Runs cells, several at a time, and one of them again."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import UserError
from benchmarks.options import add_data_option, add_out_option, positive_int, prepare_folder
from benchmarks.paper.cells import Cell, load_outcome, run_cell
from benchmarks.report.progress import progress_interval
from benchmarks.report.summary import strict_json, write_json
from benchmarks.training.methods import METHODS

THREADS = 1  # per process; a model of this size gains little from a second one


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """How cells are run, from what, and where to."""
    parser.add_argument("--workers", type=positive_int, default=default_workers(), help="processes that run cells")
    parser.add_argument("--cell", metavar="NAME", help="run this one cell only, again, and print its figures")
    add_data_option(parser)
    add_out_option(parser)


def default_workers() -> int:
    """One for each core; one alone where there is a GPU to share."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def prepare(args: argparse.Namespace) -> Path:
    """The folder of the cells, which are of one kind of data and machine."""
    torch.set_num_threads(THREADS)
    folder: Path = args.out / "cells"
    prepare_folder(folder)
    check_same(folder / "about.json", args.data)
    return folder


def check_same(path: Path, data: Sequence[Path]) -> None:
    """That the cells in a folder are of the same data and kind of machine as those about to run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"data": [str(item.resolve()) for item in data], "device": device, "torch": torch.__version__}
    if not path.exists():
        write_json(path, about)
    found = json.loads(path.read_text())
    for name, value in about.items():
        if found[name] != value:
            raise UserError(f"{path.parent} has cells with {name} {found[name]}, not {value}: choose another --out")


def rerun(where: str, cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Runs the cell --cell whether or not it has ended before, in a folder of its own, and prints its figures."""
    found = [cell for cell in cells if cell.name == args.cell]
    if not found:
        raise UserError(f"--cell {args.cell}: {where} has no such cell; the first one is {cells[0].name}")
    folder = args.out / "rerun"
    prepare_folder(folder)
    print(strict_json(run_cell(found[0], folder, args.data)))


def run_cells(name: str, cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Runs the cells without an outcome, in processes of their own, under one progress bar."""
    folder: Path = args.out / "cells"
    left = [cell for cell in cells if load_outcome(cell, folder) is None]
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(
            total=len(cells), initial=len(cells) - len(left), desc=name, unit="cell", mininterval=progress_interval()
        ) as progress,
        ProcessPoolExecutor(args.workers, context, prepare_worker) as pool,
    ):
        try:
            futures = [pool.submit(run_cell, cell, folder, args.data) for cell in left]
            for future in as_completed(futures):
                cell = future.result()["cell"]
                progress.set_postfix_str(f"{METHODS[cell['method']].label}, lr {cell['lr']:g}", refresh=False)
                progress.update()
        except BrokenProcessPool as error:
            raise UserError("a process that ran a cell was killed; the same command goes on from there") from error
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # an unfinished cell leaves nothing that counts
            raise


def prepare_worker() -> None:
    """One thread; an interrupt is the parent's business."""
    torch.set_num_threads(THREADS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_finished(cell: Cell, folder: Path) -> dict[str, Any]:
    """The outcome of a cell that has ended."""
    outcome = load_outcome(cell, folder)
    if outcome is None:
        raise AssertionError(f"{cell.name} has not ended")
    return outcome
