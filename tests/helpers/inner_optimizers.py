"""One table of inner optimizers: how each is built, what it needs, and what it cannot do even without the wrapper.

All of `torch.optim`, `torch_optimizer`, `pytorch_optimizer` and `schedulefree` that run bare, in some configurations.
The tests hold each of them to the same contracts: unclipped bit for bit the bare one, clipping before the step, resume,
schedulers, copies.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytorch_optimizer
import schedulefree
import torch
import torch_optimizer
from torch import nn
from training import make_model

LR = 1e-2


def dense():
    return make_model()


def matrices():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 1, bias=False))


def sparse():
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(30, 8, sparse=True), nn.Linear(8, 1, bias=False).requires_grad_(False))


@dataclass(frozen=True)
class Case:
    """An inner optimizer. `needs_closure`: its step must be given one, and `returns_outputs`: that returns a pair.

    `lacks`: contract -> why the optimizer fails it even when bare.
    """

    build: Callable[[nn.Module], torch.optim.Optimizer]
    model: Callable[[], nn.Module] = dense
    needs_closure: bool = False
    returns_outputs: bool = False
    create_graph: bool = False
    lacks: dict[str, str] = field(default_factory=dict)


def with_params(cls, **options):
    return lambda model: cls([p for p in model.parameters() if p.requires_grad], **options)


def torch_cases():
    for name, cls in vars(torch.optim).items():
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
            continue
        options = {"lr": LR}
        if cls is torch.optim.LBFGS:
            for search in (None, "strong_wolfe"):
                case = Case(with_params(cls, lr=0.1, max_iter=4, line_search_fn=search), needs_closure=True)
                yield f"{name} {search}", replace(case, lacks={"copy": NO_COPY})
        elif cls is torch.optim.SparseAdam:
            yield name, Case(with_params(cls, **options), model=sparse)
        elif name == "Muon":
            yield name, Case(with_params(cls, **options), model=matrices)
        else:
            yield from implementations(name, cls, options)
    yield "SGD momentum fused", Case(with_params(torch.optim.SGD, lr=LR, momentum=0.9, fused=True))
    yield "SGD momentum nesterov", Case(with_params(torch.optim.SGD, lr=LR, momentum=0.9, nesterov=True))
    yield "SGD sparse", Case(with_params(torch.optim.SGD, lr=LR), model=sparse)
    yield "Adagrad sparse", Case(with_params(torch.optim.Adagrad, lr=LR), model=sparse)
    yield "Adam amsgrad", Case(with_params(torch.optim.Adam, lr=LR, amsgrad=True))
    yield (
        "AdamW tensor lr",
        Case(lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(LR), foreach=False)),
    )


def implementations(name, cls, options):
    parameters = inspect.signature(cls).parameters
    yield f"{name} single", Case(with_params(cls, **options, foreach=False))
    yield f"{name} foreach", Case(with_params(cls, **options, foreach=True))
    if "fused" in parameters:
        yield f"{name} fused", Case(with_params(cls, **options, fused=True))


NO_LR = "its param groups hold no lr, or None, which schedulers cannot multiply"
NO_COPY = "keeps options as attributes, which torch's Optimizer.__getstate__ drops, so a copy cannot step"
NO_INIT = "never calls Optimizer.__init__, so state_dict() and copies miss attributes"
NO_SAFE_LOAD = "its state holds objects that torch.load(weights_only=True) refuses"

TORCH_OPTIMIZER_LACKS = {
    "A2GradExp": {"scheduler": NO_LR},
    "A2GradInc": {"scheduler": NO_LR},
    "A2GradUni": {"scheduler": NO_LR},
    "Adafactor": {"scheduler": NO_LR},
    "AdaBelief": {"copy": NO_COPY},
    "AdaBound": {"copy": NO_COPY},
    "Lamb": {"copy": NO_COPY},
    "Ranger": {"copy": NO_COPY},
    "RangerQH": {"copy": NO_COPY},
    "RangerVA": {"copy": NO_COPY},
}


def lookahead(model):
    return torch_optimizer.Lookahead(torch_optimizer.Yogi(model.parameters(), lr=LR), k=2)


def classes_of(module):
    for name, cls in vars(module).items():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            yield name, cls


def torch_optimizer_cases():
    special = {
        "Adahessian": Case(with_params(torch_optimizer.Adahessian, lr=LR), create_graph=True),
        "Lookahead": Case(lookahead, lacks={"resume": NO_INIT, "copy": NO_INIT}),
    }
    for name, cls in classes_of(torch_optimizer):
        case = special.get(name) or Case(with_params(cls), lacks=TORCH_OPTIMIZER_LACKS.get(name, {}))
        yield f"torch_optimizer {name}", case


def muon_groups(cls):
    """Muon and its kin want to be told which parameters are matrices."""

    def build(model):
        weights = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        return cls([{"params": weights, "use_muon": True}, {"params": rest, "use_muon": False}])

    return build


def around(name, inner=torch.optim.AdamW, **options):
    """A wrapper of pytorch_optimizer around an optimizer instance."""
    return lambda model: getattr(pytorch_optimizer, name)(inner(model.parameters(), lr=LR), **options)


def sam(name, **options):
    cls = getattr(pytorch_optimizer, name)
    sgd = {"base_optimizer": torch.optim.SGD, "lr": LR, "momentum": 0.9}
    return lambda model: cls(params=model.parameters(), **sgd, **options)


def gsam(model):
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    constant = torch.optim.lr_scheduler.ConstantLR(base, 1.0)
    rho = pytorch_optimizer.ProportionScheduler(constant, max_lr=LR, min_lr=LR / 2, max_value=0.05, min_value=0.01)
    return pytorch_optimizer.GSAM(model.parameters(), base_optimizer=base, model=model, rho_scheduler=rho)


def schedule_free_wrapper(module):
    return lambda model: module.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=LR))


PYTORCH_OPTIMIZER_SPECIAL = {
    "AdaGO": Case(muon_groups(pytorch_optimizer.AdaGO)),
    "AdaHessian": Case(with_params(pytorch_optimizer.AdaHessian), create_graph=True),
    "AdaMuon": Case(muon_groups(pytorch_optimizer.AdaMuon)),
    "AdamMini": Case(pytorch_optimizer.AdamMini),
    "AliG": Case(with_params(pytorch_optimizer.AliG, max_lr=LR), needs_closure=True),
    "BSAM": Case(with_params(pytorch_optimizer.BSAM, num_data=8), needs_closure=True),
    "FriendlySAM": Case(sam("FriendlySAM"), needs_closure=True),
    "GSAM": Case(gsam, needs_closure=True, returns_outputs=True),
    "Lookahead": Case(around("Lookahead", k=2)),
    "LookSAM": Case(sam("LookSAM"), needs_closure=True),
    "Muon": Case(muon_groups(pytorch_optimizer.Muon)),
    "MuonClip": Case(muon_groups(pytorch_optimizer.MuonClip)),
    "NorMuon": Case(muon_groups(pytorch_optimizer.NorMuon)),
    "OrthoGrad": Case(around("OrthoGrad")),
    "PCGrad": Case(around("PCGrad")),
    "Ranger21": Case(with_params(pytorch_optimizer.Ranger21, num_iterations=20)),
    "SAM": Case(sam("SAM"), needs_closure=True),
    "SaRA": Case(with_params(pytorch_optimizer.SaRA, lr=LR, threshold=1.0)),
    "ScheduleFreeWrapper": Case(schedule_free_wrapper(pytorch_optimizer)),
    "SophiaH": Case(with_params(pytorch_optimizer.SophiaH), create_graph=True),
    "SpectralSphere": Case(with_params(pytorch_optimizer.SpectralSphere), model=matrices),
    "TRAC": Case(around("TRAC")),
    "WSAM": Case(lambda model: sam("WSAM", model=model)(model), needs_closure=True),
}

# Classes that do not run bare as optimizers, and why.
LEFT_OUT = {
    "AdaLOMO": "updates the parameters inside backward; its step() raises NotImplementedError",
    "DeMo": "needs the einops package and a process group",
    "DistributedMuon": "needs a process group",
    "LOMO": "updates the parameters inside backward; its step() raises NotImplementedError",
    "SafeFP16Optimizer": "keeps a float32 copy of the parameters that only its own backward() gives gradients",
}

PYTORCH_OPTIMIZER_LACKS = {
    "A2Grad": {"scheduler": NO_LR},
    "AdaShift": {"resume": NO_SAFE_LOAD},
    "AliG": {"scheduler": NO_LR},
    "Conda": {"resume": NO_SAFE_LOAD},
    "SCION": {"resume": NO_SAFE_LOAD},
    "SCIONLight": {"resume": NO_SAFE_LOAD},
    "ScalableShampoo": {"resume": NO_SAFE_LOAD},
}


def pytorch_optimizer_cases():
    for name, cls in classes_of(pytorch_optimizer):
        if name in LEFT_OUT or cls.__module__.startswith("torch."):
            continue
        case = PYTORCH_OPTIMIZER_SPECIAL.get(name) or Case(with_params(cls))
        yield (
            f"pytorch_optimizer {name}",
            replace(case, lacks={"copy": NO_COPY, **PYTORCH_OPTIMIZER_LACKS.get(name, {})}),
        )


def schedulefree_cases():
    for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"):
        cls = getattr(schedulefree, name)
        for foreach in (False, True):
            yield f"schedulefree {name} foreach={foreach}", Case(with_params(cls, foreach=foreach))
    lacks = {"scheduler": "is no torch.optim.Optimizer", "resume": "does not save whether it is in train mode"}
    yield "schedulefree ScheduleFreeWrapper", Case(schedule_free_wrapper(schedulefree), lacks=lacks)
    for name in ("AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"):
        yield f"schedulefree {name}", Case(with_params(getattr(schedulefree, name)), needs_closure=True)


CASES = {
    **dict(torch_cases()),
    **dict(torch_optimizer_cases()),
    **dict(pytorch_optimizer_cases()),
    **dict(schedulefree_cases()),
}

# One of each kind, for contracts that a thorough run holds all others to.
REPRESENTATIVES = {
    "AdamW single": "a loop over the parameters",
    "AdamW foreach": "lists of tensors",
    "AdamW fused": "one kernel, which scales and skips by itself",
    "AdamW tensor lr": "a tensor among the options",
    "SparseAdam": "sparse gradients alone",
    "SGD sparse": "sparse gradients too",
    "Muon": "matrices alone",
    "LBFGS None": "several evaluations",
    "LBFGS strong_wolfe": "as many evaluations as it takes",
    "torch_optimizer Yogi": "another package",
    "torch_optimizer Adahessian": "gradients with a graph",
    "torch_optimizer A2GradExp": "no lr",
    "torch_optimizer Lookahead": "an optimizer inside, without Optimizer.__init__",
    "torch_optimizer Ranger": "a closure that is not called",
    "pytorch_optimizer Lion": "options as attributes, which a copy lacks",
    "pytorch_optimizer Muon": "groups of matrices and of the rest",
    "pytorch_optimizer SAM": "two evaluations, at two places",
    "pytorch_optimizer GSAM": "a closure that returns a pair",
    "pytorch_optimizer SCION": "objects in the state",
    "pytorch_optimizer TRAC": "an optimizer inside",
    "schedulefree AdamWScheduleFree foreach=True": "parameters that train() and eval() exchange",
    "schedulefree SGDScheduleFreeClosure": "the same around a closure",
    "schedulefree ScheduleFreeWrapper": "no torch.optim.Optimizer",
}
