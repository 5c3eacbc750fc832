"""A public attribute that the base optimizer has is set there, whoever sets it, and only such a one."""

import copy
import io
import pickle
import re

import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn
from torch.optim.lr_scheduler import StepLR
from training import backward, make_model, set_gradients, train

from zclip_optim import ZClip, ZClipOptimizer


class NGD(torch.optim.Optimizer):
    """Stands for gpytorch's: the step is as long as there are data, a number that is set during the run."""

    kind = "natural"  # on the class alone
    _private = 1
    grad_scale = found_inf = None
    clipper = "of its own"

    def __init__(self, params, num_data, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.num_data = num_data

    @property
    def read_only(self):
        return 1

    @property
    def scaled(self):
        return self.num_data

    @scaled.setter
    def scaled(self, value):
        self.num_data = 10 * value

    def train(self): ...

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.num_data)


class Whole(NGD):
    """A copy of it has the attributes, which torch's Optimizer.__getstate__ drops."""

    def __getstate__(self):
        return dict(self.__dict__)


def make():
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    return p, ZClipOptimizer(NGD([p], num_data=1))


def test_it_reaches_the_base_optimizer():
    p, optimizer = make()
    optimizer.num_data = 5
    assert optimizer.base_optimizer.num_data == optimizer.num_data == 5
    assert "num_data" not in vars(optimizer)
    optimizer.step()
    assert p.item() == -5
    optimizer.base_optimizer.num_data = 7
    assert optimizer.num_data == 7
    optimizer.num_data += 1
    assert optimizer.base_optimizer.num_data == 8


def test_one_of_its_class_and_one_with_a_setter():
    _, optimizer = make()
    optimizer.kind = "other"
    assert optimizer.base_optimizer.kind == "other"
    assert NGD.kind == "natural"
    optimizer.scaled = 3
    assert optimizer.base_optimizer.num_data == 30
    with pytest.raises(AttributeError, match=r"read_only|no setter"):
        optimizer.read_only = 2


def test_sams_rho():
    sam = SAM(make_model().parameters(), torch.optim.SGD, lr=0.1)
    sam.rho = 0.05
    optimizer = ZClipOptimizer(sam)
    optimizer.rho = 0.5
    assert sam.rho == 0.5


@pytest.mark.parametrize("name", ["_private", "grad_scale", "found_inf", "note", "__doc__", "step"])
def test_others_stay_on_the_wrapper(name):
    _, optimizer = make()
    before = getattr(optimizer.base_optimizer, name, "none")
    setattr(optimizer, name, 3)
    assert vars(optimizer)[name] == 3
    assert getattr(optimizer.base_optimizer, name, "none") == before


def test_what_a_subclass_has_by_itself_stays_there():
    class Subclass(ZClipOptimizer):
        kind = "clipped"

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.kind, self.note = "mine", 1

    p = nn.Parameter(torch.zeros(1))
    optimizer = Subclass(NGD([p], num_data=1))
    assert (optimizer.kind, optimizer.base_optimizer.kind, optimizer.note) == ("mine", "natural", 1)


def test_what_the_base_gets_later_does_not_take_over_what_is_here():
    _, optimizer = make()
    optimizer.note = 1
    optimizer.base_optimizer.note = 2
    optimizer.note = 3
    assert (optimizer.note, optimizer.base_optimizer.note) == (3, 2)
    del optimizer.note
    optimizer.note = 4
    assert optimizer.base_optimizer.note == 4


def test_a_property_of_ours_without_a_setter_stays_one():
    _, optimizer = make()
    with pytest.raises(AttributeError):
        optimizer.metrics = 3
    assert optimizer.metrics.step == 0


def test_an_object_that_is_not_built_yet_takes_attributes():
    half = ZClipOptimizer.__new__(ZClipOptimizer)
    half.note, half.num_data = 1, 2
    assert vars(half) == {"note": 1, "num_data": 2}


def through_a_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), through_a_file])
def test_copies(copier):

    base = Whole([nn.Parameter(torch.zeros(1))], num_data=1)
    optimizer = ZClipOptimizer(base)
    optimizer.note = "mine"
    StepLR(optimizer, 5)
    twin = copier(optimizer)
    assert twin.note == "mine"
    assert ("step" in vars(twin)) is False
    twin.num_data = 9
    assert twin.base_optimizer.num_data == 9
    if copier is not copy.copy:
        assert base.num_data == 1


def test_schedulers_patch_the_step_of_the_wrapper():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    outer, inner = StepLR(optimizer, 1, gamma=0.5), StepLR(optimizer.base_optimizer, 1, gamma=0.5)
    assert "step" in vars(optimizer)
    train(model, optimizer, range(2))
    outer.step()
    inner.step()
    assert optimizer.metrics.step == 2
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_method_that_is_replaced():
    model = make_model()
    optimizer = ZClipOptimizer(NGD(model.parameters(), num_data=1))
    optimizer.train = lambda: "mine"
    assert optimizer.base_optimizer.train() == optimizer.train() == "mine"
    optimizer.zero_grad = lambda: "zeroed"  # a name of ours
    assert optimizer.zero_grad() == "zeroed"
    backward(model, 0)
    optimizer.base_optimizer.zero_grad()
    assert model[0].weight.grad is None


class TestRefused:
    """What would be read back as set, and change nothing."""

    def trained(self):
        model = make_model()
        optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
        train(model, optimizer, range(30))
        return model, optimizer

    @pytest.mark.parametrize(("name", "value"), [("z_thresh", 3.0), ("max_grad_norm", 1.0), ("nonfinite", "raise")])
    def test_an_option_of_zclip_and_the_way_to_change_it(self, name, value):
        model, optimizer = self.trained()
        with pytest.raises(
            AttributeError, match=rf"^{name} is .*, as the ZClipOptimizer was made\. To change it"
        ) as raised:
            setattr(optimizer, name, value)
        assert name not in vars(optimizer)
        optimizer.state_dict()
        other = eval(re.search(r"ZClipOptimizer\(optimizer.*?, \.\.\.", str(raised.value))[0][: -len(", ...")] + ")")
        assert getattr(other.clipper.config, name) == value
        assert other.metrics.mean == optimizer.metrics.mean
        train(model, other, [30])
        assert other.metrics.step == 31

    def test_a_subclass_may_keep_what_it_was_made_with(self):
        class ClippedSGD(ZClipOptimizer):
            def __init__(self, params, patience, max_grad_norm):
                self.patience = patience
                super().__init__(torch.optim.SGD(params, lr=0.1), patience=patience, max_grad_norm=max_grad_norm)
                self.max_grad_norm = max_grad_norm

        optimizer = ClippedSGD(make_model().parameters(), patience=200, max_grad_norm=1.0)
        assert (optimizer.patience, optimizer.max_grad_norm) == (200, 1.0)

    def test_an_option_that_the_base_has_too_is_the_bases(self):
        base = NGD([nn.Parameter(torch.zeros(1))], num_data=1)
        base.alpha = 0.5
        optimizer = ZClipOptimizer(base)
        optimizer.alpha = 0.7
        assert (base.alpha, optimizer.clipper.config.alpha) == (0.7, 0.97)

    def test_another_base_optimizer_or_clipper_and_the_way_to_have_it(self):
        """Checkpoints were those of the first one."""
        model, old = self.trained()
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        for name, value in (("base_optimizer", other), ("clipper", ZClip())):
            before = getattr(old, name)
            with pytest.raises(AttributeError, match=f"^{name} of a ZClipOptimizer cannot be replaced"):
                setattr(old, name, value)
            assert getattr(old, name) is before
        new = ZClipOptimizer(other)
        new.clipper.load_state_dict(old.clipper.state_dict())
        train(model, new, [30])
        assert new.metrics.step == new.state_dict()["param_groups"][0]["zclip_step"] == 31


class TestSeveral:
    def make(self):
        model = make_model()
        parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), NGD(model[2].parameters(), num_data=1)]
        return model, ZClipOptimizer(parts)

    @pytest.mark.parametrize("name", ["num_data", "kind", "train"])
    def test_one_that_a_part_has_is_refused_with_its_place(self, name):
        _, optimizer = self.make()
        before = getattr(optimizer.parts[1], name)
        with pytest.raises(AttributeError, match=rf"no '{name}' together: set it on optimizer\.parts\[1\]"):
            setattr(optimizer, name, 3)
        assert getattr(optimizer.parts[1], name) == before
        assert name not in vars(optimizer)

    def test_others_stay_on_the_wrapper(self):
        model, optimizer = self.make()
        optimizer.note, optimizer._private = 1, 2
        assert (optimizer.note, optimizer._private) == (1, 2)
        set_gradients(model.parameters(), 1.0)
        optimizer.step()
