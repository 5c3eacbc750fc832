"""Import this before torchtitan: makes its Trainer run on the CPU, with gloo and torch 2.13. A shim for tests, no more.

torchtitan 0.3.0 takes the machine for one of CUDA if it has no accelerator, imports Triton for the kernels of a backend
that is not used here, and is written for a torch after 2.13, whose `set_timeout` and schedules of microbatches it
calls. Its parallelism `spmd_types`, the default, needs that torch too; the other two run.
"""

import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils

KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"


class Cpu:
    """The functions of ``torch.cuda`` that torchtitan calls."""

    set_device = reset_peak_memory_stats = staticmethod(lambda device=None: None)
    synchronize = empty_cache = staticmethod(lambda: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda device: "cpu")
    get_device_properties = staticmethod(lambda device: SimpleNamespace(total_memory=1))
    memory_stats = staticmethod(lambda device: defaultdict(int))


class Kernels(ModuleType):
    """Has every name that is imported from it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


utils.device_type, utils.device_module = "cpu", Cpu
sys.modules[KERNELS] = Kernels(KERNELS)
dist.set_timeout = distributed_c10d._set_pg_timeout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of what it deprecates, where torchtitan compiles its attention
    import torchtitan.trainer
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models import deepseek_v3, llama3
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention

torchtitan.trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)  # two at the end


def debug_model(layers, experts=False):
    """The debug model of Llama 3 or DeepSeek V3, with so many layers, and an attention that is not compiled."""
    spec = (deepseek_v3 if experts else llama3).model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:layers]
    for _, _, attention, name in spec.model.traverse(FlexAttention.Config):
        setattr(attention, name, ScaledDotProductAttention.Config())
    spec.parallelize_fn = reducing_as_gloo_can(spec.parallelize_fn)
    spec.pipelining_fn = stepping_as_torch_can(spec.pipelining_fn)
    return spec


def reducing_as_gloo_can(parallelize):
    """Gloo has no sums that multiply first."""

    def parallelized(*args, **options):
        model = parallelize(*args, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelized


def stepping_as_torch_can(pipeline):
    """torch 2.13's schedules split whole batches into microbatches themselves."""

    def pipelined(*args, **options):
        schedule, *others = pipeline(*args, **options)
        step = schedule.step

        def step_of_whole_batches(*, arg_mbs, kwarg_mbs, target_mbs, **kwargs):
            inputs = () if arg_mbs is None else (torch.cat([inputs for (inputs,) in arg_mbs]),)
            return step(*inputs, target=None if target_mbs is None else torch.cat(target_mbs), **kwargs)

        schedule.step = step_of_whole_batches
        return schedule, *others

    return pipelined


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, tokenizer_path):
        super().__init__()

    encode = decode = get_vocab_size = None


class RandomTokens(BaseDataLoader):
    """Other ones for each batch and data-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, dp_world_size, seq_len, local_batch_size, **others):
        self.rank, self.size, self.batch = dp_rank, dp_world_size, 0
        self.shape = local_batch_size, seq_len + 1

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.batch * self.size + self.rank)
            self.batch += 1
            tokens = torch.randint(2048, self.shape, generator=generator)
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self):
        return {f"batch{self.rank}": self.batch}

    def load_state_dict(self, state_dict):
        self.batch = state_dict[f"batch{self.rank}"]


class SpikyLoss(CrossEntropyLoss):
    """50 times as large, and its gradients with it, at the steps in `spikes` of the `trainer` that it is given."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        pass

    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        return loss * (50.0 if self.trainer.step in self.spikes else 1.0), metrics


class Rows(MetricsProcessor):
    """Keeps what torchtitan would log."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        self.rows = [*getattr(self, "rows", []), (step, global_avg_loss, grad_norm)]
