"""The param groups and the state of several optimizers: what is done to them in place acts, or says why it cannot."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from training import make_model, set_gradients, train

from zclip_optim import ZClipOptimizer


def make():
    """SGD has two groups, AdamW one."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    weights, biases = [[getattr(model[i], name) for i in (0, 2)] for name in ("weight", "bias")]
    sgd = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1e-2, momentum=0.9)
    return model, ZClipOptimizer([sgd, torch.optim.AdamW(biases, lr=1e-2)])


def counts(optimizer):
    return [len(part.param_groups) for part in optimizer.parts]


def ids(groups):
    return [id(group) for group in groups]


class TestTheSameOneTwice:
    def test_it_is_refused(self):
        sgd = torch.optim.SGD(make_model().parameters(), lr=0.1)
        with pytest.raises(ValueError, match="the same SGD twice, which would be stepped twice"):
            ZClipOptimizer([sgd, sgd])
        assert not any("zclip" in key for key in sgd.param_groups[0])

    def test_also_without_groups(self):
        adamw = torch.optim.AdamW(make_model().parameters(), lr=0.1)
        adamw.param_groups.clear()
        with pytest.raises(ValueError, match="the same AdamW twice"):
            ZClipOptimizer([adamw, torch.optim.SGD(make_model().parameters(), lr=0.1), adamw])


def delete(groups):
    del groups[1]


def delete_slice(groups):
    del groups[1:]


def keep_one(groups):
    groups[:] = groups[2:]


def set_slice(groups):
    groups[0:1] = []


class TestEdits:
    @pytest.mark.parametrize(
        ("edit", "left"),
        [
            (delete, [0, 2]),
            (delete_slice, [0]),
            (keep_one, [2]),
            (set_slice, [1, 2]),
            (lambda groups: groups.pop(), [0, 1]),
            (lambda groups: groups.pop(0), [1, 2]),
            (lambda groups: groups.remove(groups[0]), [1, 2]),
            (lambda groups: groups.clear(), []),
        ],
    )
    def test_what_is_removed_no_longer_moves(self, edit, left):
        model, optimizer = make()
        train(model, optimizer, range(2))
        groups, lists = list(optimizer.param_groups), [part.param_groups for part in optimizer.parts]
        view = optimizer.param_groups
        edit(view)
        assert ids(optimizer.param_groups) == ids(view) == [id(groups[i]) for i in left]
        assert [part.param_groups for part in optimizer.parts] == lists
        assert all(part.param_groups is own for part, own in zip(optimizer.parts, lists, strict=True))
        start = [group["params"][0].detach().clone() for group in groups]
        set_gradients(model.parameters(), 1.0)
        optimizer.step()
        moved = [not torch.equal(group["params"][0], p) for group, p in zip(groups, start, strict=True)]
        assert moved == [i in left for i in range(3)]
        for i in {0, 1, 2}.difference(left):  # whose state is the caller's to remove, as with a bare optimizer
            for p in groups[i]["params"]:
                del optimizer.parts[i // 2].state[p]
        assert len(optimizer.state_dict()["param_groups"]) == len(left)

    def test_a_group_in_the_place_of_another(self):
        _, optimizer = make()
        new = {**optimizer.param_groups[1], "lr": 7.0}
        optimizer.param_groups[1] = new
        assert optimizer.parts[0].param_groups[1] is new
        optimizer.param_groups[-1:] = [{**optimizer.param_groups[2], "lr": 8.0}]
        assert optimizer.parts[1].param_groups[0]["lr"] == 8.0
        assert counts(optimizer) == [2, 1]

    def test_the_order_within_a_part(self):
        _, optimizer = make()
        first, second, third = optimizer.param_groups
        optimizer.param_groups[:2] = [second, first]
        assert ids(optimizer.param_groups) == ids([second, first, third])
        optimizer.param_groups.sort(key=lambda group: group is third)
        assert ids(optimizer.param_groups) == ids([second, first, third])

    @pytest.mark.parametrize(
        "edit",
        [
            lambda optimizer, new: optimizer.param_groups.append(new),
            lambda optimizer, new: optimizer.param_groups.extend([new]),
            lambda optimizer, new: optimizer.param_groups.insert(0, new),
            lambda optimizer, new: optimizer.param_groups.__iadd__([new]),
            lambda optimizer, new: optimizer.param_groups.__imul__(2),
            lambda optimizer, new: optimizer.param_groups.__setitem__(slice(None), [new]),
            lambda optimizer, new: setattr(optimizer, "param_groups", [*optimizer.param_groups, new]),
        ],
    )
    def test_a_group_whose_part_is_not_clear_is_refused(self, edit):
        _, optimizer = make()
        before = ids(optimizer.param_groups)
        match = re.escape("param groups for optimizers that have [2, 1]. To add one, call add_param_group of the one ")
        with pytest.raises(ValueError, match=match + r"meant, optimizer\.parts\[i\]"):
            edit(optimizer, {"params": [nn.Parameter(torch.ones(2))]})
        assert ids(optimizer.param_groups) == before

    @pytest.mark.parametrize(
        "edit",
        [
            lambda optimizer: optimizer.param_groups.reverse(),
            lambda optimizer: optimizer.param_groups.__setitem__(slice(None), optimizer.param_groups[::-1]),
            lambda optimizer: setattr(optimizer, "param_groups", optimizer.param_groups[::-1]),
            lambda optimizer: optimizer.param_groups.__setitem__(2, optimizer.param_groups[0]),
        ],
    )
    def test_a_group_of_another_part_is_refused(self, edit):
        _, optimizer = make()
        before = ids(optimizer.param_groups)
        with pytest.raises(ValueError, match=r"parts\[.\] stands in the place of one of optimizer\.parts"):
            edit(optimizer)
        assert ids(optimizer.param_groups) == before

    def test_fewer_that_are_assigned(self):
        _, optimizer = make()
        optimizer.param_groups = optimizer.param_groups[1:]
        assert counts(optimizer) == [1, 1]

    def test_an_index_that_is_out_of_range_changes_nothing(self):
        _, optimizer = make()
        with pytest.raises(IndexError):
            del optimizer.param_groups[7]
        assert counts(optimizer) == [2, 1]

    def test_a_list_of_before_a_group_was_added(self):
        _, optimizer = make()
        view = optimizer.param_groups
        optimizer.parts[0].add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(ValueError, match=re.escape("of an earlier look: edit optimizer.param_groups itself")):
            del view[0]
        assert counts(optimizer) == [3, 1]

    @pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_is_a_plain_list(self, copier):
        _, optimizer = make()
        twin = copier(optimizer.param_groups)
        assert type(twin) is list
        twin.append({})
        assert counts(optimizer) == [2, 1]
        assert isinstance(optimizer.param_groups, list)
        assert type(optimizer.param_groups[:]) is list

    def test_a_part_that_makes_its_groups_anew_at_every_look(self):
        class Anew(torch.optim.SGD):
            own = ()

            @property
            def param_groups(self):
                return list(self.own)

            @param_groups.setter
            def param_groups(self, value):
                self.own = value

            def add_param_group(self, param_group):
                self.own = [*self.own, {"params": param_group["params"], **self.defaults}]

        params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        anew = Anew([{"params": [p]} for p in params[:2]], lr=0.1)
        optimizer = ZClipOptimizer([anew, torch.optim.SGD(params[2:], lr=0.1)])
        del optimizer.param_groups[0]
        assert [group["params"] for group in anew.own] == [params[1:2]]


class TestState:
    def make(self):
        model, optimizer = make()
        return model[0].bias, model[0].weight, optimizer

    def test_asking_makes_no_entry(self):
        bias, weight, optimizer = self.make()
        default = {"step": 1}
        assert optimizer.state.get(bias, None) is None
        assert optimizer.state.get(weight, default) is default
        assert optimizer.state.get("unknown") is None
        assert optimizer.state.pop(bias, None) is None
        assert bias not in optimizer.state
        with pytest.raises(KeyError):
            optimizer.state.pop(bias)
        assert [len(part.state) for part in optimizer.parts] == [0, 0]

    def test_a_default_is_set(self):
        bias, _, optimizer = self.make()
        default = {"step": 1}
        assert optimizer.state.setdefault(bias, default) is default
        assert optimizer.parts[1].state[bias] is default
        assert optimizer.state.setdefault(bias, {}) is default

    def test_what_is_there(self):
        bias, _, optimizer = self.make()
        entry = optimizer.state[bias] = {"step": 1}
        assert optimizer.state.get(bias) is entry
        assert optimizer.state.pop(bias, None) is entry
        assert len(optimizer.state) == 0

    def test_splattings_pruning(self):
        """gsplat's `remove` and `duplicate` take the state of each parameter, change it and give it to a new one."""
        model, optimizer = make()
        for step in range(3):
            train(model, optimizer, [step])
            for group in optimizer.param_groups:
                for i, p in enumerate(group["params"]):
                    stored = optimizer.state.get(p, None)
                    if stored is not None:
                        del optimizer.state[p]
                    new = nn.Parameter(p.detach().clone())
                    group["params"][i] = new
                    if stored is not None:
                        optimizer.state[new] = stored
                    layer = model[0] if any(p is own for own in model[0].parameters()) else model[2]
                    setattr(layer, "weight" if p is layer.weight else "bias", new)
            assert optimizer.state.keys() == set(model.parameters())
        assert optimizer.metrics.step == 3
