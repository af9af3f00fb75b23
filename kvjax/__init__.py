"""kvjax: when, where and in what order the lookup mechanism of a small transformer forms.

Importing the package is instant: JAX and the rest load with what uses them, when it is first asked for.
"""

from kvjax.right_sums import keep_reductions_from_ynnpack

__version__ = "0.1.0"

keep_reductions_from_ynnpack()  # before JAX starts, whoever starts it

# Public name -> the module it lives in.
_PUBLIC = {
    "sweep": "kvjax.api",
    "compare_seeds": "kvjax.api",
    "open_run": "kvjax.opened_run",
    "open_results": "kvjax.api",
    "charts": "kvjax.api",
    "ablate": "kvjax.intervene.public",
    "patch": "kvjax.intervene.public",
    "path_patch": "kvjax.intervene.public",
    "across_checkpoints": "kvjax.intervene.public",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
