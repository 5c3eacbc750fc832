"""`python -m benchmarks sweep`: the tables' cells, the files they leave, going on where a sweep was stopped."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.evidence.workloads import REGRET
from benchmarks.paper import cells
from benchmarks.paper.cells import FIRST_SEED, Cell, load_outcome, run_cell
from benchmarks.paper.tables import (
    ABLATION_RATE,
    RATES,
    TABLES,
    Column,
    Count,
    Size,
    cell_label,
    counted,
    format_rows,
    papers_twin,
    summarize_rows,
)
from benchmarks.report.records import read_records
from benchmarks.training.cartpole import CartPoleRun, standardized_returns
from benchmarks.training.digits import CORRUPTIONS, DigitBatches
from benchmarks.training.methods import METHODS, PAPER
from benchmarks.training.presets import PRESETS
from benchmarks.training.run import Run, StepRecord, TrainConfig
from zclip_optim import ZClip

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CELL = Cell("vit", "zclip_optim", lr=1e-3, seed=0, condition="bad shard", steps=30, batch=8)


def sweep(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sweep", *map(str, args)])
    main()


def record(step, loss, corrupted=None):
    nothing = dict.fromkeys(("lr", "grad_norm", "clipped_norm", "threshold", "z_score", "mean", "std", "ms"), 1.0)
    return StepRecord(
        "none", step, tokens=step, loss=loss, corrupted=corrupted, clipped=False, skipped=False, **nothing
    )


def test_the_tables():
    assert list(TABLES) == ["lr", "methods", "options", "z_thresh", "alpha", "arch", "rl"]
    assert len(RATES) == 7
    assert [dict(row.contender.options) for row in TABLES["z_thresh"].rows] == [
        {"z_thresh": 1.5}, {"z_thresh": 2}, {}, {"z_thresh": 3}, {"z_thresh": 3.5}, {"z_thresh": 4},
    ]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_nothing_is_left_to_the_defaults(name):
    for _, _, cell in TABLES[name].cells(Size()):
        if cell.clipping.ours:
            assert PAPER.keys() <= cell.clipping.options.keys()
            assert cell.clipping.settings | cell.clipping.options == cell.clipping.settings


@pytest.mark.parametrize("name", TABLES)
def test_the_published_results_say_how_they_came_about(name):
    paths = [path for path in (BENCHMARKS / "results").glob("*.json") if path.stem == name]
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert {"name", "command", "machine", "versions", "seeds", "rows"} <= result.keys()
        assert len(result["seeds"]) >= 3


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_of_a_table_can_be_built(name):
    table = TABLES[name]
    assert len({cell_label(row, cell) for row, _, cell in table.cells(Size())}) == len(table.rows)
    found = [cell for _, _, cell in table.cells(Size())]
    assert len({cell.name for cell in found}) == len(found) == len(table.rows) * len(table.conditions) * table.seeds
    assert {papers_twin(cell) for cell in found} <= set(found)
    for cell in found:
        if cell.clipping.ours:
            ZClip(**cell.clipping.options)


def test_tables_share_the_cells_that_they_have_in_common():
    names = {name: {cell.name for _, _, cell in table.cells(Size())} for name, table in TABLES.items()}
    for name in ("options", "z_thresh", "alpha", "lr"):
        assert names[name] & names["methods"]
    assert {row.rate for row in TABLES["methods"].rows} == {ABLATION_RATE}


def test_tables_share_with_regret_what_they_have_in_common():
    regret = {cell.name for cell in REGRET.cells()}
    shared = {name: {cell.name for _, _, cell in t.cells(Size())} & regret for name, t in TABLES.items()}
    for name in ("methods", "arch", "rl"):
        assert shared[name] == {cell.name for _, _, cell in TABLES[name].cells(Size())}


def test_differences_are_paired_with_the_papers_rule():
    measures = {"none": [3.0, 5.0], "fixed": [1.0, 2.5], "paper": [1.0, 2.0]}

    def outcome(cell):
        figures = dict.fromkeys((column.key for column in TABLES["arch"].columns), 1.0)
        return figures | {
            "measure": 0.5 if cell.options else measures[cell.method][cell.seed - FIRST_SEED],
            "diverged": False,
        }

    rows = summarize_rows(TABLES["arch"], Size(), 2, outcome)
    table = format_rows(TABLES["arch"], rows)
    column = table.splitlines()[2].split("|").index("   validation loss - paper's ")
    found = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in table.splitlines()[4:9]}
    assert found == {
        "GPT-2, beta2 0.95, none": "+2.500 ± 0.500",
        "GPT-2, beta2 0.95, fixed 1": "+0.250 ± 0.250",
        "GPT-2, beta2 0.95, paper": "-",
        "GPT-2, beta2 0.95, lookback=0.1": "-1.000 ± 0.500",
        "GPT-2, beta2 0.95, lookback=0.1, alpha_down=0.9": "-1.000 ± 0.500",
    }


def test_a_cell_leaves_its_steps_and_its_outcome(tmp_path):
    assert load_outcome(CELL, tmp_path) is None
    outcome = run_cell(CELL, tmp_path)
    assert load_outcome(CELL, tmp_path)["held_out_loss"] == outcome["held_out_loss"]
    records = read_records(tmp_path / f"{CELL.name}.jsonl")
    assert [r.step for r in records] == list(range(1, 31))
    assert records[-1].tokens == 30 * 8
    assert {r.corrupted for r in records} <= {None, *CORRUPTIONS}
    assert outcome["corrupted_steps"] == sum(r.corrupted is not None for r in records) > 0
    assert outcome["clipped_share"] == sum(r.clipped for r in records) / 30


def test_a_cell_that_gives_up_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setitem(cells.METHODS, "zclip_optim", replace(METHODS["zclip_optim"], options={"nonfinite": "raise"}))
    outcome = run_cell(replace(CELL, lr=1e30), tmp_path)
    assert outcome["diverged"]
    assert outcome["steps"] < 30


def test_what_has_not_learned_has_diverged(tmp_path):
    untrained = run_cell(replace(CELL, steps=1, lr=1e-9), tmp_path)
    trained = run_cell(replace(CELL, steps=120, lr=2e-3, batch=32, condition="clean"), tmp_path)
    assert (untrained["diverged"], trained["diverged"]) == (True, False)
    assert DigitBatches(8, 0, {}).chance == pytest.approx(math.log(10), abs=0.01)


def test_a_method_that_does_not_tell_has_no_share_of_clipped_steps(tmp_path):
    assert math.isnan(run_cell(replace(CELL, method="adagc", steps=3), tmp_path)["clipped_share"])


def test_a_step_that_the_cap_alone_has_clipped_counts_as_clipped(tmp_path):
    cell = replace(CELL, method="capped", condition="clean", steps=20)
    outcome = run_cell(cell, tmp_path)
    above = [r.grad_norm > 1.0 for r in read_records(tmp_path / f"{cell.name}.jsonl")]
    assert outcome["clipped_share"] == sum(above) / 20 > 0  # the warm-up of 25 steps has nothing but the cap


def test_a_sweep_goes_on_where_it_was_stopped_and_a_cell_can_be_run_again(in_short, tmp_path, monkeypatch, capsys):
    size = ("options", "--steps", 3, "--batch", 1, "--seeds", 1, "--out", tmp_path)
    sweep(monkeypatch, *size)
    first = json.loads((tmp_path / "options.json").read_text())
    assert [row["row"] for row in first["rows"]] == [
        label for label in ("max", "mean", "reciprocal (paper)", "z_skip=10") for _ in range(2)
    ]
    assert {"name", "command", "machine", "versions", "seeds", "rows"} <= first.keys()
    ended, again = first["rows"][0]["cells"][0], first["rows"][2]["cells"][0]
    path = tmp_path / "cells" / f"{ended}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out_loss": 7.0, "diverged": False}))
    (tmp_path / "cells" / f"{again}.json").unlink()
    sweep(monkeypatch, *size)
    second = json.loads((tmp_path / "options.json").read_text())
    assert second["rows"][0]["mean"]["held_out_loss"] == 7.0
    assert second["rows"][2]["mean"]["held_out_loss"] is None  # nothing is learned in three steps
    assert second["rows"][2] == first["rows"][2]
    assert "| max " in capsys.readouterr().out

    sweep(monkeypatch, *size, "--cell", again)
    printed = json.loads(capsys.readouterr().out)
    assert printed["held_out_loss"] == first["rows"][2]["values"]["held_out_loss"][0]


def test_an_interrupt_ends_a_sweep_at_once(tmp_path):
    """Ctrl-C reaches the whole process group."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks",
            "sweep",
            "lr",
            "--preset",
            "nano",
            "--workers",
            "1",
            "--out",
            str(tmp_path),
        ],
        cwd=BENCHMARKS.parent,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.read(1)  # the progress bar, which comes before the cells
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=20)  # a cell takes longer
    assert process.returncode == 130
    assert complaint.endswith("benchmarks: interrupted\n")
    assert not list((tmp_path / "cells").glob("*.jsonl"))


def killed(cell, folder, paths):
    os._exit(9)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.paper.runner.run_cell", killed)
    with pytest.raises(SystemExit):
        sweep(monkeypatch, "options", "--workers", 1, "--out", tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == ("benchmarks: error: a process that ran a cell was killed; the same command goes on from there")


def test_cells_of_other_data_are_not_taken(in_short, tmp_path, monkeypatch, capsys):
    sweep(monkeypatch, "rl", "--steps", 1, "--seeds", 1, "--out", tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be " * 200)
    with pytest.raises(SystemExit):
        sweep(monkeypatch, "methods", "--data", tmp_path / "text.txt", "--out", tmp_path)
    assert "choose another --out" in capsys.readouterr().err


def test_the_other_tasks_in_short(in_short, tmp_path, monkeypatch):
    for name in ("arch", "rl"):
        sweep(monkeypatch, name, "--steps", 2, "--batch", 1, "--seeds", 1, "--out", tmp_path)
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert len(rows) == len(TABLES[name].rows) * len(TABLES[name].conditions)


def test_another_preset_has_files_of_its_own(in_short, tmp_path, monkeypatch):
    sweep(monkeypatch, "rl", "--preset", "nano", "--steps", 1, "--seeds", 1, "--out", tmp_path)
    result = json.loads((tmp_path / "nano-rl.json").read_text())
    assert result["cell_command"] == "python -m benchmarks sweep rl --preset nano --cell NAME"
    assert not (tmp_path / "rl.json").exists()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nothing"], "nothing"),
        (["lr", "--seeds", "0"], "must be a whole number >= 1, got '0'"),
        (["lr", "--cell", "no-such"], "the table lr has no such cell"),
        (["lr", "--preset", "huge"], "huge"),
    ],
)
def test_wrong_input_is_one_line(args, complaint, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        sweep(monkeypatch, *args, "--out", tmp_path)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


def test_a_column_is_the_mean_of_what_is_finite():
    column = Column("loss", "loss", "{:.1f}")
    assert column.show([1.0, 3.0]) == "2.0 ± 1.4"
    assert column.show([1.0, 3.0, math.nan]) == "2.0 ± 1.4 (2 of 3)"
    assert column.show([math.nan]) == "-"


def test_what_diverged_is_counted_apart():
    column = Column("loss", "loss", "{:.1f}")
    entry = {"values": {"loss": [1.0, 97.0, None], "diverged": [False, True, True]}, "counted": [True, False, False]}
    assert column.show(counted(entry, column)) == "1.0 ± 0.0 (1 of 3)"
    count = Count("diverged", "diverged")
    assert count.show(counted(entry, count)) == "2 of 3"


def test_micro_batches_leave_the_batch_s_gradient(monkeypatch):
    config = TrainConfig(steps=2, lr=1e-3, seed=0, batch=8, architecture="vit", corrupt=False)
    gradients = []
    for micro_batch in (None, 3):
        monkeypatch.setitem(PRESETS, "nano", replace(PRESETS["nano"], micro_batch=micro_batch))
        run = Run(METHODS["none"], config, config.open())
        loss = next(run.steps()).loss
        gradients.append((loss, torch.cat([p.grad.flatten() for p in run.model.parameters()])))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_reinforce_solves_cartpole():
    records = list(CartPoleRun(METHODS["zclip_optim"], lr=1e-2, seed=0).episodes(400))
    assert len(records) < 400
    assert records[-1].tokens == sum(r.episode_return for r in records)


def test_returns_are_discounted_and_standardized():
    returns = standardized_returns([1.0, 1.0, 1.0])
    raw = torch.tensor([1 + 0.99 + 0.99**2, 1.99, 1.0])
    torch.testing.assert_close(returns, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
