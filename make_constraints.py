"""Resolves this project's dependencies and prints `constraints.txt` (run by `make constraints`).

All extras are resolved together, so that one version of each package serves them all. A package stands in the first
section that needs it: the core's dependencies, then each extra's. torch is pinned beforehand; without a pin, pip may
choose a build for CUDA, gigabytes larger.

    python make_constraints.py 2.13.0 > constraints.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = ("cluster", "test", "cuda", "peers")


def resolve(requirements: list[str]) -> dict[str, str]:
    """Asks pip which versions it would install into an empty environment.

    Args:
        requirements: what to install, as pip's arguments.

    Returns:
        The version of each package by name, this project left out.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE).stdout
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}
    # A local version ("+cpu") names a build of the index it came from; other indexes do not have it.
    return {name: version.partition("+")[0] for name, version in found.items() if name != "kvjax"}


def pin(versions: dict[str, str]) -> list[str]:
    """Formats versions as pins, sorted by name without regard to case."""
    return [f"{name}=={versions[name]}" for name in sorted(versions, key=str.lower)]


def main(torch: str) -> None:
    """Prints the sections of `constraints.txt`.

    Args:
        torch: the version of PyTorch to use.
    """
    everything = resolve([f"torch=={torch}", f".[{','.join(EXTRAS)}]"])
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    print(f"# Made by `make constraints` with {python}; do not edit.")
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "chosen.txt"
        chosen.write_text("\n".join(pin(everything)), encoding="utf-8")
        printed: set[str] = set()
        for extra in (None, *EXTRAS):
            needed = resolve(["--constraint", str(chosen), f".[{extra}]" if extra else "."])
            new = {name: version for name, version in needed.items() if name not in printed}
            title = f'the extra "{extra}"' if extra else "the project itself"
            print("", f"# Needed by {title}", *pin(new), sep="\n")
            printed |= new.keys()


if __name__ == "__main__":
    main(sys.argv[1])
