"""Which meshes and recomputation policies fit, fastest first."""

import math
from collections.abc import Callable, Sequence

from storm_jax.aot.isolated import Outcome, outcomes
from storm_jax.aot.text import gib
from storm_jax.aot.variants import Variant, mesh_variants, remat_variants, smaller_variants
from storm_jax.config import RunConfig

_BEST = 3  # meshes that are tried with the other policies


def sweep(
    config: RunConfig,
    topology: str,
    slices: int,
    devices: int,
    *,
    limit: int,
    workers: int,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Tries all meshes with the config's policy, then the other policies on the best meshes.

    Args:
      limit: meshes that are tried at most; those that split rows least come first.
      workers: processes at a time; each takes several GiB of this host.
      say: is told of every result.

    Returns:
      All outcomes: those that fit, fastest first, then by memory, then failures.
    """
    meshes = mesh_variants(config, devices, slices)
    if len(meshes) > limit:
        say(f"{len(meshes)} meshes, of which {limit} are tried (--sweep_limit)")
    first = try_all(config, meshes[:limit], topology, slices, workers, say)
    best = [outcome.variant for outcome in first[:_BEST] if outcome.report is not None]
    others = [
        Variant(mesh.changes + policy.changes) for mesh in best for policy in remat_variants(config)
    ]
    return sorted(first + try_all(config, others, topology, slices, workers, say), key=_rank)


def what_would_help(
    config: RunConfig,
    topology: str,
    slices: int,
    mesh: dict[str, int],
    *,
    workers: int,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Compiles changes that may need less memory than a config that does not fit; best first."""
    changes = list(smaller_variants(config, mesh))
    return try_all(config, changes, topology, slices, workers, say)


def try_all(
    config: RunConfig,
    variants: Sequence[Variant],
    topology: str,
    slices: int,
    workers: int,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Compiles every variant, telling of each; best first."""
    done = []
    for outcome in outcomes(config, variants, topology, slices, workers):
        done.append(outcome)
        say(f"[{len(done)}/{len(variants)}] {outcome_line(outcome)}")
    return sorted(done, key=_rank)


def outcome_line(outcome: Outcome) -> str:
    """One variant: memory against what there is, the time of a step, MFU."""
    if outcome.report is None:
        return f"{outcome.variant}: failed: {outcome.failure}"
    report, memory = outcome.report, outcome.report.memory
    at_least = "at least " if memory.estimated else ""
    line = f"{outcome.variant}: {at_least}{gib(memory.total)} of {gib(memory.available)}"
    if report.counted is None or not report.fits:
        return line + ", does not fit"
    low, high = report.counted.speed.step_seconds
    mfu = report.counted.speed.mfu
    return line + (
        f", step {low:.2f} to {high:.2f} s, MFU {mfu[1]:.1%} to {mfu[0]:.1%},"
        f" {report.counted.binds} binds"
    )


def outcome_json(outcome: Outcome) -> dict:
    """A variant and its report, or its failure, for `json`."""
    report = None if outcome.report is None else outcome.report.to_json()
    return {"variant": str(outcome.variant), "failure": outcome.failure, "report": report}


def _rank(outcome: Outcome) -> tuple[int, float]:
    report = outcome.report
    if report is None:
        return 2, math.inf
    if report.fits and report.counted is not None:
        # The mean of both bounds: neither is reached.
        return 0, sum(report.counted.speed.step_seconds)
    return 1, report.memory.total
