"""Prints how many inner optimizers the run covered."""

import os

import hypothesis

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    configurations = {
        r.nodeid.partition("[")[2] for r in reports if "test_not_clipping_is_the_bare_optimizer" in r.nodeid
    }
    if configurations:
        terminalreporter.write_line(f"inner optimizer configurations covered: {len(configurations)}")
