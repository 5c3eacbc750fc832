"""`python -m benchmarks train`: what a run leaves behind, and going on from a checkpoint, in one process or several."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from versions import needs_fsdp2_on_cpu

from benchmarks.__main__ import main
from benchmarks.training.llama import LanguageModel
from benchmarks.training.presets import PRESETS

pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 2000)
    return path


def train(*args, ranks=0):
    """What it printed; standalone chooses a free port. Nothing is left of it after 50 seconds."""
    command = [sys.executable, *(TORCHRUN if ranks else []), "-m", "benchmarks", "train", *map(str, args)]
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
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
    assert process.returncode == 0, output
    return output


def train_here(monkeypatch, *args):
    """In this process, which saves starting one."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "train", *map(str, args)])
    main()


def steps(folder):
    """Step -> its record; each is there once."""
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    found = {record["step"]: record for record in records}
    assert len(found) == len(records)
    return found


def without_time(record):
    return {key: value for key, value in record.items() if key != "ms"}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for step, record in some.items():
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(others[step][name], rel=1e-3)


def train_on_a_rank(rank, ranks, args):
    """What this rank printed; its process group, which torchrun would have it make, is that of the tests."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        if ranks:
            patch.setenv("WORLD_SIZE", str(ranks))
            patch.setattr(dist, "init_process_group", lambda backend: None)
            patch.setattr(dist, "destroy_process_group", lambda: None)
        train_here(patch, *args)
    return printed.getvalue()


@pytest.fixture(params=["ranks of the tests", pytest.param("torchrun", marks=pytest.mark.thorough)])
def train_on(request, two):
    """Trains in `ranks` processes, 0 for this one alone; what they printed."""

    def run(ranks, *args):
        if request.param == "torchrun":
            return train(*args, ranks=ranks)
        return "".join(two.run(train_on_a_rank, ranks, args)) if ranks else train_on_a_rank(0, ranks, args)

    return run


@needs_fsdp2_on_cpu
def test_every_strategy_goes_on_from_a_sharded_checkpoint(train_on, tmp_path, text):
    size = ("--steps", 6, "--batch", 4, "--save-every", 4, "--data", text)
    train_on(2, "--strategy", "fsdp2", "--out", tmp_path / "whole", *size)
    whole = steps(tmp_path / "whole")
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    for strategy, ranks in (("fsdp2", 2), ("ddp", 2), ("none", 0)):
        options = ("--strategy", strategy, "--out", tmp_path / strategy, "--resume", tmp_path / "whole" / "step-4")
        output = train_on(ranks, *options, *size)
        assert_same(steps(tmp_path / strategy), {step: whole[step] for step in (5, 6)})
        assert output.count("written to") == 1


@pytest.mark.parametrize("method", ["zclip_optim", "published", "autoclip", "adagc", "none"])
def test_a_resumed_run_takes_the_same_steps(method, in_short, tmp_path, text, monkeypatch):
    size = ("--method", method, "--steps", 6, "--batch", 2, "--save-every", 3, "--data", text)
    train_here(monkeypatch, *size, "--out", tmp_path)
    whole = steps(tmp_path)
    train_here(monkeypatch, *size, "--out", tmp_path, "--resume", tmp_path / "step-3")
    resumed = steps(tmp_path)
    assert {step: without_time(record) for step, record in resumed.items()} == {
        step: without_time(record) for step, record in whole.items()
    }


def test_a_run_writes_its_result_and_an_event_file(tmp_path, text, monkeypatch):
    options = ("--option", "z_thresh=3.0", "--option", "clip_option=max", "--bad-shard", "--tensorboard")
    train_here(monkeypatch, "--steps", 20, "--batch", 2, "--data", text, *options, "--out", tmp_path)
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["config"]["options"] == {"z_thresh": 3.0, "clip_option": "max"}
    assert result["rows"][0]["held_out_loss"] < steps(tmp_path)[1]["loss"]
    assert any(record["corrupted"] for record in steps(tmp_path).values())
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_the_small_preset_trains(in_short, tmp_path, text, monkeypatch):
    train_here(monkeypatch, "--preset", "small", "--steps", 1, "--batch", 1, "--data", text, "--out", tmp_path)
    assert steps(tmp_path)[1]["tokens"] == PRESETS["small"].model.context


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--option", "z_thresh"], "must be NAME=VALUE, got 'z_thresh'"),
        (["--option", "z_thresh=-1"], "z_thresh"),
        (["--option", "no_such=1"], "no_such"),
        (["--method", "fixed", "--option", "alpha=0.9"], "--method fixed takes none"),
        (["--method", "published", "--strategy", "ddp"], "--method published is for one process"),
        (["--architecture", "vit", "--data", "{text}"], "--data is for text"),
        (["--strategy", "ddp"], "--strategy ddp needs torchrun"),
        (["--resume", "{empty}"], "error: --resume {empty}: no checkpoint there"),
        (["--resume", "{saved}", "--lr", "0.5"], "saved with lr 0.002, not 0.5"),
        (["--resume", "{saved}", "--method", "none"], "saved with method"),
        (["--resume", "{saved}", "--steps", "2"], "saved with steps 1, not 2"),
    ],
)
def test_wrong_options_are_one_line(args, complaint, tmp_path, text, monkeypatch, capsys):
    size = ("--steps", 1, "--batch", 1, "--data", text)
    if "{saved}" in args:
        train_here(monkeypatch, *size, "--out", tmp_path)
        capsys.readouterr()
    paths = {"text": text, "saved": tmp_path / "step-1", "empty": tmp_path}
    args = [arg.format(**paths) for arg in args]
    data = size if "--data" not in args else size[:4]
    with pytest.raises(SystemExit) as exit_:
        train_here(monkeypatch, *data, *args, "--out", tmp_path)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint.format(**paths) in line


def test_a_resumed_run_does_not_go_on_in_the_file_of_another(tmp_path, text, monkeypatch, capsys):
    size = ("--steps", 2, "--batch", 1, "--save-every", 1, "--data", text)
    train_here(monkeypatch, *size, "--out", tmp_path / "one")
    train_here(monkeypatch, *size, "--out", tmp_path / "other", "--method", "none")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *size, "--out", tmp_path / "other", "--resume", tmp_path / "one" / "step-1")
    assert "its train.jsonl is of another run" in capsys.readouterr().err


def test_the_papers_model_has_its_parameters():
    preset = PRESETS["paper-1b"]
    with torch.device("meta"):
        model = LanguageModel(preset.model)
    hidden, ffn, layers, vocab = 2048, 5440, 16, 65_536
    per_layer = 4 * hidden**2 + 3 * hidden * ffn + 2 * hidden
    expected = 2 * vocab * hidden + layers * per_layer + hidden
    assert sum(p.numel() for p in model.parameters()) == expected == 1_071_712_256
    assert preset.batch * preset.model.context == 2048 * 2048
    assert preset.warmup_share * preset.steps * 2048 * 2048 == pytest.approx(2e9)
