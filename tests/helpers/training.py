"""A small model, its batches and a training step, for tests that compare whole runs."""

import torch
from torch import nn


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def make_batch(step, outlier=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=dtype)
    y = x.sum(1, keepdim=True) + (100.0 if outlier else 0.0)
    return x, y


def backward(model, step, outlier=False):
    x, y = make_batch(step, outlier, next(model.parameters()).dtype)
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def train(model, optimizer, steps, outliers=()):
    for step in steps:
        backward(model, step, step in outliers)
        optimizer.step()
    return model


def train_accumulating(model, optimizer, scheduler, batches, accumulate=1):
    """A loop in plain torch with gradient accumulation and a scheduler."""
    for i, (x, y) in enumerate(batches, 1):
        (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def set_gradients(params, norm):
    """Give the parameters random gradients of this global norm."""
    params = list(params)
    for p in params:
        p.grad = torch.randn_like(p)
    total = torch.sqrt(sum(p.grad.double().square().sum() for p in params))
    for p in params:
        p.grad.mul_(norm / total)
