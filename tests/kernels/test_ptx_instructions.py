"""The PTX emulator instruction by instruction: hand-written PTX against exact Python arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from tests.kernels.ptx_emulator import MemoryFault, RaceError, Window, run

HEADER = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 16 p0,
    .param .u64 .ptr .global .align 16 p1,
    .param .u64 .ptr .global .align 16 p2,
    .param .u64 .ptr .global .align 16 p3
)
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<33>;
    .reg .b64 %d<17>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r32, %laneid;
    ld.param.b64 %d10, [p0];
    ld.param.b64 %d11, [p1];
    ld.param.b64 %d12, [p2];
    ld.param.b64 %d13, [p3];
"""
FLOATS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
NAMES = {16: "%h", 32: "%r", 64: "%d"}


def threads(body, arrays, count=32, shared=0, grid=(1, 1, 1), **options):
    """Runs `body`; %d10, ... hold the arrays' addresses, %r0 the thread, %r32 the lane."""
    return run(HEADER + body + "\nret;\n}\n", grid, count, arrays, shared, **options)


def apply(instruction, *inputs, out=32):
    """The instruction on each element; {0}, {1}, ... stand for the operands, {d} for the result.

    Inputs are unsigned arrays; the result is unsigned of `out` bits.
    """
    count = -(-len(inputs[0]) // 32) * 32
    padded = [np.pad(x, (0, count - len(x)), mode="edge") for x in inputs]
    body, names = "", []
    for k, x in enumerate(padded):
        bits = x.dtype.itemsize * 8
        names.append(f"{NAMES[bits]}{k + 1}")
        body += f"mad.wide.u32 %d9, %r0, {bits // 8}, %d1{k};\n"
        body += f"ld.global.b{bits} {names[-1]}, [%d9];\n"
    target = f"{NAMES[out]}8"
    body += instruction.format(*names, d=target) + ";\n"
    body += f"mad.wide.u32 %d9, %r0, {out // 8}, %d1{len(padded)};\n"
    body += f"st.global.b{out} [%d9], {target};\n"
    result = np.zeros(count, FLOATS[out])
    for start in range(0, count, 1024):
        part = slice(start, min(start + 1024, count))
        piece = result[part].copy()
        threads(body, [x[part].copy() for x in padded] + [piece], len(piece))
        result[part] = piece
    return result[: len(inputs[0])]


# ---------------------------------------------------------------- exact arithmetic


def exact(bits, kind):
    """A float's value as a Fraction; inf and NaN as floats."""
    if kind == "bf16":
        value = float((np.uint32(bits) << np.uint32(16)).view(np.float32))
    else:
        value = float(np.array(bits).view({"f16": np.float16, "f32": np.float32}[kind]))
    return Fraction(value) if np.isfinite(value) else value


def nearest(value, kind):
    """A Fraction rounded once to the nearest float of a kind, ties to even; as bits."""
    precision, lowest, width = {"bf16": (8, -133, 16), "f16": (11, -24, 16), "f32": (24, -149, 32)}[
        kind
    ]
    largest = {"bf16": 0x7F80, "f16": 0x7C00, "f32": 0x7F800000}[kind]  # infinity
    sign = int(value < 0) << (width - 1)
    value = abs(value)
    if value == 0:
        return sign
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    while Fraction(2) ** exponent > value:
        exponent -= 1
    unit = max(exponent - precision + 1, lowest)
    steps = round(value / Fraction(2) ** unit)  # Python rounds a Fraction's ties to even
    # Consecutive floats have consecutive bits: `steps` counts from the start of this binade.
    above = steps - (1 << precision - 1) if unit > lowest else steps
    start = (unit - lowest + 1) << (precision - 1) if unit > lowest else 0
    return sign | min(start + above, largest)


def awkward(kind, count, rng):
    """Bits of floats of every size, with ties, neighbours of powers of two, zeros, subnormals."""
    width, fraction, bias = {"bf16": (16, 7, 127), "f16": (16, 10, 15), "f32": (32, 23, 127)}[kind]
    exponent = np.clip(rng.normal(bias, bias / 5, count).astype(int), 0, 2 * bias - 2)
    tail = rng.integers(0, 1 << fraction, count)
    short = (1 << fraction) - (1 << fraction - 4)
    tail = np.where(rng.random(count) < 0.5, tail & short, tail)
    bits = (rng.integers(0, 2, count) << (width - 1)) | (exponent << fraction) | tail
    bits[:6] = [0, 1 << (width - 1), 1, (1 << fraction) - 1, 1 << fraction, bias << fraction]
    return rng.permutation(bits).astype(FLOATS[width])


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("instruction", "of"),
    [
        ("add{rn}.{k} {{d}}, {{0}}, {{1}}", lambda a, b, c: a + b),
        ("sub{rn}.{k} {{d}}, {{0}}, {{1}}", lambda a, b, c: a - b),
        ("mul{rn}.{k} {{d}}, {{0}}, {{1}}", lambda a, b, c: a * b),
        ("fma.rn.{k} {{d}}, {{0}}, {{1}}, {{2}}", lambda a, b, c: a * b + c),
    ],
)
def test_float_arithmetic_rounds_once(instruction, of, kind):
    rng = np.random.default_rng(1)
    a, b, c = (awkward(kind, 600, rng) for _ in range(3))
    # Sums that nearly cancel, and products whose last bits decide a tie.
    c[:200] = [
        nearest(-exact(x, kind) * exact(y, kind), kind)
        for x, y in zip(a[:200], b[:200], strict=True)
    ]
    text = instruction.format(k=kind, rn=".rn" if kind == "f32" else "")
    got = apply(text, a, b, c, out=a.dtype.itemsize * 8)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        expected = of(*(exact(v, kind) for v in (x, y, z)))
        bits = nearest(expected, kind)
        zero = {16: 0x7FFF, 32: 0x7FFFFFFF}[a.dtype.itemsize * 8]
        same = bits == result or (expected == 0 and int(result) & zero == 0)
        assert same, (text, hex(x), hex(y), hex(z), hex(result), hex(bits))


def test_fma_keeps_what_a_second_rounding_would_lose():
    # (1 + 2^-12)^2 + 2^-100: in float64 a tie of f32, which the last term breaks upwards.
    a = np.array([1 + 2**-12], np.float32).view(np.uint32)
    c = np.array([2.0**-100], np.float32).view(np.uint32)
    got = apply("fma.rn.f32 {d}, {0}, {0}, {1}", a, c).view(np.float32)[0]
    assert got == np.float32(1 + 2**-11 + 2**-23)
    got = apply("fma.rn.f32 {d}, {0}, {0}, {1}", a, c | np.uint32(1 << 31)).view(np.float32)[0]
    assert got == np.float32(1 + 2**-11)


@pytest.mark.parametrize(("pair", "kind"), [("f16x2", "f16"), ("bf16x2", "bf16")])
def test_packed_halves_are_two_scalars(pair, kind):
    rng = np.random.default_rng(2)
    a, b, c = (awkward(kind, 128, rng) for _ in range(3))
    one = apply(f"fma.rn.{kind} {{d}}, {{0}}, {{1}}, {{2}}", a, b, c, out=16)
    two = apply(
        f"fma.rn.{pair} {{d}}, {{0}}, {{1}}, {{2}}", *(x.view(np.uint32) for x in (a, b, c))
    )
    np.testing.assert_array_equal(two.view(np.uint16), one)


def test_packed_f32():
    rng = np.random.default_rng(3)
    a, b, c = (awkward("f32", 64, rng) for _ in range(3))
    one = apply("fma.rn.f32 {d}, {0}, {1}, {2}", a, b, c)
    words = [x.view(np.uint64) for x in (a, b, c)]
    two = apply("fma.rn.f32x2 {d}, {0}, {1}, {2}", *words, out=64)
    np.testing.assert_array_equal(two.view(np.uint32), one)


def test_min_and_max_of_nan_and_zeros():
    x = np.array([np.nan, 1, np.nan, -0.0, 0.0, -np.inf], np.float32)
    y = np.array([2, np.nan, np.nan, 0.0, -0.0, 3], np.float32)
    bits = x.view(np.uint32), y.view(np.uint32)

    def of(name):
        return apply(f"{name}.f32 {{d}}, {{0}}, {{1}}", *bits).view(np.float32)

    np.testing.assert_array_equal(of("min"), [2, 1, np.nan, 0, 0, -np.inf])
    np.testing.assert_array_equal(np.signbit(of("min")[3:5]), [True, True])
    np.testing.assert_array_equal(np.signbit(of("max")[3:5]), [False, False])
    np.testing.assert_array_equal(of("max.NaN"), [np.nan, np.nan, np.nan, 0, 0, 3])
    z = np.array([-3, 2, -0.5, np.inf], np.float32).view(np.uint32)
    w = np.array([2, 3, -7, -1], np.float32).view(np.uint32)
    got = apply("min.xorsign.abs.f32 {d}, {0}, {1}", z, w).view(np.float32)
    np.testing.assert_array_equal(got, [-2, 2, 0.5, -1])


def test_ftz_flushes_and_the_others_do_not():
    tiny = np.array([2.0**-127, -(2.0**-149), 1.0], np.float32)
    one = np.ones(3, np.float32)
    bits = tiny.view(np.uint32), one.view(np.uint32)
    got = apply("mul.f32 {d}, {0}, {1}", *bits).view(np.float32)
    np.testing.assert_array_equal(got, tiny)
    got = apply("mul.ftz.f32 {d}, {0}, {1}", *bits).view(np.float32)
    np.testing.assert_array_equal(got, [0, 0, 1])
    assert np.signbit(got[1])
    exponent = np.array([-127, -126, -1, 0.5, 200, -np.inf, np.nan], np.float32).view(np.uint32)
    got = apply("ex2.approx.ftz.f32 {d}, {0}", exponent).view(np.float32)
    np.testing.assert_array_equal(got[[0, 1, 2, 4, 5]], [0, 2.0**-126, 0.5, np.inf, 0])
    assert abs(got[3] - 2**0.5) < 1e-7 and np.isnan(got[6])
    got = apply("ex2.approx.f32 {d}, {0}", exponent).view(np.float32)
    assert got[0] == 2.0**-127


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_to_halves(kind):
    rng = np.random.default_rng(4)
    x = awkward("f32", 2000, rng)
    # Ties: every half value plus exactly half a unit, and the floats on either side of it.
    halves = awkward(kind, 200, rng)
    wide = np.array([float(exact(h, kind)) for h in halves], np.float32).view(np.uint32)
    tie = np.uint32(1 << 15 if kind == "bf16" else 1 << 12)
    x = np.concatenate([x, wide + tie, wide + tie - np.uint32(1), wide + tie + np.uint32(1)])
    got = apply(f"cvt.rn.{kind}.f32 {{d}}, {{0}}", x, out=16)
    for value, result in zip(x, got, strict=True):
        if isinstance(exact(value, "f32"), Fraction):
            expected = nearest(exact(value, "f32"), kind)
            zero = exact(value, "f32") == 0
            assert result == expected or (zero and result & 0x7FFF == 0), hex(value)
    special = np.array([np.inf, -np.inf, np.nan, 3.4e38], np.float32).view(np.uint32)
    got = apply(f"cvt.rn.{kind}.f32 {{d}}, {{0}}", special, out=16)
    infinity = {"f16": 0x7C00, "bf16": 0x7F80}[kind]
    assert list(got) == [infinity, 0x8000 | infinity, 0x7FFF, infinity]
    back = apply(f"cvt.f32.{kind} {{d}}, {{0}}", halves)
    np.testing.assert_array_equal(back.view(np.float32), wide.view(np.float32))
    # The packed form: the first operand is the upper half.
    pair = apply(f"cvt.rn.{kind}x2.f32 {{d}}, {{0}}, {{1}}", x[:64], x[64:128])
    one = apply(f"cvt.rn.{kind}.f32 {{d}}, {{0}}", x, out=16)
    np.testing.assert_array_equal(pair >> 16, one[:64])
    np.testing.assert_array_equal(pair & 0xFFFF, one[64:128])


def test_float_to_integer():
    x = np.array([2.5, 3.5, -2.5, -0.5, 1e20, -1e20, np.nan, 7], np.float32).view(np.uint32)
    for how, expected in [
        ("rni", [2, 4, -2, 0]),
        ("rzi", [2, 3, -2, 0]),
        ("rmi", [2, 3, -3, -1]),
        ("rpi", [3, 4, -2, 0]),
    ]:
        got = apply(f"cvt.{how}.s32.f32 {{d}}, {{0}}", x).view(np.int32)
        np.testing.assert_array_equal(got, [*expected, 2**31 - 1, -(2**31), 0, 7])
    got = apply("cvt.rzi.u32.f32 {d}, {0}", x)
    np.testing.assert_array_equal(got, [2, 3, 0, 0, 2**32 - 1, 0, 0, 7])
    got = apply("cvt.rni.f32.f32 {d}, {0}", x).view(np.float32)
    np.testing.assert_array_equal(got[:4], [2, 4, -2, -0.0])


def test_integer_widths():
    x = np.array([0xFFFFFF80, 0x7F, 0x8001FFFF], np.uint32)
    got = apply("cvt.s32.s8 {d}, {0}", x).view(np.int32)
    np.testing.assert_array_equal(got, [-128, 127, -1])
    got = apply("cvt.s64.s32 {d}, {0}", x, out=64).view(np.int64)
    np.testing.assert_array_equal(got, [-128, 127, np.int32(-2147352577)])
    got = apply("cvt.u64.u32 {d}, {0}", x, out=64)
    np.testing.assert_array_equal(got, x)
    got = apply("cvt.sat.s8.s32 {d}, {0}", x).view(np.int32)
    np.testing.assert_array_equal(got, [-128, 127, -128])
    big = np.array([2**63 + 2**39 + 1, 2**24 + 1], np.uint64)
    got = apply("cvt.rn.f32.u64 {d}, {0}", big).view(np.float32)
    np.testing.assert_array_equal(got, [2.0**63 + 2.0**40, 2.0**24])


# ---------------------------------------------------------------- integers


def words(rng, count, bits=32):
    small = rng.integers(0, 40, count)
    wide = rng.integers(0, 1 << bits, count, dtype=np.uint64)
    edges = [0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1]
    edge = rng.choice(np.array(edges, np.uint64), count)
    pick = rng.integers(0, 3, count)
    values = np.where(pick == 0, small.astype(np.uint64), wide)
    return np.where(pick == 2, edge, values).astype(FLOATS[bits])


def signed(x, bits):
    return x - (1 << bits) if x >> bits - 1 else x


def bfe(a, b, c, sign):
    """The manual's loop."""
    position, length = b & 255, c & 255
    fill = 0 if not sign or length == 0 else a >> min(position + length - 1, 31) & 1
    result = 0
    for k in range(32):
        inside = k < length and position + k <= 31
        result |= (a >> position + k & 1 if inside else fill) << k
    return result


def bfi(a, b, c, d):
    position, length = c & 255, d & 255
    for k in range(length):
        if position + k < 32:
            b = b & ~(1 << position + k) | (a >> k & 1) << position + k
    return b


def prmt(a, b, c):
    pool = [(a | b << 32) >> 8 * k & 255 for k in range(8)]
    result = 0
    for k in range(4):
        nibble = c >> 4 * k & 15
        byte = pool[nibble & 7]
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * k
    return result


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


CASES = {
    "add.s32 {d}, {0}, {1}": lambda a, b, c: a + b,
    "sub.s32 {d}, {0}, {1}": lambda a, b, c: a - b,
    "add.sat.s32 {d}, {0}, {1}": lambda a, b, c: max(
        -(2**31), min(2**31 - 1, signed(a, 32) + signed(b, 32))
    ),
    "mul.lo.s32 {d}, {0}, {1}": lambda a, b, c: a * b,
    "mul.hi.s32 {d}, {0}, {1}": lambda a, b, c: signed(a, 32) * signed(b, 32) >> 32,
    "mul.hi.u32 {d}, {0}, {1}": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 {d}, {0}, {1}, {2}": lambda a, b, c: a * b + c,
    "mad.hi.u32 {d}, {0}, {1}, {2}": lambda a, b, c: (a * b >> 32) + c,
    "div.u32 {d}, {0}, {1}": lambda a, b, c: a // b if b else -1,
    "rem.u32 {d}, {0}, {1}": lambda a, b, c: a % b if b else None,
    "div.s32 {d}, {0}, {1}": lambda a, b, c: truncated(signed(a, 32), signed(b, 32)) if b else -1,
    "rem.s32 {d}, {0}, {1}": lambda a, b, c: (
        signed(a, 32) - signed(b, 32) * truncated(signed(a, 32), signed(b, 32)) if b else None
    ),
    "min.s32 {d}, {0}, {1}": lambda a, b, c: min(signed(a, 32), signed(b, 32)),
    "max.u32 {d}, {0}, {1}": lambda a, b, c: max(a, b),
    "neg.s32 {d}, {0}": lambda a, b, c: -a,
    "abs.s32 {d}, {0}": lambda a, b, c: abs(signed(a, 32)),
    "and.b32 {d}, {0}, {1}": lambda a, b, c: a & b,
    "xor.b32 {d}, {0}, {1}": lambda a, b, c: a ^ b,
    "not.b32 {d}, {0}": lambda a, b, c: ~a,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 {d}, {0}, {1}, {2}, 0xca": lambda a, b, c: a & b | ~a & c,
    "lop3.b32 {d}, {0}, {1}, {2}, 0x30": lambda a, b, c: a & ~b,
    "shl.b32 {d}, {0}, {1}": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 {d}, {0}, {1}": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 {d}, {0}, {1}": lambda a, b, c: signed(a, 32) >> min(b, 31),
    "shf.l.wrap.b32 {d}, {0}, {1}, {2}": lambda a, b, c: (a | b << 32) << (c & 31) >> 32,
    "shf.r.wrap.b32 {d}, {0}, {1}, {2}": lambda a, b, c: (a | b << 32) >> (c & 31),
    "shf.r.clamp.b32 {d}, {0}, {1}, {2}": lambda a, b, c: (a | b << 32) >> min(c, 32),
    "bfe.u32 {d}, {0}, {1}, {2}": lambda a, b, c: bfe(a, b, c, False),
    "bfe.s32 {d}, {0}, {1}, {2}": lambda a, b, c: bfe(a, b, c, True),
    "bfi.b32 {d}, {0}, {1}, {2}, 9": lambda a, b, c: bfi(a, b, c, 9),
    "bfi.b32 {d}, {0}, {1}, 7, {2}": lambda a, b, c: bfi(a, b, 7, c),
    "prmt.b32 {d}, {0}, {1}, {2}": prmt,
    "popc.b32 {d}, {0}": lambda a, b, c: a.bit_count(),
    "clz.b32 {d}, {0}": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 {d}, {0}": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 {d}, {0}": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.s32 {d}, {0}": lambda a, b, c: (
        32 - v.bit_length() if (v := a if a < 2**31 else ~a & 0xFFFFFFFF) else -1
    ),
}


@pytest.mark.parametrize("instruction", CASES)
def test_integers(instruction):
    rng = np.random.default_rng(5)
    a, b, c = (words(rng, 1500) for _ in range(3))
    got = apply(instruction, a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        expected = CASES[instruction](x, y, z)
        if expected is not None:
            assert result == expected % 2**32, (hex(x), hex(y), hex(z), hex(result))


def test_wide_integers():
    rng = np.random.default_rng(6)
    a, b = words(rng, 500), words(rng, 500)
    c, d = words(rng, 500, 64), words(rng, 500, 64)
    for text, inputs, of in [
        ("mul.wide.s32", (a, b), lambda x, y: signed(x, 32) * signed(y, 32)),
        ("mul.wide.u32", (a, b), lambda x, y: x * y),
        ("mul.hi.u64", (c, d), lambda x, y: x * y >> 64),
        ("mul.hi.s64", (c, d), lambda x, y: signed(x, 64) * signed(y, 64) >> 64),
        ("mul.lo.s64", (c, d), lambda x, y: x * y),
        ("add.s64", (c, d), lambda x, y: x + y),
        ("shr.s64", (c, b), lambda x, y: signed(x, 64) >> min(y, 63)),
        ("shl.b64", (c, b), lambda x, y: x << y if y < 64 else 0),
    ]:
        got = apply(f"{text} {{d}}, {{0}}, {{1}}", *inputs, out=64)
        for x, y, result in zip(inputs[0].tolist(), inputs[1].tolist(), got.tolist(), strict=True):
            assert result == of(x, y) % 2**64, (text, hex(x), hex(y))


def test_carries():
    rng = np.random.default_rng(12)
    a, b = words(rng, 500, 64), words(rng, 500, 64)
    open_, close = (
        "{{ .reg .b32 a, b, c, d, e, f; mov.b64 {{a, b}}, {0}; mov.b64 {{c, d}}, {1};",
        "}}",
    )
    for text, of in [
        ("add.cc.u32 e, a, c; addc.u32 f, b, d;", lambda x, y: x + y),
        ("sub.cc.u32 e, a, c; subc.u32 f, b, d;", lambda x, y: x - y),
        (
            "mad.lo.cc.u32 e, a, c, b; madc.hi.u32 f, a, c, d;",
            lambda x, y: (x % 2**32) * (y % 2**32) + (x >> 32) + (y >> 32 << 32),
        ),
    ]:
        got = apply(open_ + text + "mov.b64 {d}, {{e, f}};" + close, a, b, out=64)
        for x, y, result in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
            assert result == of(x, y) % 2**64, (text, hex(x), hex(y))


def test_directed_rounding():
    rng = np.random.default_rng(13)
    a, b, c = (awkward("f32", 600, rng) for _ in range(3))
    for text, of in [
        ("add", lambda x, y, z: x + y),
        ("mul", lambda x, y, z: x * y),
        ("fma", lambda x, y, z: x * y + z),
    ]:
        third = ", {2}" if text == "fma" else ""
        got = {
            how: apply(f"{text}.{how}.f32 {{d}}, {{0}}, {{1}}{third}", a, b, c) for how in
            ("rz", "rm", "rp", "rn")
        }  # fmt: skip
        for k, inputs in enumerate(zip(a, b, c, strict=True)):
            expected = of(*(exact(v, "f32") for v in inputs))
            down, up, zero = (exact(got[how][k], "f32") for how in ("rm", "rp", "rz"))
            if isinstance(down, float) or isinstance(up, float):
                continue  # beyond the largest float
            # The two enclose the sum, the nearest is one of them, and no float lies between.
            assert down <= expected <= up and zero == (down if expected > 0 else up)
            assert exact(got["rn"][k], "f32") in (down, up)
            after = np.nextafter(np.float32(float(down)), np.float32(np.inf))
            assert down == up == expected or after == float(up)


def test_packing_and_selection():
    rng = np.random.default_rng(7)
    a, b = words(rng, 64), words(rng, 64)
    both = apply("mov.b64 {d}, {{{0}, {1}}}", a, b, out=64)
    np.testing.assert_array_equal(both, a | b.astype(np.uint64) << np.uint64(32))
    body = "{{ .reg .b16 lo, hi; mov.b32 {{lo, hi}}, {0}; mov.b32 {d}, {{hi, lo}}; }}"
    got = apply(body, a)
    np.testing.assert_array_equal(got, a >> 16 | a << 16)
    body = "setp.lt.s32 %p1, {0}, {1}; setp.gt.and.u32 %p2|%p3, {0}, {1}, !%p1;"
    got = apply(body + "selp.b32 {d}, 5, 6, %p2; @%p3 add.s32 {d}, {d}, 100", a, b)
    less = a.view(np.int32) < b.view(np.int32)
    expected = np.where((a > b) & ~less, 5, 6) + np.where((a <= b) & ~less, 100, 0)
    np.testing.assert_array_equal(got, expected)


def test_comparisons_with_nan():
    x = np.array([1, 2, np.nan, 1], np.float32).view(np.uint32)
    y = np.array([2, 2, 2, np.nan], np.float32).view(np.uint32)
    for how, expected in [
        ("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 1, 1]), ("ne", [1, 0, 0, 0]), ("neu", [1, 0, 1, 1]),
        ("equ", [0, 1, 1, 1]), ("num", [1, 1, 0, 0]), ("nan", [0, 0, 1, 1]), ("ge", [0, 1, 0, 0]),
    ]:  # fmt: skip
        text = f"setp.{how}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1"
        np.testing.assert_array_equal(apply(text, x, y), expected, how)


# ---------------------------------------------------------------- lanes


def lanes(body):
    """Stores %r1 and %p1 of one warp; %r2 holds 100 + lane."""
    values, flags = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    threads(
        "add.u32 %r2, %r32, 100;\n"
        + body
        + """
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r1;
        selp.b32 %r9, 1, 0, %p1;
        mad.wide.u32 %d1, %r0, 4, %d11;
        st.global.b32 [%d1], %r9;""",
        [values, flags],
    )
    return values.astype(int) - 100, flags.astype(bool)


def test_shuffles():
    lane = np.arange(32)
    moved, found = lanes("shfl.sync.up.b32 %r1|%p1, %r2, 3, 0, -1;")
    np.testing.assert_array_equal(moved, np.where(lane >= 3, lane - 3, lane))
    np.testing.assert_array_equal(found, lane >= 3)
    moved, found = lanes("shfl.sync.down.b32 %r1|%p1, %r2, 5, 31, 0xffffffff;")
    np.testing.assert_array_equal(moved, np.where(lane < 27, lane + 5, lane))
    np.testing.assert_array_equal(found, lane < 27)
    moved, found = lanes("shfl.sync.bfly.b32 %r1|%p1, %r2, 6, 31, -1;")
    np.testing.assert_array_equal(moved, lane ^ 6)
    assert found.all()
    moved, found = lanes("xor.b32 %r3, %r32, 9; shfl.sync.idx.b32 %r1|%p1, %r2, %r3, 31, -1;")
    np.testing.assert_array_equal(moved, lane ^ 9)
    # Segments of eight lanes: c = (32 - 8) << 8 | clamp, as CUDA's width = 8.
    moved, found = lanes("shfl.sync.up.b32 %r1|%p1, %r2, 2, 0x1800, -1;")
    np.testing.assert_array_equal(moved, np.where(lane % 8 >= 2, lane - 2, lane))
    moved, found = lanes("shfl.sync.down.b32 %r1|%p1, %r2, 2, 0x181f, -1;")
    np.testing.assert_array_equal(moved, np.where(lane % 8 < 6, lane + 2, lane))
    np.testing.assert_array_equal(found, lane % 8 < 6)
    moved, found = lanes("shfl.sync.idx.b32 %r1|%p1, %r2, 13, 0x181f, -1;")
    np.testing.assert_array_equal(moved, lane // 8 * 8 + 5)
    # A clamp below the segment's end: the xor's partner lies beyond it.
    moved, found = lanes("shfl.sync.bfly.b32 %r1|%p1, %r2, 16, 15, -1;")
    np.testing.assert_array_equal(moved, np.where(lane >= 16, lane - 16, lane))
    np.testing.assert_array_equal(found, lane >= 16)


def test_votes():
    _, some = lanes("setp.eq.u32 %p2, %r32, 7; vote.sync.any.pred %p1, %p2, -1; mov.b32 %r1, 0;")
    assert some.all()
    _, every = lanes("setp.ne.u32 %p2, %r32, 7; vote.sync.all.pred %p1, %p2, -1; mov.b32 %r1, 0;")
    assert not every.any()
    ballot, leads = lanes(
        "setp.lt.u32 %p2, %r32, 5; vote.sync.ballot.b32 %r1, %p2, -1; elect.sync %r4|%p1, -1;"
    )
    assert (ballot == 31 - 100).all() and list(np.flatnonzero(leads)) == [0]
    total, _ = lanes("redux.sync.add.s32 %r1, %r32, -1; setp.eq.u32 %p1, %r1, 0;")
    assert (total == 31 * 16 - 100).all()


def test_a_shuffle_needs_its_lanes():
    with pytest.raises(RuntimeError, match="names lanes"):
        lanes("setp.lt.u32 %p1, %r32, 8; @%p1 shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;")
    moved, _ = lanes(
        "setp.lt.u32 %p1, %r32, 8; mov.b32 %r1, 0; @%p1 shfl.sync.idx.b32 %r1, %r2, 3, 31, 255;"
    )
    np.testing.assert_array_equal(moved, np.where(np.arange(32) < 8, 3, -100))
    with pytest.raises(RuntimeError, match="not here"):
        lanes("setp.lt.u32 %p1, %r32, 8; @%p1 shfl.sync.idx.b32 %r1, %r2, 20, 31, 255;")


# ---------------------------------------------------------------- control flow


def test_divergent_loops_and_branches():
    # Each thread loops tid % 5 times and adds its counter; odd threads leave through `ret`.
    out = np.zeros(64, np.uint32)
    threads(
        """
        mad.wide.u32 %d1, %r0, 4, %d10;
        rem.u32 %r1, %r0, 5;
        mov.b32 %r2, 0;
        mov.b32 %r3, 0;
    LOOP:
        setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra DONE;
        add.u32 %r2, %r2, 1;
        add.u32 %r3, %r3, %r2;
        bra.uni LOOP;
    DONE:
        bar.sync 0;
        st.global.b32 [%d1], %r3;
        and.b32 %r4, %r0, 1;
        setp.eq.u32 %p2, %r4, 1;
        @%p2 ret;
        add.u32 %r3, %r3, 1000;
        st.global.b32 [%d1], %r3;""",
        [out],
        64,
    )
    k = np.arange(64) % 5
    expected = k * (k + 1) // 2 + np.where(np.arange(64) % 2, 0, 1000)
    np.testing.assert_array_equal(out, expected)


def test_labels_and_registers_of_a_scope():
    out = np.zeros(32, np.uint32)
    once = """{
        .reg .b32 n; .reg .pred more;
        mov.b32 n, 3;
      AGAIN:
        add.u32 %r5, %r5, n;
        sub.u32 n, n, 1;
        setp.ne.u32 more, n, 0;
        @more bra AGAIN;
    }
    """
    store = "mad.wide.u32 %d1, %r0, 4, %d10; st.global.b32 [%d1], %r5;"
    threads("mov.b32 %r5, 0;" + once + once + store, [out])
    assert (out == 12).all()


def test_barriers_of_some_warps():
    # Warps 0 and 1 exchange through barrier 1, warps 2 and 3 through barrier 2.
    out = np.zeros(128, np.uint32)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r2, %r0, 4, %r1;
        shr.u32 %r3, %r0, 6;
        setp.eq.u32 %p1, %r3, 0;
        st.shared.b32 [%r2], %r0;
        @%p1 bra FIRST;
        {other}
        bra MEET;
    FIRST:
        bar.sync 1, 64;
    MEET:
        xor.b32 %r4, %r0, 32;
        mad.lo.u32 %r4, %r4, 4, %r1;
        ld.shared.b32 %r5, [%r4];
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r5;"""
    threads(body.format(other="bar.sync 2, 64;"), [out], 128, 512)
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)
    with pytest.raises(RaceError, match="warp 2 reads"):
        threads(body.format(other=""), [out], 128, 512)
    with pytest.raises(RuntimeError, match="deadlock"):
        threads("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", [out], 64)


def test_an_endless_loop_ends():
    with pytest.raises(RuntimeError, match="no end"):
        threads("HERE: bra HERE;", [np.zeros(1, np.uint32)], max_steps=1000)


def test_ctas_in_batches_see_their_own_numbers():
    grid = (3, 2, 2)
    out = np.zeros((12, 32, 4), np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2;
        mad.lo.u32 %r6, %r6, %r4, %r1;
        shl.b32 %r7, %r6, 5;
        add.u32 %r7, %r7, %r0;
        mad.wide.u32 %d1, %r7, 16, %d10;
        st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r0};"""
    threads(body, [out], grid=grid, batch_threads=32 * 5)
    expected = [
        [[x, y, z, t] for t in range(32)] for z in range(2) for y in range(2) for x in range(3)
    ]
    np.testing.assert_array_equal(out, expected)


# ---------------------------------------------------------------- memory

EXCHANGE = """
    mov.b32 %r1, smem;
    mad.lo.u32 %r2, %r0, 4, %r1;
    st.shared.b32 [%r2], %r0;
    {barrier}
    xor.b32 %r4, %r0, {partner};
    mad.lo.u32 %r4, %r4, 4, %r1;
    ld.shared.b32 %r5, [%r4];
    mad.wide.u32 %d1, %r0, 4, %d10;
    st.global.b32 [%d1], %r5;
    {second}
    st.shared.b32 [%r2], 7;
"""


def exchange(barrier="bar.sync 0;", partner=32, second="bar.sync 0;", **options):
    out = np.zeros(64, np.uint32)
    text = EXCHANGE.format(barrier=barrier, partner=partner, second=second)
    threads(text, [out], 64, 256, **options)
    return out


def test_races_between_warps():
    np.testing.assert_array_equal(exchange(), np.arange(64) ^ 32)
    with pytest.raises(RaceError, match="warp 0 reads shared address 128") as caught:
        exchange(barrier="")
    assert "ld.shared.b32 %r5, [%r4]" in "".join(caught.value.__notes__)
    with pytest.raises(RaceError, match=r"writes shared address .* read since"):
        exchange(second="")
    # Lanes of one warp need no barrier, and a run that checks nothing finds nothing.
    np.testing.assert_array_equal(exchange(barrier="", partner=1, second=""), np.arange(64) ^ 1)
    exchange(barrier="", check_races=False)


def test_races_of_two_writers():
    body = """
        mov.b32 %r1, smem;
        setp.ge.u32 %p1, %r0, 32;
        @%p1 st.shared.b{width} [%r1+{offset}], {first};
        @!%p1 st.shared.b{width} [%r1], {second};"""

    def write(**case):
        text = "mov.b32 %r2, 5; mov.b32 %r3, 6; cvt.u16.u32 %h2, %r2; cvt.u16.u32 %h3, %r3;"
        threads(text + body.format(**case), [], 64, 256)

    with pytest.raises(RaceError, match=r"warp 0 writes shared address 0, which warps \[1\] wrote"):
        write(width=32, offset=0, first="%r2", second="%r3")
    write(width=32, offset=0, first="%r2", second="%r2")  # the same value: a replicated layout
    write(width=16, offset=2, first="%h2", second="%h3")  # halves of one word are no conflict
    with pytest.raises(RaceError, match="different values to shared address 0 at once"):
        threads("mov.b32 %r1, smem; st.shared.b32 [%r1], %r0;", [], 64, 256)


def test_races_between_ctas():
    out = np.zeros(64, np.uint32)
    store = "mov.u32 %r1, %ctaid.x; {} mad.wide.u32 %d1, %r2, 4, %d10; st.global.b32 [%d1], {};"
    own = "mad.lo.u32 %r2, %r1, 32, %r0;"
    for batch in (32, 64):  # CTAs one after the other, or both at once
        options = dict(grid=(2, 1, 1), batch_threads=batch)
        threads(store.format(own, "%r2"), [out], **options)
        np.testing.assert_array_equal(out, np.arange(64))
        threads(store.format("mov.b32 %r2, %r0;", "%r0"), [out], **options)  # twice the same
        with pytest.raises(RaceError, match="byte 0 of p0"):
            threads(store.format("mov.b32 %r2, %r0;", "%r1"), [out], **options)
        with pytest.raises(RaceError, match="CTA 1 reads byte 0 of p0.*CTA 0 wrote there"):
            threads(store.format(own, "%r2") + "ld.global.b32 %r5, [%d10];", [out], **options)
        count = np.zeros(1, np.uint32)
        threads("red.global.add.u32 [%d10], 1;", [count], **options)
        assert count[0] == 64


def test_bounds_and_alignment():
    store = "mad.wide.u32 %d1, %r0, 4, %d10; st.global.b32 [%d1+{}], %r0;"
    out = np.zeros(32, np.uint32)
    threads(store.format(0), [out])
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises(MemoryFault, match=r"byte 128 of p0, which holds bytes \[0, 128\)"):
        threads(store.format(4), [out])
    with pytest.raises(MemoryFault, match="byte -4 of p0"):
        threads(store.format(-4), [out])
    with pytest.raises(MemoryFault, match="not a multiple of 4"):
        threads(store.format(2), [np.zeros(64, np.uint32)])
    with pytest.raises(MemoryFault, match="not a multiple of 16"):
        threads("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d10+8];", [np.zeros(64, np.uint32)])
    with pytest.raises(MemoryFault, match="no array"):
        threads("mov.b64 %d1, 64; ld.global.b32 %r1, [%d1];", [])
    with pytest.raises(MemoryFault, match="4 bytes at shared address 256 of 256"):
        threads("mov.b32 %r1, smem; ld.shared.b32 %r2, [%r1+256];", [], 32, 256)
    # The lanes that a predicate leaves out may point anywhere.
    threads("setp.lt.u32 %p1, %r0, 31;" + store.replace("st.", "@%p1 st.").format(4), [out])
    np.testing.assert_array_equal(out, [0, *range(31)])


def test_offsets_beyond_32_bits():
    far = np.arange(8, dtype=np.uint32)
    near = np.zeros(8, np.uint32)
    window = Window({0: near, 3 * 2**32: far})
    body = """
        setp.lt.u32 %p1, %r0, 8;
        mul.wide.u32 %d2, %r0, 4;
        add.s64 %d1, %d10, %d2;
        mov.b64 %d3, 12884901888;
        add.s64 %d3, %d1, %d3;
        @%p1 ld.global.b32 %r1, [%d3];
        @%p1 st.global.b32 [%d1], %r1;"""
    threads(body, [window])
    np.testing.assert_array_equal(near, far)
    with pytest.raises(MemoryFault, match=r"byte 12884901888 of p0"):
        threads(body, [Window({0: near})])


def test_nothing_unwritten_reads_as_zero():
    out = np.zeros((3, 32), np.float32)
    threads(
        """
        mov.b32 %r1, smem;
        ld.shared.b32 %r2, [%r1];
        mad.wide.u32 %d1, %r0, 4, %d10;
        st.global.b32 [%d1], %r2;
        st.global.b32 [%d1+128], %r7;
        mov.f32 %r3, 0f3FC00000;
        st.global.f32 [%d1+256], %r3;""",
        [out],
        shared=16,
    )
    assert np.isnan(out[:2]).all() and (out[2] == 1.5).all()


def test_atomics():
    total, old = np.zeros(2, np.float32), np.zeros(64, np.uint32)
    threads(
        """
        cvt.rn.f32.u32 %r1, %r0;
        red.global.add.f32 [%d10], %r1;
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %p1, %r2, 1;
        @%p1 atom.global.gpu.acq_rel.max.s32 %r3, [%d12], %r0;
        @%p1 atom.global.add.f32 %r4, [%d10+4], 0f3F800000;
        cvt.rzi.u32.f32 %r5, %r4;
        mad.wide.u32 %d1, %r0, 4, %d11;
        @%p1 st.global.b32 [%d1], %r5;""",
        [total, old, top := np.array([-5], np.int32)],
        64,
    )
    np.testing.assert_array_equal(total, [64 * 63 / 2, 32])
    assert sorted(old[1::2]) == list(range(32)) and top[0] == 63


def test_copies_arrive_when_waited_for():
    source, out = np.arange(64, dtype=np.uint32), np.zeros((2, 64), np.uint32)
    body = """
        mad.wide.u32 %d1, %r0, 4, %d10;
        mad.wide.u32 %d2, %r0, 4, %d11;
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r0, 4, %r1;
        st.shared.b32 [%r1], 7;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %d1 + 0 ], 0x4, 0x4;
        cp.async.commit_group ;
        cp.async.commit_group ;
        cp.async.wait_group {};
        ld.shared.b32 %r2, [%r1];
        st.global.b32 [%d2], %r2;
        cp.async.wait_group 0;
        ld.shared.b32 %r2, [%r1];
        st.global.b32 [%d2+256], %r2;"""
    threads(body.format(2), [source, out], 64, 256)
    assert (out[0] == 7).all()
    np.testing.assert_array_equal(out[1], source)
    threads(body.format(1), [source, out], 64, 256)
    np.testing.assert_array_equal(out[0], source)


def test_races_of_copies():
    # Both warps copy to the same place, from the same or from different places.
    source = np.arange(64, dtype=np.uint32)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r32, 4, %r1;
        mad.wide.u32 %d1, {}, 4, %d10;
        cp.async.ca.shared.global [%r1], [%d1], 4;
        cp.async.commit_group;
        {}
        cp.async.wait_group 0;
        {}
        xor.b32 %r2, %r1, 4;
        ld.shared.b32 %r2, [%r2];
        mad.wide.u32 %d1, %r0, 4, %d11;
        st.global.b32 [%d1], %r2;"""
    out = np.zeros(64, np.uint32)
    threads(body.format("%r32", "", "bar.sync 0;"), [source, out], 64, 128)
    np.testing.assert_array_equal(out, np.tile(np.arange(32) ^ 1, 2))
    with pytest.raises(RaceError, match="shared address 0"):
        threads(body.format("%r0", "", "bar.sync 0;"), [source, out], 64, 128)
    # A read while another warp's copy is under way; and after its arrival, with no barrier.
    early = "setp.ge.u32 %p2, %r0, 32; @%p2 ld.shared.b32 %r3, [%r1];"
    one = body.replace("cp.async.ca", "setp.lt.u32 %p3, %r0, 32; @%p3 cp.async.ca")
    with pytest.raises(RaceError, match="warp 1 reads"):
        threads(one.format("%r32", early, "bar.sync 0;"), [source, out], 64, 128)
    with pytest.raises(RaceError, match="warp 1 reads"):
        threads(one.format("%r32", "bar.sync 0;", ""), [source, out], 64, 128)


def test_matrices():
    # Row r of matrix m holds 100 m + 8 r + column; lanes 8 m to 8 m + 7 hold the rows' addresses.
    out = np.zeros((2, 32, 8), np.uint16)
    body = """
        mov.b32 %r1, smem;
        mad.lo.u32 %r1, %r32, 16, %r1;
        shr.u32 %r2, %r32, 3;
        and.b32 %r3, %r32, 7;
        mul.lo.u32 %r2, %r2, 100;
        mad.lo.u32 %r2, %r3, 8, %r2;
        mad.lo.u32 %r4, %r2, 65537, 65536;
        add.u32 %r5, %r4, 131074;
        add.u32 %r6, %r5, 131074;
        add.u32 %r7, %r6, 131074;
        st.shared.v4.b32 [%r1], {{%r4, %r5, %r6, %r7}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r1];
        mad.wide.u32 %d1, %r0, 16, %d10;
        st.global.v4.b32 [%d1], {{%r11, %r12, %r13, %r14}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%r11, %r12, %r13, %r14}};
        ld.shared.v4.b32 {{%r11, %r12, %r13, %r14}}, [%r1];
        st.global.v4.b32 [%d1+512], {{%r11, %r12, %r13, %r14}};"""
    matrix = np.arange(8)[:, None] * 8 + np.arange(8)
    stored = np.concatenate([100 * m + matrix for m in range(4)])
    for trans in ("", ".trans"):
        threads(body.format(trans=trans), [out], 32, 512)
        for m in range(4):
            one = 100 * m + (matrix.T if trans else matrix)
            # Lane 4 r + c holds columns 2 c and 2 c + 1 of row r.
            np.testing.assert_array_equal(out[0][:, 2 * m : 2 * m + 2], one.reshape(32, 2))
        np.testing.assert_array_equal(out[1], stored)


def test_what_it_does_not_know():
    with pytest.raises(NotImplementedError, match=r"wgmma.fence.sync.aligned"):
        threads("wgmma.fence.sync.aligned;", [])
    with pytest.raises(NotImplementedError, match=r"PTX line \d+: dp4a.u32.u32 %r1"):
        threads("dp4a.u32.u32 %r1, %r2, %r3, %r4;", [])
    with pytest.raises(ValueError, match="5 arguments for 4 parameters"):
        threads("", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="num_threads is 48"):
        threads("", [], 48)
