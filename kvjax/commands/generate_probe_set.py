"""Choose the fixed records that every checkpoint is measured on, and the fit set beside them.

A probe set is immutable: it is written once, hashed, and refused if edited or used with another benchmark.
"""

from __future__ import annotations

from kvjax.pipeline.settings import ProbeSetSettings

SETTINGS = (ProbeSetSettings,)


def run(settings: ProbeSetSettings) -> None:
    from kvjax.pipeline.probe_set import choose_probe_set
    from kvjax.pipeline.text import print_probe_set

    print_probe_set(choose_probe_set(settings))
