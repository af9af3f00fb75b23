"""Lists every parameter with its name, shape and layout in PyTorch and in Flax; both directions use this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kvjax.config.run import ModelConfig
from kvjax.model.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder.

    Attributes:
      torch: its name in `model_state`, with `{i}` for the layer.
      flax: its path in the Flax tree, where the layers are stacked on a leading axis.
      axes: the letters of its PyTorch shape: V vocabulary, P positions, D model width, F MLP width.
      transposed: whether Flax has the transpose: linear weights are [out, in] in PyTorch and [in, out] in Flax.
    """

    torch: str
    flax: tuple[str, ...]
    axes: str
    transposed: bool = False

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.torch

    def torch_shape(self, model: ModelConfig | DecoderConfig, vocab_size: int) -> tuple[int, ...]:
        """Computes the PyTorch shape in a model of this size."""
        sizes = {"V": vocab_size, "P": model.max_seq_len, "D": model.d_model, "F": model.d_ff}
        return tuple(sizes[axis] for axis in self.axes)


def _linear(torch: str, flax: tuple[str, ...], out_in: str) -> Iterator[Parameter]:
    yield Parameter(f"{torch}.weight", (*flax, "kernel"), out_in, transposed=True)
    yield Parameter(f"{torch}.bias", (*flax, "bias"), out_in[0])


def _norm(torch: str, flax: tuple[str, ...]) -> Iterator[Parameter]:
    yield Parameter(f"{torch}.weight", (*flax, "scale"), "D")
    yield Parameter(f"{torch}.bias", (*flax, "bias"), "D")


UNEMBEDDING = Parameter("lm_head.weight", ("unembedding", "kernel"), "VD", transposed=True)
TOKEN_EMBEDDING = Parameter("token_embedding.weight", ("token_embedding", "embedding"), "VD")

# In the order PyTorch's `state_dict` lists them.
PARAMETERS: tuple[Parameter, ...] = (
    TOKEN_EMBEDDING,
    Parameter("position_embedding.weight", ("position_embedding", "embedding"), "PD"),
    *_norm("blocks.{i}.ln_1", ("blocks", "ln_1")),
    *(
        parameter
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        for parameter in _linear(f"blocks.{{i}}.attn.{name}", ("blocks", "attn", name), "DD")
    ),
    *_norm("blocks.{i}.ln_2", ("blocks", "ln_2")),
    *_linear("blocks.{i}.ff.fc_in", ("blocks", "mlp", "fc_in"), "FD"),
    *_linear("blocks.{i}.ff.fc_out", ("blocks", "mlp", "fc_out"), "DF"),
    *_norm("final_norm", ("final_norm",)),
    UNEMBEDDING,
)

# Older runs name the MLP's linears by their index in an nn.Sequential.
LEGACY_MLP = {".ff.net.0.": ".ff.fc_in.", ".ff.net.2.": ".ff.fc_out."}


def modern_name(name: str) -> str:
    """Translates a tensor's current or legacy name into the table's."""
    for legacy, modern in LEGACY_MLP.items():
        name = name.replace(legacy, modern)
    return name


def torch_names(n_layers: int) -> Iterator[tuple[str, Parameter, int]]:
    """Yields (tensor name, parameter, layer) in `state_dict` order; the layer is 0 for parameters outside layers."""
    outside = [parameter for parameter in PARAMETERS if not parameter.per_layer]
    inside = [parameter for parameter in PARAMETERS if parameter.per_layer]
    for parameter in outside[:2]:
        yield parameter.torch, parameter, 0
    for layer in range(n_layers):
        for parameter in inside:
            yield parameter.torch.format(i=layer), parameter, layer
    for parameter in outside[2:]:
        yield parameter.torch, parameter, 0
