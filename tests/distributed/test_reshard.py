"""Checkpoints of two ranks go on, on one rank, two and four, like the run that never stopped."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_torch_parallel import INNER, OPTIONS, Fsdp1, Fsdp2, Hsdp, Plain, mesh_of
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from versions import needs_fsdp2_on_cpu

from zclip_optim import ZClipOptimizer

pytestmark = pytest.mark.xdist_group("processes")

SAVED, END = 12, 20
STATISTICS = ("mean", "std", "step", "clipped_steps", "skipped_steps", "consecutive_spikes")


class Fsdp2OnFour(Fsdp2):
    shares = 4

    def wrap(self, model):
        return fully_shard(model, mesh=mesh_of(4))


WAYS = {"fsdp2": Fsdp2OnFour, "hsdp": Hsdp}


def sgd_and_adamw(params):
    params = list(params)
    matrices = INNER["SGD"]([p for p in params if p.ndim == 2])
    return [matrices, INNER["AdamW"]([p for p in params if p.ndim != 2])]


SEVERAL = {"SGD and AdamW": sgd_and_adamw}


def start(way, inner="AdamW"):
    return ZClipOptimizer((INNER | SEVERAL)[inner](way.params()), **OPTIONS, **way.options())


def train(way, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        way.backward(step)
        optimizer.step()


def statistics(optimizer):
    group = optimizer.state_dict()["param_groups"][0]
    return {key: value for key, value in group.items() if key.startswith("zclip_")}


def end_of(way, optimizer):
    train(way, optimizer, range(SAVED, END))
    metrics = optimizer.metrics
    return {name: getattr(metrics, name) for name in STATISTICS}, way.full_parameters()


def states(way, optimizer, options):
    return dict(zip(("model", "optimizer"), get_state_dict(way.model, optimizer, options=options), strict=True))


def restore(way, optimizer, saved, options):
    # Not set_state_dict, which takes an empty dict, as the other ranks of a broadcast have, for nothing to do.
    set_model_state_dict(way.model, saved["model"], options=options)
    set_optimizer_state_dict(way.model, optimizer, saved["optimizer"], options=options)


@contextlib.contextmanager
def quiet():
    """torch's own warnings about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
        yield


def save_sharded(rank, path, options, inner):
    way = Fsdp2(rank)
    optimizer = start(way, inner)
    train(way, optimizer, range(SAVED))
    at_save = statistics(optimizer)
    with quiet():
        dcp.save(states(way, optimizer, options), checkpoint_id=path)
    return at_save, *end_of(way, optimizer)


def load_sharded(rank, name, path, options, inner):
    way = WAYS[name](rank)
    optimizer = start(way, inner)
    with quiet():
        saved = states(way, optimizer, options)
        dcp.load(saved, checkpoint_id=path)
        restore(way, optimizer, saved, options)
    return statistics(optimizer), *end_of(way, optimizer)


def load_in_one_process(path, options, inner):
    way = Plain(0)
    optimizer = start(way, inner)
    with quiet():
        saved = states(way, optimizer, options)
        dcp.load(saved, checkpoint_id=path)
        restore(way, optimizer, saved, options)
    return statistics(optimizer), *end_of(way, optimizer)


def assert_goes_on_like(saved, loaded):
    assert len({repr(result[:2]) for result in loaded}) == 1  # on every rank
    (at_save, expected, expected_params), (at_load, found, params) = saved[0], loaded[0]
    assert at_load == at_save
    assert at_load["zclip_step"] == SAVED
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["clipped_steps"] == 2
    assert params.numpy() == pytest.approx(expected_params.numpy(), rel=1e-4, abs=1e-5)


NESTED, FLAT = StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)


@needs_fsdp2_on_cpu
@pytest.mark.parametrize(
    ("options", "inner"),
    [(NESTED, "AdamW"), (FLAT, "AdamW"), (FLAT, "SGD and AdamW")],
    ids=["nested", "flat", "flat-several"],
)
def test_saved_on_two_ranks_and_loaded_on_one_and_four(two, four, tmp_path, options, inner):
    args = str(tmp_path), options, inner
    saved = two.run(save_sharded, *args)
    assert_goes_on_like(saved, [load_in_one_process(*args)])
    for name in WAYS:
        assert_goes_on_like(saved, four.run(load_sharded, name, *args))


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save_full(rank, path):
    way = Fsdp2(rank)
    optimizer = start(way)
    train(way, optimizer, range(SAVED))
    at_save = statistics(optimizer)
    with quiet():
        saved = states(way, optimizer, FULL)
    if rank == 0:
        torch.save(saved, path)
    return at_save, *end_of(way, optimizer)


def load_full(rank, path):
    way = Fsdp2OnFour(rank)
    optimizer = start(way)
    empty = {"model": {}, "optimizer": {}}
    with quiet():
        restore(way, optimizer, torch.load(path, weights_only=True) if rank == 0 else empty, BROADCAST)
    return statistics(optimizer), *end_of(way, optimizer)


@needs_fsdp2_on_cpu
def test_a_full_checkpoint_is_broadcast_from_rank_0(two, four, tmp_path):
    path = str(tmp_path / "full.pt")
    assert_goes_on_like(two.run(save_full, path), four.run(load_full, path))


KINDS = {
    "full": (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig()),
    "sharded": (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()),
}


@contextlib.contextmanager
def fsdp1_states(model, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP.state_dict_type", FutureWarning)
        warnings.filterwarnings("ignore", ".*_get_pg_default_device|Multiple backends are registered", UserWarning)
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        with FullyShardedDataParallel.state_dict_type(model, *KINDS[kind]):
            yield


def fsdp1(rank, use_orig_params):
    return Fsdp1(rank, ShardingStrategy.FULL_SHARD, use_orig_params, shares=dist.get_world_size())


def save_fsdp1(rank, path, kind, use_orig_params, inner):
    way = fsdp1(rank, use_orig_params)
    optimizer = start(way, inner)
    train(way, optimizer, range(SAVED))
    at_save = statistics(optimizer)
    with fsdp1_states(way.model, kind):
        state = FullyShardedDataParallel.optim_state_dict(way.model, optimizer)
        torch.save({"model": way.model.state_dict(), "optimizer": state}, f"{path}/{rank}")
    return at_save, *end_of(way, optimizer)


def load_fsdp1(rank, path, kind, use_orig_params, inner):
    way = fsdp1(rank, use_orig_params)
    optimizer = start(way, inner)
    with fsdp1_states(way.model, kind):
        saved = torch.load(f"{path}/{rank if kind == 'sharded' else 0}", weights_only=False)
        way.model.load_state_dict(saved["model"])
        state = FullyShardedDataParallel.optim_state_dict_to_load(way.model, optimizer, saved["optimizer"])
        optimizer.load_state_dict(state)
    return statistics(optimizer), *end_of(way, optimizer)


@pytest.mark.parametrize(
    ("kind", "use_orig_params", "inner"),
    [
        ("sharded", True, "AdamW"),
        ("sharded", False, "AdamW"),
        ("full", False, "AdamW"),
        # One state per parameter: on the CPU torch 2.13 gathers AdamW's two into one buffer here, bare or wrapped.
        ("full", True, "SGD"),
    ],
)
def test_fsdp1_optim_state_dict(two, four, tmp_path, kind, use_orig_params, inner):
    args = str(tmp_path), kind, use_orig_params, inner
    saved = two.run(save_fsdp1, *args)
    assert_goes_on_like(saved, two.run(load_fsdp1, *args))
    if kind == "full":
        assert_goes_on_like(saved, four.run(load_fsdp1, *args))
