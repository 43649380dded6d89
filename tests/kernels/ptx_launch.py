"""Compiles a Triton or Gluon kernel for its arguments and runs it in the PTX emulator."""

import numpy as np
from ml_dtypes import bfloat16

from tests.kernels.ptx_compile import compile_gluon
from tests.kernels.ptx_emulator import Window, run

_TYPES = {
    np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", np.dtype(bfloat16): "bf16",
    np.dtype(np.float64): "fp64", np.dtype(np.int8): "i8", np.dtype(np.int16): "i16",
    np.dtype(np.int32): "i32", np.dtype(np.int64): "i64", np.dtype(np.uint32): "u32",
}  # fmt: skip


def compile_for(kernel, arguments, constexprs, num_warps=4, target=90):
    """The kernel compiled for the types of its run-time arguments.

    Args:
        kernel: of `gluon.jit` or `triton.jit`.
        arguments: by parameter name: arrays, `Window`s, floats (fp32), ints (i32, or i64 if too
            large) and typed NumPy scalars.
        constexprs: by parameter name.
    """
    signature = {name: _type(value) for name, value in arguments.items()}
    return compile_gluon(kernel, signature, constexprs, num_warps, target)


def launch(kernel, grid, arguments, constexprs, num_warps=4, target=90, check_races=True):
    """`compile_for`, then `run` on `grid` CTAs (one to three numbers); arrays are changed in place.

    Returns the compiled kernel.
    """
    code = compile_for(kernel, arguments, constexprs, num_warps, target)
    values = [arguments[name] for name in kernel.arg_names if name in arguments]
    grid = (*grid, 1, 1)[:3]
    run(code.ptx, grid, code.num_threads, values, code.shared_bytes, check_races=check_races)
    return code


def _type(value):
    if isinstance(value, Window):
        return "*" + _TYPES[next(iter(value.pieces.values())).dtype]
    if isinstance(value, np.ndarray):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, np.generic):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
