"""torch.compile of the model and of step(): both run, agree with eager, and do not recompile from step to step."""

import pytest
import torch
from training import backward, make_model, parameters, train

from zclip_optim import ZClipOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
STEPS, OUTLIERS = 15, (10, 12)


class CountingBackend:
    """Runs the graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph_module, example_inputs):
        self.graphs += 1
        return graph_module.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make():
    model = make_model()
    return model, ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), warmup_steps=5)


class Momo(torch.optim.SGD):
    """Stands for MoMo's, whose step takes the loss."""

    def step(self, closure=None, loss=None):
        super().step()
        return loss


def eager_run():
    model, optimizer = make()
    return train(model, optimizer, range(STEPS), OUTLIERS), optimizer.metrics


def test_compiled_step_agrees_with_eager_and_is_compiled_once():
    expected, metrics = eager_run()
    model, optimizer = make()
    backend = CountingBackend()
    step = torch.compile(optimizer.step, backend=backend)
    counts = []
    for i in range(STEPS):
        backward(model, i, i in OUTLIERS)
        step()
        counts.append(backend.graphs)
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-5, atol=1e-6)
    assert optimizer.metrics.step == STEPS
    assert optimizer.metrics.clipped_steps == metrics.clipped_steps > 0
    # The clipping is a break before the base optimizer's step, which is one graph (two while its state is being made).
    assert 1 <= counts[-1] <= 3
    assert counts[3] == counts[-1]


def test_compiled_model_trains_as_the_bare_optimizer_does():
    results = []
    for wrap in (lambda inner: inner, lambda inner: ZClipOptimizer(inner, z_thresh=1e9)):
        model = make_model()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = wrap(torch.optim.AdamW(compiled.parameters(), lr=1e-2))
        results.append(parameters(train(compiled, optimizer, range(STEPS), OUTLIERS)))
    assert torch.equal(*results)


def test_compiled_model_and_step_with_the_default_backend():
    expected, _ = eager_run()
    model, optimizer = make()
    compiled, step = torch.compile(model), torch.compile(optimizer.step)
    for i in range(STEPS):
        backward(compiled, i, i in OUTLIERS)
        step()
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-4, atol=1e-5)


def test_a_step_that_takes_more_than_a_closure():
    model = make_model()
    optimizer = ZClipOptimizer(Momo(model.parameters(), lr=1e-2))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        backward(model, i)
        assert step(loss=float(i)) == i
    assert optimizer.metrics.step == 3
    with pytest.raises(TypeError, match="does not take them"):
        step(hessian=1)
    assert optimizer.metrics.step == 3


def test_a_step_that_a_scheduler_has_patched_is_compiled_once():
    """Its patch sets an attribute in every step."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    backend, counts = CountingBackend(), []
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(5):
        backward(model, i)
        step()
        scheduler.step()
        counts.append(backend.graphs)
    assert optimizer.metrics.step == 5
    assert optimizer._opt_called
    assert counts[2] == counts[-1]


def test_a_list_of_optimizers():
    model = make_model()
    parts = [torch.optim.SGD(model[0].parameters(), lr=1e-2), torch.optim.AdamW(model[2].parameters(), lr=1e-2)]
    optimizer = ZClipOptimizer(parts, warmup_steps=5)
    backend, counts = CountingBackend(), []
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(5):
        backward(model, i)
        step()
        counts.append(backend.graphs)
    assert optimizer.metrics.step == 5
    assert counts[2] == counts[-1] >= 1
