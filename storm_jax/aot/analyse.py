"""From a config and a topology to a `Report`: what the step needs, and what time it can take."""

import importlib.metadata
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from storm_jax.aot import hlo
from storm_jax.aot.collectives import Collective, collectives, table
from storm_jax.aot.memory import Memory, Whole, memory_of, whole_parameters
from storm_jax.aot.program import Compiled, Step, compile_step, trace_step
from storm_jax.aot.roofline import Roofline, exchange_bytes, roofline
from storm_jax.aot.topology import Topology
from storm_jax.aot.work import device_work
from storm_jax.config import RunConfig
from storm_jax.flops import Work, training_flops
from storm_jax.models.storm import count_parameters


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes in a step.

    Attributes:
      bytes: that a device receives, all together.
      network_bytes: of these, what comes from other slices or hosts; the rest passes the links
        inside a slice (ICI) or a host.
    """

    axes: str
    kind: str
    executions: float
    bytes: float
    network_bytes: float


@dataclass(frozen=True)
class Speed:
    """What a step can reach, full rows: with everything overlapped, and with nothing.

    MFU is model FLOPs / (step seconds x peak x devices); model FLOPs leave out recomputation.
    """

    step_seconds: tuple[float, float]
    tokens_per_second: tuple[float, float]
    frames_per_second: tuple[float, float]
    mfu: tuple[float, float]


@dataclass(frozen=True)
class Counted:
    """What only a compiled program tells.

    Attributes:
      matmul_flops: of a device, loops counted as often as they run, recomputation included.
      xla_flops: `cost_analysis` of XLA, every loop body once.
      hbm_bytes: of a device.
      silent_kernels: kernels that state no FLOPs, and executions.
      unknown_loops: loops whose trip count could not be read or depends on the data, counted once.
    """

    matmul_flops: float
    xla_flops: float
    hbm_bytes: float
    silent_kernels: dict[str, float]
    unknown_loops: tuple[str, ...]
    traffic: tuple[Traffic, ...]
    roofline: Roofline
    binds: str
    speed: Speed


@dataclass(frozen=True)
class Report:
    """Everything that the command prints; `counted` is None where the step does not fit.

    Attributes:
      model_flops: of a device and step, from `storm_jax.flops`.
      whole: parameters of at least 1 % of a device's that a splitting axis leaves whole.
    """

    config: str
    topology: str
    slices: int
    chip: str
    devices: int
    compiler: str
    versions: dict[str, str]
    mesh: dict[str, int]
    batch: int
    accumulation: int
    remat: dict[str, Any]
    parameters: dict[str, int]
    memory: Memory
    fits: bool
    whole: tuple[Whole, ...]
    model_flops: float
    compile_seconds: float
    counted: Counted | None

    def to_json(self) -> dict:
        return asdict(self)


def analyse(config: RunConfig, topology: Topology) -> Report:
    """Compiles the training step and reads everything off it.

    Raises:
      ConfigError: the mesh or the batch does not fit the devices.
    """
    step = trace_step(config, topology)
    result = compile_step(step, topology)
    memory = memory_of(step, result, topology.available_bytes)
    devices = step.mesh.size
    work = Work.full(config.data, config.model, config.train.batch)
    model_flops = training_flops(config.model, work, step.parts) / devices
    least = sum(memory.parameters.values()) / 100
    counted = None
    if isinstance(result, Compiled):
        counted = _count(step, result, topology, work, model_flops)
    return Report(
        config=config.name,
        topology=topology.name,
        slices=topology.slices,
        chip=topology.chip.name,
        devices=devices,
        compiler=topology.compiler,
        versions=_versions(topology),
        mesh=dict(step.mesh.shape),
        batch=config.train.batch,
        accumulation=config.train.accumulation,
        remat=asdict(config.train.remat),
        parameters={part: count_parameters(tree) for part, tree in step.state.params.items()},
        memory=memory,
        fits=memory.fits,
        whole=tuple(whole for whole in whole_parameters(step) if whole.bytes >= least),
        model_flops=model_flops,
        compile_seconds=result.seconds,
        counted=counted,
    )


def _count(
    step: Step, result: Compiled, topology: Topology, work: Work, model_flops: float
) -> Counted:
    program = hlo.parse(result.text)
    own = device_work(program)
    found = collectives(program, step.mesh)
    # Kernels that state no FLOPs hide some: there are never less than those of the model.
    products = replace(own, flops=max(own.flops, model_flops))
    times = roofline(products, found, topology, step.mesh)
    return Counted(
        matmul_flops=own.flops,
        xla_flops=result.flops,
        hbm_bytes=own.hbm_bytes,
        silent_kernels=own.silent_kernels,
        unknown_loops=program.unknown_loops,
        traffic=_traffic(found, topology, step.mesh),
        roofline=times,
        binds=times.binds,
        speed=speed(times, work, model_flops, topology.chip.peak_flops),
    )


def _traffic(
    found: list[Collective], topology: Topology, mesh: jax.sharding.Mesh
) -> tuple[Traffic, ...]:
    outside: dict[tuple[str, str], float] = {}
    for c in found:
        key = ("+".join(c.axes), c.kind)
        outside[key] = outside.get(key, 0.0) + c.times * exchange_bytes(c, topology, mesh)[1]
    return tuple(
        Traffic(*key, executions, received, outside[key])
        for key, (executions, received) in table(found).items()
    )


def speed(times: Roofline, work: Work, model_flops: float, peak: float) -> Speed:
    """Both bounds of what a step of these times reaches.

    Args:
      model_flops: of one device and step.
      peak: FLOP/s of one device.
    """
    low, high = times.fastest, times.slowest
    return Speed(
        step_seconds=(low, high),
        tokens_per_second=(work.tokens / low, work.tokens / high),
        frames_per_second=(work.frames / low, work.frames / high),
        mfu=(model_flops / (low * peak), model_flops / (high * peak)),
    )


def _versions(topology: Topology) -> dict[str, str]:
    names = ["jax", "jaxlib"] + (["libtpu"] if topology.platform == "tpu" else [])
    return {name: importlib.metadata.version(name) for name in names}
