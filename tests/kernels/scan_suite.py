"""What every implementation of the scan must pass: one function per property.

Each takes the name of an implementation. A kernel's own tests can call them as they are, say in
an interpreter; `test_selective_scan.py` runs them on what the platform at hand offers.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from storm_kernels.selective_scan import selective_scan, selective_scan_bidirectional
from tests.kernels.scan_cases import QUICK_COMPILE, flipped, inputs, packed_ids, swapped
from tests.kernels.scan_oracle import POSITIONS, oracle

KERNEL = {"gpu": ("triton_gpu",), "tpu": ("pallas_tpu",)}.get(jax.default_backend(), ())
# SCAN_IMPLEMENTATIONS=pallas_tpu runs the suite on that one, wherever it can run.
NAMED = tuple(os.environ.get("SCAN_IMPLEMENTATIONS", "").split(",")) if (
    os.environ.get("SCAN_IMPLEMENTATIONS")
) else ()  # fmt: skip
IMPLEMENTATIONS = NAMED or ("reference", "xla", *KERNEL)
"""Those of the platform at hand."""
FAST = tuple(name for name in IMPLEMENTATIONS if name != "reference")
"""Those that keep no state per position and run long sequences."""

# mamba_ssm's tests: (rtol, atol) of the outputs and (rtolw, atolw) of the weights' gradients.
MAMBA_SSM = {"float32": (6e-4, 2e-3), "float16": (3e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}
WEIGHTS = (1e-3, 1e-3)
# Of float32: relative to each element, and to the largest one of the array.
FLOAT32 = 2e-5

quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
STATIC = (
    "implementation", "reverse", "layout", "chunk_size", "delta_softplus", "output_dtype"
)  # fmt: skip


def split(case):
    """The differentiable operands and the segment ids."""
    return {k: v for k, v in case.items() if k != "segment_ids"}, case.get("segment_ids")


@functools.partial(quick, static_argnames=STATIC)
def values(case, **options):
    """y and the final state."""
    return selective_scan(**case, **{"delta_softplus": True} | options, return_final_state=True)


@functools.partial(quick, static_argnames=STATIC)
def with_gradients(operands, ids, dy, dh, **options):
    """y, the final state and the gradients of all operands."""

    def scan(operands):
        return selective_scan(
            **operands, segment_ids=ids, **{"delta_softplus": True} | options,
            return_final_state=True,
        )  # fmt: skip

    outputs, pull = jax.vjp(scan, operands)
    return *outputs, pull((dy, dh))[0]


def cotangents(case, seed=0, dtype=None):
    """Of y in its dtype, in layout "bld", and of the final state."""
    rng = np.random.default_rng(1000 + seed)
    dy = jnp.asarray(rng.standard_normal(case["u"].shape), dtype or case["u"].dtype)
    state = (case["u"].shape[0], *case["A"].shape)
    wide = np.float64 if case["A"].dtype == np.float64 else np.float32
    return dy, jnp.asarray(rng.standard_normal(state), wide)


def close(got, expected, tolerance=FLOAT32, name=""):
    """Equal up to `tolerance`, relative to each element and to the largest one."""
    expected = np.asarray(expected, np.float64)
    atol = tolerance * max(1, np.max(np.abs(expected), initial=0))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, tolerance, atol, err_msg=name)


def compare(implementation, case, *, layout="bld", tolerance=FLOAT32, seed=0, **options):
    """Values and all gradients against the float64 oracle; returns y."""
    dy, dh = cotangents(case, seed, options.get("output_dtype"))
    known = {k: v for k, v in options.items() if k in ("delta_softplus", "reverse")}
    y, h, gradients = oracle(case, dy, dh, **known)
    if layout == "bdl":
        case, dy, y, gradients = (
            swapped(case),
            dy.swapaxes(1, 2),
            y.swapaxes(1, 2),
            swapped(gradients),
        )
    operands, ids = split(case)
    got_y, got_h, got = with_gradients(
        operands, ids, dy, dh, implementation=implementation, layout=layout, **options
    )
    assert got_y.dtype == dy.dtype and got_h.dtype == dh.dtype
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in operands.items()}
    close(got_y, y, tolerance, "y")
    close(got_h, h, tolerance, "final state")
    for name in operands:
        close(got[name], gradients[name], tolerance, f"gradient of {name}")
    return got_y


# Most checks take one of these, so that they share what is compiled.
standard_inputs = functools.partial(inputs, groups=2, segments=True, initial_state=True)
standard_run = functools.partial(with_gradients, layout="bld", chunk_size=4)


def mamba_ssm(implementation, length, dtype, groups, optional, seed=0):
    """A case of mamba_ssm's own test at its tolerances: B=2, D=4, N=8."""
    rtol, atol = MAMBA_SSM[dtype]
    case = inputs(
        seed, batch=2, length=length, channels=4, state=8, groups=groups, dtype=jnp.dtype(dtype),
        optional=optional,
    )  # fmt: skip
    dy, dh = cotangents(case, seed)
    y, h, expected = oracle(case, dy, dh)
    got_y, got_h, got = with_gradients(case, None, dy, dh, implementation=implementation)
    assert got_y.dtype == dtype and got_h.dtype == jnp.float32
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in case.items()}
    np.testing.assert_allclose(np.asarray(got_y, np.float64), y, rtol, atol, err_msg="y")
    np.testing.assert_allclose(got_h, h, rtol, atol, err_msg="final state")
    weight = (max(WEIGHTS[0], rtol), max(WEIGHTS[1], atol)) if optional else WEIGHTS
    tolerances = {
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (weight[0], 5 * weight[1]),
        "B": (rtol, atol),
        "C": (rtol, atol),
        "D": weight,
        "z": weight,
        "delta_bias": weight,
    }
    for name in case:
        value = np.asarray(got[name], np.float64)
        np.testing.assert_allclose(value, expected[name], *tolerances[name], err_msg=name)


def options(implementation, reverse, layout, segments):
    case = inputs(3, groups=2, segments=segments, initial_state=True)
    compare(implementation, case, layout=layout, reverse=reverse, chunk_size=4)


def one_option_alone(implementation, *names):
    """No optional operands but these; without softplus."""
    full = inputs(4, segments=True, initial_state=True)
    case = {k: full[k] for k in ("u", "delta", "A", "B", "C", *names)}
    compare(implementation, case, delta_softplus=False)


SIZES = (
    {"length": 1, "channels": 1, "state": 1},
    {"length": 7, "channels": 10, "state": 5, "groups": 10},
    {"length": 9, "channels": 3, "state": 64, "batch": 1},
    {"length": 5, "channels": 12, "state": 16, "groups": 3, "batch": 5},
)
LARGER_SIZES = (
    {"length": 33, "channels": 1000, "state": 16, "groups": 5, "batch": 1},
    {"length": 17, "channels": 2304, "state": 16, "batch": 1},
    {"length": 1134, "channels": 64, "state": 4, "groups": 64, "batch": 1},
    {"length": 130, "channels": 32, "state": 17, "groups": 16},
)


def size(implementation, sizes):
    case = inputs(5, **sizes, initial_state=True, segments=True)
    compare(implementation, case, chunk_size=3 if sizes["length"] < 10 else None)


def any_chunk_size(implementation):
    case = standard_inputs(6)
    for chunk_size in (1, 19, 100):
        got = values(case, implementation=implementation, chunk_size=chunk_size)
        for value, expected in zip(got, oracle(case)[:2], strict=True):
            close(value, expected)


def mixed_dtypes(implementation):
    case = inputs(8, segments=True, initial_state=True)
    halves = {"u": jnp.bfloat16, "delta": jnp.float16, "B": jnp.bfloat16, "z": jnp.float16}
    case |= {k: case[k].astype(dtype) for k, dtype in halves.items()}
    # The operands are rounded for the oracle too, so only the results' own rounding is left ...
    compare(implementation, case, tolerance=2**-8)
    # ... and none in what is float32.
    y, h = values(case, implementation=implementation, output_dtype="float32")
    assert y.dtype == jnp.float32
    for value, expected in zip((y, h), oracle(case)[:2], strict=True):
        close(value, expected)


def the_dtype_of_y_can_be_chosen(implementation):
    case = inputs(9, dtype=jnp.bfloat16, segments=True)
    y = compare(implementation, case, output_dtype="float16", tolerance=2**-8)
    close(y, oracle(case)[0], 2**-11)


def softplus_is_the_identity_above_20(implementation):
    case = inputs(10, optional=False)
    case["delta"] = jnp.full_like(case["delta"], 30.0).at[:, 3].set(19.9)
    compare(implementation, case)
    case["delta"] = case["delta"].at[:, 5].set(200.0)  # exp(200) is infinite in float32
    got = with_gradients(case, None, *cotangents(case), implementation=implementation, layout="bld")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def real_initialisation(implementation, length=3000):
    """A = -(1..16), dt in 1e-3..0.1: what a state remembers reaches over a thousand positions."""
    case = inputs(11, batch=1, length=length, channels=2, state=16, real=True, optional=False)
    compare(implementation, case, delta_softplus=False)


def reverse_is_the_flipped_scan(implementation):
    case = standard_inputs(12)
    dy, dh = cotangents(case)
    run = functools.partial(standard_run, implementation=implementation)
    y, h, gradients = run(*split(case), dy, dh, reverse=True)
    y_flipped, h_flipped, gradients_flipped = run(
        *split(flipped(case)), jnp.flip(dy, 1), dh, reverse=False
    )
    close(y, jnp.flip(y_flipped, 1), 2e-6)
    close(h, h_flipped, 2e-6)
    for name, value in flipped(gradients_flipped).items():
        close(gradients[name], value, FLOAT32, name)


def a_packed_row_is_its_videos_one_by_one(implementation, reverse):
    case = inputs(13, batch=1, length=24)
    # Padding in the middle of video 7 and between videos; id 7 comes back as a third video.
    ids = np.array([-1, 7, 7, 7, -1, -1, 7, 7, 3, 3, 3, 3, -1, 7, 7, 7, 9, 9, 9, 9, 9, -1, -1, -1])
    videos = [[1, 2, 3, 6, 7], [8, 9, 10, 11], [13, 14, 15], [16, 17, 18, 19, 20]]
    packed = case | {"segment_ids": jnp.asarray(ids[None], jnp.int32)}
    y, h = values(packed, implementation=implementation, reverse=reverse, chunk_size=5)
    for positions in videos:
        one = {k: v[:, jnp.array(positions)] if k in POSITIONS else v for k, v in case.items()}
        y_one, h_one = values(one, implementation=implementation, reverse=reverse)
        close(y[:, jnp.array(positions)], y_one, 1e-5)
        if positions == videos[0 if reverse else -1]:
            close(h, h_one, 1e-5)
    np.testing.assert_array_equal(np.asarray(y[:, ids < 0]), 0)


def the_first_segment_alone_continues_the_initial_state(implementation):
    case = standard_inputs(14)
    rows = [[-1, 4, -1, 4, 2, 2] + [-1] * 4 + [4] * 9, [4] * 3 + [-1] * 2 + [4] * 2 + [1] * 12]
    case["segment_ids"] = jnp.array(rows, jnp.int32)
    y, h = values(case, implementation=implementation)
    zero = case | {"initial_state": jnp.zeros_like(case["initial_state"])}
    y_zero, h_zero = values(zero, implementation=implementation)
    differs = np.any(np.asarray(y != y_zero), axis=2)
    first = np.zeros((2, 19), bool)
    first[0, [1, 3]] = first[1, [0, 1, 2, 5, 6]] = True
    np.testing.assert_array_equal(differs, first)
    np.testing.assert_array_equal(np.asarray(h), np.asarray(h_zero))


def a_row_of_padding_passes_the_state_through_untouched(implementation):
    case = standard_inputs(15) | {"segment_ids": jnp.full((2, 19), -3, jnp.int32)}
    dy, dh = cotangents(case)
    y, h, gradients = standard_run(
        *split(case), dy, dh, implementation=implementation, reverse=False
    )
    np.testing.assert_array_equal(np.asarray(y), 0)
    np.testing.assert_array_equal(np.asarray(h), np.asarray(case["initial_state"]))
    np.testing.assert_array_equal(np.asarray(gradients.pop("initial_state")), np.asarray(dh))
    for name, value in gradients.items():
        assert not np.any(value), name


def nothing_at_padding_is_read(implementation):
    case = standard_inputs(16)
    padding = case["segment_ids"] < 0

    def masked(x, value):
        return jnp.where(jnp.expand_dims(padding, tuple(range(2, x.ndim))), value, x)

    poisoned = case | {k: masked(case[k], jnp.nan) for k in POSITIONS}
    dy, dh = cotangents(case)
    run = functools.partial(standard_run, implementation=implementation, reverse=False)
    expected = run(*split(case), dy, dh)
    got = run(*split(poisoned), masked(dy, jnp.nan), dh)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for name in POSITIONS:
        x = got[2][name]
        assert not np.any(x - masked(x, 0)), name


def an_infinite_state_stays_in_its_segment(implementation):
    case = standard_inputs(17)
    case["segment_ids"] = jnp.tile(jnp.array([[0] * 10 + [1] * 9], jnp.int32), (2, 1))
    case["u"] = case["u"].at[:, 1].set(jnp.inf)
    y, h = values(case, implementation=implementation)
    assert not np.isfinite(y[:, 1:10]).any()
    assert np.isfinite(y[:, 10:]).all() and np.isfinite(h).all()


def calls_with_a_carried_state_equal_one_call(implementation, reverse, segments):
    """In values and gradients, with cuts inside segments, in padding and at a border."""
    case = inputs(18, length=21, initial_state=True)
    ids = jnp.tile(jnp.array([[1] * 12 + [-1] * 4 + [1] * 3 + [2] * 2], jnp.int32), (2, 1))
    dy, dh = cotangents(case)
    cuts = [(0, 6), (6, 14), (14, 21)]
    options = {"implementation": implementation, "reverse": reverse, "chunk_size": 5}

    def pieces(operands):
        state, parts = operands["initial_state"], []
        for start, stop in reversed(cuts) if reverse else cuts:
            piece = {k: v[:, start:stop] if k in POSITIONS else v for k, v in operands.items()}
            piece |= {"initial_state": state}
            piece |= {"segment_ids": ids[:, start:stop]} if segments else {}
            part, state = selective_scan(
                **piece, **options, delta_softplus=True, return_final_state=True
            )
            parts.append(part)
        return jnp.concatenate(parts[::-1] if reverse else parts, axis=1), state

    @quick
    def in_pieces(operands):
        outputs, pull = jax.vjp(pieces, operands)
        return *outputs, pull((dy, dh))[0]

    got = in_pieces(case)
    expected = oracle(case | ({"segment_ids": ids} if segments else {}), dy, dh, reverse=reverse)
    close(got[0], expected[0])
    close(got[1], expected[1])
    for name in case:
        close(got[2][name], expected[2][name], FLOAT32, name)


def under_vmap_checkpoint_and_scan(implementation):
    cases = [standard_inputs(seed) for seed in (19, 20)]
    dys, dhs = zip(*(cotangents(c, s) for s, c in enumerate(cases)), strict=True)
    expected = [oracle(c, dy, dh) for c, dy, dh in zip(cases, dys, dhs, strict=True)]
    operands, ids = split(jax.tree.map(lambda *x: jnp.stack(x), *cases))
    stacked = (operands, ids, jnp.stack(dys), jnp.stack(dhs))

    @jax.checkpoint
    def scan(operands, ids):
        return selective_scan(
            **operands, segment_ids=ids, delta_softplus=True, return_final_state=True,
            implementation=implementation, chunk_size=4,
        )  # fmt: skip

    def one(operands, ids, dy, dh):
        outputs, pull = jax.vjp(lambda operands: scan(operands, ids), operands)
        return *outputs, pull((dy, dh))[0]

    @quick
    def both(stacked):
        looped = jax.lax.scan(lambda carry, x: (carry, one(*x)), 0, stacked)[1]
        return jax.vmap(one)(*stacked), looped

    for result in both(stacked):
        for i in range(2):
            for got, value in zip(
                jax.tree.leaves(result), jax.tree.leaves(expected[i]), strict=True
            ):
                close(got[i], value)


def both_directions_in_one_call(implementation):
    """u, z and the segments are the same for both."""
    one, other = (standard_inputs(seed) for seed in (22, 23))
    other |= {name: one[name] for name in ("u", "z", "segment_ids")}
    dys, dhs = zip(*(cotangents(case, seed) for seed, case in enumerate((one, other))), strict=True)
    expected = [
        oracle(case, dy, dh, reverse=reverse)
        for case, dy, dh, reverse in zip((one, other), dys, dhs, (False, True), strict=True)
    ]
    operands, ids = split(one)
    operands |= {k: (v, other[k]) for k, v in operands.items() if k not in ("u", "z")}

    @quick
    def run(operands):
        def scan(operands):
            return selective_scan_bidirectional(
                **operands, segment_ids=ids, delta_softplus=True, return_final_state=True,
                implementation=implementation, chunk_size=4,
            )  # fmt: skip

        outputs, pull = jax.vjp(scan, operands)
        return *outputs, pull((dys, dhs))[0]

    y, h, gradients = run(operands)
    for i, (y_one, h_one, gradients_one) in enumerate(expected):
        close(y[i], y_one)
        close(h[i], h_one)
        for name in operands.keys() - {"u", "z"}:
            close(gradients[name][i], gradients_one[name], name=name)
    for name in ("u", "z"):
        close(gradients[name], sum(e[2][name] for e in expected), name=name)


def two_runs_give_the_same_bits(implementation):
    case = inputs(21, length=50, channels=40, groups=2, segments=True, initial_state=True)
    arguments = (*split(case), *cotangents(case))
    first, again = (with_gradients(*arguments, implementation=implementation) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def random_call(
    implementation, *, seed, batch, length, channels, groups, state, chunk_size, reverse, layout,
    segments, initial_state, optional, delta_softplus, dtype,
):  # fmt: skip
    """Values and gradients of a call made of drawn choices."""
    case = inputs(
        seed, batch=batch, length=length, channels=channels, state=state, groups=groups,
        dtype=dtype, initial_state=initial_state, optional=optional,
    )  # fmt: skip
    if segments:
        case["segment_ids"] = packed_ids(np.random.default_rng(seed), batch, length)
    tolerance = {"float32": FLOAT32, "float16": 2**-10, "bfloat16": 2**-7}[jnp.dtype(dtype).name]
    compare(
        implementation, case, layout=layout, reverse=reverse, chunk_size=chunk_size,
        delta_softplus=delta_softplus, tolerance=tolerance,
    )  # fmt: skip


PROPERTIES = (
    any_chunk_size,
    mixed_dtypes,
    the_dtype_of_y_can_be_chosen,
    softplus_is_the_identity_above_20,
    real_initialisation,
    reverse_is_the_flipped_scan,
    the_first_segment_alone_continues_the_initial_state,
    a_row_of_padding_passes_the_state_through_untouched,
    nothing_at_padding_is_read,
    an_infinite_state_stays_in_its_segment,
    under_vmap_checkpoint_and_scan,
    both_directions_in_one_call,
    two_runs_give_the_same_bits,
)
"""Those that take nothing but the implementation."""
