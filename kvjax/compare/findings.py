"""Says in plain sentences what a comparison found, with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import BIRTH_SPLIT

_SURE = 0.05


def findings(document: Mapping[str, Any]) -> list[str]:
    """States the findings, the most general first."""
    return [
        *_formed(document),
        *_accuracy(document),
        *_order(document),
        *_handed_over(document),
        *_roles(document),
        *_apart(document),
    ]


def _formed(document: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in document["births"].items():
        if entry["formed"] == 0:
            last = min(run["step"] for run in entry["runs"])
            yield f"{name} reached {entry['threshold']:g} in none of {entry['total']} runs by step {last}."
            yield from _unconfirmed(name, entry)
            continue
        steps = [run["step"] for run in entry["runs"] if run["formed"]]
        if entry["median"] is None:
            median = "more than half of the runs have not, so that there is no median step"
        else:
            median = f"median step {entry['median']}{step_interval(entry)}"
        yield (
            f"{name} reached {entry['threshold']:g} on {entry['split']} in {entry['formed']} of {entry['total']} runs, "
            f"{_between(steps)}; {median}."
        )
        yield from _unconfirmed(name, entry)


def _unconfirmed(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Tells which runs are at a threshold at their end, too late to count."""
    for one in entry["runs"]:
        if one["unconfirmed_step"] is not None:
            yield (
                f"{one['run']} is censored for {name}, not without it: it is at {entry['threshold']:g} or above from "
                f"step {one['unconfirmed_step']} on, with too few further checkpoints to confirm it."
            )


def _between(steps: Sequence[int]) -> str:
    first, last = min(steps), max(steps)
    return f"at step {first}" if first == last else f"between steps {first} and {last}"


def step_interval(entry: Mapping[str, Any]) -> str:
    """Writes the 95 % interval of a median step, if it has one."""
    low, high = entry["median_low"], entry["median_high"]
    if low is None and high is None:
        return " (too few runs for an interval)"
    return f" [{'?' if low is None else low}, {'later' if high is None else high}]"


def _accuracy(document: Mapping[str, Any]) -> Iterator[str]:
    parts = []
    for split in (BIRTH_SPLIT, HELDOUT_SPLIT):
        spread = document["accuracy"].get(split, {}).get("best")
        if spread and spread["median"] is not None:
            parts.append(f"{spread['median']:.3f} on {split} (from {spread['low']:.3f} to {spread['high']:.3f})")
    if parts:
        yield f"Median answer accuracy at each run's best checkpoint: {', '.join(parts)}."


def _order(document: Mapping[str, Any]) -> Iterator[str]:
    order = document["order"]
    holding = [pair for pair in order["pairs"] if pair["holds"]]
    if not order["pairs"]:
        yield "No movement of a metric could be dated between two checkpoints, so that there is no order."
        return
    if not holding:
        yield "In no pair of metrics is the order the same in enough runs to be sure of it."
        return
    shown = "; ".join(
        f"{pair['first']} before {pair['second']} in {pair['before']} of {pair['before'] + pair['after']}"
        for pair in holding[:6]
    )
    more = f"; and {len(holding) - 6} more pairs" if len(holding) > 6 else ""
    yield f"Orders that hold across runs (where checkpoints can tell): {shown}{more}."


def _handed_over(document: Mapping[str, Any]) -> Iterator[str]:
    stories = document["story"]
    count = sum(bool(story["handovers"]) for story in stories.values())
    phases = [len(story["phases"]) for story in stories.values()]
    yield (
        f"Each run's story has {_range(phases)} {'phase' if set(phases) == {1} else 'phases'}; "
        f"{count} of {len(stories)} hand the lookup over from some components to others."
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _roles(document: Mapping[str, Any]) -> Iterator[str]:
    roles, count = document["roles"], len(document["runs"])
    stable, address = roles["role_stability"], roles["address_stability"]
    if stable["mean"] is None or address["mean"] is None:
        yield "No head has a role in these runs, so that nothing can be matched."
        return
    evidence = {"ablation": "ablation", "interventions": "patching"}[roles["evidence"]]
    yield f"Roles are compared at {roles['stage_reason']}; causal effects are by {evidence}."
    role_sure, address_sure = (entry["null"]["probability"] < _SURE for entry in (stable, address))
    numbers = (
        f"similarity of matched roles {stable['mean']:.2f}, by chance {stable['null']['mean']:.2f} "
        f"(p = {stable['null']['probability']:.3f}); share at the same address {address['mean']:.2f}, by chance "
        f"{address['null']['mean']:.2f} (p = {address['null']['probability']:.3f})"
    )
    if role_sure and address_sure:
        yield f"The same roles return, and more often at the same addresses than chance has it: {numbers}."
    elif role_sure:
        yield f"The same roles return at addresses that change as by chance: {numbers}."
    else:
        yield f"Chance may explain that the same roles return: {numbers}."
    for role, winners in roles["winners"].items():
        named = [winner["component"] for winner in winners if winner["component"] is not None]
        if named:
            addresses = ", ".join(f"{address} in {named.count(address)}" for address in dict.fromkeys(named))
            doubt = "" if role_sure else ", which may be chance"
            yield f"Largest score as {role}: {addresses} of {count} runs{doubt}."


def _apart(document: Mapping[str, Any]) -> Iterator[str]:
    for one in document["outliers"]:
        found = "nothing by its last checkpoint" if one["found"] is None else f"{one['found']:.4g}"
        others = f"{one['others_low']:.4g} to {one['others_high']:.4g}" if one["others_low"] is not None else "nothing"
        yield f"{one['run']} stands apart: {one['what']} is {found}, the others' {others}."
