"""Measures of heads, MLPs and the other components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from kvjax.measure.declaration import LEVEL_AXES, Counted, Level, Measure, RowField

if TYPE_CHECKING:
    import jax
    import numpy as np


# What ends the names of the random control's spreads; what begins those of the arrays they are formed from.
SPREAD = "_random_spread"
DRAWS = "draws/"

# The measured array that each quantity of an ablation's cost is formed from.
DROP_SOURCES = {"accuracy": "correct", "margin": "margin"}


def _at_both_positions(prediction: np.ndarray, support: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.stack([prediction, support], axis=2)


def _added_by_mlps(margin_CxNxS: np.ndarray) -> np.ndarray:
    """Subtracts each layer's lens margin before the MLP from that after it; stages alternate after the embedding."""
    return margin_CxNxS[..., 2:-1:2] - margin_CxNxS[..., 1:-1:2]


def _attention(name: str, field: str, *, units: str = "1", counted: Counted = "reads") -> Measure:
    return Measure(
        f"head_{name}",
        "head",
        units,
        f"mean {name} of a head",
        sources=(f"head/{name}",),
        counted=counted,
        compute=lambda reads: reads.attention[name],
        fields=(RowField(field),),
    )


def _separation(name: str, how: str, index: int, trigger: str | None = None) -> Measure:
    return Measure(
        f"head_{name}",
        "head",
        "nats",
        f"score p_e -> s_e before the softmax minus the mean score of the other earlier values{how}",
        sources=(f"head/{name}",),
        counted="contrasted",
        compute=lambda reads: reads.qk_separation[index],
        fields=(RowField(name, trigger=trigger),),
    )


def drop_field(quantity: str, kind: str) -> str:
    """Names the field of a row that shows what a kind of ablation costs in accuracy or margin."""
    return f"{quantity}_drop" if kind == "zero" else f"{quantity}_drop_{kind}"


def _selectivity(kind: str, description: str) -> Measure:
    """Declares a selectivity of heads, a mean over the reads for which it is defined."""

    def compute(reads: Any) -> tuple[jax.Array, jax.Array]:
        import jax.numpy as jnp

        values = reads.head_selectivities[kind]
        defined = ~jnp.isnan(values)
        return jnp.where(defined, values, 0.0), defined

    name = {"key": "key_selectivity", "key_null": "key_selectivity_null", "recency": "recency_selectivity"}[kind]
    return Measure(
        f"head_{name}",
        "head",
        "1",
        description,
        sources=(f"head/{name}", f"head/{name}_defined"),
        counted="measured",
        compute=compute,
        fields=(RowField(name),),
    )


def _drops(component: Literal["head", "mlp"]) -> Iterator[Measure]:
    """Declares the cost of ablating components; rows show zero ablation without a suffix.

    `random` is a control that replaces nothing: the cost of a random step the size of the component's write.
    """
    for quantity, units, kind in (("accuracy", "1", "difference of rates"), ("margin", "logits", "mean")):
        watched = quantity == "accuracy"
        yield Measure(
            f"{component}_{quantity}_drop",
            component,
            units,
            f"clean minus ablated answer {quantity}",
            kind,
            axes=("ablation", *LEVEL_AXES[component]),
            sources=(f"{component}/{{ablation}}/{DROP_SOURCES[quantity]}",),
            lost_from=f"answer_{quantity}",
            fields=(
                RowField(
                    drop_field(quantity, "zero"),
                    {"ablation": "zero"},
                    delta=watched,
                    trigger=f"{component}_accuracy_drop" if watched else None,
                ),
                RowField(drop_field(quantity, "mean"), {"ablation": "mean"}),
                RowField(drop_field(quantity, "role_mean"), {"ablation": "role_mean"}, delta=watched),
                RowField(drop_field(quantity, "resample"), {"ablation": "resample"}),
                RowField(drop_field(quantity, "random"), {"ablation": "random"}),
            ),
        )
        yield Measure(
            f"{component}_{quantity}_drop{SPREAD}",
            component,
            units,
            f"standard deviation of the random control's {quantity} drop over its directions",
            "statistic",
            fields=(RowField(f"{quantity}_drop{SPREAD}"),),
        )


def _attribution(term: str, level: Level) -> Measure:
    return Measure(
        f"{term}_direct_logit_attribution",
        level,
        "logits",
        f"what the {term} adds to logit(answer) - mean logit over values",
        sources=(f"attribution/{term}",),
        compute=lambda reads: reads.attribution[term],
        interval=False,
        fields=(RowField("direct_logit_attribution"),) if level in ("head", "mlp") else (),
    )


MEASURES: tuple[Measure, ...] = (
    _attention("query_attention", "query_attention_mean"),
    _attention("support_attention", "support_attention_mean"),
    _attention("current_value_attention", "current_value_attention_mean"),
    # A read whose support overwrote nothing has no stale value to attend to.
    _attention("stale_attention", "stale_attention_mean", counted="stale"),
    _attention("binding_attention", "binding_attention_mean"),
    _attention("attention_entropy", "attention_entropy", units="nats"),
    _selectivity("key", "mean share of the read key in a head's attention to values"),
    _selectivity("key_null", "mean share of another key of the stream in a head's attention to values"),
    _selectivity("recency", "mean share of the current value in a head's attention to values of the read key"),
    _separation("qk_separation", "", 0, trigger="qk_separation"),
    _separation("qk_separation_rank8", ", W_QK cut to 8 singular directions", 1),
    *_drops("head"),
    *_drops("mlp"),
    Measure(
        "mlp_write_norm",
        "mlp",
        "1",
        "L2 norm of an MLP's output",
        axes=("position_role", "layer"),
        sources=("mlp/write_norm", "mlp/write_norm_support"),
        compute=lambda reads: reads.write_norms,
        combine=_at_both_positions,
        interval=False,
        fields=(
            RowField("write_norm_mean", {"position_role": "prediction"}),
            RowField("write_norm_support_mean", {"position_role": "support"}),
        ),
    ),
    Measure(
        "mlp_answer_margin_delta",
        "mlp",
        "logits",
        "lens margin an MLP adds",
        sources=("lens/answer_margin",),
        combine=_added_by_mlps,
        interval=False,
        fields=(RowField("answer_margin_delta_mean"),),
    ),
    _attribution("embedding", "model"),
    _attribution("final_norm_bias", "model"),
    _attribution("head", "head"),
    _attribution("attn_bias", "layer"),
    _attribution("mlp", "mlp"),
)
