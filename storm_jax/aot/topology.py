"""The devices that a program is compiled for: TPU pods by libtpu, GPUs by XLA's CUDA compiler.

No such device is needed. libtpu compiles for any TPU, and JAX's CUDA plug-in for a GPU that is
described to it. Without the plug-in, simulated CPU devices stand in: layouts and collectives are
the same, temporaries are not.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from storm_jax.chips import CHIPS, Chip, chip_named
from storm_jax.config import ConfigError

# Share of a GPU's memory that a run can use: the rest is CUDA's, NCCL's and the libraries'.
_GPU_SHARE = 0.92


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as asked for, "v5p:8x8x8".
      chip: of every device.
      slices: TPU slices, or hosts of GPUs, joined by the network.
      sizes: of a slice's torus; for GPUs, of a host.
      devices: JAX devices that can be compiled for.
      platform: what to lower for.
      compiler: whose numbers these are.
      available_bytes: memory of a device that a program may use.
    """

    name: str
    chip: Chip
    slices: int
    sizes: tuple[int, ...]
    devices: Sequence[Any]
    platform: Literal["tpu", "cuda", "cpu"]
    compiler: str
    available_bytes: int

    def slice_of(self, device: Any) -> int:
        """The slice of a TPU, the host of a GPU."""
        if self.platform == "tpu":
            return getattr(device, "slice_index", None) or 0
        return device.id // self.sizes[0]


def describe(name: str, slices: int = 1) -> Topology:
    """Devices of a topology.

    Args:
      name: chip and sizes: "v5p:8x8x8", "v5e:16x16"; for GPUs those of a host and the hosts,
        "h100:8", "h200:8x4".
      slices: TPU slices of this topology.

    Raises:
      ConfigError: a name, chip or size that is not known, with those that are; or the compiler is
        not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    chip = chip_named(match[1]) if match else None
    if match is None or chip is None:
        raise ConfigError(
            f"--topology={name!r} is not understood: write CHIP:SIZES, CHIP one of"
            f" {', '.join(c.name for c in CHIPS)}, for example v5p:8x8x8 or h100:8x4 (8 GPUs a"
            " host, 4 hosts)"
        )
    sizes = tuple(int(size) for size in match[2].split("x"))
    if slices < 1:
        raise ConfigError(f"--slices={slices} is below 1")
    return _gpus(name, chip, sizes, slices) if chip.is_gpu else _tpus(name, chip, sizes, slices)


# -------------------------------------------------------------------------------------------- TPU


def _tpus(name: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler, libtpu, on any machine:"
            " pip install 'storm_jax[tpu]'"
        )
    try:
        devices = _tpu_devices(name, slices)
    except Exception as error:  # of several kinds, by JAX version
        raise ConfigError(
            f"--topology={name}: libtpu does not know it ({str(error).splitlines()[0]}). It knows,"
            f" among others, {', '.join(known_tpus(chip))}; and of other chips"
            f" {', '.join(t for c in CHIPS if c.pod and c != chip for t in known_tpus(c)[-1:])}"
        ) from error
    if len(devices) > chip.pod * slices:
        raise ConfigError(
            f"--topology={name} has {len(devices) // slices} chips, but the largest slice of"
            f" {chip.name} has {chip.pod}; give a smaller one and --slices=N"
        )
    sizes = tuple(max(d.coords[axis] for d in devices) + 1 for axis in range(chip.torus))
    return Topology(
        name=name,
        chip=chip,
        slices=slices,
        sizes=sizes,
        devices=devices,
        platform="tpu",
        compiler="libtpu",
        available_bytes=_tpu_memory(devices[0]) or chip.hbm_bytes,
    )


def _tpu_devices(name: str, slices: int) -> Sequence[Any]:
    # Else libtpu asks Google Cloud's metadata server who it is, and takes a lock for itself.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one JAX device a chip, as on a real v4
    if slices > 1:
        options["num_slices"] = slices
    with _quiet():
        return topologies.get_topology_desc(name, platform="tpu", **options).devices


def known_tpus(chip: Chip) -> list[str]:
    """Slices of a chip, small ones first, that this libtpu describes."""
    if chip.torus == 2:
        sides = [(a, b) for a in (2, 4, 8, 16) for b in (a, 2 * a) if b <= 16]
    else:
        sides = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
        sides += [(4 * a, 4 * b, 4 * c) for a, b, c in ((1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2))]
        sides += [(8, 8, 16), (8, 16, 16), (16, 16, 16)]
    found = []
    for side in sides:
        name = f"{chip.name}:{'x'.join(map(str, side))}"
        try:
            _tpu_devices(name, 1)
        except Exception:  # not this one: the next
            continue
        found.append(name)
    return found


def _tpu_memory(device: Any) -> int | None:
    """Memory that the compiler gives a program: it says so when refusing one that is too large."""
    whole = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((1 << 18, 1 << 20), jnp.float32, sharding=whole)
    lowered = jax.jit(lambda x: x.T @ x).trace(x).lower(lowering_platforms=("tpu",))
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        return int(float(match[1]) * 2**30) if match else None
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what libtpu's C++ code prints when it is loaded on a machine that is not a TPU host."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


# -------------------------------------------------------------------------------------------- GPU


def _gpus(name: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Topology:
    if len(sizes) > 2 or slices > 1:
        raise ConfigError(
            f"--topology={name} --slices={slices}: GPUs are given as GPUS_A_HOST or"
            f" GPUS_A_HOSTxHOSTS, such as {chip.name}:8x4, and have no slices"
        )
    per_host, hosts = sizes if len(sizes) == 2 else (sizes[0], 1)
    if not 1 <= per_host <= chip.host or hosts < 1:
        raise ConfigError(
            f"--topology={name}: a host has 1 to {chip.host} {chip.name}, for example"
            f" {chip.name}:{chip.host}x{hosts or 1}"
        )
    devices, platform = _cuda_devices(chip, per_host, hosts), "cuda"
    if devices is None:
        devices, platform = _simulated(per_host * hosts), "cpu"
    return Topology(
        name=name,
        chip=chip,
        slices=hosts,
        sizes=(per_host,),
        devices=devices,
        platform=platform,
        compiler="XLA for CUDA" if platform == "cuda" else "XLA for CPU, simulated devices",
        available_bytes=int(_GPU_SHARE * chip.hbm_bytes),
    )


def _cuda_devices(chip: Chip, per_host: int, hosts: int) -> Sequence[Any] | None:
    """Described GPUs, or None: the plug-in is not installed."""
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (13, 12)):
        return None
    with _quiet():
        described = topologies.get_topology_desc(
            f"1x{hosts}x{per_host}",
            platform="cuda",
            target_config=_target(chip),
            topology=f"1x{hosts}x{per_host}",
        )
    return described.devices


def _target(chip: Chip) -> str:
    """A GPU as XLA wants it described: a GpuTargetConfigProto in text form.

    Limits of a block and an SM are those of the CUDA programming guide's table of compute
    capabilities 8.0 (A100) and 9.0 (H100, H200).
    """
    hopper = chip.name != "a100"
    shared = 233472 if hopper else 167936  # 228 and 164 KiB
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {9 if hopper else 8} }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared - 1024}
  shared_memory_per_core: {shared}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {chip.cores}
  fpus_per_core: {128 if hopper else 64}
  clock_rate_ghz: {1.98 if hopper else 1.41}
  l2_cache_size: {50 * 2**20 if hopper else 40 * 2**20}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  device_memory_size: {chip.hbm_bytes}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kinds[0]}"
"""


def _simulated(count: int) -> Sequence[Any]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started: what it has must do
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"{count} simulated CPU devices are needed, but JAX has started with {len(devices)}"
        )
    return devices[:count]
