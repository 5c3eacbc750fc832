"""Gradients that are missing, sparse, complex, of several dtypes, shared, empty, huge or tiny, through the wrapper."""

import copy

import pytest
import torch
from torch import nn

from zclip_optim import ZClipOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def parameter(gradient, tensor=None):
    p = nn.Parameter(torch.zeros_like(gradient.to_dense()) if tensor is None else tensor)
    p.grad = gradient
    return p


def sparse_gradient():
    return torch.sparse_coo_tensor([[0, 2, 0]], torch.randn(3, 4), (5, 4), check_invariants=True)


CASES = {
    "one without a gradient": lambda: [parameter(torch.randn(3)), nn.Parameter(torch.ones(2))],
    "frozen": lambda: [parameter(torch.randn(3)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "sparse beside dense": lambda: [parameter(sparse_gradient()), parameter(torch.randn(3))],
    "complex": lambda: [parameter(torch.randn(3, 2, dtype=torch.complex64)), parameter(torch.randn(3))],
    "bf16 beside fp32": lambda: [parameter(torch.randn(50).bfloat16()), parameter(torch.randn(50))],
    "fp16 beside fp32": lambda: [parameter(torch.full((50,), 2e4).half()), parameter(torch.randn(50))],
    "fp64 beside fp32": lambda: [parameter(torch.randn(50).double()), parameter(torch.randn(50))],
    "zero-size": lambda: [parameter(torch.randn(0, 3)), parameter(torch.randn(3))],
    "scalar": lambda: [parameter(torch.randn(()))],
    "huge": lambda: [parameter(torch.randn(20) * 1e30)],
    "tiny": lambda: [parameter(torch.randn(20) * 1e-30)],
    "not contiguous": lambda: [parameter(torch.randn(6, 7).t()), parameter(torch.randn(8, 9)[:, ::2])],
}


def total_norm(params):
    squares = [p.grad.to_dense().to(torch.complex128).abs().square().sum() for p in params if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_norm_and_clipping_are_right(make):
    torch.manual_seed(0)
    params = make()
    norm = total_norm(params)
    optimizer = ZClipOptimizer(torch.optim.SGD(params, lr=1.0), max_grad_norm=norm / 4)
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(norm, rel=1e-6)
    assert optimizer.metrics.clip_coef == pytest.approx(0.25)
    assert total_norm(params) == pytest.approx(norm / 4, rel=1e-2)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_not_clipping_changes_no_bit(make):
    torch.manual_seed(0)
    bare = make()
    ours = copy.deepcopy(bare)
    for p, q in zip(ours, bare, strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    torch.optim.SGD(bare, lr=0.1).step()
    ZClipOptimizer(torch.optim.SGD(ours, lr=0.1)).step()
    for p, q in zip(ours, bare, strict=True):
        assert torch.equal(p, q)


def test_a_tied_parameter_counts_and_is_scaled_once():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    gradient = torch.randn(5, 4)
    embedding.weight.grad = gradient.clone()
    params = [embedding.weight, head.weight]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        inner = torch.optim.SGD(params, lr=0.1)
    optimizer = ZClipOptimizer(inner, max_grad_norm=gradient.norm().item() / 2)
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(gradient.norm().item())
    torch.testing.assert_close(model[0].weight.grad, gradient / 2)


def test_an_empty_group_and_no_gradient_at_all():
    p = nn.Parameter(torch.ones(3))
    groups = [{"params": []}, {"params": [p]}]
    for scope in ("global", "group"):
        optimizer = ZClipOptimizer(torch.optim.SGD(groups, lr=0.1), scope=scope)
        p.grad = None
        optimizer.step()
        assert optimizer.metrics.grad_norm == 0
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.metrics.grad_norm == pytest.approx(3**0.5)
        assert optimizer.metrics.step == 1


def test_a_norm_that_overflows_float16_is_finite_and_a_bf16_norm_is_not_rounded():
    half = parameter(torch.full((1000,), 100.0).half())
    optimizer = ZClipOptimizer(torch.optim.SGD([half], lr=0.0))
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(100 * 1000**0.5, rel=1e-6)
    brain = parameter(torch.full((1001,), 1.0).bfloat16())
    optimizer = ZClipOptimizer(torch.optim.SGD([brain], lr=0.0))
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(1001**0.5, rel=1e-6)


def test_gradients_with_a_graph_are_measured_and_scaled_in_place():
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="create_graph=True"):
        (p**3).sum().backward(create_graph=True)
    optimizer = ZClipOptimizer(torch.optim.SGD([p], lr=0.1), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.metrics.grad_norm == pytest.approx(27**0.5)
    assert p.grad.norm().item() == pytest.approx(1.0)
    p.grad = None
