"""Reports made in processes of their own, so that one that fails ends nothing else."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import jax

from storm_jax.aot.analyse import Report, analyse
from storm_jax.aot.topology import describe
from storm_jax.aot.variants import Variant
from storm_jax.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Outcome:
    """What became of a variant: a report, or why there is none."""

    variant: Variant
    report: Report | None
    failure: str = ""

    @property
    def fits(self) -> bool:
        return self.report is not None and self.report.fits


def outcomes(
    config: RunConfig, variants: Sequence[Variant], topology: str, slices: int, workers: int
) -> Iterator[Outcome]:
    """Compiles variants of a config, `workers` at a time, and yields them as they are done.

    Each has a process of its own: a compiler that aborts, or takes all memory and is killed, is the
    failure of that variant.
    """
    waiting = list(variants)
    running: dict[Future, tuple[Variant, ProcessPoolExecutor]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            variant = waiting.pop(0)
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            future = pool.submit(_report, config, variant, topology, slices)
            running[future] = (variant, pool)
        done = next(as_completed(running))
        variant, pool = running.pop(done)
        yield _outcome(variant, done)
        pool.shutdown()


def _report(config: RunConfig, variant: Variant, topology: str, slices: int) -> Report:
    jax.config.update("jax_platforms", "cpu")
    return analyse(variant.apply(config), describe(topology, slices))


def _outcome(variant: Variant, done: Future) -> Outcome:
    try:
        return Outcome(variant, done.result())
    except BrokenProcessPool:
        return Outcome(variant, None, "the compiler's process died (out of this host's memory?)")
    except ConfigError as error:
        return Outcome(variant, None, str(error))
    except Exception as error:  # the compiler's, of many kinds: the sweep goes on
        first = (str(error).splitlines() or [""])[0][:300]
        return Outcome(variant, None, f"{type(error).__name__}: {first}")
