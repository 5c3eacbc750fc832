"""A picture of a training run from its logged metrics: loss, gradient norms, threshold, clipped and skipped steps.

    python -m zclip_optim.plotting metrics.csv -o zclip.png

And one of a single step, from `norms_by_parameter`: which parameters the norm came from.

Needs the extra `plot`; matplotlib is imported on use.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from zclip_optim.logs import ALWAYS, Record, logged_step, read_records
from zclip_optim.logs import as_number as _number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from zclip_optim.metrics import ParameterNorm

REQUIRED = ("grad_norm", "clipped_norm")
LOSS_KEYS = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step", "train/loss_step")
BEFORE, AFTER, THRESHOLD, CLIPPED, SKIPPED = "#999999", "#1769c2", "#2a9d4a", "#e07b00", "#c0392b"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.01,
    "axes.titlesize": 10,
    "font.size": 9,
}
DECADE = 10.0  # losses that differ by more have a log axis


def plot_history(
    records_or_path: Sequence[Record] | str | PathLike[str], path: str | PathLike[str] | None = None
) -> Figure:
    """Draw the loss, if it was logged, and the gradient norm before and after clipping.

    The band reaches from the running mean up to mean + z_thresh * std, above which a norm is a spike: the threshold
    that ordinary steps log. Clipped and skipped steps are marked. Where the rows are several steps apart and have the
    ``interval_*`` values, the largest spike between two of them is drawn half way, as it is not known where it was.
    Optimizers that were logged apart get a panel each. Norms have a log axis, and so has a loss whose values differ by
    more than a factor of 10.

    Args:
        records_or_path: one mapping per logged step, such as `ClipMetrics.as_dict()`, or a file of them: CSV
            (Lightning's CSVLogger), JSON-lines, or a Trainer's ``trainer_state.json``. The keys may have any prefix;
            `grad_norm` and `clipped_norm` are needed.
        path: where to save the figure; the suffix gives the format.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be read.
        ValueError: there are no records, or none has the metrics; names the keys that were found.

    Example:
        >>> rows = [{"zclip/grad_norm": 1.0 + i % 3, "zclip/clipped_norm": 1.0} for i in range(9)]
        >>> figure = plot_history(rows)
        >>> figure.axes[0].get_ylabel()
        'gradient norm (L2)'
    """
    mpl, new_figure = _matplotlib()
    records = _as_records(records_or_path)
    loss, prefixes = _find_loss(records), _find_prefixes(records)
    panels = len(prefixes) + (loss is not None)
    with mpl.rc_context(STYLE):
        figure = new_figure(figsize=(10, 1.2 + 2.6 * panels), layout="constrained")
        axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
        axes[-1].set_xlabel("step")
        if loss is not None:
            _loss_panel(axes.pop(0), loss)
        for panel, prefix in zip(axes, prefixes, strict=True):
            _norm_panel(panel, _History.of(records, prefix), prefix if len(prefixes) > 1 else "")
        if path is not None:
            figure.savefig(path, dpi=120)
    return figure


def plot_norms_by_parameter(norms: Sequence[ParameterNorm], path: str | PathLike[str] | None = None) -> Figure:
    """Draw a bar for each parameter, as long as its share of the squared gradient norm, the first of them on top.

    Args:
        norms: what `norms_by_parameter` returned. A parameter whose gradient is not finite has no bar, but its norm
            written where it would be.
        path: where to save the figure; the suffix gives the format.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no norms.

    Example:
        >>> import torch
        >>> from zclip_optim import ZClip
        >>> model = torch.nn.Linear(3, 1)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> figure = plot_norms_by_parameter(ZClip().norms_by_parameter(model))
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['weight', 'bias']
    """
    mpl, new_figure = _matplotlib()
    if not norms:
        raise ValueError("there are no norms: no parameter had a gradient, or it was gone when they were asked for")
    with mpl.rc_context(STYLE):
        width = 5 + max(len(each.name) for each in norms) / 12
        figure = new_figure(figsize=(width, 1.0 + 0.3 * len(norms)), layout="constrained")
        _share_panel(figure.subplots(), norms)
        if path is not None:
            figure.savefig(path, dpi=120)
    return figure


def _share_panel(axes: Axes, norms: Sequence[ParameterNorm]) -> None:
    lengths = [100 * each.share if math.isfinite(each.share) else 0.0 for each in norms]
    bars = axes.barh(range(len(norms)), lengths, color=AFTER)
    for each, label in zip(norms, axes.bar_label(bars, [_share_label(each) for each in norms], padding=3), strict=True):
        label.set_color("black" if math.isfinite(each.share) else SKIPPED)
    axes.set_yticks(range(len(norms)), [each.name for each in norms])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("share of the squared gradient norm (%)")


def _share_label(each: ParameterNorm) -> str:
    if not math.isfinite(each.share):
        return f"{each.norm}"
    return "<0.1%" if 0 < each.share < 0.0005 else f"{each.share:.1%}"


def _matplotlib() -> tuple[Any, type[Figure]]:
    """The package, and its figures, which are not pyplot's and open no window."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed; install it with: pip install 'zclip_optim[plot]'") from error
    return mpl, Figure


def _as_records(records_or_path: Sequence[Record] | str | PathLike[str]) -> Sequence[Record]:
    return read_records(records_or_path) if isinstance(records_or_path, (str, PathLike)) else records_or_path


class _Series(NamedTuple):
    """Values over steps."""

    steps: list[float]
    values: list[float]

    @staticmethod
    def of(records: Sequence[Record], key: str, steps: Sequence[float]) -> _Series:
        """The values under `key`, of the records that have it."""
        pairs = [(step, _number(r.get(key))) for step, r in zip(steps, records, strict=True)]
        kept = [(step, value) for step, value in pairs if value is not None]
        return _Series([step for step, _ in kept], [value for _, value in kept])


class _Peak(NamedTuple):
    """What is drawn between two rows, of steps of which neither is."""

    step: float
    norm: float
    spikes: float


class _History(NamedTuple):
    """What is drawn of one optimizer; each list has one value per logged step."""

    steps: list[float]
    grad_norm: list[float]
    clipped_norm: list[float]
    threshold: list[float]
    mean: list[float]
    skipped: list[bool]
    interval_max_norm: list[float]
    interval_spikes: list[float]
    interval_skips: list[float]

    @staticmethod
    def of(records: Sequence[Record], prefix: str) -> _History:
        """From the records that have the metrics under `prefix`."""
        rows = [r for r in records if _has_norms(r, prefix) or _number(r.get(prefix + ALWAYS)) is not None]

        def column(name: str) -> list[float]:
            values = (_number(row.get(prefix + name)) for row in rows)
            return [math.nan if value is None else value for value in values]

        norms, skipped = column("grad_norm"), column("skipped")
        return _History(
            steps=list(_steps(rows, prefix)),
            grad_norm=norms,
            clipped_norm=column("clipped_norm"),
            threshold=column("threshold"),
            mean=column("mean"),
            skipped=[
                not math.isfinite(norm) if math.isnan(s) else s > 0 for norm, s in zip(norms, skipped, strict=True)
            ],
            interval_max_norm=column("interval_max_norm"),
            interval_spikes=column("interval_spikes"),
            interval_skips=column("interval_skips"),
        )

    def clipped(self) -> list[bool]:
        """Which steps were scaled down."""
        return [after < before for before, after in zip(self.grad_norm, self.clipped_norm, strict=True)]

    def half_way(self) -> list[float]:
        """For each row the step between the row before and itself."""
        return [(step + last) / 2 for step, last in zip(self.steps, self.steps[:1] + self.steps, strict=False)]

    def peaks(self) -> list[_Peak | None]:
        """For each row the spikes since the row before, if the row's own norm is no number or not the largest."""
        rows = zip(self.half_way(), self.interval_max_norm, self.interval_spikes, self.grad_norm, strict=True)
        return [_Peak(step, norm, n) if n > 0 and not norm <= own else None for step, norm, n, own in rows]

    def before_clipping(self) -> _Series:
        """The norms of the rows, and those of the peaks between them."""
        steps, norms = [], []
        for step, norm, peak in zip(self.steps, self.grad_norm, self.peaks(), strict=True):
            steps += [step] if peak is None else [peak.step, step]
            norms += [norm] if peak is None else [peak.norm, norm]
        return _Series(steps, norms)

    def skipped_at(self) -> list[float]:
        """The steps that were skipped, of the rows and between them."""
        steps = []
        for step, between, own, n in zip(self.steps, self.half_way(), self.skipped, self.interval_skips, strict=True):
            steps += [step] * own + [between] * (int(n) - own if n > own else 0)
        return steps

    def band_top(self) -> list[float]:
        """The norm above which a step is a spike; a spike logs what it was clipped to, so there the last one stands."""
        top, last = [], math.nan
        for threshold, norm in zip(self.threshold, self.grad_norm, strict=True):
            last = threshold if norm <= threshold < math.inf else last
            top.append(last)
        return top


def _has_norms(record: Record, prefix: str) -> bool:
    return all(_number(record.get(prefix + name)) is not None for name in REQUIRED)


def _steps(records: Sequence[Record], prefix: str) -> Iterator[float]:
    """The steps as they were logged, else the position."""
    for position, record in enumerate(records, 1):
        step = logged_step(record, prefix)
        yield float(position) if step is None else step


def _find_prefixes(records: Sequence[Record]) -> list[str]:
    """The prefixes under which the required metrics are found, "zclip/" for one."""
    if not records:
        raise ValueError("there are no records to plot")
    keys = dict.fromkeys(str(key) for record in records for key in record)
    candidates = [key.removesuffix(REQUIRED[1]) for key in keys if key.endswith(REQUIRED[1])]
    prefixes = [prefix for prefix in candidates if any(_has_norms(record, prefix) for record in records)]
    if not prefixes:
        needed = " and ".join(f"<prefix>{name}" for name in REQUIRED)
        raise ValueError(f"no record has both {needed}; the keys are {', '.join(keys)}")
    return prefixes


def _find_loss(records: Sequence[Record]) -> _Series | None:
    """The training loss, over the logger's steps."""
    steps = list(_steps(records, ""))
    found = (_Series.of(records, key, steps) for key in LOSS_KEYS)
    return next((series for series in found if series.steps), None)


def _loss_panel(axes: Axes, loss: _Series) -> None:
    axes.plot(*loss, color=AFTER, linewidth=1)
    finite = [value for value in loss.values if math.isfinite(value)]
    if finite and max(finite) > DECADE * min(finite) > 0:
        axes.set_yscale("log")
    axes.set_title("Training loss", loc="left")
    axes.set_ylabel("loss")


def _norm_panel(axes: Axes, history: _History, name: str) -> None:
    """Norms, band and marks of one optimizer, on a log axis."""
    steps, before, after = history.steps, _drawable(history.grad_norm), _drawable(history.clipped_norm)
    mean, top = _drawable(history.mean), history.band_top()
    if any(map(math.isfinite, top)):
        axes.fill_between(steps, mean, top, color=THRESHOLD, alpha=0.18, linewidth=0, label="mean to spike threshold")
        axes.plot(steps, top, color=THRESHOLD, linewidth=0.8)
    if any(map(math.isfinite, mean)):
        axes.plot(steps, mean, color=THRESHOLD, linewidth=0.8, linestyle="--", label="running mean")
    line = history.before_clipping()
    axes.plot(line.steps, _drawable(line.values), color=BEFORE, linewidth=1, label="before clipping")
    axes.plot(steps, after, color=AFTER, linewidth=1, label="after clipping")
    clipped = [
        (step, norm) for step, norm, is_clipped in zip(steps, before, history.clipped(), strict=True) if is_clipped
    ]
    if clipped:
        (marks,) = axes.plot(*zip(*clipped, strict=True), "v", color=CLIPPED, label=f"clipped ({len(clipped)})")
        marks.set(markersize=max(1.5, min(4.0, 400 / len(clipped))), zorder=1.5)  # behind the lines
    if peaks := [peak for peak in history.peaks() if peak is not None]:
        places, norms, spikes = zip(*peaks, strict=True)
        between = f"spikes between rows ({sum(spikes):.0f})"
        axes.plot(places, norms, "v", color=CLIPPED, markerfacecolor="white", markersize=4, label=between)
    skipped = history.skipped_at()
    for index, step in enumerate(skipped):
        label = None if index else f"skipped ({len(skipped)})"
        axes.axvline(step, color=SKIPPED, linewidth=0.9, alpha=0.5, zorder=1, label=label)
    axes.set_yscale("log")
    axes.set_title(f"Gradient norm {name}".rstrip(" /"), loc="left", pad=22)  # above the legend
    axes.set_ylabel("gradient norm (L2)")
    spacing = {"handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1.1}  # seven entries fit in one row
    axes.legend(frameon=False, fontsize=8, ncols=7, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, **spacing)


def _drawable(values: Sequence[float]) -> list[float]:
    """The values with a gap (NaN) where there is nothing to draw on a log axis."""
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    description, _, _ = (plot_history.__doc__ or "").partition("Args:")
    parser = argparse.ArgumentParser(prog="python -m zclip_optim.plotting", description=description.strip())
    parser.add_argument("metrics", help="CSV, JSON-lines or trainer_state.json")
    parser.add_argument("-o", "--out", default="zclip.png", help="figure to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        plot_history(options.metrics, options.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
