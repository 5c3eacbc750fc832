"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8, in an order that the seed fixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from benchmarks.training.data import entropy, step_generator

HELD_OUT_SHARE = 5  # every 5th image is validation
MAX_GREY = 16.0

Example = tuple[Tensor, Tensor]


@cache
def load_digits() -> tuple[Example, Example]:
    """Images in [0, 1] and labels: those to train on, those held out."""
    from sklearn import datasets

    raw = datasets.load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32) / MAX_GREY
    labels = torch.as_tensor(raw.target)
    held_out = torch.arange(len(labels)) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def noise(images: Tensor, labels: Tensor, generator: Generator) -> Example:
    """Uniform noise instead of the images."""
    return torch.rand(images.shape, generator=generator), labels


def unscaled(images: Tensor, labels: Tensor, generator: Generator) -> Example:
    """Grey values as bytes, 0 to 255: a shard that missed the preprocessing."""
    return 255 * images, labels


def mislabelled(images: Tensor, labels: Tensor, generator: Generator) -> Example:
    """Every label off by one: two columns of the label file have slipped."""
    return images, (labels + 1) % 10


def tripled(images: Tensor, labels: Tensor, generator: Generator) -> Example:
    """Three times the grey values; no corruption where they stay so for good, but another normalisation."""
    return 3 * images, labels


CORRUPTIONS: dict[str, Callable[[Tensor, Tensor, Generator], Example]] = {
    "noise": noise,
    "unscaled": unscaled,
    "mislabelled": mislabelled,
}

TRIPLED = "tripled"
CHANGES = CORRUPTIONS | {TRIPLED: tripled}


@dataclass(frozen=True)
class DigitBatches:
    """Images (batch, 8, 8) and labels (batch,); if the run ends with tripled images, those held out are, too."""

    batch: int
    seed: int
    schedule: dict[int, str]
    source: str = "the handwritten digits of scikit-learn: 1,797 images"

    @property
    def chance(self) -> float:
        """The entropy of the labels."""
        return entropy(load_digits()[0][1])

    def train(self, step: int) -> Example:
        """The training batch of `step`, corrupted if the schedule says so."""
        generator = step_generator(self.seed, step)
        images, labels = load_digits()[0]
        chosen = torch.randint(len(labels), (self.batch,), generator=generator)
        kind = self.schedule.get(step)
        example = images[chosen], labels[chosen]
        return CHANGES[kind](*example, generator) if kind else example

    def held_out(self, count: int) -> Iterator[Example]:
        """The held-out images, whole in one batch, whatever the count."""
        images, labels = load_digits()[1]
        return iter([(3 * images if TRIPLED in self.schedule.values() else images, labels)])
