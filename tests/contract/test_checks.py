"""What is refused: each sentence says what to do instead, nothing has changed. tests/trainers has the real trainers."""

import sys
from collections import UserList
from collections.abc import Sequence

import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from torch import nn
from training import backward, make_model, set_gradients, train
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from zclip_optim import ZClip, ZClipOptimizer
from zclip_optim.integrations.lightning import ZClipCallback


def sgd(**options):
    return torch.optim.SGD([nn.Parameter(torch.ones(2, 4))], lr=1.0, **options)


def foreign(name, package):
    """An optimizer around another one, of the class that a package would have."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    Foreign.__name__, Foreign.__module__ = name, package
    return Foreign(sgd())


FOREIGN = [
    ("AcceleratedOptimizer", "accelerate.optimizer", "Wrap first, then prepare: accelerator.prepare"),
    ("_FabricOptimizer", "lightning.fabric.wrappers", "Wrap first, then prepare: fabric.setup"),
    ("_FabricOptimizer", "lightning_fabric.wrappers", "Wrap first, then prepare: fabric.setup"),
    ("LightningOptimizer", "pytorch_lightning.core.optimizer", "return ZClipOptimizer.* from configure_optimizers"),
    ("DPOptimizer", "opacus.optimizers.optimizer", r"make_private\(module=model, optimizer=ZClipOptimizer"),
    ("_WrappedOptimizer", "ray.train.torch.train_loop_utils", "Wrap first, then prepare: prepare_optimizer"),
    ("OptimizerWrapper", "colossalai.interface.optimizer", "Wrap first, then prepare: booster.boost"),
    ("CPUOffloadOptimizer", "torchao.optim.cpu_offload", "Use fully_shard with CPUOffloadPolicy"),
    ("DistributedOptimizer", "torch.distributed.optim.optimizer", "Each worker can clip .* ClippedSGD"),
]


@pytest.mark.parametrize(("name", "package", "instead"), FOREIGN)
def test_an_optimizer_whose_step_is_not_what_it_seems(name, package, instead):
    inner = foreign(name, package)
    with pytest.raises(TypeError, match=f"^base_optimizer is .*{instead}"):
        ZClipOptimizer(inner)
    assert not any(key.startswith("zclip_") for key in inner.param_groups[0])


@pytest.mark.parametrize("name", ["AcceleratedOptimizer", "LightningOptimizer", "DPOptimizer", "OptimizerWrapper"])
def test_the_same_name_in_another_package_is_fine(name):
    ZClipOptimizer(foreign(name, "mine.optimizers"))


def test_a_subclass_of_one_is_one():
    class Mine(type(foreign("AcceleratedOptimizer", "accelerate.optimizer"))):
        pass

    with pytest.raises(TypeError, match="Wrap first, then prepare"):
        ZClipOptimizer(Mine(sgd()))


class ListConfig(UserList):
    """Stands for Hydra's, a Sequence that is no list and has no other attributes."""

    def __getattr__(self, name):
        raise AttributeError(f"ListConfig does not support attribute access: {name}")


class TestSequences:
    @pytest.mark.parametrize("kind", [list, tuple, ListConfig])
    def test_any_kind_is_taken(self, kind):
        model = make_model()
        parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters())]
        optimizer = ZClipOptimizer(kind(parts))
        train(model, optimizer, range(2))
        assert optimizer.parts == tuple(parts)
        assert optimizer.metrics.step == 2

    def test_an_optimizer_that_is_a_sequence_is_one_optimizer(self):
        class Container(torch.optim.SGD, Sequence):
            def __len__(self):
                return 1

            def __getitem__(self, i):
                return [self][i]

        base = Container([nn.Parameter(torch.ones(2))], lr=1.0)
        assert ZClipOptimizer(base).base_optimizer is base

    def test_others_are_no_list_of_optimizers(self):
        for thing, kind in (("adamw", "str"), ({"a": sgd()}, "dict"), (iter([sgd()]), "list_iterator")):
            with pytest.raises(TypeError, match=f"must be an optimizer, got {kind}, which has no"):
                ZClipOptimizer(thing)


class TestWhatToWrite:
    """Where somebody passes what is no optimizer, but it is clear how it came to that."""

    def test_parameters(self):
        model = make_model()
        for thing in (model.parameters(), list(model.parameters()), next(model.parameters())):
            with pytest.raises(TypeError, match=r"has no .*: write ZClipOptimizer\(torch\.optim\.AdamW\(model\.par"):
                ZClipOptimizer(thing)

    def test_a_model(self):
        says = r"got Sequential, which has no .*: write ZClipOptimizer\(torch\.optim\.AdamW\(.*clipper\.step\(model\)$"
        with pytest.raises(TypeError, match=says):
            ZClipOptimizer(make_model())

    def test_a_class_and_what_it_is_made_with(self):
        for arguments in ((make_model().parameters(),), ()):
            says = (
                r"got the class AdamW; write ZClipOptimizer\(AdamW\(model\.parameters\(\), lr=\.\.\., betas=\.\.\.\)\)$"
            )
            with pytest.raises(TypeError, match=says):
                ZClipOptimizer(torch.optim.AdamW, *arguments, lr=1e-3, betas=(0.9, 0.95))
        with pytest.raises(TypeError, match=r"write ZClipOptimizer\(AdamW\(model\.parameters\(\), \.\.\.\)\)$"):
            ZClipOptimizer(torch.optim.AdamW, make_model().parameters())

    def test_more_than_one_argument_without_a_name(self):
        for more in (sgd(), 2.5):
            with pytest.raises(
                TypeError, match=r"got 2 arguments without a name: .*\(\[first, second\]\).* z_thresh=3\.0"
            ):
                ZClipOptimizer(sgd(), more)

    def test_param_groups_as_torchrls_group_optimizers_passes_them(self):
        def group_optimizers(*optimizers):
            """As torchrl's does it."""
            params = []
            for optimizer in optimizers:
                params.extend(optimizer.param_groups)
            return type(optimizers[0])(params)

        first, second = sgd(), sgd()
        with pytest.raises(TypeError, match=r"torchrl's .*Optimizer\(group_optimizers\(first, second\)\); or pass"):
            group_optimizers(ZClipOptimizer(first), ZClipOptimizer(second))
        assert len(ZClipOptimizer(group_optimizers(first, second)).param_groups) == 2
        assert len(ZClipOptimizer([first, second]).param_groups) == 2

    def test_keras(self):
        class BaseOptimizer:
            """Stands for Keras' Adam: no method of torch's optimizers."""

            def apply(self, grads, trainable_variables): ...

        BaseOptimizer.__module__ = "keras.src.optimizers.base_optimizer"
        Adam = type("Adam", (BaseOptimizer,), {"__module__": "keras.src.optimizers.adam"})  # noqa: N806
        with pytest.raises(
            TypeError, match=r"is Keras', whose apply\(\) .*clipper\.step\(\[v\.value for v in self"
        ) as raised:
            ZClipOptimizer(Adam())
        assert "unless clipper.step_was_skipped" in str(raised.value)

    def test_a_worker_of_rpc(self):
        """What the sentence says works, as `_LocalOptimizer` makes one from parameters and options."""

        class ClippedSGD(ZClipOptimizer):
            def __init__(self, params, **options):
                super().__init__(torch.optim.SGD(params, **options))

        params = [nn.Parameter(torch.ones(2))]
        local = ClippedSGD(params, lr=0.1)
        set_gradients(params, 2.0)
        local.step()
        assert local.metrics.grad_norm == pytest.approx(2.0)


class TestGroupsThatAreNoDicts:
    class TorchOpt:
        """Stands for TorchOpt's optimizers: each group is a tuple of tensors."""

        def __init__(self, params):
            self.param_groups = [tuple(params)]

        step = zero_grad = state_dict = load_state_dict = add_param_group = lambda self: None

    @pytest.mark.parametrize("wrap", [lambda base: base, lambda base: [sgd(), base]])
    def test_they_are_refused_with_the_way_to_clip(self, wrap):
        base = self.TorchOpt(make_model().parameters())
        match = (
            r"param_groups\[0\] of TorchOpt is no dict with 'params', .* but a tuple\. Clip .* clipper\.step\(model\)"
        )
        with pytest.raises(TypeError, match=match):
            ZClipOptimizer(wrap(base))

    def test_so_are_dicts_without_parameters(self):
        base = self.TorchOpt([])
        base.param_groups = [{"lr": 0.1}]
        with pytest.raises(TypeError, match=r"is no dict with 'params', .* but a dict"):
            ZClipOptimizer(base)


class Several(torch.optim.SGD):
    """Holds other optimizers."""

    def __init__(self, **parts):
        super().__init__([nn.Parameter(torch.ones(2))], lr=1.0)
        self.__dict__.update(parts)


@pytest.mark.parametrize("hold", [lambda o: o, lambda o: [sgd(), o], lambda o: {"a": sgd(), "b": o}])
def test_one_that_another_optimizer_holds_is_found(hold):
    with pytest.raises(TypeError, match=r"^base_optimizer holds what Accelerate's prepare returned"):
        ZClipOptimizer(Several(part=hold(foreign("AcceleratedOptimizer", "accelerate.optimizer"))))
    with pytest.raises(TypeError, match=r"^base_optimizer holds a ZClipOptimizer already"):
        ZClipOptimizer(Several(part=hold(ZClipOptimizer(sgd()))))
    ZClipOptimizer(Several(part=hold(sgd())))


def test_optimizers_that_hold_each_other_are_looked_through_once():
    first, second = Several(), Several()
    first.other, second.other = second, first
    ZClipOptimizer(first)


@pytest.mark.parametrize("lookahead", [torch_optimizer.Lookahead, pytorch_optimizer.Lookahead])
def test_clipping_inside_and_outside_of_a_real_wrapper_is_clipping_twice(lookahead):
    with pytest.raises(TypeError, match="holds a ZClipOptimizer already; wrapping it again would clip twice"):
        ZClipOptimizer(lookahead(ZClipOptimizer(sgd())))


def test_a_loss_scaler_of_its_own():
    with pytest.raises(TypeError, match=r"with a loss scaler of its own, scaler: .* scaler\.step\(ZClipOptimizer"):
        ZClipOptimizer(Several(scaler=torch.amp.GradScaler("cpu")))
    with pytest.raises(TypeError, match="with a loss scaler of its own, loss_scaler"):
        ZClipOptimizer(Several(loss_scaler=pytorch_optimizer.optimizer.fp16.DynamicLossScaler()))
    ZClipOptimizer(Several(scaler=torch.amp.GradScaler("cpu", enabled=False)))
    ZClipOptimizer(Several(scaler=None))


def test_a_real_optimizer_with_a_loss_scaler_of_its_own():
    model = make_model(dtype=torch.float16)
    with pytest.raises(TypeError, match="base_optimizer is an optimizer with a loss scaler of its own"):
        ZClipOptimizer(pytorch_optimizer.LOMO(model, lr=0.1, clip_grad_norm=1.0))


def test_horovod():
    class Distributed(torch.optim.SGD):
        """As hvd.DistributedOptimizer makes one: a class of the name of the optimizer's."""

        def synchronize(self): ...

        def skip_synchronize(self): ...

    with pytest.raises(TypeError, match=r"optimizer\.synchronize\(\), then zclip_optim\.ZClip\(\)\.step"):
        ZClipOptimizer(Distributed([nn.Parameter(torch.ones(2))], lr=1.0))


class TestArguments:
    def test_those_of_the_optimizer_to_wrap_show_what_to_pass_where_a_class_is_asked_for(self):
        params = [nn.Parameter(torch.ones(2))]
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'lr'") as raised:
            ZClipOptimizer(params, lr=1e-3, weight_decay=0.1)
        example = str(raised.value).partition("\n\n")[2]
        namespace = {"torch": torch, "ZClipOptimizer": ZClipOptimizer}
        exec("\n".join(line[4:] for line in example.splitlines()), namespace)
        optimizer = namespace["ClippedAdamW"](params, lr=1e-3, weight_decay=0.1)
        assert optimizer.param_groups[0]["lr"] == 1e-3
        set_gradients(params, 1.0)
        optimizer.step()
        assert optimizer.metrics.step == 1

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("z_treshold", "'z_thresh'"),
            ("warmup", "'warmup_steps'"),
            ("max_norm", "'max_grad_norm'"),
            ("clip", "'clip_option' or 'clip_factor'"),
        ],
    )
    @pytest.mark.parametrize("make", [lambda **options: ZClipOptimizer(sgd(), **options), ZClip, ZClipCallback])
    def test_one_that_is_not_quite_right(self, make, name, meant):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'; did you mean {meant}\?"):
            make(**{name: 3.0})

    def test_one_of_the_engine_that_is_none_of_its_options(self):
        with pytest.raises(TypeError, match=r"ZClip got an unexpected keyword argument 'lr': it has alpha, z_thresh, "):
            ZClip(lr=1e-3)


class TestUpdatesWithoutStep:
    class Base(torch.optim.SGD):
        """Some of the ways around step() that optimizers have, and names that only sound so."""

        def step_param(self, p, group): ...

        def step_parameter(self, p, group, i): ...

        def update_step(self, group, p, gindex, pindex): ...

        def fused_back_pass(self, loss): ...

        def lr_step(self):
            return 2

        def step_embed(self): ...

        def get_step(self):
            return 3

        def is_last_step(self):
            return False

        @staticmethod
        def step_size(x):
            return x

        step_parameter_count = 5

    @pytest.mark.parametrize("name", ["step_param", "step_parameter", "update_step", "fused_back_pass"])
    def test_they_are_refused_by_name(self, name):
        optimizer = ZClipOptimizer(self.Base([nn.Parameter(torch.ones(2))], lr=1.0))
        with pytest.raises(AttributeError, match=f"{name} of Base updates parameters without step.*base_optimizer"):
            getattr(optimizer, name)
        assert not hasattr(optimizer, name)

    def test_others_are_forwarded(self):
        optimizer = ZClipOptimizer(self.Base([nn.Parameter(torch.ones(2))], lr=1.0))
        assert optimizer.get_step() == 3
        assert optimizer.is_last_step() is False
        assert optimizer.step_size(7) == 7
        assert optimizer.lr_step() == 2
        assert optimizer.step_embed() is None
        assert optimizer.step_parameter_count == 5

    @pytest.mark.parametrize("lomo", [pytorch_optimizer.LOMO, pytorch_optimizer.AdaLOMO])
    def test_fused_backward(self, lomo):
        model = make_model()
        optimizer = ZClipOptimizer(lomo(model, lr=0.1))
        with pytest.raises(AttributeError, match=r"fused_backward of .*LOMO updates parameters without step"):
            optimizer.fused_backward(model(torch.ones(1, 6)).sum(), lr=0.1)


class TestDeepSpeedAround:
    """ZeRO puts flat shards in place of the parameters of an optimizer; tests/scale has the real package."""

    def flattened(self, optimizer):
        for group in optimizer.param_groups:
            flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])
            group["params"] = [nn.Parameter(flat[: flat.numel() // 2])]  # as on the first of two ranks
            group["params"][0].grad = torch.ones_like(group["params"][0])
        return optimizer

    def test_its_first_step_is_refused_and_changes_nothing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "deepspeed", object())
        optimizer = self.flattened(ZClipOptimizer(torch.optim.SGD(make_model().parameters(), lr=1.0)))
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"DeepSpeed .*flat shards .*\.deepspeed\.attach\(engine\)$"):
                optimizer.step()
        assert torch.equal(optimizer.param_groups[0]["params"][0], before)
        assert optimizer.metrics.step == 0

    def test_without_deepspeed_flat_parameters_are_the_users_own(self):
        optimizer = self.flattened(ZClipOptimizer(torch.optim.SGD(make_model().parameters(), lr=1.0)))
        optimizer.step()
        assert optimizer.metrics.step == 1

    def test_with_deepspeed_loaded_other_models_train(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "deepspeed", object())
        for shapes in ([(3,), (5,)], [(2, 3), (3,)]):
            params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
            set_gradients(params, 1.0)
            optimizer = ZClipOptimizer(torch.optim.SGD(params, lr=1.0))
            optimizer.step()
            assert optimizer.metrics.step == 1

    def test_its_optimizers_for_one_process_can_be_wrapped(self):
        class FusedAdam(torch.optim.Adam):
            __module__ = "deepspeed.ops.adam.fused_adam"

        ZClipOptimizer(FusedAdam(make_model().parameters()))


class TestMeta:
    def make(self, **options):
        with torch.device("meta"):
            model = nn.Linear(3, 1)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        return model, ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)

    def test_a_step_says_that_there_are_no_values(self):
        model, optimizer = self.make()
        with pytest.raises(RuntimeError, match=r"on the meta device.* to_empty makes new parameters"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="on the meta device"):
            ZClip().step(model)

    def test_so_does_reading(self):
        _, optimizer = self.make(nonfinite="pass")
        optimizer.step()
        with pytest.raises(RuntimeError, match="on the meta device"):
            _ = optimizer.metrics

    def test_an_optimizer_that_was_made_there_works_if_the_parameters_stay_the_same_objects(self):
        model, optimizer = self.make()
        model.zero_grad()
        filled = nn.Linear(3, 1)
        for p, q in zip(model.parameters(), list(filled.parameters()), strict=True):
            torch.utils.swap_tensors(p, q)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(2.0)


class TestNoDefaults:
    class Bare:
        """An optimizer without torch's base class, and without `defaults`."""

        def __init__(self, params):
            self.inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            for name in ("step", "zero_grad", "state_dict", "load_state_dict"):
                setattr(self, name, getattr(self.inner, name))

    def test_one_cycle(self):
        model = make_model()
        optimizer = ZClipOptimizer(self.Bare(model.parameters()))
        assert optimizer.defaults == {}
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
        for step in range(10):
            train(model, optimizer, [step])
            scheduler.step()
        assert optimizer.metrics.step == 10
        optimizer.defaults = {"lr": 0.1}
        assert optimizer.base_optimizer.defaults == {"lr": 0.1}


def test_a_model_that_was_moved_keeps_its_parameters():
    model = make_model()
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model.double()
    backward(model, 0)
    optimizer.step()
    assert optimizer.metrics.step == 1


def test_parameters_that_have_no_shape_yet():
    """Lazy modules give theirs a shape in place, in the first forward."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = ZClipOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.metrics.step == 1


def test_the_optimizer_of_a_trainer_whose_step_does_nothing():
    dummy = LayerWiseDummyOptimizer(optimizer_dict={p: torch.optim.SGD([p], lr=0.1) for p in make_model().parameters()})
    with pytest.raises(TypeError, match=r"layer-wise updates, which are made within backward"):
        ZClipOptimizer(dummy)
