"""One comparison of `kvjax verify`: what was compared, whether it holds, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from kvjax.artifacts.differences import Difference
from kvjax.devices import device_description
from kvjax.errors import InputError

Verdict = Literal["holds", "differs", "open"]

SEALED = "its content has the hash it records"
UNSEALED = "it records no hash of its content, as an older version wrote it"

REDRAWN = 1e-9  # the same sums give the same tables, but for rounding by other versions of libraries
MEASURED = 1e-4  # of the largest number of an array: float32 on other numbers of cores, and room to spare


@dataclasses.dataclass(frozen=True)
class Check:
    """What was compared, and what came of it.

    Attributes:
      subject: what.
      verdict: `open` if it could not be vouched for.
      reason: why, in one sentence.
    """

    subject: str
    verdict: Verdict
    reason: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """Everything that was compared in one run, comparison or factor.

    Attributes:
      title: what it is, with its path.
      checks: the comparisons.
    """

    title: str
    checks: Sequence[Check]

    @property
    def differs(self) -> bool:
        """Checks whether anything is not what was recorded."""
        return any(check.verdict == "differs" for check in self.checks)


def compared(subject: str, compare: Callable[[], object], what_holds: str) -> Check:
    """Calls a comparison that raises `InputError` if something differs."""
    try:
        compare()
    except InputError as error:
        return Check(subject, "differs", str(error))
    return Check(subject, "holds", what_holds)


def made_again(subject: str, again: Callable[[], Difference], tolerance: float, *, device: object = None) -> Check:
    """Makes something again and judges how far it is from what was recorded.

    Args:
      subject: what.
      again: makes it, and says how far it is off; raises `InputError` if it cannot be made.
      tolerance: of the difference.
      device: that it was recorded on, as `device_description` gives it. On another kind or number of devices a
        difference is open; None if it does not depend on the device.
    """
    try:
        difference = again()
    except InputError as error:
        return Check(subject, "open", f"it cannot be made again: {error}")
    if difference.size <= tolerance:
        apart = f"the largest difference is {difference.size:.0e}" if difference.size else "every number is the same"
        return Check(subject, "holds", apart)
    reason = f"{difference.where} differs by {difference.size:.1e}"
    if device is not None and _kind(device) != _kind(device_description()):
        return Check(
            subject, "open", f"{reason}; it was measured on {_kind(device)}, and this is {_kind(device_description())}"
        )
    return Check(subject, "differs", reason)


def _kind(device: object) -> str:
    """Names a device as far as last digits depend on it: sums are split among devices, so that their number counts."""
    if not isinstance(device, dict):
        return "an unknown device"
    return f"{device.get('backend')} {device.get('kind')}, count {device.get('count')}"


def listed(members: Sequence[object]) -> str:
    """Lists the first few members."""
    return ", ".join(map(str, members[:5])) + (", …" if len(members) > 5 else "")
