"""What fails is named, and loses nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

SHOWN = 400  # characters of a reason

Done = TypeVar("Done")


@dataclass(frozen=True)
class LeftOut:
    """What is not in a result, and why."""

    what: str
    why: str


class NotTriedError(Exception):
    """It would be of no use; the message says why."""


def attempt(what: str, work: Callable[[], Done], left_out: list[LeftOut]) -> Done | None:
    """What `work` returns; where it fails None, with the reason in `left_out`."""
    try:
        return work()
    except Exception as error:  # out of memory, a driver too old for a kernel: whatever the device says
        left_out.append(LeftOut(what, reason(error)))
    torch.cuda.empty_cache()  # out here, where the traceback no longer holds tensors
    return None


def reason(error: Exception) -> str:
    """What went wrong, in full."""
    return str(error) if isinstance(error, NotTriedError) else f"{type(error).__name__}: {error}"


def one_line(text: str) -> str:
    """As much of it as a cell of a table holds."""
    return textwrap.shorten(text, SHOWN, placeholder=" ...").replace("|", "\\|")
