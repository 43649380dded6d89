"""Calls Gluon kernels from JAX, through jax-triton."""

import functools
import importlib.util
from collections.abc import Callable

import jax
from jax import lax

from storm_kernels.platforms import varying_axes


def not_installed() -> str | None:
    """Why no kernel can be compiled here, or None if one can."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed (pip install 'storm_jax[cuda]', Python 3.12 or newer)"
    return None


def device_unsupported(serves: Callable[[float], bool], wanted: str) -> str | None:
    """Why a kernel does not run on the GPUs of this process, or None if it does.

    Args:
      serves: whether it is for a compute capability, such as 9.0.
      wanted: which these are.
    """
    if (reason := not_installed()) is not None:
        return reason
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return "this process has no GPU"
    there = device.compute_capability
    return None if serves(float(there)) else f"it is for compute capability {wanted}, not {there}"


@functools.cache
def _triton_call() -> Callable:
    """`jax_triton.triton_call`, with Triton's own passes for Gluon kernels.

    jax-triton 0.4.1 sends every kernel through the passes for Triton's IR, which replace the
    layouts that a Gluon kernel states: here 128 conversions through shared memory in the innermost
    loop and twice the time (measured).
    """
    import jax_triton  # pyrefly: ignore[missing-import]
    from jax_triton import triton_lib  # pyrefly: ignore[missing-import]
    from triton.backends.nvidia.compiler import CUDABackend

    class GluonBackend(CUDABackend):
        def make_ttir(self, mod, *_):  # pyrefly: ignore[bad-override]
            return mod

        def make_ttgir(self, mod, metadata, options, capability):  # pyrefly: ignore[bad-override]
            return self.gluon_to_ttgir(mod, metadata, options, capability)

    compile_any = triton_lib.compile_ttir_inplace

    def compile_with_its_passes(module, backend, options, target):
        # Only Gluon's modules know their number of warps before any pass has run.
        if isinstance(backend, CUDABackend) and module.get_int_attr("ttg.num-warps") is not None:
            backend = GluonBackend(backend.target)
        return compile_any(module, backend, options, target)

    triton_lib.compile_ttir_inplace = compile_with_its_passes
    return jax_triton.triton_call


def launch(
    kernel, grid, warps: int, registers: int | None, operands, results, constants: dict,
    zeroed: tuple[int, ...] = (), aliases: dict[int, int] | None = None,
):  # fmt: skip
    """Calls a Gluon kernel through jax-triton.

    Args:
        kernel: its parameters are the operands, the results that are no operands, then the
            constants.
        grid: programs along each axis.
        warps: of a program.
        registers: the most that a thread may use; None leaves it to the compiler.
        operands: arrays.
        results: shapes and dtypes of what the kernel writes.
        constants: compile-time parameters by name.
        zeroed: numbers of the results that are zero before the kernel runs.
        aliases: numbers of operands that the kernel writes to, and of the results that they become.

    Returns:
        The results, varying over the manual mesh axes of the operands.
    """
    options: dict = {"enable_fp_fusion": True}
    if registers is not None:
        options["maxnreg"] = registers
    out = _triton_call()(
        *operands,
        kernel=kernel,
        out_type=results,
        grid=grid,
        num_warps=warps,
        name=kernel.__name__,
        backend_options=options,
        zeroed_outputs=zeroed,
        input_output_aliases=aliases or {},
        **constants,
    )
    axes = frozenset().union(*(varying_axes(x) for x in operands))
    if not axes:
        return out
    return tuple(lax.pcast(x, tuple(sorted(axes)), to="varying") for x in out)
