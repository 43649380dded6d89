"""Which devices take part in a collective, from the three ways in which XLA writes it."""

import math
import re

import numpy as np

from storm_jax.config import ConfigError


def replica_groups(text: str, devices: int) -> np.ndarray:
    """The groups of an instruction's `replica_groups=`, int [groups, size].

    XLA writes them in three ways: {{0,1},{2,3}}; [2,2]<=[4] with an optional T(1,0), the numbers
    0 to 3 in this order; and mesh['x'=2,'y'=2] {'x'}, axes of a mesh over all devices, which may
    have an order of its own, device_ids=([2,2]T(1,0)).

    Raises:
      ConfigError: another way.
    """
    if match := re.search(r"replica_groups=(mesh\[.*?\}|@\w+\s*\{.*?\})", text):
        return _mesh_groups(match[1])
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match[1])
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(rows or [range(devices)])
    raise _unknown(text)


def _iota(text: str) -> np.ndarray:
    shape, source, transposed = _parts(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    sizes = _numbers(source)
    order = np.arange(math.prod(sizes)).reshape(sizes)
    if transposed:
        order = order.transpose(_numbers(transposed))
    return order.reshape(_numbers(shape))


def _parts(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise _unknown(text)
    return match.groups()


def _unknown(text: str) -> ConfigError:
    return ConfigError(f"replica groups of a form that is not known: {text[:200]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _mesh_groups(text: str) -> np.ndarray:
    axes, order, used = _parts(r"mesh\[(.*?)\](?:,\s*device_ids=\((.*?)\))?\s*\{(.*?)\}", text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    # A part of an axis: 'x':(2)4 is the axis of size 4 that has parts of 2 before it.
    used = [(n, int(b or 1), int(s or 0)) for n, b, s in re.findall(_USED, used)]
    dims: list[int] = []
    taken: list[int] = []
    for name, size in sizes.items():
        cut = next(((before, part) for n, before, part in used if n == name), None)
        if cut is None:
            dims.append(size)
            continue
        before, part = cut[0], cut[1] or size
        taken.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    numbers = _ordered(order, math.prod(sizes.values()))
    grid = np.moveaxis(numbers.reshape(dims), taken, range(-len(taken), 0))
    return grid.reshape(-1, math.prod(dims[axis] for axis in taken))


def _ordered(order: str | None, count: int) -> np.ndarray:
    if not order:
        return np.arange(count)
    if "[" not in order:
        return np.array(_numbers(order))
    source, transposed = _parts(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    grid = np.arange(count).reshape(_numbers(source))
    return grid.transpose(_numbers(transposed)) if transposed else grid


_USED = r"'([^']+)'(?::\((\d+)\)(\d+))?"
