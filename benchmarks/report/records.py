"""A run's JSON lines: one record per step, strict JSON, null for what is not a finite number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks import UserError
from benchmarks.report.summary import strict_json
from benchmarks.training.run import StepRecord

NAMES = [field.name for field in fields(StepRecord)]
INFINITE = {"threshold"}  # null stands for no threshold; elsewhere for NaN


def line(record: StepRecord) -> str:
    """One record as a line, with its end."""
    return strict_json(asdict(record)) + "\n"


def write_records(path: Path, records: Iterable[StepRecord]) -> None:
    """All records of a run."""
    path.write_text("".join(map(line, records)))


def read_records(path: Path) -> list[StepRecord]:
    """The records of a file; fields that are not a StepRecord's are left out.

    Raises:
        UserError: there is no such file, it is empty, or a line is not such a record.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a step that was being written when the run was stopped
    if not lines:
        raise UserError(f"{path}: no steps in it")
    records = []
    for number, text in enumerate(lines, start=1):
        try:
            fields_ = json.loads(text)
            records.append(StepRecord(**{name: number_of(name, fields_[name]) for name in NAMES}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a step of a run ({error!r})") from error
    return records


def number_of(name: str, value: object) -> object:
    """The value of a field, with what null stands for put back."""
    if value is not None or name == "corrupted":
        return value
    return math.inf if name in INFINITE else math.nan
