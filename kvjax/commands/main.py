"""`kvjax <command> --flags`: finds the command, parses its flags, turns unusable input into one line and status 2.

Nothing heavy is imported here or at the top of a command's module, so that help and flag errors answer at once.
"""

from __future__ import annotations

import gc
import importlib
import sys

from absl import flags

from kvjax.commands.flags import message_of
from kvjax.errors import InputError, one_line, visible

# Command -> what it does, in the order a study runs them.
COMMANDS = {
    "quickstart": "see a lookup mechanism form: small benchmark, two seeds, sweep, figures",
    "generate-benchmark": "draw a key-value benchmark from a config, with its fairness checks",
    "train": "train a decoder on a benchmark, many seeds as one program",
    "generate-probe-set": "choose the fixed records that every checkpoint is measured on",
    "convert": "convert PyTorch checkpoints to Flax parameters, or back, with a parity certificate",
    "evaluate": "evaluate a checkpoint of each run on full splits",
    "select-reference": "rank runs by their best checkpoint and select the reference",
    "checkpoint-sweep": "measure every checkpoint of one or several runs",
    "birth-windows": "find the few checkpoints between which something formed, or say that nothing did",
    "intervene": "inside birth windows: patching, paths, component sets, subspaces, neurons",
    "status": "say which conditions for circuit work a run meets, and what to do next",
}


def run_process() -> None:
    """Runs the command of this process's arguments and ends the process with its status."""
    status = main()
    gc.freeze()  # else Python looks for garbage among a million objects before it ends, for 0.4 s
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from kvjax import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        return _fail("kvjax", f"expected a command among {', '.join(COMMANDS)}; found {name}")
    module = importlib.import_module(f"kvjax.commands.{name.replace('-', '_')}")
    if any(flag in ("--help", "-help", "-h", "--helpfull", "--helpshort") for flag in rest):
        print(f"kvjax {name}: {module.__doc__}\nFlags:\n{_flag_help(module.FLAGS)}")
        return 0
    try:
        module.FLAGS.unparse_flags()  # a command may run several times in one process
        extra = module.FLAGS([name, *rest])[1:]
        if extra:
            raise flags.Error(f"expected flags only; found {extra[0]!r}")
    except flags.Error as error:
        return _fail(f"kvjax {name}", f"{one_line(error)} (see kvjax {name} --help)")
    try:
        module.run()
    except InputError as error:
        return _fail(f"kvjax {name}", " ".join(visible(message_of(error, module.FLAGS)).split()))
    except BrokenPipeError:
        return 0  # whoever read the output has read enough
    except (OSError, UnicodeError, RecursionError) as error:
        # What no reader or writer foresaw of a file or its content: still one line.
        return _fail(f"kvjax {name}", one_line(error))
    except KeyboardInterrupt:
        return _fail(f"kvjax {name}", "interrupted; what was written is kept", status=130)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {does}" for name, does in COMMANDS.items())
    return (
        "kvjax: when, where and in what order a transformer's lookup mechanism forms.\n\n"
        f"usage: kvjax <command> --flags\n\n{lines}\n\nkvjax <command> --help explains the flags of one."
    )


def _flag_help(values: flags.FlagValues) -> str:
    lines = []
    for name in values:
        default = values[name].default_as_str if values[name].default is not None else "none"
        lines.append(f"  --{name}  (default: {default})\n      {values[name].help}")
    return "\n".join(lines)


def _fail(who: str, message: str, status: int = 2) -> int:
    print(f"{who}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    run_process()
