"""Grid points side by side: processes that share one device, because compiling takes longest."""

import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from storm_jax.evidence_grid.recipe import Recipe
from storm_jax.evidence_grid.results import Folder

_SHARE = 0.92  # of the device's memory, over all processes


def run_all(recipes: Sequence[Recipe], data: str, out: str, workers: int) -> list[str]:
    """Trains and scores the points that have no result; returns what failed, one text a group.

    Args:
      data: folder that `clips.prepare` filled.
      out: folder of results; compiled programs are kept in it too.
      workers: processes.

    Raises:
      EvidenceError: a result is of another recipe.
    """
    folder = Folder(out)
    missing = [recipe for recipe in recipes if not folder.has(recipe)]
    say(f"{len(recipes) - len(missing)} of {len(recipes)} grid points are there already")
    if not missing:
        return []
    groups: dict[Recipe, list[Recipe]] = {}
    for recipe in missing:
        groups.setdefault(first_stage_of(recipe), []).append(recipe)
    jobs = sorted(groups.values(), key=lambda g: sum(r.point.frames for r in g), reverse=True)
    workers = min(workers, len(jobs))
    # Read when JAX starts, in the processes.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{_SHARE / workers:.3f}"
    context = multiprocessing.get_context("spawn")
    failed, began, done = [], time.time(), 0
    # A process a group: its memory on the device goes with it.
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(_group, job, data, out): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            names = ", ".join(recipe.point.name for recipe in job)
            try:
                future.result()
            except Exception as error:  # the others go on; the command fails at the end
                failed.append(f"{names}: {type(error).__name__}: {error}")
                say(f"FAILED {failed[-1]}")
            done += len(job)
            passed = time.time() - began
            left = passed / done * (len(missing) - done)
            say(f"{done} of {len(missing)} points in {passed:.0f} s, about {left:.0f} s left")
    return failed


def first_stage_of(recipe: Recipe) -> Recipe:
    """Equal for recipes whose first stage is the same."""
    point = dataclasses.replace(recipe.point, frames=0)
    return dataclasses.replace(recipe, point=point, long=recipe.short)


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _group(recipes: list[Recipe], data: str, out: str) -> None:
    # Here, so that the first process never starts JAX.
    from storm_jax.evidence_grid import point_run
    from storm_jax.evidence_grid.turns import Turns
    from storm_jax.training import compile_cache

    compiled = os.path.join(out, "compiled")
    compile_cache.enable(compiled)

    def told(name: str, text: str) -> None:
        say(f"{name:<22} {text}")

    began = time.time()
    for name, found in point_run.results(recipes, data, Turns(compiled), told):
        Folder(out).write(name, {**found, "seconds": round(time.time() - began, 1)})
        began = time.time()
