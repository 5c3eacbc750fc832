"""What ZClip would have done in a run that there is already, from the gradient norms in its log.

    python -m zclip_optim.replay metrics.csv --lookback 0.1 -o replay.png

Reads a CSV file with a header (Lightning's metrics.csv, an export of W&B), JSON-lines, or a Trainer's
trainer_state.json. Prints how many steps would have been scaled and what the largest spikes would have been clipped to,
beside what clip_grad_norm_ would have done; -o draws it. A replay cannot show how the run would have gone on.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from zclip_optim.algorithm import ZClipConfig
from zclip_optim.health import Health, must_stop
from zclip_optim.logs import NormLog, read_norms
from zclip_optim.metrics import ClipMetrics
from zclip_optim.optimizer import ZClipOptimizer
from zclip_optim.plotting import SKIPPED, plot_history
from zclip_optim.replay import step_records
from zclip_optim.replay.report import CAVEAT, about_log, about_spikes, about_steps
from zclip_optim.state import fresh_records

DEFAULTS = {field.name: field.default for field in dataclasses.fields(ZClipConfig) if field.name != "scope"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> Parser:
    """The command line; the options of the rule are the fields of `ZClipConfig`, in the words of `ZClipOptimizer`."""
    parser = Parser("python -m zclip_optim.replay", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("log", metavar="LOG", help="CSV, JSON-lines or trainer_state.json")
    parser.add_argument("--column", metavar="NAME", help="of the norms; default: the one that ends in grad_norm")
    parser.add_argument(
        "--fixed", type=threshold, default=1.0, metavar="NORM", help="of clip_grad_norm_, to compare; default: 1.0"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="figure to write; the suffix gives the format")
    rule, meanings = parser.add_argument_group("options of the rule"), arguments_of(ZClipOptimizer)
    for name, default in DEFAULTS.items():
        flag, meaning = "--" + name.replace("_", "-"), meanings.get(name, "").replace("%", "%%")
        if isinstance(default, bool):
            rule.add_argument(flag, action="store_true", help=meaning)
        else:
            rule.add_argument(flag, type=value, default=default, metavar="VALUE", help=f"{meaning} Default: {default}.")
    return parser


def arguments_of(documented: type) -> dict[str, str]:
    """What the docstring of a class says of each argument."""
    section = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


def value(text: str) -> Any:
    """As Python writes it; a bare word is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def threshold(text: str) -> float:
    """A norm to clip at."""
    norm = value(text)
    if not isinstance(norm, (int, float)) or not 0 < norm < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return float(norm)


class Replayed(NamedTuple):
    """What goes with the metrics in training.

    warned: the warnings that it would have given. stop: index of the step at which it would have ended with
    `NonFiniteGradientError`; None if it would not.
    """

    metrics: list[ClipMetrics]
    warned: list[str]
    stop: int | None


def replay_as_watched(norms: Sequence[float], config: ZClipConfig) -> Replayed:
    """The same as `replay`, with what else training would have said."""
    health, metrics, stop = Health(config, fresh_records(None)), [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index, record in enumerate(step_records(norms, config)):
            health.check([record])
            metrics.append(ClipMetrics.of(record, config.warmup_steps))
            stop = index if stop is None and must_stop(record, config) else stop
    return Replayed(metrics, [str(each.message) for each in caught], stop)


def report(log: NormLog, done: Replayed, options: Mapping[str, Any], fixed: float) -> str:
    """All that is printed."""
    changed = ", ".join(f"{name}={each!r}" for name, each in options.items() if each != DEFAULTS[name])
    rule = f"ZClip with {changed}, otherwise its defaults:" if changed else "ZClip with its defaults:"
    parts = [[*about_log(log)], [rule, *about_steps(done.metrics, fixed)]]
    if done.stop is not None and log.interval == 1:
        reason = ", ".join(f"{name}={options[name]!r}" for name in ("nonfinite", "max_consecutive_nonfinite"))
        end = f"Training would have ended at step {log.steps[done.stop]:,.10g} with NonFiniteGradientError ({reason})."
        parts.append([end])
    if done.warned and log.interval == 1:  # else rows would be taken for steps
        parts.append(["Training would have warned (steps are finite norms seen):", *(f"- {t}" for t in done.warned)])
    parts += [[*about_spikes(done.metrics, log.steps, fixed)], [CAVEAT]]
    return "\n\n".join("\n".join(lines) for lines in parts)


def draw(log: NormLog, metrics: Sequence[ClipMetrics], name: str, path: str) -> None:
    """The picture of a replay of the log called `name`."""
    goes_back = sorted(log.steps) != log.steps
    places = range(1, len(metrics) + 1) if goes_back else log.steps
    figure = plot_history([{"step": place, **m.as_dict()} for place, m in zip(places, metrics, strict=True)])
    (axes,) = figure.axes
    axes.set_xlabel(f"{'number of the norm (steps go back)' if goes_back else 'step'}, replayed from {name}")
    spikes = [(place, m.grad_norm) for place, m in zip(places, metrics, strict=True) if m.is_spike]
    if spikes and any(m.clipped and not m.is_spike for m in metrics):  # by the cap, which hides them among the others
        label = f"spike ({len(spikes)})"
        circles = axes.plot(*zip(*spikes, strict=True), "o", color=SKIPPED, fillstyle="none", markersize=8, label=label)
        figure.legend(handles=circles, loc="lower right", borderaxespad=0.2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in DEFAULTS}
    try:
        config, log = ZClipConfig(**options), read_norms(given.log, given.column)
        done = replay_as_watched(log.norms, config)
        if given.out is not None:
            draw(log, done.metrics, Path(given.log).name, given.out)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    written = "" if given.out is None else f"\n\nwritten: {given.out}"
    text = f"{given.log}: {report(log, done, options, given.fixed)}{written}\n"
    sys.stdout.write(text)  # at once, so that `| head` is no error


if __name__ == "__main__":
    main()
