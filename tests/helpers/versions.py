"""What releases of torch lack or do wrong by themselves, seen with bare torch: marks with the reason, and substitutes."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def needs_torch(*release, reason):
    return pytest.mark.skipif(TORCH < release, reason=f"torch {torch.__version__}, without ZClip: {reason}")


needs_muon = needs_torch(2, 9, reason="torch.optim has no Muon")

# `fully_shard(nn.Linear(6, 8))` and a backward over two gloo processes: 2.6 raises AttributeError in the forward pass,
# "'Stream' object has no attribute 'record_event'"; in 2.7 the gradients are twice those of one process.
needs_fsdp2_on_cpu = needs_torch(2, 9, reason="fully_shard on the CPU raises, or its gradients are twice too large")


def on_fsdp2(*values):
    """A case of a parametrized test that trains with FSDP2."""
    return pytest.param(*values, marks=needs_fsdp2_on_cpu)


# What torch says of its own calls, some releases more than others.
TORCHS_OWN_WARNINGS = [
    "DTensor random operators may not have complete support on cpu device mesh",  # 2.6: any distribute_tensor
]


class _Sgd(torch.optim.SGD):
    """For tests of several optimizers, which want one for the matrices, whatever it computes."""


_Sgd.__name__ = "Muon"
Muon = getattr(torch.optim, "Muon", _Sgd)
