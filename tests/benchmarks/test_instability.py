"""`python -m benchmarks instability` and `regret`, in short: what they write, share and can run again."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import instability, regret
from benchmarks.__main__ import main
from benchmarks.evidence.results import method_lines
from benchmarks.evidence.workloads import INSTABILITY, REGRET
from benchmarks.paper.cells import run_cell
from benchmarks.report.spike import THEMES, spike_figure, spike_thresholds
from benchmarks.report.summary import finite
from benchmarks.training.methods import METHODS
from zclip_optim import ZClip

SHORT = ("--workloads", "regression", "digits-sgd", "--seeds", 2, "--steps", 60, "--workers", 1)


def benchmark(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
    main()


def result_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def without(result, *keys):
    return {key: value for key, value in result.items() if key not in keys}


def figures(rows):
    return [{key: values for key, values in row["values"].items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("comparison", [INSTABILITY, REGRET])
def test_every_cell_has_a_name_and_a_method(comparison):
    cells = comparison.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} <= METHODS.keys()
    assert len({(w.label, c.label) for w, c in comparison.pairs()}) == len(comparison.pairs())


@pytest.mark.parametrize(
    "contender", {c.label: c for c in (*INSTABILITY.contenders, *REGRET.contenders)}.values(), ids=lambda c: c.label
)
def test_a_method_can_be_built(contender):
    method = METHODS[contender.method].with_options(dict(contender.options))
    model = torch.nn.Linear(2, 1)
    method.start(model, torch.optim.Adam(model.parameters()))
    assert method.settings.items() >= dict(contender.options).items() or not method.ours


def test_the_two_share_cells_and_ask_what_the_issue_asks():
    assert len({w.label for w in REGRET.workloads if w.condition == "clean"}) >= 8
    assert all(workload.seeds >= 8 for workload in REGRET.workloads)
    assert all(
        workload.seeds >= 20 for workload in REGRET.workloads if workload.architecture[:6] in ("digits", "cartpo")
    )
    assert {cell.seed for cell in REGRET.cells()} == set(range(100, 120))
    assert {cell.name for cell in INSTABILITY.cells()} & {cell.name for cell in REGRET.cells()}
    cap = next(contender for contender in REGRET.contenders if "max_grad_norm=1" in contender.label)
    limited = [w.architecture for w in REGRET.workloads if not w.suits(cap) and w.contenders is None]
    assert limited == ["digits-sgd"] * 2 + ["digits-sgd-sum"] * 2
    labels = {contender.label for contender in (*REGRET.contenders, *INSTABILITY.contenders)}
    assert all(set(w.contenders or ()) <= labels for w in (*REGRET.workloads, *INSTABILITY.workloads))


def test_instability_in_short(in_short, tmp_path, monkeypatch, capsys):
    short = (
        "instability",
        "--workloads",
        "regression",
        "--methods",
        "none",
        "paper",
        "fixed 0.1",
        "lookback=0.1",
    )
    short = (*short, "--seeds", 2, "--steps", 60, "--workers", 1, "--out", tmp_path)
    benchmark(monkeypatch, *short)
    result = result_of(tmp_path, "instability")
    assert [row["workload"] for row in result["rows"][::4]] == [f"regression, lr {lr}" for lr in (0.003, 0.01, 0.03)]
    assert {"spikes", "last_loss", "log_last_loss", "worst_last_loss", "steps_above"} <= result["rows"][0][
        "values"
    ].keys()
    assert (tmp_path / "instability.md").read_text() == instability.page(result)
    printed = capsys.readouterr().out
    assert "Spikes per run" in printed

    cell = result["rows"][2]["cells"][1]
    benchmark(monkeypatch, *short, "--cell", cell)
    assert json.loads(capsys.readouterr().out)["measure"] == result["rows"][2]["values"]["measure"][1]
    benchmark(monkeypatch, *short)
    assert result_of(tmp_path, "instability")["rows"] == result["rows"]  # seconds too: nothing ran again
    with pytest.raises(SystemExit):
        benchmark(monkeypatch, *short, "--cell", "no-such")
    assert "instability has no such cell" in capsys.readouterr().err


def falling(steps=500, spike=None):
    """A run whose loss and norm fall, but for a spike of five steps."""
    losses = np.geomspace(1, 1e-3, steps, dtype=np.float32)
    if spike is not None:
        losses[spike : spike + 5] *= 100
    return {"losses": losses, "grad_norms": 10 * losses}


def spiky_rows(folder):
    """Two seeds, of which the second spikes without clipping."""
    rows = [
        {
            "workload": instability.DRAWN,
            "method": method,
            "architecture": "regression",
            "cells": [f"{method}-{seed}" for seed in range(2)],
            "values": {"spikes": spikes, "clipped_share": [0.0, 0.5]},
        }
        for method, spikes in (("none", [0, 1]), ("paper", [0, 0]))
    ]
    for name, run in {"none-1": falling(spike=400), "paper-1": falling()}.items():  # the others are not read
        np.savez(folder / f"{name}.npz", **run)
    return rows


def test_the_first_spike_of_the_first_seed_that_has_one_is_drawn_light_and_dark(tmp_path):
    rows = spiky_rows(tmp_path)
    names = instability.draw(rows, tmp_path, tmp_path)
    pictures = [Image.open(tmp_path / name).convert("RGB") for name in names]
    assert [picture.size for picture in pictures] == [(1600, 1120)] * 2
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 255, 255), (13, 17, 23)]
    link, caption = instability.picture(rows)
    assert names[0] in link
    assert "seed 101" in caption
    assert "50.0%" in caption
    assert caption.endswith("Without clipping 1 of 2 seeds have no spike, with ZClip 2 of 2.")


def test_nothing_is_drawn_where_nothing_can_be_seen(tmp_path):
    without, zclip = spiky_rows(tmp_path)
    calm = {**without, "values": {"spikes": [0, 0]}}
    for rows in ([], [without], [zclip], [calm, zclip]):
        assert instability.draw(rows, tmp_path, tmp_path) == instability.picture(rows) == []


def test_the_figure_has_units_and_every_step_around_the_spike():
    without, zclip = falling(1500, spike=1000), falling(1500)
    losses, norms = spike_figure(without, zclip, 1000, "nats", THEMES["light"]).axes
    assert losses.get_ylabel() == "training loss\n(nats)"
    assert norms.get_ylabel() == "gradient norm\n(L2)"
    assert norms.get_xlabel() == "step"
    for axes, key in ((losses, "losses"), (norms, "grad_norms")):
        assert axes.get_yscale() == "log"
        assert list(axes.lines[0].get_xdata()) == list(range(701, 1401))
        assert list(axes.lines[0].get_ydata()) == list(without[key][700:1400])
        assert list(axes.lines[1].get_ydata()) == list(zclip[key][700:1400])


def test_the_thresholds_are_those_of_the_run():
    norms = [1.0 + i % 3 for i in range(60)]
    norms[40] = 50.0
    clipper, told = ZClip(), []
    for norm in norms:
        clipper.decide(norm)
        told.append(clipper.metrics)
    drawn = spike_thresholds(norms)
    ordinary = [i for i in range(25, 60) if i != 40]
    assert np.isnan(drawn[:25]).all()
    assert [drawn[i] for i in ordinary] == pytest.approx([told[i].threshold for i in ordinary])
    assert drawn[40] == pytest.approx(told[39].mean + 2.5 * told[39].std, rel=1e-4)  # not what it was clipped to


def test_regret_in_short(in_short, tmp_path, monkeypatch, capsys):
    methods = ("none", "fixed 0.01", "fixed 1", "fixed 100", "lookback=0.1, alpha_down=0.9, max_grad_norm=1", "paper")
    benchmark(monkeypatch, "regret", *SHORT, "--methods", *methods, "--out", tmp_path)
    result = result_of(tmp_path, "regret")
    assert (tmp_path / "regret.md").read_text() == regret.page(result)
    rows = {(row["workload"], row["method"]): row for row in result["rows"]}
    assert ("digits, SGD", "lookback=0.1, alpha_down=0.9, max_grad_norm=1") not in rows
    assert "within 0.02" in capsys.readouterr().out

    unclipped, high = rows["digits, SGD", "none"], rows["digits, SGD", "fixed 100"]
    assert high["values"]["measure"] == unclipped["values"]["measure"]
    assert high["values"]["seconds"] == [0.0, 0.0]  # it is the same run


def test_a_threshold_that_is_never_reached_is_no_clipping(tmp_path):
    workload = next(w for w in REGRET.resized(1, 40).workloads if w.architecture == "digits-sgd")
    none, high = (next(c for c in REGRET.contenders if c.label == label) for label in ("none", "fixed 100"))
    taken = run_cell(workload.cell(high, 0), tmp_path)
    regret.take_over(workload.cell(high, 0), tmp_path)  # it has been run: nothing to do
    (tmp_path / f"{workload.cell(high, 0).name}.json").unlink()
    run_cell(workload.cell(none, 0), tmp_path)
    regret.take_over(workload.cell(high, 0), tmp_path)
    again = json.loads((tmp_path / f"{workload.cell(high, 0).name}.json").read_text())
    assert again["same_as"] == workload.cell(none, 0).name
    keep = ("seconds", "same_as", "cell")
    assert without(again, *keep) == finite(without(taken, *keep))
    low = next(c for c in REGRET.contenders if c.label == "fixed 0.01")
    regret.take_over(workload.cell(low, 0), tmp_path)
    assert not (tmp_path / f"{workload.cell(low, 0).name}.json").exists()


def row(workload, method, measures, unit="nats"):
    values = {"measure": measures, "median_norm": [0.5] * len(measures)}
    return {"workload": workload, "method": method, "unit": unit, "condition": "clean", "values": values}


def test_regret_is_against_the_best_threshold_of_each_workload():
    measures = {
        "a": {"fixed 1": [1.0, 2.0], "fixed 10": [3.0, 3.0], "paper": [1.1, 1.9]},
        "b": {"fixed 1": [5.0, 5.0], "fixed 10": [1.0, 1.0], "paper": [1.5, 1.5]},
    }
    rows = [row(name, method, values) for name, methods in measures.items() for method, values in methods.items()]
    summary, regrets, measures = regret.tables(rows)[1::2]
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in summary.splitlines()
    }
    assert lines["fixed 1"] == ["+2.000", "+4.000", "1 of 2", "2.2"]
    assert lines["fixed 10"] == ["+0.750", "+1.500", "1 of 2", "2.0"]
    assert lines["paper"] == ["+0.250", "+0.500", "1 of 2", "1.8"]
    assert "a, nats (1)" in regrets
    assert "b, nats (10)" in regrets
    assert "+0.000 ± 0.100" in regrets
    assert "1.500 ± 0.707" in measures


def test_a_method_that_was_not_run_on_a_workload_has_a_dash():
    lines = method_lines(
        [row("a", "x", [1.0]), row("b", "x", [2.0]), row("b", "y", [3.0])], lambda r: str(r["values"]["measure"])
    )
    assert lines[1] == {"method": "y", "a": "-", "b": "[3.0]"}


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("instability", "--methods", "magic"), "--methods 'magic': not one of"),
        (("regret", "--methods", "paper"), "regret is against the best of fixed 1, fixed 0.01"),
        (("regret", "--workloads", "chess"), "chess"),
    ],
)
def test_wrong_input_is_one_line(args, complaint, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        benchmark(monkeypatch, *args, "--out", tmp_path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line
