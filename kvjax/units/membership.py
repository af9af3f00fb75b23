"""Finds out which process of a group this one is: as JAX detects it from a launcher, or as the environment says."""

from __future__ import annotations

import dataclasses
import os

from kvjax.errors import bad_argument, one_line, unusable

# Where process 0 listens is JAX's own variable; the other two go with it if no launcher is there to be detected.
_ADDRESS, _COUNT, _INDEX = VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SECONDS_TO_DETECT = 50
_SECONDS_OF_A_LAUNCHER = 300.0  # between the first process that it starts and the last, as JAX itself waits


@dataclasses.dataclass(frozen=True)
class Membership:
    """One process among those that work together.

    Attributes:
      index: its number, from 0.
      count: how many there are.
      host, port: where process 0 listens.
      seconds_to_meet: how long processes wait for each other.
    """

    index: int
    count: int
    host: str
    port: int
    seconds_to_meet: float = 50.0

    @property
    def address(self) -> str:
        """Where process 0 listens, as host:port."""
        return f"{self.host}:{self.port}"

    def environment(self, index: int) -> dict[str, str]:
        """Says in variables who another process of the group is, for one that is started from here."""
        return dict(zip(VARIABLES, (self.address, str(self.count), str(index)), strict=True))


def detect_membership() -> Membership:
    """Finds out which process this is, without starting anything of JAX.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` count first; whatever is missing comes from the
    launchers that `jax.distributed` knows: Slurm, Open MPI, Kubernetes, Cloud TPU.

    Raises:
      InputError: there is no launcher that JAX knows, or the environment contradicts itself.
    """
    # No public function of JAX detects without connecting; and what is connected ends the process, with a trace of its
    # own, when another dies (docs/design.md, "Processes").
    from jax._src.clusters import ClusterEnv

    given = [os.environ.get(name) for name in VARIABLES]
    try:
        address, count, index = given[0], *(None if text is None else int(text) for text in given[1:])
        if None in (address, count, index):
            found = ClusterEnv.auto_detect_unset_distributed_params(
                address, count, index, None, None, _SECONDS_TO_DETECT
            )
            address, count, index = found[:3]
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise unusable("the launcher's environment", "what JAX can read", f"{type(error).__name__}: {error}") from None
    if None in (address, count, index):
        expected = f"a launcher that JAX detects, such as srun or mpirun, or {', '.join(VARIABLES)} (or a number)"
        raise bad_argument("processes", expected, "none")
    host, colon, port = str(address).rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 1 << 16):
        raise unusable(_ADDRESS, "host:port", one_line(address))
    if not 0 <= index < count:
        raise unusable(_INDEX, f"a number from 0 to {count - 1}, for {count} processes", index)
    return Membership(index, count, host.strip("[]"), int(port), _SECONDS_OF_A_LAUNCHER)
