"""Draw a symbolic key-value benchmark from a config.

The same config gives the same bytes. Settings that cannot work are refused before anything is drawn.
"""

from __future__ import annotations

from kvjax.pipeline.settings import GenerateSettings

SETTINGS = (GenerateSettings,)


def run(settings: GenerateSettings) -> None:
    from kvjax.pipeline.generate import generate
    from kvjax.pipeline.text import print_benchmark

    print_benchmark(generate(settings))
