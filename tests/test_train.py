"""`python -m benchmarks train` as torchrun starts it: one log, checkpoints that any strategy goes on from."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(*args, ranks=0, ok=True):
    """What it printed; standalone chooses a free port. Nothing is left of it after 50 seconds."""
    command = [sys.executable, *(TORCHRUN if ranks else []), "-m", "benchmarks", "train", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=50)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler has each rank say where it was
        pytest.fail(process.communicate()[0])
    assert (process.returncode == 0) == ok, output
    return output


def steps(output):
    """Step -> loss and norm, as printed; each is printed once."""
    found = re.findall(r"^step +(\d+)  loss ([\d.]+)  norm ([\d.]+)", output, re.MULTILINE)
    assert len(found) == len({step for step, _, _ in found})
    return {int(step): (float(loss), float(norm)) for step, loss, norm in found}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for step, values in some.items():
        assert values == pytest.approx(others[step], rel=1e-3)


def test_every_strategy_goes_on_from_a_sharded_checkpoint(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 2000)
    size = ("--steps", 6, "--batch", 4, "--save-every", 4, "--data", text)
    whole = steps(train("--strategy", "fsdp2", "--out", tmp_path / "whole", *size, ranks=2))
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    for strategy, ranks in (("fsdp2", 2), ("ddp", 2), ("none", 0)):
        options = ("--strategy", strategy, "--out", tmp_path / strategy, "--resume", tmp_path / "whole" / "step-4")
        output = train(*options, *size, ranks=ranks)
        assert_same(steps(output), {step: whole[step] for step in (5, 6)})
        assert output.count("saved to") == 1


def test_wrong_use_is_one_line(tmp_path):
    assert "--strategy ddp needs torchrun" in train("--strategy", "ddp", "--out", tmp_path, ok=False)
    output = train("--resume", tmp_path, "--out", tmp_path, ok=False)
    assert output == f"benchmarks: error: --resume {tmp_path}: no checkpoint there\n"
