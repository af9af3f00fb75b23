"""Runs TransformerLens (Nanda and Bloom, 2022; below version 4): a checkpoint as a `HookedTransformer`, with hooks.

It shares no code with kvjax's model, so it serves as a peer for speed and as an oracle for results.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from kvjax.converters.parameter_names import modern_name
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

from benchmarks.peers.answers import AnswerSums
from kvjax.config.run import ModelConfig
from kvjax.task.encoding import EncodedRecords

# Where activations are patched, as TransformerLens names the hooks; z alone is patched head by head.
PATCH_HOOKS = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "z": "blocks.{layer}.attn.hook_z",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
}


def hooked_transformer(model: ModelConfig, state: Mapping[str, torch.Tensor]) -> HookedTransformer:
    """Builds a checkpoint in TransformerLens with unchanged weights: nothing is folded or centred.

    TransformerLens masks no padding keys. Behind the last token they change nothing before it, since attention is
    causal; logits at padding positions themselves differ from the checkpoint's own.

    Args:
      model: the run's model section.
      state: tensors by their names in `model_state`, current or legacy, on the device to run on.

    Raises:
      KeyError: a tensor is missing.
      RuntimeError: a tensor does not have the shape this model gives it.
    """
    state = {modern_name(name): tensor for name, tensor in state.items()}
    embedding = state["token_embedding.weight"]
    config = HookedTransformerConfig(
        n_layers=model.n_layers,
        d_model=model.d_model,
        n_ctx=model.max_seq_len,
        d_head=model.d_model // model.n_heads,
        n_heads=model.n_heads,
        d_mlp=model.d_ff,
        d_vocab=len(embedding),
        act_fn="gelu",  # the exact one; "gelu_new" is the approximation
        eps=1e-5,
        normalization_type="LN",
        positional_embedding_type="standard",
        attention_dir="causal",
        dtype=torch.float32,
        device=str(embedding.device),
        init_weights=False,
    )
    with warnings.catch_warnings():
        # Version 4 has no HookedTransformer, which is why the extra asks for an earlier one.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        hooked = HookedTransformer(config)
    buffers = {name for name, _ in hooked.named_buffers()}
    constants = {name: tensor for name, tensor in hooked.state_dict().items() if name in buffers}
    hooked.load_state_dict(_weights(model, state) | constants, strict=True)
    return hooked.eval()


def _weights(model: ModelConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rearranges parameters for TransformerLens: linears as [in, out], those of attention with an axis of heads."""
    n_heads, d_head = model.n_heads, model.d_model // model.n_heads
    unembedding = state["lm_head.weight"]
    weights = {
        "embed.W_E": state["token_embedding.weight"],
        "pos_embed.W_pos": state["position_embedding.weight"],
        "ln_final.w": state["final_norm.weight"],
        "ln_final.b": state["final_norm.bias"],
        "unembed.W_U": unembedding.T,
        "unembed.b_U": unembedding.new_zeros(len(unembedding)),
    }
    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        for norm, theirs in (("ln_1", "ln1"), ("ln_2", "ln2")):
            weights[f"{block}.{theirs}.w"] = state[f"{block}.{norm}.weight"]
            weights[f"{block}.{theirs}.b"] = state[f"{block}.{norm}.bias"]
        for name, letter in (("q_proj", "Q"), ("k_proj", "K"), ("v_proj", "V")):
            weight_HExD = state[f"{block}.attn.{name}.weight"]
            weights[f"{block}.attn.W_{letter}"] = weight_HExD.view(n_heads, d_head, -1).transpose(1, 2)
            weights[f"{block}.attn.b_{letter}"] = state[f"{block}.attn.{name}.bias"].view(n_heads, d_head)
        weights[f"{block}.attn.W_O"] = state[f"{block}.attn.out_proj.weight"].T.reshape(n_heads, d_head, -1)
        weights[f"{block}.attn.b_O"] = state[f"{block}.attn.out_proj.bias"]
        for name, direction in (("fc_in", "in"), ("fc_out", "out")):
            weights[f"{block}.mlp.W_{direction}"] = state[f"{block}.ff.{name}.weight"].T
            weights[f"{block}.mlp.b_{direction}"] = state[f"{block}.ff.{name}.bias"]
    return weights


class TransformerLensAblations:
    """The clean pass and every head and MLP ablation of a checkpoint, over all records, by hooks.

    Args:
      model: the checkpoint, from `hooked_transformer`.
      encoded: the records.
      value_ids: token ids of the values, for margins.
      batch_size: sequences per forward pass.
    """

    def __init__(self, model: HookedTransformer, encoded: EncodedRecords, value_ids: np.ndarray, batch_size: int):
        self._model = model
        self._answers = AnswerSums(encoded, value_ids, batch_size, device=model.W_E.device)

    @torch.inference_mode()
    def measure(self) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """Sums right answers and margins per sequence, [N] each, keyed by (), (layer, head) or (layer,)."""
        results = {(): self._answers.of(self._model)}
        for layer in range(self._model.cfg.n_layers):
            for head in range(self._model.cfg.n_heads):
                results[layer, head] = self._under(PATCH_HOOKS["z"], layer, functools.partial(_zero_head, head=head))
            results[layer,] = self._under(PATCH_HOOKS["mlp_out"], layer, _zero)
        return results

    def _under(self, name: str, layer: int, hook: Any) -> tuple[np.ndarray, np.ndarray]:
        fwd_hooks = [(name.format(layer=layer), hook)]
        return self._answers.of(functools.partial(self._model.run_with_hooks, fwd_hooks=fwd_hooks))


def _zero_head(z_BxTxHxE: torch.Tensor, *, head: int, hook: Any) -> torch.Tensor:
    z_BxTxHxE[:, :, head] = 0.0
    return z_BxTxHxE


def _zero(activation: torch.Tensor, *, hook: Any) -> torch.Tensor:
    return torch.zeros_like(activation)


@torch.inference_mode()
def patch_arrays(
    model: HookedTransformer,
    clean_NxT: np.ndarray,
    corrupted_NxT: np.ndarray,
    positions_N: np.ndarray,
    clean_answers_N: np.ndarray,
    corrupted_answers_N: np.ndarray,
    *,
    sites: Sequence[str] = tuple(PATCH_HOOKS),
    batch_size: int = 64,
) -> dict[str, np.ndarray]:
    """Patches clean activations into corrupted runs, one forward pass per place (docs/definitions.md).

    Args:
      model: the checkpoint, from `hooked_transformer`.
      clean_NxT: token ids of the clean streams, padding behind the last token.
      corrupted_NxT: token ids of their corrupted partners, of the same lengths.
      positions_N: p_e, the positions that predict the answers.
      clean_answers_N: token ids of the clean streams' answers.
      corrupted_answers_N: token ids of the corrupted streams' answers.
      sites: which of `PATCH_HOOKS` to patch.
      batch_size: pairs per forward pass.

    Returns:
      m = logit(clean answer) − logit(corrupted answer) at p_e, per pair, in logits: `resid_pre`, `resid_mid` and
      `mlp_out` [L, T, N], `z` [L, T, H, N]. Every position is patched, those behind p_e too, where m cannot change.

    Raises:
      ValueError: the two sides have different shapes, or the model has no such positions.
    """
    tensors = _pairs(model, clean_NxT, corrupted_NxT, positions_N, clean_answers_N, corrupted_answers_N)
    num_pairs, length = clean_NxT.shape
    cfg = model.cfg
    result = {}
    for site in sites:
        heads = (cfg.n_heads,) if site == "z" else ()
        result[site] = np.empty((cfg.n_layers, length, *heads, num_pairs), np.float32)
    for start in range(0, num_pairs, batch_size):
        rows = slice(start, start + batch_size)
        clean, corrupted, *answers = (tensor[rows] for tensor in tensors)
        names = {PATCH_HOOKS[site].format(layer=layer) for site in sites for layer in range(cfg.n_layers)}
        _, cache = model.run_with_cache(clean, names_filter=lambda name, names=names: name in names)
        for site, m in result.items():
            for layer, *place in itertools.product(*map(range, m.shape[:-1])):
                name = PATCH_HOOKS[site].format(layer=layer)
                patch = functools.partial(_patch, place=(slice(None), *place), source=cache[name])
                logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])
                m[layer, *place, rows] = _logit_difference(logits, *answers).cpu().numpy()
    return result


def _patch(
    activation: torch.Tensor, *, place: tuple[slice | int, ...], source: torch.Tensor, hook: Any
) -> torch.Tensor:
    activation[place] = source[place]
    return activation


@torch.inference_mode()
def library_patch_means(
    model: HookedTransformer,
    clean_NxT: np.ndarray,
    corrupted_NxT: np.ndarray,
    positions_N: np.ndarray,
    clean_answers_N: np.ndarray,
    corrupted_answers_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """Averages m over pairs, `resid_pre` and `resid_mid` [L, T], by `transformer_lens.patching` itself.

    This is the code its users run: all pairs as one batch, a scalar metric, its own loop over layers and positions.
    The arguments are those of `patch_arrays`.
    """
    clean, corrupted, *answers = _pairs(
        model, clean_NxT, corrupted_NxT, positions_N, clean_answers_N, corrupted_answers_N
    )
    _, cache = model.run_with_cache(clean)
    functions = {"resid_pre": patching.get_act_patch_resid_pre, "resid_mid": patching.get_act_patch_resid_mid}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        return {
            site: function(model, corrupted, cache, lambda logits: _logit_difference(logits, *answers).mean())
            .cpu()
            .numpy()
            for site, function in functions.items()
        }


def _pairs(model: HookedTransformer, clean: np.ndarray, corrupted: np.ndarray, *rest: np.ndarray) -> list[torch.Tensor]:
    if clean.shape != corrupted.shape:
        raise ValueError(f"expected clean and corrupted tokens of one shape; found {clean.shape} and {corrupted.shape}")
    for array in rest:
        if array.shape != clean.shape[:1]:
            raise ValueError(f"expected one position and two answers per pair, {clean.shape[:1]}; found {array.shape}")
    if clean.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"expected at most {model.cfg.n_ctx} tokens; found {clean.shape[1]}")
    device = model.W_E.device
    return [torch.from_numpy(np.asarray(array, np.int64)).to(device) for array in (clean, corrupted, *rest)]


def _logit_difference(
    logits_BxTxV: torch.Tensor,
    positions_B: torch.Tensor,
    clean_answers_B: torch.Tensor,
    corrupted_answers_B: torch.Tensor,
) -> torch.Tensor:
    rows = torch.arange(len(positions_B), device=positions_B.device)
    at_p = logits_BxTxV[rows, positions_B]
    return at_p[rows, clean_answers_B] - at_p[rows, corrupted_answers_B]
