"""Small problems whose every step takes a millisecond or less: what a run of `loop.train` fixes besides rate and seed.

The regression and the sums are trained at a constant rate with Adam, and their loss spikes by itself; the digits are
trained by SGD with momentum, which takes the scale of the gradients as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from benchmarks.training import digits
from benchmarks.training.data import Batches, step_generator
from benchmarks.training.digits import DigitBatches
from benchmarks.training.spikes import SpikeRule

POINTS = 50
P = 59  # numbers are added modulo this
Q = 97  # and divided modulo this
TRAIN_SHARE = 0.7  # of the pairs
HIDDEN, HEADS, FFN = 64, 4, 256

Example = tuple[Tensor, Tensor]


class TanhNet(nn.Module):
    """1-32-1, with a first layer wide enough for several periods; x (n, 1) to y (n, 1)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(2 * torch.randn(1, width)), nn.Parameter(torch.randn(width))
        self.w2, self.b2 = nn.Parameter(torch.randn(width, 1) / math.sqrt(width)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """tanh(x w1 + b1) w2 + b2."""
        return torch.addmm(self.b2, torch.addmm(self.b1, x, self.w1).tanh(), self.w2)


class SumNet(nn.Module):
    """Embeddings of two numbers, one hidden layer; pairs (n, 2) to logits of their sum (n, P)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.3 * torch.randn(P, HIDDEN))
        self.up, self.head = nn.Linear(2 * HIDDEN, FFN), nn.Linear(FFN, P)

    def forward(self, pairs: Tensor) -> Tensor:
        """The first layer is applied to each number once, not once for each example that has it."""
        first, second = self.up.weight.split(HIDDEN, dim=1)
        left = functional.embedding(pairs[:, 0], functional.linear(self.embedding, first, self.up.bias))
        right = functional.embedding(pairs[:, 1], functional.linear(self.embedding, second))
        return self.head(functional.relu(left + right))


class SumTransformer(nn.Module):
    """One pre-norm block over the tokens a, b, =; pairs (n, 2) to logits of their sum (n, P)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(P + 1, HIDDEN))  # the last one is "="
        self.position = nn.Parameter(0.02 * torch.randn(3, HIDDEN))
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, FFN, bias=False), nn.Linear(FFN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, P, bias=False)
        self.attention_norm, self.ffn_norm, self.norm = (nn.RMSNorm(HIDDEN) for _ in range(3))

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits at "="."""
        numbers, (first, second, last) = self.embedding[:P], self.position
        x = torch.cat((numbers + first, numbers + second, self.embedding[P:] + last))
        y = x[-1] + self.out(self._mixed(self.attention_norm(x), pairs))
        y = y + self.down(functional.relu(self.up(self.ffn_norm(y))))
        return self.head(self.norm(y))

    def _mixed(self, x: Tensor, pairs: Tensor) -> Tensor:
        """What "=" attends to; a token has one key and one value at a place, whatever the example: rows of `x`."""
        query, key, value = self.query(x[-1]), self.key(x), self.value(x)
        scores = (key * query).unflatten(-1, (HEADS, -1)).sum(-1) / math.sqrt(HIDDEN // HEADS)
        rows = functional.pad(pairs + torch.tensor([0, P]), (0, 1), value=2 * P)
        share = functional.embedding(rows, scores).softmax(1)  # (n, 3, heads)
        values = functional.embedding(rows, value).unflatten(-1, (HEADS, -1))
        return (share.unsqueeze(-1) * values).sum(1).flatten(1)


class Attention(nn.Module):
    """Causal attention over the first dimension, which is short; (tokens, n, width) to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Every token attends to itself and those before it."""
        query, key, value = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = (query.unsqueeze(1) * key).sum(-1) / math.sqrt(query.shape[-1])  # (tokens, tokens, n, heads)
        ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        share = scores.masked_fill(ahead[:, :, None, None], -math.inf).softmax(1)
        return self.out((share.unsqueeze(-1) * value).sum(1).flatten(2))


class DivisionTransformer(nn.Module):
    """Two pre-norm decoder blocks over the tokens a, b, =; pairs (n, 2) to logits of their quotient (n, Q)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(Q + 1, HIDDEN))  # the last one is "="
        self.position = nn.Parameter(0.02 * torch.randn(3, 1, HIDDEN))
        self.attention = nn.ModuleList(nn.Sequential(nn.LayerNorm(HIDDEN), Attention(HIDDEN, HEADS)) for _ in range(2))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
            for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, Q, bias=False))

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits at "="."""
        x = functional.embedding(functional.pad(pairs, (0, 1), value=Q).T, self.embedding) + self.position
        x = x + self.attention[0](x)
        x = x + self.ffn[0](x)
        last = (x + self.attention[1](x))[-1]
        return self.head(last + self.ffn[1](last))


def digit_net() -> nn.Module:
    """Images (n, 8, 8) to logits (n, 10), one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class SinePoints:
    """All points of sin(pi x) at every step; held out: the points between them."""

    source, schedule = f"{POINTS} points of sin(pi x)", {}
    chance = 0.5  # variance of the targets

    def __init__(self, batch: int, seed: int, schedule: dict[int, str]) -> None:
        self.points = torch.linspace(-1, 1, POINTS).unsqueeze(1)
        self.example = self.points, torch.sin(math.pi * self.points)

    def train(self, step: int) -> Example:
        """All points."""
        return self.example

    def held_out(self, count: int) -> Iterator[Example]:
        """The middle of each two, in one batch."""
        between = (self.points[1:] + self.points[:-1]) / 2
        return iter([(between, torch.sin(math.pi * between))])


class Sums:
    """Pairs of numbers below P and their sums modulo P; which pairs are held out is fixed by the seed."""

    source, schedule = f"sums modulo {P}", {}
    chance = math.log(P)

    def __init__(self, batch: int, seed: int, schedule: dict[int, str]) -> None:
        self.batch, self.seed = batch, seed
        pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
        pairs = pairs[torch.randperm(len(pairs), generator=step_generator(seed, -1))]
        count = round(TRAIN_SHARE * len(pairs))
        self.pairs, self.others = pairs[:count], pairs[count:]

    def train(self, step: int) -> Example:
        """Pairs drawn anew at every step."""
        chosen = torch.randint(len(self.pairs), (self.batch,), generator=step_generator(self.seed, step))
        return self.with_targets(self.pairs[chosen])

    def held_out(self, count: int) -> Iterator[Example]:
        """All held-out pairs in one batch."""
        return iter([self.with_targets(self.others)])

    @staticmethod
    def with_targets(pairs: Tensor) -> Example:
        """Pairs and their sums modulo P."""
        return pairs, pairs.sum(1) % P


class Quotients(Sums):
    """Pairs of numbers below Q, the second not 0, and their quotients modulo Q; half of the pairs are held out."""

    source, schedule = f"quotients modulo {Q}", {}
    chance = math.log(Q)

    def __init__(self, batch: int, seed: int, schedule: dict[int, str]) -> None:
        self.batch, self.seed = batch, seed
        pairs = torch.cartesian_prod(torch.arange(Q), torch.arange(1, Q))
        pairs = pairs[torch.randperm(len(pairs), generator=step_generator(seed, -1))]
        self.pairs, self.others = pairs.chunk(2)

    @staticmethod
    def with_targets(pairs: Tensor) -> Example:
        """Pairs and their quotients modulo Q."""
        inverse = torch.tensor([pow(b, Q - 2, Q) for b in range(Q)])
        return pairs, pairs[:, 0] * inverse[pairs[:, 1]] % Q


def adam(beta2: float) -> Callable[..., Optimizer]:
    """Adam without decay, in the kernel that costs a small model least."""
    return partial(Adam, betas=(0.9, beta2), eps=1e-8, fused=True)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of the batch, not of an example: gradients are as many times as large."""
    return functional.cross_entropy(logits, targets, reduction="sum")


OF_FITTED_SUMS = SpikeRule(10, floor=0.01)


@dataclass(frozen=True)
class Problem:
    """A row of PROBLEMS."""

    label: str
    model: Callable[[], nn.Module]
    open: Callable[[int, int, dict[int, str]], Batches]  # examples per step, seed, corrupted steps
    optimizer: Callable[..., Optimizer]  # of parameters, lr=
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    held_out_loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    by_training: bool = True  # judged by the logarithm of the mean training loss of the last fifth, or by held-out data
    corruptions: tuple[str, ...] = ()
    spike: SpikeRule = OF_FITTED_SUMS
    level: float = 0.05  # training losses above it, after `settled` of the steps, are counted
    settled: float = 0.4
    warmup_steps: int = 0  # of the learning rate

    @property
    def scale_free(self) -> bool:
        """Whether the optimizer is indifferent to the scale of the gradients, as those of Adam's kind are."""
        return self.optimizer.func is Adam


def sgd(**settings: float) -> Callable[..., Optimizer]:
    """SGD with momentum."""
    return partial(SGD, momentum=0.9, **settings)


SQUARES = {"loss": functional.mse_loss, "held_out_loss": functional.mse_loss}
HELD_OUT = {"by_training": False, "corruptions": tuple(digits.CORRUPTIONS)}

PROBLEMS = {
    "regression": Problem(
        "regression, full batch", TanhNet, SinePoints, adam(0.999), **SQUARES, spike=SpikeRule(2), level=1e-3
    ),
    "sums-0.95": Problem("modular addition, beta2 0.95", SumNet, Sums, adam(0.95)),
    "sums-0.98": Problem("modular addition, beta2 0.98", SumNet, Sums, adam(0.98)),
    "sums-transformer": Problem("modular addition, transformer", SumTransformer, Sums, adam(0.98)),
    "division": Problem("modular division, transformer", DivisionTransformer, Quotients, adam(0.98), warmup_steps=10),
    "digits-sgd": Problem("digits, SGD", digit_net, DigitBatches, sgd(), **HELD_OUT),
    "digits-sgd-sum": Problem(
        "digits, SGD, summed loss", digit_net, DigitBatches, sgd(), summed_cross_entropy, **HELD_OUT
    ),
}
