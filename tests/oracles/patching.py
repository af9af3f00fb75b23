"""Activation and path patching, slowly and plainly, on the PyTorch decoder: the oracle of the fast ones.

One forward pass, written out head by head from the module's weights, edits whatever it is told to by name. Every patch
runs the whole model; nothing is cached or restarted. It shares no code with the library but the layout of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.task.pair_encoding import EncodedPairs


class Node(NamedTuple):
    """A sender: `embedding`, a `head` or an `mlp`."""

    kind: str
    layer: int | None = None
    head: int | None = None


class Receiver(NamedTuple):
    """An input: a head's `query`, `key` or `value` input, an `mlp`'s, or that of the `logits`.

    Each is the residual stream ahead of the LayerNorm there, as this one reader sees it.
    """

    kind: str
    layer: int | None = None
    head: int | None = None


# A place in the forward pass, as a tuple:
#   ("embedding",), ("post_attn", layer), ("post_mlp", layer), ("final_norm",)      residual stages, [B, T, D]
#   ("z", layer, head) [B, T, E]; ("head_out", layer, head), ("mlp_out", layer) [B, T, D]; head_out has no bias and is
#   only recorded
#   ("query" | "key" | "value", layer, head), ("mlp", layer, None), ("logits", None, None)   inputs, [B, T, D]
Place = tuple
Edits = Mapping[Place, Callable[[torch.Tensor], torch.Tensor]]
Record = dict[Place, torch.Tensor]


def forward(module: TorchDecoder, tokens: torch.Tensor, edits: Edits | None = None) -> Record:
    """Returns everything a forward pass computes, the logits [B, T, V] under ("out",).

    Args:
      module: the model.
      tokens: [B, T] ids, right-padded.
      edits: by place, a function of the tensor there that returns the one to go on with.
    """
    edits = edits or {}
    record: Record = {}

    def site(place: Place, x: torch.Tensor) -> torch.Tensor:
        record[place] = edits[place](x) if place in edits else x
        return record[place]

    length = tokens.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None] & (tokens != module.pad_id)[:, None, :]
    x = site(("embedding",), module.token_embedding(tokens) + module.position_embedding.weight[:length])
    for layer, block in enumerate(module.blocks):
        attn = block.attn
        width = x.shape[-1] // attn.n_heads
        attn_out = attn.out_proj.bias.expand_as(x)
        for head in range(attn.n_heads):
            rows = slice(head * width, (head + 1) * width)
            read = {
                part: block.ln_1(site((part, layer, head), x)) @ linear.weight[rows].T + linear.bias[rows]
                for part, linear in (("query", attn.q_proj), ("key", attn.k_proj), ("value", attn.v_proj))
            }
            scores = read["query"] @ read["key"].transpose(1, 2) / math.sqrt(width)
            pattern = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
            z = site(("z", layer, head), pattern @ read["value"])
            record["head_out", layer, head] = z @ attn.out_proj.weight[:, rows].T
            attn_out = attn_out + record["head_out", layer, head]
        x = site(("post_attn", layer), x + attn_out)
        mlp_out = site(("mlp_out", layer), block.ff(block.ln_2(site(("mlp", layer, None), x))))
        x = site(("post_mlp", layer), x + mlp_out)
    normed = site(("final_norm",), module.final_norm(site(("logits", None, None), x)))
    record["out",] = module.lm_head(normed)
    return record


def output_place(node: Node) -> Place:
    """Returns where a sender's output, as it enters the residual stream, is recorded."""
    if node.kind == "embedding":
        return ("embedding",)
    return ("mlp_out", node.layer) if node.kind == "mlp" else ("head_out", node.layer, node.head)


def activation_patch(
    module: TorchDecoder,
    base: torch.Tensor,
    source: torch.Tensor,
    place: Place,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the logits of `base` run with one place's activation taken from the run on `source`.

    Args:
      module: the model.
      base, source: [B, T] ids of streams of the same lengths.
      place: a residual stage, a head's z or an MLP's output.
      mask: [B, T] bool, the positions to patch; all where None.
    """
    taken = forward(module, source)[place]
    where = torch.ones_like(base, dtype=torch.bool) if mask is None else mask
    return forward(module, base, {place: lambda x: torch.where(where[:, :, None], taken, x)})["out",]


def path_patches(
    module: TorchDecoder, base: torch.Tensor, source: torch.Tensor, edges: Iterable[tuple[Node, Receiver]]
) -> Iterator[torch.Tensor]:
    """Yields, for each edge, the logits of `base` run with the receiver's input changed along the path from the sender.

    The input gets the difference of the sender's output between the runs on `source` and on `base`, along this direct
    path only. What comes before the receiver is that of the run on `base`; the receiver and everything after it are
    computed anew.
    """
    sent, own = forward(module, source), forward(module, base)
    for sender, receiver in edges:
        change = sent[output_place(sender)] - own[output_place(sender)]
        yield forward(module, base, {tuple(receiver): lambda x, change=change: x + change})["out",]


def zero_ablate(module: TorchDecoder, tokens: torch.Tensor, node: Node) -> torch.Tensor:
    """Returns the logits with a head's z, or an MLP's whole output, set to 0."""
    return forward(module, tokens, {node_place(node): torch.zeros_like})["out",]


def stage_place(stage: str) -> Place:
    """Returns the place of a residual stage, given its name in docs/definitions.md."""
    if not stage.startswith("layer_"):
        return (stage,)
    _, layer, half = stage.split("_", 2)
    return (half, int(layer))


def node_place(node: Node) -> Place:
    """Returns where a head's z or an MLP's output is edited."""
    return ("z", node.layer, node.head) if node.kind == "head" else ("mlp_out", node.layer)


def all_nodes(n_layers: int, n_heads: int) -> Iterator[Node]:
    """Yields every sender: the embedding, then heads and the MLP of each layer."""
    yield Node("embedding")
    for layer in range(n_layers):
        yield from (Node("head", layer, head) for head in range(n_heads))
        yield Node("mlp", layer)


def all_edges(n_layers: int, n_heads: int) -> Iterator[tuple[Node, Receiver]]:
    """Yields every sender with every receiver that comes after it: a head's own layer's MLP, but not its heads."""
    for sender in all_nodes(n_layers, n_heads):
        for layer in range(n_layers):
            if sender.kind == "embedding" or sender.layer < layer:
                for head in range(n_heads):
                    yield from ((sender, Receiver(part, layer, head)) for part in ("query", "key", "value"))
            if sender.kind == "embedding" or sender.layer < layer or (sender.kind, sender.layer) == ("head", layer):
                yield sender, Receiver("mlp", layer)
        yield sender, Receiver("logits")


def difference(logits: torch.Tensor, encoded: EncodedPairs) -> np.ndarray:
    """Returns each pair's logit(clean answer) less logit(corrupted answer), summed over its affected reads."""
    values = logits.detach().numpy()
    total = np.zeros(len(encoded))
    for n, q in zip(*np.nonzero(encoded.is_affected), strict=True):
        at = values[n, encoded.prediction_positions[n, q]]
        total[n] += at[encoded.clean_answers[n, q]] - at[encoded.corrupted_answers[n, q]]
    return total
