"""What can be trained: for each architecture its model, its data and the ways in which they can be corrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks import UserError
from benchmarks.training import data, digits
from benchmarks.training.data import Batches, TextBatches, load_corpus
from benchmarks.training.digits import DigitBatches
from benchmarks.training.llama import LanguageModel
from benchmarks.training.presets import Preset
from benchmarks.training.transformer import GPT2, VisionTransformer

# Opens the data: paths given by the user, preset, examples per step, seed, schedule of corrupted steps.
Open = Callable[[Sequence[Path], Preset, int, int, dict[int, str]], Batches]


@dataclass(frozen=True)
class Architecture:
    """A row of ARCHITECTURES."""

    label: str
    model: Callable[[Preset], nn.Module]
    open: Open
    corruptions: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Whether it can train on the user's files."""
        return self.open is open_text


def open_text(paths: Sequence[Path], preset: Preset, batch: int, seed: int, schedule: dict[int, str]) -> Batches:
    """The given files, or the standard library's source."""
    context = preset.model.context
    return TextBatches(load_corpus(tuple(paths), context), batch, context, seed, schedule)


def open_digits(paths: Sequence[Path], preset: Preset, batch: int, seed: int, schedule: dict[int, str]) -> Batches:
    """The digits of scikit-learn."""
    if paths:
        raise UserError("--data is for text; the vision transformer trains on the digits of scikit-learn only")
    return DigitBatches(batch, seed, schedule)


TEXT, DIGITS = tuple(data.CORRUPTIONS), tuple(digits.CORRUPTIONS)

ARCHITECTURES = {
    "llama": Architecture("LLaMA-shaped, text", lambda preset: LanguageModel(preset.model), open_text, TEXT),
    "gpt2": Architecture("GPT-2-shaped, text", lambda preset: GPT2(preset.model), open_text, TEXT),
    "vit": Architecture("vision transformer, digits", lambda preset: VisionTransformer(), open_digits, DIGITS),
}
