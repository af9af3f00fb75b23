"""Commands as a person types them."""

from __future__ import annotations

import os

import pytest

from kvjax.commands.main import main

# Programs under test are small: without LLVM's optimisations and the emitters of fused loops, XLA compiles them in a
# quarter of the time. What XLA does to the whole program stays.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def compile_quickly() -> None:
    """Makes this process and those it starts compile quickly; what stands in XLA_FLAGS already comes last and wins."""
    given = os.environ.get("XLA_FLAGS", "")
    if QUICK_TO_COMPILE not in given:
        os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {given}".strip()


def optimised_environment() -> dict[str, str]:
    """Returns the environment in which a command of its own compiles as it does for people."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(QUICK_TO_COMPILE, "").strip()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must refuse, and returns its one line."""
    status = main(list(arguments))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def sweep_arguments(run: object, **flags: object) -> list[str]:
    """Returns the arguments of a sweep of a run directory."""
    given = {"run_dirs": run, **flags}
    return ["checkpoint-sweep", "--noprogress", *(f"--{name}={value}" for name, value in given.items())]
