"""The one spelling of heads and MLPs."""

from __future__ import annotations

import pytest

from kvjax.errors import InputError
from kvjax.model.components import Component, all_components, all_heads


@pytest.mark.parametrize(("component", "spelling"), [(Component(1, 3), "L1H3"), (Component(10), "L10.mlp")])
def test_spelling(component, spelling):
    """A component is printed in one way, and read back from it."""
    assert str(component) == spelling
    assert Component.parse(spelling) == component


@pytest.mark.parametrize("spelling", ["MLP", "L1", "L1h3", "L1H", "L-1H3", " L1H3", "L1.MLP", ""])
def test_other_spellings(spelling):
    """Any other spelling is refused by name."""
    with pytest.raises(InputError, match="L1H3"):
        Component.parse(spelling)


def test_older_spelling_of_an_mlp():
    """`MLP2` is refused with the spelling that it has now, under the name of who gave it."""
    with pytest.raises(InputError, match=r"^components: expected L2\.mlp for the MLP of layer 2; found MLP2$"):
        Component.parse("MLP2", "components")


def test_every_component():
    """Heads and MLPs come layer by layer."""
    assert list(map(str, all_heads(2, 2))) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert list(map(str, all_components(2, 2))) == ["L0H0", "L0H1", "L0.mlp", "L1H0", "L1H1", "L1.mlp"]
