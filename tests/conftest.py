"""One thread, repeatable Hypothesis in CI, and a line on how many inner optimizers the run covered."""

import os

import hypothesis
import torch

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None)
torch.set_num_threads(
    1
)  # the tensors are tiny; a busy machine makes threads that wait for each other seven times slower
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    configurations = {
        r.nodeid.partition("[")[2] for r in reports if "test_not_clipping_is_the_bare_optimizer" in r.nodeid
    }
    if configurations:
        terminalreporter.write_line(f"inner optimizer configurations covered: {len(configurations)}")
