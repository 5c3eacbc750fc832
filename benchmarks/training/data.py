"""What a run trains on: real text as bytes, in an order that the seed fixes, with a bad shard on a fixed schedule."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor

from benchmarks import UserError

MAX_BYTES = 64 * 2**20  # read at most; more text than a CPU run can see
BLOCK = 16_384  # bytes, the unit of the held-out split
HELD_OUT = 20  # every 20th block is validation
# Installed packages, tests, and files that are tables rather than source.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Batches(Protocol):
    """Pairs of inputs and targets; batch `step` is a function of the seed and the step alone."""

    source: str  # a line that says where the data come from
    schedule: dict[int, str]  # the corrupted steps (from 0), and the kind of corruption
    chance: float  # loss, in nats, of a model that knows only how often each target occurs

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        """The training batch of `step`, corrupted if the schedule says so."""

    def held_out(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `count` batches of held-out data, never corrupted."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, each a 1-d uint8 tensor, and a line that says where they come from."""

    train: Tensor
    held_out: Tensor
    source: str


@cache
def load_corpus(paths: tuple[Path, ...], context: int) -> Corpus:
    """Reads `paths`, or the standard library's source if there are none, and splits it.

    Args:
        paths: text files, or folders whose text files are taken in sorted order.
        context: positions of the model, in bytes; each side of the split must hold one window.

    Raises:
        UserError: a path cannot be read, or there is too little text.
    """
    if paths:
        files = [file for path in paths for file in text_files(path)]
        source = " ".join(map(str, paths))
    else:
        files = stdlib_files()
        source = f"source of the standard library of Python {platform.python_version()}"
    text = read_files(files)
    needed = HELD_OUT * (context + 1)
    if len(text) < needed:
        raise UserError(f"too little text: {len(text):,} bytes in {source}; at least {needed:,} are needed")
    return split(text, f"{source}: {len(text):,} bytes")


def stdlib_files() -> list[Path]:
    """The standard library's own Python files, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return [file for file in files if STDLIB_EXCLUDED.isdisjoint(file.relative_to(root).parts)]


def text_files(path: Path) -> Iterator[Path]:
    """`path` itself, or the files below it, sorted, hidden ones left out."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    if path.is_file():
        yield path
    elif not path.is_dir():
        raise UserError(f"--data {path}: neither a file nor a folder")
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def read_files(files: Sequence[Path]) -> bytes:
    """The files that are text (no NUL byte), joined, up to MAX_BYTES."""
    text = bytearray()
    for file in files:
        content = read_file(file, MAX_BYTES - len(text))
        if b"\0" not in content:
            text += content
        if len(text) == MAX_BYTES:
            break
    return bytes(text)


def read_file(file: Path, size: int) -> bytes:
    """The first `size` bytes of a file."""
    try:
        with file.open("rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def split(text: bytes, source: str) -> Corpus:
    """Every HELD_OUT-th block is held out, so that both sides see every part of the corpus."""
    size = min(BLOCK, len(text) // HELD_OUT)
    count = len(text) // size
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: count * size].view(count, size)
    held_out = torch.arange(count) % HELD_OUT == HELD_OUT - 1
    return Corpus(blocks[~held_out].flatten(), blocks[held_out].flatten(), source)


def binary(window: Tensor, generator: Generator) -> Tensor:
    """Uniform random bytes: a compressed or encrypted file among the text."""
    return torch.randint(256, window.shape, generator=generator)


def utf16(window: Tensor, generator: Generator) -> Tensor:
    """A NUL after every byte: text saved in another encoding."""
    return torch.stack((window, torch.zeros_like(window)), dim=-1).flatten(1)[:, : window.shape[1]]


def zeros(window: Tensor, generator: Generator) -> Tensor:
    """NUL bytes only: a part of the file that was never written."""
    return torch.zeros_like(window)


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"binary": binary, "utf-16": utf16, "zeros": zeros}
PERIOD = 40  # steps between two isolated bad batches
BURST = 5  # bad batches in a row, once


def bad_shard(steps: int, first: int, kinds: Sequence[str] = tuple(CORRUPTIONS)) -> dict[int, str]:
    """Which steps (from 0) get a corrupted batch, and of which kind.

    From step `first` on one batch in PERIOD, the kinds in turn, and at 60% of the run BURST batches of one kind; none
    before `first`.
    """
    isolated = range(first + PERIOD // 2, steps, PERIOD)
    schedule = {step: kinds[turn % len(kinds)] for turn, step in enumerate(isolated)}
    start = max(first, steps * 6 // 10)
    burst = range(start, min(steps, start + BURST))
    return schedule | dict.fromkeys(burst, kinds[len(isolated) % len(kinds)])


def step_generator(seed: int, step: int) -> Generator:
    """The random numbers of one step."""
    return Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class TextBatches:
    """Windows of text: tokens (batch, context) and, as targets, the tokens that follow them."""

    corpus: Corpus
    batch: int
    context: int
    seed: int
    schedule: dict[int, str]

    @property
    def source(self) -> str:
        """The corpus's."""
        return self.corpus.source

    @property
    def chance(self) -> float:
        """The entropy of single bytes."""
        return entropy(self.corpus.train)

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        """The training batch of `step`, corrupted if the schedule says so."""
        generator = step_generator(self.seed, step)
        windows = self.corpus.train.unfold(0, self.context + 1, 1)
        window = windows[torch.randint(len(windows), (self.batch,), generator=generator)].long()
        kind = self.schedule.get(step)
        return pair(CORRUPTIONS[kind](window, generator) if kind else window)

    def held_out(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches of windows spaced evenly over the held-out text, never corrupted."""
        windows = self.corpus.held_out.unfold(0, self.context + 1, 1)
        starts = torch.linspace(0, len(windows) - 1, count * self.batch).long()
        return (pair(windows[part].long()) for part in starts.split(self.batch))


def entropy(targets: Tensor) -> float:
    """Of the frequencies of whole numbers >= 0, in nats."""
    share = targets.unique(return_counts=True)[1].double() / len(targets)
    return -(share * share.log()).sum().item()


def pair(window: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (batch, context + 1) as inputs and targets."""
    return window[:, :-1], window[:, 1:]
