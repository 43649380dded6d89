"""Device functions of the GPU scan's backward: parties, and how the warps hand them on.

A party is the CHANNELS channels of a segment that a warp works on at a time. Its operands and sums
lie in shared memory, 16 bytes of a thread beside those of the next: no bank conflicts.

Which party a warp takes differs from warp to warp. A shared memory descriptor's index may not, says
Gluon, but it is a register of each thread like any other: `warp_number` and `half_number` give
scalars that differ. What is read so has no axis of warps, though every warp reads its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from storm_kernels.selective_scan.gluon_lanes import (
    peel,
    tile_layout,
    wrap,
)

# Triton 3.9 renamed it.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)


@gluon.constexpr_function
def cube_layout(lanes, channels, warps):
    """[warps, channels, lanes]: one register a thread."""
    return gl.BlockedLayout([1, 1, 1], [1, channels, lanes], [warps, 1, 1], [1, 2, 0])


@gluon.constexpr_function
def _party(steps, lanes, channels, warps):
    """[steps / 4, lanes, channels, 4] of the party that a warp looks at."""
    return gl.SliceLayout(
        0,
        gl.BlockedLayout(
            [1, steps // 4, 1, 1, 4], [1, 1, lanes, channels, 1], [warps, 1, 1, 1, 1],
            [4, 3, 2, 1, 0],
        ),
    )  # fmt: skip


@gluon.constexpr_function
def _coefficients(steps, lanes, channels, warps):
    """[warps, steps / 4, lanes, 4], the same for every channel."""
    return gl.SliceLayout(
        1,
        gl.BlockedLayout(
            [1, 1, steps // 4, 1, 4], [1, channels, 1, lanes, 1], [warps, 1, 1, 1, 1],
            [4, 1, 3, 2, 0],
        ),
    )  # fmt: skip


@gluon.constexpr_function
def padded(states):
    """The next power of two."""
    return 1 << (states - 1).bit_length()


@gluon.jit
def warp_number():
    """The number of a thread's warp, as a scalar that differs between warps."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", "=r", [],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _half_assembly(reverse):
    flip = " xor.b32 t, t, 1;" if reverse else ""
    return (
        "{ .reg .u32 t; mov.u32 t, %tid.x;"
        f" shr.u32 t, t, 4; and.b32 t, t, 1;{flip} mov.b32 $0, t; }}"
    )


@gluon.jit
def half_number(REVERSE: gl.constexpr):
    """0 in the half of the lanes that the scan meets first, 1 in the other; see `warp_number`."""
    return gl.inline_asm_elementwise(
        _half_assembly(REVERSE), "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def in_cube(x, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr):
    """[rows, lanes] -> [warps, channels, lanes]."""
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    return gl.convert_layout(gl.reshape(x, [WARPS, CHANNELS, LANES]), cube, assert_trivial=True)


@gluon.jit
def read_party(
    memory, party,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Number `party` of shared [W, K / 4, LANES, C, 4] -> K tensors [1, CHANNELS, LANES]."""
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    parties = reinterpret(memory, gl.float32, [WARPS, K // 4, LANES, CHANNELS, 4], plain)
    x = parties.index(party).load(_party(K, LANES, CHANNELS, WARPS))
    x = peel(gl.reshape(gl.permute(x, (2, 1, 0, 3)), [CHANNELS, LANES, K]), gl.SliceLayout(0, cube))
    out = ()
    for k in gl.static_range(0, K):
        out = out + (gl.expand_dims(x[k], 0),)
    return out


@gluon.jit
def read_coefficients(
    memory, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """Shared [WARPS, K / 4, LANES, 4] -> K tensors [WARPS, 1, LANES]."""
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    x = memory.load(_coefficients(K, LANES, CHANNELS, WARPS))
    x = peel(gl.reshape(gl.permute(x, (0, 2, 1, 3)), [WARPS, LANES, K]), gl.SliceLayout(1, cube))
    out = ()
    for k in gl.static_range(0, K):
        out = out + (gl.expand_dims(x[k], 1),)
    return out


@gluon.jit
def write_rows(
    memory, steps,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """K tensors [rows, lanes] or [warps, channels, lanes] -> shared [W, K / 4, LANES, C, 4].

    16 bytes of neighbouring threads are neighbours: no bank conflicts.
    """
    ROWS: gl.constexpr = WARPS * CHANNELS
    rows = ()
    for k in gl.static_range(0, K):
        rows = rows + (gl.reshape(steps[k], [ROWS, LANES]),)
    x = wrap(rows, K, tile_layout(K, LANES, CHANNELS, WARPS))
    x = gl.permute(gl.reshape(x, [WARPS, CHANNELS, LANES, K // 4, 4]), (0, 3, 2, 1, 4))
    memory.store(x)


@gluon.jit
def read_sums(
    memory, giver, HAS_Z: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The three sums over states that warp number `giver` left; without z the third is nothing."""
    dxs = read_party(memory[0], giver, K, LANES, CHANNELS, WARPS)
    exponents = read_party(memory[1], giver, K, LANES, CHANNELS, WARPS)
    ys = dxs
    if HAS_Z:
        ys = read_party(memory[2], giver, K, LANES, CHANNELS, WARPS)
    return dxs, exponents, ys
