"""The norm over process groups and meshes, and faults on one rank only, in gloo processes."""

import copy
import functools
import math
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from training import backward, make_model, set_gradients
from versions import needs_fsdp2_on_cpu
from world import World

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ZClip, ZClipOptimizer, ZClipWarning

pytestmark = pytest.mark.xdist_group("processes")

SHAPES = [(8, 6), (5, 4), (3,), (1,), (2, 3, 4)]  # some smaller than the mesh, so that ranks have empty shards
S0, S1, R, P = Shard(0), Shard(1), Replicate(), Partial()


@functools.cache
def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def full_gradients(scale=1.0):
    generator = torch.Generator().manual_seed(7)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def norm_of(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def shard(full, mesh, placements):
    """A DTensor that stands for `full`; along Partial dimensions the terms of each rank differ."""
    terms = 1
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            terms *= (1 + mesh.get_local_rank(dim)) / sum(range(1, mesh.size(dim) + 1))
    whole = distribute_tensor(full, mesh, [R if p.is_partial() else p for p in placements])
    return DTensor.from_local(
        whole.to_local() * terms, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def dtensor_parameter(full, mesh, placements):
    """A parameter whose gradient stands for `full`, with this placement; it is replicated where that is partial."""
    if full.dim() == 1:
        placements = [S0 if p == S1 else p for p in placements]
    p = nn.Parameter(distribute_tensor(torch.zeros(full.shape), mesh, [R if x.is_partial() else x for x in placements]))
    p.grad = shard(full, mesh, placements)
    return p


def all_reduces(call):
    """What `call` returns and how many all-reduces it took; any other collective is an error."""
    with CommDebugMode() as communication:
        result = call()
    counts = {str(op): n for op, n in communication.get_comm_counts().items() if n}
    assert set(counts) <= {"c10d.allreduce_"}, counts
    return result, sum(counts.values())


def check_a_mesh(rank, shape, placements, expected):
    mesh, gradients = mesh_of(*shape), full_gradients()
    params = [dtensor_parameter(g, mesh, placements) for g in gradients]
    params.append(params[0])  # tied
    before = [p.grad.to_local().clone() for p in params]
    clipper = ZClip(max_grad_norm=1.0)
    norm, count = all_reduces(lambda: clipper.step(params))
    assert norm == pytest.approx(norm_of(gradients), rel=1e-6)
    assert count == expected
    for p, old, full in zip(params, before, gradients, strict=False):
        assert torch.equal(p.grad.to_local(), old * clipper.metrics.clip_coef)
        assert p.grad.full_tensor().numpy() == pytest.approx((full / norm).numpy(), rel=1e-5, abs=1e-7)
    return norm


@pytest.mark.parametrize(
    ("shape", "placements", "expected"),
    [
        ((4,), [S0], 1),
        ((4,), [R], 0),
        ((2, 2), [S0, S1], 1),
        ((2, 2), [S1, S0], 1),
        ((2, 2), [R, S0], 1),
        ((2, 2), [S0, R], 1),
        ((2, 2), [S0, S0], 1),
        ((2, 2), [R, R], 0),
        ((1, 4), [S1, S0], 1),
    ],
    ids=str,
)
def test_the_norm_over_a_mesh(four, shape, placements, expected):
    assert len(set(four.run(check_a_mesh, shape, placements, expected))) == 1


def check_partial_gradients(rank, shape, placements):
    mesh, gradients = mesh_of(*shape), full_gradients()
    params = [dtensor_parameter(g, mesh, placements) for g in gradients]
    clipper = ZClip(max_grad_norm=1.0)
    with CommDebugMode() as communication:
        norm = clipper.step(params)
    assert not [op for op in communication.get_comm_counts() if "gather" in str(op)]
    assert norm == pytest.approx(norm_of(gradients), rel=1e-6)
    for p, full in zip(params, gradients, strict=True):
        assert p.grad.placements == tuple(S0 if x == S1 and full.dim() == 1 else x for x in placements)
        assert p.grad.full_tensor().numpy() == pytest.approx((full / norm).numpy(), rel=1e-5, abs=1e-7)
    return norm


@pytest.mark.parametrize(
    ("shape", "placements"),
    [((4,), [P]), ((2, 2), [P, S0]), ((2, 2), [S0, P]), ((2, 2), [R, P]), ((2, 2), [P, P])],
    ids=str,
)
def test_partial_gradients_are_summed_before_they_are_squared(four, shape, placements):
    assert len(set(four.run(check_partial_gradients, shape, placements))) == 1


def check_placements_and_meshes_side_by_side(rank):
    square, line, half = mesh_of(2, 2), mesh_of(4), mesh_of(2, 2)["b"]
    gradients = full_gradients()
    layouts = [(square, [S0, S1]), (square, [S0, R]), (square, [R, S0]), (square, [R, R])]
    params = [dtensor_parameter(g, *layout) for g, layout in zip(gradients, layouts, strict=False)]
    norm, count = all_reduces(lambda: ZClip().step(params))
    assert norm == pytest.approx(norm_of(gradients[:4]), rel=1e-6)
    assert count == 1  # one mesh, whatever the placements on it

    layouts = [(square, [S0, S1]), (line, [S0]), (half, [S0]), (line, [R])]
    params = [dtensor_parameter(g, *layout) for g, layout in zip(gradients, layouts, strict=False)]
    plain = nn.Parameter(torch.zeros(SHAPES[4]))
    plain.grad = gradients[4].clone()
    norm, count = all_reduces(lambda: ZClip().step([plain, *params]))
    assert norm == pytest.approx(norm_of(gradients), rel=1e-6)
    assert count == 2  # the first two meshes are all ranks, the third is a part of them

    clipper = ZClip(scope="group")
    groups = [{"params": params[:1]}, {"params": params[1:]}, {"params": [plain]}, {"params": []}]
    _, count = all_reduces(lambda: clipper.step(groups))
    expected = [norm_of(gradients[:1]), norm_of(gradients[1:4]), norm_of(gradients[4:]), 0.0]
    assert [m.grad_norm for m in clipper.group_metrics] == pytest.approx(expected, rel=1e-6)
    assert count == 2
    return norm


def test_placements_and_meshes_side_by_side(four):
    assert len(set(four.run(check_placements_and_meshes_side_by_side))) == 1


def check_a_mesh_that_leaves_ranks_out(rank):
    pairs = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    across = mesh_of(2, 2).get_group("a")  # ranks 0 and 2, 1 and 3
    gradients = full_gradients()
    params = [dtensor_parameter(g, mesh, [S0]) for g, mesh in zip(gradients, pairs, strict=False)]
    # A mesh of another part of the ranks is seen through the group that joins the parts, as with pipeline stages.
    norm, count = all_reduces(lambda: ZClip(process_group=across).step(params))
    assert norm == pytest.approx(norm_of(gradients[:2]), rel=1e-6)
    assert count == 2
    return norm


def test_a_mesh_that_leaves_ranks_out(four):
    assert len(set(four.run(check_a_mesh_that_leaves_ranks_out))) == 1


def check_strided_shards(rank):
    mesh = mesh_of(2, 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    single = copy.deepcopy(model)
    parallelize_module(model, mesh["b"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["a"])
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # it is not written to
    assert any(isinstance(x, _StridedShard) for p in model.parameters() for x in p.placements)
    x = torch.ones(2, 6)
    single(x).sum().backward()
    model(x).sum().backward()
    norm, count = all_reduces(lambda: ZClip().step(model))
    assert norm == pytest.approx(norm_of([p.grad for p in single.parameters()]), rel=1e-6)
    assert count == 1
    return norm


@needs_fsdp2_on_cpu
def test_strided_shards(four):
    assert len(set(four.run(check_strided_shards))) == 1


def check_norms_far_from_one(rank):
    for scale in (1e30, 1e-30):
        params = [dtensor_parameter(g, mesh_of(4), [S0]) for g in full_gradients(scale)]
        assert ZClip().step(params) == pytest.approx(scale * norm_of(full_gradients()), rel=1e-5)


def test_norms_far_from_one(four):
    four.run(check_norms_far_from_one)


def check_the_norm_covers_the_group(rank):
    params = [nn.Parameter(torch.zeros(10))]
    set_gradients(params, 3.0 if rank == 0 else 4.0)
    norm, count = all_reduces(lambda: ZClip(process_group=dist.group.WORLD).step(params))
    assert abs(norm - 5.0) < 1e-5
    assert count == 1
    for none in ((), None):
        norm, count = all_reduces(lambda: ZClip(process_group=none).step(params))  # noqa: B023
        assert abs(norm - (3.0 + rank)) < 1e-5
        assert count == 0
    groups = [{"params": params}, {"params": []}]
    clipper = ZClip(process_group=[dist.group.WORLD], scope="group")
    clipper.step(groups)
    assert [round(m.grad_norm, 4) for m in clipper.group_metrics] == [5.0, 0.0]


def test_the_norm_covers_the_group(two):
    two.run(check_the_norm_covers_the_group)


def check_several_groups(rank):
    mesh = mesh_of(2, 2)
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([rank + 1.0])
    norm, count = all_reduces(lambda: ZClip(process_group=[mesh.get_group("a"), mesh.get_group("b")]).step([p]))
    assert norm == pytest.approx(math.sqrt(1 + 4 + 9 + 16), rel=1e-12)
    assert count == 2

    pipeline, full = mesh.get_group("a"), torch.arange(1.0, 5.0)  # the stages hold different parameters on a mesh each
    p = dtensor_parameter(full * (1 + mesh.get_local_rank("a")), mesh["b"], [S0])
    norm, count = all_reduces(lambda: ZClip(process_group=pipeline).step([p]))
    assert norm == pytest.approx(math.sqrt(5 * 30), rel=1e-6)
    assert count == 2
    with pytest.raises(ValueError, match=r"process_group holds the group over which the DTensors .* leave it out"):
        ZClip(process_group=mesh.get_group("b")).step([p])
    with pytest.raises(ValueError, match="process_group holds the group"):
        ZClip(process_group=dist.group.WORLD).step([dtensor_parameter(full, mesh_of(4), [S0])])


def test_several_groups(four):
    four.run(check_several_groups)


def check_ranks_without_gradients(rank):
    gradients = full_gradients()
    params = [dtensor_parameter(g, mesh_of(4), [S0]) for g in gradients]
    squares = norm_of([p.grad.to_local() for p in params[1:]]) ** 2 if rank in (0, 2) else 0.0
    for p in params if rank in (1, 3) else params[:1]:
        p.grad = None
    norm = ZClip().step(params)
    total = torch.tensor(squares, dtype=torch.float64)
    dist.all_reduce(total)
    assert norm == pytest.approx(math.sqrt(total), rel=1e-6)
    assert norm > 0
    for p in params:
        p.grad = None
    assert ZClip().step(params) == 0.0


def test_ranks_without_gradients_join(four):
    four.run(check_ranks_without_gradients)


class Sharpness(torch.optim.SGD):
    """Sharpness-aware in outline: moves the parameters, evaluates again, moves them back and steps."""

    def step(self, closure):
        closure()
        self.move(0.1)
        loss = closure()
        self.move(-0.1)
        super().step()
        return loss

    @torch.no_grad()
    def move(self, by):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(by)


def check_closures(rank):
    params = [dtensor_parameter(g, mesh_of(4), [S0]) for g in full_gradients()]
    optimizer = ZClipOptimizer(Sharpness(params, lr=0.1))
    factors = []

    def closure():
        factor = factors.pop(0)
        for p, g in zip(params, full_gradients(), strict=True):
            p.grad = shard(g, mesh_of(4), [S0])
            p.grad.to_local().mul_(factor)
        return torch.ones(())

    factors[:] = [1.0, 1.0]
    optimizer.step(closure)
    before = [p.full_tensor().clone() for p in params]
    # The second evaluation goes wrong in the shards of one rank: all of them put their parameters back.
    factors[:] = [1.0, math.nan if rank == 1 else 1.0]
    optimizer.step(closure)
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(params, before, strict=True))
    assert optimizer.step_was_skipped


def test_closures_that_move_sharded_parameters(four):
    four.run(check_closures)


def sharded_run(rank, wrap=True, **options):
    torch.manual_seed(0)
    model = make_model()
    fully_shard(model[0], mesh=mesh_of(2))
    fully_shard(model, mesh=mesh_of(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, ZClipOptimizer(optimizer, warmup_steps=5, **options) if wrap else optimizer


def check_a_fault_on_one_rank(rank, fault):
    model, optimizer = sharded_run(rank)
    for step in range(8):
        backward(model, 2 * step + rank)
        optimizer.step()
    before = [p.full_tensor().clone() for p in model.parameters()]
    backward(model, 16 + rank)
    with torch.no_grad():
        for p in model.parameters() if rank == 1 else []:
            if fault is None:
                p.grad = None
            elif p.numel() > 1:
                p.grad.to_local().mul_(fault)
    optimizer.step()
    metrics = optimizer.metrics
    same = [torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True)]
    return metrics.clipped, metrics.skipped, all(same), metrics.mean, metrics.std, repr(optimizer.metrics)


@needs_fsdp2_on_cpu
@pytest.mark.parametrize(
    ("fault", "clipped", "skipped"),
    [(math.nan, False, True), (math.inf, False, True), (1e4, True, False), (0.0, False, False), (None, False, False)],
)
def test_a_fault_on_one_rank_is_one_decision(two, fault, clipped, skipped):
    first, second = two.run(check_a_fault_on_one_rank, fault)
    assert first == second
    assert first[:3] == (clipped, skipped, skipped)


def check_the_error_is_raised_everywhere(rank, options, steps):
    warnings.simplefilter("ignore", ZClipWarning)  # that the limit is near
    model, optimizer = sharded_run(rank, **options)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    for i in range(steps):
        backward(model, 3)
        if rank == 1:
            model[0].bias.grad.to_local()[3] = math.inf
        if i == steps - 1:
            with pytest.raises(NonFiniteGradientError) as error:
                optimizer.step()
            assert optimizer.metrics.step == 3
            return str(error.value)
        optimizer.step()


@needs_fsdp2_on_cpu
@pytest.mark.parametrize(
    ("options", "steps"), [({"nonfinite": "raise"}, 1), ({"max_consecutive_nonfinite": 3}, 3)], ids=str
)
def test_an_error_on_one_rank_is_raised_on_all_and_says_where(two, options, steps):
    first, second = two.run(check_the_error_is_raised_everywhere, options, steps)
    assert first == second
    assert first.endswith("elements: rank 1: param_groups[0]['params'][1] (16,)")


def check_an_error_names_the_rank(rank):
    mesh = mesh_of(2, 2)
    params = [dtensor_parameter(g, mesh, [S0, S1]) for g in full_gradients()]
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = torch.ones(3)
    if rank in (1, 2):
        params[rank].grad.to_local().fill_(math.nan)
    with pytest.raises(NonFiniteGradientError) as error:
        ZClip(nonfinite="raise").step([*params, plain])
    texts = [str(error.value)]

    lines = [dtensor_parameter(g, mesh["b"], [S0]) for g in full_gradients()]
    across = mesh.get_group("a")
    if rank == 3:
        lines[0].grad.to_local().fill_(math.nan)
    with pytest.raises(NonFiniteGradientError) as error:
        ZClip(nonfinite="raise", process_group=across).step([*lines, plain])
    texts.append(str(error.value))

    plain.grad = torch.full((3,), math.nan) if rank == 2 else torch.ones(3)
    with pytest.raises(NonFiniteGradientError) as error:
        ZClip(nonfinite="raise", process_group=dist.group.WORLD).step([plain])
    texts.append(str(error.value))
    return [text.partition("elements: ")[2] for text in texts]


def test_an_error_names_the_ranks(four):
    for texts in four.run(check_an_error_names_the_rank):
        assert texts == [
            "rank 1: param_groups[0]['params'][1] (5, 4); rank 2: param_groups[0]['params'][2] (3,)",
            "rank 3: param_groups[0]['params'][0] (8, 6)",
            "rank 2: param_groups[0]['params'][0] (3,)",
        ]


def check_one_replica_alone(rank):
    """Plain gradients are the same on all ranks, and no collective covers them: one that is bad must not hang."""
    p, plain = dtensor_parameter(torch.ones(4), mesh_of(2), [S0]), nn.Parameter(torch.zeros(3))
    plain.grad = torch.full((3,), math.nan if rank == 1 else 1.0)
    clipper = ZClip(nonfinite="raise")
    if rank == 0:
        assert clipper.step([p, plain]) == pytest.approx(math.sqrt(7))
    else:
        with pytest.raises(NonFiniteGradientError, match=r"elements: param_groups\[0\]\['params'\]\[1\] \(3,\)$"):
            clipper.step([p, plain])


def test_one_replica_alone_does_not_hang(two):
    two.run(check_one_replica_alone)


def check_one_rank_alone_decides_for_all(rank):
    p = nn.Parameter(torch.zeros(10))
    optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.1), process_group=dist.group.WORLD, warmup_steps=5)
    for norm in [1.0, 1.1, 0.9, 1.0, 1.05]:
        set_gradients([p], norm)
        optimizer.step()
    set_gradients([p], float("nan") if rank == 1 else 1.0)
    optimizer.step()
    assert optimizer.step_was_skipped
    set_gradients([p], 100.0 if rank == 1 else 1.0)
    optimizer.step()
    assert optimizer.metrics.clipped
    p.grad = None if rank == 1 else torch.full((10,), 0.3)
    optimizer.step()
    return optimizer.metrics.mean, optimizer.metrics.std


def test_one_rank_alone_decides_for_all(two):
    first, second = two.run(check_one_rank_alone_decides_for_all)
    assert first == second


def check_refusals_and_copies(rank):
    p = nn.Parameter(torch.zeros(3))
    p._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group.* \(process_group=\(\)"):
        ZClipOptimizer(torch.optim.SGD([p], lr=0.1))
    optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.1), process_group=dist.group.WORLD)
    assert copy.deepcopy(optimizer).clipper._process_groups.of_all == (dist.group.WORLD,)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"pass process_group"):
        ZClip().step([p])
    late = ZClipOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    late.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match=r"pass process_group"):
        late.step()


def test_shards_of_fsdp_without_a_process_group_are_refused(two):
    two.run(check_refusals_and_copies)


def test_gradients_that_others_own_are_refused():
    for attribute, owner, instead in (
        ("ds_id", "DeepSpeed ZeRO", r"deepspeed\.attach\(engine\)"),
        ("main_grad", "Megatron", r"megatron\.attach\(optimizer\)"),
    ):
        p = nn.Parameter(torch.zeros(3))
        setattr(p, attribute, 0)
        with pytest.raises(
            ValueError, match=rf"^{owner} keeps the gradients .*: use zclip_optim\.integrations\.{instead}"
        ):
            ZClipOptimizer(torch.optim.SGD([p], lr=0.1))
        theirs = type("Optimizer", (torch.optim.SGD,), {"__module__": f"{owner.lower().split()[0]}.optimizer"})
        with pytest.raises(ValueError, match=f"^{owner}"):
            ZClipOptimizer(theirs([nn.Parameter(torch.zeros(3))], lr=0.1))


def check_a_hang(rank):
    if rank == 1:
        dist.barrier()
    time.sleep(3600 if rank == 0 else 0)


def check_a_crash(rank):
    if rank == 1:
        raise RuntimeError("one of them")
    dist.barrier()


def test_a_hang_or_a_crash_is_a_failure_with_every_stack():
    world = World(2, timeout=2.0)
    start = time.monotonic()
    try:
        for function, said in ((check_a_hang, "time.sleep(3600"), (check_a_crash, "RuntimeError: one of them")):
            with pytest.raises(AssertionError) as error:
                world.run(function)
            text = str(error.value)
            assert "---- rank 0 ----" in text
            assert "---- rank 1 ----" in text
            assert text.count(f"in {function.__name__}") == 2
            assert said.split("(")[0] in text or "Current thread" in text
            assert world.ranks == []
    finally:
        world.close()
    assert time.monotonic() - start < 60


def check_that_only_one_rank_reads(rank):
    """The rank that has read the metrics raises by itself; no collective waits for the others."""
    p = nn.Parameter(torch.ones(4))
    optimizer = ZClipOptimizer(
        torch.optim.AdamW([p], fused=True), process_group=dist.group.WORLD, max_consecutive_nonfinite=3
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ZClipWarning)
        patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        p.grad = torch.full((4,), math.nan)
        for _ in range(2):
            optimizer.step()
        if rank == 0:
            assert optimizer.metrics.skipped_steps == 2
            with pytest.raises(NonFiniteGradientError, match="for 3 in a row"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.metrics.skipped_steps == 3


def test_reading_metrics_on_one_rank_makes_no_other_wait(two):
    two.run(check_that_only_one_rank_reads)


def check_that_gradients_elsewhere_are_gradients(rank, on_device):
    p = nn.Parameter(torch.ones(4))
    optimizer = ZClipOptimizer(torch.optim.AdamW([p], fused=True), process_group=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        for step in range(60):  # warnings are errors here
            p.grad = torch.full((4,), 1.0 + step % 3) if rank == 1 else None
            optimizer.step()
        assert optimizer.metrics.step == 60
        p.grad = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(20):
                optimizer.step()
            assert len(caught) == (not on_device)  # there the norm over ranks is known when it is read
            for _ in range(2):
                optimizer.state_dict()
        assert ["had a gradient at the last" in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_rank_without_gradients_beside_one_that_has_some_is_none_without(two, on_device):
    two.run(check_that_gradients_elsewhere_are_gradients, on_device)


def check_replaced_parameters_of_fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4))
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model.weight = nn.Parameter(model.weight.detach())
    model.bias = nn.Parameter(model.bias.detach())
    with pytest.warns(ZClipWarning, match="had a gradient at the last 20 steps"):
        for _ in range(20):
            optimizer.step()


def test_parameters_replaced_under_fsdp2_are_warned_of_on_every_rank(two):
    two.run(check_replaced_parameters_of_fsdp2)


def check_layouts_on_ranks(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        p = nn.Parameter(torch.ones(4, 4).to_sparse_csr())
        p.grad = torch.full((4, 4), 3.0).to_sparse_csr()
    q = nn.Parameter(torch.ones(4))
    q.grad = torch.ones(4)
    optimizer = ZClipOptimizer(torch.optim.SGD([p, q], lr=0.0), process_group=dist.group.WORLD)
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx((2 * (16 * 9 + 4)) ** 0.5)


def test_layouts_count_over_ranks(two):
    two.run(check_layouts_on_ranks)


class Clipped(ZClipOptimizer):
    """A class for those who ask for one."""

    def __init__(self, params, lr, group=None):
        super().__init__(torch.optim.SGD(params, lr=lr), process_group=group)


def check_a_part_of_the_parameters(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of its own torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer

    params = [nn.Parameter(torch.ones(n)) for n in (3, 5, 8)]
    for p in params:
        p.grad = torch.ones_like(p)
    sharded = ZeroRedundancyOptimizer(params, Clipped, lr=0.0, group=dist.group.WORLD)
    sharded.step()
    around = ZClipOptimizer(ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.0))
    around.step()
    assert around.metrics.grad_norm == pytest.approx(4.0)
    assert sharded.optim.metrics.grad_norm == pytest.approx(4.0)


def test_a_part_of_the_parameters_is_wrapped_outside_or_has_its_group_given(two):
    two.run(check_a_part_of_the_parameters)


def check_sharding_after_wrapping(rank):
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    fully_shard(model)
    with pytest.warns(ZClipWarning, match="no parameter of this optimizer had a gradient"):
        for _ in range(20):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()


@needs_fsdp2_on_cpu
def test_sharding_after_wrapping_is_warned_of(two):
    two.run(check_sharding_after_wrapping)
