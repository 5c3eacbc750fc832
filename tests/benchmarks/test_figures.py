"""`python -m benchmarks plot`: figures and tests of normality from any run's JSON lines."""

import json
import math
import random
import sys
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.report.figures import (
    FIGURES,
    labelled,
    normality_figure,
    normality_table,
    overview_figure,
    samples,
    shapiro_wilk,
)
from benchmarks.report.records import read_records, write_records
from benchmarks.training.run import StepRecord


def run_of(method="zclip_optim", steps=120, scale=1.0):
    draw = random.Random(0)
    return [
        StepRecord(
            method=method,
            step=step,
            tokens=512 * step,
            loss=scale * (2 + 3 / step),
            lr=1e-3,
            corrupted="zeros" if step == 60 else None,
            grad_norm=draw.gauss(1, 0.05),
            clipped_norm=math.nan if method == "adagc" else 0.9,
            threshold=1.1 if step > 25 and method == "zclip_optim" else math.inf,
            clipped=method == "zclip_optim" and step % 10 == 0,
            skipped=False,
            z_score=math.nan,
            mean=1.0 if method == "zclip_optim" else math.nan,
            std=0.05 if method == "zclip_optim" else math.nan,
            ms=20.0,
        )
        for step in range(1, steps + 1)
    ]


def plot(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "plot", *map(str, args)])
    main()


def test_every_figure_of_runs_of_every_kind(tmp_path, monkeypatch, capsys):
    paths = []
    for method in ("fixed", "zclip_optim", "adagc", "none"):
        paths.append(tmp_path / f"{method}.jsonl")
        write_records(paths[-1], run_of(method))
    plot(monkeypatch, *paths, "--out", tmp_path / "figures")
    for name in FIGURES:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| fixed 1.0, steps 25 to 120 " in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_a_run_that_has_hardly_begun(steps, tmp_path, monkeypatch):
    write_records(tmp_path / "run.jsonl", run_of(steps=steps))
    plot(monkeypatch, tmp_path / "run.jsonl", "--out", tmp_path)
    assert (tmp_path / "normality.png").exists()


def test_records_are_what_was_written(tmp_path):
    records = run_of(steps=30)
    write_records(tmp_path / "run.jsonl", records)
    assert str(read_records(tmp_path / "run.jsonl")) == str(records)  # NaN is not equal to itself
    assert all(json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines())


def test_labels():
    runs = [run_of("fixed", 1), run_of("fixed", 1), run_of("mine", 1)]
    assert list(labelled(runs, None)) == ["fixed 1.0", "fixed 1.0 (2)", "mine"]
    assert list(labelled(runs, ["a", "b", "c"])) == ["a", "b", "c"]


def test_a_resumed_run_is_drawn_where_its_steps_are():
    resumed = run_of()[60:]
    loss, norm = overview_figure({"resumed": resumed}).axes
    assert loss.get_xlim() == norm.get_xlim() == (60, 121)
    assert list(samples(resumed)) == ["steps 73 to 120", "steps 91 to 120"]


def test_the_threshold_is_drawn_of_steps_that_are_no_spikes():
    spike = replace(run_of()[49], clipped=True, z_score=9.0, threshold=0.95)
    records = [*run_of()[:49], spike, *run_of()[50:]]
    _, norm = overview_figure({"ours": records}).axes
    (threshold,) = (line for line in norm.lines if line.get_label() == "threshold")
    assert 50 not in threshold.get_xdata()
    assert 51 in threshold.get_xdata()


def test_axes_have_units():
    runs = {"a": run_of("fixed"), "b": run_of()}
    loss, *norms = overview_figure(runs).axes
    assert loss.get_ylabel() == "loss (nats)"
    assert norms[0].get_ylabel() == "gradient norm (L2)"
    assert {axes.get_xlabel() for axes in (loss, *norms)} == {"step"}
    for axes in normality_figure(runs).axes:
        assert axes.get_xlabel() == "normal quantile (standard deviations)"
        assert axes.get_ylabel() == "gradient norm (L2)"


def test_a_line_that_was_never_finished_is_left_out(tmp_path):
    write_records(tmp_path / "run.jsonl", run_of(steps=3))
    with (tmp_path / "run.jsonl").open("a") as lines:
        lines.write('{"method": "zcl')
    assert len(read_records(tmp_path / "run.jsonl")) == 3


def test_normality():
    normal, heavy = run_of(steps=400), run_of(steps=400)
    heavy = [replace(r, grad_norm=math.exp(40 * (r.grad_norm - 1))) for r in heavy]
    table = normality_table({"normal": normal, "heavy": heavy}).splitlines()
    assert [row.split("|")[-2].strip() for row in table[2:]] == ["not rejected"] * 2 + ["rejected"] * 2
    assert math.isnan(shapiro_wilk([1.0, 1.0, 1.0])[0])
    assert [len(norms) for norms in samples(normal).values()] == [100, 100]


@pytest.mark.parametrize(
    ("content", "args", "complaint"),
    [
        (None, [], "cannot read"),
        ("", [], "no steps in it"),
        ("{}\n", [], "line 1: not a step of a run"),
        ("no json\n", [], "line 1: not a step of a run"),
        ("{", [], "no steps in it"),
        ('{"step": 1}\n', ["--labels", "a", "b"], "--labels: 2 for 1 runs"),
    ],
)
def test_wrong_input_is_one_line(content, args, complaint, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        plot(monkeypatch, path, "--out", tmp_path, *args)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line
