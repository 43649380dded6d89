"""The kernel of `gpu.matvec`, in Gluon: a matrix is read once, in order, and nothing else is large.

A program keeps the whole vector in registers, its warps a part each, and takes ROWS rows of the
matrix at a time, BLOCKS times, 16 bytes a lane. The next rows are on their way while some are
added. Sums are float32, a thread's own until all of a row is there.

A norm needs no pass of its own: its factor is the same for all inputs, so it scales the result.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _tile_layout(vector, warps):
    return gl.BlockedLayout([1, vector], [1, 32], [1, warps], [1, 0])


@gluon.constexpr_function
def _tile_words(warps):
    """Words of 32 bits of a row that all threads read together, 16 bytes each."""
    return 128 * warps


@gluon.jit
def _load(w, row, end, TILES: gl.constexpr, WORDS: gl.constexpr):
    """Rows before `end`, in tiles along the columns; zeros outside of them."""
    WIDTH: gl.constexpr = _tile_words(gl.num_warps())
    layout: gl.constexpr = _tile_layout(4, gl.num_warps())
    word = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)), 0)
    w += gl.expand_dims(row.to(gl.int64) * WORDS, 1)
    tiles = ()
    for tile in gl.static_range(0, TILES):
        there = gl.expand_dims(row < end, 1) & (word < WORDS - tile * WIDTH)
        part = gl.load(
            w + (word + tile * WIDTH), mask=there, other=0, eviction_policy="evict_first"
        )
        tiles = tiles + (part,)
    return tiles


@gluon.jit
def _numbers(words, dtype: gl.constexpr):
    """The numbers of `dtype` in words of 32 bits, float32: first ones, second ones, ...

    The words are taken apart here and not by the compiler, which would carry bytes from one turn of
    the loop to the next in registers of their own.
    """
    if dtype == gl.int8:
        # A byte below the exponent of 2^23 is a float32: 2^23 and the byte.
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4B000000, 0x7440;
            prmt.b32 $1, u, 0x4B000000, 0x7441;
            prmt.b32 $2, u, 0x4B000000, 0x7442;
            prmt.b32 $3, u, 0x4B000000, 0x7443;
            }""",
            "=r,=r,=r,=r,r", [words], dtype=(gl.float32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
        numbers = (a - 8388736.0, b - 8388736.0, c - 8388736.0, d - 8388736.0)
    elif dtype == gl.float8e4nv:
        numbers = gl.inline_asm_elementwise(
            """{
            .reg .b16 a, b, c, d;
            .reg .b32 p, q;
            mov.b32 {a, b}, $4;
            cvt.rn.f16x2.e4m3x2 p, a;
            cvt.rn.f16x2.e4m3x2 q, b;
            mov.b32 {a, b}, p;
            mov.b32 {c, d}, q;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=r,=r,=r,=r,r", [words], dtype=(gl.float32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    elif dtype == gl.bfloat16:
        numbers = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [words], dtype=(gl.float32,) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        gl.static_assert(dtype == gl.float16)
        numbers = gl.inline_asm_elementwise(
            """{
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            }""",
            "=r,=r,r", [words], dtype=(gl.float32,) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    return numbers


@gluon.jit
def _in_words(x, PARTS: gl.constexpr):
    """A tile's float32 inputs as `_numbers` orders the matrix."""
    WIDTH: gl.constexpr = x.shape[0] // PARTS
    layout: gl.constexpr = gl.SliceLayout(0, _tile_layout(4, gl.num_warps()))
    if PARTS == 2:
        numbers = gl.split(gl.reshape(x, [WIDTH, 2]))
    else:
        even, odd = gl.split(gl.reshape(x, [WIDTH, 2, 2]))
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        numbers = (first, second, third, fourth)
    parts = ()
    for i in gl.static_range(0, PARTS):
        part = gl.convert_layout(numbers[i], layout, assert_trivial=True)
        parts = parts + (gl.expand_dims(part, 0),)
    return parts


@gluon.jit
def _vector(
    x, norm, HAS_NORM: gl.constexpr, EPS: gl.constexpr, PLUS_ONE: gl.constexpr, C: gl.constexpr,
    PARTS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The vector times the norm's weight, tile by tile as `_in_words` has it; the norm's factor."""
    COLUMNS: gl.constexpr = _tile_words(gl.num_warps()) * PARTS
    layout: gl.constexpr = gl.SliceLayout(0, _tile_layout(4 * PARTS, gl.num_warps()))
    column = gl.arange(0, COLUMNS, layout=layout)
    squares = gl.zeros([COLUMNS], gl.float32, layout)
    parts = ()
    for tile in gl.static_range(0, TILES):
        at = tile * COLUMNS + column
        part = gl.load(x + at, mask=at < C, other=0.0).to(gl.float32)
        if HAS_NORM:
            squares += part * part
            weight = gl.load(norm + at, mask=at < C, other=0.0).to(gl.float32)
            part *= weight + 1.0 if PLUS_ONE else weight
        parts = parts + (_in_words(part, PARTS),)
    factor = 1.0
    if HAS_NORM:
        factor = gl.rsqrt(gl.sum(squares, 0) / C + EPS)
    return parts, factor


@gluon.jit
def _sums(tiles, x_parts, dtype: gl.constexpr):
    """Products of rows and vector, float32, without the norm's factor."""
    numbers = _numbers(tiles[0], dtype)
    sums = numbers[0] * x_parts[0][0]
    for tile in gl.static_range(0, len(tiles)):
        if tile > 0:
            numbers = _numbers(tiles[tile], dtype)
        for i in gl.static_range(0, len(numbers)):
            if tile + i > 0:
                sums += numbers[i] * x_parts[tile][i]
    return gl.sum(sums, 1)


@gluon.jit
def _result(
    y, row, dtype: gl.constexpr, scale, bias, end,
    HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Outputs in `dtype`, scaled and with their bias, which is added to what is rounded."""
    if HAS_SCALE:
        y *= gl.load(scale + row, mask=row < end, other=0.0)
    y = y.to(dtype)
    if HAS_BIAS:
        there = gl.load(bias + row, mask=row < end, other=0.0)
        y = (y.to(gl.float32) + there.to(gl.float32)).to(dtype)
    return y


@gluon.jit
def _gated(gate, up, ACTIVATION: gl.constexpr):
    gate = gate.to(gl.float32)
    if ACTIVATION == "silu":
        steep = gate
    else:  # the approximate GELU, whose 1 + tanh(s) is 2 sigmoid(2 s)
        steep = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return (gate / (1.0 + gl.exp(-steep)) * up.to(gl.float32)).to(up.dtype)


@gluon.jit
def matvec_kernel(
    x, w, scale, norm, bias, residual, out,
    HAS_SCALE: gl.constexpr, HAS_NORM: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, EPS: gl.constexpr, PLUS_ONE: gl.constexpr,
    ACTIVATION: gl.constexpr, R: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
):  # fmt: skip
    """Grid: parts of ROWS * BLOCKS outputs.

    Args:
        x: [C], bfloat16 or float16.
        w: [R, C] or, with ACTIVATION, [2, R, C]: of the gate and of what it multiplies.
        scale: float32 like the outputs of w.
        norm: [C], the weight of an RMSNorm that x goes through first.
        bias: like the outputs of w; not with ACTIVATION.
        residual: [R] in the dtype of x, what the result is added to.
        out: [R].
        HAS_SCALE, HAS_NORM, HAS_BIAS, HAS_RESIDUAL: without it the operand is another one.
        EPS: of the norm.
        PLUS_ONE: the norm's weight is 1 + `norm`.
        ACTIVATION: "silu", "gelu_tanh" or "".
        ROWS: outputs of a program at a time.
        BLOCKS: how many times.
    """
    WARPS: gl.constexpr = gl.num_warps()
    GATED: gl.constexpr = ACTIVATION != ""
    matrix: gl.constexpr = w.dtype.element_ty
    dtype: gl.constexpr = x.dtype.element_ty
    final: gl.constexpr = dtype if GATED or HAS_RESIDUAL else out.dtype.element_ty
    PARTS: gl.constexpr = 32 // matrix.primitive_bitwidth
    WORDS: gl.constexpr = C // PARTS
    TILES: gl.constexpr = (WORDS + _tile_words(WARPS) - 1) // _tile_words(WARPS)
    rows: gl.constexpr = gl.SliceLayout(1, _tile_layout(4, WARPS))
    first = gl.program_id(0) * (ROWS * BLOCKS)
    end = gl.minimum(first + ROWS * BLOCKS, R)
    row = first + gl.arange(0, ROWS, layout=rows)
    w = w.to(gl.pointer_type(gl.int32), bitcast=True)
    w_up = w + R * WORDS

    # The matrix does not wait for the vector.
    tiles = _load(w, row, end, TILES, WORDS)
    if GATED:
        tiles_up = _load(w_up, row, end, TILES, WORDS)
    x_parts, factor = _vector(x, norm, HAS_NORM, EPS, PLUS_ONE, C, PARTS, TILES)
    for _ in range(BLOCKS):
        ahead = _load(w, row + ROWS, end, TILES, WORDS)
        if GATED:
            ahead_up = _load(w_up, row + ROWS, end, TILES, WORDS)
        y = _sums(tiles, x_parts, matrix) * factor
        y = _result(y, row, final, scale, bias, end, HAS_SCALE, HAS_BIAS)
        if GATED:
            y_up = _sums(tiles_up, x_parts, matrix) * factor
            y_up = _result(y_up, row, final, scale + R, bias, end, HAS_SCALE, HAS_BIAS)
            y = _gated(y, y_up, ACTIVATION)
            tiles_up = ahead_up
        if HAS_RESIDUAL:
            there = gl.load(residual + row, mask=row < end, other=0.0)
            y = y.to(gl.float32) + there.to(gl.float32)
        gl.store(out + row, y.to(out.dtype.element_ty), mask=row < end)
        tiles = ahead
        row += ROWS
