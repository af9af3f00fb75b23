#!/usr/bin/env bash
# torch 2.13: a sharded checkpoint turned into one file has an optimizer state that AdamW loads and then does not use.
#
# Guessed: `dcp_to_torch_save` gives the nested dict that was saved, and `load_state_dict` raises if it cannot use it.
# Found: the whole numbers that name parameters in `state` come back as the strings "0", "1", while `params` keeps 0, 1.
# `AdamW.load_state_dict` takes the file without a warning. The next update starts with step 1 and empty moments.
#
# Seen with torch 2.13.0 (CPU), after 50 updates:
#   saved keys of state [0, 1], keys of the converted file ['0', '1'], params [0, 1]
#   after loading and one more update: step 1 (expected 51), no warning
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cd "$work"
venv/bin/python - <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(50):
    update(model, optimizer)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that one process saves alone
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id="sharded")
    dcp_to_torch_save("sharded", "one.pt")
converted = torch.load("one.pt", weights_only=True)["optimizer"]

resumed = torch.optim.AdamW(model.parameters())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    resumed.load_state_dict(converted)
    update(model, resumed)
keys, params = list(converted["state"]), converted["param_groups"][0]["params"]
step = int(resumed.state[model.weight]["step"])
print(f"torch {torch.__version__}")
print(f"saved keys of state {list(optimizer.state_dict()['state'])}, keys of the converted file {keys}, params {params}")
print(f"after loading and one more update: step {step} (expected 51), {len(caught) or 'no'} warning")
sys.exit(0 if (keys, params, step, len(caught)) == (["0", "1"], [0, 1], 1, 0) else 1)
PY
