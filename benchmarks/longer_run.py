"""Makes a run of many checkpoints from one of few."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from kvjax.artifacts.run_dir import RunDir


def longer_run(run: RunDir, copies: int, target: Path) -> RunDir:
    """Writes a run that holds every checkpoint of another `copies` times, with other bytes each time."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.copyfile(run.path / "run_config.json", target / "run_config.json")
    for index, (step, path) in enumerate(run.checkpoints.items()):
        document = torch.load(path, weights_only=True)
        for copy in range(copies):
            document["step"] = step + copy
            document["model_state"]["final_norm.bias"][0] += 1e-6 * (index + copy + 1)
            torch.save(document, target / "checkpoints" / f"step_{step + copy:06d}.pt")
    return RunDir.open(target)
