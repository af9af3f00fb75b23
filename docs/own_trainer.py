"""Trains a small decoder in plain PyTorch and saves a run directory that kvjax reads: a checkpoint every 100 steps.

python docs/own_trainer.py data/benchmark runs/mine
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

MODEL = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "max_seq_len": 64}


class Attention(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(d_model, d_model))

    def forward(self, x):
        split = [p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, d_model, width):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(d_model, width), nn.Linear(width, d_model)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x)))


class Block(nn.Module):
    def __init__(self, d_model, heads, width):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(d_model), Attention(d_model, heads)
        self.ln_2, self.ff = nn.LayerNorm(d_model), Mlp(d_model, width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.ff(self.ln_2(x))


class Decoder(nn.Module):
    def __init__(self, vocabulary, d_model, n_layers, n_heads, d_ff, max_seq_len):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.final_norm(x))


flags = argparse.ArgumentParser()
flags.add_argument("benchmark_dir", type=Path)
flags.add_argument("run_dir", type=Path)
flags.add_argument("--steps", type=int, default=1600)
flags.add_argument("--save_every", type=int, default=100)
given = flags.parse_args()

torch.manual_seed(7)
tokens = json.loads((given.benchmark_dir / "metadata.json").read_text())["vocabulary"]["tokens"]
streams = [json.loads(line)["token_ids"] for line in (given.benchmark_dir / "train.jsonl").open()]
data = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in streams], batch_first=True, padding_value=0)
model = Decoder(len(tokens), **MODEL)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)

checkpoints = given.run_dir / "checkpoints"
checkpoints.mkdir(parents=True)
config = {
    "run_name": given.run_dir.name,
    "seed": 7,
    "benchmark_dir": str(given.benchmark_dir.resolve()),
    "num_steps": given.steps,
    "checkpoint_every_steps": given.save_every,
    "model": MODEL,
    "evaluation": {"batch_size": 128, "birth_thresholds": {"answer_accuracy": 0.9}},
}
(given.run_dir / "run_config.json").write_text(json.dumps(config, indent=2))

for step in range(1, given.steps + 1):
    optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 100)
    batch = data[torch.randint(len(data), (64,))]
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % given.save_every == 0:
        saved = {"step": step, "model_state": model.state_dict(), "optimizer_state": optimizer.state_dict()}
        torch.save(saved, checkpoints / f"step_{step:06d}.pt")
        print(f"step {step}  loss {loss.item():.3f}", flush=True)
