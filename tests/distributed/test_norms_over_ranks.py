"""The norms of single parameters over ranks: those of one process, the same list everywhere, few collectives."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from test_distributed import S0, S1, R, all_reduces, dtensor_parameter, full_gradients, mesh_of
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from training import backward, make_model, set_gradients
from versions import needs_fsdp2_on_cpu

import zclip_optim.gradients
from zclip_optim import ZClip, ZClipOptimizer

pytestmark = pytest.mark.xdist_group("processes")


def sgd(params, **options):
    return ZClipOptimizer(torch.optim.SGD(params, lr=0.1), **options)


def same(norms, expected):
    assert [each.name for each in norms] == [each.name for each in expected]
    for i in (1, 2):
        assert [each[i] for each in norms] == pytest.approx([each[i] for each in expected], rel=1e-5)


def check_fsdp2(rank, on_device):
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        model = make_model()
        single = copy.deepcopy(model)
        for module in (model[0], model):
            fully_shard(module, mesh=mesh_of(2))
        optimizer, expected = (sgd(m.named_parameters(), max_grad_norm=0.5) for m in (model, single))
        for each, m in ((optimizer, model), (expected, single)):
            backward(m, 0)
            each.step()
        norms, count = all_reduces(lambda: optimizer.norms_by_parameter(None))
        same(norms, expected.norms_by_parameter(None))
        assert count == 1
        assert math.hypot(*(each.norm for each in norms)) == pytest.approx(0.5)
        assert optimizer.norms_by_parameter(2) == norms[:2]
        same(ZClip().norms_by_parameter(model), expected.norms_by_parameter())
    return norms


@needs_fsdp2_on_cpu
@pytest.mark.parametrize("on_device", [False, True])
def test_fsdp2_has_the_list_of_one_process(two, on_device):
    first, second = two.run(check_fsdp2, on_device)
    assert first == second


def check_meshes(rank):
    """Placements and meshes side by side, an empty shard, replicas, terms of a sum, ties and a plain parameter."""
    square, line, half = mesh_of(2, 2), mesh_of(4), mesh_of(2, 2)["b"]
    layouts = [(square, [S0, S1]), (line, [S0]), (half, [S0]), (square, [R, R]), (square, [R, Partial()])]
    gradients = full_gradients()
    params = [dtensor_parameter(g, *layout) for g, layout in zip(gradients, layouts, strict=True)]
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = torch.tensor([3.0, 0.0, 4.0])
    tied = nn.Parameter(params[0].detach().clone())
    tied.grad = params[0].grad
    names = ["square", "line", "half", "replicated", "partial", "plain", "tied"]
    optimizer = sgd(
        [
            {"params": list(zip(names[:2], params[:2], strict=True))},
            {"params": list(zip(names[2:], [*params[2:], plain, tied], strict=True))},
        ]
    )
    norms = optimizer.norms_by_parameter()
    expected = [*(g.double().norm().item() for g in gradients), 5.0]
    assert {each.name: each.norm for each in norms} == pytest.approx(dict(zip(names, expected, strict=False)), rel=1e-6)
    total = math.fsum(norm**2 for norm in expected)
    assert [each.share for each in norms] == pytest.approx([each.norm**2 / total for each in norms])
    params[4].grad = None
    _, count = all_reduces(optimizer.norms_by_parameter)
    assert count == 2  # all ranks, and half of them
    return norms


def test_placements_and_meshes_side_by_side(four):
    assert len({repr(norms) for norms in four.run(check_meshes)}) == 1


def check_gradients_on_some_ranks(rank):
    params = [dtensor_parameter(torch.ones(4, 2), mesh_of(2), [S0]) for _ in range(4)]
    nowhere, first, nan, zero = params
    nowhere.grad = None
    if rank == 1:
        first.grad = None
        nan.grad.to_local().fill_(math.nan)
    zero.grad.to_local().zero_()
    norms = sgd(list(zip(["nowhere", "first", "nan", "zero"], params, strict=True))).norms_by_parameter()
    assert [each.name for each in norms] == ["nan", "first", "zero"]
    assert norms[1] == ("first", 2.0, 1.0)
    return repr(norms)


def test_a_parameter_is_left_out_if_no_rank_has_a_gradient(two):
    assert len(set(two.run(check_gradients_on_some_ranks))) == 1


def check_plain_shards(rank):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    set_gradients(params[:1], 3.0 if rank == 0 else 4.0)
    set_gradients(params[1:2], 1.0)
    if rank == 1:
        params[1].grad = None
    optimizer = sgd(params, process_group=dist.group.WORLD)
    norms = optimizer.norms_by_parameter()
    first, second = ("param_groups[0]['params'][0]", "param_groups[0]['params'][1]")
    same(norms, [type(norms[0])(first, 5.0, 25 / 26), type(norms[0])(second, 1.0, 1 / 26)])
    same(ZClip(process_group=[dist.group.WORLD]).norms_by_parameter(params), norms)
    alone = ZClip(process_group=()).norms_by_parameter(params)
    assert alone[0].norm == pytest.approx(3.0 + rank)
    return norms


def test_plain_shards_are_added_by_name(two):
    first, second = two.run(check_plain_shards)
    assert first == second


def check_pipeline(rank):
    """Two stages, each on a mesh of two ranks; rank 0 and 2, 1 and 3, hold the same shards of different stages."""
    mesh = mesh_of(2, 2)
    stage, pipeline = mesh.get_local_rank("a"), mesh.get_group("a")
    gradients = full_gradients()[2 * stage : 2 * stage + 2]
    names = [f"stage{stage}.{name}" for name in ("weight", "bias")]
    params = [dtensor_parameter(g, mesh["b"], [S0]) for g in gradients]
    optimizer = sgd(list(zip(names, params, strict=True)), process_group=pipeline)
    norms = optimizer.norms_by_parameter()
    expected = {
        f"stage{i // 2}.{('weight', 'bias')[i % 2]}": g.norm().item() for i, g in enumerate(full_gradients()[:4])
    }
    assert {each.name: each.norm for each in norms} == pytest.approx(expected)
    assert math.fsum(each.share for each in norms) == pytest.approx(1)
    covered = sgd(params, process_group=mesh.get_group("b"))
    with pytest.raises(ValueError, match=r"process_group holds the group over which the DTensors .* leave it out"):
        covered.norms_by_parameter()
    return repr(norms)


def test_a_pipeline_has_the_parameters_of_all_stages(four):
    assert len(set(four.run(check_pipeline))) == 1


def check_fsdp1(rank):
    warnings.simplefilter("ignore")  # what torch says of FSDP1 itself
    single = make_model()
    model = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    for each in (single, model):
        torch.nn.functional.mse_loss(each(torch.ones(8, 6)), torch.zeros(8, 1)).backward()
    expected = ZClip().norms_by_parameter(single)
    norms, count = all_reduces(lambda: ZClip().norms_by_parameter(model))
    assert count == 1
    same([each._replace(name=each.name.removeprefix("_fsdp_wrapped_module.")) for each in norms], expected)
    wrapped = sgd(model.named_parameters(), process_group=model.process_group)
    same(wrapped.norms_by_parameter(), norms)
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group"):
        ZClip().norms_by_parameter(model.parameters())
    return repr(norms)


def test_fsdp1(two):
    assert len(set(two.run(check_fsdp1))) == 1


def check_the_warning(rank):
    """It comes when one rank counts to the end of a window, and takes no collective: of what the process holds."""
    p, q = (dtensor_parameter(torch.ones(4), mesh_of(2), [S0]) for _ in range(2))
    optimizer = sgd([("small", p), ("large", q)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(200):
            scale = 1.0 + 0.05 * (step % 5) if step < 100 else 50.0
            p.grad.to_local().fill_(scale)
            q.grad.to_local().fill_((2.0 - rank) * scale)
            optimizer.step()
    (message,) = [str(warning.message) for warning in caught if "steps were clipped" in str(warning.message)]
    largest = ["large 80%, small 20%", "small 50%, large 50%"][rank]
    assert f"; largest in this step in this process: {largest}. Or" in message


def test_the_warning_of_many_clipped_steps_names_what_the_process_holds(two):
    two.run(check_the_warning)


def norms_as_torch_has_them(mesh):
    """Norms of the same gradients, as DTensors of several placements."""
    full = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for placements in ([Shard(0)], [Replicate()], [Shard(1)]):
        sharded = distribute_tensor(full, mesh, placements).requires_grad_()
        yield torch.linalg.vector_norm(sharded)
        yield torch.nn.utils.get_total_norm([sharded])
    squares = distribute_tensor(full, mesh, [Shard(0)]).to_local().square().sum() * torch.ones(1, 1)
    yield DTensor.from_local(squares, mesh, [Partial()]).sqrt()
    yield full.norm()


def check_reported_norms(rank, on_device):
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
        norms = list(norms_as_torch_has_them(mesh_of(2)))
        clippers = [ZClip(max_grad_norm=0.1) for _ in norms]
        factors = [float(clipper.decide(norm)) for clipper, norm in zip(clippers, norms, strict=True)]
        return factors, [clipper.state_dict() for clipper in clippers]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_norm_that_is_reported_as_a_dtensor_is_that_of_all_ranks(two, on_device):
    first, second = two.run(check_reported_norms, on_device)
    assert first == second
    factors, _ = first
    assert factors == pytest.approx([factors[-1]] * len(factors), rel=1e-6)
