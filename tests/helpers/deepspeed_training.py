"""Engines of DeepSpeed on the CPU ranks of a World, their batches, and the same training by hand in one process."""

import contextlib
import gc
import itertools
import math
import os
import warnings

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from training import make_batch, make_model, parameters

os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed looks at when it is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import logger

from zclip_optim import ZClip, ZClipWarning
from zclip_optim.integrations.deepspeed import attach

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an all-reduce for inference, compiled when it is asked
logger.setLevel("ERROR")

OPTIONS = {"warmup_steps": 5, "z_thresh": 2.0}
STEPS, OUTLIERS = 24, (9, 10, 16, 21)
ON_CPU = {"offload_optimizer": {"device": "cpu"}}
ENGINES = {
    "stage 0": {},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "stage 2, CPU offload": {"zero_optimization": {"stage": 2, **ON_CPU}},
    "stage 3, CPU offload": {"zero_optimization": {"stage": 3, **ON_CPU}},
}
BF16_ENGINES = {f"{name}, bf16": {**config, "bf16": {"enabled": True}} for name, config in ENGINES.items()}
BF16_ENGINES["BF16_Optimizer"] = {**BF16_ENGINES["stage 1, bf16"], "data_types": {"grad_accum_dtype": "fp32"}}


@contextlib.contextmanager
def as_launched(rank):
    """The environment that DeepSpeed's launcher gives a rank; warnings of frameworks are theirs, ours are errors."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    os.environ.update({name: str(value) for name, value in names.items()})
    gc.freeze()  # BF16_Optimizer collects garbage several times when it is made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", ZClipWarning)
        yield


def begin_with_accelerate():
    """A rank's state as `accelerate launch` leaves it; on the CPU it has to be told that DeepSpeed has a backend."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def make_engine(config, make_optimizer=adamw, **options):
    """An engine and, with options, its ZClip."""
    model = make_model(dtype=torch.bfloat16 if "bf16" in config else torch.float32)
    settings = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model),
        config={**settings, "zero_allow_untested_optimizer": True, **config},
    )
    return engine, attach(engine, **options) if options else None


def batch_of(rank, step):
    return make_batch(1000 * rank + step, step in OUTLIERS)


def run(engine, clipper, rank, steps, nan=None):
    """The metrics of each step; the loss is NaN on one rank, if it is named."""
    history = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            x, y = (t.to(next(engine.parameters()).dtype) for t in batch_of(rank, step + 100 * micro))
            loss = nn.functional.mse_loss(engine(x), y)
            engine.backward(loss * math.nan if rank == nan else loss)
            engine.step()
        history.append(clipper.metrics if clipper else None)
    return history


def full_parameters(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return parameters(engine.module)


def moments(engine):
    """What the optimizer of this rank keeps, step counts as well."""
    return [v.tolist() for state in engine.basic_optimizer.state.values() for v in state.values()]


def run_by_hand(steps, config, make_optimizer=adamw, accumulate=1):
    """One process with the mean of the gradients that both ranks have, and weights in float32: metrics, parameters."""
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    model, master, clipper = make_model(dtype=dtype), make_model(dtype=dtype).float(), ZClip(**OPTIONS)
    optimizer, history = make_optimizer(master), []
    if "bf16" in config and "zero_optimization" not in config:  # DeepSpeed begins with a step of zero gradients there
        master(torch.zeros(1, 6)).mul(0).sum().backward()
        optimizer.step()
    for step in steps:
        optimizer.zero_grad()
        for rank, micro in itertools.product(range(2), range(accumulate)):
            x, y = (t.to(dtype) for t in batch_of(rank, step + 100 * micro))
            gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
            for p, g in zip(master.parameters(), gradients, strict=True):
                p.grad = g.float() / (2 * accumulate) + (0 if p.grad is None else p.grad)
        clipper.step(master)
        history.append(clipper.metrics)
        optimizer.step()
        for p, q in zip(model.parameters(), master.parameters(), strict=True):
            p.data.copy_(q.data)
    return history, parameters(model)
