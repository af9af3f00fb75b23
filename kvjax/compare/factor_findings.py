"""Says in plain sentences what a factor changes, with numbers, and where seeds differ as much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import BIRTH_SPLIT

_FEWEST_FOR_A_CLAIM = 3  # seeds per setting


def factor_findings(document: Mapping[str, Any]) -> list[str]:
    """States what differs between the settings of a factor, the most general first."""
    return [
        *_behaviour(document),
        *_births(document),
        *_shares(document),
        *_carriers(document),
        *_diverged(document),
        *_limits(document),
    ]


def _behaviour(document: Mapping[str, Any]) -> Iterator[str]:
    for split in (BIRTH_SPLIT, HELDOUT_SPLIT):
        parts = []
        for entry in document["settings"]:
            spread = entry["full_splits"].get(split) or entry["accuracy"].get(split, {}).get("best")
            if spread is not None and spread["median"] is not None:
                ends = f"{spread['low']:.3f} to {spread['high']:.3f}"
                parts.append(f"{entry['label']} {spread['median']:.3f} ({ends})")
        if parts:
            yield f"Accuracy on {split} at the best checkpoint, median and range over seeds: {'; '.join(parts)}."


def _births(document: Mapping[str, Any]) -> Iterator[str]:
    metrics = dict.fromkeys(name for entry in document["settings"] for name in entry["births"])
    for metric in metrics:
        parts = []
        for entry in document["settings"]:
            event = entry["births"].get(metric)
            if event is None:
                parts.append(f"{entry['label']} not measured")
                continue
            when = "" if event["median"] is None else f", median step {event['median']}"
            parts.append(f"{entry['label']} {event['formed']} of {event['total']}{when}")
        yield f"Births of {metric}: {'; '.join(parts)}."


def _shares(document: Mapping[str, Any]) -> Iterator[str]:
    known = {name: entry["shares"] for name, entry in document["summaries"].items() if _says_something(entry["shares"])}
    by_setting = {name: shares for name, shares in known.items() if shares["low"] is None or shares["low"] > 0}
    if by_setting:
        surest = sorted(by_setting.items(), key=lambda item: -(item[1]["low"] or 0.0))[:4]
        parts = [f"{name} ({_in_words(shares)})" for name, shares in surest]
        more = f"; and {len(by_setting) - 4} more" if len(by_setting) > 4 else ""
        looked = f"{len(by_setting)} of {len(known)} summaries (looked at one by one)"
        yield f"Settings differ by more than their seeds in {looked}: {'; '.join(parts)}{more}."
    if known and not by_setting:
        yield f"In none of {len(known)} summaries can these seeds show a difference; there may be one all the same."


def _says_something(shares: Mapping[str, Any] | None) -> bool:
    """Checks whether a share has limits, or needs none because the seeds of every setting agree."""
    return shares is not None and (shares["low"] is not None or shares["share"] == 1)


def _in_words(shares: Mapping[str, Any]) -> str:
    if shares["low"] is None:
        return "all seeds of a setting agree"
    return f"{shares['share']:.0%} of its variance, {shares['low']:.0%} to {shares['high']:.0%}"


def _carriers(document: Mapping[str, Any]) -> Iterator[str]:
    for entry in document["settings"]:
        winners = {
            role: [one["component"] for one in own if one["component"] is not None]
            for role, own in entry["roles"].items()
        }
        named = "; ".join(f"{role} {', '.join(own)}" for role, own in winners.items() if own)
        if named:
            yield f"{entry['label']}, head with the largest score by role, seed by seed: {named}."


def _diverged(document: Mapping[str, Any]) -> Iterator[str]:
    for entry in document["settings"]:
        lost = [run for run in entry["runs"] if run["diverged_at"] is not None]
        if lost:
            steps = ", ".join(f"seed {run['seed']} at step {run['diverged_at']}" for run in lost)
            yield f"{entry['label']}: {len(lost)} of {len(entry['runs'])} runs diverged ({steps})."


def _limits(document: Mapping[str, Any]) -> Iterator[str]:
    fewest = min(len(entry["runs"]) for entry in document["settings"])
    if fewest < _FEWEST_FOR_A_CLAIM:
        yield (
            f"With {fewest} seed{'s' if fewest != 1 else ''} per setting this is a screen: it says where to look, and "
            "settles nothing."
        )
