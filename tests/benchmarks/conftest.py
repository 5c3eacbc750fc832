"""Benchmark commands in short, for every run, and as a user runs them, for a thorough one."""

from concurrent.futures import Executor, Future
from functools import partial

import pytest


class Here(Executor):
    """Runs in this process what is submitted, and at once."""

    def __init__(self, *_):
        """Neither other processes nor what prepares them."""

    def submit(self, function, /, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(params=["in short", pytest.param("in full", marks=pytest.mark.thorough)])
def in_short(request, monkeypatch):
    """Whether commands are shortened: small batches, two methods under faults, cells in this process."""
    if request.param == "in full":
        return False
    from benchmarks.training.methods import METHODS  # not where each process of pytest would import torch for it
    from benchmarks.training.run import TrainConfig

    for module in ("compare", "faults", "train", "paper.cells"):
        monkeypatch.setattr(f"benchmarks.{module}.TrainConfig", partial(TrainConfig, batch=4, held_out_batches=4))
    monkeypatch.setattr("benchmarks.faults.PEERS", [METHODS["none"], METHODS["paper"]])
    monkeypatch.setattr("benchmarks.paper.runner.ProcessPoolExecutor", Here)
    return True
