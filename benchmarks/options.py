"""What the commands' options share: argparse types with messages that say what is wanted, and the output folder."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import UserError

MAX_SEED = 2**32 - 1


def bounded(convert: Callable[[str], float], accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: `convert`, then `accept`, and a message that says what is wanted."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


positive_int = bounded(int, lambda value: value >= 1, "a whole number >= 1")
positive_float = bounded(float, lambda value: 0 < value < math.inf, "a finite number > 0")
seed = bounded(int, lambda value: 0 <= value <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")


def add_training_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """What every command that trains takes; `steps` is its default length of a run."""
    parser.add_argument("--steps", type=positive_int, default=steps, help="training steps of each run")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=seed, default=0, help="fixes the weights and the order of the data")
    add_out_option(parser)
    add_data_option(parser)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """The text to train on."""
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files or folders of them, instead of the standard library",
    )


def add_out_option(parser: argparse.ArgumentParser) -> None:
    """The folder that every command writes to."""
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for the results")


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and finds out now whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from error
