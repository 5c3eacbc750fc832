"""Saved state: round trips, bare and wrapped checkpoints, and what malformed ones do."""

import copy
import gc
import io
import json
import math
import pickle
import weakref

import pytest
import schedulefree
import torch
from training import make_model, parameters, train

import zclip_optim.gradients
from zclip_optim import ZClipOptimizer, ZClipWarning

OUTLIERS = (33, 34, 50)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", [0, 7, 25, 34, 45])
@pytest.mark.parametrize("scope", ["global", "group"])
def test_resume_through_a_file_is_bit_exact(cut, scope):
    whole = make_model()
    reference = ZClipOptimizer(adamw(whole), scope=scope)
    train(whole, reference, range(60), OUTLIERS)

    model = make_model()
    optimizer = ZClipOptimizer(adamw(model), scope=scope)
    train(model, optimizer, range(cut), OUTLIERS)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = make_model(seed=1)
    optimizer = ZClipOptimizer(adamw(model), scope=scope)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(cut, 60), OUTLIERS)

    assert torch.equal(parameters(model), parameters(whole))
    assert optimizer.metrics == reference.metrics
    assert optimizer.metrics.clipped_steps > 0


def test_the_keys_are_flat_scalars_in_every_group_from_construction_on():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.1))
    keys = {key for key in optimizer.param_groups[0] if key.startswith("zclip_")}
    assert {"zclip_version", "zclip_mean", "zclip_var", "zclip_step", "zclip_streak"} <= keys
    for group in optimizer.state_dict()["param_groups"]:
        assert keys <= set(group)
        assert all(type(group[key]) in (int, float, str) for key in keys)
        assert json.loads(json.dumps({key: group[key] for key in keys})) == {key: group[key] for key in keys}


def test_a_bare_checkpoint_loads_and_starts_the_statistics_afresh():
    bare_model, model = make_model(), make_model()
    bare = adamw(bare_model)
    train(bare_model, bare, range(10))
    optimizer = ZClipOptimizer(adamw(model), z_thresh=1e9)
    train(model, optimizer, range(30))
    model.load_state_dict(bare_model.state_dict())
    optimizer.load_state_dict(through_disk(bare.state_dict()))
    assert optimizer.metrics.step == 0
    assert optimizer.param_groups[0]["zclip_step"] == 0
    train(bare_model, bare, range(10, 20))
    train(model, optimizer, range(10, 20))
    assert torch.equal(parameters(model), parameters(bare_model))


def test_a_wrapped_checkpoint_loads_into_a_bare_optimizer():
    model, bare_model = make_model(), make_model()
    optimizer = ZClipOptimizer(adamw(model), z_thresh=1e9)
    train(model, optimizer, range(10))
    bare = adamw(bare_model)
    bare_model.load_state_dict(model.state_dict())
    bare.load_state_dict(through_disk(optimizer.state_dict()))
    train(model, optimizer, range(10, 20))
    train(bare_model, bare, range(10, 20))
    assert torch.equal(parameters(model), parameters(bare_model))


def test_wrapping_an_optimizer_that_loaded_a_wrapped_checkpoint_takes_over_its_statistics():
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model))
    train(model, optimizer, range(40), OUTLIERS)
    inner = adamw(make_model())
    inner.load_state_dict(optimizer.state_dict())
    assert ZClipOptimizer(inner).metrics.mean == optimizer.metrics.mean


def test_param_groups_of_another_wrapper_that_never_stepped_are_no_checkpoint():
    groups = [{"params": list(make_model().parameters())}]
    ZClipOptimizer(torch.optim.SGD(groups, lr=0.1))
    assert ZClipOptimizer(torch.optim.SGD(groups, lr=0.1), scope="group").metrics.step == 0


def test_hyperparameters_are_the_constructors():
    optimizer = ZClipOptimizer(adamw(make_model()))
    stricter = ZClipOptimizer(adamw(make_model()), z_thresh=1.5)
    stricter.load_state_dict(optimizer.state_dict())
    assert stricter.clipper.config.z_thresh == 1.5


def test_loading_through_the_property_setter_keeps_schedulers_alive():
    optimizer = ZClipOptimizer(adamw(make_model()))
    loaded = optimizer.state_dict()
    loaded["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(loaded)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5


class Nesting(torch.optim.SGD):
    """A wrapper in the wild: its state dict has no param_groups at the top."""

    def state_dict(self):
        return {"base": super().state_dict(), "slow": 1}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["base"])


def test_nested_state_dicts_resume():
    model = make_model()
    optimizer = ZClipOptimizer(Nesting(model.parameters(), lr=0.01))
    train(model, optimizer, range(30))
    other = ZClipOptimizer(Nesting(make_model().parameters(), lr=0.01))
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert other.metrics.step == 30
    saved["base"]["param_groups"][0]["zclip_var"] = -1.0
    with pytest.raises(ValueError, match="zclip_var"):
        other.load_state_dict(saved)


MALFORMED = {
    "zclip_version": [3, 0, -1, "1", None, 1.0, True],
    "zclip_scope": ["group", "", None, 3],
    "zclip_mean": [math.nan, math.inf, -1.0, "1", None, True, [1.0], 10**400],
    "zclip_var": [math.nan, -1e-9, "x", None, torch.ones(2)],
    "zclip_step": [-1, 1.5, 3.0, "3", None, True, 2**70],
    "zclip_streak": [-1, 0.0, None],
    "zclip_spike_steps": [-1, "0"],
    "zclip_clipped_steps": [-1, 2.0],
    "zclip_skipped_steps": [-1, None],
    "zclip_nonfinite_streak": [-1, math.nan],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in MALFORMED.items() for v in [*values, "missing"]])
def test_a_malformed_checkpoint_is_refused_by_key_and_changes_nothing(key, value):
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model))
    train(model, optimizer, range(30))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 77.0
    saved["state"][0]["exp_avg"].fill_(5.0)
    if isinstance(value, str) and value == "missing":
        del saved["param_groups"][0][key]
    else:
        saved["param_groups"][0][key] = value
    before, metrics = repr(optimizer.state_dict()), optimizer.metrics
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before
    assert optimizer.metrics == metrics


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_checkpoint_of_version_1_loads(scope):
    """It had one count, of spikes, called clipped_steps: as many steps at least were clipped."""
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model), scope=scope)
    train(model, optimizer, range(60), OUTLIERS)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["zclip_version"], group["zclip_clipped_steps"] = 1, group.pop("zclip_spike_steps")
    other_model = make_model()
    other = ZClipOptimizer(adamw(other_model), scope=scope)
    other.load_state_dict(through_disk(saved))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    other_model.load_state_dict(model.state_dict())
    train(model, optimizer, range(60, 90), [70])
    train(other_model, other, range(60, 90), [70])
    assert other.metrics == optimizer.metrics
    saved["param_groups"][0]["zclip_clipped_steps"] = -1
    with pytest.raises(ValueError, match="zclip_clipped_steps"):
        other.load_state_dict(saved)


def test_groups_that_contradict_each_other_are_refused():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.1))
    saved = optimizer.state_dict()
    saved["param_groups"][1]["zclip_mean"] = 3.0
    with pytest.raises(
        ValueError, match=r"zclip_mean in saved param_groups\[1\] must be 0.0 as in param_groups\[0\]; got 3.0"
    ):
        optimizer.load_state_dict(saved)


def test_a_checkpoint_of_other_parameters_changes_nothing():
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model))
    train(model, optimizer, range(5))
    before = optimizer.metrics
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(ZClipOptimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])).state_dict())
    assert optimizer.metrics == before


class NestingInAList(torch.optim.SGD):
    """A wrapper of several optimizers."""

    def state_dict(self):
        return {"optimizers": [super().state_dict()]}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["optimizers"][0])


def test_state_dicts_nested_in_a_list_resume():
    model = make_model()
    optimizer = ZClipOptimizer(NestingInAList(model.parameters(), lr=0.01))
    train(model, optimizer, range(30))
    other = ZClipOptimizer(NestingInAList(make_model().parameters(), lr=0.01))
    other.load_state_dict(optimizer.state_dict())
    assert other.metrics.step == 30


class TestTwoGroups:
    """With scope="group" each group has statistics of its own, also in the checkpoint."""

    def make(self, scope="group"):
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
        return model, ZClipOptimizer(torch.optim.AdamW(groups, lr=1e-2), scope=scope)

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_resume(self, scope):
        whole, reference = self.make(scope)
        train(whole, reference, range(60), OUTLIERS)
        model, optimizer = self.make(scope)
        train(model, optimizer, range(40), OUTLIERS)
        saved = through_disk([model.state_dict(), optimizer.state_dict()])
        model, optimizer = self.make(scope)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        restored = optimizer.group_metrics
        train(model, optimizer, range(40, 60), OUTLIERS)
        assert torch.equal(parameters(model), parameters(whole))
        assert optimizer.group_metrics == reference.group_metrics
        if scope == "group":
            assert restored[0].mean != restored[1].mean
            assert [m.mean for m in restored] == [g["zclip_mean"] for g in saved[1]["param_groups"]]

    def test_a_group_added_later_starts_with_a_warm_up_of_its_own(self):
        model, optimizer = self.make()
        train(model, optimizer, range(30))
        more = torch.nn.Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [more]})
        assert [group["zclip_step"] for group in optimizer.param_groups] == [30, 30, 0]
        more.grad = torch.ones(3)
        train(model, optimizer, [30])
        assert [m.step for m in optimizer.group_metrics] == [31, 31, 1]

    def test_counters_survive_and_must_agree(self):
        model, optimizer = self.make()
        train(model, optimizer, range(5))
        for _ in range(3):
            model[0].weight.grad.fill_(math.nan)
            optimizer.step()
        saved = through_disk(optimizer.state_dict())
        _, other = self.make()
        other.load_state_dict(saved)
        assert other.metrics.skipped_steps == 3
        assert other.param_groups[1]["zclip_nonfinite_streak"] == 3
        saved["param_groups"][1]["zclip_skipped_steps"] = 2
        with pytest.raises(ValueError, match="zclip_skipped_steps"):
            other.load_state_dict(saved)


def test_a_zero_norm_ends_a_streak_of_nonfinite_ones():
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model), max_consecutive_nonfinite=5)
    train(model, optimizer, range(2))
    for fill in (math.nan, math.nan, 0.0):
        for p in model.parameters():
            p.grad.fill_(fill)
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["zclip_nonfinite_streak"] == 0


def test_printing_changes_nothing():
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model))
    train(model, optimizer, range(30))
    before = [dict(group) for group in optimizer.param_groups]
    text = repr(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before
    assert "z_thresh=2.5" in text
    assert "lr: " in text
    assert "zclip_" not in text  # in the groups they are as old as the last checkpoint


class Container(torch.optim.Optimizer):
    """One optimizer for each layer, as torchtitan and fastai keep them: its own param groups are in no checkpoint."""

    def __init__(self, model, saved_as):
        self.parts = [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in model if list(layer.parameters())]
        self.saved_as = saved_as
        super().__init__(list(model.parameters()), {"lr": 1e-2})

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        saved = [part.state_dict() for part in self.parts]
        if self.saved_as == "state alone":
            return {"state": {i: part["state"] for i, part in enumerate(saved)}}
        return {"optimizers": saved} if self.saved_as == "parts" else {"flat": [str(key) for key in saved[0]]}

    def load_state_dict(self, state_dict):
        if self.saved_as == "parts":
            assert state_dict.keys() == {"optimizers"}
            for part, saved in zip(self.parts, state_dict["optimizers"], strict=True):
                part.load_state_dict(saved)


@pytest.mark.parametrize("saved_as", ["parts", "state alone", "flat"])
@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_container_that_saves_nothing_of_its_groups_resumes(saved_as, scope):
    whole = make_model()
    reference = ZClipOptimizer(Container(whole, saved_as), scope=scope)
    train(whole, reference, range(30))
    saved = through_disk([whole.state_dict(), reference.state_dict()])
    train(whole, reference, range(30, 60), OUTLIERS)
    model = make_model()
    optimizer = ZClipOptimizer(Container(model, saved_as), scope=scope)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert "zclip" in saved[1]  # what is given to load is left as it is
    assert optimizer.metrics.step == 30
    train(model, optimizer, range(30, 60), OUTLIERS)
    assert optimizer.metrics.clipped_steps == reference.metrics.clipped_steps > 0
    if saved_as == "parts":
        assert torch.equal(parameters(model), parameters(whole))


def test_a_container_whose_groups_are_made_anew_at_every_look():
    """As fastai's: what is written into them is gone."""

    class Fastai:
        def __init__(self, model):
            self.inner = torch.optim.SGD(model.parameters(), lr=0.01)
            self.state, self.zero_grad, self.step = self.inner.state, self.inner.zero_grad, self.inner.step
            self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

        @property
        def param_groups(self):
            return [dict(group) for group in self.inner.param_groups]

    model = make_model()
    optimizer = ZClipOptimizer(Fastai(model))
    train(model, optimizer, range(30))
    other = ZClipOptimizer(Fastai(make_model()))
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert other.metrics.step == 30
    assert other.metrics.mean == optimizer.metrics.mean


def test_parts_that_have_statistics_of_others_do_not_count_for_ours():
    """The parts were wrapped one by one before; what they carry is as old as that."""
    model = make_model()
    container = Container(model, "parts")
    for part in container.parts:
        single = ZClipOptimizer(part)
        train(model, single, range(7))
    optimizer = ZClipOptimizer(container)
    train(model, optimizer, range(30))
    other = ZClipOptimizer(Container(make_model(), "parts"))
    other.load_state_dict(optimizer.state_dict())
    assert other.metrics.step == 30


def test_an_ordinary_state_dict_has_no_entry_of_ours():
    model = make_model()
    optimizer = ZClipOptimizer(adamw(model), scope="group")
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    train(model, optimizer, range(2))
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"groups": 1}, {"groups": [{}]}, {"groups": [{"zclip_step": 1}]}])
def test_a_malformed_entry_is_refused_and_changes_nothing(entry):
    model = make_model()
    optimizer = ZClipOptimizer(Container(model, "parts"))
    train(model, optimizer, range(30))
    saved = {**optimizer.state_dict(), "zclip": entry}
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"zclip|list of dicts|what ZClip"):
        optimizer.load_state_dict(saved)
    assert repr(optimizer.state_dict()) == before


def test_a_state_dict_that_is_a_list_is_warned_of():
    class Listing(torch.optim.SGD):
        def state_dict(self):
            return [torch.ones(3)]

        def load_state_dict(self, state_dict):
            pass

    optimizer = ZClipOptimizer(Listing(make_model().parameters(), lr=0.1))
    with pytest.warns(ZClipWarning, match=r"statistics are not saved: the state_dict\(\) of Listing"):
        saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)


class TestStaleKeys:
    """Statistics in the groups of an optimizer that is being wrapped are no checkpoint, unless they are whole."""

    def trained(self):
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model))
        train(model, optimizer, range(30))
        return model, optimizer

    def wrap(self, inner, match):
        with pytest.warns(ZClipWarning, match=f"start afresh: .*{match}.* load_state_dict restores") as caught:
            optimizer = ZClipOptimizer(inner)
        assert len(caught) == 1
        assert optimizer.metrics.step == 0
        assert {group["zclip_step"] for group in optimizer.param_groups} == {0}
        return optimizer

    def test_a_group_that_was_added_after_a_wrapped_checkpoint_was_loaded(self):
        _, first = self.trained()
        inner = adamw(make_model())
        inner.load_state_dict(first.state_dict())
        inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        optimizer = self.wrap(inner, r"param_groups\[1\] has no zclip_version")
        saved = copy.deepcopy(first.state_dict())
        saved["param_groups"].append({**saved["param_groups"][0], "params": [4]})
        optimizer.load_state_dict(saved)
        assert optimizer.metrics.step == 30

    def test_old_copies_of_groups_that_a_trainer_put_back(self):
        model = make_model()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        first = ZClipOptimizer(torch.optim.AdamW(groups, lr=1e-2))
        train(model, first, range(5))
        first.state_dict()
        old = dict(first.param_groups[1])
        train(model, first, range(5, 30))
        first.state_dict()
        first.base_optimizer.param_groups[1] = old
        optimizer = self.wrap(first.base_optimizer, r"zclip_mean in saved param_groups\[1\]")
        train(model, optimizer, range(3))
        assert optimizer.metrics.step == 3

    @pytest.mark.parametrize(("key", "value"), [("zclip_version", 99), ("zclip_var", -1.0), ("zclip_scope", "group")])
    def test_values_that_make_no_sense_here(self, key, value):
        _, first = self.trained()
        first.state_dict()
        inner = first.base_optimizer
        inner.param_groups[0][key] = value
        self.wrap(inner, key)


class TestLoadedThroughTheBaseOptimizer:
    """People keep a name for it, and load a checkpoint there."""

    def saved(self, scope="global"):
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model), scope=scope)
        train(model, optimizer, range(40), OUTLIERS)
        return through_disk(optimizer.state_dict()), optimizer

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_before_the_first_step_it_is_taken_over(self, scope):
        saved, reference = self.saved(scope)
        model = make_model()
        inner = adamw(model)
        optimizer = ZClipOptimizer(inner, scope=scope)
        inner.load_state_dict(saved)
        train(model, optimizer, [40])
        assert optimizer.metrics.step == 41
        assert optimizer.metrics.clipped_steps == reference.metrics.clipped_steps

    def test_a_bare_checkpoint_there_changes_nothing(self):
        model, (saved, _) = make_model(), self.saved()
        inner = adamw(model)
        optimizer = ZClipOptimizer(inner)
        optimizer.load_state_dict(saved)
        inner.load_state_dict(adamw(make_model()).state_dict())
        train(model, optimizer, [40])
        assert optimizer.metrics.step == 41
        assert inner.param_groups[0]["zclip_step"] == 40

    def test_a_group_that_is_added_there_changes_nothing(self):
        model, (saved, _) = make_model(), self.saved()
        inner = adamw(model)
        optimizer = ZClipOptimizer(inner)
        optimizer.load_state_dict(saved)
        inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        train(model, optimizer, [40])
        assert optimizer.metrics.step == 41

    @pytest.mark.parametrize("scope", ["global", "group"])
    @pytest.mark.parametrize("stays", [False, True])
    def test_later_it_is_taken_over_too(self, scope, stays, monkeypatch):
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda gradient: stays)
        saved, reference = self.saved(scope)
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model), scope=scope)
        train(model, optimizer, range(10), outliers=[5])
        optimizer.base_optimizer.load_state_dict(saved)
        assert optimizer.metrics.step == 40
        assert optimizer.metrics.mean == reference.metrics.mean
        train(model, optimizer, [40])
        assert optimizer.metrics.step == 41
        assert optimizer.state_dict()["param_groups"][0]["zclip_step"] == 41

    def test_rolling_back_to_what_was_saved_last(self):
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model))
        train(model, optimizer, range(30))
        saved = through_disk(optimizer.state_dict())
        train(model, optimizer, range(30, 50))
        optimizer.base_optimizer.load_state_dict(saved)
        assert optimizer.metrics.step == 30

    def test_the_hooks_of_others_fire_once_and_in_their_order(self):
        saved, _ = self.saved()
        optimizer, calls = ZClipOptimizer(adamw(make_model())), []
        optimizer.base_optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("pre"))
        optimizer.base_optimizer.register_load_state_dict_post_hook(lambda o: calls.append(optimizer.metrics.step))
        optimizer.base_optimizer.load_state_dict(saved)
        assert calls == ["pre", 40]
        optimizer.load_state_dict(saved)
        assert calls == ["pre", 40] * 2

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_takes_over_what_its_own_base_loads(self, copier):
        class KeepsAll(torch.optim.AdamW):
            def __getstate__(self):
                return dict(self.__dict__)

        saved, _ = self.saved()
        for kind in (torch.optim.AdamW, KeepsAll if copier is copy.deepcopy else torch.optim.AdamW):
            optimizer = ZClipOptimizer(kind(make_model().parameters(), lr=1e-2))
            twin = copier(optimizer)
            twin.base_optimizer.load_state_dict(saved)
            assert (optimizer.metrics.step, twin.metrics.step) == (0, 40)
            optimizer.base_optimizer.load_state_dict(saved)
            assert optimizer.metrics.step == 40

    @pytest.mark.parametrize("kind", [schedulefree.ScheduleFreeWrapper, Nesting])
    def test_an_optimizer_that_passes_it_on_to_another_one(self, kind):
        def make():
            model = make_model()
            if kind is Nesting:
                return model, ZClipOptimizer(Nesting(model.parameters(), lr=1e-2))
            base = kind(torch.optim.SGD(model.parameters(), lr=1e-2))
            base.train()
            return model, ZClipOptimizer(base)

        model, optimizer = make()
        train(model, optimizer, range(30))
        saved = optimizer.state_dict()
        _, other = make()
        other.base_optimizer.load_state_dict(saved)
        assert other.metrics.step == 30

    def test_an_optimizer_without_torchs_base_class(self):
        class Bare:
            def __init__(self, params):
                self.inner = torch.optim.SGD(params, lr=0.01)
                for name in ("step", "zero_grad", "state_dict"):
                    setattr(self, name, getattr(self.inner, name))

            @property
            def param_groups(self):
                return self.inner.param_groups

            @property
            def state(self):
                return self.inner.state

            def load_state_dict(self, state_dict):
                self.inner.load_state_dict(state_dict)

        model = make_model()
        optimizer = ZClipOptimizer(Bare(model.parameters()))
        train(model, optimizer, range(30))
        other = ZClipOptimizer(Bare(make_model().parameters()))
        other.base_optimizer.load_state_dict(through_disk(optimizer.state_dict()))
        assert other.metrics.step == 30

    @pytest.mark.parametrize("scope", ["global", "group"])
    def test_parts_of_a_list_that_load_each_their_own(self, scope):
        def make():
            model = make_model()
            parts = [torch.optim.SGD(model[0].parameters(), lr=0.01), torch.optim.AdamW(model[2].parameters())]
            return model, ZClipOptimizer(parts, scope=scope)

        model, optimizer = make()
        train(model, optimizer, range(30))
        optimizer.state_dict()
        saved = [through_disk(part.state_dict()) for part in optimizer.parts]
        other_model, other = make()
        train(other_model, other, range(7))
        other.parts[1].load_state_dict(saved[1])
        assert [m.step for m in other.group_metrics] == ([30] if scope == "global" else [7, 30])
        other.parts[0].load_state_dict(saved[0])
        assert [m.step for m in other.group_metrics] == [m.step for m in optimizer.group_metrics]
        assert [m.mean for m in other.group_metrics] == [m.mean for m in optimizer.group_metrics]

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_parts_of_a_copied_list_load_for_the_copy(self, copier):
        def make():
            model = make_model()
            parts = [torch.optim.SGD(model[0].parameters(), lr=0.01), torch.optim.AdamW(model[2].parameters())]
            return model, ZClipOptimizer(parts)

        model, optimizer = make()
        train(model, optimizer, range(30))
        optimizer.state_dict()
        saved = through_disk(optimizer.parts[1].state_dict())
        other_model, other = make()
        train(other_model, other, range(7))
        twin_model, twin = copier((other_model, other))
        twin.parts[1].load_state_dict(saved)
        assert (other.metrics.step, twin.metrics.step) == (7, 30)
        train(twin_model, twin, [30])
        other.parts[1].load_state_dict(saved)
        assert (other.metrics.step, twin.metrics.step) == (30, 31)

    def test_a_copy_of_a_copy_and_one_of_a_subclass(self):
        class Subclass(ZClipOptimizer):
            pass

        saved, _ = self.saved()
        optimizer = Subclass(adamw(make_model()))
        twin = copy.deepcopy(pickle.loads(pickle.dumps(ZClipOptimizer(optimizer.base_optimizer))))
        other = copy.deepcopy(copy.deepcopy(optimizer))
        for each in (twin, other):
            each.base_optimizer.load_state_dict(saved)
            assert each.metrics.step == 40
        assert optimizer.metrics.step == 0

    @pytest.mark.parametrize("late", [False, True])
    def test_one_that_was_reset_is_heard_too(self, late):
        saved, _ = self.saved()
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model))
        if late:
            train(model, optimizer, range(5))
        optimizer.__setstate__({"state": {}})
        optimizer.base_optimizer.load_state_dict(saved)
        assert optimizer.metrics.step == 40

    def test_statistics_that_are_no_whole_are_told_of_and_change_nothing(self):
        saved, _ = self.saved()
        model = make_model()
        optimizer = ZClipOptimizer(adamw(model))
        train(model, optimizer, range(10))
        saved["param_groups"][0]["zclip_var"] = -1.0
        with pytest.warns(ZClipWarning, match=r"go on as they were: .*zclip_var.* load_state_dict restores"):
            optimizer.base_optimizer.load_state_dict(saved)
        train(model, optimizer, [10])
        assert optimizer.metrics.step == 11

    def test_which_groups_are_left_alone_stays_said(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch.optim.AdamW([{"params": model.parameters(), "zclip": False}]))
        optimizer.base_optimizer.load_state_dict(torch.optim.AdamW(make_model().parameters()).state_dict())
        assert optimizer.param_groups[0]["zclip"] is False

    def test_the_base_optimizer_does_not_keep_its_wrapper_alive(self):
        inner = adamw(make_model())
        optimizer = ZClipOptimizer(inner)
        gone = weakref.ref(optimizer)
        gc.disable()
        try:
            del optimizer
            assert gone() is None
        finally:
            gc.enable()
        saved, _ = self.saved()
        inner.load_state_dict(saved)
        assert ZClipOptimizer(inner).metrics.step == 40


def test_a_key_of_ours_that_is_a_tensor_is_stale_too():
    inner = adamw(make_model())
    inner.param_groups[0]["zclip_step"] = torch.ones(3)
    with pytest.warns(ZClipWarning, match="start afresh"):
        assert ZClipOptimizer(inner).metrics.step == 0
