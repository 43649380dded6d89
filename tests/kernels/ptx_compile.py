"""Compiles Triton and Gluon kernels for a GPU that need not be there, and says what they use."""

import dataclasses
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel's PTX, and what ptxas made of it for one architecture."""

    name: str
    ptx: str
    cubin: bytes
    shared_bytes: int  # dynamic, of a CTA: what `ptx_emulator.run` wants
    num_threads: int  # of a CTA
    registers: int  # of a thread
    stack_bytes: int  # of a thread: spilled registers and arrays indexed at run time
    local_bytes: int  # of a thread, beyond the stack

    def sass(self) -> str:
        """The machine code, as nvdisasm writes it."""
        return _tool("nvdisasm", "-c", cubin=self.cubin)

    @property
    def spills(self) -> int:
        """Instructions that move between registers and local memory."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass()))


def compile_gluon(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int,
    target: int = 90,
    *,
    divisible_by_16: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> CompiledKernel:
    """Compiles a `gluon.jit` (or `triton.jit`) kernel.

    Args:
        fn: the decorated function.
        signature: Triton type of each run-time parameter, by name: "*bf16", "i32", "fp32", ...
        constexprs: value of each compile-time parameter, by name.
        num_warps: of a CTA.
        target: compute capability without its point: 80, 90, 100.
        divisible_by_16: integers known to be multiples of 16. Pointers always are, as jax-triton
            says of every array; it says so of no scalar.
        options: further options of Triton's compiler, such as {"maxnreg": 128}.
    """
    types = {}
    for name in fn.arg_names:
        if (name in signature) == (name in constexprs):
            raise ValueError(f"{name} must be either in signature or in constexprs")
        types[name] = signature.get(name, "constexpr")
    attributes = {
        (k,): [["tt.divisibility", 16]]
        for k, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in divisible_by_16
    }
    source_class = GluonASTSource if isinstance(fn, GluonJITFunction) else ASTSource
    source = source_class(fn, types, dict(constexprs), attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton 3.9 announces a new default in 3.10
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": num_warps, **(options or {})},
        )
    cubin = compiled.asm["cubin"]
    used = _tool("cuobjdump", "-res-usage", cubin=cubin)
    counts = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", used))
    required = re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])
    return CompiledKernel(
        name=compiled.metadata.name,
        ptx=compiled.asm["ptx"],
        cubin=cubin,
        shared_bytes=compiled.metadata.shared,
        num_threads=int(required[1]) if required else 32 * num_warps,
        registers=int(counts["REG"]),
        stack_bytes=int(counts["STACK"]),
        local_bytes=int(counts["LOCAL"]),
    )


def _tool(name, *arguments, cubin):
    """The output of one of the CUDA tools that Triton brings along."""
    program = os.path.join(os.path.dirname(nvidia.__file__), "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, *arguments, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout
