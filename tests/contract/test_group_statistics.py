"""With scope="group" a statistic belongs to its param group, whatever is done to the list of groups in a run."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from thoroughness import thorough
from torch import nn
from training import set_gradients

import zclip_optim.gradients
from zclip_optim import ZClip, ZClipOptimizer

LEVELS = {"small": 1.0, "large": 1000.0, "middle": 30.0, "new": 5.0}
STEPS = 12


def make_group(name):
    return {"params": [nn.Parameter(torch.zeros(4)) for _ in range(3)], "name": name}


def make_groups():
    return [make_group(name) for name in ("small", "large", "middle")]


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-3)


def wrap(base):
    return ZClipOptimizer(base, scope="group", warmup_steps=5)


def give_gradients(optimizer, step):
    for group in optimizer.param_groups:
        set_gradients(group["params"], LEVELS[group["name"]] * (1 + 0.01 * (step % 3)))


def train(optimizer, steps=STEPS):
    for step in range(steps):
        give_gradients(optimizer, step)
        optimizer.step()
    return optimizer


def check(optimizer, new=(), seen=STEPS):
    """Each group goes on from its own statistics, those in `new` from none."""
    saved = optimizer.state_dict()["param_groups"]
    assert {g["name"]: g["zclip_step"] for g in saved} == {g["name"]: 0 if g["name"] in new else seen for g in saved}
    train(optimizer, 1)
    groups = optimizer.param_groups
    for group, metrics in zip(groups, optimizer.group_metrics, strict=True):
        assert metrics.step == (1 if group["name"] in new else seen + 1)
        assert metrics.mean == pytest.approx(LEVELS[group["name"]], rel=0.02)
        assert metrics.clip_coef == 1


@pytest.fixture(params=[False, True], ids=["host", "device"])
def anywhere(request, monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: request.param)


def delete(optimizer):
    del optimizer.param_groups[0]


def delete_all_but_one(optimizer):
    del optimizer.param_groups[:2]


def reverse(optimizer):
    optimizer.param_groups.reverse()


def assign(optimizer):
    optimizer.param_groups = optimizer.param_groups[1:] + optimizer.param_groups[:1]


def freeze(optimizer):
    for group in optimizer.param_groups:
        del group["params"][0]


def swap_tensors(optimizer):
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    optimizer.param_groups.reverse()


def rebuild(optimizer):
    optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]


def rebuild_without_some(optimizer):
    optimizer.param_groups[:] = [{**group, "params": group["params"][1:]} for group in optimizer.param_groups[1:]]


def rebuild_with_others(optimizer):  # nothing is left to know them by but their place
    optimizer.param_groups[:] = [{**group, **make_group(group["name"])} for group in optimizer.param_groups]


EDITS = [
    delete,
    reverse,
    swap_tensors,
    thorough(delete_all_but_one),
    thorough(assign),
]


@pytest.mark.parametrize("edit", [*EDITS, freeze, rebuild, rebuild_without_some, rebuild_with_others])
def test_it_follows_its_group(edit, anywhere):
    optimizer = train(wrap(sgd(make_groups())))
    edit(optimizer)
    check(optimizer)


def insert(optimizer):
    optimizer.add_param_group(make_group("new"))
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())


def insert_into_the_base(optimizer):
    optimizer.base_optimizer.add_param_group(make_group("new"))
    optimizer.param_groups.insert(1, optimizer.param_groups.pop())


def replace(optimizer):
    del optimizer.param_groups[0]
    optimizer.add_param_group(make_group("new"))


def replace_in_place(optimizer):
    replace(optimizer)
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())


def insert_with_the_options_of_another(optimizer):
    optimizer.param_groups.insert(0, {**optimizer.param_groups[1], **make_group("new")})


@pytest.mark.parametrize(
    "edit", [insert, insert_into_the_base, replace, replace_in_place, insert_with_the_options_of_another]
)
def test_a_new_group_starts_afresh_wherever_it_stands(edit, anywhere):
    optimizer = train(wrap(sgd(make_groups())))
    edit(optimizer)
    check(optimizer, new={"new"})


def loaded(optimizer):
    other = wrap(sgd(make_groups()[-len(optimizer.param_groups) :]))
    other.load_state_dict(optimizer.state_dict())
    return other


def loaded_by_the_base(optimizer):
    optimizer.base_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def loaded_back(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 3)
    optimizer.load_state_dict(saved)
    return optimizer


MOVES = [loaded, loaded_by_the_base, loaded_back, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("edit", [*EDITS, *map(thorough, (freeze, rebuild, rebuild_without_some))])
def test_so_it_does_after_a_copy_or_a_checkpoint(move, edit, anywhere):
    optimizer = move(train(wrap(sgd(make_groups()))))
    edit(optimizer)
    check(optimizer)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("edit", [delete, thorough(reverse), thorough(swap_tensors)])
def test_and_before(move, edit, anywhere):
    optimizer = train(wrap(sgd(make_groups())))
    edit(optimizer)
    check(move(optimizer))


@pytest.mark.parametrize("edit", [lambda optimizer: None, delete, reverse])
def test_a_checkpoint_of_the_bare_optimizer_starts_each_afresh(edit, anywhere):
    optimizer = train(wrap(sgd(make_groups())))
    optimizer.load_state_dict({"state": {}, "param_groups": [without_ours(g) for g in bare(optimizer)]})
    edit(optimizer)
    check(optimizer, new=set(LEVELS))


def bare(optimizer):
    return optimizer.base_optimizer.state_dict()["param_groups"]


def without_ours(group):
    return {name: value for name, value in group.items() if not name.startswith("zclip")}


def test_of_several_without_a_statistic_each_nothing_is_kept():
    optimizer = train(ZClipOptimizer(sgd(make_groups())))
    optimizer.load_state_dict(optimizer.state_dict())
    removed = weakref.ref(optimizer.param_groups.pop()["params"][0])
    optimizer.zero_grad()
    gc.collect()
    assert removed() is None


def test_a_part_of_a_list_may_get_groups(anywhere):
    small, large, middle = make_groups()
    optimizer = train(wrap([sgd([small, large]), sgd([middle])]))
    optimizer.parts[0].add_param_group(make_group("new"))
    del optimizer.parts[0].param_groups[0]
    check(optimizer, new={"new"})


def test_a_part_of_a_list_may_load_what_it_had_where_groups_before_it_have_gone(anywhere):
    small, large, middle = make_groups()
    optimizer = train(wrap([sgd([small, large]), sgd([middle])]))
    optimizer.state_dict()
    saved = copy.deepcopy(optimizer.parts[1].state_dict())
    train(optimizer, 2)
    del optimizer.parts[0].param_groups[0]
    optimizer.parts[1].load_state_dict(saved)
    train(optimizer, 1)
    assert [m.step for m in optimizer.group_metrics] == [STEPS + 3, STEPS + 1]


def test_with_no_group_left_a_step_does_nothing(anywhere):
    optimizer = train(wrap(sgd(make_groups())))
    removed = optimizer.param_groups.pop()
    del optimizer.param_groups[:]
    optimizer.step()
    assert optimizer.metrics.grad_norm == 0
    assert not optimizer.state_dict()["param_groups"]
    optimizer.param_groups.append(removed)
    train(optimizer, 1)
    assert optimizer.metrics.step == 1


def test_a_change_is_read_once_and_an_ordinary_step_not_at_all(monkeypatch):
    monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)
    optimizer = ZClipOptimizer(sgd(make_groups()), scope="group", nonfinite="pass")
    reads = []
    read = type(train(optimizer, 1).clipper._records.state).read
    monkeypatch.setattr(type(optimizer.clipper._records.state), "read", lambda state: reads.append(1) or read(state))
    train(optimizer, 3)
    assert not reads
    delete(optimizer)
    train(optimizer, 3)
    assert len(reads) == 1


class TestTheEngine:
    """`ZClip.step(param_groups)`, with the dicts of an optimizer or such as are written for each step."""

    @pytest.mark.parametrize(
        "given",
        [
            lambda group: group,
            dict,
            lambda group: {"params": iter(group["params"])},
            lambda group: {"params": tuple(group["params"])},
        ],
    )
    def test_it_follows_the_group(self, given, anywhere):
        clipper, groups = ZClip(scope="group", warmup_steps=5), make_groups()

        def step(i):
            for group in groups:
                set_gradients(group["params"], LEVELS[group["name"]] * (1 + 0.01 * (i % 3)))
            clipper.step([given(group) for group in groups])

        for i in range(STEPS):
            step(i)
        del groups[0]
        groups.reverse()
        step(0)
        assert [m.mean for m in clipper.group_metrics] == pytest.approx([30.0, 1000.0], rel=0.02)
        groups.insert(0, make_group("new"))
        step(0)
        assert [m.step for m in clipper.group_metrics] == [1, STEPS + 2, STEPS + 2]
        assert clipper.metrics.clip_coef == 1
