"""What is read from the files that loggers write, and what is said of those that cannot be."""

import json
import math

import pytest

from zclip_optim import ZClip
from zclip_optim.logs import read_norms, read_records


def write(folder, text, name="log"):
    path = folder / name
    path.write_text(text, encoding="utf8")
    return path


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


NAN = math.nan
TRAINER = {
    "global_step": 30,
    "logging_steps": 10,
    "log_history": [
        {"epoch": 0.1, "grad_norm": 1.5, "loss": 2.0, "step": 10},
        {"epoch": 0.1, "eval_loss": 2.1, "step": 10},
        {"epoch": 0.2, "grad_norm": NAN, "loss": 1.9, "step": 20},
        {"epoch": 0.3, "grad_norm": 0.5, "loss": 1.8, "step": 30},
        {"epoch": 0.3, "train_loss": 1.9, "train_runtime": 3.0, "step": 30},
    ],
}
STEPS = [10, 20, 30]
FORMS = {
    "csv": ("step,grad_norm\n10,1.5\n20,nan\n30,0.5\n", "grad_norm", STEPS, 0),
    "csv of a spreadsheet": ("\ufeffstep,grad_norm\r\n10,1.5\r\n20,NaN\r\n30,0.5\r\n", "grad_norm", STEPS, 0),
    "csv, spaces": ("step, grad_norm\n10, 1.5\n20, NaN\n30, 0.5\n", " grad_norm", STEPS, 0),
    "csv, a row cut short": ("step,loss,grad_norm\n10,2,1.5\n20,2,nan\n20,2\n30,2,0.5\n", "grad_norm", STEPS, 1),
    "csv, quoted": ('note,grad_norm,step\n"a\nb",1.5,10\n"c, d",nan,20\n,0.5,30\n', "grad_norm", STEPS, 0),
    "lightning": (
        "epoch,step,train/grad_norm,val_loss\n0,10,1.5,\n0,10,,2.1\n0,20,nan,\n0,20,,2.0\n1,30,0.5,\n",
        "train/grad_norm",
        STEPS,
        2,
    ),
    "wandb": (
        '"Step","run - grad_norm","run - grad_norm__MIN","run - grad_norm__MAX"\n'
        '"10","1.5","1.5","1.5"\n"20","NaN","NaN","NaN"\n"30","0.5","0.5","0.5"\n',
        "run - grad_norm",
        STEPS,
        0,
    ),
    "wandb's history": (
        "_step,trainer/global_step,zclip/grad_norm\n1,10,1.5\n2,20,NaN\n3,30,0.5\n",
        "zclip/grad_norm",
        STEPS,
        0,
    ),
    "json lines": (
        json_lines(
            [
                {"step": 10, "zclip/grad_norm": 1.5},
                {"step": 20, "zclip/grad_norm": NAN},
                {"step": 25, "loss": 2.0, "text": "a\u2028b"},
                {"step": 30, "zclip/grad_norm": 0.5},
            ]
        ),
        "zclip/grad_norm",
        STEPS,
        1,
    ),
    "json list": (json.dumps([{"grad_norm": 1.5}, {"grad_norm": NAN}, {"grad_norm": 0.5}]), "grad_norm", None, 0),
    "trainer_state.json": (json.dumps(TRAINER, indent=2), "grad_norm", STEPS, 2),
    "columns": (json.dumps({"kind": "RL", "logging_steps": 10, "grad_norm": [1.5, None, 0.5]}), "grad_norm", STEPS, 0),
    "steps that are no numbers": ("step,grad_norm\nnan,1.5\n-,nan\n,0.5\n", "grad_norm", None, 0),
    "an underscore": ("total_grad_norm\n1.5\nnan\n0.5\n", "total_grad_norm", None, 0),
    "a separator before an underscore": (
        "max_grad_norm,zclip/grad_norm\n1,1.5\n1,nan\n1,0.5\n",
        "zclip/grad_norm",
        None,
        0,
    ),
    "exact before any": ("zclip/grad_norm,grad_norm,run/grad_norm\n9,1.5,9\n9,nan,9\n9,0.5,9\n", "grad_norm", None, 0),
}


@pytest.mark.parametrize(("text", "column", "steps", "without"), FORMS.values(), ids=FORMS.keys())
def test_forms(text, column, steps, without, tmp_path):
    log = read_norms(write(tmp_path, text))
    assert log.column == column
    assert str(log.norms) == "[1.5, nan, 0.5]"
    assert log.has_steps == (steps is not None)
    assert log.steps == (steps or [1, 2, 3])
    assert log.rows_without == without


def test_null_is_nan_and_a_missing_key_is_no_step(tmp_path):
    log = read_norms(write(tmp_path, json_lines([{"grad_norm": 1.0}, {"grad_norm": None}, {"loss": 1.0}])))
    assert str(log.norms) == "[1.0, nan]"
    assert (log.rows_without, log.nulls) == (1, 1)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_norm_that_as_dict_leaves_out_is_a_step(form, tmp_path):
    clipper, rows = ZClip(), []
    for norm in (1.0, math.inf, 2.0):
        clipper.decide(norm)
        rows.append(clipper.metrics.as_dict())
    rows.append({"val_loss": 2.0})
    text = json_lines(rows)
    if form == "csv":
        names = ["zclip/grad_norm", "zclip/clip_coef", "zclip/step", "zclip/skipped_steps"]
        text = "\n".join([",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)])
    log = read_norms(write(tmp_path, text))
    assert str(log.norms) == "[1.0, nan, 2.0]"
    assert (log.steps, log.rows_without) == ([1, 2, 3], 1)


def test_the_column_that_is_wanted(tmp_path):
    path = write(tmp_path, "grad_norm,norm of all\n1,2\n1,3\n")
    assert read_norms(path, "norm of all").norms == [2.0, 3.0]


MANY = ",".join(f"loss{i}" for i in range(30))
ERRORS = {
    "empty": ("", "has no rows"),
    "only a header": ("step,grad_norm\n", "has no rows"),
    "no column": ("step,loss\n1,2\n", "has no column that ends in 'grad_norm'; name one with --column: .* step, loss$"),
    "many columns": (f"{MANY}\n1\n", "loss18, loss19 and 10 more$"),
    "several columns": (
        "a - grad_norm,b - grad_norm\n1,2\n",
        "has several columns that end in 'grad_norm'; choose with --column: a - grad_norm, b - grad_norm$",
    ),
    "no number": ("grad_norm\n1\noff\n", "^row 2 of .*log: grad_norm is 'off', which is no number$"),
    "true": ('{"grad_norm": true}', "^row 1 of .*: grad_norm is True, which is no number"),
    "too long an integer": (f'{{"grad_norm": 1{"0" * 400}}}', "which is no number"),
    "negative": ("grad_norm\n1\n-0.5\n", "^row 2 of .*log: grad_norm is -0.5, and a norm is at least 0$"),
    "only blanks": ("step,grad_norm\n1,\n2, \n", "has no norm under 'grad_norm' that is finite and above 0"),
    "only NaN": ("grad_norm\nnan\ninf\n", "has no norm under 'grad_norm' that is finite and above 0"),
    "only zeros": ("grad_norm\n0\n0\n", "has no norm under 'grad_norm' that is finite and above 0"),
    "a line that is cut": ('{"grad_norm": 1}\n{"grad', "line 2 of .* is not JSON"),
    "a document that is cut": ('{\n  "log_history": [\n    {"grad', "log is not JSON: .*: line 3 column 6"),
    "brackets without end": ("[" * 100_000, "log is not JSON: "),
    "a line that is a list": ('{"grad_norm": 1}\n[1]\n', r"line 2 of .* is not a JSON object: \[1\]"),
    "numbers": ("[1, 2]", "is JSON, but its rows are not a list of objects"),
    "a broken history": ('{"log_history": {"grad_norm": 1}}', "is JSON, but its rows are not a list of objects"),
    "uneven columns": ('{"step": [1, 2], "grad_norm": [1]}', "differ in length: step 2, grad_norm 1"),
    "one cell without an end": ('grad_norm\n"' + "1" * 200_000, "is no CSV file: field larger than field limit"),
}


@pytest.mark.parametrize(("text", "error"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(text, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        read_norms(write(tmp_path, text))


def test_a_column_that_is_wanted_but_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'norm'; the columns are step, grad_norm$"):
        read_norms(write(tmp_path, "step,grad_norm\n1,2\n"), "norm")


def test_a_picture_is_no_text(tmp_path):
    path = tmp_path / "zclip.png"
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"zclip\.png is no text in UTF-8"):
        read_records(path)
