"""The command for a GPU, as far as a CPU goes: its checks on the path of accelerators, its parts, its page."""

import argparse
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zclip_optim.gradients
from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.cuda import checks, sizes, trainings
from benchmarks.cuda.attempts import one_line
from benchmarks.overhead import OURS, PEERS, Row, Size
from benchmarks.paper.cells import run_cell
from benchmarks.training.data import TextBatches
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer, running
from zclip_optim.fused import Kernels

CPU = torch.device("cpu")
TINY = (Size("tiny", [(8, 8)] * 2), Size("tiny, bfloat16", [(8, 8)], torch.bfloat16))
IN_THE_KERNEL = [name for name in checks.CHECKS if name.startswith(("z_skip", "a NaN in the kernel"))]
CLIPPING = [name for name in checks.CHECKS if name.startswith("clipping")]
SIXTEEN_BITS = ["bfloat16 gradients", "float16 gradients"]
CELLS = trainings.cells


class RefuseReads(TorchDispatchMode):
    """What torch.cuda.set_sync_debug_mode does on a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_refused():
    with RefuseReads():
        yield


def taken_before(step):
    """Captures nothing: a replay is a step."""
    for _ in range(checks.BEFORE_CAPTURE):
        step()
    return step


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    """CPU tensors are taken for an accelerator's, and what only torch.cuda has is replaced."""
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: True)
    monkeypatch.setattr(checks, "waiting_is_an_error", reads_refused)
    monkeypatch.setattr(checks, "captured", taken_before)


def outcome(name):
    return checks.outcome(name, checks.CHECKS[name], CPU)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_it_holds(name):
    assert outcome(name) == checks.Outcome(name, checks.PASSED)


def reads_its_state(monkeypatch):
    step = ZClipOptimizer.step
    monkeypatch.setattr(
        ZClipOptimizer, "step", lambda self: step(self) or self.clipper._records.state.values[0, 0].item()
    )


def replays_nothing(monkeypatch):
    monkeypatch.setattr(checks, "captured", lambda step: taken_before(step) and (lambda: None))


def decides_otherwise(monkeypatch):
    advance_in_place = running._advance_in_place

    def advance(*args):
        coefs, skip = advance_in_place(*args)
        return 0.99 * coefs, skip

    monkeypatch.setattr(running, "_advance_on", lambda *_: advance)


def records_otherwise(monkeypatch):
    advance_in_place = running._advance_in_place

    def advance(values, *args):
        found = advance_in_place(values, *args)
        values.mul_(1.001)
        return found

    monkeypatch.setattr(running, "_advance_on", lambda *_: advance)


def cannot_compile(monkeypatch):
    def compile_(*_, **__):
        def compiled(*_):
            raise RuntimeError("no Triton here")

        return compiled

    monkeypatch.setattr(running, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(running, "_advance_on", running._advance_on.__wrapped__)


def kernel_is_not_told(monkeypatch):
    monkeypatch.setattr(Kernels, "scale", lambda *_: False)


def kernel_scales_too_little(monkeypatch):
    scale = Kernels.scale
    monkeypatch.setattr(Kernels, "scale", lambda self, coef: scale(self, coef.sqrt()))


def kernel_is_left_with_it(monkeypatch):
    monkeypatch.setattr(Kernels, "take_back", lambda self: None)


def kernel_never_skips(monkeypatch):
    skip = Kernels.skip
    monkeypatch.setattr(Kernels, "skip", lambda self, flag: skip(self, torch.zeros_like(flag)))


def skip_is_read(monkeypatch):
    monkeypatch.setattr(Kernels, "skip", lambda *_: False)


def always_steps(monkeypatch):
    clip = ZClip._clip
    monkeypatch.setattr(ZClip, "_clip", lambda *args, **options: clip(*args, **options) or True)


def counts_twice(monkeypatch):
    counters = running.Counters
    monkeypatch.setattr(running, "Counters", lambda skipped, streak: counters(2 * skipped, streak))


def measures_in_the_gradients_dtype(monkeypatch):
    monkeypatch.setattr(
        zclip_optim.gradients, "device_norm", lambda gradients, _: torch.nn.utils.get_total_norm(gradients).double()
    )


def is_given_scaled_gradients(monkeypatch):
    monkeypatch.setattr(ZClipOptimizer, "_step_supports_amp_scaling", True)


BROKEN = [
    ("the host never waits", reads_its_state, "'warm-up'.*synchronizing"),
    ("the host never waits", skip_is_read, "synchronizing"),
    ("replays of a captured step count, clip and skip", replays_nothing, "'step': 3"),
    ("the compiled decision is the eager one", decides_otherwise, "not close"),
    ("the compiled decision is the eager one", records_otherwise, "not close"),
    ("the compiled decision is the eager one", cannot_compile, "no Triton here"),
    ("the decision on the device is the host's", decides_otherwise, "not close"),
    ("the decision on the device is the host's", records_otherwise, "not close"),
    (CLIPPING[0], kernel_is_not_told, "not told to scale"),
    *((name, kernel_scales_too_little, "not close") for name in CLIPPING),
    (CLIPPING[0], kernel_is_left_with_it, "left behind"),
    *((name, kernel_never_skips, "not (close|equal)") for name in IN_THE_KERNEL),
    (IN_THE_KERNEL[0], skip_is_read, "found_inf"),
    ("a NaN in the kernel, AdamW", counts_twice, "'skipped_steps': 2"),
    ("a NaN, SGD with momentum", always_steps, "not (close|equal)"),
    ("a NaN, SGD with momentum", counts_twice, "'skipped_steps': 2"),
    *((name, measures_in_the_gradients_dtype, "not close") for name in SIXTEEN_BITS),
    (SIXTEEN_BITS[0], kernel_scales_too_little, "not close"),
    ("GradScaler", is_given_scaled_gradients, "not close"),
]


@pytest.mark.parametrize(("name", "break_", "text"), BROKEN, ids=[f"{name}-{by.__name__}" for name, by, _ in BROKEN])
def test_what_is_broken_fails(name, break_, text, monkeypatch):
    break_(monkeypatch)
    found = outcome(name)
    assert found.result == checks.FAILED
    assert re.search(text, found.text, flags=re.DOTALL), found.text


def test_what_torch_itself_cannot_do_is_left_out():
    class NoKernel(torch.optim.AdamW):
        def step(self):
            raise RuntimeError("`fused=True` requires something else")

    found = checks.outcome("it", partial(checks.clipping_is_folded, NoKernel), CPU)
    assert found == checks.Outcome("it", checks.LEFT_OUT, "without ZClip neither: `fused=True` requires something else")


def measured(size, seconds, device):
    """As `overhead` measures, which has its own test, without the seconds that importing the peers takes."""
    own_us = {name: 10.0 + i for i, name in enumerate((OURS, *PEERS))}
    return Row(size.name, len(size.shapes), size.parameters, str(size.dtype), round(seconds), 100.0, 5.0, own_us)


@pytest.fixture
def in_short(monkeypatch):
    """Sizes, trainings and the number of checks for a CPU."""
    short = [replace(cell, steps=3) for cell in CELLS("pico") if cell.method in ("none", "zclip_optim")]
    few = {name: checks.CHECKS[name] for name in ("float16 gradients", "GradScaler")}
    monkeypatch.setattr(checks, "CHECKS", few)
    monkeypatch.setattr(sizes, "SIZES", TINY)
    monkeypatch.setattr(sizes, "COPIED", 2**10)
    monkeypatch.setattr(sizes, "measure", measured)
    monkeypatch.setattr(sizes, "peak_memory", lambda size, device, wrap: 1000 + 24 * wrap)
    monkeypatch.setattr(trainings, "cells", lambda: short[:3])
    monkeypatch.setattr(TextBatches, "chance", 4.0)  # else counted over all bytes, for each run


def run(folder, **options):
    """What the command has written on the CPU."""
    given = {"all": True, "minutes": None, "seconds": None, "max_parameters": 10**6, "out": folder} | options
    gpu.run_on(CPU, argparse.Namespace(**given))
    return read(folder)


def read(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def left_out(result):
    return {each["what"]: each["why"] for each in result["left_out"]}


def test_everything_in_one_file_and_a_page(tmp_path, in_short):
    result, page = run(tmp_path)
    assert [each["result"] for each in result["checks"]] == ["passed", "passed"]
    checked = [(row["size"], row["rounds"], row["captured_steps"], row["reads_nothing_back"]) for row in result["rows"]]
    assert checked == [("tiny", 60, 10, True), ("tiny, bfloat16", 60, 10, True)]  # two minutes of ten
    labels = [row["label"] for row in result["trainings"]]
    assert labels == ["no clipping, seed 0", "zclip_optim, seed 0", "no clipping, seed 1"]
    assert [row["steps"] for row in result["trainings"]] == [3] * 3
    assert result["left_out"] == []
    assert set(result["versions"]) >= {"torch", "zclip_optim", "CUDA", "driver", "commit"}
    for text in ("2 passed.", "| float16 gradients ", "| tiny, bfloat16 ", "hidden 64", "| no clipping, seed 1 "):
        assert text in page, text
    assert "Left out" not in page
    assert f" {result['seconds']:,.0f} s in all." in page


def test_without_all_the_costs_alone(tmp_path, in_short):
    result, page = run(tmp_path, all=False, seconds=3.0, max_parameters=64)
    assert [(row["size"], row["rounds"]) for row in result["rows"]] == [("tiny, bfloat16", 3)]
    assert not {"checks", "trainings"} & result.keys()
    assert "| tiny, bfloat16 " in page
    assert "Trainings" not in page


def test_what_fails_loses_nothing_else(tmp_path, in_short, monkeypatch):
    def out_of_memory(size, *rest):
        if size is TINY[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried | to allocate")
        return measured(size, *rest)

    def diverges(cell, folder):
        if cell.seed == 0:
            raise NonFiniteGradientError("the gradient norm is nan")
        return run_cell(cell, folder)

    measures_in_the_gradients_dtype(monkeypatch)
    monkeypatch.setattr(sizes, "measure", out_of_memory)
    monkeypatch.setattr(sizes, "peak_memory", lambda *_, **__: 1 // 0)
    monkeypatch.setattr(trainings, "foretold", lambda cell: 1.0)
    monkeypatch.setattr(trainings, "run_cell", diverges)
    result, page = run(tmp_path)
    assert [each["result"] for each in result["checks"]] == ["failed", "passed"]
    assert [(row["size"], "captured_steps" in row) for row in result["rows"]] == [("tiny, bfloat16", False)]
    assert [row["label"] for row in result["trainings"]] == ["no clipping, seed 1"]
    assert left_out(result) == {
        "tiny": "OutOfMemoryError: CUDA out of memory.\nTried | to allocate",
        "tiny, bfloat16, what a step does besides": "ZeroDivisionError: integer division or modulo by zero",
        "no clipping, seed 0": "NonFiniteGradientError: the gradient norm is nan",
        "zclip_optim, seed 0": "NonFiniteGradientError: the gradient norm is nan",
    }
    assert "1 failed, 1 passed." in page
    assert "| **failed** | AssertionError: " in page
    assert "- tiny: OutOfMemoryError: CUDA out of memory. Tried \\| to allocate\n" in page
    assert "What a step does besides" not in page


def test_what_there_is_no_room_or_time_for_is_named(tmp_path, in_short, monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda device: 1000.0)
    monkeypatch.setattr(trainings, "foretold", lambda cell: 601.0)
    result, page = run(tmp_path)
    assert [row["size"] for row in result["rows"]] == ["tiny, bfloat16"]
    found = left_out(result)
    assert list(found) == ["tiny", *(trainings.title(cell) for cell in trainings.cells())]
    assert "- tiny: it takes some 0.0 GB of the device, 0.0 GB are free" in page
    assert re.search(r"^- no clipping, seed 1: takes some 601 s, (5\d\d|600) s were left$", page, re.MULTILINE)


def test_without_any_time_the_checks_remain(tmp_path, in_short):
    result, page = run(tmp_path, minutes=1e-6)
    assert len(result["checks"]) == 2
    assert not {"rows", "trainings"} & result.keys()
    assert left_out(result)["tiny, bfloat16"] == "the time for this part was over"
    assert len(left_out(result)) == len(TINY) + len(trainings.cells())
    assert "2 passed." in page


def test_a_run_takes_what_the_last_one_took(tmp_path, monkeypatch):
    cells = CELLS("pico")[:4]
    clock = iter([0.0, 50.0, 110.0, 120.0])
    monkeypatch.setattr(trainings, "time", argparse.Namespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(trainings, "foretold", lambda cell: 40.0)
    rows = {name: 0.0 for name in trainings.Summary.__dataclass_fields__}
    monkeypatch.setattr(
        trainings, "run_cell", lambda cell, folder: rows | {"seconds": 60.0 if cell == cells[1] else 50}
    )
    missing = []
    done = [row["label"] for row in trainings.trained(cells, 150.0, tmp_path, missing)]
    assert done == ["no clipping, seed 0", "fixed 1.0, seed 0"]
    assert [(each.what, each.why) for each in missing] == [
        ("zclip 1.0.0, seed 0", "takes some 60 s, 40 s were left"),
        ("zclip_optim, seed 0", "takes some 60 s, 30 s were left"),
    ]


def test_an_interruption_loses_nothing_that_has_ended(tmp_path, in_short, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    result, page = read(tmp_path)
    assert (len(result["checks"]), len(result["rows"])) == (2, 2)
    assert "| GradScaler " in page


def test_seeds_are_outermost():
    cells = CELLS()
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert Counter(cell.method for cell in cells) == dict.fromkeys(trainings.TRAINED, 3)
    assert {(cell.preset, cell.steps, cell.condition) for cell in cells} == {("small", 2000, "clean")}


def test_the_first_steps_foretell_a_run(monkeypatch):
    probed = []
    monkeypatch.setattr(
        trainings, "training", lambda cell, paths: probed.append(cell.steps) or ([], {"ms_per_step": 20.0})
    )
    assert trainings.foretold(CELLS()[0]) == 40.0  # 2,000 steps
    assert probed == [trainings.PROBED]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_without_a_gpu_it_says_so_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--all", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "gpu: torch finds no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_no_program_says_is_unknown():
    assert gpu.said(sys.executable, "-c", "print('570.1'); print('570.1')") == "570.1"
    assert gpu.said(sys.executable, "-c", "raise SystemExit(1)") == "unknown"
    assert gpu.said("no-such-program-here") == "unknown"


def test_a_reason_is_one_cell_of_a_table():
    text = one_line("first | second\n  third " + "x " * 500)
    assert text.startswith("first \\| second third x x")
    assert len(text) < 410
