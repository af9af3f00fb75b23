"""Errors and the texts in them: parameters and flags, quoted commands, control characters."""

import re
import shlex

import pydantic
import pytest

from kvjax.commands.flags import message_of, with_flags
from kvjax.errors import bad_argument, command, misfit, one_line, unusable, visible


def test_parameter_of_an_error_from_python():
    """The message names the parameter, and the error carries it."""
    error = bad_argument("steps", "all, or steps", "soon")
    assert str(error) == "steps: expected all, or steps; found soon" and error.parameter == "steps"
    assert unusable("run/sweep.json", "a sweep", "none").parameter is None


def test_flag_of_an_error_on_the_command_line():
    """A command writes the parameter, and parameters in backticks, as flags; names it has no flag for stay."""
    error = bad_argument("window", "no window beside `steps=150` or `other`", 500)
    expected = "--window: expected no window beside --steps=150 or `other`; found 500"
    assert message_of(error, {"window", "steps"}) == expected
    assert message_of(bad_argument("streams", "tokens", 3), {"steps"}) == "streams: expected tokens; found 3"


def test_backticks_of_a_file():
    """A name in backticks that is no flag stays as it is."""
    assert with_flags("found `rm -rf` and `stepsize`", {"steps"}) == "found `rm -rf` and `stepsize`"


@pytest.mark.parametrize("path", ["a run", "it's", "plain", "a$b"])
def test_quoted_paths_of_a_command(path):
    """A shell splits the command into the words it was made of."""
    written = command("status", run_dirs=[path, "b"], require=True, reasons=None, show=3, force=False)
    assert shlex.split(written) == ["kvjax", "status", f"--run_dirs={path},b", "--require", "--show=3"]


def test_control_characters_of_a_file():
    """Escape sequences and lone surrogates are printed as text; letters of any script stay."""
    assert visible("\x1b[31mRED é … ∞") == r"\x1b[31mRED é … ∞"
    assert visible("\ud800") == r"\ud800"
    assert one_line(300 * "x") == 300 * "x" and one_line(301 * "x") == 297 * "x" + "..."
    assert one_line("two\nlines\x07") == r"two lines\x07"


class Shape(pydantic.BaseModel):
    """A schema of two fields, one of them nested."""

    sizes: dict[str, int]
    name: str


@pytest.mark.parametrize(
    ("document", "of_a_config", "of_a_result"),
    [
        (
            {"sizes": {"heads": "x"}, "name": "a"},
            'sizes.heads: .* valid integer.*; found "x"',
            "heads: ",
        ),
        ({"sizes": {}}, "expected a field name; found none", "found no field name"),
        ({"name": 3}, r"expected a field sizes; found none \(and 1 more\)", "found no field sizes"),
        ([], r"the document: .*; found \[\]", "the document: "),
    ],
)
def test_document_of_another_schema(document, of_a_config, of_a_result):
    """The message names the first field that does not fit; that of a result says what the file should be."""
    with pytest.raises(pydantic.ValidationError) as error:
        Shape.model_validate(document)
    config, result = misfit("a.json", error.value), misfit("a.json", error.value, "a sweep")
    assert re.match("a.json: " + of_a_config, str(config))
    assert re.match("a.json: expected a sweep; found .*" + of_a_result.removeprefix("found "), str(result))
