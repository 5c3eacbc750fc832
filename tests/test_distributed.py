"""Norms over process groups, in real gloo processes; refusal of shards that this process cannot see."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing as mp
from torch import nn
from training import set_gradients

from zclip_optim import ZClip, ZClipOptimizer


def in_two_processes(function, tmp_path):
    mp.spawn(_rank, args=(function, f"file://{tmp_path}/store"), nprocs=2)


def _rank(rank, function, store):
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        function(rank)
    finally:
        dist.destroy_process_group()


def check_the_norm_covers_the_group(rank):
    params = [nn.Parameter(torch.zeros(10))]
    set_gradients(params, 3.0 if rank == 0 else 4.0)
    assert abs(ZClip(process_group=dist.group.WORLD).step(params) - 5.0) < 1e-5
    assert abs(ZClip(process_group=()).step(params) - (3.0 + rank)) < 1e-5
    groups = [{"params": params}, {"params": []}]
    clipper = ZClip(process_group=[dist.group.WORLD], scope="group")
    clipper.step(groups)
    assert [round(m.grad_norm, 4) for m in clipper.group_metrics] == [5.0, 0.0]


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
    ours = [optimizer.metrics.mean, optimizer.metrics.std]
    everyones = [None, None]
    dist.all_gather_object(everyones, ours)
    assert everyones[0] == everyones[1]


def test_the_norm_covers_the_group(tmp_path):
    in_two_processes(check_the_norm_covers_the_group, tmp_path)


def test_one_rank_alone_decides_for_all(tmp_path):
    in_two_processes(check_one_rank_alone_decides_for_all, tmp_path)


def test_fsdp_shards_without_a_process_group_are_refused():
    p = nn.Parameter(torch.zeros(3))
    p._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"pass process_group=model\.process_group.* \(process_group=\(\)"):
        ZClipOptimizer(torch.optim.SGD([p], lr=0.1))
    assert ZClipOptimizer(torch.optim.SGD([p], lr=0.1), process_group=()).metrics.step == 0
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"pass process_group"):
        ZClip().step([p])
    late = ZClipOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    late.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match=r"pass process_group"):
        late.step()


def test_copies_share_process_groups_and_dtensors_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = ZClipOptimizer(
            torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1), process_group=dist.group.WORLD
        )
        assert copy.deepcopy(optimizer).clipper._groups == (dist.group.WORLD,)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        p = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(4), mesh))
        with pytest.raises(NotImplementedError, match="DTensor"):
            ZClipOptimizer(torch.optim.SGD([p], lr=0.1))
    finally:
        dist.destroy_process_group()
