"""What TPU slices send each other: in a compiled program, transfers by way of the hosts.

libtpu compiles a mesh of several slices to the program of one slice, whose collectives stay inside
it. What crosses slices is a pair of `send` and `recv` that hands an array to the runtime of the
hosts (Megascale); frontend attributes say what the hosts do with it and for which devices.
"""

import re

import numpy as np

from storm_jax.aot.hlo import Instruction
from storm_jax.config import ConfigError

_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# Device d of slice s, both from 0, has this id: 100000 (s + 1) + d.
_SLICE = 100_000


def transfer(send: Instruction) -> tuple[str, np.ndarray] | None:
    """The collective that a `send` takes part in.

    The devices are written as a product of slices, counted from 1, and of devices in each,
    "{1,2}x{0:3}"; or as ids, {{100000,200000},{100001,200001}}, with an arrow in each pair of a
    permute.

    Returns:
      Its kind, one of `collectives.KINDS`, and ids of devices, int [groups, size]; for a permute
      [pairs, 2], source and target. None: the instruction does not send to another slice.

    Raises:
      ConfigError: a kind, or a way to write devices, that is not known.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.text)
    if send.opcode != "send" or kind is None:
        return None
    target = re.search(
        r'_xla_megascale_target=(?:"([^"]*)"|(\{\{[^}]*\}(?:,\{[^}]*\})*\}))', send.text
    )
    if kind[1] not in _KINDS or target is None:
        raise _unknown(send)
    return _KINDS[kind[1]], _product(target[1], send) if target[1] else _listed(target[2])


def _product(text: str, send: Instruction) -> np.ndarray:
    match = re.fullmatch(r"\{([\d,:]+)\}x\{([\d,:]+)\}", text)
    if match is None:
        raise _unknown(send)
    slices, devices = np.array(_numbers(match[1])), np.array(_numbers(match[2]))
    return slices * _SLICE + devices[:, None]


def _listed(text: str) -> np.ndarray:
    groups = re.findall(r"\{([\d,>\-]+)\}", text)
    return np.array([[int(n) for n in re.findall(r"\d+", group)] for group in groups])


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found


def _unknown(send: Instruction) -> ConfigError:
    return ConfigError(f"a transfer between slices of a form that is not known: {send.text[:400]}")
