"""What every head and MLP does at a step: what its ablation costs, what it attends to, what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import xarray as xr

from kvjax.artifacts.results import RunResults
from kvjax.report.charts.description import Bars, Chart, Heatmap
from kvjax.report.leaders import ablation_in_words
from kvjax.report.parts import Part, Section, section
from kvjax.report.sections.run_data import by_step, head_names, main_split, step_labels, steps_of


@dataclasses.dataclass(frozen=True)
class _Shown:
    """How a measure of heads is shown: its title, what it is in words, and the scale of its colours."""

    title: str
    words: str
    scale: Literal["share", "size", "signed"] = "share"


# In the order in which they are shown.
_ATTENTION = {
    "head_current_value_attention": _Shown(
        "Attention to the current value", "from a read to the value it asks for and earlier answers that gave it"
    ),
    "head_support_attention": _Shown("Attention to the written value", "from a read to where the value was written"),
    "head_stale_attention": _Shown(
        "Attention to the stale value", "from a read to the value that was overwritten and answers that gave it"
    ),
    "head_query_attention": _Shown("Attention to the read's own key", "from a read to its own key token"),
    "head_binding_attention": _Shown("Binding attention", "from a written value to the key of the same write"),
    "head_key_selectivity": _Shown("Key selectivity", "share of the read key in attention to values"),
    "head_recency_selectivity": _Shown(
        "Recency selectivity", "share of the current value in what goes to values of the read key"
    ),
    "head_attention_entropy": _Shown("Entropy of attention", "how spread a read's attention is", "size"),
}
_WRITES = {
    "head_direct_logit_attribution": _Shown(
        "Direct logit attribution", "what the head itself adds to the answer's logit over the mean value's", "signed"
    ),
    "head_qk_separation": _Shown(
        "QK separation",
        "score of the value looked for less the mean of other earlier values, before softmax",
        "signed",
    ),
    "head_qk_separation_rank8": _Shown(
        "QK separation, rank 8", "the same with W_QK cut to its 8 leading singular directions", "signed"
    ),
}
_UNITS = {"1": "share"}
_KINDS = ("role_mean", "zero", "resample", "mean", "random")


def components_section(results: RunResults) -> Section:
    """Shows every component over training, and at each step: ablations by kind, attention, what is written."""
    return section(
        "components",
        "Heads and MLPs",
        "Which components matter at which step, and what each attends to and writes. The slider chooses the step.",
        lambda: [
            Part("Over training", charts=[drops_over_training(results, "head"), drops_over_training(results, "mlp")]),
            Part("What ablation costs", charts=ablation_charts(results)),
            Part("What heads attend to", charts=head_charts(results, _ATTENTION)),
            Part("What heads write and tell apart", charts=head_charts(results, _WRITES)),
            Part("What MLPs cost and write", charts=mlp_charts(results)),
        ],
    )


def drops_over_training(results: RunResults, level: Literal["head", "mlp"]) -> Heatmap:
    """Draws what ablating each head, or each MLP, costs at every checkpoint, by the kind that ranks components."""
    dataset, split = results.metrics, main_split(results.metrics)
    kind = str(dataset.attrs["ranked_by"])
    drop = dataset[f"{level}_accuracy_drop"].sel(split=split, ablation=kind)
    if level == "head":
        names, drop = head_names(dataset), drop.stack(component=("layer", "head"))
    else:
        names, drop = [f"L{layer}.mlp" for layer in dataset["layer"].values], drop.rename(layer="component")
    return Heatmap(
        name=f"{level}_drops",
        title=f"What ablating each {'head' if level == 'head' else 'MLP'} costs",
        caption=f"Answer accuracy on {split} that {ablation_in_words(kind)} ablation takes away.",
        x=step_labels(dataset),
        y=names,
        values=by_step(drop, "component"),
        x_title="training step",
        y_title="",
        unit="accuracy drop",
        scale="signed",
    )


def ablation_charts(results: RunResults) -> list[Chart]:
    """Draws layer × head maps of what each kind of ablation costs at each step; the colours of all kinds agree."""
    dataset, split = results.metrics, main_split(results.metrics)
    drops = dataset["head_accuracy_drop"].sel(split=split)
    limit = float(np.nanmax(np.abs(drops.values), initial=0.0)) or 1.0
    return [
        _layers_by_heads(
            dataset,
            drops.sel(ablation=kind),
            name=f"head_drop_{kind}",
            title=f"{ablation_in_words(kind).capitalize()} ablation",
            caption=f"Accuracy on {split} that it takes away. {_MEANING[kind]}",
            unit="accuracy drop",
            scale="signed",
            limit=limit,
        )
        for kind in _kinds(dataset)
    ]


_MEANING = {
    "role_mean": "The head's output becomes its mean for the token's role: what is lost depends on the stream.",
    "zero": "The output becomes 0: what a head writes at every token of a role alike is lost as well.",
    "resample": "The output comes from another stream.",
    "mean": "The output becomes its mean over all tokens.",
    "random": "A random step of the write's size is added: a control.",
}


def head_charts(results: RunResults, measures: Mapping[str, _Shown]) -> list[Chart]:
    """Draws layer × head maps of measures of heads at each step."""
    dataset, split = results.metrics, main_split(results.metrics)
    return [
        _layers_by_heads(
            dataset,
            dataset[name].sel(split=split),
            name=name,
            title=shown.title,
            caption=f"On {split}: {shown.words}.",
            unit=_UNITS.get(str(dataset[name].attrs["units"]), str(dataset[name].attrs["units"])),
            scale=shown.scale,
        )
        for name, shown in measures.items()
        if name in dataset and np.isfinite(dataset[name].values).any()
    ]


def mlp_charts(results: RunResults) -> list[Chart]:
    """Draws what ablating each MLP costs by kind, and what each adds to the answer, at each step."""
    dataset, split = results.metrics, main_split(results.metrics)
    labels = [f"L{layer}.mlp" for layer in dataset["layer"].values]
    drops = dataset["mlp_accuracy_drop"].sel(split=split).transpose("ablation", "step", "layer")
    charts: list[Chart] = [
        Bars(
            name="mlp_drops_by_kind",
            title="What ablating each MLP costs",
            caption=f"Answer accuracy on {split} that each kind of ablation takes away.",
            labels=labels,
            series={ablation_in_words(kind): drops.sel(ablation=kind).values.astype(float) for kind in _kinds(dataset)},
            y_title="accuracy drop",
            steps=steps_of(dataset),
        )
    ]
    writes = {
        "direct attribution": "mlp_direct_logit_attribution",
        "lens margin added": "mlp_answer_margin_delta",
    }
    series = {
        label: dataset[name].sel(split=split).transpose("step", "layer").values.astype(float)
        for label, name in writes.items()
        if name in dataset
    }
    if series:
        charts.append(
            Bars(
                name="mlp_writes",
                title="What each MLP adds to the answer",
                caption=f"On {split}: its part of the answer's logit over the mean value's, and the logit lens "
                "margin after it less that before it.",
                labels=labels,
                series=series,
                y_title="logits",
                steps=steps_of(dataset),
            )
        )
    return charts


def _kinds(dataset: xr.Dataset) -> Sequence[str]:
    """Lists the kinds of ablation of a sweep, role means first."""
    return sorted(dataset["ablation"].values.tolist(), key=_KINDS.index)


def _layers_by_heads(dataset: xr.Dataset, values: xr.DataArray, **chart: object) -> Heatmap:
    return Heatmap(
        x=[str(head) for head in dataset["head"].values],
        y=[str(layer) for layer in dataset["layer"].values],
        values=values.transpose("step", "layer", "head").values.astype(float),
        x_title="head",
        y_title="layer",
        steps=steps_of(dataset),
        **chart,
    )
