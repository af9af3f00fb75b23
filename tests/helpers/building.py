"""Small benchmarks and runs for tests, made by PyTorch and by nothing of the code under test but the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.run import ModelConfig
from kvjax.task.benchmark import generate_benchmark

SMALL_MODEL = {"d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 40, "dropout": 0.0, "max_seq_len": 64}
STEPS = (100, 200, 300)


def small_benchmark_config(**changes: Any) -> dict[str, Any]:
    """Returns the document of a benchmark config that generates in well under a second."""
    iid = {
        "num_samples": 40,
        "active_keys": {"min": 2, "max": 3},
        "overwrite_count": {"min": 6, "max": 6},
        "num_queries": {"min": 3, "max": 4},
        "query_lag": {"min": 1, "max": 2},
    }
    ood = {
        "num_samples": 24,
        "active_keys": {"min": 3, "max": 4},
        "overwrite_count": {"min": 7, "max": 8},
        "num_queries": {"min": 4, "max": 5},
        "query_lag": {"min": 2, "max": 3},
    }
    document = {
        "benchmark_type": "symbolic_kv_stream",
        "name": "small",
        "output_dir": "unused",
        "seed": 3,
        "num_keys": 4,
        "num_values": 48,
        "holdout_answer_pair_fraction": 0.3,
        "heuristic_max_accuracy": 0.4,
        "train": iid | {"num_samples": 80},
        "validation_iid": iid,
        "test_iid": iid,
        "heldout_pairs": iid,
        "structural_ood": ood,
        "counterfactual": {"num_samples": 24, "source_split": "test_iid"},
    }
    return document | changes


def write_small_benchmark(folder: Path, **changes: Any) -> Path:
    """Writes a small benchmark and returns its directory."""
    generate_benchmark(BenchmarkConfig.model_validate(small_benchmark_config(**changes)), folder, overwrite=False)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the documents of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def random_torch_model(model: dict[str, Any], vocab_size: int, seed: int, *, tied: bool) -> TorchDecoder:
    """Returns a PyTorch decoder with random weights large enough that every component matters."""
    torch.manual_seed(seed)
    module = TorchDecoder(ModelConfig.model_validate(model), vocab_size)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "ln_" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "blocks" in name:
                parameter.mul_(2.0)
    if tied:
        module.lm_head.weight = module.token_embedding.weight
    return module


def fit_read_out(module: TorchDecoder, records: list[dict[str, Any]]) -> None:
    """Fits the unembedding to the answers by ridge regression: some answers are right, and ablations cost some."""
    states, answers = [], []
    with torch.no_grad():
        for record in records:
            trace: dict[str, list[torch.Tensor]] = {}
            module(torch.tensor([record["token_ids"]]), trace)
            for event in record["query_events"]:
                states.append(trace["final_norm"][0][0, event["positions"]["key"]])
                answers.append(record["token_ids"][event["positions"]["answer"]])
        features = torch.stack(states)
        targets = torch.nn.functional.one_hot(torch.tensor(answers), module.lm_head.weight.shape[0]).float()
        # The penalty keeps the weights, and with them rounding errors of the logits, small.
        gram = features.T @ features + 0.01 * len(features) * torch.eye(features.shape[1])
        module.lm_head.weight.copy_(torch.linalg.solve(gram, 10 * features.T @ targets).T)


def write_run(
    folder: Path, benchmark_dir: Path, *, tied: bool = False, steps: tuple[int, ...] = STEPS, **settings: Any
) -> Path:
    """Writes a run directory as the reference trainer does, with random models of growing distance from each other.

    Settings replace those of the same names in the config that `run_config` makes.
    """
    metadata = json.loads((benchmark_dir / "metadata.json").read_text())
    vocab_size = len(metadata["vocabulary"]["tokens"])
    spec = run_config(benchmark_dir) | settings
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run_config.json").write_text(json.dumps(spec))
    validation = read_lines(benchmark_dir / "validation_iid.jsonl")
    first, other = (random_torch_model(SMALL_MODEL, vocab_size, seed, tied=tied) for seed in (0, 1))
    start = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    rows = []
    for index, step in enumerate(steps):
        share = 0.3 * index
        mixed = {n: (1 - share) * start[n] + share * t for n, t in other.state_dict().items()}
        first.load_state_dict(mixed)
        if not tied:
            fit_read_out(first, validation)
        rows.append(recorded_evaluation(first, validation, step))
        save_checkpoint(folder / "checkpoints" / f"step_{step:06d}.pt", first, step, spec, metadata)
    save_checkpoint(folder / "checkpoints" / "best.pt", first, steps[-1], spec, metadata)
    (folder / "best_checkpoint.json").write_text(
        json.dumps({"path": "elsewhere/checkpoints/best.pt", "step": steps[-1], "metric": "answer_accuracy"})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_config(benchmark_dir: Path) -> dict[str, Any]:
    """Returns the document of a run's config."""
    return {
        "run_name": "small_run",
        "seed": 5,
        "device": "mps",
        "benchmark_dir": str(benchmark_dir),
        "output_dir": "elsewhere",
        "batch_size": 8,
        "num_steps": STEPS[-1],
        "log_every_steps": 50,
        "eval_every_steps": 100,
        "checkpoint_every_steps": 100,
        "num_workers": 0,
        "model": SMALL_MODEL,
        "optimization": {},
        "evaluation": {
            "batch_size": 8,
            "max_eval_batches": None,
            "max_analysis_batches": 2,
            "tracked_splits": ["validation_iid"],
            "analysis_splits": ["validation_iid"],
            "birth_thresholds": {"answer_accuracy": 0.05, "q": 0.2, "r": 0.99, "w": -100.0},
        },
        "checkpointing": {},
    }


def save_checkpoint(
    path: Path, module: TorchDecoder, step: int, spec: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Saves a checkpoint file in the reference trainer's layout."""
    torch.save(
        {
            "step": step,
            "model_state": module.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": []},
            "metrics": {},
            "config": {"train_spec": spec, "benchmark_metadata": metadata, "model_parameter_count": 0},
        },
        path,
    )


def recorded_evaluation(module: TorchDecoder, records: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Returns the row a trainer would record: answers counted by PyTorch, one record at a time."""
    right = total = 0
    with torch.no_grad():
        for record in records:
            guesses = module(torch.tensor([record["token_ids"]]))[0].argmax(-1)
            for event in record["query_events"]:
                answer = event["positions"]["answer"]
                right += int(guesses[answer - 1] == record["token_ids"][answer])
                total += 1
    return {
        "phase": "eval",
        "step": step,
        "split": "validation_iid",
        "answer_accuracy": right / total,
        "num_examples": total,
    }


def as_numpy(module: TorchDecoder) -> dict[str, np.ndarray]:
    """Returns a module's state as the arrays a converter reads."""
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}
