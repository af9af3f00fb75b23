#!/usr/bin/env bash
# torch 2.13: asking a fresh AdamW for its state makes an update, and every later update of the run differs.
#
# Guessed: `get_optimizer_state_dict` before the first update returns an empty state and leaves training as it was.
# Found: it runs `optimizer.step()` with zero gradients and learning rate 0, to have moments to return. The moments are zero,
# but the count of AdamW's bias correction stays at 1. The first real update is corrected as a second one and moves the
# weights by 0.74 of the learning rate instead of 1. A trainer that saves step 0 by this function trains another model
# than one that does not, and its checkpoint of step 3 says `step` 4.
#
# Seen with torch 2.13.0 (CPU), learning rate 0.1, no weight decay:
#   first update without the call -0.1000, with it -0.0744
#   `step` after 3 updates without the call 3, with it 4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PY'
import sys

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def train(*, save_step_0):
    """Makes three updates; returns how far the first one moved the weight, and the step that AdamW counted."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    if save_step_0:
        get_optimizer_state_dict(model, optimizer)
    assert model.weight.item() == 1, "the call itself has to leave the weights alone"
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        before = model.weight.item()
        model(torch.ones(1, 1)).sum().backward()  # a gradient of 1 throughout
        optimizer.step()
        moved.append(model.weight.item() - before)
    return moved[0], int(optimizer.state[model.weight]["step"])


plain, plain_step = train(save_step_0=False)
saved, saved_step = train(save_step_0=True)
# Bias correction of a second update over moments that hold one gradient: (0.1 / 0.19) / sqrt(0.001 / 0.001999).
expected = -0.1 * (0.1 / (1 - 0.9**2)) / (0.001 / (1 - 0.999**2)) ** 0.5
print(f"torch {torch.__version__}")
print(f"first update without the call {plain:.4f}, with it {saved:.4f}")
print(f"`step` after 3 updates without the call {plain_step}, with it {saved_step}")
same = abs(plain + 0.1) < 1e-6 and abs(saved - expected) < 1e-6 and (plain_step, saved_step) == (3, 4)
sys.exit(0 if same else 1)
PY
