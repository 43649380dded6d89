"""The PTX emulator's arithmetic: instruction by instruction, against exact Python arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.kernels.ptx_snippets import WORDS, apply

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
    return rng.permutation(bits).astype(WORDS[width])


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


def test_fma_rounds_once_among_subnormals():
    # A tie of the subnormals but for -2^-196, which float64 loses next to 2^-127.
    a = np.array([2.0**-75 * (1 + 2**-23)], np.float32).view(np.uint32)
    b = np.array([2.0**-75 * (1 - 2**-23)], np.float32).view(np.uint32)
    c = np.array([2.0**-127 + 2.0**-149], np.float32).view(np.uint32)
    assert apply("fma.rn.f32 {d}, {0}, {1}, {2}", a, b, c)[0] == c[0]


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


def test_float8_to_halves():
    """Sign, four bits of exponent around 7, three of fraction; NaN where all but the sign are."""
    byte = np.arange(256)
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    value = np.where(
        exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    )
    value = np.where(sign == 1, -value, value)
    pairs = (byte | byte[::-1] << 8).astype(np.uint16)
    got = apply("cvt.rn.f16x2.e4m3x2 {d}, {0}", pairs)
    for halves, wanted in ((got & 0xFFFF, value), (got >> 16, value[::-1])):
        halves = halves.astype(np.uint16).view(np.float16)
        nan = np.abs(wanted) == 480
        assert np.isnan(halves[nan]).all()
        np.testing.assert_array_equal(halves[~nan], wanted[~nan])


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
    return np.where(pick == 2, edge, values).astype(WORDS[bits])


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


def test_literals():
    x = np.zeros(32, np.uint32)
    for text, expected in [
        ("mov.f32 {d}, 0f3FC00000", 0x3FC00000), ("add.f32 {d}, {0}, 1.5", 0x3FC00000),
        ("mov.b32 {d}, -3", 2**32 - 3), ("add.u32 {d}, {0}, 0xffU", 255),
        ("mov.f32 {d}, -2.5e-1", 0xBE800000),
        ("cvt.rn.f32.f64 {d}, 0d3FF8000000000000", 0x3FC00000),
    ]:  # fmt: skip
        assert (apply(text, x) == expected).all(), text


def test_comparisons_with_nan():
    x = np.array([1, 2, np.nan, 1], np.float32).view(np.uint32)
    y = np.array([2, 2, 2, np.nan], np.float32).view(np.uint32)
    for how, expected in [
        ("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 1, 1]), ("ne", [1, 0, 0, 0]), ("neu", [1, 0, 1, 1]),
        ("equ", [0, 1, 1, 1]), ("num", [1, 1, 0, 0]), ("nan", [0, 0, 1, 1]), ("ge", [0, 1, 0, 0]),
    ]:  # fmt: skip
        text = f"setp.{how}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1"
        np.testing.assert_array_equal(apply(text, x, y), expected, how)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_comparisons(kind):
    dtype = np.float16 if kind == "f16" else bfloat16
    rng = np.random.default_rng(8)
    x, y = rng.integers(-2, 3, (2, 64, 2)).astype(np.float32).astype(dtype)
    x[5, 1] = y[9, 0] = np.nan
    a, b = (np.ascontiguousarray(v).view(np.uint32)[:, 0] for v in (x, y))
    for how, function in [("ge", np.greater_equal), ("lt", np.less), ("eq", np.equal)]:
        body = f"setp.{how}.{kind}x2 %p1|%p2, {{0}}, {{1}};"
        got = apply(body + "selp.b32 {d}, 1, 0, %p1; @%p2 add.s32 {d}, {d}, 2", a, b)
        expected = function(x, y).astype(int)
        np.testing.assert_array_equal(got, expected[:, 0] + 2 * expected[:, 1], how)
