"""DeepSpeed's own engines on two gloo ranks on the CPU, beside one process that clips by hand and the bare engine."""

import pytest
import torch
from deepspeed_training import (
    BF16_ENGINES,
    ENGINES,
    OPTIONS,
    OUTLIERS,
    STEPS,
    as_launched,
    full_parameters,
    make_engine,
    run,
    run_by_hand,
)

def check_against_one_process(rank, config, rel, atol):
    with as_launched(rank):
        engine, clipper = make_engine(config, **OPTIONS)
        history = run(engine, clipper, rank, range(STEPS))
        dtype = torch.bfloat16 if "bf16" in config else torch.float32
        expected, params = run_by_hand(range(STEPS), dtype=dtype)
        norms = [m.grad_norm for m in history], [m.grad_norm for m in expected]
        print(config, max(abs(a/b-1) for a,b in zip(*norms)), (full_parameters(engine)-params).abs().max(), flush=True)
        return max(abs(a/b-1) for a,b in zip(*norms)), (full_parameters(engine)-params).abs().max(), [i for i,m in enumerate(history) if m.clipped], [i for i,m in enumerate(expected) if m.clipped]

@pytest.mark.parametrize("name", [*ENGINES, *BF16_ENGINES])
def test_one(two, name):
    print(name, two.run(check_against_one_process, {**ENGINES,**BF16_ENGINES}[name], 0, 0)[0])
