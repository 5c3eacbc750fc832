"""A run's norms through the rule: what training would have had, and what the command says of a log."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_algorithm import KINDS, OPTIONS, norm_sequence, some_options
from thoroughness import thorough
from training import make_model, set_gradients

from zclip_optim import NonFiniteGradientError, ZClip, ZClipConfig, ZClipOptimizer, ZClipWarning, replay
from zclip_optim.replay import __main__ as command
from zclip_optim.replay.__main__ import main
from zclip_optim.replay.report import is_locked_in, longest_streak

norms_of_any_kind = st.lists(st.floats(0) | st.floats(0.5, 2) | st.just(math.nan), max_size=80)


def decided(norms, max_consecutive_nonfinite=None, **options):
    """The metrics of a ZClip that is told the norms one by one."""
    clipper, metrics = ZClip(max_consecutive_nonfinite=max_consecutive_nonfinite, **options), []
    for norm in norms:
        clipper.decide(norm)
        metrics.append(clipper.metrics)
    return metrics


class TestFunction:
    @pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
    @pytest.mark.parametrize("kind", ["bursts", "zeros and non-finite", *map(thorough, KINDS[:2] + KINDS[3:4])])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
    def test_is_what_decide_says_step_by_step(self, options, kind):
        norms = norm_sequence(kind, seed=3)
        assert replay(norms, **options) == decided(norms, **options)

    @pytest.mark.filterwarnings("ignore::zclip_optim.ZClipWarning")
    @given(norms_of_any_kind, some_options, st.sampled_from(["skip", "pass"]), st.none() | st.floats(0.1, 10))
    def test_is_what_decide_says_of_any_norms(self, norms, options, nonfinite, cap):
        options = {**options, "nonfinite": nonfinite, "max_grad_norm": cap}
        assert replay(norms, **options) == decided(norms, **options)

    def test_is_what_training_had(self):
        model = make_model(dtype=torch.float64)
        options = {"warmup_steps": 10, "z_skip": 50.0, "max_grad_norm": 1.5}
        optimizer, seen = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), **options), []
        for step in range(60):
            norm = {20: 5.0, 30: 1e3, 40: math.nan, 45: math.inf, 50: 0.0}.get(step, 1.0 + 0.1 * (step % 7))
            set_gradients(model.parameters(), norm)
            optimizer.step()
            seen.append(optimizer.metrics)
        assert replay([m.grad_norm for m in seen], **options) == seen
        assert [m.skipped_steps for m in seen][-1] == 3
        assert [m.spike_steps for m in seen][-1] > 1

    def test_norms_that_are_not_finite_stop_nothing_and_are_no_warning(self):
        norms = [1.0, *[math.nan] * 30, 1.0]
        for nonfinite in ("skip", "raise"):
            metrics = replay(norms, nonfinite=nonfinite)
            assert metrics[-1].skipped_steps == 30
            assert metrics[-1].step == 2
        with pytest.raises(NonFiniteGradientError), pytest.warns(ZClipWarning):
            decided(norms, max_consecutive_nonfinite=25)

    @pytest.mark.parametrize(
        "norms", [(1, 2, 3), np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), iter([1.0, 2.0, 3.0])]
    )
    def test_norms_of_any_kind(self, norms):
        assert [m.grad_norm for m in replay(norms)] == [1.0, 2.0, 3.0]

    def test_no_norms(self):
        assert replay([]) == []

    def test_a_norm_below_0_has_its_place(self):
        with pytest.raises(ValueError, match=r"^norms\[2\] must be >= 0, .*, got -1\.0$"):
            replay([1.0, math.nan, -1.0])

    @pytest.mark.parametrize("norm", [None, "2.0"])
    def test_what_is_no_number_has_its_place(self, norm):
        with pytest.raises(TypeError, match=r"^norms\[1\] must be a number, got "):
            replay([1.0, norm])

    def test_options_are_checked_also_without_norms(self):
        with pytest.raises(ValueError, match="alpha must be a number with 0 <= alpha < 1, got 2"):
            replay([], alpha=2)
        with pytest.raises(TypeError, match="beta"):
            replay([], beta=2)

    def test_a_log_has_one_norm_for_each_step(self):
        with pytest.raises(ValueError, match="scope must be 'global', not 'group'"):
            replay([1.0], scope="group")


class TestStreaks:
    def test_the_longest_and_the_last(self):
        steady = [1.0 + 0.1 * (i % 5) for i in range(40)]
        metrics = replay([*steady, *[50.0] * 25, *steady, *[50.0] * 19])
        assert longest_streak(metrics) == 25
        assert not is_locked_in(metrics)
        assert is_locked_in(replay([*steady, *[50.0] * 20]))


IMPORTS = """if True:
    from zclip_optim import replay
    import zclip_optim, zclip_optim.replay, zclip_optim.replay.__main__
    assert zclip_optim.replay is replay
    assert replay([1.0])[0].grad_norm == 1.0
"""
REVERSED = """if True:
    import zclip_optim.replay.__main__
    from zclip_optim.replay import replay
    import zclip_optim
    assert zclip_optim.replay is replay
"""


@pytest.mark.parametrize("code", [IMPORTS, REVERSED], ids=["function first", "command first"])
def test_the_function_has_the_name_whatever_is_imported_first(code):
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


SPIKES = {30: 20.0, 50: 50.0, 70: 8.0}


@pytest.fixture
def log(tmp_path):
    """As Lightning's CSVLogger leaves it: logged every 10 steps, a NaN, rows of the validation."""
    rows = [
        {"step": 10 * i, "train/grad_norm": SPIKES.get(i, 1 + 0.1 * (i % 3)), "val_loss": ""} for i in range(1, 101)
    ]
    rows[89]["train/grad_norm"] = "nan"
    rows[60:60] = [{"step": 600, "train/grad_norm": "", "val_loss": 2.0}] * 3
    return write(tmp_path / "metrics.csv", rows)


def write(path, rows):
    with open(path, "w", encoding="utf8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


def of_norms(folder, norms):
    return write(folder / "norms.csv", [{"grad_norm": norm} for norm in norms])


class TestCommand:
    def say(self, capsys, *arguments):
        main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert err == ""
        return out

    def test_what_is_printed(self, log, capsys):
        text = self.say(capsys, log)
        for line in (
            f"{log}: 100 norms under 'train/grad_norm', steps 10 to 1,000",
            "- NaN or infinite: 1",
            "- rows without a norm: 3, which are no steps: something else was logged there",
            "- logged every 10 steps: a spike between two rows is not seen, and the statistics move 10 times as slowly",
            "ZClip with its defaults:",
            "steps           100 logged",
            "scaled          3 (3.0% of the finite norms); by clip_grad_norm_ at 1: 68 (68.7%)",
            "spikes          3 (4.1% of the norms after warm-up)",
            "skipped         NaN or infinite: 1",
            "longest streak  1 (spikes in a row)",
            "ends locked in  no",
            "The 3 largest of 3 spikes, by how far they would have been scaled down:",
        ):
            assert line in text.splitlines()
        assert "A replay cannot show how the run would have gone on" in text
        assert "missing in between" not in text
        assert "would have ended" not in text
        assert "would have warned" not in text

    def test_the_spikes_are_those_of_the_function(self, log, capsys):
        norms = [SPIKES.get(i, 1 + 0.1 * (i % 3)) if i != 90 else math.nan for i in range(1, 101)]
        options = {"lookback": 0.1, "z_thresh": 3.0, "clip_option": "mean", "skip_update_on_spike": True}
        flags = [
            "--lookback",
            "0.1",
            "--z-thresh",
            "3",
            "--clip-option",
            "mean",
            "--skip-update-on-spike",
            "--fixed",
            "2.5",
        ]
        text = self.say(capsys, log, *flags)
        title, *rows = text.partition("scaled down:\n")[2].partition("\n\n")[0].splitlines()
        assert title.split() == ["step", "norm", "z", "clipped", "to", "by", "clip_grad_norm_", "at", "2.5"]
        spikes = {10 * i: m for i, m in enumerate(replay(norms, **options), 1) if m.is_spike}
        assert [row.split() for row in rows] == [
            [str(step), f"{m.grad_norm:.4g}", f"{m.z_score:,.1f}", f"{m.clipped_norm:.4g}", "2.5"]
            for step, m in sorted(spikes.items(), key=lambda item: item[1].clip_coef)
        ]
        assert [int(row.split()[0]) for row in rows] == [500, 300, 700]
        assert "ZClip with z_thresh=3, clip_option='mean', lookback=0.1, skip_update_on_spike=True, otherwise" in text

    def test_a_spike_that_is_skipped(self, log, capsys):
        text = self.say(capsys, log, "--z-skip", 100)
        assert "skipped         NaN or infinite: 1, above z_skip: 2\n" in text
        assert text.count("   skipped   ") == 2

    def test_at_most_ten_spikes_are_listed(self, tmp_path, capsys):
        norms = [20.0 + i if i >= 30 and i % 5 == 0 else 1 + 0.1 * (i % 3) for i in range(100)]
        text = self.say(capsys, of_norms(tmp_path, norms))
        rows = text.partition("scaled down:\n")[2].partition("\n\n")[0].splitlines()[1:]
        assert "The 10 largest of 14 spikes" in text
        assert len(rows) == 10

    def test_steps_that_were_not_logged(self, tmp_path, capsys):
        text = self.say(capsys, of_norms(tmp_path, [1.0, 1.1, 0.0, 1.2]))
        assert "- no step was logged: steps are the numbers of the norms, from 1 on\n" in text
        assert "- zero: 1, which move no statistics\n" in text
        assert "spikes          0, as all norms are warm-up\n" in text
        assert "\n\nNo spikes.\n\n" in text

    def test_gaps_and_steps_that_go_back(self, tmp_path, capsys):
        steps = [10, 20, 30, 60, 70, 80, 70, 80, 90]
        path = write(tmp_path / "log.csv", [{"step": step, "grad_norm": 1 + step / 100} for step in steps])
        text = self.say(capsys, path)
        assert "- logged every 10 steps" in text
        assert "- rows that are missing in between, by the steps: 2\n" in text
        assert "- steps that go back or repeat: 1, first from 80 to 70, as in a run that was resumed" in text

    def test_a_run_that_ends_locked_in_and_what_training_would_have_warned_of(self, tmp_path, capsys):
        norms = [1 + 0.1 * (i % 3) for i in range(100)] + [30.0 + i for i in range(110)]
        text = self.say(capsys, of_norms(tmp_path, norms))
        assert "ends locked in  yes: the last 110 norms are spikes\n" in text
        assert "Training would have warned (steps are finite norms seen):\n- 100 of the last 200 steps" in text

    def test_rows_that_are_steps_apart_are_not_taken_for_steps_that_training_would_have_warned_of(
        self, tmp_path, capsys
    ):
        norms = [1 + 0.1 * (i % 3) for i in range(100)] + [30.0 + i for i in range(110)]
        every_tenth = [{"step": 10 * i, "grad_norm": norm} for i, norm in enumerate(norms)]
        assert "Training would" not in self.say(capsys, write(tmp_path / "log.csv", every_tenth))

    @pytest.mark.parametrize(("largest", "is_said"), [(1427.8, True), (1.2, False)])
    def test_a_spike_between_rows_is_told_where_it_was_logged(self, tmp_path, capsys, largest, is_said):
        rows = [{"step": 10 * i, "z/grad_norm": 1 + 0.1 * (i % 3), "z/interval_max_norm": 1.2} for i in range(1, 60)]
        rows[30]["z/interval_max_norm"] = largest
        text = self.say(capsys, write(tmp_path / "log.csv", rows))
        assert ("- between the rows norms reach 1428, by interval_max_norm\n" in text) == is_said

    def test_no_option_by_a_part_of_its_name(self, log, capsys):
        with pytest.raises(SystemExit):
            main([str(log), "--warmup", "10"])
        assert "unrecognized arguments: --warmup 10" in capsys.readouterr().err

    def test_a_folder_is_no_log(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main([str(tmp_path)])
        assert capsys.readouterr().err == f"python -m zclip_optim.replay: error: {tmp_path}: Is a directory\n"

    @pytest.mark.parametrize(
        ("flags", "step"),
        [
            ([], 55),
            (["--max-consecutive-nonfinite", 3], 33),
            (["--nonfinite", "raise"], 31),
            (["--nonfinite", "pass"], None),
        ],
    )
    def test_where_training_would_have_ended(self, flags, step, tmp_path, capsys):
        text = self.say(capsys, of_norms(tmp_path, [*[1.0, 1.1, 1.2] * 10, *[math.nan] * 25, 1.0]), *flags)
        assert ("Training would have ended" in text) == (step is not None)
        assert step is None or f"ended at step {step} with NonFiniteGradientError (nonfinite=" in text

    def test_norms_that_were_clipped_before(self, tmp_path, capsys):
        text = self.say(capsys, of_norms(tmp_path, [1.0] * 30))
        assert "all 25 gradient norms of the warm-up were 1: probably they were clipped before they got here" in text

    @pytest.fixture
    def picture(self, tmp_path, capsys, monkeypatch):
        """The figure that is written, and its lines by their label without the count in it."""
        figures, draw = [], command.plot_history

        def run(*arguments):
            monkeypatch.setattr(command, "plot_history", lambda rows: figures.append(draw(rows)) or figures[-1])
            text = self.say(capsys, *arguments, "-o", tmp_path / "replay.png")
            assert text.endswith(f"\n\nwritten: {tmp_path / 'replay.png'}\n")
            assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")
            (axes,) = figures[-1].axes
            return figures[-1], {line.get_label().split(" (")[0]: line for line in axes.lines}

        return run

    def test_the_picture(self, log, picture):
        figure, lines = picture(log)
        assert list(lines["clipped"].get_xdata()) == [300, 500, 700]
        assert list(lines["skipped"].get_xdata()) == [900, 900]
        assert "spike" not in lines
        (axes,) = figure.axes
        assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "gradient norm (L2)")
        assert axes.get_xlabel() == "step, replayed from metrics.csv"

    def test_spikes_stand_out_from_steps_that_are_capped(self, log, picture):
        figure, lines = picture(log, "--max-grad-norm", 1.05)
        assert len(lines["clipped"].get_xdata()) == 68
        assert list(lines["spike"].get_xdata()) == [300, 500, 700]
        assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["spike (3)"]

    def test_the_picture_of_steps_that_go_back(self, tmp_path, picture):
        steps = [10, 20, 30, 20, 30, 40]
        path = write(tmp_path / "log.csv", [{"step": step, "grad_norm": 1 + step / 100} for step in steps])
        figure, lines = picture(path)
        assert list(lines["before clipping"].get_xdata()) == [1, 2, 3, 4, 5, 6]
        assert figure.axes[0].get_xlabel() == "number of the norm (steps go back), replayed from log.csv"

    def test_every_option_of_the_rule_but_scope_is_there_with_its_meaning(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for name, default in vars(ZClipConfig()).items():
            assert (f"--{name.replace('_', '-')} " in text) == (name != "scope")
            assert name == "scope" or isinstance(default, bool) or f"Default: {default}." in text
        assert "z-score above which a step is a spike, in standard deviations, > 0. Default: 2.5." in text

    def test_in_a_process_of_its_own(self, log, tmp_path):
        command = [sys.executable, "-W", "error", "-m", "zclip_optim.replay", log, "-o", tmp_path / "replay.png"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"{log}: 100 norms")


class TestBadInput:
    @pytest.fixture
    def refused(self, capsys, tmp_path):
        """The line on stderr; nothing else is printed, and nothing written."""

        def run(*arguments):
            with pytest.raises(SystemExit, match="2"):
                main([*map(str, arguments), "-o", str(tmp_path / "replay.png")])
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert not (tmp_path / "replay.png").exists()
            return err.removeprefix("python -m zclip_optim.replay: error: ")

        return run

    @pytest.mark.parametrize(
        ("flags", "error"),
        [
            (["--alpha", 1], "alpha must be a number with 0 <= alpha < 1, got 1\n"),
            (["--z-thresh", "high"], "z_thresh must be a finite number > 0, got 'high'\n"),
            (["--warmup-steps", 2.5], "warmup_steps must be an integer >= 1, got 2.5\n"),
            (["--mode", "z"], "mode must be one of 'zscore', 'percentile', got 'z'\n"),
            (["--z-skip", 2], "z_skip must be above z_thresh=2.5, got 2.0\n"),
            (["--percentile", 0.9], 'percentile must be None unless mode="percentile", got 0.9\n'),
            (["--fixed", 0], "argument --fixed: must be a finite number > 0, got '0'\n"),
            (["--fixed", "none"], "argument --fixed: must be a finite number > 0, got 'none'\n"),
            (["--scope", "group"], "unrecognized arguments: --scope group\n"),
            (
                ["--column", "norm"],
                "metrics.csv has no column 'norm'; the columns are step, train/grad_norm, val_loss\n",
            ),
        ],
    )
    def test_options(self, refused, flags, error, log, monkeypatch):
        monkeypatch.chdir(log.parent)
        assert refused(log.name, *flags) == error

    def test_files(self, refused, tmp_path):
        assert "No such file or directory" in refused(tmp_path / "none.csv")
        assert "Is a directory" in refused(tmp_path)
        assert "row 2 of" in refused(of_norms(tmp_path, [1.0, -1.0]))
        assert "has no rows" in refused(write(tmp_path / "empty.csv", [{}]))

    def test_a_picture_that_cannot_be_written_is_said_before_anything_is_printed(self, log, tmp_path, capsys):
        for path in (tmp_path / "none" / "replay.png", tmp_path / "replay.xyz"):
            with pytest.raises(SystemExit, match="2"):
                main([str(log), "-o", str(path)])
            assert capsys.readouterr().out == ""

    def test_a_picture_needs_an_extra(self, refused, log, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert refused(log) == "matplotlib is not installed; install it with: pip install 'zclip_optim[plot]'\n"
