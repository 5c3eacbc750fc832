"""megatron-core without a GPU: what it asks of "cuda" is given on the CPU, while `on_cpu()` lasts and no longer.

A stand-in for hardware, not for Megatron: no function of Megatron is replaced.
"""

import contextlib
import multiprocessing
import queue
from unittest import mock

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.overrides import TorchFunctionMode


class CudaIsCpu(TorchFunctionMode):
    """Tensors for "cuda" are made on the CPU, and say that they are on "cuda" where their type is asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and len(args) == 1 else result


@contextlib.contextmanager
def on_cpu():
    cuda = {"current_device": lambda: torch.device("cpu"), "synchronize": lambda: None}
    with mock.patch.multiple(torch.cuda, **cuda), CudaIsCpu():
        yield


@contextlib.contextmanager
def saving():
    """Let Megatron fork the processes that write a checkpoint, which daemons as our ranks are may not do.

    The queue of their results is this process's: Megatron's own is served by another process, which outlives the rank.
    """
    daemon = mock.patch.dict(multiprocessing.current_process()._config, daemon=False)
    with daemon, mock.patch.object(filesystem_async, "_results_queue", queue.Queue()):
        yield
