"""The architecture of the checkpoints in PyTorch, written from docs/definitions.md, "Stages and components".

It shares no code with the Flax decoder, so that agreement of the two certifies a conversion.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from kvjax.config.run import ModelConfig


class TorchAttention(nn.Module):
    """Causal multi-head self-attention; padded keys are never attended to."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.n_heads = model.n_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(model.d_model, model.d_model))

    def forward(self, x: torch.Tensor, key_is_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, width = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, length, self.n_heads, width // self.n_heads).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.n_heads)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal[None, None] & key_is_token[:, None, None, :]
        pattern = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return self.out_proj((pattern @ v).transpose(1, 2).reshape(batch, length, width)), pattern


class TorchMlp(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.fc_in = nn.Linear(model.d_model, model.d_ff)
        self.fc_out = nn.Linear(model.d_ff, model.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_out(nn.functional.gelu(self.fc_in(x)))


class TorchBlock(nn.Module):
    """One pre-LayerNorm layer."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(model.d_model)
        self.attn = TorchAttention(model)
        self.ln_2 = nn.LayerNorm(model.d_model)
        self.ff = TorchMlp(model)


class TorchDecoder(nn.Module):
    """The decoder, with the tensor names of `model_state`. The unembedding is a tensor of its own, also if tied."""

    def __init__(self, model: ModelConfig, vocab_size: int, *, pad_id: int = 0):
        super().__init__()
        self.pad_id = pad_id
        self.token_embedding = nn.Embedding(vocab_size, model.d_model)
        self.position_embedding = nn.Embedding(model.max_seq_len, model.d_model)
        self.blocks = nn.ModuleList(TorchBlock(model) for _ in range(model.n_layers))
        self.final_norm = nn.LayerNorm(model.d_model)
        self.lm_head = nn.Linear(model.d_model, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, trace: dict[str, list[torch.Tensor]] | None = None) -> torch.Tensor:
        """Computes logits [B, T, V]; if `trace` is given, appends each layer's activations to it by name."""
        key_is_token = tokens != self.pad_id
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        seen = trace if trace is not None else {}
        seen.setdefault("embedding", []).append(x)
        for block in self.blocks:
            attn_out, pattern = block.attn(block.ln_1(x), key_is_token)
            x = x + attn_out
            seen.setdefault("pattern", []).append(pattern)
            seen.setdefault("post_attn", []).append(x)
            mlp_out = block.ff(block.ln_2(x))
            x = x + mlp_out
            seen.setdefault("mlp_out", []).append(mlp_out)
            seen.setdefault("post_mlp", []).append(x)
        x = self.final_norm(x)
        seen.setdefault("final_norm", []).append(x)
        return self.lm_head(x)
