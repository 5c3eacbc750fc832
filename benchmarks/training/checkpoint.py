"""A run's checkpoints, with torch.distributed.checkpoint: any strategy and number of processes can go on from one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks import UserError
from benchmarks.training.run import Run

# What a training must have in common with the checkpoint that it goes on from.
FIXED = ("method", "data", "architecture", "preset", "steps", "lr", "seed", "batch", "corrupt")


def save(run: Run, folder: Path) -> None:
    """Writes all that `load` needs."""
    with quiet():
        dcp.save(tensors(run) | {"about": json.dumps(about(run))}, checkpoint_id=folder)


def load(run: Run, folder: Path) -> None:
    """Takes over the state of a checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is of another training.
    """
    if not (folder / ".metadata").is_file():
        raise UserError(f"--resume {folder}: no checkpoint there")
    text: dict[str, Any] = {"about": ""}
    with quiet():
        dcp.load(text, checkpoint_id=folder)
    saved, current = json.loads(text["about"]), about(run)
    for name in FIXED:
        if saved[name] != current[name]:
            raise UserError(f"--resume {folder}: saved with {name} {saved[name]}, not {current[name]}")
    with quiet():
        state = tensors(run)
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        run.model, run.stepper.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    run.schedulers[0].load_state_dict(state["scheduler"])
    run.stepper.load(saved["clipper"])
    run.taken = saved["taken"]


def tensors(run: Run) -> dict[str, Any]:
    """What has a state dict."""
    model, optimizer = get_state_dict(run.model, run.stepper.optimizer)
    return {"model": model, "optimizer": optimizer, "scheduler": run.schedulers[0].state_dict()}


def about(run: Run) -> dict[str, Any]:
    """What a run is, how far it has come, and what its method keeps outside the optimizer."""
    config = run.config
    return {
        "method": [run.method.name, dict(run.method.options)],
        "data": run.batches.source,
        "architecture": config.architecture,
        "preset": config.preset,
        "steps": config.steps,
        "lr": config.lr,
        "seed": config.seed,
        "batch": config.batch,
        "corrupt": config.corrupt,
        "taken": run.taken,
        "clipper": run.stepper.state(),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks on checkpoints of one process, on ones written again, and on its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
        yield
