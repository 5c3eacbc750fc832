"""The Trainer and Accelerate on DeepSpeed, on two gloo ranks on the CPU."""

import pytest
import torch
from deepspeed_training import ENGINES, OPTIONS, STEPS, as_launched, batch_of, full_parameters, run, run_by_hand
from torch import nn
from training import make_model

import accelerate, transformers
from accelerate.state import AcceleratorState, PartialState
from zclip_optim.integrations.transformers import ZClipCallback, attach_deepspeed
import contextlib, os
from transformers import Trainer, TrainingArguments

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = make_model()

    def forward(self, x, y):
        return {"loss": nn.functional.mse_loss(self.layers(x), y)}


class Rows(torch.utils.data.Dataset):
    """What the ranks get of it, the Trainer's sampler in order: a batch for each, in turn."""

    def __len__(self):
        return STEPS * 2 * 8

    def __getitem__(self, i):
        batch, row = divmod(i, 8)
        x, y = batch_of(batch % 2, batch // 2)
        return {"x": x[row], "y": y[row]}


def make_trainer(folder, stage, **options):
    config = {
        "zero_optimization": {"stage": stage},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
    }
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", "learning_rate": 1e-2,
        "weight_decay": 0.01, "train_sampling_strategy": "sequential", **options,
    }
    model = Model()
    return Trainer(model, TrainingArguments(folder, deepspeed=config, **arguments), train_dataset=Rows())

def check(rank, folder, stage):
    with as_launched(rank):
        t = make_trainer(folder, stage)
        c = attach_deepspeed(t, **OPTIONS)
        ZClipCallback.attach(t)
        t.train()
        expected, params = run_by_hand(range(STEPS), {})
        print([r.get("zclip/grad_norm") for r in t.state.log_history])
        print([m.grad_norm for m in expected])
        print(t.state.log_history[-2:], t.accelerator.distributed_type)
        assert 0

@pytest.mark.parametrize("stage", [2])
def test_it(two, tmp_path, stage):
    two.run(check, str(tmp_path), stage)
