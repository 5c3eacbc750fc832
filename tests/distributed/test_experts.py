"""Experts that are plain tensors, other ones on each rank, beside parameters that DDP, FSDP2 or FSDP1 holds."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from test_distributed import all_reduces, dtensor_parameter, full_gradients, mesh_of, norm_of
from test_torch_parallel import INNER, OPTIONS, OUTLIERS, Plain, assert_equal_to_one_process, full, loss_of, make_batch
from thoroughness import thorough
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from training import set_gradients
from versions import on_fsdp2

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer

pytestmark = pytest.mark.xdist_group("processes")

EXPERTS = 4
S0 = Shard(0)


class Experts(nn.Module):
    """Each takes an equal part of the batch, in order."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16, 8) / 4)

    def forward(self, h):
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        return (h.view(len(weight), -1, 16) @ weight).flatten(0, 1)


class Moe(Plain):
    """A mixture of experts in one process."""

    def __init__(self, rank):
        self.rank = rank
        torch.manual_seed(0)
        layers = nn.Linear(6, 16), nn.Tanh(), Experts(), nn.Tanh(), nn.Linear(8, 1)
        self.model = self.wrap(nn.Sequential(*layers))

    def backward(self, step):
        loss_of(self.model, *make_batch(step)).backward()


class ExpertParallel(Moe):
    """Of the four experts each rank holds four parts of `ep`, and every rank sees as much of the batch as the others.

    A rank sees rows of its own experts alone, so that no tokens need to travel. The dense parameters are averaged over
    all ranks by `wrap_dense`, the gradients of experts over those that hold the same ones, here.
    """

    def __init__(self, rank, ep=EXPERTS):
        self.ep, self.replicas = ep, EXPERTS // ep
        self.group = mesh_of(2, 2).get_group("b") if ep == 2 else dist.group.WORLD
        super().__init__(rank)

    def wrap(self, model):
        self.experts = model[2]
        mine = self.experts.weight.detach().chunk(self.ep)[self.rank % self.ep].clone()
        self.experts.weight = nn.Parameter(self.hold(mine))
        return self.wrap_dense(model)

    def hold(self, mine):
        return mine

    def groups(self):
        """Torch's fused kernels take no plain tensors beside DTensors."""
        dense = [p for p in self.params() if p is not self.experts.weight]
        return [{"params": dense}, {"params": [self.experts.weight]}]

    def optimizer(self, inner):
        return inner(self.groups())

    def options(self):
        return {"process_group": {self.group: self.experts}}

    def backward(self, step):
        x, y = (rows.chunk(self.ep)[self.rank % self.ep] for rows in make_batch(step))
        replica = slice(self.rank // self.ep, None, self.replicas)
        loss_of(self.model, x[replica], y[replica]).backward()
        gradient = self.experts.weight.grad
        gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if self.replicas > 1:
            dist.all_reduce(gradient, group=mesh_of(2, 2).get_group("a"))
        gradient /= dist.get_world_size()

    def full_parameters(self):
        return torch.cat([self.whole(p).detach().reshape(-1) for p in self.params()])

    def whole(self, p):
        if p is not self.experts.weight or isinstance(p, DTensor):
            return full(p)
        parts = [torch.empty_like(p) for _ in range(self.ep)]
        dist.all_gather(parts, p.detach(), group=self.group)
        return torch.cat(parts)


class BesideDdp(ExpertParallel):
    def wrap_dense(self, model):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.weight"])
        return DistributedDataParallel(model)


class BesideFsdp2(ExpertParallel):
    def wrap_dense(self, model):
        for layer in (model[0], model[4]):
            fully_shard(layer, mesh=mesh_of(4))
        return model


class OnMeshes(BesideFsdp2):
    """The experts are DTensors too, on a mesh of their own."""

    def hold(self, mine):
        return DTensor.from_local(mine, mesh_of(2, 2)["b"] if self.ep == 2 else mesh_of(4), [S0])

    def options(self):
        return {}


every_way = pytest.mark.parametrize("way", [BesideDdp, on_fsdp2(BesideFsdp2), on_fsdp2(OnMeshes)])
every_ep = pytest.mark.parametrize("ep", [2, 4])


@every_ep
@every_way
@pytest.mark.parametrize("inner", ["AdamW", thorough("AdamW fused")])
def test_training_is_that_of_one_process(four, way, ep, inner):
    assert_equal_to_one_process(four, way, Moe, inner, ep=ep)


def check_the_norm(rank, way, ep):
    single, way = Moe(0), way(rank, ep)
    single.backward(0)
    way.backward(0)
    clipper = ZClip(max_grad_norm=1e-3, **way.options())
    before = [p.grad.clone() for p in way.params()]
    norm, count = all_reduces(lambda: clipper.step(way.model))
    assert norm == pytest.approx(norm_of([p.grad for p in single.params()]), rel=1e-6)
    assert count == (1 if way.group is dist.group.WORLD or isinstance(way, BesideDdp) else 2)
    for p, old in zip(way.params(), before, strict=True):
        assert torch.equal(p.grad, old * clipper.metrics.clip_coef)

    for p, old in zip(way.params(), before, strict=True):
        p.grad = old.clone()
    clipper = ZClip(scope="group", **way.options())
    clipper.step([*way.groups(), {"params": []}])
    dense, experts = ([p.grad for p in single.params() if (p.dim() == 3) == expert] for expert in (False, True))
    expected = [norm_of(dense), norm_of(experts), 0.0]
    assert [m.grad_norm for m in clipper.group_metrics] == pytest.approx(expected, rel=1e-6)
    return norm, [m.grad_norm for m in clipper.group_metrics]


@every_ep
@every_way
def test_the_norm_is_that_of_one_process(four, way, ep):
    first, *others = four.run(check_the_norm, way, ep)
    assert all(other == first for other in others)  # bit for bit


def run(way, optimizer, steps):
    history = []
    for step in steps:
        optimizer.zero_grad()
        way.backward(step)
        optimizer.step()
        history.append(optimizer.metrics)
    return history


def start(way):
    return ZClipOptimizer(way.optimizer(INNER["AdamW"]), **OPTIONS, **way.options())


def another(way):
    """The same model again, and an optimizer for it."""
    twin = type(way)(way.rank, way.ep)
    twin.backward(0)  # after the first one DDP arranges its buckets, and with them the order of its sums
    return twin, start(twin)


def through_a_file(way, optimizer):
    file = io.BytesIO()
    torch.save((way.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    way, optimizer = another(way)
    way.model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    return way, optimizer


def through_dcp(way, optimizer):
    states = get_model_state_dict(way.model), get_optimizer_state_dict(way.model, optimizer)
    model_state, optimizer_state = copy.deepcopy(states)
    way, optimizer = another(way)
    set_model_state_dict(way.model, model_state)
    set_optimizer_state_dict(way.model, optimizer, optimizer_state)
    return way, optimizer


def check_that_it_goes_on(rank, way, through):
    whole, optimizer = another(way(rank, ep=2))
    expected = run(whole, optimizer, range(20))
    way, optimizer = another(whole)
    run(way, optimizer, range(12))
    way, optimizer = through(way, optimizer)
    assert run(way, optimizer, range(12, 20)) == expected[12:]
    assert torch.equal(way.full_parameters(), whole.full_parameters())
    assert optimizer.metrics.clipped_steps == len(OUTLIERS)


@pytest.mark.parametrize(
    ("way", "through"), [(BesideDdp, through_a_file), (BesideDdp, through_dcp), on_fsdp2(BesideFsdp2, through_dcp)]
)
def test_it_goes_on_from_a_checkpoint(four, way, through):
    four.run(check_that_it_goes_on, way, through)


def check_copies(rank):
    way = BesideFsdp2(rank)
    model = nn.Sequential(nn.Linear(6, 16), Experts())
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters()), process_group={way.group: model[1].parameters()})
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    assert optimizer_copy.clipper._process_groups.of_some == {model_copy[1].weight: (way.group,)}
    assert optimizer.clipper._process_groups.of_some == {model[1].weight: (way.group,)}
    for p in (*model.parameters(), *model_copy.parameters()):
        p.grad = torch.full_like(p, 1.0)
    expected = math.sqrt(7 * 16 + 4 * EXPERTS * 16 * 8)
    for copied in (optimizer, optimizer_copy):
        copied.step()
        assert copied.metrics.grad_norm == pytest.approx(expected, rel=1e-6)
    assert all("process_group" not in group for group in optimizer.state_dict()["param_groups"])


def test_a_copy_maps_the_copied_parameters(four):
    four.run(check_copies)


def dense_and_expert(dense, expert):
    """Two parameters whose gradients have these norms, of the same direction on every rank."""
    torch.manual_seed(0)
    params = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, 2))
    for p, norm in zip(params, (dense, expert), strict=True):
        set_gradients([p], norm)
    return params


def check_what_each_statement_gives(rank):
    world = dist.group.WORLD
    dense, expert = dense_and_expert(2.0, 40.0 if rank == 0 else 4.0)

    def norm(process_group):
        optimizer = ZClipOptimizer(torch.optim.SGD([dense, expert], lr=0.0), process_group=process_group)
        optimizer.step()
        return optimizer.metrics.grad_norm

    assert norm({world: [expert]}) == pytest.approx(math.sqrt(4 + 1600 + 16), rel=1e-6)
    assert norm({world: expert}) == norm({world: (p for p in [expert])}) == norm({world: nn.ParameterList([expert])})
    assert norm(world) == pytest.approx(math.sqrt(2 * 4 + 1600 + 16), rel=1e-6)  # the dense one twice
    assert norm(None) == pytest.approx(math.sqrt(1604 if rank == 0 else 20), rel=1e-6)
    expert.allreduce = False
    for process_group in (None, world, {world: [dense]}):
        with pytest.raises(ValueError, match=r"shape \(3, 2\) has allreduce=False.*pass process_group=\{group: param"):
            norm(process_group)
    assert norm(()) == pytest.approx(math.sqrt(1604 if rank == 0 else 20), rel=1e-6)  # every rank is said to hold all
    dense.allreduce = True  # DeepSpeed's mark of the others
    return norm({world: [expert]})


def test_what_each_statement_gives(two):
    first, second = two.run(check_what_each_statement_gives)
    assert first == second


def check_that_one_expert_decides_for_all(rank):
    dense, expert = dense_and_expert(1.0, 1.0)
    optimizer = ZClipOptimizer(
        torch.optim.SGD([dense, expert], lr=0.1), process_group={dist.group.WORLD: [expert]}, warmup_steps=5
    )
    for scale in (1.0, 1.1, 0.9, 1.0, 1.05):
        set_gradients([expert], scale)
        optimizer.step()
    norms = []
    for norm, clipped, skipped in ((100.0, True, False), (math.nan, False, True), (None, False, False)):
        set_gradients([dense], 1.0)
        set_gradients([expert], 1.0)
        if rank == 3:
            expert.grad = None if norm is None else expert.grad * norm
        before = dense.grad.clone(), dense.detach().clone()
        optimizer.step()
        metrics = optimizer.metrics
        assert (metrics.clipped, metrics.skipped) == (clipped, skipped)
        assert torch.equal(dense.grad, before[0] * metrics.clip_coef)
        assert torch.equal(dense, before[1]) == skipped
        norms.append(repr(metrics))
    assert metrics.grad_norm == pytest.approx(math.sqrt(1 + 3), rel=1e-6)
    expert.grad = torch.full((3, 2), math.nan if rank == 2 else 1.0)
    with pytest.raises(NonFiniteGradientError) as error:
        ZClip(nonfinite="raise", process_group={dist.group.WORLD: [expert]}).step([dense, expert])
    assert str(error.value).endswith("elements: rank 2: param_groups[0]['params'][1] (3, 2)")
    return norms


def test_one_expert_decides_for_all(four):
    first, *others = four.run(check_that_one_expert_decides_for_all)
    assert all(other == first for other in others)


def check_several_groups(rank):
    mesh = mesh_of(2, 2)
    rows, columns = mesh.get_group("a"), mesh.get_group("b")
    dense, expert = dense_and_expert(3.0, rank + 1.0)
    layers = [dtensor_parameter(g, mesh_of(4), [S0]) for g in full_gradients()]
    halves = [dtensor_parameter(g, mesh["b"], [S0]) for g in full_gradients()]
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.full((1,), 1.0 + mesh.get_local_rank("b"))
    squares = 9 + (1 + 4 + 9 + 16) + (1 + 4) + 2 * norm_of(full_gradients()) ** 2
    params = [dense, expert, other, *layers, *halves]
    for mapping in ({rows: [expert], columns: [expert, other]}, {columns: [other, expert], rows: [expert]}):
        norm, count = all_reduces(lambda: ZClip(process_group=mapping).step(params))  # noqa: B023
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-6)
        assert count == 3  # that of the mesh of all, and one for each group
    return norm


def test_several_groups(four):
    assert len(set(four.run(check_several_groups))) == 1


def check_ranks_that_hold_no_experts(rank):
    """Neither do they all have the same param groups."""
    dense, expert = dense_and_expert(3.0, 4.0)
    frozen = nn.Parameter(torch.empty(0), requires_grad=False)
    mapping = {dist.group.WORLD: [expert if rank == 1 else frozen]}
    assert ZClip(process_group=mapping).step([dense, expert][: 1 + rank % 2]) == pytest.approx(5.0, rel=1e-6)
    optimizer = torch.optim.SGD([{"params": [dense]}, {"params": [expert] if rank == 1 else []}], lr=0.1)
    optimizer = ZClipOptimizer(optimizer, process_group=mapping, scope="group")
    optimizer.step()
    assert [m.grad_norm for m in optimizer.group_metrics] == pytest.approx([3.0, 4.0], rel=1e-6)


def test_ranks_that_hold_no_experts_join(two):
    two.run(check_ranks_that_hold_no_experts)


def check_beside_fsdp1(rank):
    torch.manual_seed(0)
    dense, expert = nn.Linear(6, 16), nn.Parameter(torch.zeros(4))
    dense.expert = expert
    model = FullyShardedDataParallel(dense, ignored_states=[expert], device_id=torch.device("cpu"))
    model(torch.ones(1, 6)).sum().backward()
    expert.grad = torch.full((4,), 1.0 + rank)
    expected = pytest.approx(math.sqrt(6 * 16 + 16 + 4 * (1 + 4)), rel=1e-6)
    flat = [p for p in model.parameters() if p is not expert]
    group = model.process_group
    assert ZClip(process_group={group: [expert]}).step(model) == expected
    assert ZClip(process_group={group: [expert, *flat]}).step(model) == expected
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), process_group={group: model})
    optimizer.step()
    assert optimizer.metrics.grad_norm == expected
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group"):
        ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), process_group={group: [expert]})


def test_beside_fsdp1(two):
    two.run(check_beside_fsdp1)


def check_statistics_that_stay_on_the_device(rank, way):
    on_host = run(way := way(rank, ep=2), start(way), range(20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        on_device = run(way := type(way)(rank, ep=2), start(way), range(20))
    norms = [m.grad_norm for m in on_device]
    assert norms == pytest.approx([m.grad_norm for m in on_host], rel=1e-5)
    assert [i for i, m in enumerate(on_device) if m.clipped] == list(OUTLIERS)
    return norms


@pytest.mark.parametrize("way", [BesideDdp, on_fsdp2(BesideFsdp2)])
def test_statistics_that_stay_on_the_device(four, way):
    first, *others = four.run(check_statistics_that_stay_on_the_device, way)
    assert all(other == first for other in others)


def check_refusals(rank):
    world = dist.group.WORLD
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([p], lr=0.1)
    on_mesh = dtensor_parameter(torch.ones(4), mesh_of(2), [S0])
    gone = iter([p])
    list(gone)
    for mapping, error, text in [
        ({}, ValueError, r"process_group=\{\} names no group: .* leave it out"),
        ({"world": [p]}, ValueError, "process_group must be a mapping .* from a ProcessGroup .*, got 'world'"),
        ({-100: [p]}, ValueError, "that this rank is in, got -100"),
        ({world: [1.0, "a"]}, TypeError, r"process_group\[<group .*>\] must be .* parameters, got float, str"),
        ({world: None}, TypeError, "must be a module or an iterable of parameters, got NoneType"),
        ({world: nn.Linear(1, 1).named_parameters()}, TypeError, "got tuple"),
        ({world: [on_mesh]}, ValueError, r"holds a DTensor of shape \(4,\), which is summed .*: leave it out"),
        ({world: gone}, ValueError, r"holds no parameters.*Pass a list or a module"),
        ({world: [p, q]}, ValueError, r"maps 1 of 2 parameters, one of shape \(2,\), .*Pass the parameters that the"),
        ([{world: [p]}], ValueError, r"a mapping \{group: parameters\}, or None, got \["),
    ]:
        before = {**base.param_groups[0]}
        with pytest.raises(error, match=text):
            ZClipOptimizer(base, process_group=mapping)
        assert base.param_groups[0] == before

    q.requires_grad = False
    optimizer = ZClipOptimizer(base, process_group={world: [p, q]})
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="maps 1 of 2 parameters"):
        optimizer.step()
    with pytest.raises(ValueError, match="maps 1 of 2 parameters"):
        ZClip(process_group={world: [p, q]}).step([q])

    expert = nn.Parameter(torch.zeros(3))
    expert.allreduce = False
    on_mesh.allreduce = False
    late = ZClipOptimizer(torch.optim.SGD([p, on_mesh], lr=0.1))
    late.add_param_group({"params": [expert]})
    for step in (late.step, lambda: ZClip().step([expert])):
        with pytest.raises(ValueError, match=r"pass process_group=\{group: parameters\}"):
            step()


def test_refusals(two):
    two.run(check_refusals)


def test_a_mark_means_nothing_to_one_process():
    expert = nn.Parameter(torch.zeros(3))
    expert.allreduce = False
    set_gradients([expert], 2.0)
    optimizer = ZClipOptimizer(torch.optim.SGD([expert], lr=0.1))
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(2.0)


def check_norms_by_parameter(rank):
    mesh = mesh_of(2, 2)
    rows, columns = mesh.get_group("a"), mesh.get_group("b")
    dense, expert = dense_and_expert(3.0, rank + 1.0)
    other, frozen = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.empty(0), requires_grad=False)
    other.grad = torch.full((1,), 1.0 + mesh.get_local_rank("b"))
    params = {"dense": dense, "expert": expert, "other": other} if rank != 2 else {"dense": dense, "expert": expert}
    mapping = {rows: [expert], columns: [expert, other if rank != 2 else frozen]}
    base = torch.optim.SGD(params.items(), lr=0.0)
    found = ZClipOptimizer(base, process_group=mapping).norms_by_parameter(None)
    expected = {"dense": 3.0, "expert": math.sqrt(1 + 4 + 9 + 16), "other": math.sqrt(1 + 4) if rank < 2 else 2.0}
    assert {each.name: each.norm for each in found} == pytest.approx(expected)


def test_norms_by_parameter_are_those_of_all_experts_of_the_name(four):
    four.run(check_norms_by_parameter)
