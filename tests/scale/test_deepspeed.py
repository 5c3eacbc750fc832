"""DeepSpeed's own engines on two gloo ranks on the CPU, beside one process that clips by hand and the bare engine."""

import doctest
import math

import deepspeed_training
import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from deepspeed.runtime import utils
from deepspeed_training import (
    BF16_ENGINES,
    ENGINES,
    OPTIONS,
    OUTLIERS,
    STEPS,
    as_launched,
    batch_of,
    begin_with_accelerate,
    deepspeed,
    full_parameters,
    make_engine,
    moments,
    run,
    run_by_hand,
)
from readme import block
from torch import nn
from training import make_model
from transformers import Trainer, TrainingArguments
from world import World

import zclip_optim.integrations.deepspeed
from zclip_optim import NonFiniteGradientError, ZClipOptimizer
from zclip_optim.integrations import LOGGED
from zclip_optim.integrations.deepspeed import attach
from zclip_optim.integrations.transformers import ZClipCallback, attach_deepspeed

pytestmark = pytest.mark.xdist_group("deepspeed")


@pytest.fixture(scope="module")
def two():
    """Ranks with DeepSpeed alone, which keeps state of its own in a process; on a busy machine to import it is long."""
    world = World(2, timeout=150.0)
    yield world
    world.close()


ALL = {**ENGINES, **BF16_ENGINES}
every_engine = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
# One of each class of DeepSpeed's optimizers: none, ZeRO 1 and 2, ZeRO 3, that of 16 bits without ZeRO, BF16_Optimizer.
WAYS = {name: ALL[name] for name in ("stage 0", "stage 2", "stage 3", "stage 0, bf16", "BF16_Optimizer")}
every_way = pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)


def two_groups(model):
    return torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 1e-3}], momentum=0.9
    )


def check_against_one_process(rank, config, **options):
    with as_launched(rank):
        engine, clipper = make_engine(config, options.get("make_optimizer", deepspeed_training.adamw), **OPTIONS)
        history = run(engine, clipper, rank, range(STEPS))
        expected, params = run_by_hand(range(STEPS), config, **options)
        # bf16 has 8 bits: gradients are rounded to them before they are added, and weights after each step
        tolerance = 2**-8 if "bf16" in config else 1e-6
        assert [m.grad_norm for m in history] == pytest.approx([m.grad_norm for m in expected], rel=tolerance)
        torch.testing.assert_close(full_parameters(engine), params, rtol=0, atol=tolerance)
        clipped = [i for i, m in enumerate(history) if m.clipped]
        assert clipped == [i for i, m in enumerate(expected) if m.clipped]
        assert set(OUTLIERS) <= set(clipped)
        assert engine.skipped_steps == 0
        return repr(history)


@every_engine
def test_it_is_one_process_that_clips_by_hand(two, config):
    assert len(set(two.run(check_against_one_process, config))) == 1


def check_readme(rank):
    with as_launched(rank):
        model = make_model()
        names = {"deepspeed": deepspeed, "model": model, "optimizer": deepspeed_training.adamw(model)}
        exec(block("deepspeed.initialize"), names)
        assert [m.step for m in run(names["engine"], names["clipper"], rank, range(3))] == [1, 2, 3]


def test_the_example_in_the_readme(two):
    two.run(check_readme)


def check_accumulation_and_groups(rank, config):
    check_against_one_process(
        rank, {**config, "gradient_accumulation_steps": 2}, accumulate=2, make_optimizer=two_groups
    )


@every_way
def test_accumulation_and_param_groups(two, config):
    two.run(check_accumulation_and_groups, config)


def check_that_nothing_else_changes(rank, config):
    with as_launched(rank):
        (engine, clipper), (bare, _) = make_engine(config, z_thresh=1e9), make_engine(config)
        run(engine, clipper, rank, range(6))
        run(bare, None, rank, range(6))
        assert clipper.metrics.step == 6
        assert torch.equal(full_parameters(engine), full_parameters(bare))


@every_way
def test_steps_that_are_not_clipped_are_those_of_the_bare_engine(two, config):
    two.run(check_that_nothing_else_changes, config)


def check_what_is_left_out(rank, config):
    with as_launched(rank):
        engine, clipper = make_engine(config, **OPTIONS, z_skip=20.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(engine.basic_optimizer, lambda step: 1.0)  # made after attach
        run(engine, clipper, rank, range(OUTLIERS[0]))
        for step, nan, is_spike in [(6, 1, False), (OUTLIERS[0], None, True), (7, 0, False)]:
            before = full_parameters(engine), moments(engine)
            (metrics,) = run(engine, clipper, rank, [step], nan=nan)
            assert (metrics.skipped, metrics.is_spike) == (True, is_spike)
            assert not engine.was_step_applied()
            assert torch.equal(full_parameters(engine), before[0])
            assert moments(engine) == before[1]
            run(engine, clipper, rank, [step + 100])
            assert engine.was_step_applied()
            assert not torch.equal(full_parameters(engine), before[0])
        schedule.step()
        assert engine.skipped_steps == metrics.skipped_steps == 3
        return repr(clipper.metrics)


@every_way
def test_a_nan_on_one_rank_and_a_spike_above_z_skip_are_left_out_on_all(two, config):
    assert len(set(two.run(check_what_is_left_out, config))) == 1


def check_nan_that_deepspeed_would_take(rank):
    unchecked = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}}
    with as_launched(rank):
        (engine, clipper), (bare, _) = make_engine(unchecked, **OPTIONS), make_engine(unchecked)
        for each in (engine, bare):
            run(each, None, rank, [0], nan=1)
        assert full_parameters(bare).isnan().any()
        assert torch.equal(
            full_parameters(engine), torch.cat([p.reshape(-1) for p in make_model(0, torch.bfloat16).parameters()])
        )
        assert clipper.metrics.skipped_steps == engine.skipped_steps == 1


def test_a_nan_that_deepspeed_would_take_is_left_out(two):
    two.run(check_nan_that_deepspeed_would_take)


def check_raising(rank, config):
    with as_launched(rank):
        engine, clipper = make_engine(config, nonfinite="raise")
        before = full_parameters(engine)
        with pytest.raises(NonFiniteGradientError):
            run(engine, clipper, rank, [0], nan=0)
        assert torch.equal(full_parameters(engine), before)


@every_way
def test_a_nan_raises_on_all_ranks_if_told_to(two, config):
    two.run(check_raising, config)


def check_that_it_goes_on(rank, config, folder):
    with as_launched(rank):
        (whole, expected), (resumed, clipper) = make_engine(config, **OPTIONS), make_engine(config, **OPTIONS)
        run(whole, expected, rank, range(14))
        saved = expected.state_dict()
        whole.save_checkpoint(folder, client_state={"epoch": 3})
        path, client_state = resumed.load_checkpoint(folder)
        assert path is not None
        assert client_state["epoch"] == 3
        assert "zclip" not in client_state
        assert clipper.state_dict() == saved
        assert run(resumed, clipper, rank, range(14, STEPS)) == run(whole, expected, rank, range(14, STEPS))
        assert torch.equal(full_parameters(resumed), full_parameters(whole))


@every_way
def test_it_goes_on_from_a_checkpoint_bit_for_bit(two, config, tmp_path):
    two.run(check_that_it_goes_on, config, str(tmp_path))


def check_checkpoints(rank, folder):
    config = ENGINES["stage 2"]
    with as_launched(rank):
        engine, clipper = make_engine(config, **OPTIONS)
        run(engine, clipper, rank, range(OUTLIERS[0] + 1))
        assert clipper.metrics.clipped
        with pytest.raises(ValueError, match="client_state must not have the key 'zclip'"):
            engine.save_checkpoint(folder, None, {"zclip": 1})
        engine.save_checkpoint(folder, "ours", {}, True)
        bare, _ = make_engine({**config, "gradient_clipping": 1e-3})
        run(bare, None, rank, range(2))
        bare.save_checkpoint(folder, "theirs")
        assert bare.load_checkpoint(folder, "ours")[1]["zclip"] == clipper.state_dict()
        assert bare.optimizer.clip_grad == 0  # nothing of the clipped step is left for it

        other, fresh = make_engine(config, **OPTIONS)
        before = fresh.state_dict()
        for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
            other.load_checkpoint(folder, "ours", **options)
            assert fresh.state_dict() == before
        other.load_checkpoint(folder, "ours")
        assert fresh.state_dict() == clipper.state_dict()
        other.load_checkpoint(folder, "theirs")  # no statistics: they start afresh
        assert fresh.state_dict() == before
        weights = full_parameters(other)
        run(other, fresh, rank, [3])  # and not with the 1e-3 that is in it
        assert (full_parameters(other) - weights).abs().max() > 1e-3
        assert fresh.metrics.clip_coef == 1
        assert other.load_checkpoint(folder + "/none") == (None, None)

        clipper.state_dict = lambda: {"groups": [{"zclip_version": 1, "zclip_step": -1}]}
        engine.save_checkpoint(folder, "malformed")
        with pytest.raises(ValueError, match="zclip_"):
            other.load_checkpoint(folder, "malformed")
        assert fresh.metrics.step == 1


def test_what_checkpoints_keep(two, tmp_path):
    two.run(check_checkpoints, str(tmp_path))


def refused(engine, error, text, **options):
    """Whether attaching is refused with this text and changes nothing."""
    before = [dict(vars(each)) for each in (engine, engine.optimizer, engine.basic_optimizer)]
    with pytest.raises(error, match=text):
        attach(engine, **options)
    assert [dict(vars(each)) for each in (engine, engine.optimizer, engine.basic_optimizer)] == before


def check_refused_options(rank):
    with as_launched(rank):
        engine, _ = make_engine(ENGINES["stage 2"])
        for options, text in [
            ({"scope": "group"}, "scope must be 'global', got 'group'"),
            ({"process_group": ()}, "process_group must be None"),
            ({"nonfinite": "pass"}, "nonfinite must be 'skip' or 'raise'"),
            ({"z_thresh": -1.0}, "z_thresh"),
        ]:
            refused(engine, ValueError, text, **options)
        # What cannot be had on the CPU, or takes long to build, is said by the name that DeepSpeed says it with.
        for name, value, text in [
            ("super_offload", lambda: True, "super_offload must be off"),
            ("zenflow", True, "zenflow must be off"),
            ("has_moe_layers", True, "MoE layers"),
            ("fp16_enabled", lambda: True, "float16.* use bfloat16"),
            ("loaded_checkpoint_dp_world_size", 2, "attach first"),
        ]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, name, value)
                refused(engine, ValueError, text)
        for key, value, text in [
            ("zclip", False, "zclip=False"),
            ("zclip", 1, "must be True"),
            ("use_muon", True, "use_muon"),
        ]:
            engine.basic_optimizer.param_groups[0][key] = value
            refused(engine, ValueError, text)
            del engine.basic_optimizer.param_groups[0][key]
        for owner, name in [
            (utils, "combine_grad_norm_groups"),
            (type(engine), "super_offload"),
            (type(engine.optimizer), "unscale_and_clip_grads"),
            (engine.optimizer, "clip_grad"),
        ]:
            with pytest.MonkeyPatch.context() as patch:
                patch.delattr(owner, name)
                refused(engine, RuntimeError, rf"deepspeed 0\.19\.\d+ does not fit: .*{name}|get_grads_for_norm")
        clipper = attach(engine, **OPTIONS)
        refused(engine, ValueError, "has a ZClip already")
        run(engine, clipper, rank, range(2))
        assert clipper.metrics.step == 2


def test_options_and_versions_that_do_not_fit_are_refused_and_nothing_changes(two):
    two.run(check_refused_options)


def check_refused_engines(rank):
    with as_launched(rank), pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # which is never set back
        for config, text in [
            ({"gradient_clipping": 1.0}, r'gradient_clipping=1\.0 .*write "gradient_clipping": 0'),
            ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm must not be false"),
            ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast with float16"),
            (ENGINES["stage 1"], "torch_autocast with float16"),  # and so every later one has a GradScaler
        ]:
            refused(make_engine(config)[0], ValueError, text)
        patch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)
        refused(make_engine({}, lambda model: ZClipOptimizer(two_groups(model)))[0], ValueError, "this ZClipOptimizer")
        model = make_model()
        default, *_ = deepspeed.initialize(
            model=model, optimizer=two_groups(model), config={"train_micro_batch_size_per_gpu": 8}
        )
        refused(default, ValueError, r"gradient_clipping=1\.0 clips, by default")
        plain, _ = make_engine({})
        plain.mpu = object()
        refused(plain, ValueError, "mpu: without ZeRO")
        without, *_ = deepspeed.initialize(model=make_model(), config={"train_micro_batch_size_per_gpu": 8})
        for each in (without, model, None):
            with pytest.raises(TypeError, match="engine must be a DeepSpeedEngine that has an optimizer, got"):
                attach(each)


def test_engines_that_do_not_fit_are_refused_and_nothing_changes(two):
    two.run(check_refused_engines)


def check_step_without_decision(rank, config, name):
    with as_launched(rank):
        engine, clipper = make_engine(config, **OPTIONS)
        run(engine, clipper, rank, [0])
        setattr(engine.optimizer, name, lambda *args, **kwargs: [])
        with pytest.raises(RuntimeError, match=r"deepspeed .* took a step without a decision of ZClip"):
            run(engine, clipper, rank, [1])


def test_a_step_without_a_decision_raises(two):
    two.run(check_step_without_decision, ENGINES["stage 2"], "unscale_and_clip_grads")
    two.run(check_step_without_decision, ENGINES["stage 3"], "unscale_and_clip_grads")


def check_example(rank):
    with as_launched(rank):
        assert doctest.testmod(zclip_optim.integrations.deepspeed).failed == 0


def test_the_example(two):
    two.run(check_example)


def without_decay(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


class Regression(nn.Module):
    """As the Trainer wants a model."""

    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x, y):
        return {"loss": nn.functional.mse_loss(self.layers(x), y)}


class Rows(torch.utils.data.Dataset):
    """The batches of the ranks in turn, row by row."""

    def __len__(self):
        return STEPS * 2 * 8

    def __getitem__(self, i):
        x, y = batch_of(i // 8 % 2, i // 16)
        return {"x": x[i % 8], "y": y[i % 8]}


def make_trainer(folder, stage, clipping=(("gradient_clipping", "auto"),), **options):
    begin_with_accelerate()
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    arguments = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "max_steps": STEPS}
    arguments |= {"logging_steps": 1, "save_steps": 12, "report_to": "none", "disable_tqdm": True, **options}
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        accelerator_config={"use_configured_state": True},
        deepspeed={"zero_optimization": {"stage": stage}, **dict(clipping), **dict.fromkeys(batch, "auto")},
        **arguments,
    )
    return Trainer(Regression(), arguments, train_dataset=Rows())


def check_trainer(rank, folder, stage):
    with as_launched(rank):
        trainer = make_trainer(folder, stage)
        clipper = attach_deepspeed(trainer, **OPTIONS)
        ZClipCallback.attach(trainer)
        trainer.train()
        expected, params = run_by_hand(range(STEPS), {}, make_optimizer=without_decay)
        torch.testing.assert_close(full_parameters(trainer.deepspeed), params, rtol=0, atol=1e-6)
        *rows, summary = trainer.state.log_history
        for name in LOGGED:
            values = {i: row[f"zclip/{name}"] for i, row in enumerate(rows) if f"zclip/{name}" in row}
            known = {i: getattr(m, name) for i, m in enumerate(expected) if math.isfinite(getattr(m, name))}
            assert values == pytest.approx(known, rel=1e-5)
        assert [row["zclip/grad_norm"] for row in rows] == [row["grad_norm"] for row in rows]
        assert not any(key.startswith("zclip") for key in summary)

        resumed = make_trainer(folder, stage, save_strategy="no")
        goes_on = attach_deepspeed(resumed, **OPTIONS)
        ZClipCallback.attach(resumed)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-12")
        assert torch.equal(full_parameters(resumed.deepspeed), full_parameters(trainer.deepspeed))
        assert goes_on.metrics == clipper.metrics
        assert repr(goes_on.state_dict()) == repr(clipper.state_dict())
        logs = [{k: v for k, v in row.items() if "zclip" in k} for row in resumed.state.log_history[12:-1]]
        assert logs == [{k: v for k, v in row.items() if "zclip" in k} for row in rows[12:]]
        return repr(clipper.metrics)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_clips_logs_saves_and_resumes(two, stage, tmp_path):
    assert len(set(two.run(check_trainer, str(tmp_path), stage))) == 1


def check_refused_trainers(rank, folder):
    with as_launched(rank):
        for options in ({"clipping": ()}, {"max_grad_norm": 1.0}):
            trainer = make_trainer(folder, 2, **options)
            attach_deepspeed(trainer)
            with pytest.raises(ValueError, match=r'gradient_clipping=1\.0 clips.*write "gradient_clipping": 0'):
                trainer.train()
        trainer = make_trainer(folder, 2)
        with pytest.raises(ValueError, match="z_thresh"):
            attach_deepspeed(trainer, z_thresh=-1.0)
        ZClipCallback.attach(trainer)
        with pytest.raises(TypeError, match=r"not a ZClipOptimizer.*\.attach_deepspeed\(trainer\) before train"):
            trainer.train()
        trainer = make_trainer(folder, 2)
        attach_deepspeed(trainer)
        ZClipCallback.attach(trainer, log_parameters=3)
        with pytest.raises(TypeError, match="log_parameters must be None with DeepSpeed"):
            trainer.train()


def test_trainers_that_do_not_fit_are_refused(two, tmp_path):
    two.run(check_refused_trainers, str(tmp_path))


def test_a_trainer_without_deepspeed_is_refused(tmp_path):
    trainer = Trainer(Regression(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match=r"does not run on DeepSpeed: use Trainer\(\.\.\., optimizers="):
        attach_deepspeed(trainer)


def accelerated(**plugin):
    """What prepare returns, and the accelerator."""
    begin_with_accelerate()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(**plugin))
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 8
    model = make_model()
    return *accelerator.prepare(model, without_decay(model)), accelerator


def train_with_accelerate(model, optimizer, accelerator, rank, steps):
    for step in steps:
        x, y = batch_of(rank, step)
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()


def check_accelerate(rank, folder):
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0, "gradient_accumulation_steps": 1}
    with as_launched(rank):
        model, optimizer, accelerator = accelerated(hf_ds_config=config)
        clipper = attach(model, **OPTIONS)
        train_with_accelerate(model, optimizer, accelerator, rank, range(14))
        accelerator.save_state(folder)
        train_with_accelerate(model, optimizer, accelerator, rank, range(14, STEPS))
        expected, params = run_by_hand(range(STEPS), {}, make_optimizer=without_decay)
        torch.testing.assert_close(full_parameters(model), params, rtol=0, atol=1e-6)
        assert clipper.metrics.clipped_steps == expected[-1].clipped_steps
        resumed, optimizer, accelerator = accelerated(hf_ds_config=config)
        goes_on = attach(resumed, **OPTIONS)
        accelerator.load_state(folder)
        train_with_accelerate(resumed, optimizer, accelerator, rank, range(14, STEPS))
        assert torch.equal(full_parameters(resumed), full_parameters(model))
        assert goes_on.metrics == clipper.metrics
        default = accelerated(gradient_clipping=0.0, zero_stage=2)[0]  # which Accelerate does not write down
        refused(default, ValueError, r"gradient_clipping=1\.0 clips, by default if it is not given")


def test_what_accelerate_prepares(two, tmp_path):
    two.run(check_accelerate, str(tmp_path))


def train_with_a_wrapped_optimizer(rank, stage):
    engine, _ = make_engine(ENGINES[f"stage {stage}"], lambda model: ZClipOptimizer(two_groups(model)))
    run(engine, None, rank, range(2))


def check_wrapped_optimizers(rank):
    with as_launched(rank):
        for stage in (2, 3):
            with pytest.raises(ValueError, match=r"integrations\.deepspeed\.attach\(engine\)"):
                train_with_a_wrapped_optimizer(rank, stage)


def test_zero_around_a_wrapped_optimizer_names_attach(two):
    two.run(check_wrapped_optimizers)
