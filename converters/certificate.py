"""Certifies that a converted checkpoint computes the same logits as the PyTorch model."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np
import torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.config.run import ModelConfig
from kvjax.errors import unusable
from kvjax.model.checkpoint import Certificate
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.model.transforms import plain_forward
from kvjax.task.vocabulary import PAD_ID

RELATIVE_TOLERANCE = 2e-4


def certify(
    state: Mapping[str, np.ndarray],
    params: Params,
    model: ModelConfig,
    tokens_BxT: np.ndarray,
    *,
    where: object,
) -> Certificate:
    """Runs both models on sample sequences and compares their logits (docs/definitions.md, "Parity certificate").

    Args:
      state: the PyTorch tensors, with current names.
      params: the Flax parameters converted from them.
      model: the run's recorded model section.
      tokens_BxT: sample sequences, right-padded.
      where: the file, for the message.

    Raises:
      InputError: a logit differs by more than `RELATIVE_TOLERANCE` of PyTorch's largest |logit|, or an argmax differs
        at a position where PyTorch's two largest logits are no near-tie: further apart than twice the tolerance.
    """
    vocab_size = state["token_embedding.weight"].shape[0]
    config = DecoderConfig.from_model_config(model, vocab_size, tied="unembedding" not in params)
    ours = np.asarray(_logits(config)(params, tokens_BxT))
    # Certificates are made while a sweep uses the cores. PyTorch's threads wait by spinning, and in several readers
    # they brought the process to a standstill.
    torch.set_num_threads(1)
    with torch.inference_mode():
        # Without storage, so that no weights are initialised only to be replaced.
        with torch.device("meta"):
            module = TorchDecoder(model, vocab_size)
        module.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in state.items()}, assign=True)
        theirs = module(torch.from_numpy(np.asarray(tokens_BxT, np.int64))).numpy()
    real = tokens_BxT != PAD_ID
    ours, theirs = ours[real], theirs[real]
    largest, difference = float(np.abs(theirs).max()), float(np.abs(ours - theirs).max())
    tolerance = RELATIVE_TOLERANCE * largest
    runner_up, top = np.sort(theirs, axis=-1)[:, -2:].T
    differs = ours.argmax(-1) != theirs.argmax(-1)
    near_tie = top - runner_up <= 2 * tolerance
    # Written so that a NaN on either side fails.
    if not difference <= tolerance or bool((differs & ~near_tie).any()):
        raise unusable(
            where,
            f"Flax logits within {tolerance:.3g} of PyTorch's, and the same argmax",
            f"a difference of {difference:.3g} and {int((differs & ~near_tie).sum())} other answers",
        )
    return Certificate(len(tokens_BxT), largest, difference, int((differs & near_tie).sum()))


@functools.lru_cache(maxsize=8)
def _logits(config: DecoderConfig):
    forward = plain_forward(config)
    return jax.jit(lambda params, tokens: forward(params, tokens)[0])
