"""DeepSpeed's own engines on two gloo ranks on the CPU, beside one process that clips by hand and the bare engine."""

import doctest

import deepspeed_training
import pytest
import torch
from deepspeed.runtime import utils
from deepspeed_training import (
    BF16_ENGINES,
    ENGINES,
    OPTIONS,
    OUTLIERS,
    STEPS,
    as_launched,
    deepspeed,
    full_parameters,
    make_engine,
    moments,
    run,
    run_by_hand,
)
from training import make_model

import zclip_optim.integrations.deepspeed
from zclip_optim import NonFiniteGradientError, ZClipOptimizer
from zclip_optim.integrations.deepspeed import attach

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


def check_accumulation(rank, config):
    return check_against_one_process(rank, {**config, "gradient_accumulation_steps": 2}, accumulate=2)


@every_way
def test_accumulation(two, config):
    two.run(check_accumulation, config)


def check_param_groups(rank, config):
    return check_against_one_process(rank, config, make_optimizer=two_groups)


@every_way
def test_param_groups(two, config):
    two.run(check_param_groups, config)


def check_that_nothing_else_changes(rank, config):
    with as_launched(rank):
        (engine, clipper), (bare, _) = make_engine(config, z_thresh=1e9), make_engine(config)
        run(engine, clipper, rank, range(6))
        run(bare, None, rank, range(6))
        assert clipper.metrics.step == 6
        assert torch.equal(full_parameters(engine), full_parameters(bare))


@every_engine
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
            assert (metrics.skipped, metrics.clipped) == (True, is_spike)
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
    with as_launched(rank):
        for config, text in [
            ({"gradient_clipping": 1.0}, r'gradient_clipping=1\.0 .*write "gradient_clipping": 0'),
            ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm must not be false"),
            ({"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True, "dtype": "float16"}}, "float16"),
        ]:
            refused(make_engine(config)[0], ValueError, text)
        refused(make_engine({}, lambda model: ZClipOptimizer(two_groups(model)))[0], ValueError, "this ZClipOptimizer")
        model = make_model()
        default, *_ = deepspeed.initialize(
            model=model, optimizer=two_groups(model), config={"train_micro_batch_size_per_gpu": 8}
        )
        refused(default, ValueError, r"gradient_clipping=1\.0 clips, by default")
        plain, _ = make_engine({})
        plain.mpu = object()
        refused(plain, ValueError, "mpu: .*use stage 1")
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
