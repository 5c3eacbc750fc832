"""Models that are not LLaMA: pre-norm transformers with LayerNorm, GELU and learned positions, for text and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.training.llama import ModelConfig

INIT_STD = 0.02


def encoder(hidden: int, ffn: int, n_layers: int, n_heads: int) -> nn.ModuleList:
    """torch's own pre-norm blocks, without dropout."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            hidden, n_heads, ffn, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(n_layers)
    )


def init_weights(model: nn.Module) -> None:
    """Normal weights with INIT_STD, biases 0; the scales of the norms are 1 from the start."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=INIT_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class GPT2(nn.Module):
    """Token ids (batch, positions) to logits (batch, positions, vocab); the head is tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Parameter(torch.empty(config.context, config.hidden))
        self.blocks = encoder(config.hidden, 4 * config.hidden, config.n_layers, config.n_heads)
        self.norm = nn.LayerNorm(config.hidden)
        init_weights(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        positions = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(positions, device=tokens.device)
        x = self.embedding(tokens) + self.position[:positions]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x) @ self.embedding.weight.T


class VisionTransformer(nn.Module):
    """Square grey images (batch, side, side) to logits (batch, classes): patches, a class token, learned positions."""

    def __init__(
        self,
        side: int = 8,
        patch: int = 2,
        classes: int = 10,
        hidden: int = 64,
        ffn: int = 256,
        n_layers: int = 4,
        n_heads: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, hidden, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.position = nn.Parameter(torch.empty((side // patch) ** 2 + 1, hidden))
        self.blocks = encoder(hidden, ffn, n_layers, n_heads)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        patches = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(images), -1, -1), patches), dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
