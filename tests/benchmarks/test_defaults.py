"""`python -m benchmarks defaults`: the rule on made-up differences, and on files."""

import json
import math
import sys

import pytest
from scipy import stats

from benchmarks import defaults
from benchmarks.__main__ import main
from benchmarks.evidence.paired import Difference, combined, difference
from benchmarks.training.methods import METHODS
from zclip_optim import ZClip

PAPER = defaults.PAPER


def of(*units):
    return [Difference(unit, 1.0, 4) for unit in units]


@pytest.mark.parametrize(
    ("units", "passes"),
    [
        ([-2.0] * 4, True),  # lower is better: 8 / 2 = 4 in favour
        ([-1.0] * 4, False),  # 4 / 2 = 2 is not more than 2
        ([-1.01] * 4, True),
        ([2.0] * 4, False),
        ([-5.0] * 4 + [3.0], True),
        ([-5.0] * 4 + [3.1], False),  # one workload is worse by more than 3
        ([math.nan] + [-2.0] * 4, True),  # nothing is known of that one
        ([], False),
    ],
)
def test_the_rule(units, passes):
    assert defaults.judge(of(*units)).passes is passes


def test_differences_are_paired():
    found = difference([1.0, 2.0, 4.0], [0.5, 1.0, 2.5])
    assert found.mean == pytest.approx(1.0)
    assert found.error == pytest.approx(0.5 / math.sqrt(3))
    assert found.units == pytest.approx(stats.ttest_rel([1.0, 2.0, 4.0], [0.5, 1.0, 2.5]).statistic)
    assert stats.norm.sf(found.normal) == pytest.approx(stats.ttest_rel([1.0, 2.0, 4.0], [0.5, 1.0, 2.5]).pvalue / 2)
    assert difference([1.0, 2.0], [1.0, 2.0]).units == 0.0
    assert math.isnan(difference([1.0], [2.0]).units)
    assert difference([1.0, math.nan, 3.0], [1.0, 1.0, 1.0]).pairs == 2
    assert combined([3.0, math.nan, 1.0]) == pytest.approx(4 / math.sqrt(2))


def row(workload, measures, scale_free=True, **settings):
    return {
        "workload": workload,
        "unit": "nats",
        "scale_free": scale_free,
        "architecture": workload,
        "condition": "clean",
        "lr": 0.1,
        "steps": 10,
        "batch": 8,
        "preset": "nano",
        "settings": PAPER | settings,
        "cells": [f"{workload} {settings}"],
        "values": {"measure": measures},
    }


def decide(monkeypatch, folder, rows, name="regret"):
    others = [row("a", [0.0]) | {"settings": {}, "cells": ["of another method"]}, {"row": "of an older file"}]
    (folder / f"{name}.json").write_text(json.dumps({"rows": [*others, *rows]}))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "defaults", "--results", str(folder), "--out", str(folder)])
    main()
    result = json.loads((folder / "defaults.json").read_text())
    assert (folder / "defaults.md").read_text() == defaults.page(result)
    return {answer["option"]: answer for answer in result["answers"]}


def test_what_is_decided_first_is_kept_for_the_next_question(tmp_path, monkeypatch, capsys):
    rows = []
    for workload, gain in (("a", 0.5), ("b", 0.4)):
        rows += [
            row(workload, [1.0, 1.1, 1.3]),
            row(workload, [1.0 - gain, 1.11 - gain, 1.29 - gain], alpha_down=0.8),
            row(workload, [1.0, 1.4, 1.1], z_thresh=2.0),
            row(workload, [1.0 - 2 * gain, 1.12 - 2 * gain, 1.28 - 2 * gain], alpha_down=0.8, z_thresh=2.0),
            row(workload, [1.0, 1.3, 1.2], z_skip=6.0),
        ]
    answers = decide(monkeypatch, tmp_path, rows)
    assert answers["alpha_down"]["decided"] == 0.8
    assert answers["z_thresh"]["decided"] == 2.0
    assert answers["z_thresh"]["beside"] == {"alpha_down": 0.8}
    assert answers["z_skip"]["decided"] is None  # nothing was run beside alpha_down
    assert answers["z_skip"]["values"][0]["differences"] == []
    printed = capsys.readouterr().out
    assert "**alpha_down: 0.8 it is.**" in printed
    assert "**z_skip: the paper's value stays.**" in printed


def test_one_workload_that_is_much_worse_decides(tmp_path, monkeypatch):
    rows = [row(name, [1.0, 1.1, 1.3]) for name in "abc"]
    rows += [row(name, [0.5, 0.61, 0.79], alpha_down=0.8) for name in "ab"] + [
        row("c", [1.4, 1.71, 1.79], alpha_down=0.8)
    ]
    answer = decide(monkeypatch, tmp_path, rows)["alpha_down"]
    assert answer["decided"] is None
    assert answer["values"][0]["verdict"]["combined"] > 2
    assert answer["values"][0]["verdict"]["least"] < -3


def test_of_two_values_the_one_further_in_favour(tmp_path, monkeypatch):
    rows = [
        row("a", [1.0, 1.1, 1.3]),
        row("a", [0.9, 1.02, 1.19], z_skip=6.0),
        row("a", [0.5, 0.61, 0.79], z_skip=10.0),
    ]
    assert decide(monkeypatch, tmp_path, rows)["z_skip"]["decided"] == 10


def test_the_cap_is_asked_of_adams_kind_alone(tmp_path, monkeypatch):
    rows = [row("a", [1.0, 1.1, 1.3]), row("a", [0.5, 0.61, 0.79], max_grad_norm=1.0)]
    rows += [row("s", [1.0, 1.1, 1.3], False), row("s", [2.0, 2.11, 2.29], False, max_grad_norm=1.0)]
    answer = decide(monkeypatch, tmp_path, rows)["max_grad_norm"]
    assert [each["workload"].split(",")[0] for each in answer["values"][0]["differences"]] == ["nano a"]
    assert answer["decided"] == 1.0


def test_a_cell_in_two_files_counts_once(tmp_path, monkeypatch):
    rows = [row("a", [1.0, 1.1, 1.3]), row("a", [0.5, 0.61, 0.79], alpha_down=0.8)]
    (tmp_path / "instability.json").write_text(json.dumps({"rows": rows}))
    (answer,) = decide(monkeypatch, tmp_path, rows)["alpha_down"]["values"]
    assert len(answer["differences"]) == 1


def test_of_a_cell_in_two_files_the_row_with_more_seeds_counts(tmp_path, monkeypatch):
    short = [row("a", [1.0, 1.1]), row("a", [0.5, 0.61], alpha_down=0.8), row("a", [0.9, 1.2], z_skip=6.0)]
    for each in short:
        each["cells"] *= 2
    (tmp_path / "instability.json").write_text(json.dumps({"rows": short}))
    long = [row("a", [1.0, 1.1, 1.3]), row("a", [0.5, 0.61, 0.79], alpha_down=0.8)]
    for each in long:
        each["cells"] *= 3
    answers = decide(monkeypatch, tmp_path, long, "methods")
    assert answers["alpha_down"]["values"][0]["differences"][0]["pairs"] == 3
    assert answers["z_skip"]["decided"] is None
    assert defaults.difference_of(short[2], long[0]).pairs == 2  # of the seeds that both have


def test_without_results_there_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "defaults", "--results", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "no instability.json" in capsys.readouterr().err


def test_the_paper_is_the_paper_whatever_the_defaults():
    config = ZClip(**METHODS["paper"].options).config
    assert config.patience is None
    assert [getattr(config, name, None) for name in ("alpha_down", "z_skip", "max_grad_norm")] == [None] * 3
    assert (config.z_thresh, config.alpha) == (2.5, 0.97)
