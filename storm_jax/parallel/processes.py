"""The processes of a run: how they find each other, whether they fit together, how they agree.

The same command runs on every host. `start` joins them; everything below is called by all of them
in the same order, and with one process it costs nothing.
"""

import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from storm_jax.config import ConfigError

# What launchers that JAX does not know set (launch/local_processes.sh), the same on every host but
# for the last.
COORDINATOR, COUNT, INDEX = "STORM_COORDINATOR", "STORM_PROCESSES", "STORM_PROCESS_ID"
# What a launcher may say about the size of the run.
EXPECTED_PROCESSES, EXPECTED_DEVICES = "STORM_EXPECT_PROCESSES", "STORM_EXPECT_DEVICES"
# Seconds that a process which ends waits for the others to end too. They may be stuck.
SHUTDOWN_TIMEOUT = 30
# Seconds that a process waits for others to compile what it has compiled.
COMPILE_TIMEOUT = 2 * 3600


def start() -> None:
    """Joins the processes of this run; call it before anything that touches a device.

    STORM_COORDINATOR (host:port of process 0), STORM_PROCESSES and STORM_PROCESS_ID say who they
    are. Without them JAX is asked, which knows TPU pods, Kubernetes, SLURM and Open MPI; where it
    finds none of these, this is the only process.

    Raises:
      ConfigError: two of the three variables without the third, or other numbers of processes and
        devices than STORM_EXPECT_PROCESSES and STORM_EXPECT_DEVICES say.
    """
    # SIGTERM is ours (`training.preemption`): JAX's service would take its signal handler.
    jax.config.update("jax_enable_preemption_service", False)
    given = [name for name in (COORDINATOR, COUNT, INDEX) if os.environ.get(name)]
    if given:
        if len(given) < 3:
            raise ConfigError(
                f"{' and '.join(given)} set without the others of {COORDINATOR}, {COUNT}, {INDEX}"
            )
        jax.distributed.initialize(
            os.environ[COORDINATOR],
            _number(COUNT),
            _number(INDEX),
            cluster_detection_method="deactivate",
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    else:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            # No cluster was found, nor a coordinator named: this process is alone.
    for name, there in (
        (EXPECTED_PROCESSES, jax.process_count()),
        (EXPECTED_DEVICES, jax.device_count()),
    ):
        if os.environ.get(name) and _number(name) != there:
            what = "processes" if name == EXPECTED_PROCESSES else "devices"
            raise ConfigError(
                f"{there} {what} have come together, but {name}={os.environ[name]}: a host is"
                " missing, or does not see all of its devices (process"
                f" {jax.process_index()} on {socket.gethostname()} sees"
                f" {jax.local_device_count()} of kind {jax.devices()[0].device_kind})"
            )


def describe() -> str:
    """One line on processes and devices."""
    processes, local = jax.process_count(), jax.local_device_count()
    return (
        f"{processes} process(es), {jax.device_count()} device(s)"
        f" ({jax.devices()[0].device_kind}, {local} on this host)"
    )


def require_same(fields: Mapping[str, str], remedy: str) -> None:
    """Compares what every process must have in common; all of them learn who differs in what.

    Args:
      fields: names and values of this process.
      remedy: what to do, the end of the message.

    Raises:
      ConfigError: on every process, naming each field that differs, its values and their hosts.
    """
    if jax.process_count() == 1:
        return
    text = "\n".join(f"{name}\t{value!r}" for name, value in sorted(fields.items()))
    digest = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=32).digest(), np.uint8)
    if len({row.tobytes() for row in multihost_utils.process_allgather(digest)}) == 1:
        return
    everyone = [dict(line.split("\t", 1) for line in one.split("\n")) for one in gathered(text)]
    hosts = gathered(socket.gethostname())
    names = sorted(set().union(*everyone))
    lines = []
    for name in names:
        values: dict[str, list[int]] = {}
        for process, one in enumerate(everyone):
            values.setdefault(one.get(name, "missing"), []).append(process)
        if len(values) > 1:
            shown = "; ".join(f"{v} on {_hosts(p, hosts)}" for v, p in values.items())
            lines.append(f"  {name}: {shown}")
    raise ConfigError("the processes of this run differ:\n" + "\n".join(lines) + f"\n{remedy}")


@contextlib.contextmanager
def together(*errors: type[Exception]) -> Iterator[None]:
    """Runs a block on every process, and ends all of them when it failed on one.

    Without it, those that succeed would wait for ever for one that has gone. The block must not
    wait for other processes itself.

    Args:
      errors: what is passed on; anything else ends this process alone.

    Raises:
      what the block raised, where it did; ConfigError with that message on the other processes.
    """
    failure: Exception | None = None
    try:
        yield
    except errors as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        if failed.any():
            texts, hosts = gathered(str(failure or "")), gathered(socket.gethostname())
            first = int(np.argmax(failed))
            if failure is None:
                raise ConfigError(f"on {_hosts([first], hosts)}: {texts[first]}")
    if failure is not None:
        raise failure


class CompiledTogether:
    """A jitted function whose first call runs on no process before all have compiled it.

    After a restart a process may find the program in the cache that another has to compile: it
    would be in the first collective long before, and collectives do not wait for minutes (gloo: 30
    seconds).
    """

    def __init__(self, function: jax.stages.Wrapped, name: str):
        """
        Args:
          function: of `jax.jit`, to be called with arguments of one kind.
          name: of its own.
        """
        self._function, self._name = function, name
        self._compiled = False

    def __call__(self, *arguments: Any) -> Any:
        if not self._compiled and jax.process_count() > 1:
            self._function.lower(*arguments).compile()  # the call below finds it
            multihost.sync_global_processes(
                f"compiled {self._name}",
                timeout=COMPILE_TIMEOUT,
                processes=set(range(jax.process_count())),  # else it is a collective itself
            )
        self._compiled = True
        return self._function(*arguments)


def gathered(text: str) -> list[str]:
    """The texts of all processes, by process."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    padded = np.zeros(int(sizes.max()) + 1, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


@dataclass(frozen=True)
class Share:
    """The part of every global batch that one process feeds.

    Attributes:
      index, count: it feeds part `index` of `count` equal ones.
      leads: no process of a lower number feeds the same part (axes other than the batch's may
        cross processes).
    """

    index: int
    count: int
    leads: bool


def share_of(layout: jax.sharding.Sharding, batch: int) -> Share:
    """Which rows of a batch this process's devices hold.

    Args:
      layout: of an array [batch].

    Raises:
      ConfigError: the processes hold parts of different sizes.
    """
    rows: dict[int, set[int]] = {}
    for device, (index,) in layout.devices_indices_map((batch,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index.indices(batch)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != batch or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"the {len(rows)} processes hold {sorted(map(len, parts))} of the {batch} rows of a"
            " batch: choose config.mesh so that the batch axes (data, fsdp) are split evenly over"
            " processes"
        )
    mine = tuple(sorted(rows[jax.process_index()]))
    first = min(process for process, held in rows.items() if tuple(sorted(held)) == mine)
    return Share(parts.index(mine), len(parts), first == jax.process_index())


def leave(status: int) -> NoReturn:
    """Ends this process with a status, even where others wait for it or it waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not jax.distributed.is_initialized():
        sys.exit(status)
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()  # so that all have shown their messages
    os._exit(status)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"{name}={os.environ[name]!r} is no whole number") from None


def _hosts(processes: list[int], hosts: list[str]) -> str:
    names = [f"{process} ({hosts[process]})" for process in processes[:4]]
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"process {', '.join(names)}{more}"
