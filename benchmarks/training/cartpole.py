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
from random import Random

import torch
from torch import Tensor, nn

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
        self.environment = gymnasium.make("CartPole-v1", disable_env_checker=True)
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
        states, actions, rewards = self._play(self.seed * 1_000_003 + episode)
        log_probabilities = self.policy(states).log_softmax(1).gather(1, actions).squeeze(1)
        loss = -(log_probabilities * standardized_returns(rewards)).sum()
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

    @torch.no_grad()
    def _play(self, seed: int) -> tuple[Tensor, Tensor, list[float]]:
        """One episode: states (n, 4), actions (n, 1) and their rewards."""
        state, _ = self.environment.reset(seed=seed)
        random, states, actions, rewards, ended = Random(seed), [], [], [], False
        while not ended:
            states.append(torch.as_tensor(state))
            left, right = self.policy(states[-1]).softmax(0).tolist()
            actions.append(int(random.random() * (left + right) < right))
            state, reward, terminated, truncated, _ = self.environment.step(actions[-1])
            rewards.append(float(reward))
            ended = terminated or truncated
        return torch.stack(states), torch.tensor(actions).unsqueeze(1), rewards


def standardized_returns(rewards: list[float]) -> Tensor:
    """Discounted returns from each step on, with mean 0 and standard deviation 1 within the episode."""
    total, returns = 0.0, []
    for reward in reversed(rewards):
        total = reward + DISCOUNT * total
        returns.append(total)
    values = torch.tensor(returns[::-1])
    return (values - values.mean()) / (values.std() + 1e-8)
