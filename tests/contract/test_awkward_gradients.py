"""Gradients that are missing, sparse, complex, of several dtypes, shared, empty, huge or tiny, through the wrapper."""

import copy
import math

import pytest
import torch
from torch import nn

import zclip_optim.gradients
from zclip_optim import NonFiniteGradientError, ZClipOptimizer

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


def jagged(*parts, **options):
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged, **options)


def with_holes():
    """Two rows of 3 in a buffer for three each; what lies between them is not part of it."""
    buffer = torch.randn(6, 3)
    buffer[2] = 1e3
    offsets, lengths = torch.tensor([0, 3, 6]), torch.tensor([2, 3])
    return torch.nested.nested_tensor_from_jagged(buffer, offsets=offsets, lengths=lengths)


def nested(rows, width):
    """Of torch's first layout; only backward can give it to a parameter as its gradient."""
    p = nn.Parameter(torch.nested.nested_tensor([torch.randn(n, width) for n in rows]))
    (torch.nested.to_padded_tensor(p, 0.0) * torch.randn(len(rows), max(rows), width)).sum().backward()
    return p


LAYOUTS = {
    "CSR": lambda: torch.randn(6, 8).relu().to_sparse_csr(),
    "CSC": lambda: torch.randn(6, 8).relu().to_sparse_csc(),
    "BSR": lambda: torch.randn(6, 8).relu().to_sparse_bsr((2, 2)),
    "BSC": lambda: torch.randn(6, 8).relu().to_sparse_bsc((2, 2)),
    "CSR large": lambda: torch.randn(600, 80).relu().to_sparse_csr(),
    "CSR complex": lambda: torch.randn(6, 8, dtype=torch.complex64).to_sparse_csr(),
    "nested": lambda: nested([2, 4], 3),
    "nested large": lambda: nested([20, 40], 300),
    "jagged": lambda: jagged(torch.randn(2, 3), torch.randn(4, 3)),
    "jagged large": lambda: jagged(torch.randn(20, 300), torch.randn(40, 300)),
    "jagged with holes": with_holes,
    "float8": lambda: torch.randn(50).to(torch.float8_e4m3fn),
    "float8 large": lambda: torch.randn(5000).to(torch.float8_e5m2),
    "MKLDNN": lambda: torch.randn(6, 8).to_mkldnn(),
}


def with_gradient(value):
    """A parameter, which the value may be already, of any layout, and its gradient."""
    if isinstance(value, nn.Parameter):
        return value
    p = nn.Parameter(value.detach().clone())
    p.grad = value
    return p


def values_of(gradient):
    if gradient.is_nested:
        return torch.cat([part.reshape(-1) for part in gradient.unbind()])
    if gradient.dtype.itemsize == 1:
        return gradient.float()
    return gradient.to_dense().reshape(-1)


class Moves(torch.optim.SGD):
    """Steps on any layout, unlike torch's own."""

    def step(self, closure=None):
        self.stepped = True


@pytest.fixture(params=["host", "device"])
def path(request, monkeypatch):
    """The path of accelerators too, which runs on CPU tensors as well."""
    if request.param == "device":
        monkeypatch.setattr(zclip_optim.gradients, "stays_on_device", lambda tensor: True)


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|CSC|BSR|BSC|nested tensors|NestedTensor).*")
@pytest.mark.parametrize("beside", [0, 1, 20])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_gradients_of_any_layout(make, beside, path):
    torch.manual_seed(0)
    params = [with_gradient(make()), *(parameter(torch.randn(5)) for _ in range(beside))]
    before = [values_of(q.grad.clone()) for q in params]
    norm = sum(v.to(torch.complex128).abs().square().sum().item() for v in before) ** 0.5
    optimizer = ZClipOptimizer(Moves(params, lr=1.0), max_grad_norm=norm / 4)
    optimizer.step()
    assert optimizer.base_optimizer.stepped
    assert optimizer.metrics.grad_norm == pytest.approx(norm, rel=1e-5)
    for q, value in zip(params, before, strict=True):
        rough = 0.1 if q.grad.dtype.itemsize == 1 else 1e-6  # float8 has two or three bits
        torch.testing.assert_close(values_of(q.grad), value / 4, rtol=rough, atol=rough / 50)


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|CSC|BSR|BSC|nested tensors|NestedTensor).*")
def test_nan_in_any_layout_is_named(make, path):
    p = with_gradient(make())
    p.grad.copy_(p.grad.float() * math.nan) if p.grad.dtype.itemsize == 1 else p.grad.mul_(math.nan)
    optimizer = ZClipOptimizer(Moves([("layer.weight", p)], lr=1.0), nonfinite="raise")
    with pytest.raises(NonFiniteGradientError, match=r"layer\.weight"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*Sparse CSR")
def test_sgd_steps_on_a_csr_parameter_as_when_bare():
    torch.manual_seed(0)
    value, gradient = torch.randn(6, 8).relu(), torch.randn(6, 8).relu()
    bare, ours = (nn.Parameter(value.to_sparse_csr()) for _ in range(2))
    for p in (bare, ours):
        p.grad = gradient.to_sparse_csr()
    torch.optim.SGD([bare], lr=0.1).step()
    optimizer = ZClipOptimizer(torch.optim.SGD([ours], lr=0.1))
    optimizer.step()
    assert torch.equal(ours.to_dense(), bare.to_dense())
    assert optimizer.metrics.grad_norm == pytest.approx(gradient.norm().item())


class Opaque(torch.Tensor):
    """A tensor subclass that computes nothing, as a quantized one may."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, requires_grad=False)

    def __init__(self, like): ...

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"Opaque does not do {func}")

    def __repr__(self):
        return "Opaque"


def test_what_cannot_be_measured_is_named_and_nothing_has_changed(path):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    p.grad, q.grad = torch.ones(3), Opaque(torch.ones(4))
    for named in (True, False):
        inner = Moves([("a", p), ("b.weight", q)] if named else [p, q], lr=1.0)
        optimizer = ZClipOptimizer(inner, max_grad_norm=0.1)
        where = r"b\.weight" if named else r"param_groups\[0\]\['params'\]\[1\]"
        with pytest.raises(
            TypeError, match=rf"gradient of {where} cannot be measured: a Opaque of layout torch.strided"
        ):
            optimizer.step()
        assert torch.equal(p.grad, torch.ones(3))
        assert optimizer.metrics.step == 0
        assert not hasattr(inner, "stepped")
