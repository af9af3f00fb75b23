"""The kinds of intervention, each in one module: what runs on the devices, what analyses it, what summarises it.

A kind is added as a module with a `KIND` (`kvjax.intervene.kinds.kind.Kind`) and a line in `MODULES`. Modules are
imported when they are needed, for flags need the names before JAX is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvjax.intervene.kinds.kind import Kind

# The name of a kind in flags and files, and its module.
MODULES = {
    "activation_patching": "activation_patching",
    "path_patching": "path_patching",
    "necessity": "component_sets",
    "across_checkpoints": "across_checkpoints",
    "subspaces": "subspaces",
    "neurons": "neurons",
    "attribution": "attribution_patching",
}

KINDS = tuple(MODULES)


def find_kind(name: str) -> Kind:
    """Imports a kind of intervention; raises KeyError if there is none of that name."""
    return importlib.import_module(f"kvjax.intervene.kinds.{MODULES[name]}").KIND
