"""The training step of a config, compiled for a topology; nothing is allocated or run."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from storm_jax.aot.topology import Topology
from storm_jax.config import RunConfig
from storm_jax.data.packing import Limits, empty_row
from storm_jax.models.storm import StormModel
from storm_jax.parallel import sharding
from storm_jax.parallel.checks import check_batch, check_divisible
from storm_jax.parallel.mesh import make_mesh
from storm_jax.training.optim import make_optimizer, trainable_parts
from storm_jax.training.state import TrainState, abstract_state
from storm_jax.training.step import make_train_step

# XLA chooses among its own matrix kernels by timing them on the GPU. There is none here, so matrix
# products go to cuBLAS; memory and collectives are the same.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}}


@dataclass(frozen=True)
class Step:
    """The training step that `storm_jax.train` would run, and what it is called with.

    Attributes:
      traced: of `jax.jit`, the state donated.
      state, batch: shapes, dtypes and shardings.
      parts: the parts that train.
    """

    mesh: jax.sharding.Mesh
    traced: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """A program that the compiler accepted.

    Attributes:
      text: optimised HLO of one device.
      argument_bytes, output_bytes, alias_bytes, temporary_bytes, code_bytes: of one device; alias
        are outputs that take the place of donated arguments.
      flops: XLA's own count, loop bodies once.
      seconds: lowering and compiling.
    """

    text: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    flops: float
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Memory of a device while the program runs."""
        outputs = self.output_bytes - self.alias_bytes
        return self.argument_bytes + outputs + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class OutOfMemory:
    """A program that the compiler refused because a device's memory is too small.

    Attributes:
      needed_bytes: what it says that it needs, of `counted`.
      counted: "temporaries" or "everything".
      message: the compiler's first lines.
    """

    needed_bytes: int
    counted: str
    message: str
    seconds: float


def trace_step(config: RunConfig, topology: Topology) -> Step:
    """Traces the step on a mesh of the topology's devices.

    Raises:
      ConfigError: the mesh does not multiply to the devices, or does not divide the batch or the
        model.
    """
    mesh = make_mesh(_with_slices(config, topology).mesh, list(topology.devices))
    check_batch(config, mesh)
    check_divisible(config, mesh)
    model = StormModel(config.model)
    parts = trainable_parts(config.train.optimizer)
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    state = abstract_state(model, optimizer, parts, mesh)
    batch = abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(model, optimizer, config.train), donate_argnums=0)
        return Step(mesh, step.trace(state, batch), state, batch, parts)


def abstract_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch, as `storm_jax.train` places it."""
    row = empty_row(config.model, Limits(config.data.sequence_length, config.data.row_frames))
    batch = {}
    for name, x in row.items():
        shape = (config.train.batch, *x.shape)
        layout = sharding.of_batch(name, shape, mesh)
        batch[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=layout)
    return batch


def compile_step(step: Step, topology: Topology) -> Compiled | OutOfMemory:
    """Compiles for the topology's devices."""
    began = time.perf_counter()
    with jax.set_mesh(step.mesh):
        lowered = step.traced.lower(lowering_platforms=(topology.platform,))
        try:
            compiled = lowered.compile(compiler_options=_OPTIONS.get(topology.platform))
        except jax.errors.JaxRuntimeError as error:
            refused = out_of_memory(str(error), time.perf_counter() - began)
            if refused is None:
                raise
            return refused
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return Compiled(
        text=compiled.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        # On a CPU or GPU the code is not in the memory that is counted here.
        code_bytes=memory.generated_code_size_in_bytes if topology.platform == "tpu" else 0,
        flops=float(cost.get("flops", 0.0)),
        seconds=seconds,
    )


def out_of_memory(message: str, seconds: float = 0.0) -> OutOfMemory | None:
    """Reads a compiler's refusal; None: the message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    forms = (
        (r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", "temporaries"),
        (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", "everything"),
        (r"[Tt]otal hbm usage >= ([\d.]+)([KMGT]?)", "everything"),
    )
    for pattern, counted in forms:
        match = re.search(pattern, message)
        if match:
            needed = float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")
            return OutOfMemory(int(needed), counted, message[:500], seconds)
    return None


def _with_slices(config: RunConfig, topology: Topology) -> RunConfig:
    """The mesh is told of TPU slices. Of hosts with GPUs the config says how many are one."""
    if topology.chip.is_gpu:
        return config
    mesh = dataclasses.replace(config.mesh, slices=topology.slices)
    return dataclasses.replace(config, mesh=mesh)
