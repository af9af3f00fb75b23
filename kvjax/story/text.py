"""Writes a story in plain words, with its numbers and intervals, so that no other file is needed to understand it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvjax.artifacts.story_schema import (
    Carrier,
    Change,
    Component,
    Confirmation,
    HandoverEntry,
    Movement,
    Phase,
    Reach,
    Story,
)
from kvjax.measure import registry
from kvjax.measure.declaration import HELDOUT_SPLIT
from kvjax.measure.registry import BIRTH_SPLIT
from kvjax.story.wording import (
    both_values,
    cell,
    count,
    distance,
    from_to,
    inflected,
    joined,
    numbers,
    percent,
    points,
    share_change,
    with_change,
    with_interval,
)

# How many components, or measures, a sentence names.
_NAMED = 4

_SPLITS = {
    "train": "streams it was trained on",
    BIRTH_SPLIT: "new streams like those it was trained on",
    "test_iid": "new streams like those it was trained on",
    HELDOUT_SPLIT: "streams whose key-value pairs it never saw in training",
    "structural_ood": "streams with more keys, overwrites and distance than in training",
    "counterfactual": "streams in which one written value was changed",
}

_ABLATIONS = {
    "zero": "zero",
    "mean": "its mean over all tokens",
    "role_mean": "its mean over tokens of the same role",
    "resample": "its output in another stream, at a token of the same role",
}


_PAIRS = {
    "value": "the corrupted stream writes another value under the key",
    "query": "it reads another key",
    "swap": "two writes exchange their keys",
    "stale": "the latest write goes to another key",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the told story: a title, and sentences of which each stands alone."""

    title: str
    lines: tuple[str, ...]


def story_markdown(story: Story) -> str:
    """Writes the whole story as a Markdown page."""
    parts = [f"# {_title(story)}"]
    parts += [f"## {part.title}\n\n" + "\n".join(f"- {line}" for line in part.lines) for part in sections(story)]
    return "\n\n".join(parts) + "\n"


def story_lines(story: Story) -> list[str]:
    """Writes the whole story as lines for a terminal."""
    lines = [_title(story)]
    for part in sections(story):
        lines += ["", part.title, *(f"- {line}" for line in part.lines)]
    return lines


def summary_lines(story: Story) -> list[str]:
    """Writes what happened in a sentence or two for each phase and handover, in the order of the run."""
    if not story.phases and not story.handovers:
        return [_nothing(story)]
    told = [(phase.between, _phase_summary(phase)) for phase in story.phases]
    told += [(one.between, _handover_summary(one)) for one in story.handovers]
    return [sentence for _, sentence in sorted(told)]


def sections(story: Story) -> list[Section]:
    """Writes every part: the summary, how to read it, each phase, each handover, and how sure all of it is."""
    return [
        Section("In short", tuple(summary_lines(story))),
        Section("How to read it", tuple(_how_to_read(story))),
        *(_phase_section(story, number, phase) for number, phase in enumerate(story.phases, 1)),
        *(_handover_section(story, one) for one in story.handovers),
        *([] if story.phases else [Section("What was measured", tuple(_at_the_ends(story)))]),
        Section("How sure", tuple(_how_sure(story))),
    ]


def _title(story: Story) -> str:
    seed = "no seed recorded" if story.seed is None else f"seed {story.seed}"
    return f"What happened in {story.run_name} ({seed})"


def _nothing(story: Story) -> str:
    told = {"undecidable": "Whether something formed cannot be decided", "no transition": "Nothing formed"}
    return f"{told.get(story.verdict, 'No window makes a phase')}: {story.reason}."


def _phase_summary(phase: Phase) -> str:
    carriers = [carrier.component for carrier in phase.carriers]
    heads = f" {joined(carriers)} {inflected('carry', carriers)} the answers." if carriers else ""
    shown = [f"{split} {both_values(one)}" for split, one in _shown(phase.accuracy).items()]
    followed = f" Accuracy: {', '.join(shown)}." if shown else ""
    reach = phase.reach.get(BIRTH_SPLIT)
    back = ""
    if reach is not None and reach.after is not None and reach.after != reach.before:
        extent = "the longest measured" if reach.after == reach.longest else f"not the {reach.longest} measured"
        back = f" Values are found up to {reach.after} tokens back, {extent}."
    return f"Steps {from_to(phase.between)}: {_headline(phase)}.{heads}{followed}{back}"


def _handover_summary(one: HandoverEntry) -> str:
    held_out = one.accuracy.get(HELDOUT_SPLIT)
    more = f" Accuracy on {HELDOUT_SPLIT}: {both_values(held_out)}." if held_out is not None and held_out.holds else ""
    givers, takers = one.from_components, one.to_components
    provisional = "" if one.persisted else " (provisional)"
    span, hand = f"{one.between[0]} and {one.between[1]}", inflected("hand", givers)
    return f"Between steps {span} {joined(givers)} {hand} over to {joined(takers)}{provisional}.{more}"


def _headline(phase: Phase) -> str:
    """Says in a few words what happened."""
    if phase.carriers and not phase.carriers_before:
        return "the model begins to answer"
    if phase.carriers_before and not phase.carriers:
        return "what was learnt is lost"
    for split in (BIRTH_SPLIT, *phase.accuracy):
        accuracy = phase.accuracy.get(split)
        if accuracy is not None and accuracy.holds:
            better = accuracy.change > 0
            on = "" if split == BIRTH_SPLIT else f" on {split}"
            by = "" if phase.carriers else ", carried by no head yet"  # as when the model first answers with any value
            return f"answers get {'better' if better else 'worse'}{on}{by}"
    return "components change, and answers do not"


def _phase_section(story: Story, number: int, phase: Phase) -> Section:
    lines = [f"Accuracy on {split}: {with_change(one)}." for split, one in phase.accuracy.items() if one.holds]
    if still := [split for split, one in phase.accuracy.items() if not one.holds]:
        lines.append(f"No change beyond its interval on {joined(still)}.")
    lines += _who_carries(story, phase)
    reach = phase.reach.get(BIRTH_SPLIT)
    if reach is not None:
        lines += _range_lines(reach)
    for moved, verb in ((phase.rose, "rose"), (phase.fell, "fell")):
        if others := [m for m in moved if m.metric not in ("answer_accuracy", "heldout_answer_accuracy")][:_NAMED]:
            listed = "; ".join(f"{m.metric} on {m.split} by {abs(m.size):.3g} at step {m.step}" for m in others)
            lines.append(f"With it {verb}: {listed}.")
    lines += _confirmed(phase.confirmations, [c.component for c in phase.carriers])
    if len(phase.windows) > 1:
        lines.append(f"It holds {len(phase.windows)} windows, around steps {joined(map(str, phase.windows))}.")
    return Section(f"Phase {number}, steps {from_to(phase.between)}: {_headline(phase)}", tuple(lines))


def _who_carries(story: Story, phase: Phase) -> list[str]:
    """Says which heads and MLPs carry it before and after, and whose drops changed."""
    before, after = phase.between
    lines = [f"{carrier}." for carrier in map(_carrier, phase.carriers)]
    if lines:
        lines[0] = f"Who carries it at step {after}: {lines[0]}"
    else:
        lines.append(f"Who carries it at step {after}: no head; no drop reaches {story.floor:g} and exceeds noise.")
    if not phase.carriers_before:
        lines.append(f"Who carried it at step {before}: no head; no drop reached {story.floor:g} and exceeded noise.")
    elif [c.component for c in phase.carriers_before] != [c.component for c in phase.carriers]:
        shares = joined(f"{c.component} ({percent(c.share)}, drop {c.drop:.3f})" for c in phase.carriers_before)
        lines.append(f"Who carried it at step {before}: {shares}.")
    for rose, verb in ((True, "grow"), (False, "shrink")):
        changed = [c for c in phase.components if (c.drop.change > 0) == rose and ".mlp" not in c.component][:_NAMED]
        if changed:
            lines.append(f"Drops that {verb}: {'; '.join(map(_drop_change, changed))}.")
    named = {c.component for c in (*phase.carriers, *phase.carriers_before)}
    if story.ablation != "zero" and (others := [c for c in phase.carriers_by_zero if c not in named]):
        lines.append(f"Zero ablation would also name {joined(others)}, with a drop below half the leader's here.")
    if phase.mlps:
        lines.append(f"The MLPs that matter most: {joined(f'{c.component} (drop {c.drop:.3f})' for c in phase.mlps)}.")
    return lines


def _carrier(carrier: Carrier) -> str:
    share, ends = percent(carrier.share), " to ".join(map(percent, carrier.share_interval))
    drop = f"a drop of {carrier.drop:.3f} ({numbers(carrier.drop_interval)})"
    return f"{carrier.component} has {share} of all drops ({ends}), {drop}"


def _drop_change(one: Component) -> str:
    return f"{one.component} {with_interval(one.drop)}"


def _range_lines(reach: Reach) -> list[str]:
    if reach.after is None:
        return []
    far = reach.after >= reach.longest
    extent = "the longest measured" if far else f"of {reach.longest} measured"
    interval = "" if reach.after_interval is None else f" ({reach.after_interval[0]} to {reach.after_interval[1]})"
    before = "" if reach.before in (None, reach.after) else f" Before it was {reach.before}."
    by_distance = "; ".join(
        f"{distance(d.tokens)} tokens {d.before:.2f} to {d.after:.2f}"
        for d in reach.distances
        if d.before is not None and d.after is not None
    )
    return [
        f"{'Range' if far else 'Short range'}: values are found up to {reach.after} tokens back{interval}, {extent}."
        f"{before}",
        f"Accuracy on {BIRTH_SPLIT} by distance: {by_distance}.",
    ]


def _handover_section(story: Story, one: HandoverEntry) -> Section:
    lines = []
    for moved in one.movements:
        verb = "falls" if moved.component in one.from_components else "rises"
        ends, change = share_change(moved.share), points(moved.share.interval)
        lines.append(
            f"The share of {moved.component} {verb} from {ends} (change {change}). It is halfway at step "
            f"{moved.midpoint:.0f}, between checkpoints {moved.interval[0]} and {moved.interval[1]}. {_held(moved)}"
        )
    if story.ablation != "zero":
        shares = "; ".join(f"{m.component} from {share_change(m.share_by_zero)}" for m in one.movements)
        lines.append(f"By zero ablation the shares go: {shares}.")
    start, end = one.measured_at
    lines += [
        f"Accuracy on {split} from step {start} to {end}: {with_change(accuracy)}."
        for split, accuracy in one.accuracy.items()
        if accuracy.holds
    ]
    reach = one.reach.get(BIRTH_SPLIT)
    if reach is not None and reach.before is not None and reach.after is not None:
        lines.append(f"Range on {BIRTH_SPLIT}: {reach.before} tokens at step {start}, {reach.after} at step {end}.")
    lines += _confirmed(one.confirmations, [*one.from_components, *one.to_components])
    givers, takers = joined(one.from_components), joined(one.to_components)
    lose = inflected("lose", one.from_components)
    double, rise = (inflected(verb, one.to_components) for verb in ("double", "end"))
    lines.append(
        f"How sure: in {percent(one.support)} of the resamples {givers} {lose} a third or more, and {takers} at least "
        f"{double} and {rise} above."
    )
    if not one.persisted:
        lines.append(f"It is provisional: not all of it is seen at {story.persistence} further checkpoints yet.")
    title = f"Handover between steps {one.between[0]} and {one.between[1]}: {givers} to {takers}"
    return Section(title, tuple(lines))


def _held(moved: Movement) -> str:
    if not moved.further_checkpoints:
        return f"This is seen at step {moved.held_from} alone, the last one."
    return f"This is seen from step {moved.held_from} on, at {count(moved.further_checkpoints, 'further checkpoint')}."


def _confirmed(confirmations: Sequence[Confirmation], carriers: Sequence[str]) -> list[str]:
    """Says, by kind of pair, which components recover the clean answer when they are patched, and which do not."""
    lines, silent = [], []
    for kind in dict.fromkeys(one.kind for one in confirmations):
        own = [one for one in confirmations if one.kind == kind]
        told = f"Patching on {kind} pairs at step {own[0].step}"
        if all(one.recovery is None for one in own):
            silent.append(kind)
            continue
        confirmed = [one for one in own if one.confirmed and one.component in carriers]
        others = [one for one in own if one.confirmed and one.component not in carriers and ".mlp" not in one.component]
        missing = [one.component for one in own if not one.confirmed]
        adds = joined(map(_recovered, others[:_NAMED])) if others else ""
        if not carriers:
            lines.append(f"{told} finds {adds or 'no head'}.")
            continue
        confirms = joined(map(_recovered, confirmed)) if confirmed else f"none of {joined(carriers)}"
        parts = [f"confirms {confirms}"]
        if confirmed and missing:
            parts.append(f"not {joined(missing)}")
        if adds:
            parts.append(f"and adds {adds}")
        lines.append(f"{told} {', '.join(parts)}.")
    if silent:
        lines.append(
            f"Patching on {joined(silent)} pairs at step {confirmations[0].step} shows nothing: the clean run fails on "
            "them, or the corrupted run answers alike."
        )
    return lines


def _recovered(one: Confirmation) -> str:
    return f"{one.component} {one.recovery:.2f} ({numbers(one.interval, 2)})"


def _at_the_ends(story: Story) -> list[str]:
    first, last = story.steps[0], story.steps[-1]
    if first == last:
        return [f"Accuracy on {split} at step {first}: {cell(values[0])}." for split, values in story.accuracy.items()]
    return [
        f"Accuracy on {split}: {cell(values[0])} at step {first}, {cell(values[-1])} at step {last}."
        for split, values in story.accuracy.items()
    ]


def _how_sure(story: Story) -> list[str]:
    steps = story.steps
    lines = [
        f"Told from {count(len(steps), 'checkpoint')}, steps {from_to((steps[0], steps[-1]))}, measured on "
        f"{story.reads} reads of {story.sequences} streams.",
        "Numbers in brackets are 95 % intervals over streams: other streams might give other numbers. They do not "
        "cover other seeds.",
        "What happened between two checkpoints was not observed. A midpoint's interval is therefore two checkpoints.",
    ]
    if not story.complete:
        lines.append(
            f"The run is unfinished: step {steps[-1]} of {story.planned_steps}. Later steps may change the story."
        )
    lines += [f"Not told: {sentence}." for sentence in story.untold]
    if any(one.confirmations for one in (*story.phases, *story.handovers)):
        lines.append(f"Components were patched as well: {joined(story.told_from.interventions)}.")
    elif story.phases:
        lines.append("Which components carry it rests on ablations alone. `kvjax intervene` checks it by patching.")
    return lines + [f"Note: {note}." for note in story.notes]


def _how_to_read(story: Story) -> list[str]:
    guess = "" if story.chance is None else f" Guessing a value gives {story.chance:.3f}."
    lines = [
        "The model sees a stream of writes (a value under a key) and reads. An answer is right if it is the latest "
        f"value written under the key. Accuracy is the share of right answers.{guess}",
        *(f"{split}: {_SPLITS[split]}." for split in story.accuracy if split in _SPLITS),
    ]
    if story.phases or story.handovers:
        lines += [
            "L1H3 is head 3 of layer 1, and L1.mlp the MLP of layer 1. Both are counted from 0.",
            "A drop is the accuracy that is lost on all these streams if the output of one head or MLP is replaced by "
            f"{_ABLATIONS[story.ablation]}. Its share is the drop over the sum of all heads' drops (MLPs: all MLPs').",
            "The head with the largest share carries the answers, together with heads of at least half that share.",
            "The distance of a read is counted in tokens, from the written value to the answer. The range ends where "
            "accuracy first falls below half of that at the best distance.",
        ]
    named = {m.metric for phase in story.phases for m in (*phase.rose, *phase.fell)}
    lines += [f"{name}: {meaning}." for name, meaning in _meanings().items() if name in named]
    if any(one.confirmations for one in (*story.phases, *story.handovers)):
        lines.append(
            "Patching gives a run on a corrupted stream one component's output from the clean stream. Recovery, from 0 "
            "to 1, is the part of the clean answer's lead that comes back."
        )
        kinds = dict.fromkeys(c.kind for one in (*story.phases, *story.handovers) for c in one.confirmations)
        lines += [f"{kind} pairs: {_PAIRS[kind]}." for kind in kinds if kind in _PAIRS]
    return lines


def _meanings() -> dict[str, str]:
    """Describes the measures that a phase names, but for accuracy."""
    found = {}
    for measure, field in registry.triggers():
        if measure.level == "read" and measure.name != "answer_accuracy":
            found[field.trigger] = measure.description.replace("p_e", "the position that predicts the answer").replace(
                "the support value", "the value looked for"
            )
    return found


def _shown(accuracy: dict[str, Change]) -> dict[str, Change]:
    """Picks the splits that a short sentence names: like training, and held out, if they changed."""
    preferred = [split for split in (BIRTH_SPLIT, HELDOUT_SPLIT) if split in accuracy] or list(accuracy)
    return {split: accuracy[split] for split in preferred if accuracy[split].holds}
