"""`python -m benchmarks defaults`: the rule on made-up differences, and on files."""

import json
import math
import sys

import pytest
from scipy import stats

from benchmarks import defaults
from benchmarks.__main__ import main
from benchmarks.evidence.histories import replayed_rows
from benchmarks.evidence.paired import combined, difference
from benchmarks.training.methods import METHODS
from zclip_optim import ZClip

PAPER = defaults.PAPER


def entries(*deviates, unit="nats", mean=0.02, learned=True):
    return [
        {
            "workload": f"w{i}",
            "unit": unit,
            "learned": learned,
            "mean": -math.copysign(mean, deviate),
            "in_favour": deviate,
            "as_normal": deviate,
        }
        for i, deviate in enumerate(deviates)
    ]


@pytest.mark.parametrize(
    ("deviates", "passes"),
    [
        ([2.0] * 4, True),  # 8 / 2 = 4 in favour
        ([1.5] * 4, False),  # 6 / 2 = 3 is not more than 3
        ([1.51] * 4, True),
        ([-2.0] * 4, False),
        ([5.0] * 4 + [-3.0], True),
        ([5.0] * 4 + [-3.1], False),  # a veto
        ([math.nan] + [2.0] * 4, True),  # nothing is known of that one
        ([], False),
    ],
)
def test_the_rule(deviates, passes):
    assert defaults.judge(entries(*deviates)).passes is passes


@pytest.mark.parametrize(
    ("change", "vetoes"),
    [
        ({}, True),
        ({"mean": 0.009}, False),  # significant, and nothing to anybody
        ({"unit": "log episodes", "mean": 0.049}, False),
        ({"unit": "log episodes", "mean": 0.051}, True),
        ({"unit": "log loss", "mean": 0.099}, False),
        ({"unit": "log loss", "mean": 0.101}, True),
        ({"unit": "log loss", "mean": 0.001, "learned": False}, True),
    ],
)
def test_a_veto_is_of_a_difference_that_matters(change, vetoes):
    verdict = defaults.judge(entries(9.0, 9.0) + entries(-3.1, **change))
    assert verdict.vetoes == (["w0"] if vetoes else [])
    assert verdict.passes is not vetoes
    assert not verdict.first_passes  # its first version knew no size
    assert defaults.judge(entries(9.0, 9.0) + entries(-2.9, **change)).passes


def test_the_first_version_of_the_rule_stands_beside_it():
    verdict = defaults.judge(entries(1.2, 1.2, 1.2, 1.2))
    assert (verdict.passes, verdict.first_passes) == (False, True)
    assert verdict.first_combined == pytest.approx(2.4)


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


def row(workload, measures, **settings):
    return {
        "workload": workload,
        "unit": "nats",
        "architecture": workload,
        "condition": "clean",
        "lr": 0.1,
        "steps": 10,
        "batch": 8,
        "beta2": 0.95,
        "muon": False,
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


BEFORE, AFTER = [1.0, 1.1, 1.3], [0.5, 0.61, 0.79]  # far better
WORKLOADS = ("llama", "gpt2", "vit")


def test_what_is_decided_first_is_kept_for_the_next_question(tmp_path, monkeypatch, capsys):
    rows = []
    for workload in WORKLOADS:
        rows += [
            row(workload, BEFORE),
            row(workload, AFTER, lookback=0.1),
            row(workload, [value - 0.4 for value in AFTER[:2]] + [0.3], lookback=0.1, alpha_down=0.9),
            row(workload, [1.0, 1.4, 1.1], alpha_down=0.9),
            row(workload, AFTER, max_grad_norm=1.0),
        ]
    answers = decide(monkeypatch, tmp_path, rows)
    assert answers["lookback"]["decided"] == 0.1
    assert answers["alpha_down"]["decided"] == 0.9
    assert answers["alpha_down"]["beside"] == {"lookback": 0.1}
    assert answers["max_grad_norm"]["decided"] is None  # nothing was run beside the two
    assert answers["max_grad_norm"]["values"][0]["differences"] == []
    printed = capsys.readouterr().out
    assert "**lookback: 0.1 it is.**" in printed
    assert "**max_grad_norm: the paper's value stays.**" in printed


def test_one_workload_that_is_much_worse_decides(tmp_path, monkeypatch):
    rows = [row(name, BEFORE) for name in WORKLOADS] + [row(name, AFTER, lookback=0.1) for name in WORKLOADS[:2]]
    rows.append(row("vit", [2.0, 2.101, 2.3011], lookback=0.1))
    answer = decide(monkeypatch, tmp_path, rows)["lookback"]
    assert answer["decided"] is None
    assert answer["values"][0]["verdict"]["vetoes"] == ["nano vit, lr 0.1, clean, 10 x 8"]


def test_the_cap_is_asked_of_language_models_and_patience_of_shifted_digits(tmp_path, monkeypatch):
    shifted = [
        row("digits-sgd", values, **settings) | {"condition": "inputs x 3 from the middle on", "cells": [f"{settings}"]}
        for values, settings in ((BEFORE, {}), (AFTER, {"patience": 200}))
    ]
    everything = [
        row(name, values, **settings)
        for name in (*WORKLOADS, "digits-sgd")
        for values, settings in ((BEFORE, {}), (AFTER, {"max_grad_norm": 1.0}), (AFTER, {"patience": 200}))
    ]
    answers = decide(monkeypatch, tmp_path, [*everything, *shifted])
    found = {
        option: [each["workload"].split(", lr")[0] for each in answer["values"][0]["differences"]]
        for option, answer in answers.items()
    }
    assert found["max_grad_norm"] == ["nano llama, beta2 0.95", "nano gpt2, beta2 0.95"]
    assert found["patience"] == ["digits-sgd"]
    assert "inputs x 3" in answers["patience"]["values"][0]["differences"][0]["workload"]
    assert (answers["max_grad_norm"]["decided"], answers["patience"]["beside"]) == (1.0, {})  # it is no default


def test_digits_with_a_summed_loss_do_not_count_again(tmp_path, monkeypatch):
    names = ("digits-sgd", "digits-sgd-sum")
    rows = [row(name, BEFORE) for name in names] + [row(name, AFTER, lookback=0.1) for name in names]
    (value,) = decide(monkeypatch, tmp_path, rows)["lookback"]["values"]
    assert [each["workload"].split(",")[0] for each in value["differences"]] == ["digits-sgd"]


def test_whether_a_task_was_learned_is_told_by_its_loss(tmp_path, monkeypatch):
    def run(values, losses, **settings):
        made = row("regression", values, **settings) | {"unit": "log loss"}
        made["values"]["last_loss"] = losses
        return made

    rows = [run(BEFORE, [1e-5] * 3), run(AFTER, [1e-4] * 3, lookback=0.1)]
    (value,) = decide(monkeypatch, tmp_path, rows)["lookback"]["values"]
    assert value["differences"][0]["learned"]
    rows[1]["values"]["last_loss"] = [0.1] * 3
    (value,) = decide(monkeypatch, tmp_path, rows)["lookback"]["values"]
    assert not value["differences"][0]["learned"]


def test_a_cell_in_two_files_counts_once(tmp_path, monkeypatch):
    rows = [row("vit", BEFORE), row("vit", AFTER, lookback=0.1)]
    (tmp_path / "instability.json").write_text(json.dumps({"rows": rows}))
    (answer,) = decide(monkeypatch, tmp_path, rows)["lookback"]["values"]
    assert len(answer["differences"]) == 1


def test_of_a_cell_in_two_files_the_row_with_more_seeds_counts(tmp_path, monkeypatch):
    short = [row("vit", BEFORE[:2]), row("vit", AFTER[:2], lookback=0.1)]
    for each in short:
        each["cells"] *= 2
    (tmp_path / "instability.json").write_text(json.dumps({"rows": short}))
    long = [row("vit", BEFORE), row("vit", AFTER, lookback=0.1)]
    for each in long:
        each["cells"] *= 3
    answers = decide(monkeypatch, tmp_path, long, "methods")
    assert answers["lookback"]["values"][0]["differences"][0]["pairs"] == 3
    assert defaults.difference_of(short[1], long[0]).pairs == 2  # of the seeds that both have


def test_real_histories_stand_beside_the_verdict(tmp_path, monkeypatch):
    histories = replayed_rows({"paper": {}, "lookback=0.1": {"lookback": 0.1}})
    (tmp_path / "detector.json").write_text(json.dumps({"histories": histories}))
    decide(monkeypatch, tmp_path, [row("vit", BEFORE)])
    assert "| grpo-two-levels" in (tmp_path / "defaults.md").read_text()


def test_without_results_there_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "defaults", "--results", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "no instability.json" in capsys.readouterr().err


def test_the_paper_is_the_paper_whatever_the_defaults():
    config = ZClip(**METHODS["paper"].options).config
    assert config.patience is None
    assert [getattr(config, name) for name in ("lookback", "alpha_down", "z_skip", "max_grad_norm")] == [None] * 4
    assert (config.z_thresh, config.alpha) == (2.5, 0.97)
