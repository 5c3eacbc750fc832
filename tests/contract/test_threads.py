"""Several wrapped optimizers in one process share nothing."""

import threading

import torch
from training import make_model, parameters, set_gradients, train

from zclip_optim import ZClipOptimizer


def make(seed):
    model = make_model(seed)
    return model, ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))


def test_two_optimizers_taking_turns_are_two_runs_alone():
    alone = [make(seed) for seed in (0, 1)]
    together = [make(seed) for seed in (0, 1)]
    for model, optimizer in alone:
        train(model, optimizer, range(50), outliers=[40])
    for step in range(50):
        for model, optimizer in together:
            train(model, optimizer, [step], outliers=[40])
    for (model, optimizer), (other, its_optimizer) in zip(together, alone, strict=True):
        assert torch.equal(parameters(model), parameters(other))
        assert optimizer.metrics == its_optimizer.metrics


def test_two_threads_are_two_runs_alone():
    alone = [make(seed) for seed in range(4)]
    for model, optimizer in alone:
        train(model, optimizer, range(50), outliers=[40])
    together = [make(seed) for seed in range(4)]
    threads = [
        threading.Thread(target=train, args=(model, optimizer, range(50), [40])) for model, optimizer in together
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, optimizer), (other, its_optimizer) in zip(together, alone, strict=True):
        assert torch.equal(parameters(model), parameters(other))
        assert optimizer.metrics == its_optimizer.metrics


def test_a_generator_and_a_discriminator():
    (generator, g), (discriminator, d) = make(0), make(1)
    for step in range(30):
        set_gradients(generator.parameters(), 1.0 + 0.1 * (step % 2))
        g.step()
        set_gradients(discriminator.parameters(), 100.0 + 10 * (step % 2))
        d.step()
    assert 1 < g.metrics.mean < 2
    assert 99 < d.metrics.mean < 111
