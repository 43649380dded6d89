"""Runs the GPU implementation on a CPU: its kernels' PTX goes through the emulator.

What is replaced is `jax_triton.triton_call` and nothing of ours, so kernels, arguments, constants
and compiler options are those of production.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from storm_kernels import triton_launch
from storm_kernels.selective_scan import triton_gpu

_TYPES = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float8_e4m3fn": "*fp8e4nv",
    "int8": "*i8", "int32": "*i32",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch of a kernel was given; arrays by name, their shapes and dtypes alone."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    options: dict[str, Any]  # of the compiler
    operands: dict[str, jax.ShapeDtypeStruct]
    results: dict[str, jax.ShapeDtypeStruct]
    zeroed: tuple[int, ...]  # numbers of the results that are zero at the start
    aliases: dict[int, int]  # from numbers of operands that are written to those of results
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compiled(self, target: int = 90):
        """A `ptx_compile.CompiledKernel` for a compute capability, compiled once in a process."""
        arrays = {**self.operands, **self.results}
        return _compiled(
            self.kernel,
            tuple((name, _TYPES[np.dtype(x.dtype).name]) for name, x in arrays.items()),
            tuple(self.constants.items()),
            tuple(self.options.items()),
            self.warps,
            target,
        )


@functools.cache
def _compiled(kernel, signature, constants, options, warps, target):
    from tests.kernels.ptx_compile import compile_gluon

    return compile_gluon(
        kernel, dict(signature), dict(constants), warps, target, options=dict(options)
    )


def _launch(
    operands, kernel, out_type, grid, num_warps, name, backend_options, zeroed_outputs,
    input_output_aliases, **constants
):  # fmt: skip
    """The arguments of `jax_triton.triton_call`, sorted."""
    assert name == kernel.__name__
    names = [name for name in kernel.arg_names if name not in constants]
    given, wanted = (
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs] for xs in (operands, out_type)
    )
    named = dict(zip(names, given, strict=False))
    # A result that is an operand has its name and is no parameter of its own.
    number_of = {result: operand for operand, result in input_output_aliases.items()}
    assert all(given[x] == wanted[y] for y, x in number_of.items()), "an alias of another type"
    own = iter(names[len(given) :])
    results = {
        names[number_of[y]] if y in number_of else next(own): x for y, x in enumerate(wanted)
    }
    assert next(own, None) is None, "a parameter without an argument"
    return Launch(
        kernel, tuple(grid), num_warps, dict(backend_options), named, results, zeroed_outputs,
        dict(input_output_aliases), constants,
    )  # fmt: skip


def triton_call(*operands, **arguments):
    """What `jax_triton.triton_call` does, in the emulator."""
    launch = _launch(operands, **arguments)

    def run(*arrays):
        from tests.kernels import ptx_emulator

        code = launch.compiled()
        before = [np.asarray(x) for x in arrays]
        read = [x.copy() for x in before]
        number_of = {result: operand for operand, result in launch.aliases.items()}
        # What a kernel leaves unwritten must not be used: NaN shows it.
        results = [
            read[number_of[k]]
            if k in number_of
            else np.full(
                x.shape, 0 if k in launch.zeroed or x.dtype == np.int32 else np.nan, x.dtype
            )
            for k, x in enumerate(launch.results.values())
        ]
        written = [x for k, x in enumerate(results) if k not in number_of]
        grid = (*launch.grid, 1, 1)[:3]
        # A program that waits for another spins: the other must have run before.
        together = {"batch_threads": code.num_threads} if launch.zeroed else {}
        ptx_emulator.run(
            code.ptx, grid, code.num_threads, [*read, *written], code.shared_bytes, **together
        )
        for k, (x, y) in enumerate(zip(before, read, strict=True)):
            unchanged = k in launch.aliases or x.tobytes() == y.tobytes()
            assert unchanged, f"{launch.name} wrote to an operand"
        return tuple(results)

    return jax.pure_callback(
        run, tuple(launch.results.values()), *operands, vmap_method="sequential"
    )


@pytest.fixture
def emulated_gpu(monkeypatch):
    """Makes `triton_gpu` serve calls on a CPU."""
    pytest.importorskip("triton")
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU runs the same tests itself")
    monkeypatch.setattr(triton_launch, "_triton_call", lambda: triton_call)
    monkeypatch.setattr(triton_gpu, "unsupported", lambda call: None)


@contextlib.contextmanager
def recorded_launches():
    """Makes `triton_gpu` serve calls that are traced only; yields the list of their launches.

    In a jaxpr a launch is one equation, a `pure_callback` of the kernel's operands and results.
    """
    launches = []

    def call(*operands, **arguments):
        launch = _launch(operands, **arguments)
        launches.append(launch)

        def never(*_):
            raise AssertionError(f"{launch.name} was recorded and is not there to run")

        return jax.pure_callback(never, tuple(launch.results.values()), *operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "_triton_call", lambda: call)
        patch.setattr(triton_gpu, "unsupported", lambda call: None)
        yield launches
