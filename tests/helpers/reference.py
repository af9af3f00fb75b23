"""Where the reference trainer's run and what the reference measured on it are found."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

# Names another folder.
_VARIABLE = "KVJAX_REFERENCE_DIR"


def reference_folder() -> Path:
    """Returns the folder with `reference_run.tar.gz` and `golden/`; without it the test is skipped.

    Continuous integration has it, so there a missing folder is a failure, not a skip.
    """
    given = os.environ.get(_VARIABLE)
    folder = Path(given) if given else Path(__file__).resolve().parents[3] / "shared"
    if (folder / "reference_run.tar.gz").is_file():
        return folder
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI runs the reference comparison: expected {folder}/reference_run.tar.gz; found none")
    pytest.skip(f"the reference run is not at {folder} (set {_VARIABLE} to where it is)")


def unpack_reference_run(target: Path) -> Path:
    """Returns a fresh copy of the reference run directory's parent, unpacked under `target`."""
    with tarfile.open(reference_folder() / "reference_run.tar.gz") as archive:
        # As an argument, Python takes the filter from 3.11.4 on alone; some systems' 3.11 is older, and has none.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(target)
    return target / "reference_run"


def golden() -> dict[int, dict]:
    """Returns step -> what the reference measured there, in step order."""
    files = sorted((reference_folder() / "golden").glob("step_*.json"))
    documents = [json.loads(file.read_text()) for file in files]
    return {document["step"]: document for document in documents}
