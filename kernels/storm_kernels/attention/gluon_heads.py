"""Tiles of a head's 72 channels: where they lie in shared memory, and their products.

72 channels are 64 and a rest of 16, of which 8 are padding: whatever is made of a head's channels
is a pair, of the 64 and of the rest. The padding's first channels may carry something else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from storm_kernels.gluon_copies import copy_to_shared


@gluon.constexpr_function
def swizzled_layout(channels):
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * channels, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def sums_layout(columns, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def weights_layout(columns, warps):
    return gl.DotOperandLayout(0, sums_layout(columns, warps), 2)


@gluon.constexpr_function
def rows_layout(lanes, warps):
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def allocate(dtype: gl.constexpr, ROWS: gl.constexpr):
    """Memory for 64 channels and for the rest. The leading axis of 1 is for `at`."""
    return (
        gl.allocate_shared_memory(dtype, [1, ROWS, 64], swizzled_layout(64)),
        gl.allocate_shared_memory(dtype, [1, ROWS, 16], swizzled_layout(16)),
    )


@gluon.jit
def copy_rows(
    memory, pointer, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr,
    CHANNELS: gl.constexpr,
):  # fmt: skip
    """Starts to copy CHANNELS (64 or 8) channels of rows from `first` on; zeros beyond the last."""
    layout: gl.constexpr = rows_layout(CHANNELS // 8, gl.num_warps())
    row = first + gl.arange(0, memory.shape[0], layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    place = gl.expand_dims(row, 1) * D + gl.expand_dims(channel, 0)
    if WHOLE:
        copy_to_shared(memory, pointer + place)
    else:
        copy_to_shared(memory, pointer + place, mask=gl.expand_dims(row, 1) < N)


@gluon.jit
def copy_head(memory, pointer, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr):
    """Starts to copy rows of a head from `first` on."""
    copy_rows(memory[0], pointer, first, N, D, WHOLE, 64)
    copy_rows(memory[1].slice(0, 8, 1), pointer + 64, first, N, D, WHOLE, 8)


@gluon.jit
def pad(memory, value, FILLED: gl.constexpr):
    """The first FILLED channels of the padding are `value`, the others zero."""
    ROWS: gl.constexpr = memory[1].shape[0]
    layout: gl.constexpr = rows_layout(1, gl.num_warps())
    channel = gl.arange(0, 8, layout=gl.SliceLayout(0, layout))
    x = gl.where(channel < FILLED, value, 0.0).to(memory[1].dtype)
    x = gl.expand_dims(x, 0) + gl.zeros([ROWS, 8], memory[1].dtype, layout)
    memory[1].slice(8, 8, 1).store(x)


@gluon.jit
def at(memory, zero):
    """The memory of `allocate` without its leading axis.

    Args:
        memory: a pair.
        zero: 0, but in an unrolled loop not to the compiler: it would keep the descriptors of all
            buffers in registers, which there are not enough of.
    """
    return memory[0].index(zero), memory[1].index(zero)


@gluon.jit
def start_scores(rows, columns):
    """Products of every row with every column, over all channels, padding too; under way."""
    ROWS: gl.constexpr = rows[0].shape[0]
    COLUMNS: gl.constexpr = columns[0].shape[0]
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, sums_layout(COLUMNS, gl.num_warps()))
    s = warpgroup_mma(rows[0], columns[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(rows[1], columns[1].permute((1, 0)), s, is_async=True)


@gluon.jit
def start_sums(weights, tile, sums):
    """Adds the tile's rows, weighted. Returns the sums under way, and what to keep until then."""
    w0 = gl.convert_layout(weights, weights_layout(64, gl.num_warps()))
    w1 = gl.convert_layout(weights, weights_layout(16, gl.num_warps()))
    y0 = warpgroup_mma(w0, tile[0], sums[0], is_async=True)
    y1 = warpgroup_mma(w1, tile[1], sums[1], is_async=True)
    return (y0, y1), (w0, w1)


@gluon.jit
def masked(s, left):
    """The scores of the first `left` columns of a tile, and minus infinity."""
    KEYS: gl.constexpr = s.shape[1]
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, sums_layout(KEYS, gl.num_warps())))
    return gl.where(gl.expand_dims(key, 0) < left, s, float("-inf"))


@gluon.jit
def opaque(x):
    """`x`, which the compiler must take to be any number each time that it gets there."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def write_head(out, y, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr):
    """Writes rows of a head from `first` on, those before N."""
    write_rows(out, y[0], first, N, D, WHOLE, 64)
    write_rows(out + 64, y[1], first, N, D, WHOLE, 8)


@gluon.jit
def write_rows(
    out, y, first, N: gl.constexpr, D: gl.constexpr, WHOLE: gl.constexpr, CHANNELS: gl.constexpr
):
    """The first CHANNELS channels of y."""
    layout: gl.constexpr = rows_layout(y.shape[1] // 8, gl.num_warps())
    y = gl.convert_layout(y, layout)
    row = first + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))
    there = gl.expand_dims(channel, 0) < CHANNELS
    if not WHOLE:
        there = there & (gl.expand_dims(row, 1) < N)
    gl.store(out + (gl.expand_dims(row, 1) * D + gl.expand_dims(channel, 0)), y, mask=there)
