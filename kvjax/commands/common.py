"""What several commands share: required flags and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from absl import flags

from kvjax.errors import InputError


def required(name: str) -> Any:
    """Returns the value of a flag that has no default; raises `InputError` where it was not given."""
    value = flags.FLAGS[name].value
    if value in (None, "", []):
        raise InputError(f"--{name}: expected a value; found none ({flags.FLAGS[name].help})")
    return value


@contextmanager
def progress_bar(total: int, unit: str, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items done; shows the time left on standard error."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", disable=not show, dynamic_ncols=True) as bar:
        yield bar.update


def torch_loader(certify: bool = True) -> Callable[[Any], Callable[..., Any]]:
    """Returns the sweep's loader of PyTorch checkpoints: for a prepared run, a function that reads one file of it."""
    from converters.source import convert_checkpoint

    def for_run(work: Any) -> Callable[..., Any]:
        def load(path, expected_step):
            return convert_checkpoint(
                path,
                work.run.config,
                work.benchmark.vocabulary,
                expected_step=expected_step,
                certify_on=work.certificate_tokens if certify else None,
            )

        return load

    return for_run
