"""What releases of torch lack or do wrong by themselves, seen with bare torch: marks with their reason, substitutes.

All tests pass with Python 3.10 and torch 2.6.0, 3.11 and 2.13.0, 3.13 and 2.15.0. Left out is what a release cannot do:
FSDP2 on a CPU (to 2.8), uneven shards of FSDP2 over tensor parallelism (to 2.7), `torch.optim.Muon` (to 2.8). With
2.7.1 and 2.9.1 the tests were run in part; pipeline stages over gloo are left out there as well (2.9).
"""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def needs_torch(*release, reason):
    return pytest.mark.skipif(release > TORCH, reason=f"torch {torch.__version__}, without ZClip: {reason}")


needs_muon = needs_torch(2, 9, reason="torch.optim has no Muon")

# `fully_shard(nn.Linear(6, 8))` and a backward over two gloo processes: 2.6 raises AttributeError in the forward pass,
# "'Stream' object has no attribute 'record_event'"; in 2.7 the gradients are twice those of one process.
needs_fsdp2_on_cpu = needs_torch(2, 9, reason="fully_shard on the CPU raises, or its gradients are twice too large")

# `fully_shard` of a parallelized module over 1,024 ranks: "FSDP+TP sharding does not support uneven sharding for now".
needs_uneven_shards = needs_torch(2, 8, reason="FSDP2 over tensor parallel wants shards of equal size")

# To 2.9 its one all-reduce is of 4 bytes, however many parameters there are, and two meshes give "Sharding propagation
# failed" for "must have the same mesh". Releases between 2.9 and 2.13 have not been tried.
needs_norms_of_dtensors = needs_torch(2, 10, reason="clip_grad_norm_ of DTensors sums over ranks in another form")

# Two stages over gloo, without an optimizer: "gloo::EnforceNotMet, op.preamble.length <= op.nbytes. 8 vs 4" ends the
# process while the stages tell each other their shapes; 2.6, 2.7, 2.13 and 2.15 train.
needs_pipeline_on_gloo = pytest.mark.skipif(
    TORCH == (2, 9), reason=f"torch {torch.__version__}, without ZClip: pipeline stages over gloo end in an abort"
)


def on_fsdp2(*values):
    """A case of a parametrized test that trains with FSDP2."""
    return pytest.param(*values, marks=needs_fsdp2_on_cpu)


# What torch says of its own calls, some releases more than others.
TORCHS_OWN_WARNINGS = [
    "DTensor random operators may not have complete support on cpu device mesh",  # 2.6: any distribute_tensor
    "torch.distributed is (disabled, )?unavailable or uninitialized",  # a checkpoint of one process
    "The epoch parameter in .scheduler.step... was not necessary",  # 2.6: SequentialLR's own call
    "Skipping serialization of skipfiles_inline_module_allowlist",  # 2.6: inductor's first compilation
    "Guards may run slower on Python 3.13.0",  # dynamo, of that Python alone
    "Deallocating Tensor that still has live PyObject references",  # 2.7, 2.9: training with FSDP1
    "TypedStorage is deprecated",  # torch.distributed.checkpoint's own use of it
]


class _Sgd(torch.optim.SGD):
    """For tests of several optimizers, which want one for the matrices, with a state, whatever it computes."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr, momentum=0.9)


_Sgd.__name__ = "Muon"
Muon = getattr(torch.optim, "Muon", _Sgd)
