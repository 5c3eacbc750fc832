"""torchtitan's own Trainer, on its debug model with fewer layers and random tokens, on two processes."""

import functools
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torchtitan_on_cpu as cpu
from reference import ReferenceZClip
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
    default_adamw,
    optimizer,
)
from torchtitan.config import ConfigManager, ParallelismConfig, TrainingConfig
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.trainer import Trainer
from training import set_gradients
from world import World

from zclip_optim import ZClipWarning
from zclip_optim.integrations.torchtitan import ZClipOptimizersContainer, attach

pytestmark = pytest.mark.xdist_group("torchtitan")

STEPS, SAVED, SPIKES = 7, 4, (5, 7)
OPTIONS = {"warmup_steps": 3, "z_thresh": 20.0}
FSDP = {"spmd_backend": "partial_dtensor"}
PIPELINE = {**FSDP, "pipeline_parallel_degree": 2}
SAVE = {"enable": True, "interval": SAVED, "last_save_model_only": False}
LOAD = {"enable": True, "load_step": SAVED, "load_only": True}


@pytest.fixture(scope="module")
def titans():
    world = World(2, timeout=150.0)
    yield world
    world.close()


def make_config(folder="", layers=1, experts=False, checkpoint=None, **parallelism):
    return Trainer.Config(
        model_spec=cpu.debug_model(layers, experts),
        dump_folder=folder,
        loss=cpu.SpikyLoss.Config(global_vocab_size=2048),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=2,
            seq_len=8,
            steps=STEPS,
            max_norm=math.inf,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        tokenizer=cpu.NoTokenizer.Config(),
        dataloader=cpu.RandomTokens.Config(),
        metrics=cpu.Rows.Config(log_freq=1),
        activation_checkpoint=None,
        checkpoint=CheckpointManager.Config(**(checkpoint or {})),
        parallelism=ParallelismConfig(**(parallelism or FSDP)),
    )


def build(config):
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the process group
    trainer = config.build()
    trainer.loss_fn.trainer, trainer.loss_fn.spikes = trainer, SPIKES
    return trainer


class Record:
    """What happens at each step of a trainer: ZClip's metrics, the norm that torchtitan logs, the parameters then."""

    def __init__(self, trainer):
        self.metrics, self.parameters = [], []
        self.params = [p for part in trainer.model_parts for p in part.parameters()]
        trainer.optimizers.register_step_post_hook(self.look)
        trainer.train()
        self.norms = [norm for _, _, norm in trainer.metrics_processor.rows]
        del self.params

    def look(self, container, *_):
        if isinstance(container, ZClipOptimizersContainer):
            self.metrics.append(container.zclip.metrics)
        self.parameters.append(torch.cat([local(p).flatten() for p in self.params]).clone())


def local(p):
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


def on_ranks(body):
    """torchtitan's warnings, of the CPU and of torch, are no errors there; ZClip's are."""

    @functools.wraps(body)
    def with_filters(rank, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", ZClipWarning)
            return body(*args)

    return with_filters


@on_ranks
def run(config_options, options):
    config = make_config(**config_options)
    return Record(build(config if options is None else attach(config, **options)))


@on_ranks
def run_from_bare(config_options):
    """The same on a checkpoint that has no statistics, and the warning of it."""
    config = attach(make_config(**config_options), **OPTIONS)
    config.optimizer.from_bare_checkpoint = True
    trainer = build(config)
    with pytest.warns(ZClipWarning, match="from_bare_checkpoint: the statistics start afresh"):
        return Record(trainer)


@on_ranks
def run_beside_exact_norms(config_options):
    trainer, norms = build(attach(make_config(**config_options), **OPTIONS)), []

    def measure(*_):
        gradients = [p.grad.full_tensor() for part in trainer.model_parts for p in part.parameters()]
        square = sum(gradient.double().square().sum() for gradient in gradients)
        if trainer.parallel_dims.pp_enabled:
            dist.all_reduce(square)
        norms.append(math.sqrt(square))

    trainer.optimizers.register_step_pre_hook(measure)
    return Record(trainer), norms


@pytest.mark.parametrize(
    "config",
    [
        FSDP,
        {"spmd_backend": "full_dtensor", "data_parallel_replicate_degree": 2},
        {"spmd_backend": "full_dtensor", "tensor_parallel_degree": 2},
        {"layers": 2, **PIPELINE, "pipeline_parallel_schedule": "1F1B"},
        {"layers": 4, **PIPELINE, "pipeline_parallel_schedule": "Interleaved1F1B"},
        {"layers": 2, "experts": True, **FSDP, "expert_parallel_degree": 2},
    ],
    ids=["fsdp", "replicate", "tensor", "pipeline", "interleaved", "experts"],
)
def test_norms_are_exact_and_torchtitans_own(titans, config):
    """torch's foreach norm, which torchtitan logs, is 4e-5 off on the CPU for the largest matrices here."""
    (one, exact), (other, _) = titans.run(run_beside_exact_norms, config)
    assert one.metrics == other.metrics
    assert [row.clipped for row in one.metrics] == [step in SPIKES for step in range(1, STEPS + 1)]
    assert [row.grad_norm for row in one.metrics] == pytest.approx(exact, rel=1e-6)
    assert [row.grad_norm for row in one.metrics] == pytest.approx(one.norms, rel=1e-4)


@on_ranks
def run_clipping_by_hand():
    trainer = build(make_config())
    params, reference = list(trainer.model_parts[0].parameters()), ReferenceZClip(**OPTIONS)

    def clip(*_):
        norm = clip_grad_norm_(params, math.inf).item()
        coef = reference.step(norm) / norm
        for p in params:
            p.grad.mul_(coef)

    trainer.optimizers.register_step_pre_hook(clip)
    return Record(trainer)


def test_clipped_steps_equal_clipping_by_hand_and_others_are_torchtitans(titans):
    ours, bare = titans.run(run, {}, OPTIONS)[0], titans.run(run, {}, None)[0]
    for step in range(1, SPIKES[0]):
        assert torch.equal(ours.parameters[step - 1], bare.parameters[step - 1])
    by_hand = titans.run(run_clipping_by_hand)[0]
    torch.testing.assert_close(ours.parameters[-1], by_hand.parameters[-1], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours.parameters[-1], bare.parameters[-1], rtol=1e-3, atol=1e-4)


def saved_keys(folder, step):
    return FileSystemReader(f"{folder}/checkpoint/step-{step}").read_metadata().state_dict_metadata.keys()


def test_resume_gives_the_same_rows(titans, tmp_path):
    folder = {"folder": str(tmp_path)}
    straight = titans.run(run, {**folder, "checkpoint": SAVE}, OPTIONS)
    keys = saved_keys(tmp_path, SAVED)
    names = {key.removesuffix(".lr") for key in keys if key.endswith(".lr")}
    assert "optimizer.param_groups.layers.0.attention.wo.weight" in names
    assert all(f"{name}.zclip_mean" in keys for name in names)
    resumed = titans.run(run, {**folder, "checkpoint": LOAD}, {**OPTIONS, "z_thresh": 21.0})
    strict = titans.run(run, {**folder, "checkpoint": LOAD}, OPTIONS)
    for one, other in zip(straight, strict, strict=True):
        assert other.metrics == one.metrics[SAVED:]
        assert torch.equal(other.parameters[-1], one.parameters[-1])
    assert resumed[0].metrics[0].clip_coef != straight[0].metrics[SAVED].clip_coef  # hyperparameters are not saved


def test_statistics_of_pipeline_stages_resume_without_a_pipeline(titans, tmp_path):
    stages = {"layers": 4, **PIPELINE, "pipeline_parallel_schedule": "Interleaved1F1B"}
    straight = titans.run(run, {"folder": str(tmp_path), "checkpoint": SAVE, **stages}, OPTIONS)[0]
    load = {**LOAD, "exclude_from_loading": ["dataloader"]}
    one, other = titans.run(run, {"folder": str(tmp_path), "checkpoint": load, "layers": 4}, OPTIONS)
    assert one.metrics == other.metrics
    assert one.metrics[0].step == SAVED + 1
    assert one.metrics[0].threshold == pytest.approx(straight.metrics[SAVED].threshold, rel=0.1)


@on_ranks
def refuse_bare(config_options):
    trainer = build(attach(make_config(**config_options), **OPTIONS))
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint.*param_groups\..*\.zclip"):
        trainer.train()


def test_a_bare_checkpoint_loads_as_far_as_dcp_lets_it(titans, tmp_path):
    """The statistics start afresh, so that the steps after it are warm-up, and those of a run without ZClip."""
    folder = {"folder": str(tmp_path)}
    bare = titans.run(run, {**folder, "checkpoint": SAVE}, None)[0]
    assert not [key for key in saved_keys(tmp_path, SAVED) if "zclip" in key]
    titans.run(refuse_bare, {**folder, "checkpoint": LOAD})

    model_only = titans.run(run, {**folder, "checkpoint": {**LOAD, "exclude_from_loading": ["optimizer"]}}, OPTIONS)[0]
    assert [row.step for row in model_only.metrics] == [1, 2, 3]
    assert not torch.equal(model_only.parameters[-1], bare.parameters[-1])  # the moments are lost

    from_bare = titans.run(run_from_bare, {**folder, "checkpoint": {**SAVE, "load_step": SAVED}})[0]
    assert [row.step for row in from_bare.metrics] == [1, 2, 3]
    assert torch.equal(from_bare.parameters[-1], bare.parameters[-1])
    assert [key for key in saved_keys(tmp_path, STEPS) if key.endswith("zclip_mean")]


def test_a_checkpoint_loads_into_torchtitans_container(titans, tmp_path):
    folder = {"folder": str(tmp_path)}
    titans.run(run, {**folder, "checkpoint": SAVE}, OPTIONS)
    bare, resumed = titans.run(run, {}, None)[0], titans.run(run, {**folder, "checkpoint": LOAD}, None)[0]
    assert torch.equal(resumed.parameters[-1], bare.parameters[-1])


@on_ranks
def run_with_nan(options):
    trainer = build(attach(make_config(), **options))

    def spoil(*_):
        if trainer.step == 3 and dist.get_rank() == 1:
            local(next(trainer.model_parts[0].parameters()).grad)[0] = math.nan

    trainer.optimizers.register_step_pre_hook(spoil)
    return Record(trainer)


def test_steps_are_left_out_on_all_ranks(titans):
    """The third, of NaN on one of them, and the first spike, which is above z_skip."""
    for record in titans.run(run_with_nan, {**OPTIONS, "z_skip": 50.0}):
        assert [row.skipped for row in record.metrics] == [step in (3, *SPIKES) for step in range(1, STEPS + 1)]
        for i in range(1, STEPS):
            assert torch.equal(record.parameters[i], record.parameters[i - 1]) == record.metrics[i].skipped


@on_ranks
def refuse_to_clip_after_torchtitan():
    config = attach(make_config())
    config.training.max_norm = 0
    with pytest.raises(ValueError, match=r"all gradients are 0 at the first step: training.max_norm must be inf"):
        build(config).train()
    config = attach(make_config())
    config.training.max_norm = 1.0
    with pytest.warns(ZClipWarning, match=r"the first gradient norm is 1.0000: training.max_norm must be inf"):
        build(config).train()


def test_torchtitan_must_not_clip_first(titans):
    titans.run(refuse_to_clip_after_torchtitan)


@on_ranks
def count_hooks():
    config, calls = make_config(), []
    config.model_spec.post_optimizer_build_fn = lambda optimizers, *_: optimizers.register_step_pre_hook(
        lambda *_: calls.append(optimizers)
    )
    plain = OptimizersContainer(default_adamw(), model_parts=[nn.Linear(2, 1)])  # torch puts hooks around its step()
    trainer = build(attach(config))
    trainer.train()
    return len(plain), len(trainer.optimizers), len(calls)


def test_the_hooks_of_the_model_run_once_a_step(titans):
    assert titans.run(count_hooks) == [(1, 1, STEPS)] * 2


def zclip_config():
    return attach(make_config(), z_thresh=3.0)


@on_ranks
def run_from_command_line():
    args = ["--module", __name__, "--config", "zclip_config", "--training.steps=2", "--optimizer.from_bare_checkpoint"]
    config = ConfigManager().parse_args(args)
    record = Record(build(config))
    return config.training.max_norm, config.optimizer.from_bare_checkpoint, config.optimizer.zclip, record.metrics


def test_torchtitans_command_line_takes_it(titans):
    max_norm, from_bare, options, metrics = titans.run(run_from_command_line)[0]
    assert (max_norm, from_bare, options, len(metrics)) == (math.inf, True, {"z_thresh": 3.0}, 2)


# What follows needs no Trainer.


def make_container(zclip=None, groups=None, parts=1, knows_stages=True, kind=ZClipOptimizersContainer):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)) for _ in range(parts)]
    models = [nn.ModuleDict({f"part{i}": model}) for i, model in enumerate(models)]
    options = {} if kind is OptimizersContainer else {"zclip": zclip or {}}
    groups = groups or default_adamw().param_groups
    container = kind.Config(param_groups=groups, implementation="foreach", **options).build(model_parts=models)
    if knows_stages and kind is ZClipOptimizersContainer:
        container.sum_over(None)
    return container


def parameters(container):
    return [p for part in container.model_parts for p in part.parameters()]


def step(container, norm):
    set_gradients(parameters(container), norm)
    container.step()


def norm_of(gradients):
    return math.sqrt(sum(gradient.double().square().sum() for gradient in gradients))


def group(pattern, name, **kwargs):
    return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 1e-2, **kwargs})


def test_all_optimizers_of_all_parts_have_one_norm():
    container = make_container(OPTIONS, [group("bias", "Adam", zclip=False), group(".*", "AdamW")], parts=2)
    assert len(container) == 4
    assert len(LRSchedulersContainer.Config().build(optimizers=container, training_steps=1000)) == 4
    for norm in (2.0, 2.1, 1.9):
        step(container, norm)
    set_gradients(parameters(container), 50.0)
    weights = [p.grad for p in parameters(container) if p.dim() == 2]
    biases = [p.grad for p in parameters(container) if p.dim() == 1]
    before = norm_of(weights), norm_of(biases)
    container.step()
    metrics = container.zclip.metrics
    assert metrics.clipped
    assert (metrics.grad_norm, norm_of(biases)) == pytest.approx(before, rel=1e-6)
    assert metrics.clipped_norm == pytest.approx(norm_of(weights), rel=1e-6)


def test_state_dicts_go_into_another_container_and_out_of_torchtitans():
    container = make_container(OPTIONS, parts=2)
    for norm in (2.0, 1.1, 0.9, 50.0):
        step(container, norm)
    state_dict = container.state_dict()
    assert state_dict["param_groups.part1.1.bias.zclip_step"] == 4
    other = make_container(OPTIONS, parts=2)
    other.load_state_dict(state_dict)
    assert other.state_dict().keys() == state_dict.keys()
    torch.manual_seed(1)
    step(container, 5.0)
    torch.manual_seed(1)
    step(other, 5.0)
    assert other.zclip.metrics == container.zclip.metrics

    plain = make_container(parts=2, kind=OptimizersContainer)
    plain.load_state_dict(state_dict)
    container.load_state_dict(plain.state_dict())
    step(container, 1.0)
    assert container.zclip.metrics.step == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("zclip_var", -1.0, r"zclip_var in saved param_groups\[0\] must be a finite number >= 0; got -1.0"),
        ("zclip", 1, r"'zclip' in param_groups\[0\] must be True or False, got 1"),
    ],
)
def test_a_malformed_state_dict_changes_nothing(key, value, message):
    container = make_container(OPTIONS)
    step(container, 2.0)
    state_dict = container.state_dict()
    before = str(state_dict)
    changed = {name: 2 * old if name.startswith("state.") else old for name, old in state_dict.items()}
    changed |= {name: value for name in changed if name.endswith(f".{key}")}
    with pytest.raises(ValueError, match=message):
        container.load_state_dict(changed)
    assert str(container.state_dict()) == before


def test_other_names_in_a_state_dict_are_refused(monkeypatch):
    container = make_container()
    flat = optimizer.get_flat_optim_state_dict
    monkeypatch.setattr(optimizer, "get_flat_optim_state_dict", lambda o: {f"{k}_": v for k, v in flat(o).items()})
    with pytest.raises(RuntimeError, match=r"names what is in a state dict otherwise than 0\.3 does"):
        container.state_dict()


def test_attach_or_nothing():
    container = make_container(knows_stages=False)
    with pytest.raises(ValueError, match=r"whether there are pipeline stages: use attach\(config\)"):
        step(container, 2.0)
    config = attach(make_config())
    with pytest.raises(
        TypeError, match=r"must be an OptimizersContainer\.Config, got ZClipOptimizersContainer\.Config"
    ):
        attach(config)
    with pytest.raises(TypeError, match=r"config\.optimizer was replaced after attach\(config\): nothing clips"):
        config.model_spec.post_optimizer_build_fn(make_container(kind=OptimizersContainer), [], None)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"alpha": 1.5}, r"alpha must be a number with 0 <= alpha < 1, got 1.5"),
        (TypeError, {"process_group": None}, "unexpected keyword argument 'process_group'"),
    ],
)
def test_options_are_checked_at_once(error, options, message):
    config = make_config()
    config.training.max_norm = 1.0
    with pytest.raises(error, match=message):
        attach(config, **options)
    assert type(config.optimizer) is OptimizersContainer.Config
    assert config.training.max_norm == 1.0
    assert config.model_spec.post_optimizer_build_fn is None
