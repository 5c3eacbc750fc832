"""Gloo processes that live for a test session and run functions side by side; they never outlive it or hang it."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from versions import TORCHS_OWN_WARNINGS

PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "zclip_optim"]
START = 60.0  # seconds that they have to come up, which no call pays for
GRACE = 3.0  # seconds that the other ranks have to end after one has failed


class World:
    """`size` ranks. `run` calls a function on each of them; `timeout` in seconds is for one such call."""

    def __init__(self, size, timeout=50.0):
        self.size, self.timeout = size, timeout
        self.ranks = []

    def run(self, function, *args):
        """What `function(rank, *args)` returned, by rank; an AssertionError with every rank's output if one failed."""
        if not self.ranks:
            self._start()
            self._answers("start", START)
        for _, connection in self.ranks:
            connection.send((function, args))
        return self._answers(f"{function.__name__}{args}", self.timeout)

    def _answers(self, name, timeout):
        answers = self._collect(timeout)
        failed = [rank for rank in range(self.size) if rank not in answers or answers[rank][0] != "returned"]
        if failed:
            self._dump(rank for rank in range(self.size) if rank not in answers)
            text = self._output()
            self.close()
            raise AssertionError(f"{name} failed on ranks {failed}\n{text}")
        return [answers[rank][1] for rank in range(self.size)]

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            connection, theirs = context.Pipe()
            args = (rank, self.size, self.folder.name, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.ranks.append((process, connection))

    def _collect(self, timeout):
        """Answers by rank, until all are there, one has been missing for too long or its process has ended."""
        answers = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {c: rank for rank, (_, c) in enumerate(self.ranks) if rank not in answers}
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answer = "died", None
                answers[waiting[connection]] = answer
                if answer[0] != "returned":
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _dump(self, ranks):
        """Has these ranks write their stacks to their output."""
        for rank in ranks:
            os.kill(self.ranks[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.5)

    def _output(self):
        logs = [Path(self.folder.name, f"rank{rank}").read_text()[-6000:] for rank in range(self.size)]
        return "\n".join(f"---- rank {rank} ----\n{log}" for rank, log in enumerate(logs))

    def close(self):
        """Ends the processes; the next run starts new ones."""
        for process, connection in self.ranks:
            connection.close()
            process.kill()
            process.join()
        if self.ranks:
            self.folder.cleanup()
        self.ranks = []


def _serve(rank, size, folder, connection):
    log = os.open(os.path.join(folder, f"rank{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    connection.send_bytes(pickle.dumps(("returned", None)))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # the test session has ended
            os._exit(0)
        connection.send_bytes(pickle.dumps(_call(function, rank, args)))  # tensors copied, not shared


def _call(function, rank, args):
    torch.manual_seed(rank)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in TORCHS_OWN_WARNINGS:
                warnings.filterwarnings("ignore", message)
            return "returned", function(rank, *args)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return "raised", None
