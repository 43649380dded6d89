"""Runs the GPU implementation on a CPU: its kernels' PTX goes through the emulator."""

import jax
import numpy as np
import pytest

from storm_kernels.selective_scan import triton_gpu


def launch(kernel, grid, warps, registers, operands, results, constants):
    """What `triton_gpu.launch` does, in the emulator."""
    from tests.kernels import ptx_launch

    names = [name for name in kernel.arg_names if name not in constants]

    def run(*arrays):
        # What a kernel leaves unwritten must not be read: NaN shows it.
        written = [np.full(x.shape, np.nan, x.dtype) for x in results]
        read = [np.array(x) for x in arrays]
        arguments = dict(zip(names, [*read, *written], strict=True))
        ptx_launch.launch(kernel, grid, arguments, constants, num_warps=warps)
        return tuple(written)

    return jax.pure_callback(run, tuple(results), *operands, vmap_method="sequential")


@pytest.fixture
def emulated_gpu(monkeypatch):
    """Makes `triton_gpu` serve calls here."""
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_gpu, "launch", launch)
    monkeypatch.setattr(triton_gpu, "unsupported", lambda call: None)
