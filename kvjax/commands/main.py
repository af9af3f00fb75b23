"""`kvjax <command> --flags`: finds the command, parses its flags, turns unusable input into one line and status 2.

Nothing heavy is imported here or at the top of a command's module, so that help and flag errors answer at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import types
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from absl import flags

from kvjax import __version__
from kvjax.commands.flags import flags_of, help_of, message_of, read_settings, with_flags
from kvjax.config.settings import declared
from kvjax.errors import InputError, Note, one_line, shortened, visible

_LONGEST_MESSAGE = 2000  # characters: enough for two paths of the greatest length that people have

# Command -> what it does, in the order a study runs them.
COMMANDS = {
    "quickstart": "see a lookup mechanism form: small benchmark, two seeds, sweep, figures",
    "pipeline": "run a whole study: benchmark, seeds, sweep, windows, interventions, comparison",
    "generate-benchmark": "draw a key-value benchmark from a config, with its fairness checks",
    "train": "train a decoder on a benchmark, many seeds as one program",
    "generate-probe-set": "choose the fixed records that every checkpoint is measured on",
    "convert": "convert PyTorch checkpoints to Flax parameters, or back, with a parity certificate",
    "evaluate": "evaluate a checkpoint of each run on full splits",
    "select-reference": "rank runs by their best checkpoint and select the reference",
    "checkpoint-sweep": "measure every checkpoint of one or several runs",
    "birth-windows": "find the few checkpoints between which something formed, or say that nothing did",
    "intervene": "inside birth windows: patching, paths, component sets, subspaces, neurons",
    "compare-seeds": "say what repeats across seeds: births, order, roles that move from head to head",
    "factor-screen": "vary one factor at a time, and say what each changes beside what seeds change",
    "report": "put everything measured on runs into one page to look at",
    "verify": "hash everything again, measure a sample again, and say what could be vouched for",
    "status": "say which conditions for circuit work a run meets, and what to do next",
}


# Switches of JAX by which it computes in another precision, stops at values that do not exist, or compiles nothing.
_SWITCHES = ("JAX_ENABLE_X64", "JAX_DEBUG_NANS", "JAX_DEBUG_INFS", "JAX_DISABLE_JIT")
_OFF = ("", "0", "f", "false", "n", "no", "off")


def run_process() -> None:
    """Runs the command of this process's arguments and ends the process with its status."""
    if sys.stdout is None:  # closed by whoever started the process
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # A terminal that cannot show a character gets its escape, instead of an error in place of the result.
    sys.stdout.reconfigure(errors="backslashreplace")
    for name in _SWITCHES:  # before JAX is imported and reads them
        if os.environ.pop(name, "").lower() not in _OFF:
            _tell("kvjax", f"note: {name} is set aside: commands give the same numbers in every environment")
    status = main()
    gc.freeze()  # else Python looks for garbage among a million objects before it ends, for 0.4 s
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    who, names = "kvjax", ()
    try:
        if not argv or argv[0] in ("--help", "-h", "help"):
            print(_overview())
            status = 0 if argv else 2
        elif argv[0] == "--version":
            print(__version__)
            status = 0
        elif argv[0] not in COMMANDS:
            raise InputError(f"expected a command among {', '.join(COMMANDS)}; found {one_line(argv[0])}")
        else:
            who = f"kvjax {argv[0]}"
            module = importlib.import_module(f"kvjax.commands.{argv[0].replace('-', '_')}")
            names = {field.name for one in module.SETTINGS for field in declared(one)}
            status = _run(argv[0], argv[1:], module)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _fail(who, message_of(error, names))
    except BrokenPipeError:
        _discard_output()
        return 0  # whoever read the output has read enough
    except (OSError, UnicodeError, RecursionError, MemoryError) as error:
        # What no reader or writer foresaw of a file or its content: still one line.
        _discard_output()
        return _fail(who, str(error) or "out of memory")
    except KeyboardInterrupt:
        return _fail(who, "interrupted; what was written is kept", status=130)


def _run(name: str, arguments: list[str], module: types.ModuleType) -> int:
    """Runs a command's module, or explains its flags; returns the exit status.

    Raises:
      InputError: a flag is unknown, missing or has no usable value, or the command's work was refused.
    """
    if any(flag in ("--help", "-help", "-h", "--helpfull", "--helpshort") for flag in arguments):
        print(f"kvjax {name}: {module.__doc__}\nFlags:\n{help_of(module.SETTINGS)}")
        return 0
    values = flags_of(module.SETTINGS)
    try:
        extra = values([name, *arguments])[1:]
    except flags.Error as error:
        raise InputError(f"{one_line(error)} (see kvjax {name} --help)") from None
    if extra:
        raise InputError(f"expected flags only; found {extra[0]!r} (see kvjax {name} --help)")
    given = [read_settings(values, settings) for settings in module.SETTINGS]
    with _notes_as_lines(f"kvjax {name}", {field.name for one in module.SETTINGS for field in declared(one)}):
        return module.run(*given) or 0


@contextlib.contextmanager
def _notes_as_lines(who: str, names: Collection[str]) -> Iterator[None]:
    """Prints notes as lines on standard error, each once; other warnings stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        others, seen = warnings.showwarning, set()

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, Note):
                others(message, category, *where, **more)
            elif str(message) not in seen:
                seen.add(str(message))
                _tell(who, f"note: {with_flags(str(message), names)}")

        warnings.showwarning = show
        yield


def _discard_output() -> None:
    """Throws away what was printed and cannot be written, so that Python does not try again when it ends."""
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # standard output is no file, as under a test


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {does}" for name, does in COMMANDS.items())
    return (
        "kvjax: when, where and in what order a transformer's lookup mechanism forms.\n\n"
        f"usage: kvjax <command> --flags\n\n{lines}\n\nkvjax <command> --help explains the flags of one."
    )


def _fail(who: str, message: str, status: int = 2) -> int:
    _tell(who, message)
    return status


def _tell(who: str, message: str) -> None:
    """Prints one line on standard error; control characters in it are made visible, for some may come from files."""
    folded = visible(" ".join(message.split()))
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{who}: {shortened(folded, _LONGEST_MESSAGE)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_process()
