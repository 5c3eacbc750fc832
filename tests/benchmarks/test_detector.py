"""What the published page of `detector` says comes out again, where that takes seconds; runs here are logs too."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import detector
from benchmarks.evidence.histories import FOLDER, load_history
from benchmarks.report.records import write_records
from benchmarks.training.run import StepRecord
from zclip_optim.logs import read_norms

PUBLISHED = json.loads((Path(detector.__file__).parent / "results" / "detector.json").read_text())


def test_real_histories_come_out_as_published():
    assert detector.replayed_rows(detector.RULES) == PUBLISHED["histories"]


def test_blind_steps_come_out_as_published():
    rows = detector.blind_rows(1)
    assert [(row["rule"], row["steps"]) for row in rows] == [
        (row["rule"], row["steps"][:1]) for row in PUBLISHED["blind"]
    ]


@pytest.mark.parametrize("norms", detector.SEQUENCES[-2:], ids=lambda norms: norms.name)
def test_shares_come_out_as_published(norms):
    sequence = norms.draw(torch.Generator().manual_seed(0), PUBLISHED["steps"]).tolist()
    shares = {name: detector.DETECTORS[name](sequence)[norms.ignored :] for name in detector.RULES}
    published = {row["detector"]: row["shares"][0] for row in PUBLISHED["rows"] if row["sequence"] == norms.name}
    assert {name: sum(spikes) / len(spikes) for name, spikes in shares.items()} == {
        name: published[name] for name in detector.RULES
    }


def test_the_histories_are_logs_too():
    for path in FOLDER.glob("*.json"):
        history, log = load_history(path), read_norms(path)
        assert str(log.norms) == str(list(history.norms))
        assert log.steps[:2] == [history.logging_steps, 2 * history.logging_steps]


def test_a_run_of_the_benchmarks_is_a_log_too(tmp_path):
    norms = [1.0, math.nan, 2.0]
    records = [
        StepRecord("paper", step, 10, 2.0, 0.1, None, norm, norm, math.inf, False, False, math.nan, 1.0, 0.1, 5.0)
        for step, norm in enumerate(norms, 1)
    ]
    write_records(tmp_path / "train.jsonl", records)
    log = read_norms(tmp_path / "train.jsonl")
    assert (str(log.norms), log.steps, log.rows_without) == ("[1.0, nan, 2.0]", [1, 2, 3], 0)
