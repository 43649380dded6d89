"""Other projects' scans: mamba_ssm's CUDA kernel (PyTorch) and ejkernel (JAX), if installed.

Both run in the layout that they are written for, without transposes. What they do not fuse (the
softplus of ejkernel) is computed beside them and counted.

PyTorch is imported by name: nothing of this package needs it.
"""

import importlib
import importlib.util
import os
import time

import jax
import jax.numpy as jnp

from storm_kernels.ablation.operands import Operands, Setting
from storm_kernels.ablation.programs import Values
from storm_kernels.ablation.shapes import Shape

NAMES = ("mamba_ssm", "ejkernel")

_ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def missing(name: str, platform: str) -> str | None:
    """Why a peer cannot run here, None if it can."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    if name == "mamba_ssm":
        if platform != "gpu":
            return f"needs an NVIDIA GPU, and this is a {platform.upper()}"
        try:
            _mamba_ssm()
            torch = importlib.import_module("torch")
        except Exception as error:  # whatever a broken build raises
            return f"cannot be imported: {type(error).__name__}: {error}"
        if not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        if importlib.util.find_spec("selective_scan_cuda") is None:
            return (
                "installed without its CUDA kernel: MAMBA_KEEP_CUDA_BUILD=TRUE pip install "
                "mamba-ssm --no-build-isolation"
            )
        return None
    try:
        _ejkernel()
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------- ejkernel


def _ejkernel():
    # Its tuner tries to run programs while ours is being traced and falls back to these choices.
    os.environ.setdefault("EJKERNEL_AUTOTUNE_POLICY", "heuristics")
    return importlib.import_module("ejkernel.modules").state_space_v1


def ejkernel_unsupported(shape: Shape, setting: Setting) -> str | None:
    if shape.groups is not None:
        return "has no groups"
    if "segments" in setting.optional:
        return "has no segments"
    return "has no reverse direction" if setting.reverse else None


def ejkernel_scan(case: Operands, setting: Setting):
    """ejkernel's `state_space_v1`, TileLang on GPUs and XLA elsewhere; layout "bld"."""
    dt = case["delta"].astype(jnp.float32)
    if "delta_bias" in case:
        dt += case["delta_bias"]
    if setting.softplus:
        dt = jax.nn.softplus(dt)
    D = case.get("D", jnp.zeros(case["A"].shape[0]))
    y, h, _ = _ejkernel()(
        case["u"],
        case["A"],
        case["B"],
        case["C"],
        D,
        dt.astype(case["u"].dtype),
        case.get("z"),
        case.get("initial_state"),
        act_fn=jax.nn.silu if "z" in case else None,
    )
    return (y, h) if setting.final_state else y


# ------------------------------------------------------------------------------------ mamba_ssm


def _mamba_ssm():
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def mamba_ssm_unsupported(shape: Shape, setting: Setting) -> str | None:
    if "state" in setting.optional:
        return "has no initial state"
    if "segments" in setting.optional:
        return "has no segments"
    return "has no reverse direction" if setting.reverse else None


class TorchProgram:
    """One direction of mamba_ssm's scan on the operands of a case, shared with JAX where it can.

    The backward is `torch.autograd.grad` on a graph made once; times are CUDA events around
    queued calls (wall time on a CPU).
    """

    def __init__(self, case: Operands, setting: Setting, given: Values, direction: str):
        self.torch = importlib.import_module("torch")
        self.direction = direction
        self.softplus = setting.softplus
        self.saved_bytes: int | None = None
        tensors = {name: self._from_jax(x) for name, x in case.items()}
        for name in ("B", "C"):  # to [batch, (groups,) state, length]
            tensors[name] = tensors[name].movedim(1, -1).contiguous()
        gradients = direction != "forward"
        self.tensors = {n: x.detach().requires_grad_(gradients) for n, x in tensors.items()}
        self.given = self._from_jax(given["y"])
        if direction == "backward":
            self.result = self._forward_counting()

    def seconds(self, calls: int) -> float:
        if not self.given.is_cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                self._call(self.given)
            return (time.perf_counter() - begin) / calls
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            self._call(self.given)
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def memory(self) -> dict[str, int]:
        if not self.given.is_cuda:
            return {}
        cuda = self.torch.cuda
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        self._call(self.given)
        cuda.synchronize()
        return {"peak": cuda.max_memory_allocated() - before}

    def values(self, given: Values | None = None) -> Values:
        result = self._call(self.given if given is None else self._from_jax(given["y"]))
        if self.direction == "forward":
            return {"y": jnp.from_dlpack(result.detach())}
        gradients = dict(zip(self._names(), result, strict=True))
        for name in ("B", "C"):
            gradients[name] = gradients[name].movedim(-1, 1)
        return {n: jnp.from_dlpack(x.contiguous()) for n, x in gradients.items()}

    def _call(self, given):
        if self.direction == "forward":
            with self.torch.no_grad():
                return self._forward()
        if self.direction == "both":
            return self._gradients(self._forward(), given)
        return self._gradients(self.result, given)

    def _forward(self):
        first = [self.tensors.get(name) for name in _ORDER]
        return _mamba_ssm()(*first, delta_softplus=self.softplus)

    def _gradients(self, result, given):
        leaves = [self.tensors[name] for name in self._names()]
        return self.torch.autograd.grad(result, leaves, given, retain_graph=True)

    def _names(self) -> list[str]:
        return [name for name in _ORDER if name in self.tensors]

    def _forward_counting(self):
        """Runs the forward and counts what it saves that is not an operand."""
        operands = {x.data_ptr() for x in self.tensors.values()}
        saved = {}

        def pack(x):
            if x.data_ptr() not in operands:
                saved[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with self.torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = self._forward()
        self.saved_bytes = sum(saved.values())
        return result

    def _from_jax(self, x: jax.Array):
        return self.torch.from_dlpack(x)
