"""The Trainer callback with the real Trainer, on a tiny GPT-2 and random tokens."""

import json
import math
from itertools import count

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import parameters
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from zclip_optim import ZClipOptimizer, ZClipWarning
from zclip_optim.integrations.transformers import ZClipCallback
from zclip_optim.logs import read_norms
from zclip_optim.plotting import plot_history
from zclip_optim.records import Records

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true but no accelerator")
OPTIONS = {"warmup_steps": 5, "z_thresh": 1.5}
KEYS = ["grad_norm", "clipped_norm", "clip_coef", "threshold", "z_score", "mean", "std", "clip_rate", "spike_rate"]
LATER = {"threshold", "z_score"}  # are numbers after the warm-up only
STEPS, OUTLIERS = 20, (20, 21, 30, 31)


def make_model():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


class Tokens(torch.utils.data.IterableDataset):
    """Random tokens, in an order that the Trainer does not change; OUTLIERS are one token only."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for i in count():
            tokens = torch.randint(32, (8,), generator=generator)
            if i in OUTLIERS:
                tokens[:] = 7
            yield {"input_ids": tokens, "labels": tokens}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def wrapped(model):
    return ZClipOptimizer(adamw(model), **OPTIONS)


def make_trainer(
    path, make_optimizer=wrapped, callbacks=(), callback=ZClipCallback, attach=True, log_parameters=None, **options
):
    model = make_model()
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(path), **arguments),
        train_dataset=Tokens(),
        optimizers=(make_optimizer(model), None),
        callbacks=[*callbacks] if attach else [callback(), *callbacks],
    )
    if attach:
        callback.attach(trainer, log_parameters=log_parameters)
    return trainer


def train(*args, resume_from_checkpoint=None, **options):
    trainer = make_trainer(*args, **options)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def zclip(trainer):
    return trainer.optimizer.optimizer


class NaNGradient(TrainerCallback):
    """Puts a NaN into the gradients of one step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            next(model.parameters()).grad.view(-1)[0] = math.nan


def test_the_run_is_that_of_plain_torch(tmp_path):
    trainer = train(tmp_path, lr_scheduler_type="linear", gradient_accumulation_steps=2)
    model, tokens = make_model(), iter(Tokens())
    optimizer = wrapped(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    history = []
    for _ in range(STEPS):
        for _ in range(2):
            batch = torch.stack([next(tokens)["input_ids"] for _ in range(2)])
            model(input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(2 * 2 * 8)).loss.backward()
        optimizer.step()
        history.append(optimizer.metrics)
        scheduler.step()
        optimizer.zero_grad()
    assert optimizer.metrics.clipped_steps > 0
    assert zclip(trainer).metrics == optimizer.metrics
    assert torch.equal(parameters(trainer.model), parameters(model))
    for row, metrics in zip(trainer.state.log_history, history, strict=False):
        logged = {key: row[f"zclip/{key}"] for key in KEYS if f"zclip/{key}" in row}
        known = {key: getattr(metrics, key) for key in KEYS if math.isfinite(getattr(metrics, key))}
        assert logged == pytest.approx(known, rel=0)
    assert logged.keys() >= LATER


def test_the_logs_of_training_steps_and_no_others_have_the_keys(tmp_path):
    trainer = train(tmp_path, logging_steps=5)
    *rows, summary = trainer.state.log_history
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all("loss" in row and {f"zclip/{key}" for key in {*KEYS} - LATER} <= set(row) for row in rows)
    assert [f"zclip/{key}" in row for row in rows for key in LATER] == [False] * 2 + [True] * 6
    assert not any(key.startswith("zclip") for key in summary)


def test_the_state_file_is_strict_json_from_the_first_step_on(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    train(tmp_path, logging_steps=1, save_strategy="steps", save_steps=STEPS)
    text = (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf8")
    rows = json.loads(text, parse_constant=refuse)["log_history"]
    assert sum("zclip/mean" in row for row in rows) == STEPS


class Subclass(ZClipCallback):
    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)


@pytest.mark.parametrize("callback", [ZClipCallback, Subclass])
def test_the_keys_reach_the_loggers_of_the_trainer(callback, tmp_path):
    train(tmp_path, callback=callback, report_to="tensorboard", logging_steps=5)
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    for key in KEYS:
        steps = [10, 15, 20] if key in LATER else [5, 10, 15, 20]
        assert [event.step for event in events.Scalars(f"train/zclip/{key}")] == steps


def test_given_with_the_other_callbacks_it_adds_to_the_history_alone(tmp_path):
    trainer = train(tmp_path, attach=False, report_to="tensorboard", logging_steps=5)
    *rows, _ = trainer.state.log_history
    assert all({f"zclip/{key}" for key in {*KEYS} - LATER} <= set(row) for row in rows)
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert not any("zclip" in tag for tag in events.Tags()["scalars"])


def test_no_callback_is_passed_over_because_of_it(tmp_path):
    """The Trainer goes through its list of callbacks while it calls them."""
    begun = []

    class Begins(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            begun.append(self)

    callbacks = [Begins(), Begins(), Begins()]
    train(tmp_path, attach=False, callbacks=callbacks, max_steps=1)
    assert begun == callbacks


def test_metrics_are_read_when_the_trainer_logs_and_not_else(tmp_path, monkeypatch):
    reads, read = [], Records.read

    class Counts(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            monkeypatch.setattr(Records, "read", lambda self: reads.append(1) or read(self))

    train(tmp_path, callbacks=[Counts()], logging_steps=5)
    assert len(reads) == STEPS // 5


class LooksAtEveryStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.seen.append(optimizer.optimizer.metrics)


@pytest.mark.parametrize("log_parameters", [None, 1])
def test_a_spike_between_two_logs_is_in_them_whoever_looks(log_parameters, tmp_path):
    looks = LooksAtEveryStep()
    trainer = train(tmp_path, callbacks=[looks, NaNGradient(step=17)], logging_steps=5, log_parameters=log_parameters)
    *rows, _ = trainer.state.log_history
    spikes = [i for i, metrics in enumerate(looks.seen) if metrics.is_spike]
    assert any((i + 1) % 5 for i in spikes)  # a row is of the steps up to i + 1
    for i, row in enumerate(rows):
        seen = looks.seen[5 * i : 5 * (i + 1)]
        expected = {
            "interval_steps": 5,
            "interval_max_norm": max(m.grad_norm for m in seen if math.isfinite(m.grad_norm)),
            "interval_min_coef": min(m.clip_coef for m in seen),
            "interval_spikes": sum(m.is_spike for m in seen),
            "interval_skips": sum(m.skipped for m in seen),
            **{name: getattr(seen[-1], name) for name in ("clipped_steps", "spike_steps", "skipped_steps")},
        }
        assert {name: row[f"zclip/{name}"] for name in expected} == expected
    assert all(metrics.interval_steps == 1 for metrics in looks.seen)
    assert rows[-1]["zclip/interval_skips"] == 1


class LooksAtNorms(TrainerCallback):
    """What the shares should be: those of the scaled gradients, by the names of the model."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        squares = {name: p.grad.double().square().sum().item() for name, p in model.named_parameters()}
        largest = sorted(squares, key=squares.get, reverse=True)[:3]
        shares = {f"zclip/share/{name}": squares[name] / sum(squares.values()) for name in largest}
        self.seen.append(shares if optimizer.optimizer.metrics.is_spike else None)


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_the_largest_shares_of_the_last_clipped_step_are_logged_once(logging_steps, tmp_path):
    looks = LooksAtNorms()
    trainer = train(tmp_path, callbacks=[looks], log_parameters=3, logging_steps=logging_steps)
    *rows, summary = trainer.state.log_history
    assert sum(each is not None for each in looks.seen) == zclip(trainer).metrics.clipped_steps > 1
    for row, start in zip(rows, range(0, STEPS, logging_steps), strict=True):
        clipped = [each for each in looks.seen[start : start + logging_steps] if each is not None]
        shares = {key: value for key, value in row.items() if "share" in key}
        assert shares == pytest.approx(clipped[-1] if clipped else {})
    assert not any("share" in key for key in summary)


def test_shares_are_off_by_default_and_leave_nothing_behind(tmp_path):
    trainer = train(tmp_path)
    assert zclip(trainer).metrics.clipped_steps > 0
    assert not any("share" in key for row in trainer.state.log_history for key in row)
    trainer = train(tmp_path, log_parameters=2)
    assert any("zclip/share/transformer.wte.weight" in row for row in trainer.state.log_history)
    assert not zclip(trainer)._optimizer_step_post_hooks


def test_shares_reach_the_loggers(tmp_path):
    train(tmp_path, log_parameters=2, report_to="tensorboard", logging_steps=5)
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert events.Scalars("train/zclip/share/transformer.wte.weight")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "5"])
def test_log_parameters_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^log_parameters must be an integer >= 1 or None, got"):
        ZClipCallback(log_parameters=wrong)


def test_save_and_resume_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=12)
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert zclip(resumed).metrics == zclip(whole).metrics
    assert repr(zclip(resumed).state_dict()) == repr(zclip(whole).state_dict())
    saved = torch.load(tmp_path / "whole" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["zclip_step"] == 12
    assert 0 < saved["param_groups"][0]["zclip_clipped_steps"] < zclip(whole).metrics.clipped_steps
    loss, norm = plot_history(tmp_path / "whole" / "checkpoint-12" / "trainer_state.json").axes
    assert list(loss.lines[0].get_xdata()) == list(range(1, 13))
    before = next(line for line in norm.lines if line.get_label() == "before clipping")
    assert list(before.get_ydata()) == [row["zclip/grad_norm"] for row in whole.state.log_history[:12]]


def test_a_nan_step_is_skipped_and_logged(tmp_path):
    trainer = train(tmp_path, callbacks=[NaNGradient(step=3)])
    assert zclip(trainer).metrics.skipped_steps == 1
    assert zclip(trainer).metrics.step == STEPS - 1
    assert parameters(trainer.model).isfinite().all()
    assert "zclip/grad_norm" not in trainer.state.log_history[3]  # NaN is no JSON
    assert "zclip/clip_coef" in trainer.state.log_history[3]
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    log = read_norms(tmp_path / "trainer_state.json", "zclip/grad_norm")
    assert [step for step, norm in zip(log.steps, log.norms, strict=True) if math.isnan(norm)] == [4]
    assert (len(log.norms), log.rows_without) == (STEPS, 1)  # the summary
    theirs = read_norms(tmp_path / "trainer_state.json")
    assert theirs.column == "grad_norm"
    assert theirs.norms[4:] == pytest.approx(log.norms[4:])


def test_max_grad_norm_is_warned_of(tmp_path):
    with pytest.warns(ZClipWarning, match=r"max_grad_norm=1\.0 .* hides every spike: pass max_grad_norm=0\.0"):
        train(tmp_path, max_grad_norm=1.0, max_steps=1)


def test_an_optimizer_that_is_not_wrapped_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(TypeError, match=r"AdamW, is not a ZClipOptimizer.*optimizers=\(ZClipOptimizer\("):
        train(tmp_path, adamw)


def test_bf16(tmp_path):
    trainer = train(tmp_path, bf16=True)
    assert zclip(trainer).metrics.step == STEPS
    assert zclip(trainer).metrics.clipped_steps == zclip(train(tmp_path)).metrics.clipped_steps > 0


class Clipped(ZClipOptimizer):
    """What to pass to a Trainer that asks for a class."""

    def __init__(self, params, **options):
        super().__init__(torch.optim.AdamW(params, **options), **OPTIONS)


def make_from_class(path, cls):
    arguments = TrainingArguments(
        str(path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    options = {"lr": 1e-2, "weight_decay": 0.0}
    return Trainer(make_model(), arguments, train_dataset=Tokens(), optimizer_cls_and_kwargs=(cls, options))


def test_a_subclass_takes_the_arguments_of_the_optimizer(tmp_path):
    trainer = make_from_class(tmp_path, Clipped)
    trainer.train()
    assert zclip(trainer).metrics.step == STEPS
    assert zclip(trainer).param_groups[0]["initial_lr"] == 1e-2


def test_our_class_with_such_arguments_says_what_to_pass(tmp_path):
    with pytest.raises(TypeError, match=r"'lr'.*\n\n    class ClippedAdamW\(ZClipOptimizer\)"):
        make_from_class(tmp_path, ZClipOptimizer).train()


@pytest.mark.parametrize("attach", [False, True])
def test_parameters_that_were_replaced_are_warned_of(attach, tmp_path):
    trainer = make_trainer(tmp_path, attach=attach, max_steps=30)
    for module in trainer.model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach()))
    with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient at the last 20") as caught:
        trainer.train()
    assert len(caught) == 1
    assert not any(key.startswith("zclip") for row in trainer.state.log_history for key in row)
