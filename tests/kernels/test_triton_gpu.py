"""The GPU kernels' numerics, in the PTX emulator: the shared suite, and what is their own.

Most of a case's time is the compilation of its kernels, some seconds each: cases share shapes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from storm_kernels.selective_scan import (
    dispatch,
    selective_scan,
    selective_scan_sharded,
    triton_gpu,
)
from storm_kernels.selective_scan.checks import checked_call
from tests.kernels import scan_suite
from tests.kernels.gpu_emulation import emulated_gpu  # noqa: F401
from tests.kernels.scan_cases import QUICK_COMPILE, inputs
from tests.kernels.scan_oracle import POSITIONS, oracle

GPU = "triton_gpu"
pytestmark = pytest.mark.usefixtures("emulated_gpu")
slow = pytest.mark.slow
exhaustive = (slow, pytest.mark.exhaustive)
quick = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
either_direction = pytest.mark.parametrize("reverse", [False, True])


# ------------------------------------------------------------ the shared suite

MARKS = {
    scan_suite.any_chunk_size: exhaustive,  # the kernels have no chunks
    scan_suite.two_runs_give_the_same_bits: exhaustive,  # `test_blocks_of_many_channels` does it
    scan_suite.real_initialisation: slow,
}


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=MARKS.get(check, ())) for check in scan_suite.PROPERTIES],
    ids=lambda check: check.__name__,
)
def test_property(check):
    check(GPU)


@slow
@either_direction
@pytest.mark.parametrize("layout", ["bld", "bdl"])
@pytest.mark.parametrize("segments", [pytest.param(False, marks=exhaustive), True])
def test_every_layout_and_direction(reverse, layout, segments):
    scan_suite.options(GPU, reverse, layout, segments)


# D and z meet in the result, bias and segments in the step size: each without the other.
@slow
@pytest.mark.parametrize(
    "names",
    [
        ("D", "delta_bias"),
        ("z", "segment_ids"),
        *(
            pytest.param((name,), marks=exhaustive)
            for name in ("D", "z", "delta_bias", "initial_state", "segment_ids")
        ),
    ],
)
def test_some_options_without_the_others(names):
    scan_suite.one_option_alone(GPU, *names)


@pytest.mark.parametrize("sizes", [pytest.param(x, marks=exhaustive) for x in scan_suite.SIZES])
def test_any_size(sizes):
    scan_suite.size(GPU, sizes)


@slow
@pytest.mark.parametrize(
    ("length", "dtype", "groups", "optional"),
    [
        (128, "float32", None, True),
        (372, "float16", 2, True),
        pytest.param(372, "bfloat16", None, False, marks=exhaustive),
        (1134, "bfloat16", 2, False),
        pytest.param(1134, "bfloat16", 2, True, marks=exhaustive),
    ],
)
def test_mamba_ssm(length, dtype, groups, optional):
    scan_suite.mamba_ssm(GPU, length, dtype, groups, optional)


# ------------------------------------------------------------ tiles, threads, blocks

# A tile of the sweeps has 256 steps (the adjoint's 512 with few rows), 16 of them a thread's; one
# of the backward kernel 64 and 8.
TILES = 300


# In CI `test_units_that_follow_each_other` has these operands, and
# `test_segments_that_meet_at_borders` these tiles.
@pytest.mark.parametrize("reverse", [pytest.param(r, marks=exhaustive) for r in (False, True)])
def test_two_tiles(reverse):
    case = inputs(1, length=TILES, state=16, groups=2, initial_state=True)
    scan_suite.compare(GPU, case, layout="bdl", reverse=reverse)


# The adjoint sweep of one direction goes the way of the forward sweep of the other.
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=exhaustive)])
def test_units_that_follow_each_other(reverse, monkeypatch):
    # Short sequences are one unit; here a program takes one tile and waits for the one before.
    for name in ("forward_sweep", "adjoint_sweep"):
        choose = getattr(triton_gpu, name)
        monkeypatch.setattr(
            triton_gpu,
            name,
            lambda *size, choose=choose, **save: dataclasses.replace(choose(*size, **save), unit=1),
        )
    case = inputs(3, batch=2, length=600, state=16, groups=2, channels=6, initial_state=True)
    scan_suite.compare(GPU, case, layout="bdl", reverse=reverse)


def ids_at_borders():
    """Restarts at and beside the borders of threads, segments and tiles; padding over them."""
    many = np.cumsum(np.isin(np.arange(TILES), [8, 16, 17, 33, 64, 128, 191, 255, 256, 257]))
    many[100:103] = -1
    padded = np.cumsum(np.isin(np.arange(TILES), [130, 271]))
    padded[:5] = padded[64:128] = padded[250:271] = -1  # a thread's part, a segment, a border
    plain = np.full(TILES, 7)
    ended = np.where(np.arange(TILES) < 256, 3, -1)
    return jnp.asarray([many, padded, plain, ended], jnp.int32)


@either_direction
def test_segments_that_meet_at_borders(reverse):
    case = inputs(2, batch=4, length=TILES, state=5, initial_state=True)
    ids = ids_at_borders()
    for name in POSITIONS:  # and nothing at padding is read
        padding = (ids < 0).reshape(ids.shape + (1,) * (case[name].ndim - 2))
        case[name] = jnp.where(padding, jnp.nan, case[name])
    scan_suite.compare(GPU, case | {"segment_ids": ids}, reverse=reverse)


@either_direction
def test_an_infinite_state_stays_in_its_segment_over_threads_and_tiles(reverse):
    """What the others give back has the same bits as without it, gradients included."""
    # The shapes of the test before.
    case = inputs(7, batch=4, length=TILES, state=5, initial_state=True)
    ids = jnp.where(jnp.arange(TILES) < 280, 1, 2).at[40:47].set(-1).at[:40].set(0)
    ids = jnp.tile(ids[None], (4, 1)).astype(jnp.int32)
    run = functools.partial(scan_suite.with_gradients, implementation=GPU, reverse=reverse)
    cotangents = scan_suite.cotangents(case)
    y, h, gradients = run(case, ids, *cotangents)
    infinite = case["u"].at[:, 290 if reverse else 3].set(jnp.inf)
    got_y, got_h, got = run(case | {"u": infinite}, ids, *cotangents)
    others = slice(0, 280) if reverse else slice(40, None)
    np.testing.assert_array_equal(got_y[:, others], y[:, others])
    np.testing.assert_array_equal(got_h, h)
    for name in POSITIONS:
        np.testing.assert_array_equal(got[name][:, others], gradients[name][:, others], name)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float32", scan_suite.FLOAT32, marks=exhaustive),
        pytest.param("float16", 2**-10, marks=exhaustive),
        ("bfloat16", 2**-7),
    ],
)
def test_whole_tiles_need_no_masks(dtype, tolerance, monkeypatch):
    """The backward copies ahead what it needs: in two rounds of 16 channels, in two programs."""
    monkeypatch.setattr(triton_gpu, "channels_of_a_program", lambda per_group, others: 32)
    jax.clear_caches()
    case = inputs(
        3, batch=1, length=256, channels=64, state=16, dtype=jnp.dtype(dtype), initial_state=True
    )
    scan_suite.compare(GPU, case, layout="bdl", tolerance=tolerance)
    jax.clear_caches()


@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 1, "channels": 1, "state": 1, "optional": False},
        # More states than lanes, and than the backward kernel takes at a time.
        {"length": 7, "channels": 3, "state": 20, "batch": 1},
        pytest.param({"length": 130, "channels": 3, "state": 64}, marks=slow),
        pytest.param({"length": 1134, "channels": 3, "state": 16, "groups": 3}, marks=slow),
        pytest.param(
            {"length": 1134, "channels": 6, "state": 20, "groups": 2, "segments": True},
            marks=exhaustive,
        ),
    ],
)
def test_sizes(sizes):
    scan_suite.compare(GPU, inputs(4, initial_state=True, **sizes))


@slow
def test_blocks_of_many_channels(monkeypatch):
    """dB and dC are sums over 32 channels and two programs: right, and the same bits again."""
    monkeypatch.setattr(triton_gpu, "channels_of_a_program", lambda per_group, others: 32)
    jax.clear_caches()
    case = inputs(5, batch=1, length=70, channels=78, groups=2, state=8, segments=True)
    scan_suite.compare(GPU, case)
    arguments = (*scan_suite.split(case), *scan_suite.cotangents(case))
    run = functools.partial(scan_suite.with_gradients, implementation=GPU, layout="bld")
    jax.tree.map(np.testing.assert_array_equal, run(*arguments), run(*arguments))
    jax.clear_caches()


# The two of CI: 9 forwards with all operands in bfloat16, 22 backwards without most of them.
@pytest.mark.parametrize(
    "seed",
    [pytest.param(x, marks=slow if x in (9, 22) else exhaustive) for x in (*range(5), 9, 22)],
)
def test_random_calls(seed):
    rng = np.random.default_rng(seed)
    channels, groups = [(1, 1), (4, 2), (6, 3), (5, 5), (34, 2)][rng.integers(5)]
    scan_suite.random_call(
        GPU, seed=seed, batch=int(rng.integers(1, 4)), length=int(rng.integers(1, 700)),
        channels=channels, groups=groups, state=int(rng.integers(1, 40)), chunk_size=None,
        reverse=bool(rng.integers(2)), layout=str(rng.choice(["bld", "bdl"])),
        segments=bool(rng.integers(2)), initial_state=bool(rng.integers(2)),
        optional=bool(rng.integers(2)), delta_softplus=bool(rng.integers(2)),
        dtype=[np.float32, np.float16, jnp.bfloat16][rng.integers(3)],
    )  # fmt: skip


@either_direction
def test_calls_with_a_carried_state_equal_one_call(reverse):
    """Values and gradients; the cuts are inside a segment and inside padding."""
    # Each call has the shapes of the suite, and so its kernels.
    length, pieces = 19, 3
    case = scan_suite.standard_inputs(6, length=length * pieces)
    ids = np.cumsum(np.isin(np.arange(length * pieces), [8, 25, 50]))
    ids[34:42] = -1
    case["segment_ids"] = jnp.asarray(np.stack([ids, ids]), jnp.int32)
    dy, dh = scan_suite.cotangents(case)
    operands, ids = scan_suite.split(case)

    def piecewise(operands):
        state, parts = operands["initial_state"], []
        for start in range(0, length * pieces, length)[:: -1 if reverse else 1]:
            part = slice(start, start + length)
            piece = {k: v[:, part] if k in POSITIONS else v for k, v in operands.items()}
            y, state = selective_scan(
                **piece | {"initial_state": state}, segment_ids=ids[:, part], reverse=reverse,
                delta_softplus=True, return_final_state=True, implementation=GPU,
            )  # fmt: skip
            parts.append(y)
        return jnp.concatenate(parts[:: -1 if reverse else 1], axis=1), state

    @quick
    def with_gradients(operands):
        outputs, pull = jax.vjp(piecewise, operands)
        return *outputs, pull((dy, dh))[0]

    y, h, gradients = oracle(case, dy, dh, reverse=reverse)
    got_y, got_h, got = with_gradients(operands)
    scan_suite.close(got_y, y)
    scan_suite.close(got_h, h)
    for name in operands:
        scan_suite.close(got[name], gradients[name], name=name)


# ------------------------------------------------------------ JAX's transformations

# The shape that most properties of the suite have, and so the same kernels.
shared_shape = scan_suite.standard_inputs


def test_vmap_with_the_same_weights_for_all():
    cases = [shared_shape(seed, batch=1) for seed in (30, 31)]
    weights = {k: cases[0][k] for k in ("A", "D", "delta_bias")}
    cases = [case | weights for case in cases]
    dys, dhs = zip(*(scan_suite.cotangents(c, s) for s, c in enumerate(cases)), strict=True)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases) | weights
    operands, ids = scan_suite.split(stacked)
    axes = {k: None if k in weights else 0 for k in operands}

    def scan(operands, ids):
        return selective_scan(
            **operands, segment_ids=ids, delta_softplus=True, return_final_state=True,
            implementation=GPU,
        )  # fmt: skip

    @quick
    def with_gradients(operands, ids, dy, dh):
        mapped = jax.vmap(scan, in_axes=(axes, 0))
        outputs, pull = jax.vjp(lambda operands: mapped(operands, ids), operands)
        return *outputs, pull((dy, dh))[0]

    got_y, got_h, got = with_gradients(operands, ids, jnp.stack(dys), jnp.stack(dhs))
    expected = [oracle(c, dy, dh) for c, dy, dh in zip(cases, dys, dhs, strict=True)]
    for i, (y, h, gradients) in enumerate(expected):
        scan_suite.close(got_y[i], y)
        scan_suite.close(got_h[i], h)
        for name in operands.keys() - weights.keys():
            scan_suite.close(got[name][i], gradients[name], name=name)
    for name in weights:
        scan_suite.close(got[name], sum(e[2][name] for e in expected), name=name)


def test_without_jit_it_is_the_same():
    case = shared_shape(32)
    jitted = scan_suite.values(case, implementation=GPU)
    eager = selective_scan(**case, delta_softplus=True, return_final_state=True, implementation=GPU)
    for x, y in zip(jitted, eager, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_second_derivative_is_refused():
    case, ids = scan_suite.split(shared_shape(33))

    def slope(case):
        def loss(case):
            y = selective_scan(**case, segment_ids=ids, delta_softplus=True, implementation=GPU)
            return jnp.sum(jnp.sin(y))

        return sum(jnp.sum(g) for g in jax.tree.leaves(jax.grad(loss)(case)))

    with pytest.raises(NotImplementedError, match="'triton_gpu' is diff.*='reference'"):
        jax.eval_shape(jax.grad(slope), case)


@either_direction
def test_the_hooks_of_the_sharded_scan(reverse):
    case = shared_shape(34)
    dy, dh = scan_suite.cotangents(case)
    absent = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "segment_ids"))
    call = checked_call(
        **absent | case, delta_softplus=True, reverse=reverse, layout="bld", chunk_size=None,
        output_dtype=None,
    )  # fmt: skip
    implementation = dispatch.load(GPU)
    _, h, gradients = oracle(case, dy, dh, reverse=reverse)
    scan_suite.close(quick(implementation.end_state)(call), h)
    entry = quick(implementation.entry_gradient)(call, dy, dh)
    scan_suite.close(entry, gradients["initial_state"])


def sharded_gradients(scan, mesh, specs, out_specs, case, dy, dh):
    mapped = jax.shard_map(scan, mesh=mesh, in_specs=(specs,), out_specs=out_specs)

    @quick
    def run(case):
        operands, ids = scan_suite.split(case)

        def of_operands(operands):
            return mapped(operands | {"segment_ids": ids})

        outputs, pull = jax.vjp(of_operands, operands)
        return *outputs, pull((dy, dh))[0]

    placed = {k: jax.device_put(v, jax.NamedSharding(mesh, specs[k])) for k, v in case.items()}
    return run(placed)


@pytest.mark.parametrize("axis", ["batch", "length"])
def test_inside_shard_map(axis):
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    mesh = jax.make_mesh((2,), (axis,), devices=jax.devices()[:2])
    case = shared_shape(35, **({"batch": 4} if axis == "batch" else {"length": 38}))
    dy, dh = scan_suite.cotangents(case)
    wide = P("batch") if axis == "batch" else P(None, "length")
    specs = {k: wide if k in (*POSITIONS, "segment_ids") else P() for k in case}
    state = P("batch") if axis == "batch" else P()
    specs["initial_state"] = state

    def scan(case):
        options = {"delta_softplus": True, "return_final_state": True, "implementation": GPU}
        if axis == "batch":
            return selective_scan(**case, **options)
        return selective_scan_sharded(**case, **options, axis_name="length")

    got_y, got_h, got = sharded_gradients(scan, mesh, specs, (wide, state), case, dy, dh)
    y, h, gradients = oracle(case, dy, dh)
    scan_suite.close(got_y, y)
    scan_suite.close(got_h, h)
    for name in got:
        scan_suite.close(got[name], gradients[name], name=name)
