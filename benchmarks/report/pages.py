"""A result as a page of Markdown: written beside its JSON, from what is in it and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report.summary import finite, write_json

Result = Mapping[str, Any]  # as it stands in NAME.json: null for what is not finite
Item = TypeVar("Item")


def write_result(path: Path, result: Mapping[str, object], page: Callable[[Result], str]) -> None:
    """The result as strict JSON, and beside it the page that `page` makes of that JSON."""
    plain: Any = finite(result)
    write_json(path, plain)
    path.with_suffix(".md").write_text(page(plain), encoding="utf8")


def document(title: str, result: Result, *sections: str) -> str:
    """A page: title, a remark on the result if it has one, sections, and where the numbers come from."""
    remark = [result["remark"]] if "remark" in result else []
    return "\n\n".join((f"# {title}", *remark, *sections, origin(result))) + "\n"


def bullets(notes: Sequence[str]) -> str:
    """One point for each note."""
    return "\n".join(f"- {note}" for note in notes)


def origin(result: Result) -> str:
    """Command, seeds, machine and versions."""
    machine = result["machine"]
    device = f", {machine['gpu']}" if "gpu" in machine else ""
    took = f" {result['seconds']:,.0f} s in all." if "seconds" in result else ""
    return (
        f"`{result['command']}`, {seeds(result['seeds'])}. {machine['cpu']}, {machine['cores']} cores, threads: "
        f"{machine['threads']}{device}, {machine['system']}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}.{took} "
        "All numbers, unrounded: the JSON file of this name."
    )


def seeds(values: Sequence[int]) -> str:
    """The seeds in words."""
    if len(values) == 1:
        return f"seed {values[0]}"
    if list(values) == list(range(values[0], values[-1] + 1)):
        return f"seeds {values[0]} to {values[-1]}"
    return f"seeds {', '.join(map(str, values))}"


def setup(result: Result) -> str:
    """Model, data and optimizer of a result with a `config`; one of before there were architectures is of a llama."""
    config = result["config"]
    model = config["model"]
    return (
        f"Model: {config.get('architecture', 'llama')}, hidden {model['hidden']}, {model['n_layers']} layers, context "
        f"{model['context']}. Data: {result['data']}. {config['steps']:,} steps of {config['batch']} examples. "
        f"AdamW: betas {' / '.join(map(str, config['betas']))}, eps {config['eps']:g}, weight decay "
        f"{config['weight_decay']:g}; peak rate {config['lr']:g}, linear warm-up over {config['warmup_share']:.0%} of "
        f"the steps, cosine to {config['final_lr_share']:.0%}."
    )


def restored(kind: type[Item], row: Mapping[str, Any]) -> Item:
    """A row as the dataclass that it was: null in a field of type float stands for NaN, in others for None."""
    floats = {field.name for field in fields(kind) if field.type in ("float", float)}
    return kind(
        **{
            field.name: math.nan if row[field.name] is None and field.name in floats else row[field.name]
            for field in fields(kind)
        }
    )
