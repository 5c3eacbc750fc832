"""Every inner optimizer keeps, inside the wrapper, the contract that it keeps outside."""

import copy
import io
import pickle
from dataclasses import replace

import numpy
import pytest
import torch
from inner_optimizers import CASES, REPRESENTATIVES
from torch import nn
from training import make_batch, parameters

from zclip_optim import ZClipOptimizer
from zclip_optim.gradients import collect_gradients
from zclip_optim.norm import gradient_norm

pytestmark = [  # what the inner optimizers themselves warn of
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
    pytest.mark.filterwarnings("ignore:This overload of \\w+ is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

CAP = 1e-3
ALL_PARAMS = [pytest.param(case, id=name) for name, case in CASES.items()]


def marks_of(name):
    return () if name in REPRESENTATIVES else pytest.mark.thorough


def one_of_each_kind(names=CASES):
    """As `ALL_PARAMS`; only those of REPRESENTATIVES are in every run."""
    return [pytest.param(CASES[name], id=name, marks=marks_of(name)) for name in names]


def bare(inner):
    return inner


def without_clipping(inner):
    return ZClipOptimizer(inner, z_thresh=1e9)


def with_cap(inner):
    return ZClipOptimizer(inner, max_grad_norm=CAP)


def build(case, wrap):
    model = case.model()
    torch.manual_seed(1)
    return model, wrap(case.build(model))


def loss_of(model, step):
    x, y = make_batch(step)
    if isinstance(model[0], nn.EmbeddingBag):
        x = (x.abs() * 10).long().clamp(max=29)
    return nn.functional.mse_loss(model(x), y)


def run(case, model, optimizer, steps, clip=lambda: None):
    """Train; `clip` is called on the gradients that each backward leaves behind."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        torch.manual_seed(step)  # for optimizers that draw random numbers
        numpy.random.seed(step)

        @torch.enable_grad()
        def backward(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward(create_graph=case.create_graph)
            return (None, loss) if case.returns_outputs else loss

        def closure(backward=backward):
            result = backward()
            clip()
            return result

        backward()
        if case.needs_closure:
            optimizer.step(closure)
        else:
            clip()
            optimizer.step()
        for p in model.parameters():
            p.grad = None  # a graph that create_graph left behind keeps itself alive
    return parameters(model)


def run_clipped_by_hand(case, model, optimizer, steps):
    @torch.no_grad()
    def clip():
        gradients = collect_gradients(optimizer.param_groups)
        norm = gradient_norm(gradients)
        for gradient in gradients if norm > CAP else []:
            gradient.mul_(CAP / norm)

    return run(case, model, optimizer, steps, clip)


def resumed(case, wrap):
    model, optimizer = build(case, wrap)
    run(case, model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model, optimizer = build(case, wrap)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return run(case, model, optimizer, range(3, 6))


def copied(case, wrap, copier):
    model, optimizer = build(case, wrap)
    run(case, model, optimizer, range(3))
    return run(case, *copier((model, optimizer)), range(3, 6))


def scheduled(case, wrap):
    model, optimizer = build(case, wrap)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trace = []
    for step in range(4):
        run(case, model, optimizer, [step])
        scheduler.step()
        trace += [float(group["lr"]) for group in optimizer.param_groups]
    return torch.cat([torch.tensor(trace, dtype=torch.float64), parameters(model).double()])


def uninterrupted(case, wrap):
    return run(case, *build(case, wrap), range(6))


CONTRACTS = {
    "resume": lambda case, wrap: (resumed(case, wrap), uninterrupted(case, wrap)),
    "copy": lambda case, wrap: (copied(case, wrap, copy.deepcopy), uninterrupted(case, wrap)),
    "pickle": lambda case, wrap: (
        copied(case, wrap, lambda x: pickle.loads(pickle.dumps(x))),
        uninterrupted(case, wrap),
    ),
    "scheduler": lambda case, wrap: (scheduled(case, wrap), scheduled(case, bare)),
}


def expected_to_keep(contract):
    reason = "copy" if contract == "pickle" else contract
    return [
        pytest.param(contract, case, id=f"{contract}-{name}", marks=marks_of(name))
        for name, case in CASES.items()
        if reason not in case.lacks
    ]


@pytest.mark.parametrize("case", ALL_PARAMS)
def test_not_clipping_is_the_bare_optimizer_bit_for_bit(case):
    start = parameters(case.model())
    expected = run(case, *build(case, bare), range(12))
    assert not torch.equal(expected, start)
    assert torch.equal(run(case, *build(case, without_clipping), range(12)), expected)


IGNORE_THEIR_CLOSURE = ("torch_optimizer Ranger", "torch_optimizer RangerVA")


@pytest.mark.parametrize("case", one_of_each_kind(name for name in CASES if name not in IGNORE_THEIR_CLOSURE))
def test_clipping_happens_also_for_trainers_that_always_pass_a_closure(case):
    case = replace(case, needs_closure=True)
    model, optimizer = build(case, with_cap)
    ours = run(case, model, optimizer, range(4))
    assert torch.equal(ours, run_clipped_by_hand(case, *build(case, bare), range(4)))
    assert optimizer.metrics.clip_coef < 1
    assert optimizer.metrics.step == 4


@pytest.mark.parametrize("case", one_of_each_kind())
def test_clipping_happens_before_the_inner_step(case):
    model, optimizer = build(case, with_cap)
    ours = run(case, model, optimizer, range(12))
    assert torch.equal(ours, run_clipped_by_hand(case, *build(case, bare), range(12)))
    assert optimizer.metrics.clip_coef < 1


class Both:
    """The optimizer and AdamW, without a wrapper."""

    def __init__(self, parts):
        self.first, self.second = parts

    def __getattr__(self, name):  # train(), where the first one has it
        return getattr(self.first, name)

    def step(self):
        self.first.step()
        self.second.step()

    def zero_grad(self):
        self.first.zero_grad()
        self.second.zero_grad()


@pytest.mark.parametrize("case", one_of_each_kind(name for name in CASES if not CASES[name].needs_closure))
def test_beside_another_optimizer_in_one_wrapper_it_is_itself(case):
    def run_beside_adamw(wrap, steps):
        model, first = build(case, bare)
        bias = nn.Parameter(torch.zeros(1))
        biased = nn.Sequential(model[0], *model[1:], nn.Identity())
        biased.register_parameter("bias", bias)
        biased.forward = lambda x: model(x) + bias
        return run(case, biased, wrap([first, torch.optim.AdamW([bias], lr=1e-2)]), steps)

    expected = run_beside_adamw(Both, range(3))
    assert expected[-1] != 0
    assert torch.equal(run_beside_adamw(without_clipping, range(3)), expected)


@pytest.mark.parametrize(("contract", "case"), [p for name in CONTRACTS for p in expected_to_keep(name)])
def test_keeps_the_contract(contract, case):
    ours, expected = CONTRACTS[contract](case, without_clipping)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("contract", "case"),
    [
        pytest.param(contract, case, id=f"{contract}-{name}", marks=marks_of(name))
        for name, case in CASES.items()
        for contract in case.lacks
    ],
)
def test_what_is_left_out_fails_without_the_wrapper_too(contract, case):
    try:
        ours, expected = CONTRACTS[contract](case, bare)
    except (AttributeError, KeyError, TypeError, pickle.UnpicklingError):
        return
    assert not torch.equal(ours, expected)
