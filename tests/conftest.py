"""One thread, groups of processes, repeatable Hypothesis in CI, a line on how many inner optimizers the run covered."""

import os

import hypothesis
import pytest
import torch
from versions import TORCHS_OWN_WARNINGS
from world import World

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None)
# The tensors are tiny; a busy machine makes threads that wait for each other seven times slower. Children inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config):
    for message in TORCHS_OWN_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def processes(size):
    world = World(size)
    yield world
    world.close()


@pytest.fixture(scope="session")
def two():
    yield from processes(2)


@pytest.fixture(scope="session")
def four():
    yield from processes(4)


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    configurations = {
        r.nodeid.partition("[")[2] for r in reports if "test_not_clipping_is_the_bare_optimizer" in r.nodeid
    }
    if configurations:
        terminalreporter.write_line(f"inner optimizer configurations covered: {len(configurations)}")
