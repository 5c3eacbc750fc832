"""Several processes that train one model: how it is spread, the process group, and sums over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import UserError


def shard(model: nn.Module) -> nn.Module:
    """FSDP2, one unit per block."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    return fully_shard(model)


STRATEGIES: dict[str, Callable[[Any], nn.Module]] = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp2": shard,
}


def default_device() -> torch.device:
    """This process's CUDA device, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


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
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if strategy != "none":
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if strategy != "none":
            dist.destroy_process_group()


def rank_and_count() -> tuple[int, int]:
    """This process among how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of all processes' values; the value itself where there is one process."""
    _, count = rank_and_count()
    if count > 1:
        value = value / count
        dist.all_reduce(value)
    return value


def say(line: str) -> None:
    """Prints a line, in the first process only."""
    if rank_and_count()[0] == 0:
        print(line, flush=True)
