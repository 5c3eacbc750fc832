"""The norm against float64 on every kind of gradient; scaling; the names of non-finite gradients."""

import functools
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from zclip_optim.gradients import collect_gradients, describe_nonfinite, scale_gradients_
from zclip_optim.norm import CHUNK, DOT, FEW, HALF_ROW, LARGE, SMALL, gradient_norm


def exact_norm(gradients):
    elements = [g.to_dense().to(torch.complex128).abs().square() for g in gradients]
    return math.sqrt(math.fsum(e.sum().item() for e in elements))


def sparse_gradient():
    indices = torch.tensor([[0, 2, 0, 3]])  # row 0 twice: the gradient there is the sum
    return torch.sparse_coo_tensor(indices, torch.randn(4, 8), (5, 8), check_invariants=True)


GRADIENTS = {
    "small": lambda: [torch.randn(4, 5), torch.randn(7)],
    "many tiny": lambda: [torch.randn(1000) for _ in range(300)],  # more than a batch
    "many tiny, some sparse": lambda: [sparse_gradient(), *(torch.randn(7) for _ in range(FEW))],
    "a scalar": lambda: [torch.randn(())],
    "empty beside full": lambda: [torch.randn(0, 3), torch.randn(3)],
    "in rows": lambda: [
        torch.randn(DOT + 64),
        torch.randn(3 * DOT),
        torch.randn(LARGE + HALF_ROW),
        torch.randn(5),
    ],
    "in no rows": lambda: [torch.randn(DOT + 27), torch.randn(LARGE + 7), torch.randn(5)],  # of prime sizes
    "large": lambda: [torch.randn(3, CHUNK // 2 + 1)],
    "large and small": lambda: [torch.randn(2 * CHUNK + 5), torch.randn(3), torch.randn(CHUNK)],
    "all equal": lambda: [torch.full((CHUNK + 10,), 1.2345), torch.full((SMALL,), 0.777)],
    "float64": lambda: [torch.randn(CHUNK + 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)],
    "bfloat16": lambda: [torch.randn(2 * CHUNK).bfloat16(), torch.randn(9).bfloat16()],
    "float16 whose norm overflows float16": lambda: [torch.full((CHUNK,), 1000.0).half(), torch.full((4,), 6e4).half()],
    "mixed dtypes": lambda: [torch.randn(9), torch.randn(9).bfloat16(), torch.randn(9).half(), torch.randn(9).double()],
    "complex": lambda: [torch.randn(6, 7, dtype=torch.complex64), torch.randn(3)],
    "conjugated": lambda: [torch.randn(6, 7, dtype=torch.complex64).conj()],
    "large complex": lambda: [torch.randn(CHUNK, dtype=torch.complex64)],
    "sparse, not coalesced": lambda: [sparse_gradient(), torch.randn(4)],
    "transposed": lambda: [torch.randn(700, 600).t(), torch.randn(6, 7).t()],
    "channels last": lambda: [torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last)],
    "sliced": lambda: [torch.randn(700, 1200)[:, ::2]],
    "expanded": lambda: [torch.randn(1, 5).expand(4, 5), torch.randn(1).expand(CHUNK)],
    "squares overflow": lambda: [torch.randn(50) * 1e30, torch.randn(CHUNK) * 1e30],
    "squares vanish": lambda: [torch.randn(50) * 1e-30, torch.randn(CHUNK) * 1e-30],
    "squares overflow beside small ones": lambda: [torch.randn(50) * 1e30, torch.randn(50) * 1e-30],
    "squares partly vanish": lambda: [torch.randn(CHUNK) * 1e-19, torch.randn(100) * 1e-21],
    "float64 squares overflow": lambda: [torch.randn(50, dtype=torch.float64) * 1e200],
    "bfloat16 squares vanish": lambda: [(torch.randn(50) * 1e-30).bfloat16()],
    "largest float32": lambda: [torch.full((3,), torch.finfo(torch.float32).max)],
    "smallest float32": lambda: [torch.full((3,), 1.4e-45)],
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_norm_is_that_of_float64(make):
    torch.manual_seed(0)
    gradients = make()
    if any(g.abs().max() > 1e150 for g in gradients if g.dtype == torch.float64):
        expected = 1e200 * exact_norm([g / 1e200 for g in gradients])
    else:
        expected = exact_norm(gradients)
    assert gradient_norm(gradients) == pytest.approx(expected, rel=1e-6, abs=0)


def below_half_a_unit(size: int, running_sums: int) -> torch.Tensor:
    """A few elements, after whose squares each of the others' is too small to be added to a sum in float32."""
    values = torch.full((size,), 5.9e-8**0.5)
    values[:running_sums] = 1.0
    return values


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, SMALL), (FEW + 1, SMALL), (1, DOT), (9, DOT), (1, DOT + 64), (1, LARGE), (2, LARGE + HALF_ROW)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (torch.randn, 1e-6),
        (lambda size: torch.randn(size) * (torch.rand(size) < 0.01), 1e-6),
        (lambda size: torch.full((size,), 0.777), 1e-4),
        *[(functools.partial(below_half_a_unit, running_sums=2**n), 1e-4) for n in range(11)],
    ],
)
def test_norm_is_as_exact_as_clipping_needs(count, make, error, dtype, size):
    torch.manual_seed(0)
    gradients = [make(size).to(dtype) for _ in range(count)]
    assert gradient_norm(gradients) == pytest.approx(exact_norm(gradients), rel=error, abs=0)


def test_16_bit_tensors_of_every_length_beside_each_other():
    torch.manual_seed(0)
    sizes = [SMALL + 17, CHUNK - 5, 3, 2 * CHUNK + 7, SMALL + 64, CHUNK, 40]
    gradients = [torch.randn(size).to(dtype) for size in sizes for dtype in (torch.bfloat16, torch.float16)]
    assert gradient_norm(gradients) == pytest.approx(exact_norm(gradients), rel=1e-6, abs=0)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_does_not_depend_on_the_default_dtype(dtype, float64_by_default):
    gradients = [torch.randn(LARGE + HALF_ROW).to(dtype), torch.randn(5).to(dtype)]
    assert gradient_norm(gradients) == pytest.approx(exact_norm(gradients), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_measured_without_a_copy(dtype):
    gradients = [torch.ones(LARGE, dtype=dtype)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert gradient_norm(gradients) == pytest.approx(LARGE**0.5)
    assert sum(max(event.cpu_memory_usage, 0) for event in profiler.events()) < LARGE / 8


def test_norm_does_not_depend_on_the_number_of_threads():
    gradients = [torch.randn(3 * CHUNK + 7), torch.randn(100, 100)]
    one = gradient_norm(gradients)
    torch.set_num_threads(2)
    two = gradient_norm(gradients)
    torch.set_num_threads(1)
    assert two == pytest.approx(one, rel=1e-9)


def test_norm_of_nothing_and_of_zeros():
    assert gradient_norm([]) == 0
    assert gradient_norm([torch.zeros(3), torch.zeros(CHUNK), torch.zeros(0)]) == 0


@pytest.mark.parametrize("size", [5, CHUNK + 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_not_finite_if_an_element_is_not(size, bad, dtype):
    gradient = torch.randn(size).to(dtype)
    gradient[size // 2] = bad
    assert not math.isfinite(gradient_norm([torch.randn(4), gradient]))


def test_scaling_multiplies_every_kind_in_place():
    kinds = [torch.randn(3), torch.randn(3).bfloat16(), torch.randn(3).half(), torch.randn(3, dtype=torch.complex64)]
    gradients = [*kinds, torch.randn(4, 6).t(), torch.zeros(0), sparse_gradient()]
    before = [g.to_dense().clone() for g in gradients]
    scale_gradients_(gradients, 0.25)  # exact in every dtype
    for gradient, old in zip(gradients, before, strict=True):
        assert torch.equal(gradient.to_dense(), old * 0.25)


@pytest.mark.parametrize("coef", [0.3337, 3e-5, 3e-8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scaling_rounds_the_product_only(coef, dtype):
    torch.manual_seed(0)
    gradient = (torch.rand(500) * 5e4 + 1e4).to(dtype)
    exact = gradient.double() * coef
    scale_gradients_([gradient], coef)
    assert (
        torch.equal(gradient, exact.to(dtype)) or (gradient.double() / exact - 1).abs().max() < torch.finfo(dtype).eps
    )


def test_a_coefficient_of_one_touches_nothing():
    gradient = torch.tensor([math.nan, math.inf, 1.0])
    version = gradient._version
    scale_gradients_([gradient], 1.0)
    assert gradient._version == version


def test_gradients_are_collected_once_and_only_where_they_exist():
    tied, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    tied.grad = torch.ones(2)
    assert collect_gradients([{"params": [tied, without]}, {"params": [tied]}]) == [tied.grad]
    assert collect_gradients([{"params": [without]}]) == []


def parameter(shape, bad=None):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.zeros(shape)
    if bad is not None:
        p.grad.view(-1)[0] = bad
    return p


def test_nonfinite_parameters_are_described_by_position_or_by_name():
    params = [parameter((2, 3)), parameter((4,), math.nan), parameter((5, 1), -math.inf)]
    expected = "param_groups[0]['params'][1] (4,), param_groups[0]['params'][2] (5, 1)"
    assert describe_nonfinite([{"params": params}]) == expected
    named = [{"params": params, "param_names": ["a", "b", "c"]}]
    assert describe_nonfinite(named) == "b (4,), c (5, 1)"


def test_only_the_first_ten_are_described():
    text = describe_nonfinite([{"params": [parameter((1,), math.nan) for _ in range(13)]}])
    assert text.endswith("param_groups[0]['params'][9] (1,) and 3 more")
