"""An independent measurement of a run: PyTorch, one unpadded sequence and one read at a time, plain loops.

Nothing here comes from the code under test: positions are found by walking the tokens, the model is PyTorch's, and
means are Python sums. docs/definitions.md is what both sides implement.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchBlock, TorchDecoder
from torch.utils.hooks import RemovableHandle

from kvjax.config.run import ModelConfig

ROLES = {"W": ("op_write", "key_write", "value_write"), "R": ("op_read", "key_read", "value_answer")}


def load_module(path: Path, model: dict[str, Any], vocab_size: int) -> TorchDecoder:
    """Returns a checkpoint file as a PyTorch module."""
    module = TorchDecoder(ModelConfig.model_validate(model), vocab_size)
    module.load_state_dict(torch.load(path, weights_only=True)["model_state"])
    return module


def roles_of(tokens: list[str]) -> list[str | None]:
    """Returns every token's role; the first has none."""
    return [None, *(role for at in range(1, len(tokens) - 1, 3) for role in ROLES[tokens[at]]), "eos"]


def reads_of(tokens: list[str]) -> list[dict[str, Any]]:
    """Returns every read with the positions it is about, by walking the stream."""
    writes: dict[str, list[int]] = {}
    values: list[tuple[int, str]] = []  # position and key of each value token so far
    copies: dict[int, list[int]] = {}  # write's value position -> answers that returned it
    found = []
    for op_at in range(1, len(tokens) - 1, 3):
        op, key, at = tokens[op_at], tokens[op_at + 1], op_at + 2
        if op == "W":
            writes.setdefault(key, []).append(at)
        else:
            support = writes[key][-1]
            stale = writes[key][-2] if len(writes[key]) > 1 else None
            found.append(
                {
                    "predict": at - 1,
                    "answer": at,
                    "support": support,
                    "current": [support, *copies.get(support, [])],
                    "stale": [stale, *copies.get(stale, [])] if stale is not None else [],
                    "of_key": [p for p, k in values if k == key],
                    "of_any": [p for p, _ in values],
                    "of_null": [p for p, k in values if k == null_key(tokens[:at])],
                }
            )
            copies.setdefault(support, []).append(at)
        values.append((at, key))
    return found


def null_key(tokens: list[str]) -> str | None:
    """Returns the other key that the last token, a key that is read, is compared with."""
    others = sorted({tokens[at] for at in range(2, len(tokens) - 1, 3) if tokens[at] != tokens[-1]})
    return others[zlib.crc32(" ".join(tokens).encode("ascii")) % len(others)] if others else None


def margin(logits: torch.Tensor, answer: int, value_ids: list[int]) -> float:
    return float(logits[answer] - max(logits[v] for v in value_ids if v != answer))


def fixed_margins(reads: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    """Returns each read's answer logit minus that of the value that is second to the answer in the reference's."""
    margins = []
    for read, final in zip(reads, reference, strict=True):
        others = {v: x for v, x in final["value_logits"].items() if v != final["answer"]}
        rival = max(others, key=lambda v: others[v])
        margins.append(read["value_logits"][read["answer"]] - read["value_logits"][rival])
    return margins


def best(logits: torch.Tensor, ids: list[int]) -> int:
    return max(ids, key=lambda i: float(logits[i]))


def attention_of_read(patterns: list[list], read: dict[str, Any]) -> dict[tuple[int, int], dict[str, float]]:
    """Returns (layer, head) -> attention of one read, from each layer's [H, T, T] pattern."""
    result = {}
    for layer, pattern in enumerate(patterns):
        for head, rows in enumerate(pattern):
            row = rows[read["predict"]]
            result[layer, head] = {
                "query_attention": float(row[read["predict"]]),
                "support_attention": float(row[read["support"]]),
                "current_value_attention": float(sum(row[p] for p in read["current"])),
                "stale_attention": float(sum(row[p] for p in read["stale"])) if read["stale"] else None,
                "binding_attention": float(rows[read["support"]][read["support"] - 1]),
                "attention_entropy": -sum(float(p) * math.log(float(p)) for p in row if p > 0),
                "of_key": float(sum(row[p] for p in read["of_key"])),
                "of_any": float(sum(row[p] for p in read["of_any"])),
                "of_null": float(sum(row[p] for p in read["of_null"])),
            }
            of = result[layer, head]
            seen, any_null = of["of_any"] >= 1e-6, bool(read["of_null"])
            of["key_selectivity"] = of["of_key"] / of["of_any"] if seen else None
            of["key_selectivity_null"] = of["of_null"] / of["of_any"] if seen and any_null else None
            of["recency_selectivity"] = of["current_value_attention"] / of["of_key"] if of["of_key"] >= 1e-6 else None
    return result


def attention_scores(module: TorchDecoder, batch: torch.Tensor, rank: int | None = None) -> list[torch.Tensor]:
    """Returns each layer's scores before the softmax, [H, T, T], of one sequence.

    With a rank, every head's whole W_QK is cut to that many singular directions, and its query bias reaches the keys
    through the same directions; terms that are equal for all keys are left out.
    """
    inputs: list[torch.Tensor] = []
    hooks = [block.ln_1.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for block in module.blocks]
    module(batch)
    for hook in hooks:
        hook.remove()
    found = []
    for block, x in zip(module.blocks, inputs, strict=True):
        attn, norm = block.attn, block.ln_1
        width = attn.q_proj.out_features // attn.n_heads
        of_layer = []
        for head in range(attn.n_heads):
            rows = slice(head * width, (head + 1) * width)
            if rank is None:
                q, k = attn.q_proj(norm(x))[:, rows], attn.k_proj(norm(x))[:, rows]
                of_layer.append(q @ k.T / math.sqrt(width))
                continue
            gain = torch.diag(norm.weight)
            matrix = gain @ attn.q_proj.weight[rows].T @ attn.k_proj.weight[rows] @ gain
            u, s, vh = torch.linalg.svd(matrix)
            cut = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
            bias = attn.q_proj.weight[rows] @ norm.bias + attn.q_proj.bias[rows]
            towards = bias @ attn.k_proj.weight[rows] @ gain @ vh[:rank].T @ vh[:rank]
            plain = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
            of_layer.append((plain @ cut + towards) @ plain.T / math.sqrt(width))
        found.append(torch.stack(of_layer))
    return found


def separation(scores_TxT: torch.Tensor, read: dict[str, Any]) -> float | None:
    """Returns a read's score of the support minus the mean score of the other values, None if there are none."""
    row, others = scores_TxT[read["predict"]], [p for p in read["of_any"] if p != read["support"]]
    return float(row[read["support"]]) - sum(float(row[p]) for p in others) / len(others) if others else None


def lens(module: TorchDecoder, trace: dict[str, list[torch.Tensor]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns stage -> (states [T, D], lens logits [T, V]) of one sequence."""
    stages = {"embedding": trace["embedding"][0]}
    for layer, (a, b) in enumerate(zip(trace["post_attn"], trace["post_mlp"], strict=True)):
        stages |= {f"layer_{layer}_post_attn": a, f"layer_{layer}_post_mlp": b}
    read_out = {name: (x[0], module.lm_head(module.final_norm(x[0]))) for name, x in stages.items()}
    final = trace["final_norm"][0][0]
    return {**read_out, "final_norm": (final, module.lm_head(final))}


@torch.no_grad()
def measure(
    module: TorchDecoder,
    records: list[dict[str, Any]],
    vocabulary: dict[str, list[str]],
    *,
    fit: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns per-read and per-token measurements of a checkpoint: `reads` and `tokens`, lists of flat dictionaries."""
    id_of = {token: i for i, token in enumerate(vocabulary["tokens"])}
    value_ids = [id_of[v] for v in vocabulary["value_tokens"]]
    key_ids = [id_of[k] for k in vocabulary["key_tokens"]]
    means = None if fit is None else role_means(module, fit, vocabulary)
    reads, tokens = [], []
    for record in records:
        names = record["tokens"]
        ids = [id_of[name] for name in names]
        batch = torch.tensor([ids])
        trace: dict[str, list[torch.Tensor]] = {}
        logits = module(batch, trace)[0]
        log_probs = logits.log_softmax(-1)
        roles = roles_of(names)
        for t in range(1, len(ids)):
            right = int(logits[t - 1].argmax()) == ids[t]
            loss = -float(log_probs[t - 1, ids[t]])
            tokens.append({"split": record["split"], "role": roles[t], "right": right, "loss": loss})
        stages = lens(module, trace)
        ablated = {"ablated": ablations(module, batch)}
        if means is not None:
            ablated["role_mean_ablated"] = role_mean_ablations(module, names, batch, means)
        patterns = [pattern[0].tolist() for pattern in trace["pattern"]]
        scores = attention_scores(module, batch)
        for index, read in enumerate(reads_of(names)):
            at, answer, key = read["predict"], ids[read["answer"]], ids[read["predict"]]
            probs = logits[at].softmax(-1)
            attention = attention_of_read(patterns, read)
            shares = {h: a["of_key"] / a["of_any"] for h, a in attention.items() if a["of_any"] >= 1e-6}
            chosen = max(shares, key=lambda h: shares[h]) if shares else None
            key_part = attention[chosen]["of_key"] if chosen else 0.0
            reads.append(
                {
                    "split": record["split"],
                    "sample_id": record["sample_id"],
                    "axes": record["axes"]
                    | {
                        "writes_since_support": record["query_events"][index]["writes_since_support"],
                        "tokens_since_support": read["answer"] - read["support"],
                        "slot_after_write": record["query_events"][index]["slot_after_write"],
                        "earlier_answers": str(copies) if (copies := len(read["current"]) - 1) < 2 else "2+",
                        "tokens_since_copy": read["answer"] - max(read["current"]),
                    },
                    "correct": int(logits[at].argmax()) == answer,
                    "margin": margin(logits[at], answer, value_ids),
                    "answer": answer,
                    "value_logits": {v: float(logits[at, v]) for v in value_ids},
                    "answer_loss": -float(log_probs[at, answer]),
                    "answer_logit": float(logits[at, answer]),
                    "answer_logit_centred": float(logits[at, answer] - logits[at, value_ids].mean()),
                    "entropy": -float(sum(p * p.log() for p in probs if p > 0)),
                    "confidence": float(probs[answer]),
                    "q": max(a["query_attention"] for a in attention.values()),
                    "r": max(a["support_attention"] for a in attention.values()),
                    "key_selectivity": shares[chosen] if chosen else None,
                    "key_selectivity_null": max(
                        (
                            a["key_selectivity_null"]
                            for a in attention.values()
                            if a["key_selectivity_null"] is not None
                        ),
                        default=None,
                    ),
                    "recency_selectivity": (
                        attention[chosen]["current_value_attention"] / key_part if key_part >= 1e-6 else None
                    ),
                    "attention": attention,
                    "separation": {(i, j): separation(scores[i][j], read) for i, j in attention},
                    "state": {stage: x[at].numpy().astype(np.float64) for stage, (x, _) in stages.items()},
                    "support_state": {
                        stage: x[read["support"]].numpy().astype(np.float64) for stage, (x, _) in stages.items()
                    },
                    "lens_answer": {s: best(x[at], value_ids) == answer for s, (_, x) in stages.items()},
                    "lens_key": {s: best(x[at], key_ids) == key for s, (_, x) in stages.items()},
                    "lens_support": {s: best(x[read["support"]], value_ids) == answer for s, (_, x) in stages.items()},
                    "lens_margin": {s: margin(x[at], answer, value_ids) for s, (_, x) in stages.items()},
                    "write_norm": [float(x[0, at].norm()) for x in trace["mlp_out"]],
                    "write_norm_support": [float(x[0, read["support"]].norm()) for x in trace["mlp_out"]],
                    **{
                        kind: {
                            component: {
                                "correct": int(x[at].argmax()) == answer,
                                "margin": margin(x[at], answer, value_ids),
                            }
                            for component, x in by_component.items()
                        }
                        for kind, by_component in ablated.items()
                    },
                }
            )
    return {"reads": reads, "tokens": tokens}


def ablations(module: TorchDecoder, batch: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Returns (layer, head) or (layer,) -> logits [T, V] with that head or MLP zeroed."""
    return _with_each_replaced(module, batch, lambda component, output: torch.zeros_like(output))


def role_mean_ablations(
    module: TorchDecoder, tokens: list[str], batch: torch.Tensor, means: dict[tuple[int, ...], dict[str | None, Any]]
) -> dict[tuple[int, ...], torch.Tensor]:
    """Returns the same with that head's z, or that MLP's output, at its mean for the role of each token."""
    roles = roles_of(tokens)
    return _with_each_replaced(
        module, batch, lambda component, output: torch.stack([means[component][role] for role in roles])[None]
    )


@torch.no_grad()
def role_means(
    module: TorchDecoder, records: list[dict[str, Any]], vocabulary: dict[str, list[str]]
) -> dict[tuple[int, ...], dict[str | None, torch.Tensor]]:
    """Returns (layer, head) or (layer,) -> role -> mean z or MLP output over the tokens of all records."""
    id_of = {token: i for i, token in enumerate(vocabulary["tokens"])}
    sums: dict[tuple[int, ...], dict[str | None, list[torch.Tensor]]] = {}

    def keep(component: tuple[int, ...], output: torch.Tensor, roles: list[str | None]) -> torch.Tensor:
        for role, at_token in zip(roles, output[0], strict=True):
            sums.setdefault(component, {}).setdefault(role, []).append(at_token.clone())
        return output

    for record in records:
        kept = functools.partial(keep, roles=roles_of(record["tokens"]))
        handles = [hook(module, component, kept) for component in _components(module)]
        module(torch.tensor([[id_of[token] for token in record["tokens"]]]))
        for handle in handles:
            handle.remove()
    return {c: {role: torch.stack(x).mean(dim=0) for role, x in of_roles.items()} for c, of_roles in sums.items()}


Replace = Callable[[tuple[int, ...], torch.Tensor], torch.Tensor]


def _with_each_replaced(module: TorchDecoder, batch: torch.Tensor, replace: Replace) -> dict[tuple[int, ...], Any]:
    """Runs one copy of a sequence for each component, which is replaced in that copy alone."""
    components = _components(module)

    def in_own_copy(component: tuple[int, ...], output: torch.Tensor) -> torch.Tensor:
        copy, changed = components.index(component), output.clone()
        changed[copy] = replace(component, output[copy : copy + 1])[0]
        return changed

    with contextlib.ExitStack() as hooks:
        for component in components:
            hooks.enter_context(hook(module, component, in_own_copy))
        logits = module(batch.expand(len(components), -1))
    return dict(zip(components, logits, strict=True))


def _components(module: TorchDecoder) -> list[tuple[int, ...]]:
    """Lists (layer, head) of every head and (layer,) of every MLP."""
    found: list[tuple[int, ...]] = []
    for layer, block in enumerate(module.blocks):
        found += [*((layer, head) for head in range(block.attn.n_heads)), (layer,)]
    return found


def hook(module: TorchDecoder, component: tuple[int, ...], replace: Replace) -> RemovableHandle:
    """Puts `replace(component, output)` in place of a head's z or an MLP's output, until the handle is removed."""
    block = module.blocks[component[0]]
    if len(component) == 1:
        return block.ff.register_forward_hook(lambda mlp, args, output: replace(component, output))
    width = block.attn.out_proj.in_features // block.attn.n_heads
    own = slice(component[1] * width, (component[1] + 1) * width)

    def replaced(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., own] = replace(component, args[0][..., own])
        return (z,)

    return block.attn.out_proj.register_forward_pre_hook(replaced)


def zero_head(block: TorchBlock, head: int) -> RemovableHandle:
    """Zeroes the part of a block's z that a head writes, until the handle is removed."""
    width = block.attn.out_proj.in_features // block.attn.n_heads

    def zeroed(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0.0
        return (z,)

    return block.attn.out_proj.register_forward_pre_hook(zeroed)


def zero_mlp(block: TorchBlock) -> RemovableHandle:
    """Zeroes the output of a block's MLP, until the handle is removed."""
    return block.ff.register_forward_hook(lambda mlp, args, output: torch.zeros_like(output))


def mean(values: list[Any]) -> float | None:
    """Returns the mean of those values that exist, or None."""
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None
