"""`python -m benchmarks` as a user runs it: a short run of every part, and what wrong input says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]


def in_its_own_process(*args):
    command = [sys.executable, "-m", "benchmarks", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run


@pytest.fixture
def benchmarks(in_short, in_this_process):
    return in_this_process if in_short else in_its_own_process


def test_a_short_run_writes_table_figure_and_every_step(benchmarks, tmp_path):
    result = benchmarks("--steps", 12, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| zclip_optim " in result.stdout
    assert "loss spike: " in result.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "compare.md").read_text().startswith("# compare")
    summary = json.loads((tmp_path / "compare.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["none", "fixed", "zclip_optim"]
    for row in summary["rows"]:
        records = [json.loads(line) for line in (tmp_path / f"{row['method']}.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, 13))
        assert records[0]["loss"] == pytest.approx(5.6, abs=0.3)  # about ln 256: nothing learnt yet
        assert row["held_out_loss"] < records[0]["loss"]


def test_a_seed_fixes_every_step(benchmarks, tmp_path):
    losses = []
    for folder in ("one", "two"):
        assert benchmarks("--steps", 4, "--seed", 5, "--out", tmp_path / folder).returncode == 0
        lines = (tmp_path / folder / "zclip_optim.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]


def test_own_data(benchmarks, tmp_path):
    (tmp_path / "mine.txt").write_text("to be or not to be, that is the question. " * 2000)
    result = benchmarks("--steps", 3, "--data", tmp_path / "mine.txt", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "mine.txt" in result.stdout


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--steps", "0"], "must be a whole number >= 1, got '0'"),
        (["--lr", "-1"], "must be a finite number > 0, got '-1'"),
        (["--lr", "x"], "got 'x'"),
        (["--data", "/no/such/file"], "/no/such/file: no such file or folder"),
        (["--data", "{empty}"], "too little text"),
        (["--out", "{file}/below"], "cannot be written"),
        (["--nonsense"], "--nonsense"),
        (["faults", "--steps", "1"], "steps"),
        (["detector", "--seeds", "0"], "must be a whole number >= 1, got '0'"),
        (["overhead", "--seconds", "0"], "must be a finite number > 0, got '0'"),
        (["gpu", "--max-parameters", "0"], "must be a whole number >= 1, got '0'"),
        (["gpu", "--all", "--seconds", "5"], "--seconds 5: with --all the time is --minutes"),
        (["gpu", "--minutes", "5"], "--minutes 5: only with --all"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(args, complaint, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    args = [arg.format(empty=tmp_path / "empty", file=tmp_path / "file") for arg in args]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *args])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


def test_wrong_input_in_a_process_of_its_own():
    result = in_its_own_process("--steps", "none")
    assert result.returncode == 2
    assert result.stderr == "benchmarks: error: argument --steps: must be a whole number >= 1, got 'none'\n"


def test_faults_in_short(benchmarks, tmp_path):
    result = benchmarks("faults", "--steps", 4, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "faults.json").read_text())
    survived = {(row["method"], row["fault"]): row["survived"] for row in summary["rows"]}
    assert survived["paper", "nan"]
    assert not survived["no clipping", "nan"]
    assert (tmp_path / "faults.md").read_text().startswith("# faults")


def test_detector_in_short(benchmarks, tmp_path):
    result = benchmarks("detector", "--steps", 300, "--seeds", 2, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "detector.json").read_text())["rows"]
    assert (tmp_path / "detector.md").read_text().startswith("# detector")


def test_overhead_in_short(benchmarks, tmp_path):
    result = benchmarks("overhead", "--seconds", 0.01, "--max-parameters", 20_000, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "vs clip_grad_norm_" in result.stdout
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "overhead.md").read_text().startswith("# overhead")
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert {row["parameters"] for row in rows} > {1386, 4096, 16_384}
    assert all(set(row["own_us"]) == {"zclip_optim", "zclip 1.0.0", "clip_grad_norm_", "autoclip"} for row in rows)
    besides = [row for row in rows if "closure_us" in row]
    assert {row["size"] for row in besides} == {"4 tensors, 1.4 k", "RL, 17-64-64-6"}
    assert all(0 <= row["extra_memory"] < 4 * row["parameters"] and row["as_dict_us"] > 0 for row in besides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_gpu_without_a_gpu(in_this_process):
    result = in_this_process("gpu")
    assert result.returncode == 2
    assert "torch finds no CUDA device here" in result.stderr


def test_help_names_every_option(in_this_process):
    text = in_this_process("--help").stdout
    for option in ("--steps", "--lr", "--seed", "--out", "--data"):
        assert option in text
