"""Trains one language model with ZClip in one process, or in several that torchrun starts.

    torchrun --nproc-per-node 2 -m benchmarks train --strategy fsdp2

Every step's batch is divided among the processes, the first of which prints one line per step. The folder --out gets a
torch.distributed.checkpoint every --save-every steps and at the end; --resume goes on from one of them, with any
strategy and number of processes.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import UserError
from benchmarks.data import Batches, load_corpus
from benchmarks.model import PRESETS, LanguageModel, next_token_loss
from benchmarks.options import add_training_options, positive_int, prepare_folder
from benchmarks.train import TrainConfig
from zclip_optim import ZClipOptimizer


def shard(model: LanguageModel) -> nn.Module:
    """FSDP2, one unit per block."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


STRATEGIES: dict[str, Callable[[Any], nn.Module]] = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": shard,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a training."""
    add_training_options(parser, steps=500)
    parser.add_argument("--preset", choices=PRESETS, default="nano", help="shape of the model")
    parser.add_argument("--batch", type=positive_int, default=16, help="windows per step, of all processes together")
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="how the model is spread")
    parser.add_argument("--save-every", type=positive_int, default=100, metavar="STEPS", help="between checkpoints")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="checkpoint to go on from")


def run(args: argparse.Namespace) -> None:
    """Checks what was given, and trains."""
    config = TrainConfig(steps=args.steps, lr=args.lr, seed=args.seed, preset=args.preset, batch=args.batch)
    corpus = load_corpus(args.data, config.model.context)
    prepare_folder(args.out)
    if args.resume is not None and not (args.resume / ".metadata").is_file():
        raise UserError(f"--resume {args.resume}: no checkpoint there")
    batches = Batches(corpus, config.batch, config.model.context, config.seed, config.schedule)
    with processes(args.strategy, args.batch) as device:
        say(f"text: {corpus.source}")
        train(args, config, batches, device)


def train(args: argparse.Namespace, config: TrainConfig, batches: Batches, device: torch.device) -> None:
    """Trains; on return the model is gone, because DDP's must not outlive its process group."""
    training = Training(config, batches, STRATEGIES[args.strategy], device)
    if args.resume is not None:
        training.load(args.resume)
    training.run(args.out, args.save_every)


@contextmanager
def processes(strategy: str, batch: int) -> Iterator[torch.device]:
    """The process group of torchrun's processes while it lasts, and this one's device."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "none" and count > 1:
        raise UserError(f"--strategy none is for one process, torchrun has started {count}")
    if strategy != "none" and "WORLD_SIZE" not in os.environ:
        raise UserError(f"--strategy {strategy} needs torchrun --nproc-per-node N -m benchmarks train ...")
    if batch % count:
        raise UserError(f"--batch {batch}: cannot be divided among {count} processes")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    if strategy != "none":
        dist.init_process_group("gloo" if device is None else "cpu:gloo,cuda:nccl")
    try:
        yield device or torch.device("cpu")
    finally:
        if strategy != "none":
            dist.destroy_process_group()


def rank_and_count() -> tuple[int, int]:
    """This process among how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(line: str) -> None:
    """Prints a line, in the first process only."""
    if rank_and_count()[0] == 0:
        print(line, flush=True)


class Training:
    """A model spread by a strategy, its wrapped optimizer and schedule, and their checkpoints."""

    def __init__(
        self, config: TrainConfig, batches: Batches, spread: Callable[[Any], nn.Module], device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.batches, self.device = config, batches, device
        self.model = spread(LanguageModel(config.model).to(device))
        self.optimizer = ZClipOptimizer(config.optimizer(self.model))
        self.scheduler = LambdaLR(self.optimizer, config.lr_factor)
        self.taken = 0  # steps

    def run(self, out: Path, save_every: int) -> None:
        """Takes the steps that are left."""
        while self.taken < self.config.steps:
            loss = self.step()
            m = self.optimizer.metrics
            mark = "  skipped" if m.skipped else "  clipped" if m.clipped else ""
            say(f"step {self.taken:5}  loss {loss:.4f}  norm {m.grad_norm:.5f}  threshold {m.threshold:.5f}{mark}")
            if self.taken % save_every == 0 or self.taken == self.config.steps:
                self.save(out / f"step-{self.taken}")

    def step(self) -> float:
        """One step; returns the loss of the whole batch, in nats per byte."""
        rank, count = rank_and_count()
        window = self.batches.train(self.taken).chunk(count)[rank].to(self.device)
        loss = next_token_loss(self.model, window)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.taken += 1
        mean = loss.detach() / count
        if count > 1:
            dist.all_reduce(mean)
        return mean.item()

    def save(self, folder: Path) -> None:
        """Writes a checkpoint that any strategy and number of processes can read."""
        with quiet():
            dcp.save(self.state(), checkpoint_id=folder)
        say(f"saved to {folder}")

    def load(self, folder: Path) -> None:
        """Takes over the state of a checkpoint."""
        with quiet():
            state = self.state()
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.taken = state["taken"]

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        scheduler = self.scheduler.state_dict()
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "taken": self.taken}


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks on checkpoints of one process and on its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
        yield
