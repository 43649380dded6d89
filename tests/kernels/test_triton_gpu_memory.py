"""What the GPU scan keeps for its backward and how large its arrays get, from shapes alone.

The shape is that of one direction of STORM's 4B model: B = 1, E = 2304, L = 65536, G = 16.
"""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from storm_kernels import triton_launch
from storm_kernels.selective_scan import selective_scan, triton_gpu
from storm_kernels.selective_scan.call import ScanCall
from tests.kernels.gpu_emulation import recorded_launches

pytest.importorskip("triton")

CHANNELS, LENGTH, STATE = 2304, 65536, 16


def operands(dtype=jnp.bfloat16):
    wide, narrow = (1, CHANNELS, LENGTH), (1, LENGTH, 1, STATE)
    shapes = {
        "u": (wide, dtype), "delta": (wide, dtype), "z": (wide, dtype),
        "A": ((CHANNELS, STATE), jnp.float32), "B": (narrow, dtype), "C": (narrow, dtype),
        "D": ((CHANNELS,), jnp.float32), "delta_bias": ((CHANNELS,), jnp.float32),
        "initial_state": ((1, CHANNELS, STATE), jnp.float32),
        "segment_ids": ((1, LENGTH), jnp.int32),
    }  # fmt: skip
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def scan(operands):
    return selective_scan(
        **operands, delta_softplus=True, layout="bdl", return_final_state=True,
        implementation="triton_gpu",
    )  # fmt: skip


def residuals(case):
    """The arrays that the backward keeps, beyond the operands, as (shape, dtype)."""
    ids = case.pop("segment_ids", None)

    def forward(case, ids):
        return jax.vjp(lambda case: scan(case | {"segment_ids": ids}), case)[1]

    with recorded_launches():
        kept = jax.eval_shape(forward, case, ids)

    def count(tree):
        return collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(tree))

    return count(kept) - count(case)


def test_the_states_saved_take_at_most_151_megabytes():
    case = operands()
    del case["segment_ids"]
    ((shape, dtype),) = residuals(case).elements()
    assert dtype == jnp.float32
    assert math.prod(shape) * 4 == 150_994_944
    assert math.prod(shape) * 4 <= 151_000_000


def test_packed_sequences_add_one_byte_a_position():
    alone = operands()
    del alone["segment_ids"]
    marks = residuals(operands()) - residuals(alone)
    assert marks == {((1, LENGTH), jnp.dtype("int8")): 1}


def equations(jaxpr):
    """All of a jaxpr's, those of the jaxprs inside too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(value, core.ClosedJaxpr):
                value = value.jaxpr
            if isinstance(value, core.Jaxpr):
                yield from equations(value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_no_array_has_states_at_all_positions(dtype):
    case = operands(dtype)
    ids = case.pop("segment_ids")
    outputs = jax.eval_shape(
        lambda: (jnp.zeros((1, CHANNELS, LENGTH), dtype), jnp.zeros((1, CHANNELS, STATE)))
    )

    def program(case, ids, cotangents):
        y, pull = jax.vjp(lambda case: scan(case | {"segment_ids": ids}), case)
        return y, pull(cotangents)

    with recorded_launches() as launches:
        jaxpr = jax.make_jaxpr(program)(case, ids, outputs)
    found = list(equations(jaxpr.jaxpr))
    assert [x.name for x in launches] == ["scan_forward", "scan_adjoint", "scan_backward"]
    assert sum(x.primitive.name == "pure_callback" for x in found) == len(launches)
    largest = max(
        math.prod(x.aval.shape) for equation in found for x in (*equation.invars, *equation.outvars)
    )
    assert largest == CHANNELS * LENGTH  # u's, a sixteenth of all states'


@pytest.mark.parametrize(
    ("batch", "length", "served"),
    [(1, 4_194_240, True), (1, 4_194_241, False), (65535, 1, True), (65536, 1, False)],
)
def test_a_call_is_served_if_its_grids_are_within_the_limits(batch, length, served, monkeypatch):
    shapes = {
        "u": (batch, 1, length), "delta": (batch, 1, length), "A": (1, 1),
        "B": (batch, length, 1, 1), "C": (batch, length, 1, 1), "initial_state": (batch, 1, 1),
    }  # fmt: skip
    case = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}

    def with_gradients(case):
        outputs, pull = jax.vjp(scan, case)
        return pull(outputs)

    with recorded_launches() as launches:
        jax.eval_shape(with_gradients, case)
    # CUDA's limit along the second and third axes of a grid.
    assert all(n <= 65535 for launch in launches for n in launch.grid[1:]) == served

    monkeypatch.setattr(triton_gpu, "platform_of", lambda x: "gpu")
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: name)
    call = ScanCall(
        **case, D=None, z=None, delta_bias=None, segment_ids=None, delta_softplus=True,
        reverse=False, layout="bdl", chunk_size=None, output_dtype=jnp.dtype("float32"),
    )  # fmt: skip
    assert (triton_gpu.unsupported(call) is None) == served
