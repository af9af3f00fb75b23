"""What patching and ablating sets of components shows inside birth windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvjax.artifacts.files import read_json
from kvjax.artifacts.identity import check_seal
from kvjax.artifacts.recovery_tables import PATCHING, component_recoveries
from kvjax.artifacts.results import Intervention, RunResults
from kvjax.errors import command, unusable
from kvjax.intervene.kinds import find_kind
from kvjax.report.charts.description import COLOURS, Chart, Edge, Graph, Heatmap, Line, LineChart, Node
from kvjax.report.leaders import ablation_in_words
from kvjax.report.parts import Part, Section, Table, section
from kvjax.task.pairs import StreamPair

_MOST_EDGES = 14
_SMALLEST_EDGE = 0.05
_MOST_COMPONENTS = 8
_PAIRS = {
    "value": "another value is written under the key",
    "query": "another key is read",
    "swap": "two writes exchange their keys",
    "stale": "the latest write goes to another key",
}


def interventions_section(results: RunResults, pairs: Mapping[str, StreamPair]) -> Section:
    """Shows recovery by component and step, by position of an example, paths, and sets of components.

    Args:
      results: of the run.
      pairs: the pairs of streams that it was measured on, by their id; empty if they cannot be read.
    """
    return section(
        "interventions",
        "Interventions",
        "What happens if a component's output is taken from another run: which components and paths carry the answer.",
        lambda: _parts(results, pairs),
    )


def _parts(results: RunResults, pairs: Mapping[str, StreamPair]) -> list[Part]:
    if not results.intervention_files():
        remedy = f"interventions (run {command('intervene', run_dirs=str(results.run.path))})"
        raise unusable(results.run.layout.interventions, remedy, "none")
    parts = [
        Part("What patching each component recovers", [_HOW_TO_READ], recovery_charts(results), _runs_alone(results))
    ]
    if rows := _importance(results):
        parts.append(rows)
    opened = (Intervention.open_whole(path) for path in results.intervention_files())
    studies = [one for one in opened if one is not None]
    drawn = {
        PATCHING: ("By position", _POSITIONS, lambda one: position_charts(one, pairs)),
        "path_patching": ("Paths", _PATHS, path_charts),
        "necessity": ("Necessary and sufficient sets", _SETS, set_charts),
    }
    for kind, (title, reading, charts) in drawn.items():
        of_kind = [one for one in studies if one.kind == kind]
        for one in of_kind:
            folded = one is not of_kind[-1]
            parts.append(Part(f"{title}, {_window(one)}", [reading], charts(one), folded=folded))
    for one in studies:
        lines = find_kind(one.kind).summary_lines(one.document)
        parts.append(Part(f"Numbers: {one.kind.replace('_', ' ')}, {_window(one)}", listing=lines, folded=True))
    return parts


_HOW_TO_READ = (
    "A recovery of 1 is the clean answer's whole lead over the corrupted one, 0 is nothing. A dot marks steps at which "
    "the clean run itself fails, so that there is nothing to recover."
)
_POSITIONS = (
    "One pair of streams: the corrupted run gets the clean run's residual stream at one stage and position. The axis "
    "shows the clean stream; an arrow marks a token that differs. The slider chooses the step."
)
_PATHS = "The strongest paths at the last step at which the clean run answers; width: recovery along the path alone."
_SETS = (
    "The set alone: the answer's lead if all else is ablated (faithfulness: does the set suffice?). Without it: "
    "if the set is ablated (completeness: how much is left?). 1 is the whole clean run. Components join in the order "
    "of what each costs."
)


def _window(one: Intervention) -> str:
    steps = one.document["steps"]
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"


def recovery_charts(results: RunResults) -> list[Chart]:
    """Draws component × step maps of what patching each component recovers, one for each kind of pair."""
    table = component_recoveries(results)
    if table is None:
        return []
    charts: list[Chart] = []
    for kind in table["pair_kind"].values.tolist():
        own = table.sel(pair_kind=kind)
        values = own["recovery"].sel(statistic="estimate").transpose("component", "step").values.astype(float)
        fails = own["clean_run_fails"].any("failure").values
        charts.append(
            Heatmap(
                name=f"recovery_{kind}",
                title=f"Pairs of kind {kind}: {_PAIRS.get(kind, kind)}",
                caption="Recovery of the answer's lead by the clean run's output of one component at all positions.",
                x=[str(step) for step in own["step"].values.tolist()],
                y=own["component"].values.tolist(),
                values=values,
                marks=np.broadcast_to(fails, values.shape),
                x_title="training step",
                y_title="",
                unit="recovery",
                scale="signed",
                limit=1.0,
            )
        )
    return charts


def _runs_alone(results: RunResults) -> list[Table]:
    table = component_recoveries(results)
    if table is None:
        return []
    rows = []
    for kind in table["pair_kind"].values.tolist():
        for step in table["step"].values.tolist():
            own = table.sel(pair_kind=kind, step=step)
            lead = own["metric_of_runs"].sel(statistic="estimate")
            right = own["answer_accuracy_of_runs"].sel(statistic="estimate")
            rows.append(
                [
                    *(kind, step, float(lead.sel(run="clean")), float(lead.sel(run="corrupted"))),
                    float(right.sel(run="clean", answer="clean")),
                    float(right.sel(run="corrupted", answer="corrupted")),
                    bool(own["clean_run_fails"].any()),
                ]
            )
    header = [
        "pairs",
        "step",
        "clean run's lead",
        "corrupted run's lead",
        "clean right",
        "corrupted right",
        "clean run fails",
    ]
    return [
        Table("Both runs without intervention: lead of the clean answer in logits, share answered right", header, rows)
    ]


def _importance(results: RunResults) -> Part | None:
    path = results.run.layout.importance
    if not path.is_file():
        return None
    document = read_json(path)
    check_seal(document, path, "run kvjax intervene again")
    step = max(document["steps"], key=int)
    at = document["steps"][step]
    kinds, pair_kinds = (list(at["components"][0][name]) for name in ("accuracy_drop", "recovery"))
    leading = sorted(at["components"], key=lambda own: -_largest(own))[:_MOST_COMPONENTS]
    costs = [
        [
            own["component"],
            *(_with_ends(own["accuracy_drop"][kind]) for kind in kinds),
            *(_with_ends(own["recovery"][kind]) for kind in pair_kinds),
        ]
        for own in leading
    ]
    header = [
        "component",
        *(f"{ablation_in_words(kind)} drop" for kind in kinds),
        *(f"{k} recovery" for k in pair_kinds),
    ]
    agreement = [
        [ablation_in_words(own["ablation"]), own["of"], _with_ends(own["value"]), _with_ends(own.get("above_zero"))]
        for own in at["rank_correlation"]
        if own["recovery"] == "largest"
    ]
    line = "Which ablation ranks components as patching does: Spearman correlation of accuracy drops with recoveries."
    return Part(
        "Ablations beside patching",
        [line],
        tables=[
            Table(f"At step {step}, the components that patching recovers most from", header, costs),
            Table("Rank correlation", ["ablation", "of", "correlation", "more than zero ablation's"], agreement),
        ],
    )


def _largest(own: Mapping[str, Any]) -> float:
    found = own["largest_recovery"]
    return found["estimate"] if found and found["estimate"] is not None else float("-inf")


def _with_ends(numbers: Mapping[str, float | None] | None) -> str | None:
    """Writes an estimate with its interval, as far as they exist."""
    if numbers is None or numbers["estimate"] is None:
        return None
    ends = "" if numbers["low"] is None else f" [{numbers['low']:.2f}, {numbers['high']:.2f}]"
    return f"{numbers['estimate']:.2f}{ends}"


def position_charts(one: Intervention, pairs: Mapping[str, StreamPair]) -> list[Chart]:
    """Draws stage × position maps of one example pair of each kind, at every step of the window."""
    dataset = one.dataset
    if "metric_by_position" not in dataset:
        return []
    own = dataset.sel(metric=str(one.document["metric"]), direction="denoising")
    stages = [
        place for place, part in zip(own["place"].values.tolist(), own["is_component"].values, strict=True) if not part
    ]
    charts: list[Chart] = []
    for kind in own["pair_kind"].values.tolist():
        pair = _example(own, kind)
        if pair is None:
            continue
        here = own.sel(pair=pair)
        gap = (here["metric_clean"] - here["metric_corrupted"]).values[:, None, None]
        lead = here["metric_by_position"].sel(place=stages).transpose("step", "place", "position").values
        base = here["metric_corrupted"].values[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            recovery = np.where(np.abs(gap) > 0, (lead - base) / gap, np.nan)
        kept = _affected(np.flatnonzero(np.isfinite(recovery).any(axis=(0, 1))), pairs.get(pair))
        charts.append(
            Heatmap(
                name=f"positions_{kind}_{one.window}",
                title=f"Pairs of kind {kind}, example {pair}",
                caption=f"Recovery in this pair alone: {_PAIRS.get(kind, kind)}.",
                x=_position_labels(kept, pairs.get(pair)),
                y=stages,
                values=recovery[:, :, kept].astype(float),
                x_title="position and token",
                y_title="",
                unit="recovery",
                scale="signed",
                limit=1.0,
                steps=tuple(int(step) for step in own["step"].values),
            )
        )
    return charts


def _example(own: xr.Dataset, kind: str) -> str | None:
    """Chooses the pair of a kind whose clean run leads by most at the last step."""
    of_kind = own["pair"].values[own["kind_of_pair"].values == kind]
    if not len(of_kind):
        return None
    gap = (own["metric_clean"] - own["metric_corrupted"]).sel(pair=of_kind).isel(step=-1).values
    return str(of_kind[int(np.argmax(np.nan_to_num(gap, nan=-np.inf)))])


def _affected(positions: np.ndarray, pair: StreamPair | None) -> np.ndarray:
    """Keeps the positions up to the last affected read; later ones, and padding, change nothing."""
    if pair is None:
        return positions
    return np.array([place for place in positions if (pair.position_roles[place : place + 1] or [None])[0] is not None])


def _position_labels(positions: np.ndarray, pair: StreamPair | None) -> list[str]:
    if pair is None:
        return [str(position) for position in positions]
    labels = []
    for position in positions:
        clean, corrupted = pair.clean_tokens[position], pair.corrupted_tokens[position]
        labels.append(f"{position} {clean}" + (f" → {corrupted}" if corrupted != clean else ""))
    return labels


def path_charts(one: Intervention) -> list[Chart]:
    """Draws the strongest paths of each kind of pair as a graph, at the last step at which the clean run answers."""
    own = one.dataset.sel(metric=str(one.document["metric"]), direction="denoising")
    charts: list[Chart] = []
    for kind in own["pair_kind"].values.tolist():
        of_kind = own.sel(pair_kind=kind)
        answers = ~of_kind["clean_run_fails"].any("failure").values
        if not answers.any():
            continue
        here = of_kind.isel(step=int(np.flatnonzero(answers)[-1]))
        recovery = here["recovery"].transpose("statistic", "path").sel(statistic=["estimate", "low", "high"]).values
        order = np.argsort(-np.nan_to_num(recovery[0], nan=-np.inf))[:_MOST_EDGES]
        chosen = [place for place in order if recovery[0, place] >= _SMALLEST_EDGE and recovery[1, place] > 0]
        if not chosen:
            continue
        edges = _joined([_edge(here, place, recovery[:, place]) for place in chosen])
        charts.append(
            Graph(
                name=f"paths_{kind}_{one.window}",
                title=f"Pairs of kind {kind}, step {int(here['step'])}",
                caption=f"The {len(chosen)} strongest paths that recover {_SMALLEST_EDGE} or more, each patched alone: "
                f"{_PAIRS.get(kind, kind)}. Hover for numbers.",
                nodes=_nodes(edges),
                edges=edges,
            )
        )
    return charts


def _edge(here: xr.Dataset, place: int, recovery: np.ndarray) -> Edge:
    path = str(here["path"].values[place])
    sender, _, receiver = path.partition("->")
    estimate, low, high = recovery
    return Edge(
        sender,
        receiver.partition(".")[0] if "H" in receiver else receiver,
        float(estimate),
        (f"{path}: {estimate:.2f} [{low:.2f}, {high:.2f}]",),
    )


def _joined(edges: Sequence[Edge]) -> list[Edge]:
    """Joins the paths between the same two components, such as into a head's query and key, to one edge."""
    between: dict[tuple[str, str], list[Edge]] = {}
    for edge in edges:
        between.setdefault((edge.start, edge.end), []).append(edge)
    return [
        Edge(start, end, max(edge.weight for edge in own), tuple(label for edge in own for label in edge.labels))
        for (start, end), own in between.items()
    ]


def _nodes(edges: Sequence[Edge]) -> list[Node]:
    """Places nodes from left to right by layer, heads before the MLP of a layer, and apart within a column."""
    names = list(dict.fromkeys(name for edge in edges for name in (edge.start, edge.end)))
    columns: dict[float, list[str]] = {}
    for name in names:
        columns.setdefault(_column(name), []).append(name)
    nodes = []
    for rank, (_, own) in enumerate(sorted(columns.items())):
        for place, name in enumerate(sorted(own)):
            nodes.append(Node(name, float(rank), place - (len(own) - 1) / 2 + 0.15 * (rank % 2)))
    return nodes


def _column(name: str) -> float:
    if name == "embedding":
        return -1.0
    if name == "logits":
        return 1e6
    layer = float(name[1:].partition("H")[0].partition(".")[0])
    return layer + (0.5 if name.endswith(".mlp") else 0.0)


def set_charts(one: Intervention) -> list[Chart]:
    """Draws faithfulness and completeness by the size of the set, at the window's last step."""
    ranked = str(one.document["ranked_by"])
    dataset = one.dataset
    kind_of_ablation = ranked if ranked in dataset["baseline"].values else dataset["baseline"].values[0]
    own = dataset.sel(baseline=kind_of_ablation).isel(step=-1)
    fails = own["clean_run_fails"].any([dim for dim in own["clean_run_fails"].dims if dim != "pair_kind"])
    kinds = [kind for kind in own["pair_kind"].values.tolist() if not bool(fails.sel(pair_kind=kind))]
    titles = {"faithfulness": "The set alone", "completeness": "Without the set"}
    charts: list[Chart] = []
    for name, title in titles.items():
        lines = []
        for place, kind in enumerate(kinds):
            curve = own[name].sel(pair_kind=kind)
            ends = [curve.sel(statistic=which).values.astype(float) for which in ("estimate", "low", "high")]
            lines.append(Line(kind, own["set_size"].values, *ends, COLOURS[place % len(COLOURS)]))
        if lines:
            charts.append(
                LineChart(
                    name=f"{name}_{one.window}",
                    title=title,
                    caption=f"{name.capitalize()} by size of the set at step {int(own['step'])}, "
                    f"{ablation_in_words(str(kind_of_ablation))} ablation, with 95 % intervals; a line for each kind "
                    "of pair.",
                    lines=lines,
                    y_title=name,
                    x_title="components in the set",
                )
            )
    return charts
