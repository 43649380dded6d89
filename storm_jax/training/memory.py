"""Out of memory on a device: what was asked for, what was there, what would help."""

import contextlib
from collections.abc import Iterator

import jax

from storm_jax.config import RunConfig

# XLA's status code, and what its CPU client says under another one.
SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory")


class OutOfMemory(RuntimeError):
    """XLA could not allocate, with the remedies that this configuration has left."""


@contextlib.contextmanager
def explained(doing: str, config: RunConfig, activations: bool = True) -> Iterator[None]:
    """Turns XLA's errors about memory into `OutOfMemory`.

    Args:
      doing: completes "out of memory while".
      activations: there are any, besides parameters and moments.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Some platforms raise ValueError for a program that is too large to compile.
        if not any(sign in str(error) for sign in SIGNS):
            raise
        raise OutOfMemory(message(doing, str(error), config, activations)) from error


def message(doing: str, error: str, config: RunConfig, activations: bool) -> str:
    """What XLA said, the state of the devices, and what to change."""
    start = min(error.index(sign) for sign in SIGNS if sign in error)
    said = error[start:].split("\n\n")[0][:600].strip()
    lines = [f"out of memory while {doing}: {said}"]
    for device in jax.local_devices():
        stats = device.memory_stats()  # None where the platform does not count
        if stats and "bytes_limit" in stats:
            lines.append(
                f"  {device.device_kind} {device.id}: {_gib(stats['bytes_in_use'])} in use, at most"
                f" {_gib(stats['peak_bytes_in_use'])} so far, of {_gib(stats['bytes_limit'])}"
            )
            break  # they are alike
    lines.append("what would help, in this order:")
    lines += [f"  {remedy}" for remedy in remedies(config, activations)]
    return "\n".join(lines)


def remedies(config: RunConfig, activations: bool) -> list[str]:
    """Changes that save memory; those that leave the result of training as it is come first."""
    train, found = config.train, []
    rows = train.batch // train.accumulation
    if activations and rows > 1:
        found.append(
            f"train.accumulation={2 * train.accumulation}: microbatches of {max(1, rows // 2)} rows"
            f" in place of {rows}; more where the mesh allows"
        )
    for part in ("decoder", "vit", "temporal"):
        policy = getattr(train.remat, part).policy
        if activations and policy != "full":
            found.append(f"train.remat.{part}.policy=full in place of {policy}")
    if activations and not train.remat.vit_calls:
        found.append("train.remat.vit_calls=True")
    frames = config.model.vit.frames_per_call or config.data.row_frames
    if activations and frames > 1:
        found.append(f"model.vit.frames_per_call={frames // 2} in place of {frames}")
    found.append(
        f"mesh.fsdp (now {config.mesh.fsdp}): more devices to hold parameters, gradients and"
        " moments; then mesh.tensor"
    )
    if activations:
        found.append(
            f"shorter rows: data.sequence_length={config.data.sequence_length},"
            f" data.row_frames={config.data.row_frames}"
        )
    if train.optimizer.kind == "adamw":
        if train.optimizer.first_moment == "float32":
            found.append("train.optimizer.first_moment=bfloat16")
        found.append("train.optimizer.kind=adafactor: next to no moments, another optimizer")
    found.append("python -m storm_jax.compile with this --config says which part takes how much")
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
