"""Counts forward recurrences of the scan with products on the MXU; needs libtpu and no TPU.

Run `python benchmarks/scan_tpu_mxu.py [GENERATION ...]`. Writes benchmarks/results/tpu_mxu.json:
bundles of the loop over positions for a register of state (1024 elements) and position. These are
kernels of that loop alone, for the counts; what they would need besides (building the operands
that are block-diagonal, the first and the last group) is left out.
"""

import importlib.metadata
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from storm_kernels import tpu_cost  # noqa: E402
from storm_kernels.selective_scan.pallas_tpu_tiles import LANES, PITCH, TILES  # noqa: E402

SPAN, STATE = 64, 16
B_PITCH = STATE + 1


def row_form(unroll: int, held: int):
    """C h on the MXU, a register being one state of 1024 channels of one position.

    A product takes 128 rows of states, in one bfloat16 part, to the 8 lane tiles of its positions.
    The states of `unroll` positions go through VMEM to the products of the next pass.
    """
    positions = LANES // TILES // held  # of a product

    def kernel(dt, x, A, B, C, y, h, states):
        def group(number, carry):
            h = list(carry)
            first = pl.multiple_of(number * unroll, unroll)
            for product in range(unroll // positions):
                rows = states[pl.ds(product * LANES, LANES), :]
                at = pl.multiple_of(first * TILES, TILES) + product * positions * TILES
                read = jnp.dot(
                    C[pl.ds(at, positions * TILES), :], rows, preferred_element_type=jnp.float32
                )
                for k in range(positions):
                    to = first * PITCH + (product * positions + k) * PITCH
                    y[pl.ds(to, TILES), :] = read[k * TILES : (k + 1) * TILES]
            for t in range(unroll):
                at = pl.ds(first * PITCH + t * PITCH, TILES)
                dt_t, x_t = dt[at, :], x[at, :]
                for n in range(held):
                    at_n = pl.ds(first * B_PITCH + t * B_PITCH + n, TILES, stride=0)
                    decay = jnp.exp2(dt_t * A[pl.ds(n * PITCH, TILES), :])
                    h[n] = x_t * B[at_n, :] + h[n] * decay
                    if n % 2:
                        pair = jnp.concatenate([h[n - 1], h[n]], axis=0)
                        to = pl.ds((t * held + n - 1) * TILES, 2 * TILES)
                        states[to, :] = pair.astype(jnp.bfloat16)
            return tuple(h)

        start = tuple(h[pl.ds(n * TILES, TILES), :] for n in range(held))
        for n, value in enumerate(lax.fori_loop(0, SPAN // unroll, group, start)):
            h[pl.ds(n * TILES, TILES), :] = value

    shapes = [(SPAN * PITCH, LANES), (SPAN * PITCH, LANES), (STATE * PITCH, LANES)]
    shapes += [(SPAN * B_PITCH, LANES)]
    operands = [(shape, jnp.float32) for shape in shapes] + [((SPAN * TILES, LANES), jnp.bfloat16)]
    results = [(SPAN * PITCH, LANES), (held * TILES, LANES)]
    return kernel, operands, results, [((unroll * held * TILES, LANES), jnp.bfloat16)]


def sublane_form(positions: int, tiles: int, contract: bool):
    """x B on the MXU and, with `contract`, C h too, a register being 8 states of 128 channels.

    x comes in bfloat16 parts stacked along the contracted axis, which takes 128 rows in any case:
    three parts are float32's accuracy. The states are in one bfloat16 part.
    """
    parts = positions * (4 if positions == TILES else 3)
    step = positions * STATE

    def kernel(dt, x, A, B, C, C_rows, y, h, products):
        def group(number, carry):
            h = list(carry)
            first = pl.multiple_of(number * positions, positions)
            row = pl.multiple_of(first * STATE, TILES)
            for tile in range(tiles):
                lanes = pl.ds(tile * LANES, LANES)
                x_rows = pl.ds(pl.multiple_of(number * parts, TILES), parts)
                inflow = jnp.dot(
                    B[pl.ds(row, step), :], x[x_rows, lanes], preferred_element_type=jnp.float32
                )
                states, read = [], []
                for t in range(positions):
                    dt_t = dt[pl.ds(tile * SPAN + first + t, TILES, stride=0), :]
                    for half in range(2):
                        k, n = 2 * tile + half, half * TILES
                        at = t * STATE + n
                        decay = jnp.exp2(dt_t * A[pl.ds(n, TILES), lanes])
                        h[k] = inflow[at : at + TILES] + h[k] * decay
                        states.append(h[k])
                        if not contract:
                            read.append(h[k] * C_rows[pl.ds(row + at, TILES), :])
                to = (pl.ds(first, positions), lanes)
                if contract:
                    rows = jnp.concatenate(states, axis=0).astype(jnp.bfloat16)
                    C_t = C[pl.ds(first, positions), :]
                    y[to] = jnp.dot(C_t, rows, preferred_element_type=jnp.float32)
                    continue
                base = tile * positions
                for t in range(positions):
                    at = pl.ds((base + t) * PITCH, TILES)
                    products[at, :] = read[2 * t] + read[2 * t + 1]
                for eight in range(0, positions, TILES):
                    terms = [
                        products[pl.ds((base + eight) * PITCH + i, TILES, stride=PITCH), :]
                        for i in range(TILES)
                    ]
                    while len(terms) > 1:
                        pairs = zip(terms[::2], terms[1::2], strict=True)
                        terms = [a + b for a, b in pairs]
                    y[pl.ds(first + eight, TILES), lanes] = terms[0]
            return tuple(h)

        places = [
            (pl.ds(half * TILES, TILES), pl.ds(tile * LANES, LANES))
            for tile in range(tiles)
            for half in range(2)
        ]
        end = lax.fori_loop(0, SPAN // positions, group, tuple(h[at] for at in places))
        for at, value in zip(places, end, strict=True):
            h[at] = value

    width, half = tiles * LANES, jnp.bfloat16
    operands = [
        ((SPAN * tiles, LANES), jnp.float32),
        ((SPAN // positions * parts, width), half),
        ((STATE, width), jnp.float32),
        ((SPAN * STATE, parts), half),
        ((SPAN, step), half),
        ((SPAN * STATE, LANES), jnp.float32),
    ]
    scratch = [((tiles * positions * PITCH + TILES, LANES), jnp.float32)]
    return kernel, operands, [(SPAN, width), (STATE, width)], scratch


def program(kind: str, *sizes):
    """A function and its arguments for `tpu_cost.compile_and_count`."""
    kernel, operands, results, scratch = {"row": row_form, "sublane": sublane_form}[kind](*sizes)
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        name="scan",
    )
    return call, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in operands)


def count(generation: str, kind: str, *sizes) -> dict:
    source = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport scan_tpu_mxu\n"
    source += f"function, arguments = scan_tpu_mxu.program({kind!r}, *{sizes!r})\n"
    [kernel] = tpu_cost.compile_and_count(source, generation)
    loop = kernel.hot_loop()
    steps = sizes[0] * sizes[1] * (1 if kind == "row" else STATE // TILES)
    return {
        "generation": generation,
        "bundles_per_vreg_step": round(loop.bundles / steps, 3),
        "spills": loop.slots["VSTORE:SPILL"],
        "vreg_steps": steps,
        "slots_per_vreg_step": {u: round(loop.slots[u] / steps, 3) for u in tpu_cost.UNITS},
    }


CASES = {
    "C h, 16 states of 16 positions in a loop": ("row", 16, 16),
    "C h, 16 states of 8 positions": ("row", 8, 16),
    "x B, 32 positions of 2 tiles": ("sublane", 32, 2, False),
    "both, 8 positions of 4 tiles": ("sublane", 8, 4, True),
}


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    path = HERE / "results" / "tpu_mxu.json"
    rows = []
    for name, case in CASES.items():
        for generation in sys.argv[1:] or ("v5e", "v5p", "v6e"):
            rows.append({"case": name, **count(generation, *case)})
            print(rows[-1], flush=True)
            path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
