"""Every way to train on several ranks against the same training in one process, outliers included."""

import contextlib
import copy
import functools
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from thoroughness import thorough
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from versions import needs_fsdp2_on_cpu, needs_pipeline_on_gloo, on_fsdp2

import zclip_optim.clipper
from zclip_optim import ZClip, ZClipOptimizer

pytestmark = pytest.mark.xdist_group("processes")

STEPS, OUTLIERS, BATCH = 20, (9, 15), 8
OPTIONS = {"warmup_steps": 5, "z_thresh": 8.0}
INNER = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


def make_model():
    """Its last layer has one row, fewer than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, x.sum(1, keepdim=True) + (100.0 if step in OUTLIERS else 0.0)


def slices(step, count):
    """The batch in `count` equal parts."""
    x, y = make_batch(step)
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x).float(), y)


class Plain:
    """One process, and what the others change: how a model is wrapped, which slice it sees, how it is put together."""

    shares = 1  # of the batch, one each for so many ranks

    def __init__(self, rank):
        self.rank = rank
        self.model = self.wrap(make_model())

    def wrap(self, model):
        return model

    def params(self):
        return self.model.parameters()

    def options(self):
        return {}

    def optimizer(self, inner):
        return inner(self.params())

    def backward(self, step):
        x, y = slices(step, self.shares)[self.rank % self.shares]
        loss_of(self.model, x, y).backward()

    def full_parameters(self):
        """All parameters, on every rank, in the order of the model."""
        return torch.cat([full(p).detach().reshape(-1) for p in self.params()])


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


class Ddp(Plain):
    shares = 2

    def wrap(self, model):
        return DistributedDataParallel(model)


class DdpAccumulating(Ddp):
    def backward(self, step):
        first, second = (slices(step, 4)[i] for i in (self.rank, self.rank + 2))
        with self.model.no_sync():
            (loss_of(self.model, *first) / 2).backward()
        (loss_of(self.model, *second) / 2).backward()


class Zero(Ddp):
    def optimizer(self, inner):
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)  # torch's own use
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.params(), inner)


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def fully_sharded(model, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


class Fsdp2(Plain):
    shares = 2

    def wrap(self, model):
        return fully_sharded(model, mesh=mesh_of(2))


class Fsdp2Accumulating(Fsdp2):
    def backward(self, step):
        for i, last in ((self.rank, False), (self.rank + 2, True)):
            self.model.set_requires_gradient_sync(last)
            (loss_of(self.model, *slices(step, 4)[i]) / 2).backward()


class Fsdp2Mixed(Fsdp2):
    def wrap(self, model):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_sharded(model, mesh=mesh_of(2), mp_policy=policy)


class MixedInOneProcess(Plain):
    """What FSDP2 does with this policy: each slice in bfloat16, its gradients averaged in float32."""

    def backward(self, step):
        for x, y in slices(step, 2):
            low = copy.deepcopy(self.model).to(torch.bfloat16)
            low.zero_grad()
            loss_of(low, x.to(torch.bfloat16), y).backward()
            for p, q in zip(self.params(), low.parameters(), strict=True):
                gradient = q.grad.float() / 2
                p.grad = gradient if p.grad is None else p.grad + gradient


class Hsdp(Plain):
    shares = 4

    def wrap(self, model):
        return fully_sharded(model, mesh=mesh_of(2, 2))


class TensorParallel(Plain):
    """Tensor parallel along "b", FSDP2 along "a"; the last layer is on the mesh "a" alone."""

    shares = 2

    def __init__(self, rank):
        super().__init__(mesh_of(2, 2).get_local_rank("a"))

    def wrap(self, model):
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # it is not written to
        mesh = mesh_of(2, 2)
        parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_sharded(model, mesh=mesh["a"])


class Pipeline(Plain):
    """Two stages with two microbatches, whose gradients torch 2.6 adds up and later ones average."""

    terms = 1 if "scale_grads" in inspect.signature(ScheduleGPipe).parameters else 2

    def wrap(self, model):
        self.whole = model
        stage = model[:2] if self.rank == 0 else model[2:]
        self.schedule = ScheduleGPipe(
            PipelineStage(stage, self.rank, 2, torch.device("cpu")), n_microbatches=2, loss_fn=self.loss_fn
        )
        return stage

    def loss_fn(self, output, target):
        return nn.functional.mse_loss(output, target) / self.terms

    def options(self):
        return {"process_group": dist.group.WORLD}

    def backward(self, step):
        x, y = make_batch(step)
        if self.rank == 0:
            self.schedule.step(x)
        else:
            self.schedule.step(target=y)

    def full_parameters(self):
        for i, p in enumerate(self.whole.parameters()):
            dist.broadcast(p.data, src=0 if i < 2 else 1)
        return torch.cat([p.detach().reshape(-1) for p in self.whole.parameters()])


@dataclass
class Fsdp1(Plain):
    """FSDP1, by hand through `ZClip.step(model)` if `by_model`, else through the wrapper with the process group."""

    rank: int
    strategy: Any
    use_orig_params: bool
    by_model: bool = False
    shares: int = 2

    def __post_init__(self):
        super().__init__(self.rank)

    def wrap(self, model):
        warnings.filterwarnings("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning)
        hybrid = self.strategy is ShardingStrategy.HYBRID_SHARD
        options = {
            "sharding_strategy": self.strategy,
            "use_orig_params": self.use_orig_params,
            "device_id": torch.device("cpu"),
            "device_mesh": mesh_of(2, 2) if hybrid else None,
        }
        model[2] = FullyShardedDataParallel(model[2], **options)
        return FullyShardedDataParallel(model, **options)

    def options(self):
        if self.by_model:
            return {}
        whole = self.strategy is ShardingStrategy.NO_SHARD
        return {"process_group": () if whole else self.model.process_group}

    def full_parameters(self):
        warnings.filterwarnings("ignore", "FSDP.state_dict_type", FutureWarning)
        with FullyShardedDataParallel.summon_full_params(self.model):
            return torch.cat([p.detach().reshape(-1).clone() for p in self.model.parameters()])


class Fsdp1Accumulating(Fsdp1):
    def backward(self, step):
        with self.model.no_sync():
            (loss_of(self.model, *slices(step, 4)[self.rank]) / 2).backward()
        (loss_of(self.model, *slices(step, 4)[self.rank + 2]) / 2).backward()


class ByModel:
    """An optimizer whose loop clips with `ZClip.step(model)`."""

    def __init__(self, inner, model):
        self.inner, self.model, self.clipper = inner, model, ZClip(**OPTIONS)
        self.zero_grad = inner.zero_grad

    def step(self):
        self.clipper.step(self.model)
        self.inner.step()

    @property
    def metrics(self):
        return self.clipper.metrics


def train(way, inner, wrap=True):
    """Norms, clipped steps, statistics and the parameters at the end."""
    optimizer = way.optimizer(INNER[inner])
    if wrap:
        by_model = getattr(way, "by_model", False)
        optimizer = ByModel(optimizer, way.model) if by_model else ZClipOptimizer(optimizer, **OPTIONS, **way.options())
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        way.backward(step)
        optimizer.step()
        if wrap:
            metrics = optimizer.metrics
            history.append((metrics.grad_norm, metrics.clipped, metrics.mean, metrics.std))
    return history, way.full_parameters()


@functools.cache  # most ways are compared with the same
def train_in_one_process(single, inner, wrap=True):
    return train(single(0), inner, wrap)


def check(rank, way, single, inner, options):
    """Runs of several ranks and of one process, with the wrapper and without."""
    with contextlib.suppress(AttributeError):
        way = functools.partial(way, **options)
    history, params = train(way(rank), inner)
    _, bare = train(way(rank), inner, wrap=False)
    expected_history, expected_params = train_in_one_process(single, inner)
    _, expected_bare = train_in_one_process(single, inner, wrap=False)
    return history, expected_history, distance(params, expected_params), distance(bare, expected_bare)


def distance(a, b):
    return (a - b).abs().max().item()


def assert_equal_to_one_process(world, way, single, inner, **options):
    results = world.run(check, way, single, inner, options)
    histories = [result[0] for result in results]
    assert all(history == histories[0] for history in histories)  # bit for bit
    for history, expected, apart, bare_apart in results:
        norms, clipped, means, _ = zip(*history, strict=True)
        expected_norms, expected_clipped, expected_means, _ = zip(*expected, strict=True)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert means == pytest.approx(expected_means, rel=1e-5)
        assert clipped == expected_clipped
        assert [i for i in range(STEPS) if clipped[i]] == list(OUTLIERS)
        assert apart <= max(2 * bare_apart, 1e-6)


PIPELINE = pytest.param(Pipeline, marks=needs_pipeline_on_gloo)
every_inner = pytest.mark.parametrize("inner", ["AdamW", *map(thorough, ("AdamW fused", "SGD"))])


@every_inner
@pytest.mark.parametrize("way", [Ddp, DdpAccumulating, Zero, on_fsdp2(Fsdp2), on_fsdp2(Fsdp2Accumulating), PIPELINE])
def test_two_ranks(two, way, inner):
    assert_equal_to_one_process(two, way, Plain, inner)


@needs_fsdp2_on_cpu
@every_inner
def test_mixed_precision(two, inner):
    assert_equal_to_one_process(two, Fsdp2Mixed, MixedInOneProcess, inner)


@needs_fsdp2_on_cpu
@every_inner
@pytest.mark.parametrize("way", [Hsdp, TensorParallel])
def test_four_ranks(four, way, inner):
    assert_equal_to_one_process(four, way, Plain, inner)


@every_inner
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("by_model", [True, False], ids=["by model", "wrapped"])
@pytest.mark.parametrize(
    "strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD], ids=str
)
def test_fsdp1(two, strategy, use_orig_params, by_model, inner):
    options = {"strategy": strategy, "use_orig_params": use_orig_params, "by_model": by_model}
    assert_equal_to_one_process(two, Fsdp1, Plain, inner, **options)


@every_inner
@pytest.mark.parametrize("by_model", [True, False], ids=["by model", "wrapped"])
def test_fsdp1_hybrid(four, by_model, inner):
    options = {"strategy": ShardingStrategy.HYBRID_SHARD, "use_orig_params": True, "by_model": by_model, "shares": 4}
    assert_equal_to_one_process(four, Fsdp1, Plain, inner, **options)


def test_fsdp1_accumulating(two):
    options = {"strategy": ShardingStrategy.FULL_SHARD, "use_orig_params": True}
    assert_equal_to_one_process(two, Fsdp1Accumulating, Plain, "AdamW", **options)


def check_on_device(rank, way, inner):
    on_host = train(way(rank), inner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        on_device = train(way(rank), inner)
    return on_host[0], on_device[0], distance(on_host[1], on_device[1])


@pytest.mark.parametrize("inner", ["AdamW fused", thorough("SGD")])
@pytest.mark.parametrize("way", [Ddp, *map(on_fsdp2, (Fsdp2, Hsdp, TensorParallel)), PIPELINE])
def test_statistics_that_stay_on_the_device(two, four, way, inner):
    results = (four if way in (Hsdp, TensorParallel) else two).run(check_on_device, way, inner)
    assert all(on_device == results[0][1] for _, on_device, _ in results)  # bit for bit
    for on_host, on_device, apart in results:
        for ours, expected in zip(on_device, on_host, strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
        assert apart <= 1e-5


def check_refusal(rank):
    way = Fsdp1(rank, ShardingStrategy.FULL_SHARD, use_orig_params=False)
    way.backward(0)
    with CommDebugMode() as communication:
        ZClip().step(way.model)
    assert sum(communication.get_comm_counts().values()) == 1
    way.model.zero_grad()
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group"):
        ZClipOptimizer(torch.optim.SGD(way.params(), lr=0.1))
    way.backward(0)
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group"):
        ZClip().step(way.params())


def test_fsdp1_takes_one_all_reduce_and_is_refused_without_a_process_group(two):
    two.run(check_refusal)
