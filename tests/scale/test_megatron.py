"""megatron-core's own optimizers with ZClip attached, against one process that clips by hand; gloo, and no GPU."""

import copy
import functools
import io
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from world import World

from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer, ZClipWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Apex and Transformer Engine, which are not installed
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import (
        ChainedOptimizer,
        DistributedOptimizer,
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
        MegatronOptimizer,
        OptimizerConfig,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import MegatronModule, TransformerConfig
    from megatron_on_cpu import on_cpu, saving

    from zclip_optim.integrations.megatron import attach

pytestmark = pytest.mark.xdist_group("megatron")


@pytest.fixture(scope="module")
def two():
    """Processes of their own: Megatron keeps what it knows of ranks in globals, and is slow to import."""
    world = World(2, timeout=150.0)
    yield world
    world.close()


STEPS, OUTLIERS, BATCH = 20, (9, 15), 8
OPTIONS = {"warmup_steps": 5, "z_thresh": 8.0}


class Experts(nn.Module):
    """Each takes an equal part of the batch, in order."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, h):
        return (h.view(len(self.weight), -1, 16) @ self.weight).flatten(0, 1)


class Layers(nn.Module):
    """In one process."""

    def __init__(self, experts=False, trained=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.middle = Experts(torch.randn(2, 16, 8) / 4) if experts else nn.Linear(16, 8)
        self.last = nn.Linear(8, 1)
        for name, p in self.named_parameters():
            p.requires_grad = trained is None or name in trained

    def forward(self, x):
        return forward(self, x)


def forward(model, h):
    for layer in (model.first, model.middle, model.last):
        h = layer(h if layer is model.first else h.tanh())
        h = h[0] if isinstance(h, tuple) else h  # Megatron's layers return a bias beside
    return h


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, x.sum(1, keepdim=True) + (100.0 if step in OUTLIERS else 0.0)


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x).float(), y)


class Model(MegatronModule):
    """The same, with what this rank has of the layers."""

    def __init__(self, config, layers):
        super().__init__(config)
        self.first, self.middle, self.last = layers.first, layers.middle, layers.last
        if config.expert_model_parallel_size == 2:
            self.middle = TheirExperts(self.middle)
        if config.tensor_model_parallel_size == 2:
            self.first = split_layer(ColumnParallelLinear, self.first, config, gather_output=False)
            row = {"input_is_parallel": True, "bias": True, "skip_bias_add": False}
            self.middle = split_layer(RowParallelLinear, self.middle, config, **row)

    def forward(self, x):
        return forward(self, x.to(self.last.weight.dtype))


class TheirExperts(Experts):
    """The experts of this rank."""

    def __init__(self, whole):
        self.rank, self.size = parallel_state.get_expert_model_parallel_rank(), 2
        super().__init__(whole.weight.detach()[self.rank : self.rank + 1].clone())
        self.weight.allreduce, self.weight.partition_dim = False, 0

    def sharded_state_dict(self, prefix="", *_, **__):
        key = f"{prefix}weight"
        return {key: ShardedTensor.from_rank_offsets(key, self.weight, (0, self.rank, self.size))}


def split_layer(kind, layer, config, **options):
    """A layer of Megatron with this rank's part of the weights."""
    split = kind(layer.in_features, layer.out_features, config=config, init_method=nn.init.zeros_, **options)
    for mine, whole in zip(split.parameters(), layer.parameters(), strict=True):
        dim = getattr(mine, "partition_dim", -1)
        mine.data.copy_(whole if dim == -1 else whole.chunk(2, dim)[parallel_state.get_tensor_model_parallel_rank()])
    return split


LAID_OUT = {}  # in this process


def lay_out(**sizes):
    """Megatron's process groups; it makes some 25 each time, which gloo keeps with all their threads."""
    if sizes == LAID_OUT:
        return
    parallel_state.destroy_model_parallel()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(**sizes)
    LAID_OUT.update(sizes)


class Training:
    """A model, its optimizer of megatron-core and, if there are options for it, what `attach` returned."""

    def __init__(self, kind, clip=None, trained=None, **config):
        words = kind.split()
        self.experts, self.split = "experts" in words, "tensor" in words
        self.distributed = "distributed" in words
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        mixed = {name: True for name in dtypes if name in words}
        sizes = {"expert_model_parallel_size": 1 + self.experts, "tensor_model_parallel_size": 1 + self.split}
        lay_out(**sizes)
        moe = {"num_moe_experts": 2, "add_bias_linear": False} if self.experts else {}
        model_config = TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, **sizes, **moe, **mixed
        )
        model = Model(model_config, Layers(self.experts, trained))
        for p in model.parameters():
            p.data = p.data.to(next((dtypes[name] for name in mixed), torch.float32))
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=self.distributed, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model_config, ddp, model)
        config = {"lr": 1e-2, "clip_grad": 0.0, "use_distributed_optimizer": self.distributed, **mixed, **config}
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**config), [self.model])
        self.clipper = None if clip is None else attach(self.optimizer, **clip)

    def backward(self, step):
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        x, y = (rows.chunk(size)[rank] for rows in make_batch(step))
        self.optimizer.scale_loss(loss_of(self.model, x, y)).sum().backward()

    def step(self):
        self.model.finish_grad_sync()
        return self.optimizer.step()

    def run(self, steps):
        history = []
        for step in steps:
            self.backward(step)
            success, norm, _ = self.step()
            history.append((success, norm, self.clipper and self.clipper.metrics))
        return history

    def parameters(self):
        """Of the whole model, in order."""
        return torch.cat([whole(p).detach().float().reshape(-1) for p in self.model.parameters()])


def whole(p):
    dim = getattr(p, "partition_dim", -1)
    if dim == -1:
        return p
    parts = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(parts, p.detach().contiguous())
    return torch.cat(parts, dim)


def on_a_rank(check):
    """Only what ZClip warns of is an error here: Megatron warns of Apex, of gloo and of torch's own old names."""

    @functools.wraps(check)
    def wrapped(rank, *args):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", ZClipWarning)
        with on_cpu():
            return check(rank, *args)

    return wrapped


KINDS = ("fp32", "distributed", "experts", "experts distributed", "tensor", "tensor distributed")
every_kind = pytest.mark.parametrize("kind", KINDS)


def by_hand(steps, **which):
    model = Layers(**which)
    optimizer, clipper = torch.optim.AdamW(model.parameters(), lr=1e-2), ZClip(**OPTIONS)
    history = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *make_batch(step)).backward()
        clipper.step(model)
        optimizer.step()
        history.append(clipper.metrics)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), history


@on_a_rank
def check_training(rank, kind):
    training = Training(kind, OPTIONS)
    history = training.run(range(STEPS))
    expected, metrics = by_hand(range(STEPS), experts=training.experts)
    torch.testing.assert_close(training.parameters(), expected, rtol=0, atol=1e-6)
    for (success, norm, theirs), ours in zip(history, metrics, strict=True):
        assert success
        assert norm == theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-6)
        assert theirs.clip_coef == pytest.approx(ours.clip_coef, rel=1e-5)
    assert [i for i, (*_, m) in enumerate(history) if m.clipped] == list(OUTLIERS)
    return training.clipper.state_dict()


@every_kind
def test_training_is_that_of_one_process(two, kind):
    first, second = two.run(check_training, kind)
    assert first == second  # bit for bit


@on_a_rank
def check_bare(rank, kind):
    bare = Training(kind)
    expected = bare.run(range(STEPS))
    expected_parameters = bare.parameters()
    training = Training(kind, {"warmup_steps": 1000})
    history = training.run(range(STEPS))
    assert [entry[:2] for entry in history] == [entry[:2] for entry in expected]
    assert torch.equal(training.parameters(), expected_parameters)


@pytest.mark.parametrize("kind", [*KINDS, "bf16", "bf16 distributed"])
def test_without_a_spike_it_is_the_bare_optimizer(two, kind):
    two.run(check_bare, kind)


@on_a_rank
def check_bf16(rank, kind):
    """The norm is of gradients that were computed in bf16: three digits. What is clipped and by how much follows."""
    training = Training(kind, OPTIONS)
    history = training.run(range(STEPS))
    _, metrics = by_hand(range(STEPS))
    for (_, norm, _), ours in zip(history, metrics, strict=True):
        assert norm == pytest.approx(ours.grad_norm, rel=0.05)
    assert [i for i, (*_, m) in enumerate(history) if m.clipped] == list(OUTLIERS)
    return training.clipper.state_dict()


@pytest.mark.parametrize("kind", ["bf16", "bf16 distributed"])
def test_bf16_clips_the_same_steps(two, kind):
    first, second = two.run(check_bf16, kind)
    assert first == second


def spoil(training, rank, value):
    """An element of what rank 1 has of the gradient of the layer that may be split, before the ranks sum them."""
    if rank == 1:
        list(training.model.parameters())[2].main_grad.view(-1)[-1] = value


@on_a_rank
def check_skips(rank, kind):
    training = Training(kind, {**OPTIONS, "z_skip": 20.0})
    training.run(range(8))
    mean = training.clipper.metrics.mean
    counts = []
    for step, value in ((8, math.nan), (9, None), (10, math.inf)):  # 9 is an outlier
        before, moments = training.parameters(), inner_state(training)
        training.backward(step)
        if value is not None:
            spoil(training, rank, value)
        success, _, _ = training.step()
        assert success is False
        assert training.clipper.step_was_skipped
        assert training.clipper.metrics.clipped == (value is None)
        assert (training.clipper.metrics.mean == mean) == (value is not None or step == 10)
        mean = training.clipper.metrics.mean
        assert torch.equal(training.parameters(), before)
        assert inner_state(training) == moments
        counts.append(training.clipper.metrics.skipped_steps)
    assert counts == [1, 2, 3]
    assert training.optimizer.param_groups[-1]["zclip_skipped_steps"] == 3
    assert training.run([11])[0][0] is True
    return training.clipper.state_dict()


def inner_state(training):
    """Moments and step counters, as numbers."""
    return [
        value.tolist()
        for part in training.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]


@every_kind
def test_a_step_is_left_out_on_all_ranks(two, kind):
    first, second = two.run(check_skips, kind)
    assert first == second


@on_a_rank
def check_overflows(rank, kind):
    """The scaler begins with a scale at which fp16 overflows, and halves it until it does not."""
    training = Training(kind, OPTIONS, initial_loss_scale=2.0**20, hysteresis=1, min_loss_scale=1.0)
    history = training.run(range(STEPS))
    overflows = [norm is None for _, norm, _ in history]
    assert 0 < sum(overflows) < 10
    assert training.clipper.metrics.step == STEPS - sum(overflows)
    assert training.clipper.metrics.skipped_steps == 0
    assert [success for success, *_ in history] == [not overflow for overflow in overflows]


@pytest.mark.parametrize("kind", ["fp16", "fp16 distributed"])
def test_overflows_of_the_loss_scaler_are_not_counted(two, kind):
    two.run(check_overflows, kind)


def through_a_file(training, kind, clip):
    file = io.BytesIO()
    torch.save((training.model.state_dict(), training.optimizer.state_dict()), file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    another = Training(kind, clip)
    another.model.load_state_dict(model_state)
    another.optimizer.load_state_dict(optimizer_state)
    return another


def sharded(training, metadata, is_loading=False):
    model = training.model.module.sharded_state_dict(metadata=metadata)
    return {"model": model, "optimizer": training.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def saved_and_loaded(training, another, folder, sharding):
    metadata = {"distrib_optim_sharding_type": sharding} if sharding else {}
    with saving():
        dist_checkpointing.save(sharded(training, metadata), folder)
    if another.distributed:
        another.run([0])  # else there is no step of torch's AdamW, which Megatron asks for; all is loaded again
    return dist_checkpointing.load(sharded(another, metadata, is_loading=True), folder)


def through_dist_checkpointing(training, kind, clip, folder, sharding):
    another = Training(kind, clip)
    loaded = saved_and_loaded(training, another, folder, sharding)
    another.model.module.load_state_dict(loaded["model"])
    with torch.no_grad():  # the distributed optimizer copies in place
        another.optimizer.load_state_dict(loaded["optimizer"])
    for part in another.optimizer.chained_optimizers if another.distributed else ():
        for group in part.optimizer.param_groups:
            for p in group["params"]:  # it loads no step but that of Apex's and Transformer Engine's Adam
                part.optimizer.state[p]["step"] = torch.tensor(float(group["step"]))
    return another


@on_a_rank
def check_that_it_goes_on(rank, kind, through, *args):
    expected = Training(kind, OPTIONS)
    history = expected.run(range(STEPS))
    training = Training(kind, OPTIONS)
    training.run(range(12))
    training = through(training, kind, OPTIONS, *args)
    assert training.run(range(12, STEPS)) == history[12:]
    assert torch.equal(training.parameters(), expected.parameters())
    assert training.clipper.metrics.clipped_steps == len(OUTLIERS)


@pytest.mark.parametrize("kind", ["fp32", "experts", "tensor", "bf16"])
def test_it_goes_on_from_its_state_dict(two, kind):
    two.run(check_that_it_goes_on, kind, through_a_file)


@pytest.mark.parametrize(
    ("kind", "sharding"),
    [(kind, None) for kind in ("fp32", "experts", "tensor", "bf16")]
    + [(f"{kind}distributed", "dp_reshardable") for kind in ("", "experts ", "tensor ", "bf16 ")],
)
def test_it_goes_on_from_its_sharded_state_dict(two, kind, sharding, tmp_path):
    two.run(check_that_it_goes_on, kind, through_dist_checkpointing, str(tmp_path), sharding)


@on_a_rank
def check_other_shardings(rank, kind, sharding, folder):
    """Megatron writes them, but finds no step of torch's AdamW when it loads the moments."""
    training, another = Training(kind, OPTIONS), Training(kind, OPTIONS)
    training.run(range(12))
    loaded = saved_and_loaded(training, another, folder, sharding)["optimizer"]
    for state in loaded.values() if training.experts else [loaded]:
        del state["param_state"]
    another.optimizer.load_state_dict(loaded)
    assert another.clipper.state_dict() == training.clipper.state_dict()


@pytest.mark.parametrize("kind", ["distributed", "experts distributed"])
@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_zero_gather_scatter"])
def test_the_statistics_are_in_other_shardings(two, kind, sharding, tmp_path):
    two.run(check_other_shardings, kind, sharding, str(tmp_path))


@on_a_rank
def check_other_checkpoints(rank, kind):
    bare, training = Training(kind), Training(kind, OPTIONS)
    bare.run(range(8))
    training.run(range(12))
    assert training.clipper.metrics.step == 12
    attached_late = Training(kind)
    attached_late.run([0])
    attached_late.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert attach(attached_late.optimizer, **OPTIONS).state_dict() == training.clipper.state_dict()

    malformed = copy.deepcopy(training.optimizer.state_dict())
    for group in groups_of(malformed):
        group["zclip_var"] = -1.0
    before = training.parameters(), inner_state(training), training.clipper.state_dict()
    with pytest.raises(
        ValueError, match=r"zclip_var in saved param_groups\[0\] must be a finite number >= 0; got -1.0"
    ):
        training.optimizer.load_state_dict(malformed)
    assert torch.equal(training.parameters(), before[0])
    assert (inner_state(training), training.clipper.state_dict()) == before[1:]

    training.optimizer.load_state_dict(copy.deepcopy(bare.optimizer.state_dict()))
    assert training.clipper.metrics.step == training.optimizer.param_groups[-1]["zclip_step"] == 0
    assert training.run(range(10, 20))[-1][2].step == 10  # no outlier in its warm-up


def groups_of(state_dict):
    """Of what `state_dict` of a chain of one or more parts returned."""
    states = state_dict if isinstance(state_dict, list) else [state_dict]
    return [group for state in states for group in state.get("optimizer", state)["param_groups"]]


@every_kind
def test_other_checkpoints(two, kind):
    two.run(check_other_checkpoints, kind)


@on_a_rank
def check_single_optimizers(rank, kind, expected_class):
    """Those that Megatron puts into chains, by themselves: they measure no norm of their own accord."""
    chained, alone = Training(kind, OPTIONS), Training(kind)
    (optimizer,) = alone.optimizer.chained_optimizers
    assert type(optimizer) is expected_class
    alone.optimizer, alone.clipper = optimizer, attach(optimizer, **OPTIONS)
    assert alone.run(range(STEPS)) == chained.run(range(STEPS))
    assert alone.clipper.metrics.clipped_steps == len(OUTLIERS)
    assert torch.equal(alone.parameters(), chained.parameters())
    assert optimizer.state_dict().get("optimizer", optimizer.state_dict())["param_groups"][0]["zclip_step"] == STEPS


@pytest.mark.parametrize(
    ("kind", "expected_class"),
    [("fp32", FP32Optimizer), ("bf16", Float16OptimizerWithFloat16Params), ("distributed", DistributedOptimizer)],
)
def test_single_optimizers(two, kind, expected_class):
    two.run(check_single_optimizers, kind, expected_class)


@on_a_rank
def check_layer_wise(rank):
    """Each rank has the parameters of some layers; the norm is that of all."""
    trained = {"middle.bias", "last.weight"}  # of one size, as gloo gathers no others
    training = Training("fp32", trained=trained)
    groups = ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
    parts = list(training.optimizer.chained_optimizers)
    training.optimizer = LayerWiseDistributedOptimizer(parts, parts[0].config, groups)
    training.clipper = attach(training.optimizer, **OPTIONS)
    history = training.run(range(STEPS))
    expected, metrics = by_hand(range(STEPS), trained=trained)
    torch.testing.assert_close(training.parameters(), expected, rtol=0, atol=1e-6)
    assert [norm for _, norm, _ in history] == pytest.approx([m.grad_norm for m in metrics], rel=1e-6)
    return training.clipper.state_dict()


def test_layer_wise_optimizers(two):
    first, second = two.run(check_layer_wise)
    assert first == second


@on_a_rank
def check_what_is_not_a_step(rank):
    training = Training("experts", OPTIONS)
    training.run(range(8))
    state, before = training.clipper.state_dict(), training.parameters()
    training.backward(8)
    training.model.finish_grad_sync()
    training.optimizer.prepare_grads()
    norm = training.optimizer.get_grad_norm()
    assert training.optimizer.get_grad_norm() == norm > 0  # measured as often as one likes
    for part in training.optimizer.chained_optimizers:
        with pytest.raises(RuntimeError, match=r"ZClip has not decided: call step\(\) of what attach\(\) was given"):
            part.step()
    assert training.clipper.state_dict() == state
    assert torch.equal(training.parameters(), before)
    training.optimizer.prepare_grads()
    assert training.optimizer.step_with_ready_grads()  # decides, measured or not
    assert training.clipper.metrics.step == 9
    assert not torch.equal(training.parameters(), before)
    training.backward(9)
    training.optimizer.config.clip_grad = 1.0
    with pytest.raises(ValueError, match=r"clip_grad=1\.0 of the OptimizerConfig"):
        training.step()
    assert training.clipper.metrics.step == 9


def test_what_is_not_a_step_is_not_counted_and_none_goes_by(two):
    two.run(check_what_is_not_a_step)


@on_a_rank
def check_raising(rank):
    training = Training("distributed", {**OPTIONS, "nonfinite": "raise"})
    training.run(range(8))
    before = training.parameters()
    training.backward(8)
    spoil(training, rank, math.nan)
    with pytest.raises(NonFiniteGradientError, match="after 8 finite steps, for 1 in a row"):
        training.step()
    assert torch.equal(training.parameters(), before)


def test_a_nan_raises_on_all_ranks_if_told_to(two):
    two.run(check_raising)


@on_a_rank
def check_refusals(rank):
    def refused(optimizer, error, text, **options):
        before = snapshot(optimizer)
        with pytest.raises(error, match=text):
            attach(optimizer, **options)
        assert snapshot(optimizer) == before

    training = Training("experts")
    optimizer, (dense, experts) = training.optimizer, training.optimizer.chained_optimizers
    refused(dense.optimizer, TypeError, "takes what get_megatron_optimizer returned, got AdamW")
    refused(training.model, TypeError, "got DistributedDataParallel")
    refused(optimizer, ValueError, "z_thresh must be a finite number > 0, got -1", z_thresh=-1)
    refused(optimizer, ValueError, r"leave out process_group and scope, got \{'scope': 'group'\}", scope="group")
    refused(
        optimizer, ValueError, r"leave out process_group and scope, got \{'process_group': \(\)\}", process_group=()
    )
    clipping = Training("experts", clip_grad=1.0).optimizer
    refused(clipping, ValueError, r"clip_grad=1\.0 of the OptimizerConfig \(1\.0 is the default\).*pass clip_grad=0\.0")
    experts.param_groups[0]["zclip"] = False
    refused(optimizer, ValueError, "a param group has zclip=False, but Megatron's norm is that of all")
    del experts.param_groups[0]["zclip"]
    experts.param_groups[0]["zclip_step"] = 3
    refused(optimizer, ValueError, "zclip_")
    del experts.param_groups[0]["zclip_step"]
    for owner, name in (
        (MegatronOptimizer, "step_with_ready_grads"),
        (MegatronOptimizer, "get_grad_norm"),
        (MegatronOptimizer, "get_parameters"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for cls in {ChainedOptimizer, FP32Optimizer, owner}:
                if name in vars(cls):
                    patch.delattr(cls, name)
            refused(optimizer, RuntimeError, rf"megatron-core 0\.16\.1 has no \w+\.{name}, which is needed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(optimizer.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8")
        refused(optimizer, RuntimeError, r"has no OptimizerConfig\.use_precision_aware_optimizer_no_fp8_or_ds_fp8")
    with pytest.raises(ValueError, match=r"^Megatron .*: use zclip_optim\.integrations\.megatron\.attach\(optimizer\)"):
        ZClipOptimizer(optimizer)

    attach(optimizer)
    for again in (optimizer, dense, ChainedOptimizer([dense])):
        refused(again, ValueError, "attached to this optimizer, or to one that it holds or is held by, already")


def snapshot(optimizer):
    """What an attached optimizer would have that this one has not."""
    parts = getattr(optimizer, "chained_optimizers", [])
    keys = [sorted(group) for group in getattr(optimizer, "param_groups", [])]
    return [sorted(vars(each)) for each in (optimizer, *parts)], keys


def test_refusals(two):
    two.run(check_refusals)
