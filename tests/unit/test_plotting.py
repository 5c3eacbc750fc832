"""The picture of a run, from records and from the files that loggers write."""

import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from training import make_model, set_gradients

from zclip_optim import ParameterNorm, ZClip, ZClipOptimizer
from zclip_optim.plotting import main, plot_history, plot_norms_by_parameter, read_records

SPIKE, NAN = 30, 35


@pytest.fixture(scope="module")
def records():
    """Rows of `as_dict`, a spike and a NaN among them."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), warmup_steps=10)
    rows = []
    for step in range(40):
        norm = 50.0 if step == SPIKE else 1.0 + 0.1 * (step % 3)
        set_gradients(model.parameters(), norm)
        if step == NAN:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        rows.append(optimizer.metrics.as_dict())
    return rows


def logged(rows):
    """As a trainer's logger has them: its own step, a loss, no counters."""
    kept = ("grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate")
    return [
        {
            "step": 10 * i,
            "train_loss": 1 / (1 + i),
            **{name: row[name] for name in (f"zclip/{name}" for name in kept) if name in row},
        }
        for i, row in enumerate(rows)
    ]


def write_csv(path, rows):
    with open(path, "w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, list({key: None for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


def lines(axes):
    """The drawn lines by their label, without the count in it."""
    return {line.get_label().split(" (")[0]: line for line in axes.lines}


def test_norms_band_and_marks(records):
    (axes,) = plot_history(records).axes
    drawn = lines(axes)
    assert axes.get_yscale() == "log"
    norms = drawn["before clipping"].get_ydata()
    assert norms[SPIKE] == pytest.approx(50)
    assert math.isnan(norms[NAN])
    assert drawn["after clipping"].get_ydata()[SPIKE] < 2
    assert list(drawn["clipped"].get_xdata()) == [SPIKE + 1]
    assert list(drawn["skipped"].get_xdata()) == [NAN + 1] * 2
    assert list(drawn["running mean"].get_ydata()) == [row["zclip/mean"] for row in records]
    (band,) = axes.collections
    assert band.get_label() == "mean to spike threshold"
    top = max(path.get_extents().y1 for path in band.get_paths())
    assert 1.2 < top < 2  # not the 50 of the spike, nor the infinity of the warm-up


def test_the_band_ends_at_mean_plus_z_thresh_sigma_of_the_step_before(records):
    (axes,) = plot_history(records).axes
    top = axes.lines[0].get_ydata()
    before = records[SPIKE - 2]
    assert top[SPIKE - 1] == pytest.approx(before["zclip/mean"] + 2.5 * before["zclip/std"], rel=1e-4)
    assert top[SPIKE] == top[SPIKE - 1]


class TestBetweenRows:
    """A run of which every tenth step is logged."""

    def rows(self, changes, every=10, **options):
        clipper, rows = ZClip(warmup_steps=5, **options), []
        for step in range(1, 61):
            clipper.decide(changes.get(step, 1.0 + 0.1 * (step % 3)))
            if step % every == 0:
                rows.append({"step": step, **clipper.metrics.as_dict()})
        return rows

    def test_a_spike_is_a_peak_half_way(self):
        rows = self.rows({23: 30.0, 27: 50.0, 33: math.nan})
        drawn = lines(*plot_history(rows).axes)
        assert "clipped" not in drawn
        peaks = drawn["spikes between rows"]
        assert (peaks.get_label(), *map(list, peaks.get_data())) == ("spikes between rows (2)", [25], [50.0])
        steps, norms = drawn["before clipping"].get_data()
        assert list(steps) == [10, 20, 25, 30, 40, 50, 60]
        assert list(norms[:4]) == [*(row["zclip/grad_norm"] for row in rows[:2]), 50.0, rows[2]["zclip/grad_norm"]]
        assert list(drawn["after clipping"].get_xdata()) == [10, 20, 30, 40, 50, 60]

    def test_so_is_one_before_a_row_without_a_norm(self):
        drawn = lines(*plot_history(self.rows({23: 50.0, 30: math.nan})).axes)
        assert list(drawn["spikes between rows"].get_ydata()) == [50.0]
        assert list(drawn["skipped"].get_xdata()) == [30, 30]

    def test_skipped_steps_are_counted(self):
        (axes,) = plot_history(self.rows({32: math.nan, 33: math.nan, 40: math.nan, 47: math.nan})).axes
        marks = [line for line in axes.lines if line.get_color() == lines(axes)["skipped"].get_color()]
        assert [line.get_xdata()[0] for line in marks] == [40, 35, 35, 45]
        assert marks[0].get_label() == "skipped (4)"

    def test_what_the_row_itself_shows_is_not_drawn_twice(self):
        drawn = lines(*plot_history(self.rows({23: 30.0, 30: 50.0})).axes)
        assert "spikes between rows" not in drawn
        assert list(drawn["clipped"].get_xdata()) == [30]

    def test_in_the_first_row_it_is_where_that_is(self):
        drawn = lines(*plot_history(self.rows({8: 50.0})).axes)
        assert list(drawn["spikes between rows"].get_xdata()) == [10]

    def test_a_larger_norm_that_is_no_spike_is_none(self):
        drawn = lines(*plot_history(self.rows({3: 1.8}, max_grad_norm=1.0)).axes)  # of the warm-up
        assert "spikes between rows" not in drawn


def test_loss_and_steps_of_the_logger(records):
    loss, norm = plot_history(logged(records)).axes
    assert loss.get_title(loc="left") == "Training loss"
    assert list(loss.lines[0].get_xdata()) == list(range(0, 400, 10))
    assert list(lines(norm)["clipped"].get_xdata()) == [10 * SPIKE]
    assert list(lines(norm)["skipped"].get_xdata()) == [10 * NAN] * 2


@pytest.mark.parametrize(
    ("losses", "scale"), [((2.0, 1.0, 9.0), "linear"), ((2.0, 1.0, 11.0), "log"), ((2.0, -0.1, 11.0), "linear")]
)
def test_a_loss_over_more_than_a_decade_is_on_a_log_axis(losses, scale):
    rows = [{"loss": loss, "grad_norm": 1.0, "clipped_norm": 1.0} for loss in (*losses, math.nan)]
    assert plot_history(rows).axes[0].get_yscale() == scale


def test_many_marks_do_not_hide_the_lines():
    few, many = ([{"grad_norm": 2.0 + i % 2, "clipped_norm": 1.0} for i in range(steps)] for steps in (10, 1000))
    sizes = []
    for rows in (few, many):
        drawn = lines(plot_history(rows).axes[0])
        assert drawn["clipped"].get_zorder() < drawn["before clipping"].get_zorder()
        sizes.append(drawn["clipped"].get_markersize())
    assert sizes[0] > 2 * sizes[1]


def test_the_legend_is_below_the_title(records):
    (axes,) = plot_history(records).axes
    axes.figure.draw_without_rendering()
    title, legend = axes.title, axes.get_legend().get_window_extent()
    (title,) = (text for text in axes.get_children() if getattr(text, "get_text", str)() == "Gradient norm")
    assert axes.bbox.y1 <= legend.y0 < legend.y1 <= title.get_window_extent().y0


@pytest.mark.parametrize("prefix", ["", "zclip/", "train/zclip/", "clip."])
def test_any_prefix(records, prefix):
    rows = [{key.replace("zclip/", prefix): value for key, value in row.items()} for row in records]
    assert "clipped" in lines(plot_history(rows).axes[0])


def test_only_the_norms_are_needed():
    rows = [{"grad_norm": 1.0 + i, "clipped_norm": 1.0 + i} for i in range(5)]
    (axes,) = plot_history(rows).axes
    assert set(lines(axes)) == {"before clipping", "after clipping"}
    assert list(lines(axes)["before clipping"].get_xdata()) == [1, 2, 3, 4, 5]


def test_a_panel_for_each_optimizer():
    row = {"zclip/0/grad_norm": 1.0, "zclip/0/clipped_norm": 1.0, "zclip/1/grad_norm": 2.0, "zclip/1/clipped_norm": 2.0}
    titles = [axes.get_title(loc="left") for axes in plot_history([row, row]).axes]
    assert titles == ["Gradient norm zclip/0", "Gradient norm zclip/1"]


class TestNormsByParameter:
    def drawn(self, axes):
        """Name, length of the bar and label, from top to bottom."""
        names = [label.get_text() for label in axes.get_yticklabels()]
        rows = zip(axes.patches, names, axes.texts, strict=True)
        heights = axes.transData.transform([(0, bar.get_y()) for bar in axes.patches])[:, 1]
        assert list(heights) == sorted(heights, reverse=True)
        return [(name, pytest.approx(bar.get_width()), text.get_text()) for bar, name, text in rows]

    def test_a_bar_for_each_share_the_largest_on_top(self, tmp_path):
        model = make_model()
        set_gradients(model.parameters(), 2.0)
        norms = ZClip().norms_by_parameter(model)
        (axes,) = plot_norms_by_parameter(norms, tmp_path / "norms.png").axes
        assert self.drawn(axes) == [(name, 100 * share, f"{share:.1%}") for name, _, share in norms]
        assert len(norms) == 4
        assert "share of the squared gradient norm" in axes.get_xlabel()
        assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_not_finite_has_no_bar_and_what_is_tiny_is_no_zero(self):
        values = [("nan", math.nan, math.nan), ("large", 1.0, 0.9999), ("tiny", 0.01, 0.0001), ("zero", 0.0, 0.0)]
        (axes,) = plot_norms_by_parameter([ParameterNorm(*each) for each in values]).axes
        assert self.drawn(axes) == [
            ("nan", 0, "nan"),
            ("large", 99.99, "100.0%"),
            ("tiny", 0.01, "<0.1%"),
            ("zero", 0, "0.0%"),
        ]

    def test_long_names_leave_room_for_the_bars(self, tmp_path):
        norms = [ParameterNorm("base_model.model.layers.31.self_attn.q_proj.lora_A.default.weight" * 2, 1.0, 1.0)]
        (axes,) = plot_norms_by_parameter(norms, tmp_path / "norms.png").axes
        assert axes.get_window_extent().width > 300  # pixels; warnings are errors here

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no parameter had a gradient"):
            plot_norms_by_parameter([])


class TestFiles:
    def test_csv_with_the_empty_cells_of_lightning(self, records, tmp_path):
        """Its rows of other intervals lack some of the columns."""
        path = tmp_path / "metrics.csv"
        rows = logged(records)
        sparse = [row if i % 2 else {**dict.fromkeys(row, ""), "step": row["step"]} for i, row in enumerate(rows)]
        write_csv(path, sparse)
        loss, norm = plot_history(path).axes
        assert list(lines(norm)["before clipping"].get_xdata()) == list(range(10, 400, 20))
        assert len(loss.lines[0].get_xdata()) == 20

    def test_json_lines(self, records, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in logged(records)), encoding="utf8")
        assert len(read_records(path)) == 40
        assert len(plot_history(str(path)).axes) == 2

    def test_trainer_state(self, records, tmp_path):
        path = tmp_path / "trainer_state.json"
        summary = {"train_loss": 0.5, "train_runtime": 1.0, "step": 400}
        history = [{**row, "loss": row["train_loss"], "grad_norm": 3.0} for row in logged(records)]
        path.write_text(json.dumps({"global_step": 40, "log_history": [*history, summary]}), encoding="utf8")
        loss, norm = plot_history(path).axes
        assert len(loss.lines[0].get_xdata()) == 40
        assert lines(norm)["before clipping"].get_ydata()[SPIKE] == pytest.approx(50)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", "there are no records"),
            (
                "step,loss\n1,2.0\n",
                "no record has both <prefix>grad_norm and <prefix>clipped_norm; the keys are step, loss",
            ),
            ("zclip/grad_norm,zclip/clipped_norm\n,1.0\n", "no record has both"),
            ('{"a": 1}\n{"a": \n', "line 2 of .* is not JSON"),
            ('{"a": 1}\n[1]\n', "line 2 of .* is not a JSON object"),
        ],
    )
    def test_errors(self, text, error, tmp_path):
        path = tmp_path / "metrics"
        path.write_text(text, encoding="utf8")
        with pytest.raises(ValueError, match=error):
            plot_history(path)


class TestCommand:
    def test_writes_the_picture(self, records, tmp_path):
        write_csv(tmp_path / "metrics.csv", logged(records))
        command = [sys.executable, "-m", "zclip_optim.plotting", tmp_path / "metrics.csv", "-o", tmp_path / "zclip.png"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert (tmp_path / "zclip.png").read_bytes().startswith(b"\x89PNG")

    def test_a_file_that_is_not_there_is_an_error_in_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / "metrics.csv")])
        assert "error: [Errno 2] No such file or directory" in capsys.readouterr().err
