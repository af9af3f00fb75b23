"""A decoder whose circuit is known, because it was planted: hand-set weights that look up the latest write of a key.

The model is one of the project's own architecture (pre-LayerNorm with eps 1e-5, learned positions, biases, exact GELU,
an unembedding of its own), of 3 layers, 4 heads and D = 192. Four components do the work:

- gate, head (0, 2): attends to the previous position; marks a key token that follows `W`.
- binder, head (1, 1): at a written value attends to the previous position, a marked key, and brings the key along.
  Everywhere else, answers of reads included, it attends to `<bos>` and writes nothing.
- retriever, head (2, 3): from a key token attends to the latest written value that this key is bound to, and copies
  the value.
- writer, MLP 2: moves what the retriever copied to the coordinates that the unembedding reads.

Answers of earlier reads are never attended to, though they are value tokens after the same key: a changed write acts on
every read through the write alone, and no route goes through earlier answers.

All other heads and MLPs, and most neurons of MLP 2, have random weights: they read every coordinate, the planted ones
too, so their outputs differ between the streams of a pair; but they write to coordinates (`junk`) that no planted
component and no row of the unembedding reads. They act on the answer only through the scale of the next LayerNorm.

Layout. Half of the D coordinates mirror the other half with the opposite sign, in all but the junk: what the planted
components read, (x_i - x_{i + D/2}) / 2, does not feel the mean that LayerNorm subtracts, while junk has one. All
embeddings have the same norm, and a constant coordinate makes most of it, so that LayerNorm's scale is nearly the same
everywhere. LayerNorm gains and biases are random; planted weights undo them.

`PLANTED_EDGES` are all true edges (sender -> receiver's input). Those that carry what no pair of streams changes
(positions, operators) can show under no kind of pairs; `SHOWN_EDGES`, `SHOWN_NODES` and `SHOWN_ROLES` list what must
show under each, and everything else must not. Attention is nearly one-hot, so gradients through queries and keys
vanish: attribution patching cannot be expected to find those edges here, exact patching must.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from kvjax.converters.to_torch import to_torch
from kvjax.converters.torch_decoder import TorchDecoder

from kvjax.config.run import ModelConfig
from kvjax.model.decoder_config import DecoderConfig
from kvjax.model.params import Params
from kvjax.task.vocabulary import BOS, WRITE, Vocabulary
from tests.oracles.patching import Node, Receiver

N_LAYERS, N_HEADS, D_MODEL, D_FF, D_HEAD = 3, 4, 192, 96, 48

EMBEDDING = Node("embedding")
GATE = Node("head", 0, 2)
BINDER = Node("head", 1, 1)
RETRIEVER = Node("head", 2, 3)
WRITER = Node("mlp", 2)
LOGITS = Receiver("logits")

PLANTED_NODES = {"gate": GATE, "binder": BINDER, "retriever": RETRIEVER, "writer": WRITER}

DISTRACTORS = tuple(
    node
    for layer in range(N_LAYERS)
    for node in (*(Node("head", layer, head) for head in range(N_HEADS)), Node("mlp", layer))
    if node not in PLANTED_NODES.values()
)


def _input(part: str, node: Node) -> Receiver:
    return Receiver(part, node.layer, node.head)


COPY_OUT = ((RETRIEVER, _input("mlp", WRITER)), (WRITER, LOGITS))  # every answer leaves this way

PLANTED_EDGES = (
    (EMBEDDING, _input("query", GATE)),  # its position
    (EMBEDDING, _input("key", GATE)),  # positions
    (EMBEDDING, _input("value", GATE)),  # whether the token is `W`
    (EMBEDDING, _input("query", BINDER)),  # its position
    (EMBEDDING, _input("key", BINDER)),  # positions, and which token is `<bos>`
    (GATE, _input("key", BINDER)),  # which keys are written
    (EMBEDDING, _input("value", BINDER)),  # which key it is
    (EMBEDDING, _input("query", RETRIEVER)),  # which key is read
    (EMBEDDING, _input("key", RETRIEVER)),  # how late a position is
    (BINDER, _input("key", RETRIEVER)),  # which key a value is bound to
    (EMBEDDING, _input("value", RETRIEVER)),  # which value it is
    *COPY_OUT,
)

# What a kind of pairs changes (docs/definitions.md, "Pairs of streams") and what of the circuit that passes through.
_BINDING_EDGES = ((EMBEDDING, _input("value", BINDER)), (BINDER, _input("key", RETRIEVER)), *COPY_OUT)
SHOWN_EDGES = {
    "value": ((EMBEDDING, _input("value", RETRIEVER)), *COPY_OUT),
    "query": ((EMBEDDING, _input("query", RETRIEVER)), *COPY_OUT),
    "swap": _BINDING_EDGES,
    "stale": _BINDING_EDGES,
}
# Activation patching of every head's z and every MLP's output, at all positions: these recover everything, others
# nothing.
SHOWN_NODES = {
    "value": (RETRIEVER, WRITER),
    "query": (RETRIEVER, WRITER),
    "swap": (BINDER, RETRIEVER, WRITER),
    "stale": (BINDER, RETRIEVER, WRITER),
}
# Activation patching of residual stages: the role of the positions that hold what changed, by stage. Patching those
# recovers everything, patching another role's nothing. A bound key lies at the value after the changed key: `between`.
_READ_STAGES = ("layer_2_post_attn", "layer_2_post_mlp", "final_norm")
_LAYER_0 = ("embedding", "layer_0_post_attn", "layer_0_post_mlp")
_LAYER_1 = ("layer_1_post_attn", "layer_1_post_mlp")
_AT_READ = dict.fromkeys(_READ_STAGES, "prediction")
_BINDING_ROLES = dict.fromkeys(_LAYER_0, "changed") | dict.fromkeys(_LAYER_1, "between") | _AT_READ
SHOWN_ROLES = {
    "value": dict.fromkeys((*_LAYER_0, *_LAYER_1), "changed") | _AT_READ,
    "query": dict.fromkeys((*_LAYER_0, *_LAYER_1), "prediction") | _AT_READ,
    "swap": _BINDING_ROLES,
    "stale": _BINDING_ROLES,
}

# Shares of the squared norm of an embedding; the constant coordinate has the rest.
TOKEN_SHARE = POSITION_SHARE = RECENCY_SHARE = 0.1
N_FREQUENCIES = 8
VALUE_BITS = 16
MIN_DISTANCE = 6  # bits in which the codes of two values differ at least: their cosine is at most 1/4
SHARPNESS = 40.0  # nats between the position attended to and any other, of gate and binder
RECENCY_PER_POSITION = 4.0  # nats; writes are at least 3 positions apart
KEY_MATCH_MARGIN = 21.0  # nats by which an early position of the right key beats the latest one of another
# Of what distractors write, to norms of 0.3 to 0.6 where planted components write 0.5 to 1.8; more would blur recency
# through LayerNorm's scale.
HEAD_JUNK_GAIN, MLP_JUNK_GAIN = 0.03, 0.02


@dataclasses.dataclass(frozen=True)
class KnownCircuit:
    """The planted model, for both sides.

    Attributes:
      params: the layer-stacked parameter tree of `kvjax.model.decoder.Decoder`.
      config: its static shape there.
      model: the shape as a run records it.
      vocab_size: number of tokens.
    """

    params: Params
    config: DecoderConfig
    model: ModelConfig
    vocab_size: int

    def torch_module(self) -> TorchDecoder:
        """Returns the same model in PyTorch."""
        module = TorchDecoder(self.model, self.vocab_size)
        module.load_state_dict(to_torch(self.params))
        return module.requires_grad_(False).eval()


def known_circuit(vocabulary: Vocabulary, *, max_seq_len: int = 64, seed: int = 0) -> KnownCircuit:
    """Returns the planted model for a vocabulary of at most 8 keys and 128 values.

    Args:
      vocabulary: the benchmark's.
      max_seq_len: number of positions.
      seed: of the distractors, the LayerNorms and the value codes; the planted route is the same for all.
    """
    builder = _Builder(vocabulary, max_seq_len, np.random.default_rng(seed))
    model = {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS, "d_ff": D_FF, "max_seq_len": max_seq_len}
    shape = ModelConfig.model_validate(model)
    vocab_size = len(vocabulary.tokens)
    config = DecoderConfig.from_model_config(shape, vocab_size, tied=False)
    return KnownCircuit(builder.params(), config, shape, vocab_size)


class _Builder:
    """Builds the weights. Maps are written over the D/2 mirrored coordinates, then laid out over D."""

    def __init__(self, vocabulary: Vocabulary, max_seq_len: int, rng: np.random.Generator):
        self.vocabulary, self.max_seq_len, self.rng = vocabulary, max_seq_len, rng
        keys = len(vocabulary.key_tokens)
        sizes = {
            "constant": 1,
            "recency": 2,
            "position": 2 * N_FREQUENCIES,
            "special": 4,
            "key": keys,
            "value": VALUE_BITS,
            "gate": 1,
            "bound": keys,
            "retrieved": VALUE_BITS,
            "answer": VALUE_BITS,
        }
        self.half = D_MODEL // 2
        self.at: dict[str, np.ndarray] = {}
        start = 0
        for name, size in sizes.items():
            self.at[name] = np.arange(start, start + size)
            start += size
        assert start + 4 <= self.half, "junk needs room"
        self.junk = np.concatenate([np.arange(start, self.half), np.arange(self.half + start, D_MODEL)])
        self.codes = _value_codes(len(vocabulary.value_tokens), rng)
        # Amplitudes: of the parts of an embedding, whose squares add up to D / 2 over the mirrored half, …
        self.token, self.clock = np.sqrt(TOKEN_SHARE * self.half), np.sqrt(RECENCY_SHARE * self.half)
        self.wave = np.sqrt(POSITION_SHARE * self.half / N_FREQUENCIES)  # of one frequency
        self.constant = np.sqrt((1 - TOKEN_SHARE - POSITION_SHARE - RECENCY_SHARE) * self.half)
        self.gate, self.bound, self.bit = 1.5, 2.0, 0.55  # … and of what planted components write.
        self.frequencies, self.gap = _frequencies(max_seq_len, rng)

    def params(self) -> Params:
        layers = [self.layer(layer) for layer in range(N_LAYERS)]
        final_norm = self.layer_norm()
        # The unembedding has no bias to undo one with.
        for name in ("answer", "constant"):
            final_norm["bias"][self.at[name]] = final_norm["bias"][self.at[name] + self.half] = 0.0
        rows = np.zeros((self.half, len(self.vocabulary.tokens)))
        rows[self.at["constant"]] = -0.5
        rows[:, self.vocabulary.value_ids] = 0.0
        rows[np.ix_(self.at["answer"], self.vocabulary.value_ids)] = 1.5 * self.codes.T
        kernel, _ = self.reading(rows, final_norm)
        tree = {
            "token_embedding": {"embedding": self.laid_out(self.token_codes())},
            "position_embedding": {"embedding": self.laid_out(self.position_codes())},
            "blocks": _stacked(layers),
            "final_norm": final_norm,
            "unembedding": {"kernel": kernel},
        }
        return _as_float32(tree)

    def token_codes(self) -> np.ndarray:
        vocabulary, at = self.vocabulary, self.at
        codes = np.zeros((len(vocabulary.tokens), self.half))
        special = np.setdiff1d(np.arange(len(codes)), [*vocabulary.key_ids, *vocabulary.value_ids])
        named = {WRITE: 0, BOS: 1}
        other = self.rng.normal(size=(len(special), 2))
        codes[np.ix_(special, at["special"][2:])] = other / np.linalg.norm(other, axis=1, keepdims=True)
        for token, place in named.items():
            codes[vocabulary.id_of[token]] = 0.0
            codes[vocabulary.id_of[token], at["special"][place]] = 1.0
        codes[vocabulary.key_ids, at["key"]] = 1.0
        codes[np.ix_(vocabulary.value_ids, at["value"])] = self.codes / np.sqrt(VALUE_BITS)
        return self.token * codes

    def position_codes(self) -> np.ndarray:
        codes = np.zeros((self.max_seq_len, self.half))
        lateness = np.arange(self.max_seq_len) / (self.max_seq_len - 1)
        codes[:, self.at["recency"]] = self.clock * np.stack([lateness, np.sqrt(1 - lateness**2)], axis=1)
        angles = np.arange(self.max_seq_len)[:, None] * self.frequencies
        codes[:, self.at["position"]] = self.wave * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        codes[:, self.at["constant"]] = self.constant
        return codes

    def layer(self, layer: int) -> dict[str, Any]:
        ln_1, ln_2 = self.layer_norm(), self.layer_norm()
        attn = {
            "q_proj": self.random_reading(D_MODEL, 2.0),
            "k_proj": self.random_reading(D_MODEL, 2.0),
            "v_proj": self.random_reading(D_MODEL, 1.0),
            "out_proj": self.random_writing(D_MODEL, HEAD_JUNK_GAIN),
        }
        for node, plant in ((GATE, self.plant_gate), (BINDER, self.plant_binder), (RETRIEVER, self.plant_retriever)):
            if node.layer == layer:
                self.place_head(attn, node.head, ln_1, plant())
        mlp = {"fc_in": self.random_reading(D_FF, 1.0), "fc_out": self.random_writing(D_FF, MLP_JUNK_GAIN)}
        if WRITER.layer == layer:
            self.place_writer(mlp, ln_2)
        return {"ln_1": ln_1, "attn": attn, "ln_2": ln_2, "mlp": mlp}

    def plant_gate(self) -> dict[str, np.ndarray]:
        query, key, value, out = self.empty_head()
        self.look_back(query, key)
        value[self.at["special"][0], 0] = 1 / self.token
        out[0, self.at["gate"]] = self.gate
        return {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": out}

    def plant_binder(self) -> dict[str, np.ndarray]:
        query, key, value, out = self.empty_head()
        self.look_back(query, key)
        peak = SHARPNESS * N_FREQUENCIES / self.gap  # score of the previous position without a gate
        gate, sink = 2 * N_FREQUENCIES, 2 * N_FREQUENCIES + 1
        query[self.at["constant"], gate] = SHARPNESS * np.sqrt(D_HEAD) / self.constant
        key[self.at["gate"], gate] = 1 / self.gate
        # `<bos>` lies half-way between the previous position with and without a gate.
        query[self.at["constant"], sink] = (peak + SHARPNESS / 2) * np.sqrt(D_HEAD) / self.constant
        key[self.at["special"][1], sink] = 1 / self.token
        # Its own position would add to its score, or take from it, with the distance: `<bos>` takes that back.
        key[self.at["special"][1], :N_FREQUENCIES] = -self.wave / self.token
        for index, (read, written) in enumerate(zip(self.at["key"], self.at["bound"], strict=True)):
            value[read, index] = 1 / self.token
            out[index, written] = self.bound
        return {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": out}

    def plant_retriever(self) -> dict[str, np.ndarray]:
        query, key, value, out = self.empty_head()
        latest = RECENCY_PER_POSITION * (self.max_seq_len - 1)
        for index, (asked, bound) in enumerate(zip(self.at["key"], self.at["bound"], strict=True)):
            query[asked, index] = (latest + KEY_MATCH_MARGIN) * np.sqrt(D_HEAD) / self.token
            key[bound, index] = 1 / self.bound
        clock = len(self.at["key"])
        query[self.at["constant"], clock] = latest * np.sqrt(D_HEAD) / self.constant
        key[self.at["recency"][0], clock] = 1 / self.clock
        for index, (read, written) in enumerate(zip(self.at["value"], self.at["retrieved"], strict=True)):
            value[read, index] = np.sqrt(VALUE_BITS) / self.token
            out[index, written] = self.bit
        return {"q_proj": query, "k_proj": key, "v_proj": value, "out_proj": out}

    def look_back(self, query: np.ndarray, key: np.ndarray) -> None:
        """Sets the scores so that the previous position beats all others by `SHARPNESS` nats."""
        scale = SHARPNESS * np.sqrt(D_HEAD) / (self.gap * self.wave**2)
        cosines, sines = self.at["position"][:N_FREQUENCIES], self.at["position"][N_FREQUENCIES:]
        for index, frequency in enumerate(self.frequencies):
            # cos(w(t - 1)) = cos(w t) cos w + sin(w t) sin w, and likewise the sine.
            query[cosines[index], index] = scale * np.cos(frequency)
            query[sines[index], index] = scale * np.sin(frequency)
            query[sines[index], N_FREQUENCIES + index] = scale * np.cos(frequency)
            query[cosines[index], N_FREQUENCIES + index] = -scale * np.sin(frequency)
            key[cosines[index], index] = key[sines[index], N_FREQUENCIES + index] = 1.0

    def empty_head(self) -> tuple[np.ndarray, ...]:
        return (*(np.zeros((self.half, D_HEAD)) for _ in range(3)), np.zeros((D_HEAD, self.half)))

    def place_head(self, attn: dict[str, Any], head: int, norm: dict[str, np.ndarray], maps: dict[str, Any]) -> None:
        columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
        for name in ("q_proj", "k_proj", "v_proj"):
            attn[name]["kernel"][:, columns], attn[name]["bias"][columns] = self.reading(maps[name], norm)
        attn["out_proj"]["kernel"][columns] = self.laid_out(maps["out_proj"])

    def place_writer(self, mlp: dict[str, Any], norm: dict[str, np.ndarray]) -> None:
        # gelu(x) - gelu(-x) = x exactly, so two neurons a bit make a linear map.
        read = np.zeros((self.half, 2 * VALUE_BITS))
        write = np.zeros((2 * VALUE_BITS, self.half))
        for index, (source, target) in enumerate(zip(self.at["retrieved"], self.at["answer"], strict=True)):
            read[source, 2 * index], read[source, 2 * index + 1] = 1.0, -1.0
            write[2 * index, target], write[2 * index + 1, target] = 1.0, -1.0
        neurons = slice(0, 2 * VALUE_BITS)
        mlp["fc_in"]["kernel"][:, neurons], mlp["fc_in"]["bias"][neurons] = self.reading(read, norm)
        mlp["fc_out"]["kernel"][neurons] = self.laid_out(write)

    def layer_norm(self) -> dict[str, np.ndarray]:
        return {"scale": self.rng.uniform(0.7, 1.3, D_MODEL), "bias": 0.1 * self.rng.normal(size=D_MODEL)}

    def laid_out(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows over the mirrored coordinates as rows over D."""
        return np.concatenate([rows, -rows], axis=1)

    def reading(self, columns: np.ndarray, norm: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kernel and bias that read mirrored coordinates behind a LayerNorm, its gain and bias undone."""
        kernel = np.concatenate([columns, -columns], axis=0) / 2 / norm["scale"][:, None]
        return kernel, -norm["bias"] @ kernel

    def random_reading(self, width: int, gain: float) -> dict[str, np.ndarray]:
        kernel = gain * self.rng.normal(size=(D_MODEL, width)) / np.sqrt(D_MODEL)
        # The constant would drown everything else they read.
        kernel[self.at["constant"]] = kernel[self.at["constant"] + self.half] = 0.0
        return {"kernel": kernel, "bias": 0.1 * gain * self.rng.normal(size=width)}

    def random_writing(self, width: int, gain: float) -> dict[str, np.ndarray]:
        kernel, bias = np.zeros((width, D_MODEL)), np.zeros(D_MODEL)
        kernel[:, self.junk] = gain * self.rng.normal(size=(width, len(self.junk)))
        bias[self.junk] = gain * self.rng.normal(size=len(self.junk))
        return {"kernel": kernel, "bias": bias}


def _value_codes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns [count, VALUE_BITS] codes of +1 and -1 that differ pairwise in at least `MIN_DISTANCE` bits."""
    words = (np.arange(2**VALUE_BITS)[:, None] >> np.arange(VALUE_BITS)) & 1
    far = np.ones(len(words), bool)
    chosen: list[int] = []
    while far.any() and len(chosen) < 2**7:  # in this order the greedy code is linear, with 2^7 words
        chosen.append(int(np.flatnonzero(far)[0]))
        far &= (words != words[chosen[-1]]).sum(axis=1) >= MIN_DISTANCE
    assert count <= len(chosen), f"{count} values; this many bits have room for {len(chosen)}"
    return 2.0 * words[rng.permutation(chosen)[:count]] - 1.0


def _frequencies(length: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Returns angular frequencies whose cosines have their largest sum at offset 0, and how far others stay below."""
    offsets = np.arange(1, length)
    best: tuple[float, np.ndarray] = (0.0, np.zeros(0))
    for _ in range(400):
        drawn = 2 * np.pi / length * rng.choice(np.arange(1, length // 2), N_FREQUENCIES, replace=False)
        gap = N_FREQUENCIES - np.cos(offsets[:, None] * drawn).sum(axis=1).max()
        if gap > best[0]:
            best = (float(gap), drawn)
    return best[1], best[0]


def _stacked(layers: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(layers[0], dict):
        return {name: _stacked([layer[name] for layer in layers]) for name in layers[0]}
    return np.stack(layers)


def _as_float32(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _as_float32(leaf) if isinstance(leaf, dict) else np.ascontiguousarray(leaf, np.float32)
        for name, leaf in tree.items()
    }
