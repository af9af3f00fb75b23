"""Draws the programs of a benchmark from its seed, and refuses settings that cannot work before drawing any.

The rules make the benchmark a fair test of latest-write lookup:

- every value of a stream is written once;
- consecutive writes go to different keys, the least overwritten key preferred;
- reads ask only for keys whose support is an overwrite;
- no program repeats;
- held-out (key, value) pairs appear in their own split alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from kvjax.config.benchmark import COUNTERFACTUAL_SPLIT, GENERATED_SPLITS, HELDOUT_SPLIT, BenchmarkConfig, SplitConfig
from kvjax.errors import InputError
from kvjax.task.stream import Program, Read, Record, build_record, program_of
from kvjax.task.vocabulary import Vocabulary

_ATTEMPTS = 500  # redraws of one stream before the settings count as exhausted
_PROBE_ORDERS = 64  # write orders tried when counting how many reads a setting can place
_SIZES_TRIED = 16  # of a range of sizes, each one; of a wider range, its ends

Pair = tuple[str, str]


def draw_benchmark(config: BenchmarkConfig) -> tuple[Vocabulary, frozenset[Pair], dict[str, list[Record]]]:
    """Draws a benchmark's vocabulary, held-out pairs and records by split, the same for the same config.

    Raises:
      InputError: the settings cannot work, or the distinct streams they allow run out.
    """
    vocabulary = Vocabulary.of_size(config.num_keys, config.num_values)
    heldout = draw_heldout_pairs(config, vocabulary)
    _check_settings(config, vocabulary, heldout)
    seen_signatures: set[str] = set()
    splits: dict[str, list[Record]] = {}
    for split in GENERATED_SPLITS:
        rng = random.Random(f"{config.seed}/{split}")
        allowed = _allowed_values(vocabulary, heldout, only_heldout=split == HELDOUT_SPLIT)
        programs = _distinct_programs(rng, config.split(split), allowed, seen_signatures, split)
        splits[split] = [
            build_record(
                program,
                vocabulary,
                sample_id=f"{split}_{index:06d}",
                split=split,
                heldout_pairs=heldout,
            )
            for index, program in enumerate(itertools.islice(programs, config.split(split).num_samples))
        ]
    splits[COUNTERFACTUAL_SPLIT] = _draw_counterfactuals(
        config, vocabulary, heldout, splits[config.counterfactual.source_split], seen_signatures
    )
    return vocabulary, heldout, splits


def draw_heldout_pairs(config: BenchmarkConfig, vocabulary: Vocabulary) -> frozenset[Pair]:
    """Draws the held-out (key, value) pairs, spread over the keys as evenly as their number allows."""
    rng = random.Random(f"{config.seed}/holdout_pairs")
    total = math.floor(config.num_keys * config.num_values * config.holdout_answer_pair_fraction)
    keys_with_one_more = set(rng.sample(vocabulary.key_tokens, total % config.num_keys))
    return frozenset(
        (key, value)
        for key in vocabulary.key_tokens
        for value in rng.sample(vocabulary.value_tokens, total // config.num_keys + (key in keys_with_one_more))
    )


def _allowed_values(vocabulary: Vocabulary, heldout: frozenset[Pair], *, only_heldout: bool) -> dict[str, list[str]]:
    return {
        key: [value for value in vocabulary.value_tokens if ((key, value) in heldout) == only_heldout]
        for key in vocabulary.key_tokens
    }


def _draw_write_keys(rng: random.Random, keys: Sequence[str], overwrite_count: int) -> list[str]:
    order = list(keys)
    overwrites = dict.fromkeys(keys, 0)
    for _ in range(overwrite_count):
        candidates = [key for key in keys if key != order[-1]]
        fewest = min(overwrites[key] for key in candidates)
        key = rng.choice([key for key in candidates if overwrites[key] == fewest])
        overwrites[key] += 1
        order.append(key)
    return order


def _read_candidates(write_keys: Sequence[str], lag: range) -> list[Read]:
    """Lists every read whose support is an overwrite and whose lag is allowed, sorted by slot."""
    latest: dict[str, int] = {}
    overwritten: set[str] = set()
    candidates = []
    for slot, key in enumerate(write_keys):
        if key in latest:
            overwritten.add(key)
        latest[key] = slot
        candidates += [Read(slot, k, latest[k]) for k in latest if k in overwritten and slot - latest[k] in lag]
    return candidates


def _draw_program(rng: random.Random, split: SplitConfig, allowed: Mapping[str, Sequence[str]]) -> Program | None:
    """Draws one program; gives None if this draw left too few values or read candidates."""
    active = rng.randint(split.active_keys.min, split.active_keys.max)
    overwrites = rng.randint(split.overwrite_count.min, split.overwrite_count.max)
    num_queries = rng.randint(split.num_queries.min, split.num_queries.max)
    keys = rng.sample(list(allowed), active)
    for _ in range(_ATTEMPTS):  # keep the drawn sizes, so that they stay uniform
        write_keys = _draw_write_keys(rng, keys, overwrites)
        candidates = _read_candidates(write_keys, split.query_lag.values())
        if len(candidates) >= num_queries:
            break
    else:
        return None
    chosen = rng.sample(candidates, num_queries)
    chosen.sort(key=lambda read: read.slot_after_write)  # stable: reads of one slot keep their random order
    used: set[str] = set()
    writes = []
    for key in write_keys:
        free = [value for value in allowed[key] if value not in used]
        if not free:
            return None
        value = rng.choice(free)
        used.add(value)
        writes.append((key, value))
    return Program(tuple(writes), tuple(chosen))


def _distinct_programs(
    rng: random.Random,
    split: SplitConfig,
    allowed: Mapping[str, Sequence[str]],
    seen_signatures: set[str],
    name: str,
) -> Iterator[Program]:
    for index in itertools.count():
        for _ in range(_ATTEMPTS):
            program = _draw_program(rng, split, allowed)
            if program is not None and program.signature() not in seen_signatures:
                break
        else:
            raise InputError(
                f"{name}: expected {split.num_samples} distinct streams from these settings; found only {index} "
                f"before {_ATTEMPTS} draws in a row repeated a stream or ran out of values"
            )
        seen_signatures.add(program.signature())
        yield program


def _draw_counterfactuals(
    config: BenchmarkConfig,
    vocabulary: Vocabulary,
    heldout: frozenset[Pair],
    sources: Sequence[Record],
    seen_signatures: set[str],
) -> list[Record]:
    """Draws records with another value in one supporting write; reuses a source only when all were used."""
    wanted = config.counterfactual.num_samples
    rng = random.Random(f"{config.seed}/{COUNTERFACTUAL_SPLIT}")
    order: list[Record] = []
    while len(order) < wanted:
        order += rng.sample(list(sources), min(len(sources), wanted - len(order)))
    allowed = _allowed_values(vocabulary, heldout, only_heldout=False)
    records = []
    for source in order:
        program = program_of(source)
        used = {value for _, value in program.writes}
        for _ in range(_ATTEMPTS):
            changed = rng.choice(program.reads).support_write_index
            key, _ = program.writes[changed]
            free = [value for value in allowed[key] if value not in used]
            if not free:
                continue  # this key's values are all in the stream; another supporting write may have some left
            value = rng.choice(free)
            writes = (*program.writes[:changed], (key, value), *program.writes[changed + 1 :])
            altered = Program(writes, program.reads)
            if altered.signature() not in seen_signatures:
                break
        else:
            raise InputError(
                f"{COUNTERFACTUAL_SPLIT}: expected {wanted} distinct counterfactuals; found only {len(records)}"
            )
        seen_signatures.add(altered.signature())
        records.append(
            build_record(
                altered,
                vocabulary,
                sample_id=f"{COUNTERFACTUAL_SPLIT}_{len(records):06d}",
                split=COUNTERFACTUAL_SPLIT,
                heldout_pairs=heldout,
                counterfactual_of=source["sample_id"],
                changed_write_index=changed,
            )
        )
    return records


def _check_settings(config: BenchmarkConfig, vocabulary: Vocabulary, heldout: frozenset[Pair]) -> None:
    for split in GENERATED_SPLITS:
        settings = config.split(split)
        if settings.active_keys.max > config.num_keys:
            raise InputError(
                f"{split}.active_keys: expected at most num_keys = {config.num_keys}; "
                f"found max {settings.active_keys.max}"
            )
        _check_reads_fit(split, settings)
        kind = "held-out" if split == HELDOUT_SPLIT else "seen"
        allowed = _allowed_values(vocabulary, heldout, only_heldout=split == HELDOUT_SPLIT)
        changed = int(split == config.counterfactual.source_split)  # a counterfactual needs one more
        _check_values_fit(split, settings, kind, allowed, spare=changed)


def _check_reads_fit(split: str, settings: SplitConfig) -> None:
    """Raises `InputError` if some combination of sizes cannot place the largest number of reads asked for.

    Of wide ranges only the ends are tried: drawing itself finds what is impossible between them.
    """
    rng = random.Random(0)
    actives, overwrite_counts = (
        sizes if len(sizes) <= _SIZES_TRIED else (sizes[0], sizes[-1])
        for sizes in (settings.active_keys.values(), settings.overwrite_count.values())
    )
    for active, overwrites in itertools.product(actives, overwrite_counts):
        keys = [str(index) for index in range(active)]
        most = 0
        for _ in range(_PROBE_ORDERS):
            write_keys = _draw_write_keys(rng, keys, overwrites)
            most = max(most, len(_read_candidates(write_keys, settings.query_lag.values())))
            if most >= settings.num_queries.max:
                break
        else:
            raise InputError(
                f"{split}.num_queries: expected at most {most} reads, all that {active} active keys, {overwrites} "
                f"overwrites and a lag of {settings.query_lag.min} to {settings.query_lag.max} leave room for; "
                f"found max {settings.num_queries.max}"
            )


def _check_values_fit(
    split: str, settings: SplitConfig, kind: str, allowed: Mapping[str, Sequence[str]], *, spare: int
) -> None:
    active, overwrites = settings.active_keys, settings.overwrite_count
    per_key = 1 + math.ceil(overwrites.max / active.min) + spare
    scarcest = min(allowed, key=lambda key: len(allowed[key]))
    if len(allowed[scarcest]) < per_key:
        raise InputError(
            f"{split}: expected at least {per_key} {kind} values for every key ({overwrites.max} overwrites over "
            f"{active.min} active keys); found {len(allowed[scarcest])} for {scarcest}"
        )
    total = active.max + overwrites.max + spare
    # Values are written once a stream, so the keys of one stream need that many different ones between them.
    if min(len(values) for values in allowed.values()) < total:
        subsets = itertools.islice(itertools.combinations(allowed, active.max), 20_000)
        fewest = min(len(set().union(*(allowed[key] for key in subset))) for subset in subsets)
        if fewest < total:
            raise InputError(
                f"{split}: expected at least {total} different {kind} values among any {active.max} keys "
                f"(one a write); found {fewest}"
            )
