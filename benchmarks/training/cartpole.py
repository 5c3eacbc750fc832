"""REINFORCE on gymnasium's CartPole, one update per episode: gradient norms as heavy-tailed as they come.

    loss = -sum_t log pi(a_t | s_t) * R_t,   R_t = the discounted return from t on, standardized within the episode

(Williams, 1992). The policy is a network with one hidden layer; the optimizer is Adam.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.training.methods import Method
from benchmarks.training.run import StepRecord

HIDDEN = 128
DISCOUNT = 0.99
SOLVED = 195.0  # mean return of the last EPISODES episodes
EPISODES = 100


@dataclass(frozen=True)
class EpisodeRecord(StepRecord):
    """One line per episode: its loss, the clipping of its update, and the sum of its rewards."""

    episode_return: float


class CartPoleRun:
    """A policy, its optimizer and a clipping method, started from a seed."""

    def __init__(self, method: Method, lr: float, seed: int) -> None:
        import gymnasium

        torch.manual_seed(seed)
        self.method, self.lr, self.seed = method, lr, seed
        self.actions, self.solved = 0, False
        self.environment = gymnasium.make("CartPole-v1")
        self.policy = nn.Sequential(nn.Linear(4, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
        self.stepper = method.start(self.policy, torch.optim.Adam(self.policy.parameters(), lr=lr))

    def episodes(self, most: int) -> Iterator[EpisodeRecord]:
        """Trains until it is solved, for `most` episodes at most."""
        returns: deque[float] = deque(maxlen=EPISODES)
        for episode in range(most):
            record = self._episode(episode)
            yield record
            returns.append(record.episode_return)
            self.solved = len(returns) == EPISODES and statistics.fmean(returns) >= SOLVED
            if self.solved:
                return

    def _episode(self, episode: int) -> EpisodeRecord:
        start = time.perf_counter()
        log_probabilities, rewards = self._play(self.seed * 1_000_003 + episode)
        loss = -(torch.stack(log_probabilities) * standardized_returns(rewards)).sum()
        self.actions += len(rewards)
        self.stepper.optimizer.zero_grad()
        loss.backward()
        clipping = self.stepper.step()
        return EpisodeRecord(
            method=self.method.name,
            step=episode + 1,
            tokens=self.actions,
            loss=loss.item(),
            lr=self.lr,
            corrupted=None,
            **vars(clipping),
            ms=1e3 * (time.perf_counter() - start),
            episode_return=sum(rewards),
        )

    def _play(self, seed: int) -> tuple[list[Tensor], list[float]]:
        """One episode: the log probability of each action, and its reward."""
        state, _ = self.environment.reset(seed=seed)
        log_probabilities, rewards, ended = [], [], False
        while not ended:
            policy = Categorical(logits=self.policy(torch.as_tensor(state)))
            action = policy.sample()
            log_probabilities.append(policy.log_prob(action))
            state, reward, terminated, truncated, _ = self.environment.step(action.item())
            rewards.append(float(reward))
            ended = terminated or truncated
        return log_probabilities, rewards


def standardized_returns(rewards: list[float]) -> Tensor:
    """Discounted returns from each step on, with mean 0 and standard deviation 1 within the episode."""
    total, returns = 0.0, []
    for reward in reversed(rewards):
        total = reward + DISCOUNT * total
        returns.append(total)
    values = torch.tensor(returns[::-1])
    return (values - values.mean()) / (values.std() + 1e-8)
