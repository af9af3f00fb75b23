"""The declarations of measures: consistent with each other, with the configs, and with docs/definitions.md."""

import re
from pathlib import Path

import pytest

from kvjax.artifacts.tables import row_schema
from kvjax.config import benchmark, windows
from kvjax.measure import declaration, registry

DEFINITIONS = (Path(__file__).parents[2] / "docs" / "definitions.md").read_text()


def table_rows(heading_pattern):
    """Returns the cells of every row of the tables whose header matches."""
    rows, inside = [], False
    for line in DEFINITIONS.splitlines():
        if not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif re.match(heading_pattern, line):
            inside = True
    return rows


def row_of(measure):
    """Returns the cells that the table of all measures should have for a measure."""
    fields = ", ".join(f"`{field.name}`" for field in measure.fields)
    return [f"`{measure.name}`", measure.units, measure.kind, fields]


def test_names_are_unique():
    """No two measures share a name, and no two fields of one table do."""
    names = [measure.name for measure in registry.MEASURES]
    assert len(set(names)) == len(names)
    for table in ("checkpoint", "heads", "mlps"):
        fields = [field.name for _, field in registry.row_fields(table)]
        assert len(set(fields)) == len(fields)


def test_ratios_have_sources():
    """A ratio of sums names its arrays; a statistic has no interval of its own."""
    for measure in registry.MEASURES:
        assert bool(measure.sources) == measure.is_ratio, measure.name
        assert measure.compute is None or measure.sources, measure.name


def test_one_origin_of_each_array():
    """No two declarations make the same array, and every array of a clean run has one that makes it."""
    made = [source for measure in registry.computed() for source in measure.sources]
    assert len(set(made)) == len(made) and set(made) == registry.computed_sources()
    clean = {"read", "token", "lens", "attribution"}
    for measure in registry.MEASURES:
        for source in measure.sources:
            # The fixed margin needs two checkpoints' logits, so that no clean run makes it.
            assert source.partition("/")[0] not in clean or source in made or measure.name == "fixed_margin", source


def test_triggers_of_the_window_config():
    """The window config has one section for every declared kind of trigger."""
    kinds = [field.trigger for _, field in registry.triggers()]
    assert list(windows.TriggersConfig.model_fields) == kinds and len(set(kinds)) == len(kinds)


def test_heldout_split_of_the_benchmark():
    """The declarations name the held-out split as the benchmark does."""
    assert declaration.HELDOUT_SPLIT == benchmark.HELDOUT_SPLIT


def test_definitions_of_all_measures():
    """The table of all measures in docs/definitions.md has each with its units, in the order of declaration."""
    expected = [row_of(measure) for measure in registry.MEASURES]
    found = table_rows(r"\| variable \| units ")
    missing = [" | ".join(["", *row, ""]).strip() for row in expected if row not in found]
    assert not missing, "docs/definitions.md lacks:\n" + "\n".join(missing)
    assert found == expected


@pytest.mark.parametrize("cells", table_rows(r"\| field"), ids=lambda cells: cells[0])
def test_fields_named_by_the_definitions(cells):
    """Every name in a table of fields is a declared measure or a field of some row."""
    known = {measure.name for measure in registry.MEASURES}
    for table in ("checkpoint", "heads", "mlps"):
        known |= row_schema(table).model_fields.keys()
    names = re.findall(r"`([^`]+)`", cells[0])
    assert names
    for name in names:
        if name != "delta_*":
            assert name in known or f"{name}_by_layer" in known, name
