"""Commands as a person types them."""

from __future__ import annotations

import pytest

from kvjax.commands.main import main


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
