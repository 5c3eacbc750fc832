"""The sizes that a run can have: a model's shape, and what a training of that size usually takes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.training.llama import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A size; steps, learning rate, batch and share of warm-up are defaults that a command's options replace."""

    model: ModelConfig
    steps: int
    lr: float  # peak
    batch: int  # windows per step
    warmup_share: float  # of the steps
    micro_batch: int | None = None  # windows per forward pass and process; None for all at once
    fused: bool = False  # AdamW in one kernel
    bf16: bool = False  # autocast; parameters and optimizer stay float32


TOKENS_1B = 2048 * 2048  # per step
WARMUP_1B = 2_000_000_000 / TOKENS_1B  # steps
STEPS_1B = 11_921  # 50 B tokens

PRESETS = {
    "pico": Preset(
        ModelConfig(hidden=64, ffn=192, n_layers=2, n_heads=4, n_kv_heads=4, vocab=256, context=64),
        steps=500,
        lr=2e-3,
        batch=8,
        warmup_share=0.1,
        fused=True,
    ),
    "nano": Preset(
        ModelConfig(hidden=128, ffn=384, n_layers=4, n_heads=4, n_kv_heads=4, vocab=256, context=64),
        steps=500,
        lr=2e-3,
        batch=16,
        warmup_share=0.1,
    ),
    "small": Preset(
        ModelConfig(hidden=512, ffn=1408, n_layers=8, n_heads=8, n_kv_heads=8, vocab=256, context=512),
        steps=2_000,
        lr=1e-3,
        batch=64,
        warmup_share=0.1,
        micro_batch=32,
        fused=True,
        bf16=True,
    ),
    # arXiv:2504.02507, Tables 1 and 4, but for two things: bytes, which use 256 of the 65,536 tokens, stand in for a
    # tokenizer, and --data (at most 64 MiB of it) for the paper's text. Its parameters are counted in a test; it has
    # not been trained.
    "paper-1b": Preset(
        ModelConfig(hidden=2048, ffn=5440, n_layers=16, n_heads=16, n_kv_heads=16, vocab=65_536, context=2048),
        steps=STEPS_1B,
        lr=3e-3,
        batch=2048,
        warmup_share=WARMUP_1B / STEPS_1B,
        micro_batch=4,
        fused=True,
        bf16=True,
    ),
}
