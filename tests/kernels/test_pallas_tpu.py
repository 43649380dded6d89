"""The TPU kernels' numerics, in Pallas' interpret mode: the shared suite, and what is their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from storm_kernels.selective_scan import pallas_tpu, pallas_tpu_tiles, selective_scan
from storm_kernels.selective_scan.checks import checked_call
from storm_kernels.selective_scan.pallas_tpu import pallas_tpu_scan
from storm_kernels.selective_scan.shapes import TPU_V4_CUT
from tests.kernels import scan_suite
from tests.kernels.scan_cases import QUICK_COMPILE, inputs
from tests.kernels.scan_oracle import oracle

TPU = "pallas_tpu"


def slow(test):
    return pytest.mark.slow(pytest.mark.exhaustive(test))


quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


def scan_call(case, *, reverse=False):
    optional = ("D", "z", "delta_bias", "initial_state", "segment_ids")
    return checked_call(
        *(case[name] for name in ("u", "delta", "A", "B", "C")),
        *(case.get(name) for name in optional),
        delta_softplus=True, reverse=reverse, layout="bld", chunk_size=None, output_dtype=None,
    )  # fmt: skip


# ------------------------------------------------------------ the shared suite


@pytest.mark.parametrize("check", scan_suite.PROPERTIES, ids=lambda check: check.__name__)
@slow
def test_property(check):
    check(TPU)


@slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["bld", "bdl"])
@pytest.mark.parametrize("segments", [False, True])
def test_every_layout_and_direction(reverse, layout, segments):
    scan_suite.options(TPU, reverse, layout, segments)


@slow
@pytest.mark.parametrize("sizes", scan_suite.SIZES)
def test_any_size(sizes):
    scan_suite.size(TPU, sizes)


@slow
@pytest.mark.parametrize("name", ["D", "z", "delta_bias", "initial_state", "segment_ids"])
def test_one_option_alone(name):
    scan_suite.one_option_alone(TPU, name)


# ------------------------------------------------------------ blocks and their borders


@pytest.mark.parametrize("reverse", [False, True])
def test_several_spans_and_a_last_block_that_is_not_full(reverse):
    case = inputs(
        1, batch=1, length=150, channels=1030, state=3, segments=True, initial_state=True
    )  # fmt: skip
    scan_suite.compare(TPU, case, reverse=reverse)


@slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 128, "channels": 2048, "state": 16},  # nothing but full blocks
        {"length": 70, "channels": 3000, "state": 2},  # the last step has fewer blocks
        {"length": 130, "channels": 2100, "state": 8, "groups": 2},  # groups of 1050: padded
        {"length": 129, "channels": 4, "state": 17},  # two chunks of states
        {"length": 257, "channels": 1, "state": 1},
    ],
)
def test_sizes_around_the_blocks(sizes):
    scan_suite.compare(TPU, inputs(2, batch=1, **sizes, initial_state=True))


@slow
@pytest.mark.parametrize("reverse", [False, True])
def test_unrolled_loops(reverse, monkeypatch):
    """The loops as they are compiled for a TPU, which interpreted ones otherwise are not."""
    monkeypatch.setattr(pallas_tpu_tiles, "INTERPRETED_UNROLL", 16)
    case = inputs(3, batch=1, length=70, channels=5, state=3, segments=True, initial_state=True)
    scan_suite.compare(TPU, case, reverse=reverse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reverse,unroll", [(False, 1), pytest.param(True, 16, marks=pytest.mark.exhaustive)]
)
def test_loops_cut_for_a_v4(reverse, unroll, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "cut_for", lambda x: TPU_V4_CUT)
    monkeypatch.setattr(pallas_tpu_tiles, "INTERPRETED_UNROLL", unroll)
    case = inputs(4, batch=1, length=150, channels=1030, state=5, segments=True, initial_state=True)
    scan_suite.compare(TPU, case, reverse=reverse)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("tiny", [1.0, 1e-10])
@slow
def test_zeros_and_tiny_gradients(softplus, tiny):
    """Some gradients are divided by dt, A, C or z, which may be 0; small ones keep their digits."""
    case = inputs(13, batch=1, length=20, initial_state=True)
    case["A"] = case["A"].at[0].set(0).at[:, 1].set(0)
    case["delta"] = case["delta"].at[:, ::3].set(-80 if softplus else 0)
    case["delta_bias"] = jnp.zeros_like(case["delta_bias"])
    case["C"] = case["C"].at[:, ::4].set(0).at[..., 2].set(0)
    case["z"] = case["z"].at[:, ::5].set(0).at[:, 7].set(-120).at[:, 8].set(1e9)
    case["u"] = case["u"].at[:, 1::3].set(0)
    dy, dh = scan_suite.cotangents(case)
    dy = dy.at[:, 8].set(0).at[:, 11].set(0)
    y, h, gradients = oracle(case, dy, dh, delta_softplus=softplus)
    got = scan_suite.with_gradients(
        case, None, dy * tiny, dh * tiny, implementation=TPU, delta_softplus=softplus
    )
    scan_suite.close(got[0], y)
    scan_suite.close(got[1], h)
    for name, value in got[2].items():
        scan_suite.close(value / tiny, gradients[name], name=name)


@pytest.mark.parametrize("channels,state", [(5, 12), (5, 30)])
@slow
def test_states_that_are_no_whole_parts(channels, state):
    case = inputs(14, batch=1, length=9, channels=channels, state=state, initial_state=True)
    scan_suite.compare(TPU, case)


@pytest.mark.parametrize("length", [1, 64, 65, 1000, 65536])
@pytest.mark.parametrize("state", [1, 5, 16, 17, 64, 256])
def test_blocks_fit(length, state):
    geo = pallas_tpu_tiles.geometry(
        batch=1, length=length, channels=2304, groups=1, state=state, stream_bytes=8, steps=128,
        reverse=False, softplus=True, marked=True,
    )  # fmt: skip
    assert geo.steps % geo.span == 0 and geo.span % 8 == 0
    assert geo.length >= length and geo.time_blocks * geo.steps >= length
    assert geo.used >= state and geo.used % geo.chunk == 0 and geo.rows >= geo.used
    assert geo.supers * geo.width >= 2304 > (geo.supers - 1) * geo.width


def test_saved_states_of_the_long_case_take_151_megabytes():
    shape = jax.ShapeDtypeStruct
    stream = shape((1, 65536, 2304), jnp.bfloat16)
    column = shape((1, 65536, 16), jnp.bfloat16)

    def residuals(u, delta, A, B, C):
        return jax.vjp(lambda u: selective_scan(u, delta, A, B, C, implementation=TPU), u)[1]

    operands = (stream, stream, shape((2304, 16), jnp.float32), column, column)
    saved = jax.tree.leaves(jax.eval_shape(residuals, *operands))
    states = [x for x in saved if x.ndim == 4 and x.shape[-1] == 2304]
    assert [x.shape for x in states] == [(1, 1024, 16, 2304)]
    assert sum(x.size * x.dtype.itemsize for x in states) <= 151e6
    # Nothing else of that size but operands in their own dtypes.
    assert all(x.dtype == jnp.bfloat16 or x.size < 2**25 for x in saved if x is not states[0])


# ------------------------------------------------------------ dtypes


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    scan_suite.mamba_ssm(TPU, 134, dtype, 2, True)


@slow
def test_every_operand_in_another_dtype():
    case = inputs(5, length=20, initial_state=True)
    dtypes = {"u": "bfloat16", "delta": "float32", "z": "float16", "B": "float16", "C": "bfloat16"}
    case |= {name: case[name].astype(dtype) for name, dtype in dtypes.items()}
    dy, dh = scan_suite.cotangents(case, dtype=jnp.float32)
    y, h, gradients = oracle(case, dy, dh)
    got_y, got_h, got = scan_suite.with_gradients(
        case, None, dy, dh, implementation=TPU, output_dtype=jnp.float32
    )
    assert got_y.dtype == jnp.float32
    scan_suite.close(got_y, y)
    scan_suite.close(got_h, h)
    for name, value in got.items():
        assert value.dtype == case[name].dtype, name
        scan_suite.close(value, gradients[name], 8e-3 if name in dtypes else 2e-5, name)


def test_float64_is_refused():
    with jax.enable_x64(True):
        case = inputs(6, dtype=np.float64)
        with pytest.raises(ValueError, match="float64.*'xla'"):
            selective_scan(**case, implementation=TPU)
        call = scan_call(case)
        with pytest.raises(TypeError, match="float64.*'xla' or 'reference'"):
            pallas_tpu_scan(call)


# ------------------------------------------------------------ transformations


@slow
def test_second_derivatives_are_refused():
    case = inputs(7, length=3)

    def loss(u):
        return jnp.sum(selective_scan(**case | {"u": u}, implementation=TPU) ** 2)

    with pytest.raises(NotImplementedError, match="'pallas_tpu' is diff.*='reference'"):
        jax.grad(lambda u: jnp.sum(jax.grad(loss)(u)))(case["u"])


@slow
def test_vmap_over_everything_and_over_weights_alone():
    cases = [inputs(seed, length=9, segments=True, initial_state=True) for seed in (8, 9)]
    weights = ("A", "D", "delta_bias")
    mixed = [cases[0], cases[0] | {name: cases[1][name] for name in weights}]
    for two in (cases, mixed):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *two)
        axes = {name: 0 for name in stacked}
        if two is mixed:
            stacked |= {name: x for name, x in cases[0].items() if name not in weights}
            axes = {name: 0 if name in weights else None for name in stacked}
        ids, ids_axis = stacked.pop("segment_ids"), axes.pop("segment_ids")
        dy, dh = scan_suite.cotangents(cases[0])

        def one(operands, ids, dy=dy, dh=dh):
            def scan(operands):
                return selective_scan(
                    **operands, segment_ids=ids, delta_softplus=True, return_final_state=True,
                    implementation=TPU,
                )  # fmt: skip

            outputs, pull = jax.vjp(scan, operands)
            return *outputs, pull((dy, dh))[0]

        got = quick(jax.vmap(one, in_axes=(axes, ids_axis)))(stacked, ids)
        for i, case in enumerate(two):
            y, h, gradients = oracle(case, dy, dh)
            scan_suite.close(got[0][i], y)
            scan_suite.close(got[1][i], h)
            for name, value in got[2].items():
                scan_suite.close(value[i], gradients[name], name=name)


@slow
def test_gradients_are_the_same_bits_again():
    case = inputs(10, length=40, channels=20, segments=True)
    run = functools.partial(scan_suite.with_gradients, implementation=TPU)
    operands, ids = scan_suite.split(case)
    dy, dh = scan_suite.cotangents(case)
    jax.tree.map(
        np.testing.assert_array_equal, run(operands, ids, dy, dh), run(operands, ids, dy, dh)
    )


# ------------------------------------------------------------ races


@slow
@pytest.mark.parametrize("reverse", [False, True])
def test_no_races(reverse, capfd):
    """Also fills memory with NaN first and checks every address."""
    case = inputs(11, batch=2, length=70, channels=5, state=2, segments=True, initial_state=True)
    interpret = pltpu.InterpretParams(detect_races=True)
    call = scan_call(case, reverse=reverse)
    operands, _ = scan_suite.split(case)
    dy, dh = scan_suite.cotangents(case)

    @quick
    def run(operands):
        def scan(operands):
            known = {k: v for k, v in operands.items() if k not in ("B", "C")}
            grouped = {k: operands[k][:, :, None] for k in ("B", "C")}
            return pallas_tpu_scan(
                dataclasses.replace(call, **known, **grouped), interpret=interpret
            )

        outputs, pull = jax.vjp(scan, operands)
        return *outputs, pull((dy, dh))[0]

    y, h, gradients = oracle(case, dy, dh, reverse=reverse)
    got = run(operands)
    scan_suite.close(got[0], y)
    scan_suite.close(got[1], h)
    for name, value in got[2].items():
        scan_suite.close(value, gradients[name], name=name)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_what_is_unsupported_names_the_remedy():
    call = scan_call(inputs(12))
    assert pallas_tpu.unsupported(call) is None
