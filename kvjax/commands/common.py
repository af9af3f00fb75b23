"""What several commands share: required flags and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from absl import flags

from kvjax.errors import bad_argument


def define_run_flags(values: flags.FlagValues) -> None:
    """Defines the flags that every command over runs has: which runs, their benchmark, and the progress bar."""
    flags.DEFINE_list("run_dirs", None, "Run directories: a comma list, globs allowed.", flag_values=values)
    flags.DEFINE_string(
        "benchmark_dir",
        None,
        "The runs' benchmark; by default the one each run's config records, or that it was swept on.",
        flag_values=values,
    )
    flags.DEFINE_bool("progress", True, "Show a progress bar with the time left.", flag_values=values)


def define_precision_flag(values: flags.FlagValues) -> None:
    """Defines the flag of commands that run models."""
    flags.DEFINE_enum(
        "precision",
        "highest",
        ["highest", "default"],
        "Precision of float32 matrix products; default lets a GPU use TF32.",
        flag_values=values,
    )


def required(values: flags.FlagValues, name: str) -> Any:
    """Reads a flag that has no default; raises `InputError` if it is missing."""
    value = values[name].value
    if value in (None, "", []):
        raise bad_argument(name, "a value", f"none ({values[name].help})")
    return value


def integers(name: str, values: list[str] | None) -> list[int] | None:
    """Parses a list flag of whole numbers, each once; None without the flag; raises `InputError` for other text."""
    if values is None:
        return None
    bad = [value for value in values if not value.strip().isdecimal() or int(value) >= 2**32]
    if bad or not values or len({int(value) for value in values}) != len(values):
        raise bad_argument(name, "different whole numbers, such as 7,11,13", ",".join(values))
    return [int(value) for value in values]


@contextmanager
def progress_bar(total: int, unit: str, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items done; shows the time left on standard error."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", disable=not show, dynamic_ncols=True) as bar:
        yield bar.update


def define_runtime_flags(values: flags.FlagValues) -> None:
    """Defines the flags of commands that compile large programs."""
    flags.DEFINE_bool(
        "compilation_cache",
        True,
        "Keep compiled programs in a private per-user folder, so that the next start is faster.",
        flag_values=values,
    )


def start_jax(values: flags.FlagValues) -> None:
    """Sets JAX up for a command, before anything computes: the compilation cache, and one device per CPU core."""
    from kvjax.devices import leave_compilation_cache, share_cpu_cores, use_compilation_cache

    if values["compilation_cache"].value:
        use_compilation_cache()
    else:
        leave_compilation_cache()
    share_cpu_cores()
