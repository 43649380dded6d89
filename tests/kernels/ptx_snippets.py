"""Runs a few lines of hand-written PTX in the emulator."""

import numpy as np

from tests.kernels.ptx_emulator import run

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
WORDS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
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
    result = np.zeros(count, WORDS[out])
    for start in range(0, count, 1024):
        part = slice(start, min(start + 1024, count))
        piece = result[part].copy()
        threads(body, [x[part].copy() for x in padded] + [piece], len(piece))
        result[part] = piece
    return result[: len(inputs[0])]
