"""Logs of training runs: the rows of the files that loggers leave, and the gradient norms in them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Record: TypeAlias = Mapping[str, Any]

NORM = "grad_norm"  # after any prefix
ALWAYS = "clip_coef"  # is logged also of a step whose norms are no numbers
STEP_KEYS = (  # the last two are W&B's
    "step",
    "global_step",
    "trainer/global_step",
    "train/global_step",
    "Step",
    "_step",
)
KINDS = "a log is a CSV file with a header, JSON-lines, or the trainer_state.json of a Trainer"
LISTED = 20  # columns that an error names


class NormLog(NamedTuple):
    """The gradient norms of a run as they were logged, in the order of the file.

    column: where they stood. norms: in gradient-norm units, >= 0; NaN or infinite where the log says so. steps: of each
    norm. has_steps: whether they were logged; else norms are counted, from 1 on. rows_without: rows that tell of other
    things. nulls: norms that were JSON's null, which strict JSON has for NaN. interval_max_norm: the largest that was
    logged of the steps between two rows; NaN if none was.
    """

    column: str
    norms: list[float]
    steps: list[float]
    has_steps: bool
    rows_without: int
    nulls: int
    interval_max_norm: float = math.nan

    @property
    def interval(self) -> float:
        """Steps from one row to the next, most often; 1 where they were not logged."""
        differences = [after - before for before, after in itertools.pairwise(self.steps) if after > before]
        return statistics.median_low(differences or [1.0]) if self.has_steps else 1.0


def read_records(path: str | PathLike[str]) -> list[Record]:
    """The rows of a log.

    Args:
        path: a CSV file with a header, JSON-lines, a Trainer's ``trainer_state.json`` (its ``log_history``), a JSON
            list of rows, or a JSON object of columns, as lists.

    Returns:
        One mapping per row. Cells of CSV are strings, empty where nothing was logged.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, no CSV, or has a line that is no JSON object; names the file and the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 2.0}\\n{"step": 2, "loss": 1.9}\\n')
        >>> [row["loss"] for row in read_records(path)]
        [2.0, 1.9]
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    return _read_json(text, path) if text.lstrip().startswith(("{", "[")) else _read_csv(text, path)


def _read_json(text: str, path: str | PathLike[str]) -> list[Record]:
    try:
        document, end = json.JSONDecoder().raw_decode(text.strip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if end == len(text.strip()):
        return _rows_of(document, path)
    lines = enumerate(text.split("\n"), 1)
    return [_parse_line(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _read_csv(text: str, path: str | PathLike[str]) -> list[Record]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def _parse_line(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object: {line[:80]}")
    return record


def _rows_of(document: Any, path: str | PathLike[str]) -> list[Record]:
    """Of a file that is one piece of JSON: a Trainer's state, rows, columns, or a single row."""
    rows = document if isinstance(document, list) else document.get("log_history")
    if rows is not None:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is JSON, but its rows are not a list of objects")
        return rows
    columns = {name: values for name, values in document.items() if isinstance(values, list)}
    if not columns:
        return [document]
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"the columns of {path} differ in length: {lengths}")
    every = document.get("logging_steps")  # as the Trainer calls it
    if isinstance(every, int) and "step" not in columns:
        columns["step"] = [every * (i + 1) for i in range(len(next(iter(columns.values()))))]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read_norms(path: str | PathLike[str], column: str | None = None) -> NormLog:
    """The gradient norms in a log. A row whose cell is empty, or that lacks the key, tells of no step.

    Args:
        path: as for `read_records`.
        column: where they are; None: the one that ends in "grad_norm", whatever stands before.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed; there is no such column, or several; a value is below 0 or no number, or none is
            finite and above 0. Names the row or the columns.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("step,train/grad_norm,val_loss\\n10,0.5,\\n10,,2.1\\n20,nan,\\n")
        >>> read_norms(path)  # doctest: +NORMALIZE_WHITESPACE
        NormLog(column='train/grad_norm', norms=[0.5, nan], steps=[10.0, 20.0], has_steps=True, rows_without=1, nulls=0,
            interval_max_norm=nan)
    """
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} has no rows: {KINDS}")
    column = _find_column(records, column, path)
    found = [(record, _norm_in(record, column, f"row {i} of {path}")) for i, record in enumerate(records, 1)]
    rows = [record for record, norm in found if norm is not None]
    norms = [norm for _, norm in found if norm is not None]
    if not any(0 < norm < math.inf for norm in norms):
        raise ValueError(f"{path} has no norm under {column!r} that is finite and above 0")
    prefix = column.removesuffix(NORM)
    steps = [step for row in rows if (step := logged_step(row, prefix)) is not None]
    has_steps = len(steps) == len(norms)
    between = [norm for row in rows if (norm := as_number(row.get(f"{prefix}interval_max_norm"))) is not None]
    return NormLog(
        column=column,
        norms=norms,
        steps=steps if has_steps else [float(i) for i, _ in enumerate(norms, 1)],
        has_steps=has_steps,
        rows_without=len(records) - len(norms),
        nulls=sum(column in row and row[column] is None for row in rows),
        interval_max_norm=max(filter(math.isfinite, between), default=math.nan),
    )


def _find_column(records: Sequence[Record], wanted: str | None, path: str | PathLike[str]) -> str:
    """The column that is wanted, or `NORM`, or the only one with that after a separator, or else after anything."""
    columns = [key for key in dict.fromkeys(key for record in records for key in record) if isinstance(key, str)]
    known = f"the columns are {', '.join(columns[:LISTED])}"
    if len(columns) > LISTED:
        known += f" and {len(columns) - LISTED} more"
    wanted = NORM if wanted is None and NORM in columns else wanted
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path} has no column {wanted!r}; {known}")
        return wanted
    fitting = [name for name in columns if re.search(rf"\W{NORM}$", name)]
    fitting = fitting or [name for name in columns if name.endswith(NORM)]
    if not fitting:
        raise ValueError(f"{path} has no column that ends in {NORM!r}; name one with --column: {known}")
    if len(fitting) > 1:
        raise ValueError(f"{path} has several columns that end in {NORM!r}; choose with --column: {', '.join(fitting)}")
    return fitting[0]


def _norm_in(record: Record, column: str, place: str) -> float | None:
    """The norm of a row; None if it tells of no step."""
    value = record.get(column, "")
    if value is None:
        return math.nan
    if isinstance(value, str) and not value.strip():
        # `ClipMetrics.as_dict` leaves out a norm that is not finite
        return math.nan if as_number(record.get(column.removesuffix(NORM) + ALWAYS)) is not None else None
    norm = as_number(value)
    if norm is None or isinstance(value, bool):
        raise ValueError(f"{place}: {column} is {value!r}, which is no number")
    if norm < 0:
        raise ValueError(f"{place}: {column} is {value}, and a norm is at least 0")
    return norm


def as_number(value: Any) -> float | None:
    """The value as a float; None for what is missing (loggers leave empty cells) or no number."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def logged_step(record: Record, prefix: str) -> float | None:
    """The logger's step, else the steps that ZClip has counted under this prefix."""
    logged = (as_number(record.get(key)) for key in STEP_KEYS)
    counted, skipped = (as_number(record.get(prefix + name)) for name in ("step", "skipped_steps"))
    else_counted = None if counted is None else counted + (skipped or 0.0)
    return next((step for step in logged if step is not None and math.isfinite(step)), else_counted)
