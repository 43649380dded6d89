"""Device functions of the GPU scan's backward: what comes from and goes to global memory.

Where nothing needs a mask, operands of 16 bits and the states are copied to shared memory while the
parties before are worked on; otherwise they are loaded when they are needed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from storm_kernels.gluon_copies import copy_to_shared
from storm_kernels.selective_scan.gluon_lanes import (
    peel,
    row_layout,
    steps_of,
    tile_layout,
    wrap,
)
from storm_kernels.selective_scan.gluon_parties import (
    cube_layout,
    in_cube,
    reinterpret,
)


@gluon.constexpr_function
def tiles_layout(steps, lanes, channels, warps):
    """[warps, lanes, channels, steps]: `steps` in registers, as in `tile_layout`."""
    return gl.BlockedLayout(
        [1, 1, 1, steps], [1, lanes, channels, 1], [warps, 1, 1, 1], [3, 2, 1, 0]
    )


@gluon.constexpr_function
def _is_staged(pointer_type, whole):
    """Whether an operand is copied to shared memory ahead: float32 would take too much of it."""
    return whole and pointer_type.element_ty.primitive_bitwidth == 16


@gluon.jit
def stage(
    pointer, WHOLE: gl.constexpr, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Shared memory for an operand that `fetch` copies; for others anything."""
    if _is_staged(pointer.dtype, WHOLE):
        out = gl.allocate_shared_memory(
            pointer.dtype.element_ty, [WARPS, LANES, CHANNELS, K],
            gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
        )  # fmt: skip
    else:
        out = pointer
    return out


@gluon.jit
def _fetch_rows(stage, pointer, place, WHOLE: gl.constexpr):
    """Starts to copy the parties' steps."""
    if _is_staged(pointer.dtype, WHOLE):
        copy_to_shared(stage, pointer + place)


@gluon.jit
def load_rows(
    stage, pointer, place, there, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The parties' steps [warps, lanes, channels, K], copied before or loaded now.

    One offset serves all operands and is added last: a sum of pointer and lane would stay in two
    registers of each thread, for every operand.
    """
    if _is_staged(pointer.dtype, WHOLE):
        x = stage.load(tiles_layout(K, LANES, CHANNELS, WARPS))
    elif WHOLE:
        x = gl.load(pointer + place)
    else:
        x = gl.load(pointer + place, mask=there, other=0.0)
    return x


@gluon.jit
def steps_of_rows(
    x, K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr
):
    """What `load_rows` gave as K float32 tensors [rows, lanes]."""
    x = gl.reshape(gl.permute(x, (0, 2, 1, 3)), [WARPS * CHANNELS, LANES, K])
    x = gl.convert_layout(x, tile_layout(K, LANES, CHANNELS, WARPS), assert_trivial=True)
    return steps_of(x, LANES, CHANNELS, WARPS)


@gluon.jit
def store_rows(
    pointer, place, there, steps, WHOLE: gl.constexpr,
    K: gl.constexpr, LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """K float32 tensors [rows, lanes], rounded, to where `load_rows` reads."""
    x = wrap(steps, K, tile_layout(K, LANES, CHANNELS, WARPS)).to(pointer.dtype.element_ty)
    x = gl.permute(gl.reshape(x, [WARPS, CHANNELS, LANES, K]), (0, 2, 1, 3))
    x = gl.convert_layout(x, tiles_layout(K, LANES, CHANNELS, WARPS), assert_trivial=True)
    if WHOLE:
        gl.store(pointer + place, x)
    else:
        gl.store(pointer + place, x, mask=there)


@gluon.jit
def stage_channels(pointer, WHOLE: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for one number of each party's channels; without WHOLE anything."""
    if WHOLE:
        out = gl.allocate_shared_memory(
            gl.float32, [WARPS * CHANNELS], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
    else:
        out = pointer
    return out


@gluon.jit
def _fetch_channels(stage, pointer, first_channel, CHANNELS: gl.constexpr, WARPS: gl.constexpr):
    """Starts to copy one number of each channel."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    channel = first_channel + gl.arange(0, WARPS * CHANNELS, layout=layout)
    copy_to_shared(stage, pointer + channel, cache_modifier=".ca")


@gluon.jit
def load_channels(
    stage, pointer, channel, there, WHOLE: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One number a channel, [rows, lanes], copied before or loaded now."""
    if WHOLE:
        x = stage.load(gl.SliceLayout(1, row_layout(LANES, CHANNELS, WARPS)))
        x = gl.expand_dims(x, 1) + channel * 0
    else:
        x = gl.load(pointer + channel, mask=there, other=0.0)
    return x


@gluon.jit
def load_states(
    source, place, there, SP: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A warp's states of a party from [.., E, N]: SP tensors [warps, channels, lanes].

    Args:
        place, there: [rows, lanes, SP], where they lie and which exist.
    """
    x = gl.load(source + place, mask=there, other=0.0)
    if SP == 1:
        rows = (gl.reshape(x, [WARPS * CHANNELS, LANES]),)
    else:
        rows = peel(x, row_layout(LANES, CHANNELS, WARPS))
    out = ()
    for j in gl.static_range(0, SP):
        out = out + (in_cube(rows[j], LANES, CHANNELS, WARPS),)
    return out


@gluon.constexpr_function
def _copied_states(states, channels, warps):
    """[parties, warps, channels, states] for copies of a thread's `states` at once."""
    return gl.BlockedLayout(
        [1, 1, 1, states], [1, 32 // channels, channels, 1], [warps, 1, 1, 1], [3, 2, 1, 0]
    )


@gluon.constexpr_function
def _own_states(states, lanes, channels, warps):
    """[channels, states] of a warp, the same in all lanes of a channel."""
    return gl.SliceLayout(
        1,
        gl.SliceLayout(
            0,
            gl.BlockedLayout(
                [1, 1, 1, states], [1, channels, lanes, 1], [warps, 1, 1, 1], [3, 1, 2, 0]
            ),
        ),
    )


@gluon.jit
def _fetch_states(
    memory, slot, A2, saved, edges, first_channel,
    N: gl.constexpr, STATES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts to copy A2, the saved states and the edges of all parties.

    Args:
        memory: shared float32 [2, parties, warps, channels, states] for A2 and [4, ...] for the
            others: slots of saved states and edges alternate.
        slot: 0 or 1, where they go.
    """
    layout: gl.constexpr = _copied_states(STATES, CHANNELS, WARPS)
    three: gl.constexpr = gl.SliceLayout(3, layout)
    party = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, three)))
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, three)))
    part = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, three)))
    j = gl.arange(0, STATES, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    place = gl.expand_dims(gl.expand_dims(party, 1), 2) * (CHANNELS * N)
    place = place + gl.expand_dims(gl.expand_dims(warp, 0), 2) * STATES
    place = place + gl.expand_dims(gl.expand_dims(part, 0), 1) * N
    place = gl.expand_dims(place, 3) + gl.expand_dims(gl.expand_dims(gl.expand_dims(j, 0), 1), 2)
    place = first_channel * N + place
    copy_to_shared(memory[0].index(slot), A2 + place, cache_modifier=".ca")
    copy_to_shared(memory[1].index(2 * slot), saved + place, cache_modifier=".ca")
    copy_to_shared(memory[1].index(2 * slot + 1), edges + place, cache_modifier=".ca")


@gluon.jit
def fetch(
    stages, u, delta, dy, z, D, bias, fetched, slot, A2, saved, edges, first_channel, step, row,
    L: gl.constexpr, N: gl.constexpr, STATES: gl.constexpr, WHOLE: gl.constexpr,
    EVERY: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Starts to copy what the parties from `first_channel` need, as one commit group."""
    place = (first_channel + row) * L + step
    _fetch_rows(stages[0], u, place, WHOLE)
    _fetch_rows(stages[1], delta, place, WHOLE)
    _fetch_rows(stages[2], dy, place, WHOLE)
    if HAS_Z:
        _fetch_rows(stages[3], z, place, WHOLE)
    if HAS_D:
        _fetch_channels(stages[4], D, first_channel, CHANNELS, WARPS)
    if HAS_BIAS:
        _fetch_channels(stages[5], bias, first_channel, CHANNELS, WARPS)
    if EVERY:
        _fetch_states(fetched, slot, A2, saved, edges, first_channel, N, STATES, CHANNELS, WARPS)
    async_copy.commit_group()


@gluon.jit
def read_states(
    memory, slot, party, warp,
    SLOTS: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, STATES: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """COUNT of a warp's states of a party, from number FIRST: tensors [1, channels, 1].

    Args:
        memory: of SLOTS slots, see `_fetch_states`.
    """
    cube: gl.constexpr = cube_layout(LANES, CHANNELS, WARPS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    mine = reinterpret(memory, gl.float32, [SLOTS * WARPS * WARPS, CHANNELS, STATES], plain)
    mine = mine.index((slot * WARPS + party) * WARPS + warp)
    x = mine.slice(FIRST, COUNT, 1).load(_own_states(COUNT, LANES, CHANNELS, WARPS))
    x = gl.expand_dims(x, 1)
    if COUNT == 1:
        rows = (gl.reshape(x, [CHANNELS, 1]),)
    else:
        rows = peel(x, gl.SliceLayout(0, cube))
    out = ()
    for j in gl.static_range(0, COUNT):
        row = gl.convert_layout(rows[j], gl.SliceLayout(0, cube), assert_trivial=True)
        out = out + (gl.expand_dims(row, 0),)
    return out
