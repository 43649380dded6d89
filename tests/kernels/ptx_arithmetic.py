"""What PTX's arithmetic instructions compute, as functions of NumPy vectors.

Operands and results are bit patterns in the type's own NumPy dtype (`DTYPES`): float32 for f32,
float16 for f16, uint16 for bf16, unsigned words for packed types and untyped bits.

f32, f16 and bf16 arithmetic rounds once, to nearest even, fma included. Division, square root and
the functions that PTX marks `.approx` or `.full` are computed in float64 and rounded to f32: the
hardware's own error (ex2 and div.full 2 ulp, lg2 2^-22 absolute, tanh 2^-11 relative, ...) is not
imitated. NaN results need not carry the hardware's payload.
"""

import ml_dtypes
import numpy as np

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16,
    "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "f32x2": np.uint64,
    "tf32": np.uint32, "e4m3x2": np.uint16,
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


# ---------------------------------------------------------------- formats and rounding


def widen(x, kind):
    """Float bits of a type as float64, exactly."""
    if kind == "bf16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def narrow(x, kind):
    """Float64 to a type, to nearest even."""
    if kind == "bf16":
        return round_bf16(to_odd_f32(x))
    return round_f16(x) if kind == "f16" else x.astype(DTYPES[kind])


def round_f16(x):
    """A float32 or float64 vector to f16; any NaN gives 0x7fff, as cvt does."""
    return np.where(np.isnan(x), np.uint16(0x7FFF).view(np.float16), x.astype(np.float16))


def round_bf16(x):
    """float32 to bf16 bits, to nearest even; any NaN gives 0x7fff, as cvt does."""
    bits = x.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _to_odd(value, error, integer):
    """The odd one of the two neighbours that enclose value + error: a second rounding is exact."""
    bits = value.view(integer)
    inexact = ((error > 0) | (error < 0)) & ((bits & 1) == 0) & np.isfinite(value)
    outwards = (error > 0) == (value > 0)
    return np.where(inexact, bits + np.where(outwards, 1, -1).astype(integer), bits).view(
        value.dtype
    )


def to_odd_f32(x):
    """float64 to float32, to odd: only a later rounding to 22 bits or fewer counts."""
    value = x.astype(np.float32)
    low = np.float32(np.finfo(np.float32).max)
    value = np.where(np.isinf(value) & np.isfinite(x), np.copysign(low, value), value)
    return _to_odd(value, x - value, np.int32)


def _sum_to_odd(a, b):
    """a + b in float64 to odd."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    return _to_odd(total, error, np.int64)


_F32_TIE = np.int64(0x10000000)
_F32_TAIL = np.int64(0x1FFFFFFF)
_F32_TINY = np.float64(2.0**-126)


def fma_f32(a, b, c):
    """a * b + c, one rounding. The product is exact in float64; so is the sum to odd."""
    product = a.astype(np.float64) * b
    total = product + c
    # The plain sum rounds twice only where it lands on a tie of f32, or among its subnormals.
    risky = ((total.view(np.int64) & _F32_TAIL) == _F32_TIE) | (np.abs(total) < _F32_TINY)
    if risky.any():
        total = _sum_to_odd(product, c.astype(np.float64))
    return total.astype(np.float32)


def fma_f64(a, b, c):
    """a * b + c from sums and products without error; the last bit may be rounded twice."""
    product = a * b
    error = _product_error(a, b, product)
    total = product + c
    back = total - product
    error = error + ((product - (total - back)) + (c - back))
    better = total + error
    return np.where(np.isfinite(better), better, total)


def _product_error(a, b, product):
    """a * b - product by Veltkamp's and Dekker's splitting."""

    def halves(x):
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        return high, x - high

    (a1, a2), (b1, b2) = halves(a), halves(b)
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def flush(x):
    """Subnormal float32 to zero of its sign (`.ftz`)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def clip_unit(x):
    """`.sat`: into [0, 1], NaN to 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def unpack(x, kind):
    """A packed word's parts, low first."""
    half = x.dtype.itemsize // 2
    parts = np.ascontiguousarray(x).view(UNSIGNED[half]).reshape(-1, 2)
    return [np.ascontiguousarray(parts[:, k]).view(DTYPES[kind]) for k in (0, 1)]


def pack(parts):
    """Vectors of equal width, low first, as one vector of wider unsigned words."""
    width = parts[0].dtype.itemsize
    words = np.stack([p.view(UNSIGNED[width]) for p in parts], 1)
    return words.view(UNSIGNED[width * len(parts)])[:, 0]


# ---------------------------------------------------------------- float arithmetic


def _extreme(pick, zeros, nan):
    def of(*operands):
        result = operands[0]
        for x in operands[1:]:
            bits = UNSIGNED[x.dtype.itemsize]
            picked = pick(result, x)
            equal = result == x  # zeros of either sign: -0 is the smaller
            picked = np.where(equal, zeros(result.view(bits), x.view(bits)).view(x.dtype), picked)
            if nan:
                picked = np.where(np.isnan(result) | np.isnan(x), x.dtype.type(np.nan), picked)
            result = picked
        return result

    return of


MIN = _extreme(np.fmin, np.bitwise_or, False)
MAX = _extreme(np.fmax, np.bitwise_and, False)
MIN_NAN = _extreme(np.fmin, np.bitwise_or, True)
MAX_NAN = _extreme(np.fmax, np.bitwise_and, True)


def _in_f64(function):
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "rcp": _in_f64(lambda x: 1 / x),
    "sqrt": np.sqrt,
    "rsqrt": _in_f64(lambda x: 1 / np.sqrt(x)),
    "ex2": _in_f64(np.exp2),
    "lg2": _in_f64(np.log2),
    "sin": _in_f64(np.sin),
    "cos": _in_f64(np.cos),
    "tanh": _in_f64(np.tanh),
}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def _sign_bit(function):
    """neg and abs of a half type touch the sign only."""
    sign = np.uint16(0x8000)
    return (lambda x: x ^ sign) if function == "neg" else (lambda x: x & ~sign)


def float_function(opcode, modifiers, kind):
    """The function of an arithmetic instruction on floats, or None if there is none."""
    if kind in PACKED:
        one = float_function(opcode, modifiers, PACKED[kind])

        def of_packed(*operands):
            parts = zip(*(unpack(x, PACKED[kind]) for x in operands), strict=True)
            return pack([one(*part) for part in parts])

        return one and of_packed
    if "relu" in modifiers:
        return None
    function = _directed(opcode, modifiers, kind) or _plain_float_function(opcode, modifiers, kind)
    if function is None:
        return None
    if "ftz" in modifiers and kind == "f32":
        inner = function

        def function(*operands):
            return flush(inner(*map(flush, operands)))

    if "sat" in modifiers:
        unclipped = function

        def function(*operands):
            result = unclipped(*operands)
            if kind == "bf16":
                return narrow(clip_unit(widen(result, kind)), kind)
            return clip_unit(result)

    return function


def _directed(opcode, modifiers, kind):
    """f32 sums and products rounded towards zero, down or up; None for other instructions."""
    how = next((m for m in modifiers if m in ("rz", "rm", "rp")), None)
    if how is None:
        return None
    if kind != "f32" or opcode not in ("add", "sub", "mul", "fma"):
        raise NotImplementedError(f"{opcode}.{how}.{kind}")

    def of(a, b, c=None):
        a, b = a.astype(np.float64), b.astype(np.float64)
        if opcode in ("add", "sub"):
            return directed(_sum_to_odd(a, b if opcode == "add" else -b), how)
        return directed(a * b if c is None else _sum_to_odd(a * b, c.astype(np.float64)), how)

    return of


def directed(x, how):
    """float64 to float32 by rz, rm or rp; x exact, or rounded to odd."""
    y = x.astype(np.float32)
    towards = {"rz": np.float32(0), "rm": np.float32(-np.inf), "rp": np.float32(np.inf)}[how]
    wrong = {"rz": np.abs(y) > np.abs(x), "rm": y > x, "rp": y < x}[how] & np.isfinite(x)
    return np.where(wrong, np.nextafter(y, towards), y)


def _plain_float_function(opcode, modifiers, kind):
    if kind == "bf16" and opcode in ("neg", "abs"):
        return _sign_bit(opcode)
    if opcode in ("min", "max"):
        function = {"min": (MIN, MIN_NAN), "max": (MAX, MAX_NAN)}[opcode]["NaN" in modifiers]
        if "xorsign" in modifiers:
            of_magnitudes = function
            function = lambda a, b: np.copysign(  # noqa: E731
                of_magnitudes(np.abs(a), np.abs(b)),
                np.where(np.signbit(a) ^ np.signbit(b), a.dtype.type(-1), a.dtype.type(1)),
            )
    elif opcode in ("fma", "mad"):
        if kind == "f32":
            return fma_f32
        if kind == "f64":
            return fma_f64
        return lambda a, b, c: narrow(
            _sum_to_odd(widen(a, kind) * widen(b, kind), widen(c, kind)), kind
        )
    elif opcode in ("add", "sub") and kind in ("f16", "bf16"):
        sign = 1 if opcode == "add" else -1
        return lambda a, b: narrow(_sum_to_odd(widen(a, kind), sign * widen(b, kind)), kind)
    elif opcode == "copysign":  # of a on b
        function = lambda a, b: np.copysign(b, a)  # noqa: E731
    else:
        function = BINARY.get(opcode) or UNARY.get(opcode)
    if kind in ("f32", "f64") or function is None:
        return function
    return lambda *operands: narrow(function(*(widen(x, kind) for x in operands)), kind)


ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def compare(how, kind):
    """setp's comparison of two vectors of a type, or None."""
    if kind in PACKED:
        return None
    if kind in ("f16", "bf16"):
        inner = compare(how, "f64")
        return inner and (lambda a, b: inner(widen(a, kind), widen(b, kind)))
    if kind in FLOATS:
        if how == "num":
            return lambda a, b: ~(np.isnan(a) | np.isnan(b))
        if how == "nan":
            return lambda a, b: np.isnan(a) | np.isnan(b)
        if how == "ne":  # ordered: false with NaN, where NumPy says true
            return lambda a, b: (a < b) | (a > b)
        if how.endswith("u") and how[:-1] in ORDERED:
            ordered = compare(how[:-1], kind)
            return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return ORDERED.get(how)


# ---------------------------------------------------------------- conversions


def _round_integer(how):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how]


def convert(instruction):
    """The function of a `cvt`: one source, or two (high, low) for packed results. None: unknown."""
    modifiers = instruction.modifiers
    target, source = instruction.types[-2:]
    to_zero = "rz" in modifiers
    if any(m in ("rm", "rp", "rna", "satfinite", "relu") for m in modifiers):
        return None
    if (target, source) == ("f16x2", "e4m3x2"):
        return _from_float8
    if target in PACKED:
        if source != "f32" or to_zero:
            return None
        half = PACKED[target]
        one = round_bf16 if half == "bf16" else round_f16
        return lambda high, low: pack([one(low), one(high)])
    if source in FLOATS and target in FLOATS:
        return _float_to_float(modifiers, target, source, to_zero)
    if source in FLOATS:
        return _float_to_integer(modifiers, target, source)
    if target in FLOATS:
        if to_zero:
            return None
        if target in ("f32", "f64"):
            return lambda x: x.astype(DTYPES[target])
        if target == "f16" or DTYPES[source]().itemsize < 8:
            return lambda x: narrow(x.astype(np.float64), target)
        return None
    if "sat" in modifiers:
        limits = np.iinfo(DTYPES[target])
        own = np.iinfo(DTYPES[source])
        low, high = max(limits.min, own.min), min(limits.max, own.max)
        return lambda x: np.clip(x, low, high).astype(DTYPES[target])
    return lambda x: x.astype(DTYPES[target])


def _from_float8(x):
    """Two float8 (e4m3, without infinities) in a word of 16 bits as two f16, exactly."""
    parts = np.ascontiguousarray(x).view(ml_dtypes.float8_e4m3fn).reshape(-1, 2)
    return pack([round_f16(parts[:, k].astype(np.float32)) for k in (0, 1)])


def _float_to_float(modifiers, target, source, to_zero):
    steps = []
    if "ftz" in modifiers and source == "f32":
        steps.append(flush)
    steps.append(lambda x: widen(x, source))
    for m in modifiers:
        if m in ("rni", "rzi", "rmi", "rpi"):
            steps.append(_round_integer(m))
    if "sat" in modifiers:
        steps.append(clip_unit)
    if not to_zero:
        steps.append(lambda x: narrow(x, target))
    elif target == "f32":
        steps.append(lambda x: directed(x, "rz"))
    elif target == "bf16" and source == "f32":
        steps.append(lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    else:
        return None
    if "ftz" in modifiers and target == "f32":
        steps.append(flush)

    def chain(x):
        for step in steps:
            x = step(x)
        return x

    return chain


def _float_to_integer(modifiers, target, source):
    rounding = [m for m in modifiers if m in ("rni", "rzi", "rmi", "rpi")]
    if not rounding:
        return None
    rounded = _round_integer(rounding[0])
    limits = np.iinfo(DTYPES[target])
    wide = limits.bits == 64
    not_a_number = 1 << 63 if wide or source == "f64" else 0

    def to_integer(x):
        x = rounded(widen(flush(x) if "ftz" in modifiers else x, source))
        below, above, nan = x < limits.min, x >= float(limits.max) + wide * 0, np.isnan(x)
        inside = np.where(below | above | nan, 0, x).astype(DTYPES[target])
        result = np.where(below, DTYPES[target](limits.min), inside)
        result = np.where(above, DTYPES[target](limits.max), result)
        word = np.uint64(not_a_number).astype(UNSIGNED[limits.bits // 8]).view(DTYPES[target])
        return np.where(nan, word, result)

    return to_integer


# ---------------------------------------------------------------- integers and bits


def multiply_high(a, b):
    """The high half of the product, signed or not by dtype."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    cross = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (cross >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def divide(a, b):
    """Towards zero; by zero all ones, which PTX leaves open."""
    zero = b == 0
    quotient = _magnitude(a) // np.where(zero, 1, _magnitude(b)).astype(_magnitude(b).dtype)
    if a.dtype.kind == "i":
        quotient = np.where((a < 0) != (b < 0), -quotient.view(a.dtype), quotient.view(a.dtype))
    return np.where(zero, np.array(-1).astype(a.dtype), quotient)


def remainder(a, b):
    """a - b * divide(a, b)."""
    return a - b * divide(a, b)


def _magnitude(x):
    unsigned = UNSIGNED[x.dtype.itemsize]
    return np.abs(x).view(unsigned) if x.dtype.kind == "i" else x


def shift_left(a, b):
    bits = a.dtype.itemsize * 8
    moved = a << np.minimum(b, bits - 1).astype(a.dtype)
    return np.where(b >= bits, a.dtype.type(0), moved)


def shift_right(a, b):
    """Arithmetic for a signed dtype."""
    bits = a.dtype.itemsize * 8
    moved = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(b >= bits, a.dtype.type(0), moved)


def funnel(left, clamp):
    """shf: the 64 bits b:a shifted by c, the high (left) or low word of the result."""

    def shift(a, b, c):
        c = (np.minimum(c, 32) if clamp else c & np.uint32(31)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if left:
            return ((both << c) >> np.uint64(32)).astype(np.uint32)
        return (both >> c).astype(np.uint32)

    return shift


def extract_field(a, position, length):
    """bfe, signed or not by dtype."""
    bits = a.dtype.itemsize * 8
    wide = a.view(UNSIGNED[a.dtype.itemsize])
    position, length = position & np.uint32(255), length & np.uint32(255)
    field = shift_right(wide, position) & _low_ones(length, wide.dtype)
    if a.dtype.kind == "i":
        top = np.minimum(position + length - np.minimum(length, 1), bits - 1)
        negative = (shift_right(wide, top) & wide.dtype.type(1)).astype(bool) & (length > 0)
        kept = np.minimum(length, bits - np.minimum(position, bits)).astype(np.uint32)
        field = np.where(negative, field | ~_low_ones(kept, wide.dtype), field)
    return field.view(a.dtype)


def _low_ones(count, dtype):
    bits = dtype.itemsize * 8
    ones = np.full(count.shape, dtype.type(np.iinfo(dtype).max))
    return ~shift_left(ones, np.minimum(count, bits).astype(np.uint32))


def insert_field(a, b, position, length):
    """bfi: the low `length` bits of a into b at `position`."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = shift_left(_low_ones(length, a.dtype), position)
    return (b & ~mask) | (shift_left(a, position) & mask)


def logic3(table):
    """lop3: bit (4a + 2b + c) of the table, for each bit."""

    def apply(a, b, c):
        result = np.zeros_like(a)
        for k in range(8):
            if table >> k & 1:
                result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return apply


def permute(mode):
    """prmt: four bytes out of the eight of b:a, by selector c."""

    def apply(a, b, c):
        pool = np.stack([a, b], 1).view(np.uint8).astype(np.uint32)
        result = np.zeros_like(a)
        for k in range(4):
            if mode is None:
                nibble = (c >> np.uint32(4 * k)) & np.uint32(15)
            else:
                s = (c & np.uint32(3)).astype(np.int64)
                nibble = {
                    "f4e": s + k,
                    "b4e": (s - k) % 8,
                    "rc8": s,
                    "ecl": np.maximum(s, k),
                    "ecr": np.minimum(s, k),
                    "rc16": 2 * (s & 1) + k % 2,
                }[mode].astype(np.uint32)
            byte = np.take_along_axis(pool, (nibble & 7)[:, None].astype(np.int64), 1)[:, 0]
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            byte = np.where(nibble & 8, sign, byte)
            result |= byte << np.uint32(8 * k)
        return result

    return apply


def count_leading_zeros(a):
    bits = a.dtype.itemsize * 8
    result = np.full(a.shape, bits, np.uint32)
    for k in range(bits):
        result = np.where(a >> a.dtype.type(k) & a.dtype.type(1), np.uint32(bits - 1 - k), result)
    return result


def reverse_bits(a):
    bits = a.dtype.itemsize * 8
    one = a.dtype.type(1)
    result = np.zeros_like(a)
    for k in range(bits):
        result |= ((a >> a.dtype.type(k)) & one) << a.dtype.type(bits - 1 - k)
    return result


def count_ones(a):
    return np.bitwise_count(a).astype(np.uint32)


def find_highest(shift_amount):
    """bfind: the position of the most significant one (of the bit unlike the sign), or all ones."""

    def apply(a):
        bits = a.dtype.itemsize * 8
        wide = a.view(UNSIGNED[a.dtype.itemsize])
        if a.dtype.kind == "i":
            wide = np.where(a < 0, ~wide, wide)
        zeros = count_leading_zeros(wide)
        found = zeros if shift_amount else np.uint32(bits - 1) - zeros
        return np.where(wide == 0, np.uint32(0xFFFFFFFF), found)

    return apply


def saturated(function):
    """add.sat or sub.sat of s32."""
    return lambda a, b: np.clip(
        function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1
    ).astype(np.int32)


INTEGER = {
    "add": np.add, "sub": np.subtract, "div": divide, "rem": remainder, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not, "brev": reverse_bits,
    "popc": count_ones, "clz": count_leading_zeros, "bfi": insert_field,
}  # fmt: skip
