"""The walk in docs/design.md, from a checkpoint file to a row, is of functions that exist."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "docs" / "design.md").read_text().split("## From a checkpoint file to a row\n")[1].split("\n## ")[0]
STOPS = re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", SECTION, re.MULTILINE)


def test_length_of_the_walk():
    """It has at most 15 stops, numbered from 1, and every line of the list is one."""
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", SECTION, re.MULTILINE)]
    assert numbers == list(range(1, len(STOPS) + 1)) and 10 <= len(STOPS) <= 15


def test_rooms_of_the_walk():
    """No folder is entered again after it was left, and no module twice."""
    folders = [folder for folder, _ in itertools.groupby(Path(file).parent for file, _ in STOPS)]
    assert len(folders) == len(set(folders)) and len(STOPS) == len({file for file, _ in STOPS})


@pytest.mark.parametrize(("file", "function"), STOPS)
def test_stop_of_the_walk(file, function):
    """The function stands where the page says."""
    *classes, name = function.split(".")
    body = ast.parse((ROOT / file).read_text()).body
    for owner in classes:
        (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        body = found.body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}
