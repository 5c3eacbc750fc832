"""`python -m benchmarks [COMMAND] [OPTIONS]`: the command line, and nothing else."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from benchmarks import UserError

# A command is a module with `add_arguments(parser)` and `run(args)`; its docstring is the description in --help.
# One that writes NAME.json has `page(result)` too: NAME.md, from what is in NAME.json.
COMMANDS = {
    "compare": "benchmarks.compare",
    "faults": "benchmarks.faults",
    "detector": "benchmarks.detector",
    "instability": "benchmarks.instability",
    "regret": "benchmarks.regret",
    "defaults": "benchmarks.defaults",
    "readme": "benchmarks.readme",
    "overhead": "benchmarks.overhead",
    "gpu": "benchmarks.gpu",
    "train": "benchmarks.train",
    "sweep": "benchmarks.sweep",
    "plot": "benchmarks.plot",
}
DEFAULT = "compare"
BAD_USE, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        fail(message)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"benchmarks: error: {message}", file=sys.stderr)
    sys.exit(BAD_USE)


def run_command(argv: Sequence[str]) -> None:
    """Runs the command named first in `argv`, or the default one."""
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else (DEFAULT, argv)
    command = importlib.import_module(COMMANDS[name])
    parser = Parser(
        prog="python -m benchmarks" if name == DEFAULT else f"python -m benchmarks {name}",
        description=command.__doc__,
        epilog=f"commands: {', '.join(COMMANDS)} (default: {DEFAULT})",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_arguments(parser)
    command.run(parser.parse_args(rest))


def main() -> None:
    """Turns what can go wrong on the user's side into a line and an exit code."""
    try:
        run_command(sys.argv[1:])
    except UserError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"the module {error.name!r} is missing; the benchmarks need: pip install -e '.[bench]'")
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
