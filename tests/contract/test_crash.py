"""A training process is killed with SIGKILL twenty times while it checkpoints, and ends as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from crash_training import STEPS, load, make, run, training_process
from training import parameters

KILLS = 20


def start(context, folder):
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=training_process, args=(str(folder), send))
    process.start()
    send.close()
    return process, receive


@pytest.fixture
def one_thread():
    """As in the killed processes: the bits of a sum depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_twenty_kills_leave_no_trace(tmp_path, one_thread, monkeypatch):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "zclip_optim"])  # dynamo: state_dict() imports it
    rng = random.Random(0)
    for _ in range(KILLS):
        process, receive = start(context, tmp_path)
        for _ in range(rng.randint(1, 12)):
            step = receive.recv()
        time.sleep(rng.uniform(0, 0.01))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert step < STEPS
    process, _receive = start(context, tmp_path)
    process.join(timeout=60)
    assert process.exitcode == 0

    whole, survivor = make(), make()
    run(whole, 0)
    monkeypatch.chdir(tmp_path)
    assert load(survivor) == STEPS
    assert torch.equal(parameters(survivor[0]), parameters(whole[0]))
    assert repr(survivor[1].state_dict()) == repr(whole[1].state_dict())
    assert survivor[1].metrics.clipped_steps > 0
