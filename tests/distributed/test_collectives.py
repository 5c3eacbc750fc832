"""The collectives of a step at 1,024 and 4,096 ranks, counted on one of them with torch's fake process group."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from versions import needs_norms_of_dtensors, needs_uneven_shards

from benchmarks.training.llama import LanguageModel, ModelConfig
from zclip_optim import ZClip, ZClipOptimizer

pytestmark = pytest.mark.xdist_group("processes")

SMALL = ModelConfig(hidden=256, ffn=512, n_layers=2, n_heads=16, n_kv_heads=16, vocab=1024, context=64)
BILLION = ModelConfig(hidden=2048, ffn=5632, n_layers=20, n_heads=32, n_kv_heads=32, vocab=32000, context=64)
SCALAR = 8  # bytes


class Collective(NamedTuple):
    op: str
    bytes: int


class Record(TorchDispatchMode):
    """Every collective, with the size of the tensors that it is given."""

    def __init__(self):
        super().__init__()
        self.collectives = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back as operations on local tensors, collectives included
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.collectives.append(Collective(func.__name__.split(".")[0], size))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks(request):
    """As if this process were the first of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def hybrid(model, ranks):
    """Shards of 64 ranks, replicated."""
    mesh = init_device_mesh("cpu", (ranks // 64, 64), mesh_dim_names=("replicate", "shard"))
    shard_fully(model, mesh)


def tensor_parallel(model, ranks):
    """Tensor parallel over 8 ranks, FSDP2 over the others."""
    mesh = init_device_mesh("cpu", (ranks // 8, 8), mesh_dim_names=("data", "tensor"))
    columns = ("attention.query", "attention.key", "attention.value", "ffn.gate", "ffn.up")
    plan = dict.fromkeys(columns, ColwiseParallel()) | dict.fromkeys(("attention.out", "ffn.down"), RowwiseParallel())
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], plan)
    shard_fully(model, mesh["data"])


def shard_fully(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded_model(config, strategy, ranks):
    """A model of which this process holds its shard alone, with gradients of ones."""
    with torch.device("meta"):
        model = LanguageModel(config)
    strategy(model, ranks)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.0)
            p.grad = torch.ones_like(p)
    return model


def collectives_of(call):
    with Record() as record:
        call()
    return record.collectives


@pytest.mark.parametrize("ranks", [1024, 4096], indirect=True)
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        pytest.param(hybrid, 1, id="hybrid"),
        # Norms and embeddings are on the mesh "data" alone: two meshes.
        pytest.param(tensor_parallel, 2, id="tensor parallel", marks=needs_uneven_shards),
    ],
)
@pytest.mark.parametrize("config", [SMALL, BILLION], ids=["1M", "1B"])
def test_a_step_takes_one_scalar_per_mesh(ranks, strategy, expected, config):
    model = sharded_model(config, strategy, ranks)
    size = sum(p.numel() for p in model.parameters())
    assert size > 1e9 if config is BILLION else size < 2e6
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1e-3)
    assert collectives_of(optimizer.step) == expected * [Collective("allreduce_", SCALAR)]
    assert optimizer.metrics.clip_coef < 1
    # The fake all-reduce leaves the sum of this rank alone; what it holds of each parameter is what was measured.
    held = math.sqrt(sum(p.to_local().numel() for p in model.parameters()))
    assert optimizer.metrics.grad_norm == pytest.approx(held, rel=1e-6)


@pytest.mark.parametrize("ranks", [1024], indirect=True)
def test_group_statistics_travel_together(ranks):
    model = sharded_model(SMALL, hybrid, ranks)
    groups = [{"params": list(block.parameters())} for block in model.blocks]
    optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.1), scope="group")
    assert collectives_of(optimizer.step) == [Collective("allreduce_", len(groups) * SCALAR)]


def order_of_sums(rank, monkeypatch):
    """The dimensions of a mesh over which one rank of eight sums, one after the other; its groups are 12."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pipeline", "data", "tensor"))
        dims = {mesh.get_group(name): name for name in mesh.mesh_dim_names}
        p = nn.Parameter(DTensor.from_local(torch.zeros(1, 1), mesh["data", "tensor"], [Shard(0), Shard(1)]))
        p.grad = DTensor.from_local(torch.ones(1, 1), mesh["data", "tensor"], [Shard(0), Shard(1)])
        order = []
        monkeypatch.setattr(dist, "all_reduce", lambda sums, group: order.append(dims[group]))
        ZClip().step([p])
        return order
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def test_all_ranks_sum_over_the_dimensions_of_a_mesh_in_one_order(monkeypatch):
    """Else a number that one rank has summed over a dimension meets one that another has not yet."""
    orders = [order_of_sums(rank, monkeypatch) for rank in range(8)]
    assert orders == [["data", "tensor"]] * 8


@pytest.mark.parametrize("ranks", [1024], indirect=True)
@pytest.mark.parametrize(
    ("strategy", "expected"), [(hybrid, 1), pytest.param(tensor_parallel, 2, marks=needs_uneven_shards)]
)
def test_norms_by_parameter_travel_together(ranks, strategy, expected):
    model = sharded_model(SMALL, strategy, ranks)
    optimizer = ZClipOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1))
    collectives = collectives_of(lambda: optimizer.norms_by_parameter(None))
    assert [one.op for one in collectives] == expected * ["allreduce_"]
    assert sum(one.bytes for one in collectives) == 2 * SCALAR * len(list(model.parameters()))
    held = {name: math.sqrt(p.to_local().numel()) for name, p in model.named_parameters()}
    assert {each.name: each.norm for each in optimizer.norms_by_parameter(None)} == pytest.approx(held)


@pytest.mark.parametrize("ranks", [8], indirect=True)
def test_replicas_count_once_in_norms_by_parameter(ranks):
    mesh = init_device_mesh("cpu", (2, 2, 2))
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0), Shard(1), Replicate()]))
    p.grad = torch.ones_like(p)
    (each,) = ZClip().norms_by_parameter(p)
    assert each.norm == pytest.approx(math.sqrt(4 / 2))  # of two replicas' sum, the fake all-reduce leaves one


@needs_norms_of_dtensors
@pytest.mark.parametrize("ranks", [1024], indirect=True)
def test_what_torch_itself_takes(ranks):
    """As the comparison in benchmarks/results/collectives.md says."""
    model = sharded_model(SMALL, hybrid, ranks)
    collectives = collectives_of(lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    reductions = [one for one in collectives if "reduce" in one.op]
    assert reductions == [Collective("all_reduce", 4 * len(list(model.parameters())))]
    two_meshes = sharded_model(SMALL, tensor_parallel, ranks)
    with pytest.raises(RuntimeError, match="must have the same mesh"):
        torch.nn.utils.clip_grad_norm_(two_meshes.parameters(), 1.0)
